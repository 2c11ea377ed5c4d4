"""Does the causal Soft MoE help, and if so, why? Every variant at equal parameters, data, steps and recipe.

    python study.py                                       # everything; 40 minutes on two cores; goes on where it stopped
    python study.py --only dense causal --seeds 1         # some of it
    python study.py --only dense causal --minutes 4 --out out/minutes        # equal time instead of equal steps
    python study.py --steps 4 --seeds 1 --flags=--no-compile --out out/quick # whether it runs

A run is one call of train.py on one thread; two run side by side. out/study/NAME-SEED keeps what a run found. Every run reads
these files anew: leave them alone until the last has begun.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from benchmark import peak_memory
from eval import evenly_spaced, leak
from model import Decoder
from prepare import TokenData
from sources import write_atomically

# name -> flags of train.py, number of seeds
VARIANTS = {
    "dense": ("--ffn dense", 3),
    "token": ("--dispatch token", 3),
    "causal": ("", 3),  # W = 4
    "convolution": ("--ffn dense", 3),
    "decay": ("--ffn dense", 1),
    "convolution-token": ("--dispatch token", 1),
    "causal-w2": ("--window 2", 1),
    "causal-w8": ("--window 8", 1),
    "causal-w16": ("--window 16", 1),
    "causal-p2": ("--slots-per-expert 2", 1),
    "causal-e3": ("--n-expert 3 --d-expert 128", 1),
    "causal-e12": ("--n-expert 12", 1),
    "causal-swiglu2": ("--expert swiglu2", 1),
    "sequence": ("--dispatch sequence", 1),
}


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants to run")
    parser.add_argument("--seeds", type=int, help="of each variant, instead of its own number")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="of each run; 500 if neither is given")
    length.add_argument("--minutes", type=float, help="of each run: variants then meet at equal time, if they run side by side")
    parser.add_argument("--data", default=train.DEFAULT_DATA)
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--flags", default="", help="more flags of train.py for every run, in one string")
    parser.add_argument("--run", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)  # one run: what a worker calls
    args = parser.parse_args(argv)
    for name, low in (("steps", 1), ("workers", 1), ("seeds", 1), ("minutes", 0.01)):
        if getattr(args, name) is not None and not getattr(args, name) >= low:
            parser.error(f"--{name} {getattr(args, name)}: expected {low} or more")
    if args.steps is None and args.minutes is None:
        args.steps = 500
    return args


# ---------------------------------------------------------------------------------------------------------------
# Candidates from outside: another way of mixing with the tokens before, in front of a feed-forward layer


class Convolution(nn.Module):
    """A depthwise causal convolution over the last 4 tokens: a weight per channel and distance, the same everywhere."""

    def __init__(self, config):
        super().__init__()
        self.kernel = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(config.d_model, 1))  # a slot's start does no better
        self.state = 3 * config.d_model  # numbers to keep for decoding: the inputs before

    def forward(self, x):
        T = x.shape[1]
        padded = F.pad(x, (0, 0, 3, 0))
        return sum(self.kernel[:, k] * padded[:, 3 - k : 3 - k + T] for k in range(4))


class Decay(nn.Module):
    """The mean of all tokens so far, weighted exp(-rate * distance), with a bonus for the token itself; 8 groups of channels."""

    def __init__(self, config):
        super().__init__()
        if config.d_model % 8:
            raise SystemExit(f"decay: d_model = {config.d_model} is not a multiple of 8")
        self.rate = nn.Parameter(torch.linspace(0.1, 2.0, 8))
        self.bonus = nn.Parameter(torch.full((8,), 2.0))
        self.state = config.d_model + 8  # the weighted sums and their weights

    def forward(self, x):
        index = torch.arange(x.shape[1], device=x.device)
        distance = index[:, None] - index
        scores = self.bonus[:, None, None] * (distance == 0) - self.rate.abs()[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)  # [8, T, T]
        return (weights @ x.unflatten(-1, (8, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


class Behind(nn.Module):
    """A feed-forward layer behind a mixing of its input."""

    def __init__(self, mixing, ffn):
        super().__init__()
        self.mixing, self.ffn = mixing, ffn

    def forward(self, x, place, cache=None, layer=0):
        return self.ffn(self.mixing(x), place)


CANDIDATES = {"convolution": Convolution, "convolution-token": Convolution, "decay": Decay}


class Candidate(Decoder):
    """A decoder with a mixing in front of each feed-forward layer; set its class first. How it would decode is not written."""

    mixing = None
    has_cache = False

    def __init__(self, config):
        super().__init__(config)
        if config.reset_id >= 0:
            raise SystemExit("the candidates from outside know no documents: leave --reset-at-eos out")
        for block in self.blocks:
            block.ffn = Behind(self.mixing(config), block.ffn)


# ---------------------------------------------------------------------------------------------------------------


def settings(args):
    """What two results must have in common to stand in one table."""
    return {"steps": args.steps, "minutes": args.minutes, "data": args.data, "flags": args.flags}


def step_memory(model, data, micro_batch, compiled):
    """Most bytes alive during the forward and backward of one micro-batch, beyond weights and optimizer."""
    ids = torch.from_numpy(np.stack([data[i % len(data)] for i in range(micro_batch)]))
    for block in model.blocks if compiled else ():
        block.compile()

    def step():
        model(ids[:, :-1], ids[:, 1:]).backward()
        model.zero_grad()

    return peak_memory(step)


def decode_state(model):
    """Numbers that one feed-forward layer keeps for each text while decoding; None: it grows with the text."""
    if model.config.reads_ahead:
        return None
    ffn = model.blocks[0].ffn
    return ffn.mixing.state if isinstance(ffn, Behind) else sum(a.numel() for a in model.new_cache(1, 1).recent[0])


def run_one(name, seed, args):
    """Train one variant and write what it found to result.json."""
    out = args.out / f"{name}-{seed}"
    if name in CANDIDATES:
        Candidate.mixing = CANDIDATES[name]
        train.Decoder = Candidate
    argv = [*args.flags.split(), *VARIANTS[name][0].split(), "--data", args.data, "--out", str(out), "--seed", str(seed)]
    argv += ["--steps", str(args.steps)] if args.steps else ["--minutes", str(args.minutes)]
    argv += ["--eval-every", "0", "--save-every", "200", "--keep", "1"]
    train.main(argv + (["--resume"] if any(out.glob("step-*")) else []))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if "val_loss" not in lines[-1]:
        raise SystemExit("stopped before its end; the same command goes on")
    model = train.Decoder.load(out)
    state = json.loads((model.checkpoint / "state.json").read_text(encoding="utf-8"))
    val = TokenData(args.data, "val", model.config.block_size)
    result = {"loss": lines[-1]["val_loss"], "bpb": lines[-1]["val_bpb"], "parameters": model.n_params(),
              "trained": sum(served for _, served in state["phases"]) * model.config.block_size, "state": decode_state(model),
              "speed": statistics.median(line["tokens_per_second"] for line in lines if "loss" in line)}  # fmt: skip
    if name == "sequence":  # its own loss says nothing; how far it is off is measured on every fifth block or so
        scores = leak(model, torch.from_numpy(np.stack([val[i] for i in evenly_spaced(val, 32_768)])))
        result["claimed"] = result["loss"]
        result["loss"] += scores["honest"] - scores["teacher-forced"]
        result["bpb"] *= result["loss"] / result["claimed"]
    result["memory"] = step_memory(model, val, state["args"]["micro_batch"], state["machine"]["compile"])
    write_atomically(out / "result.json", json.dumps(result, indent=1).encode("utf-8"))
    if name in CANDIDATES:
        shutil.rmtree(model.checkpoint)  # sample.py and eval.py would take it for a dense model


def result_of(name, seed, args):
    """What a run found, or None if it is yet to be done."""
    path = args.out / f"{name}-{seed}" / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def open_study(args):
    """The folder of a study is of one kind of run: what has begun in it must not go on in another way."""
    path, given = args.out / "study.json", settings(args)
    if not path.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(given, indent=1).encode("utf-8"))
    begun = json.loads(path.read_text(encoding="utf-8"))
    other = [f"{key} {begun.get(key)!r}, not {value!r}" for key, value in given.items() if begun.get(key) != value]
    if other:
        raise SystemExit(f"{args.out} holds another study ({'; '.join(other)}): choose another --out")


def run_all(args, seeds):
    """Every run that has no result yet, args.workers at a time; returns the logs of those that failed."""
    todo = [(name, seed) for seed in range(max(seeds.values())) for name in args.only if seed < seeds[name]]
    todo = [run for run in todo if not result_of(*run, args)]
    running, failed = {}, []
    try:
        while todo or running:
            while todo and len(running) < args.workers:
                name, seed = todo.pop(0)
                log = args.out / f"{name}-{seed}.log"
                command = [sys.executable, __file__, "--run", name, seed, "--data", args.data]
                command += ["--steps", args.steps] if args.steps else ["--minutes", args.minutes]
                with open(log, "w", encoding="utf-8") as file:
                    process = subprocess.Popen(
                        [str(part) for part in (*command, "--out", args.out, f"--flags={args.flags}")],
                        stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                    )  # fmt: skip
                running[process] = log
            for process in [process for process in running if process.poll() is not None]:
                log = running.pop(process)
                print(f"{log.stem}: " + (f"failed, see {log}" if process.returncode else "done"), file=sys.stderr, flush=True)
                failed += [str(log)] if process.returncode else []
            time.sleep(0.2)
    finally:  # Ctrl-C: a run saves where it is, and the same command goes on from there
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


def print_table(args, seeds):
    print(f"| variant | parameters | seeds | val loss | spread | val bpb | trained on, M tokens | tok/s "
          f"| peak of a step, MB | decode state |\n|{'---|' * 10}")
    for name in args.only:
        results = [result for seed in range(seeds[name]) if (result := result_of(name, seed, args))]
        if not results:
            continue
        mean = {key: statistics.mean(result[key] for result in results) for key in ("loss", "bpb", "trained", "speed", "memory")}
        losses = [result["loss"] for result in results]
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else ""
        claimed = f" (it claims {results[0]['claimed']:.4f})" if "claimed" in results[0] else ""
        print(f"| {name} | {results[0]['parameters']:,} | {len(losses)} | {mean['loss']:.4f}{claimed} | {spread} | "
              f"{mean['bpb']:.4f} | {mean['trained'] / 1e6:.3f} | {mean['speed']:,.0f} | {mean['memory'] / 1e6:,.1f} "
              f"| {'grows' if results[0]['state'] is None else results[0]['state']} |")  # fmt: skip


def main(argv=None):
    args = get_args(argv)
    if args.run:
        return run_one(args.run[0], int(args.run[1]), args)
    seeds = {name: args.seeds or VARIANTS[name][1] for name in args.only}
    open_study(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        failed = run_all(args, seeds)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on")
    print_table(args, seeds)
    if failed:
        raise SystemExit(f"these runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
