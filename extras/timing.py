"""Measure the time and the memory of a function."""

import itertools
import statistics
import time

import torch


def autocast(device):
    """bf16 on CUDA, as in train.py; fp32 on every CPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")


def timed(function, device="cpu"):
    """-> (seconds that a call takes, its result)."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def median_seconds(functions, repeats, device="cpu", warm_up=3):
    """The median time of each function. They take turns, so that a slow spell of the machine hits all of them."""
    for function in functions * warm_up:
        function()
    times = [[timed(function, device)[0] for function in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)]


def peak_memory(step, device="cpu"):
    """The most bytes that tensors hold at one time of a step, beyond what they held before it. Exact on a CPU."""
    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))
