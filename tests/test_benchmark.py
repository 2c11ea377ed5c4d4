"""The benchmark runs and prints every line; its numbers are a matter of the machine."""

import re

import torch
from conftest import call

from benchmark import peak_memory


def test_a_small_benchmark_prints_every_line():
    lines = call("benchmark.py", "--d-model", 64, "--n-expert", 2, "--repeats", 1, "--no-compile").stdout.splitlines()
    beginnings = (f"{torch.get_num_threads()} threads, width 64, 2 experts", "forward + backward", "peak memory", "microseconds a token", "decoding")
    assert len(lines) == 5 and all(line.startswith(start) for line, start in zip(lines, beginnings))
    peaks = [int(number) for number in re.findall(r"(\d+) MB", lines[2])]
    assert len(peaks) == 2 and min(peaks) > 0
    assert lines[4].endswith("state: 192, 192, 192, 192 numbers")  # W - 1 inputs of width 64, at any length


def test_peak_memory_counts_what_is_alive_at_once():
    def step():
        a = torch.ones(1000)
        b = a + 1
        del a
        return b * b * b  # b, b * b and the result

    assert peak_memory(step) == 3 * 4000
