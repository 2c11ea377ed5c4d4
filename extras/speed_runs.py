"""Runs of train.py for extras.speed: how they start, what a step waits for, two processes, and the curve of a run."""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from checkpoint import load
from common import keep_large_buffers
from data import TokenData, batch_at
from extras.plot import pyplot
from extras.timing import median_seconds
from optim import make_optimizers
from parallel import gather_state

ROOT = Path(__file__).parent.parent

# ----------------------------------------------------------------------------------------------------------------------
# run: train.py as a user starts it


def train_command(out, *flags, processes=1):
    """The command of a long run that logs every step."""
    start = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", processes]
    long_run = "--steps 100000 --log-every 1 --eval-every 0".split()
    return [str(part) for part in (sys.executable, *start, ROOT / "train.py", "--out", out, *long_run, *flags)]


def run_until(command, step, **environment):
    """Run train.py up to a step -> seconds from its start to the end of the first step, median seconds of a step."""
    start, first, times = time.perf_counter(), None, []
    pipe = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8", "env": {**os.environ, **environment}}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(command, stderr=errors, **pipe) as process,
    ):
        for line in process.stdout:
            if found := re.match(r"step +(\d+)/.* (\d+) ms", line):
                first = first or time.perf_counter() - start
                times.append(int(found[2]) / 1000)
                if int(found[1]) >= step:
                    break
        process.terminate()
        process.stdout.read()
        if not times:
            errors.seek(0)
            raise ValueError(f"{' '.join(command)} made no step: {errors.read()}")
    return first, statistics.median(times[5:] or times)


def state_times(out, repeats=20):
    """-> median seconds to read a step's batch, and to copy the state of model and optimizers, of the run in `out`."""
    model, _, info = load(out)
    flags, block_size = info.state["args"], model.config.block_size
    data, n = TokenData(flags["data"], "train", block_size), flags["batch_tokens"] // block_size
    optimizers = make_optimizers(model, *(flags[key] for key in ("optimizer", "lr", "weight_decay", "bf16")))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    counter, phases = itertools.count(), info.state["phases"]

    def read_batch():
        batch_at(data, phases, 0, next(counter) * n, n)

    def copy_state():
        gather_state([model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]], 0)

    return median_seconds([read_batch, copy_state], repeats, warm_up=0)


def benchmark_run(args, flags=(), steps=40):
    """Everything of the default model and data, except for the flags."""
    keep_large_buffers()
    repeats = max(1, args.repeats // 5)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        cold, step = run_until(train_command(out, *flags), steps)
        resume = train_command(out, *flags, "--resume")
        resumed = statistics.median(run_until(resume, 0)[0] for _ in range(repeats))
        print(
            f"from the command to the end of the first step: {cold:.1f} s, with --resume {resumed:.1f} s; "
            f"a step: {1000 * step:.0f} ms"
        )
        for what, took in zip(("loading", "copying the state"), state_times(out)):
            print(f"{what}: {1000 * took:.1f} ms, {took / step:.1%} of a step")

        times = {1: [], 2: []}
        for i in range(repeats):
            for processes, seconds in times.items():
                command = train_command(Path(folder) / f"{processes}-{i}", *flags, processes=processes)
                seconds.append(run_until(command, steps, OMP_NUM_THREADS="1")[1])
        one, two = (statistics.median(seconds) for seconds in times.values())
        print(
            f"a step of one process of one thread: {1000 * one:.0f} ms; of two, each with as many tokens: "
            f"{1000 * two:.0f} ms: {2 * one / two:.2f}x the tokens a second"
        )


# ----------------------------------------------------------------------------------------------------------------------
# curve: validation bits per byte against minutes of training


def read_curve(run):
    """[(minutes of training, val_bpb)] of a run's evaluations, from its metrics.jsonl."""
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a run at work may be in the middle of its last line
    points, seconds = [], 0.0
    for values in map(json.loads, lines):
        seconds = values.get("seconds", seconds)  # an evaluation follows the training line of its step
        if values.get("val_bpb") is not None:
            points.append((seconds / 60, values["val_bpb"]))
    if not points:
        raise ValueError(f"{path} has no evaluation yet: train with --eval-every, or let the run end")
    return points


def draw_curves(args):
    curves = {run: read_curve(run) for run in args.runs}
    for run, points in curves.items():
        minutes, bpb = points[-1]
        print(f"{run}: val bpb {bpb:.4f} after {minutes:.1f} minutes")
    if args.png:
        figure, axis = pyplot().subplots(figsize=(7, 4))
        for run, points in curves.items():
            axis.plot(*zip(*points), label=Path(run).resolve().name)
        axis.set(xlabel="minutes of training", ylabel="validation bits per byte")
        axis.grid(alpha=0.3)
        axis.legend()
        figure.savefig(args.png, dpi=100, bbox_inches="tight")
        print(f"drawn: {args.png}")
