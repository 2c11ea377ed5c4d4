"""Does the causal Soft MoE help, and why? Every variant at equal parameters, data, steps and recipe.

    python -m extras.study                                       # everything: 75 minutes on two cores; can be resumed
    python -m extras.study --only dense causal --seeds 1         # a part of it
    python -m extras.study --only dense causal --minutes 4 --out out/minutes         # equal time instead of equal steps
    python -m extras.study --steps 4 --seeds 1 --flags=--no-compile --out out/quick  # a test of the whole
    python -m extras.study --mixes --out out/mixes                 # the default model on mixes of the default sources
    python -m extras.sizes out/small out/large                     # compares studies of several sizes

A run is one call of train.py on one thread; two run at a time. out/study/NAME-SEED keeps its result. Each run imports
the code anew, so do not edit it before the last one has started. Choose settings by the first half of the held-out text
alone: the second is for what is reported.
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
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from checkpoint import newest_checkpoint, read_state, read_tensors
from common import flops_per_token, run_command, write_atomically
from data import TokenData, evenly_spaced
from eval import evaluate, leak
from extras.timing import peak_memory
from model import Attention, Cache, Config, Decoder, Dense
from optim import make_optimizers
from tokenizer import load_tokenizer

# name -> flags of train.py, number of seeds
VARIANTS = {
    "dense": ("--ffn dense", 3),
    "token": ("--dispatch token", 3),
    "causal": ("", 3),  # a window of 4
    "canon-C": ("--ffn dense", 3),
    "decay": ("--ffn dense", 1),
    "convolution-token": ("--dispatch token", 1),
    "dense-ve": ("--ffn dense --value-embedding", 3),
    "causal-ve": ("--value-embedding", 3),
    **{f"canon-{places}": ("--ffn dense", 1) for places in ("A", "B", "D")},
    "canon-ABCD": ("--ffn dense", 3),
    "dynamic-B": ("--ffn dense", 1),
    "dynamic-D": ("--ffn dense", 1),
    "window-B": ("--ffn dense", 1),
    "causal-window-B": ("", 1),  # also on q, k and v
    "causal-e1": ("--n-expert 1 --d-expert 384", 3),  # a window alone: nothing is routed
    "causal-w2": ("--window 2", 1),
    "causal-w8": ("--window 8", 1),
    "causal-w16": ("--window 16", 1),
    "causal-p2": ("--slots-per-expert 2", 1),
    "causal-e3": ("--n-expert 3 --d-expert 128", 1),
    "causal-e12": ("--n-expert 12", 1),
    "causal-swiglu2": ("--expert swiglu2", 1),
    "sequence": ("--dispatch sequence", 1),
}
MIXES = {
    "as it is": ("", 2),
    "novel": ("--mix-share novel=1", 2),
    "novel 80 newspaper 20": ("--mix-share novel=0.8,newspaper=0.2", 2),
    "newspaper 80 novel 20": ("--mix-share newspaper=0.8,novel=0.2", 2),
    "newspaper": ("--mix-share newspaper=1", 2),
}
RUNS = VARIANTS | MIXES
LEAK_TOKENS = 32_768  # of the held-out text, to score the sequence dispatch honestly


def get_args(argv=None):
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.study", description=__doc__.split("\n\n")[0], formatter_class=defaults
    )
    parser.add_argument("--mixes", action="store_true", help="compare mixes of the default sources instead of layers")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="variants to run; all if none is named")
    parser.add_argument("--seeds", type=int, help="of each variant, instead of its own number")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="of each run; 500 if neither is given")
    length.add_argument("--minutes", type=float, help="of each run, to compare at equal time")
    parser.add_argument("--data", default=train.DEFAULT_DATA)
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--mixing-rate", type=float, default=4.0, help="rate of the mixing layers' weights, times --lr")
    parser.add_argument("--flags", default="", help="more flags of train.py for every run, in one string")
    parser.add_argument("--run", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)  # what a worker calls
    args = parser.parse_args(argv)
    for name, low in (("steps", 1), ("workers", 1), ("seeds", 1), ("minutes", 0.01)):
        if getattr(args, name) is not None and not getattr(args, name) >= low:
            parser.error(f"--{name} {getattr(args, name)}: expected {low} or more")
    args.only = args.only or list(MIXES if args.mixes else VARIANTS)
    if args.steps is None and args.minutes is None:
        args.steps = 500
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Candidates from outside: other ways to mix in earlier tokens


def last_four(u, before=0.0):
    """u [B, T, ...] -> what stands at t, t - 1, t - 2 and t - 3, `before` in front of the text: four of its shape."""
    T, padded = u.shape[1], F.pad(u, (0, 0) * (u.ndim - 2) + (3, 0), value=before)
    return [padded[:, 3 - k : 3 - k + T] for k in range(4)]


class Convolution(nn.Module):
    """A depthwise causal convolution over the last 4 tokens: one weight for each channel and distance.

    It starts as the identity, so that it is Canon's (arXiv 2512.17351), which adds one that starts at 0 to its input.
    """

    def __init__(self, d_model, width, groups):
        super().__init__()
        self.kernel = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(width, 1))
        self.state = 3 * width  # numbers to keep for decoding: the last inputs

    def forward(self, x, u):
        return sum(self.kernel[:, k] * past for k, past in enumerate(last_four(u)))


class DynamicConvolution(nn.Module):
    """A causal convolution over the last 4 tokens whose weights the reading token makes, one for each group of channels
    and distance (arXiv 2606.03825). What it gives is added to its input."""

    def __init__(self, d_model, width, groups):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(groups * 4, d_model))
        self.groups, self.state = groups, 3 * width

    def forward(self, x, u):
        """x [B, T, D] makes the weights; u [B, T, width] is mixed."""
        weights = F.linear(x, self.kernel).unflatten(-1, (self.groups, 4))
        parts = last_four(u.unflatten(-1, (self.groups, -1)))
        return u + sum(weights[..., k, None] * past for k, past in enumerate(parts)).flatten(2)


class Window(nn.Module):
    """The causal layer's window (docs/layer.md), a slot for each group of channels: a softmax over the last 4 tokens of
    the router's logits of each, which come from x."""

    def __init__(self, d_model, width, groups):
        super().__init__()
        self.phi = nn.Parameter(torch.randn(groups, d_model) * d_model**-0.5)
        self.scale = nn.Parameter(torch.ones(1))
        self.recency = nn.Parameter(torch.tensor([2.0, 0.0, 0.0, 0.0]).repeat(groups, 1))
        self.groups, self.state = groups, 3 * (width + groups)

    def forward(self, x, u):
        """x [B, T, D] makes the weights; u [B, T, width] is mixed."""
        logits = self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.phi, dim=-1))
        scores = [past + self.recency[:, k] for k, past in enumerate(last_four(logits, -torch.inf))]
        weights = torch.stack(scores).softmax(0).to(u.dtype)[..., None]
        return sum(weights * torch.stack(last_four(u.unflatten(-1, (self.groups, -1))))).flatten(2)


class Decay(nn.Module):
    """The mean of all tokens so far, weighted exp(-rate * distance), with a bonus for the token itself; 8 groups."""

    def __init__(self, d_model, width, groups):
        super().__init__()
        if width % 8:
            raise ValueError(f"decay: d_model = {width} is not a multiple of 8")
        self.rate = nn.Parameter(torch.linspace(0.1, 2.0, 8))
        self.bonus = nn.Parameter(torch.full((8,), 2.0))
        self.state = width + 8  # the weighted sums and their weights

    def forward(self, x, u):
        index = torch.arange(u.shape[1], device=u.device)
        distance = index[:, None] - index
        scores = self.bonus[:, None, None] * (distance == 0) - self.rate.abs()[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)  # [8, T, T]
        return (weights @ u.unflatten(-1, (8, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


def mix_input(layer, mixing):
    """Let a layer read the output of a mixing layer."""
    layer.mixing_input = mixing
    layer.register_forward_pre_hook(lambda layer, inputs: (mixing(inputs[0], inputs[0]), *inputs[1:]))


class MixedAttention(Attention):
    def project(self, x):
        return self.mixing(x, super().project(x))


class MixedDense(Dense):
    def forward(self, x, place, cache=None, layer=0):
        gate, up = self.mixing(x, F.linear(x, self.w_in.flatten(0, 1))).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.w_out


CANDIDATES = {  # name -> class of the mixing layers, Canon's places of them
    **{f"canon-{places}": (Convolution, places) for places in ("A", "B", "C", "D", "ABCD")},
    "convolution-token": (Convolution, "C"),
    "decay": (Decay, "C"),
    "dynamic-B": (DynamicConvolution, "B"),
    "dynamic-D": (DynamicConvolution, "D"),
    "window-B": (Window, "B"),
    "causal-window-B": (Window, "B"),
}


class Candidate(Decoder):
    """A decoder with mixing layers at Canon's places: A before attention, B on q, k and v, C before the feed-forward
    layer, D on what its first matrix gives. It cannot decode."""

    kind, places = None, ""

    def __init__(self, config):
        super().__init__(config)
        self.has_cache = False
        if config.reset_id >= 0:
            raise ValueError("the candidates from outside mix across documents: leave --reset-at-eos out")
        D, heads = config.d_model, config.n_head + 2 * config.n_kv_head
        for block in self.blocks:
            if "B" in self.places:
                block.attention.__class__ = MixedAttention
                block.attention.mixing = self.kind(D, heads * config.head_width, heads)
            if "D" in self.places:
                block.ffn.__class__ = MixedDense
                block.ffn.mixing = self.kind(D, 2 * config.d_dense, 2 * config.n_expert)
            if "A" in self.places:
                mix_input(block.attention, self.kind(D, D, config.n_head))
            if "C" in self.places:
                mix_input(block.ffn, self.kind(D, D, config.n_head))


def decoder_class(name):
    """The class of a variant's model."""
    if name not in CANDIDATES:
        return Decoder
    kind, places = CANDIDATES[name]
    return type("Candidate", (Candidate,), {"kind": kind, "places": places})


# ----------------------------------------------------------------------------------------------------------------------
# One run, in a process of its own


def train_variant(name, seed, args):
    """Train, or resume; returns the checkpoint at the end. ValueError if it was stopped before."""
    out = args.out / f"{name}-{seed}"
    train.Decoder = decoder_class(name)
    train.make_optimizers = partial(optimizers_with, args.mixing_rate)
    argv = [*args.flags.split(), *RUNS[name][0].split(), "--data", args.data, "--out", str(out)]
    argv += ["--steps", str(args.steps)] if args.steps else ["--minutes", str(args.minutes)]
    argv += ["--seed", str(seed), "--eval-every", "0", "--save-every", "200", "--keep", "1"]
    train.main(argv + (["--resume"] if any(out.glob("step-*")) else []))
    if "val_loss" not in read_metrics(out)[-1]:
        raise ValueError("stopped before its end; the same command continues")
    return newest_checkpoint(out)


def optimizers_with(mixing_rate, model, *flags):
    """make_optimizers(), in which the weights of mixing layers learn at a rate of their own."""
    optimizers = make_optimizers(model, *flags)
    mixing = {p for name, p in model.named_parameters() if ".mixing" in name}
    for optimizer in optimizers if mixing else ():
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if p in mixing]
            group["params"] = [p for p in group["params"] if p not in mixing]
            if own:
                optimizer.add_param_group({"params": own, "lr_scale": mixing_rate, "weight_decay": 0.0})
    return optimizers


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def run_one(name, seed, args):
    """Train one variant and write what was measured to result.json."""
    checkpoint = train_variant(name, seed, args)
    out = checkpoint.parent
    state = read_state(checkpoint)
    model = decoder_class(name)(Config(**state["config"]))
    model.load_state_dict(read_tensors(checkpoint / "model.pt"))
    lines = read_metrics(out)
    val = TokenData(args.data, "val", model.config.block_size)
    token_bytes = load_tokenizer(args.data).token_bytes
    to_choose, to_report = (evaluate(model, samples, token_bytes) for samples in halves(val))
    by = {key.partition("/")[2]: value for key, value in lines[-1].items() if key.startswith("val_bpb/")}
    trained = sum(phase["served"] for phase in state["phases"]) * model.config.block_size
    result = {
        "choose": to_choose["loss"],
        "loss": to_report["loss"],
        "bpb": to_report["bpb"],
        "bpb_by": by | {"all": lines[-1]["val_bpb"]},
        "parameters": model.n_params(),
        "trained": trained,
        "flops": trained * flops_per_token(model, model.config.block_size),
        "state": decode_state(model),
        "speed": statistics.median(line["tokens_per_second"] for line in lines if "loss" in line),
    }
    if name == "sequence":  # its own loss is not honest; the error is measured on a part of the text
        scores = leak(model, torch.from_numpy(np.stack([val[i] for i in evenly_spaced(val, LEAK_TOKENS)])))
        result["claimed"] = result["loss"]
        for key in ("choose", "loss"):
            result[key] += scores["honest"] - scores["teacher-forced"]
        result["bpb"] *= result["loss"] / result["claimed"]
    result["memory"] = step_memory(model, val, state["args"]["micro_batch"], state["machine"]["compile"])
    write_atomically(out / "result.json", json.dumps(result, indent=1).encode("utf-8"))
    if name in CANDIDATES:
        shutil.rmtree(checkpoint)  # sample.py and eval.py could not load it


def halves(data):
    """-> the samples, rows of ids, of the first half of each source of held-out text, and of the second."""
    first, second = [], []
    for source, n in data.samples().items():
        rows = [data[data.number(source, i)] for i in range(n)]
        first += rows[: n // 2]
        second += rows[n // 2 :]
    return first, second


def step_memory(model, data, micro_batch, compiled):
    """The most bytes alive during forward and backward of one micro-batch, beyond weights and optimizer, in fp32."""
    ids = torch.from_numpy(np.stack([data[i % len(data)] for i in range(micro_batch)]))
    for block in model.blocks if compiled else ():
        block.compile()

    def step():
        model(ids[:, :-1], ids[:, 1:]).backward()
        model.zero_grad()

    return peak_memory(step)


def decode_state(model):
    """How many numbers a block keeps for each text while decoding, keys and values apart; None: it grows."""
    if model.config.reads_ahead:
        return None
    mixing = sum(layer.state for layer in model.blocks[0].modules() if hasattr(layer, "state"))
    return mixing + sum(a.numel() for a in Cache(model.config, 1, 1, "cpu", torch.float32).recent[0])


# ----------------------------------------------------------------------------------------------------------------------
# All runs


def read_result(name, seed, args):
    """What a run measured, or None if it is still to be done."""
    path = args.out / f"{name}-{seed}" / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def open_study(args):
    """Create the folder of a study, or refuse one with results of other flags: they cannot be in the same table."""
    path = args.out / "study.json"
    settings = {key: getattr(args, key) for key in ("steps", "minutes", "data", "flags", "mixing_rate")}
    if not path.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=1).encode("utf-8"))
    begun = json.loads(path.read_text(encoding="utf-8"))
    other = [f"{key} {begun.get(key)!r}, not {value!r}" for key, value in settings.items() if begun.get(key) != value]
    if other:
        raise ValueError(f"{args.out} holds another study ({'; '.join(other)}): choose another --out")


def start_run(name, seed, log, args):
    """Start a run in a process of one thread, whose output goes to the file `log`."""
    command = [sys.executable, "-m", "extras.study", "--run", name, seed, "--data", args.data, "--out", args.out]
    command += ["--steps", args.steps] if args.steps else ["--minutes", args.minutes]
    command += [f"--flags={args.flags}", "--mixing-rate", args.mixing_rate]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w", encoding="utf-8") as file:
        return subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment)


def run_all(args, seeds):
    """Make every run that has no result yet, args.workers at a time; returns the logs of those that failed."""
    todo = [(name, seed) for seed in range(max(seeds.values())) for name in args.only if seed < seeds[name]]
    todo = [run for run in todo if not read_result(*run, args)]
    running, failed = {}, []
    try:
        while todo or running:
            while todo and len(running) < args.workers:
                name, seed = todo.pop(0)
                log = args.out / f"{name}-{seed}.log"
                running[start_run(name, seed, log, args)] = log
            for process in [process for process in running if process.poll() is not None]:
                log = running.pop(process)
                outcome = f"failed, see {log}" if process.returncode else "done"
                print(f"{log.stem}: {outcome}", file=sys.stderr, flush=True)
                failed += [str(log)] if process.returncode else []
            time.sleep(0.2)
    finally:  # on Ctrl-C each run saves and stops, and the same command resumes it
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


HEADER = """\
| variant | parameters | seeds | loss, first half | loss, second half | spread | bpb, second half \
| trained on, M tokens | tok/s | peak of a step, MB | decode state |
|---|---|---|---|---|---|---|---|---|---|---|"""


def print_table(args, seeds):
    print(HEADER)
    for name in args.only:
        results = [result for seed in range(seeds[name]) if (result := read_result(name, seed, args))]
        if not results:
            continue
        first = results[0]
        losses = [result["loss"] for result in results]
        keys = ("choose", "loss", "bpb", "trained", "speed", "memory")
        mean = {key: statistics.mean(result[key] for result in results) for key in keys}
        claimed = f" (it claims {first['claimed']:.4f})" if "claimed" in first else ""
        cells = [
            name,
            f"{first['parameters']:,}",
            f"{len(results)}",
            f"{mean['choose']:.4f}",
            f"{mean['loss']:.4f}{claimed}",
            f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "",
            f"{mean['bpb']:.4f}",
            f"{mean['trained'] / 1e6:.3f}",
            f"{mean['speed']:,.0f}",
            f"{mean['memory'] / 1e6:,.1f}",
            "grows" if first["state"] is None else f"{first['state']}",
        ]
        print(f"| {' | '.join(cells)} |")


def print_mixes(args, seeds):
    """Bits per byte of the held-out text of each source, the mean of the seeds and their spread."""
    results = {name: [read_result(name, seed, args) for seed in range(seeds[name])] for name in args.only}
    results = {name: list(filter(None, of_name)) for name, of_name in results.items()}
    sources = [source for source in next((r[0]["bpb_by"] for r in results.values() if r), []) if " " in source]
    print(f"| trained on | {' | '.join(sources)} | all |\n|{'---|' * (len(sources) + 2)}")
    for name, of_name in results.items():
        columns = [[result["bpb_by"][source] for result in of_name] for source in sources]
        columns += [[result["bpb_by"]["all"] for result in of_name]]
        cells = [f"{statistics.mean(c):.3f} ± {(max(c) - min(c)) / 2:.3f}" if c else "" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def main(argv=None):
    args = get_args(argv)
    if args.run:
        return run_one(args.run[0], int(args.run[1]), args)
    seeds = {name: args.seeds or RUNS[name][1] for name in args.only}
    open_study(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        failed = run_all(args, seeds)
    except KeyboardInterrupt:
        raise ValueError("stopped; the same command continues") from None
    (print_mixes if args.mixes else print_table)(args, seeds)
    if failed:
        raise ValueError(f"these runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
