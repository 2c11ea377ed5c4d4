"""Train a decoder on a prepared folder.

    python train.py                                             # default data, demo model, 10 minutes on a laptop's CPU
    python train.py --data data/mine --out out/mine --steps 2000
    python train.py --resume                                    # go on after a stop, with the flags of the run
    torchrun --nproc_per_node 4 train.py --preset small --data data/mine --steps 20000              # 4 GPUs
    torchrun --nproc_per_node 8 train.py --preset steel-1b --shard ...                                   # a model that one cannot hold
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...   # on both nodes

A run leaves out/RUN/metrics.jsonl and checkpoints like out/RUN/step-00000500. Ctrl-C or SIGTERM finishes the step, saves
and exits; --resume goes on from there as if nothing had happened.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import Log, newest_checkpoint, put_aside, read_tensors, save_checkpoint
from eval import MAX_TOKENS, evaluate, evenly_spaced
from model import CHOICES, PRESETS, Config, Decoder, can_compile, choose_device
from prepare import TokenData, inputs_and_targets, prepare
from sample import generate
from tokenizer import load_tokenizer

DEFAULT_DATA = "data/default"
HASHED = 1 << 30  # bytes of the data to look over at each start: a second or two


def get_args(argv=None, **defaults):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default=DEFAULT_DATA, help="folder made by prepare.py; the default one is made when missing")
    add("--out", default="out/demo", help="run directory")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one, with that run's flags where none is given")
    add("--init-from", metavar="PATH", help="start from these weights, of a checkpoint, a run or a Hugging Face folder; their shape is the model's")
    add("--seed", type=int, default=0, help="of the initialisation and of the order of the data")
    # How long, how much at a time
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="length of the run and of its schedule")
    length.add_argument("--minutes", type=float, help="length as time spent on steps; 10 if neither is given")
    add("--micro-batch", type=int, default=16, help="sequences in one forward pass")
    add("--batch-tokens", type=int, help="tokens of a step, over all ranks; by default one micro-batch on each")
    # Optimization
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="for the matrices; AdamW takes the rest")
    add("--lr", type=float, default=6e-3, help="peak learning rate; tuned for the demo model, larger ones want less")
    add("--weight-decay", type=float, default=0.1, help="of the matrices")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--schedule", choices=("cosine", "wsd"), default="wsd", help="after the warm-up, down to 0")
    add("--warmup", type=int, default=50, help="steps from 0 to the peak")
    add("--decay", type=float, default=0.8, help="share of the run in which wsd falls")
    # Now and then
    add("--eval-every", type=int, default=250, help="steps; 0: at the end only")
    add("--eval-tokens", type=int, default=32_768, help="held-out tokens to score along the way")
    add("--save-every", type=int, default=500, help="steps; 0: at the end only")
    add("--keep", type=int, default=2, help="newest checkpoints to keep")
    add("--keep-every", type=int, default=0, help="and those of every so many steps; 0: none")
    add("--log-every", type=int, default=10, help="steps")
    # Machine
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--compile", action=switch, help="torch.compile; by default where a compiler is found")
    add("--exact", action=switch, default=False, help="the same bits at 1, 2, 4, ... processes (of a CPU), for a little memory")
    add("--shard", action=switch, default=False, help="cut parameters, gradients and optimizer over the processes (FSDP2)")
    add("--recompute", action=switch, default=False, help="keep of each block only its input, and run it again in backward: less memory, more time")
    add("--verify", action="store_true", help="hash all shards of the data at the start, not only 1 GB of them")
    add("--dry-run", action="store_true", help="print what the model needs on how many GPUs, and end")
    # Model
    add("--reset-at-eos", action=switch, default=False, help="no reading back over an end of document")
    add("--preset", choices=PRESETS, help="the model, demo by default; any of its fields can be set by a flag of its own")
    for field in fields(Config):
        if field.name in ("vocab_size", "reset_id"):  # follow from the data's tokenizer
            continue
        kind = {"action": switch} if field.type is bool else {"type": field.type}
        add("--" + field.name.replace("_", "-"), choices=CHOICES.get(field.name), default=argparse.SUPPRESS, **kind)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.shard and args.exact:
        parser.error("--exact sums whole gradients: leave --shard out")
    if args.preset and args.init_from:
        parser.error(f"--init-from brings a model of its own: leave --preset {args.preset} out")
    for names, low in (
        ("steps micro_batch batch_tokens eval_tokens log_every keep", 1),
        ("minutes", 0.01),
        ("lr weight_decay clip warmup decay eval_every save_every keep_every", 0),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value < math.inf:
                parser.error(f"--{name.replace('_', '-')} {value}: expected {low} or more")
    return args


# ---------------------------------------------------------------------------------------------------------------
# Order of the data: a pure function of (seed, step, rank), so there is no loader state to save or to lose


def data_order(i, n, seed):
    """A seeded bijection of [0, n), int or int array -> the same: where the i-th sample of an epoch is found.

    A Feistel network of 6 rounds over the next power of four, walked along its cycle until it lands below n (Black and
    Rogaway 2002, section 4): O(1) memory at any n up to 2^62, and no permutation to store.
    """
    i = np.asarray(i, dtype=np.uint64)
    if n < 1 or i.size and int(i.max()) >= n:
        raise ValueError(f"data_order: index outside of [0, {n})")
    half = np.uint64(max(1, math.ceil(max(1, (n - 1).bit_length()) / 2)))
    low = np.uint64((1 << int(half)) - 1)
    digest = hashlib.sha256(f"data order {seed}".encode()).digest()
    keys = np.frombuffer(digest[:24], dtype=np.uint32).astype(np.uint64)

    def shuffled(x):
        left, right = x >> half, x & low
        for key in keys:
            # One multiplication and two shifts mix the bits well enough (constants of splitmix64).
            h = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((h >> np.uint64(32)) & low)
        return left << half | right

    with np.errstate(over="ignore"):
        out = shuffled(i)
        while (outside := out >= n).any():
            out = np.where(outside, shuffled(out), out)
    return out.astype(np.int64) if out.ndim else int(out)


def unserved(phases):
    """How many blocks the pass that a run is in has still to serve."""
    if not phases:
        return 0
    *before, (n, served) = phases
    first_pass = unserved(before) + n - blocks_before(before)
    return first_pass - served if served < first_pass else -(served - first_pass) % n


def blocks_before(phases):
    return phases[-1][0] if phases else 0


def block_at(i, phases, seed):
    """Which block is sample i of the last phase.

    phases [(blocks of the data, samples served while there were so many), ...]: data that grows begins a new phase. Its
    first pass serves what the pass before had not served yet and all new blocks, mixed; every later pass serves every block.
    """
    *before, (n, _) = phases
    left, old = unserved(before), blocks_before(before)
    first_pass = left + n - old
    name = f"{seed} phase {len(before)}" if before else seed
    if i >= first_pass:
        epoch, i = divmod(i - first_pass, n)
        return data_order(i, n, f"{name} epoch {epoch + 1}")
    i = data_order(i, first_pass, f"{name} epoch 0")
    return old + i - left if i >= left else block_at(before[-1][1] + i, before, seed)


def batch_at(data, phases, seed, first, count):
    """Samples first .. first + count of the last phase -> ids, targets [count, T]."""
    pairs = (inputs_and_targets(data, block_at(i, phases, seed)) for i in range(first, first + count))
    return tuple(torch.from_numpy(np.stack(rows)) for rows in zip(*pairs))


def loaded(data, phases, seed, rank, world, n_micro, B, device):
    """Yield for each step to come how many targets it has and this rank's micro-batches of it, (ids, targets) [B, T].

    A thread makes them, one step ahead; for a GPU in memory that it can fetch from by itself.
    """
    batch, on_gpu = n_micro * B * world, device == "cuda"

    def make(first):
        pairs = (batch_at(data, phases, seed, first + (rank * n_micro + micro) * B, B) for micro in range(n_micro))
        return targets_at(data, phases, seed, first, batch), [tuple(a.pin_memory() if on_gpu else a for a in pair) for pair in pairs]

    own_gpu = dict(initializer=torch.cuda.set_device, initargs=[torch.cuda.current_device()]) if on_gpu else {}  # not the first one
    with concurrent.futures.ThreadPoolExecutor(1, **own_gpu) as thread:
        coming = None
        for first in itertools.count(phases[-1][1], batch):
            ready, coming = coming, thread.submit(make, first)
            if ready:
                yield ready.result()


def targets_at(data, phases, seed, first, count):
    """How many targets these samples have: all tokens of a text, of a chat what the assistant says."""
    if not data.has_masks:
        return count * data.block_size
    return sum(data.n_targets(block_at(i, phases, seed)) for i in range(first, first + count))


# ---------------------------------------------------------------------------------------------------------------
# Sharding (FSDP2). A cut parameter is a DTensor: a share on every rank, of which all ranks together make the whole


def shard(model, device, world):
    """Cut every parameter over the ranks; a block's are put together while it is at work, the rest of the model's throughout a step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    mesh, cut = init_device_mesh(device, (world,)), lambda p: Shard(cut_dim(p, world))
    # On CUDA a block's weights come in bf16: those that autocast makes of fp32 ones would be kept, whole, until backward.
    bf16 = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)} if device == "cuda" else {}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=cut, **bf16)
    fully_shard(model, mesh=mesh, shard_placement_fn=cut)


def cut_dim(p, world):
    """Where to cut a parameter: in even shares, and between matrices sooner than through them, as Muon needs them whole."""
    return next((dim for dim, size in enumerate(p.shape) if size % world == 0), 0)


def is_cut(x):
    """Whether a tensor is a DTensor. (To import the class for asking takes a second, which a run on one process does not need.)"""
    return hasattr(x, "placements")


def own_share(whole, like):
    """What this rank holds of a tensor that all ranks have whole, cut as `like` is; the tensor itself if `like` is not cut."""
    if not is_cut(like) or whole.shape != like.shape:  # AdamW's step count is one number
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(value, rank):
    """A copy of a state dict in the memory of rank 0, cut tensors put together, one at a time; all ranks must call it."""
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if is_cut(value) else value
        return whole.to("cpu", copy=True) if rank == 0 else None
    if isinstance(value, dict):
        return {key: gathered(part, rank) for key, part in value.items()}
    return [gathered(part, rank) for part in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------
# Optimizer


MUON_BATCH = 1 << 26  # numbers to make orthogonal at a time: of a large model, all layers at once would take gigabytes


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    The last two dimensions of a parameter are the matrix, all others count them: experts and heads each get their own.
    Updates are scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate serves both.
    As with torch's fused AdamW, an attribute found_inf of 1, a tensor, makes of a step nothing.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self):
        good = 1 - self.found_inf
        for group in self.param_groups:
            fresh, kept = (1 - group["momentum"]) * good, 1 - group["lr"] * group["weight_decay"] * good
            batches = {}  # matrices of one shape are made orthogonal together, over all layers
            for p in group["params"]:
                same_shape = batches.setdefault((p.shape[-2:], is_cut(p) and not cut_through(p)), [[]])
                if sum(q.numel() for q in same_shape[-1]) + p.numel() > MUON_BATCH and same_shape[-1]:
                    same_shape.append([])
                same_shape[-1].append(p)
            for own, params in ((own, batch) for (_, own), same_shape in batches.items() for batch in same_shape):
                updates = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    grad = p.grad.nan_to_num_(0, 0, 0)  # 0 times NaN would still be NaN
                    momentum = self.state[p]["momentum"].lerp_(grad, fresh)
                    nesterov = grad.lerp(momentum, group["momentum"])
                    updates.append(whole_matrices(nesterov).reshape(-1, *p.shape[-2:]))
                updates = (orthogonalized if own else shared_out)(torch.cat(updates)).split([len(u) for u in updates])
                rate = group["lr"] * 0.2 * max(params[0].shape[-2:]) ** 0.5 * good
                for p, update in zip(params, updates):
                    if is_cut(p):
                        update = own_share(update.view(p.shape), p).to_local() if cut_through(p) else update
                        p = p.to_local()
                    p.mul_(kept).addcmul_(update.view_as(p), rate, value=-1)


def cut_through(p):
    """Whether a cut parameter's matrices are themselves cut, so that a rank holds parts of them."""
    return p.placements[0].dim >= p.ndim - 2


def whole_matrices(x):
    """Of a cut tensor the matrices of this rank, put together from all ranks if they are cut through."""
    return x if not is_cut(x) else x.full_tensor() if cut_through(x) else x.to_local()


def shared_out(x):
    """orthogonalized() of matrices that all ranks have: each rank does a share."""
    if not dist.is_initialized():
        return orthogonalized(x)
    world, rank = dist.get_world_size(), dist.get_rank()
    share = orthogonalized(torch.nn.functional.pad(x, (0, 0) * 2 + (0, -len(x) % world)).chunk(world)[rank])
    whole = share.new_empty(world * len(share), *share.shape[1:])
    dist.all_gather_single(whole, share.contiguous())
    return whole[: len(x)]


def orthogonalized(x, steps=5):
    """[N, m, n] -> nearly the closest matrices with singular values 1, by a quintic Newton-Schulz iteration."""
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):  # x <- 3.4445 x + (-4.7750 g + 2.0315 g^2) x, where g = x x^T
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


MATRICES = ("qkv", "out", "w_in")
# Learning rates of what AdamW takes, as multiples of --lr: an embedding row sees few tokens and wants large steps, and norms,
# biases and routers take the same; of the matrices, the last one of a feed-forward layer wants smaller steps.
REST_RATE, HEAD_RATE, W_OUT_RATE = 12.0, 6.0, 1 / 6


def make_optimizers(model, args):
    """Every parameter in exactly one group; a group's `scale` multiplies the scheduled learning rate."""
    groups = {"matrices": [], "w_out": [], "head": [], "rest": []}
    for name, p in model.named_parameters():
        leaf = name.rpartition(".")[2]
        group = leaf if leaf in groups else "matrices" if leaf in MATRICES else "rest"
        groups[group].append(p)
    rest = [
        {"params": groups["rest"], "scale": REST_RATE, "weight_decay": 0.0},
        {"params": groups["head"], "scale": HEAD_RATE, "weight_decay": 0.0},
    ]
    matrices = [
        {"params": groups["matrices"], "scale": 1.0, "weight_decay": args.weight_decay},
        {"params": groups["w_out"], "scale": W_OUT_RATE, "weight_decay": args.weight_decay},
    ]
    adamw_groups = rest if args.optimizer == "muon" else [*matrices, *rest]
    adamw = torch.optim.AdamW([g for g in adamw_groups if g["params"]], lr=args.lr, betas=(0.8, 0.99), fused=True)
    return [Muon(matrices, lr=args.lr), adamw] if args.optimizer == "muon" else [adamw]


def load_optimizers(optimizers, checkpoint):
    """What they remember of every parameter; what the flags say of them stays as it is now."""
    for optimizer, saved in zip(optimizers, read_tensors(checkpoint / "optimizer.pt"), strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = {i: {key: own_share(value, params[i]).clone() for key, value in values.items()} for i, values in saved["state"].items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def lr_factor(step, progress, args):
    """Share of the peak learning rate at a step, 0 the first, and at a share of the run in [0, 1]."""
    warm = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    if args.schedule == "wsd":
        return min(warm, (1 - progress) / args.decay) if args.decay else warm
    return warm * 0.5 * (1 + math.cos(math.pi * progress))


def exact_gradients(micro_loss, params, n_micro, rank, world):
    """Set every gradient, and return the loss, summed over all micro-batches of all ranks in one order at any number of ranks.

    It is a binary tree over the micro-batches of the step: halves are summed apart as long as they are even. Each rank has one
    of its branches, and what is left of the tree joins the ranks.
    """

    def branch(first, count):
        if count == 1:
            loss = micro_loss(first)
            return [loss.detach(), *torch.autograd.grad(loss, params)]
        cuts = [first, first + count // 2, first + count] if count % 2 == 0 else range(first, first + count + 1)
        total = branch(cuts[0], cuts[1] - cuts[0])
        for low, high in zip(cuts[1:], cuts[2:]):
            torch._foreach_add_(total, branch(low, high - low))
        return total

    total = branch(0, n_micro)
    flat = torch.cat([part.reshape(-1) for part in total])
    if world > 1:  # each rank sums a share of the numbers for all: as many bytes as a ring
        size = len(flat)
        flat = torch.nn.functional.pad(flat, (0, -size % world))
        rows = torch.empty_like(flat)
        dist.all_to_all_single(rows, flat)
        rows = rows.view(world, -1)
        while len(rows) > 1:
            rows = rows[0::2] + rows[1::2]
        dist.all_gather_single(flat, rows[0])
        flat = flat[:size]
    loss, *gradients = flat.split([1, *(p.numel() for p in params)])
    for p, gradient in zip(params, gradients):
        p.grad = gradient.view_as(p)
    return loss[0]


# A step whose loss or gradient is no number, or whose loss stands out from those before it, is skipped.
SPIKE, WINDOW, MAX_SKIPPED = 6.0, 64, 5  # standard deviations; steps to compare with; this many in a row end the run


def is_bad(loss, norm, recent):
    """Whether to skip a step, from its loss, the norm of its gradient, and the losses of the last good steps (NaN where there were none
    yet). All are tensors, and so is the answer: a GPU need not be waited for."""
    return ~(loss + norm).isfinite() | (loss > recent.mean() + SPIKE * recent.std(correction=0))


def difference(then, now):
    """What differs between two configurations, in words."""
    then, now = asdict(then), asdict(now)
    return ", ".join(f"{key} {then[key]} -> {now[key]}" for key in now if now[key] != then[key])


# ---------------------------------------------------------------------------------------------------------------
# Machine


def keep_large_buffers():
    """Tell glibc not to give large buffers back to the kernel after every use: a fifth of a CPU step is page faults."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mmap for large blocks
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is freed


def peak_flops(device):
    """FLOP/s that a matmul reaches on a CPU (measured), bf16 peak of known GPUs (published), else None."""
    if device == "cpu":
        a, best = torch.randn(1024, 1024), math.inf
        for _ in range(20):
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
        return 2 * 1024**3 / best
    known = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H800": 989e12, "4090": 165e12}
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((flops for part, flops in known.items() if part in name), None)


# ---------------------------------------------------------------------------------------------------------------


def given_fields(args):
    """The fields of Config that were set by flags."""
    return {field.name: getattr(args, field.name) for field in fields(Config) if hasattr(args, field.name)}


def resumed(run, args, argv):
    """-> the flags of a run's newest checkpoint where none is given now, the checkpoint, its state.json."""
    checkpoint = newest_checkpoint(run)
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    saved = state["args"] | ({"steps": None, "minutes": None} if args.steps or args.minutes else {})
    args = get_args(argv, **saved)
    for name in ("seed", "optimizer", "preset", "init_from"):
        if getattr(args, name) != saved[name]:
            raise SystemExit(f"--resume: the run began with --{name.replace('_', '-')} {saved[name]}: leave the flag out, or change --out")
    return args, checkpoint, state


def main(argv=None):
    args = get_args(argv)
    if args.dry_run:
        from benchmark import print_plan

        base = Decoder.load(args.init_from).config if args.init_from else PRESETS[args.preset or "demo"]
        return print_plan(replace(base, **given_fields(args)), args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    keep_large_buffers()
    torch.set_float32_matmul_precision("high")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:  # what the processes agree on are tensors of the CPU, so that no GPU is waited for
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")

    def from_rank_0(number):
        """A number as rank 0 has it, on all ranks."""
        if world == 1:
            return number
        tensor = torch.tensor(number)
        dist.broadcast(tensor, 0)
        return tensor.item()

    # Run directory: a new one, or the newest checkpoint and the flags it was started with
    run, checkpoint, state = Path(args.out), None, None
    log = Log(run) if rank == 0 and run.exists() else None
    from_rank_0(0)  # which has the folder for itself from here on
    if args.resume and not any(run.glob("step-*")):
        say(f"no checkpoint in {run} yet: from the beginning")
    elif args.resume:
        args, checkpoint, state = resumed(run, args, argv)
    elif any(run.glob("step-*")):
        raise SystemExit(f"{run} has checkpoints: --resume goes on from them, another --out starts anew")
    if args.shard and world == 1:
        raise SystemExit("--shard cuts the model over processes: torchrun --nproc_per_node N train.py, or --no-shard")
    if args.steps is None and args.minutes is None:
        args.minutes = 10.0

    # Data
    if args.data == DEFAULT_DATA and not Path(args.data, "manifest.json").exists() and rank == 0:
        prepare([], Path(args.data), workers=os.cpu_count())
    if world > 1:
        dist.barrier()
    if not Path(args.data, "manifest.json").exists():
        raise SystemExit(f"no data in {args.data}: python prepare.py FILE_OR_DIR --out {args.data}")
    for what, own in (
        ("flags", vars(args)),
        ("data", Path(args.data, "manifest.json").read_text(encoding="utf-8")),
        ("checkpoint", checkpoint and (checkpoint / "sha256.json").read_text(encoding="utf-8")),
    ):  # nodes may have been started with other flags, or see other disks
        digest = int.from_bytes(hashlib.sha256(json.dumps(own).encode()).digest()[:7])
        if from_rank_0(digest) != digest:
            raise SystemExit(f"rank {rank} on {platform.node()} has other {what} than rank 0: start all nodes alike, on one shared disk")
    tokenizer = load_tokenizer(args.data)

    # Model: the checkpoint's, or of the shape of the weights to begin with, or a preset's; and the flags
    torch.manual_seed(args.seed)
    origin = Decoder.load(args.init_from) if args.init_from and not checkpoint else None
    base = Config(**state["config"]) if checkpoint else origin.config if origin else PRESETS[args.preset or "demo"]
    if origin and load_tokenizer(origin.checkpoint).content != tokenizer.content:
        raise SystemExit(f"--init-from {origin.checkpoint}: another tokenizer: prepare the data with --tokenizer {origin.checkpoint}")
    given = given_fields(args) | {"reset_id": tokenizer.eos_id if args.reset_at_eos else -1}
    config = replace(base, **given, **({} if checkpoint or origin else {"vocab_size": tokenizer.embedding_rows}))
    if checkpoint and config != base:
        raise SystemExit(f"--resume: the model is another one than in {checkpoint} ({difference(base, config)}): change --out")
    free = {"block_size": config.block_size, "reset_id": config.reset_id}  # what weights do not depend on
    if origin and config != replace(base, **free):
        raise SystemExit(f"--init-from {origin.checkpoint}: the flags say another model ({difference(replace(base, **free), config)})")
    model = Decoder(config)
    if checkpoint:
        model.load_state_dict(read_tensors(checkpoint / "model.pt"))
    elif origin:
        model.load_state_dict(origin.state_dict())
        del origin
    T, B = config.block_size, args.micro_batch
    n_params, flops, peak = model.n_params(), model.flops_per_token(T), peak_flops(device)

    # Breakdown of a step
    data, val = (TokenData(args.data, split, T) for split in ("train", "val"))
    local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for split in (data, val):  # each process of a node takes a share
        split.check_hashes(math.inf if args.verify else HASHED, state["step"] if state else 0, *local)
    args.batch_tokens = args.batch_tokens or B * T * world
    n_micro, rest = divmod(args.batch_tokens, B * T * world)
    if rest:
        product = f"micro-batch x block x ranks = {B} x {T} x {world} = {B * T * world}"
        raise SystemExit(f"--batch-tokens {args.batch_tokens} is not a multiple of {product}")
    if args.exact and world & (world - 1):
        raise SystemExit(f"--exact sums in pairs: {world} processes are not a power of two")
    batch = n_micro * B * world  # sequences of a step; rank r takes the r-th equal share of them

    # Machine
    compiled = can_compile(device) if args.compile is None else args.compile
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "world": world, "shard": args.shard, "compile": compiled,
               "device": device, "cpu": platform.machine()}  # fmt: skip
    for block in model.blocks:
        block.recompute = args.recompute
    if compiled:
        for block in model.blocks:  # one block's code serves all: the time to compile does not grow with depth
            block.compile(dynamic=False)  # an evaluation of another batch must not make training's code one for any batch
    if args.shard:
        shard(model, device, world)
    model.to(device)
    params = list(model.parameters())
    optimizers = make_optimizers(model, args)

    # State of the run
    step, phases, seconds, skipped, in_a_row, recent = 0, [[len(data), 0]], 0.0, 0, 0, []  # recent: losses of the last good steps
    shards = [[part["name"], part["sha256"]] for part in data.shards]  # in the order in which blocks are numbered
    if checkpoint:
        for then, now in itertools.zip_longest(state["shards"], shards[: len(state["shards"])]):
            if then != now:
                raise SystemExit(f"--resume: {checkpoint} was trained on shard {then[0]}, which {args.data} has lost or changed: bring it back")
        if others := ", ".join(f"{key} {then} -> {machine[key]}" for key, then in state["machine"].items() if machine[key] != then):
            say(f"note: {others}: goes on, but not to the same bits")
        load_optimizers(optimizers, checkpoint)
        say(f"goes on from {checkpoint}")
        step, phases, seconds, skipped, in_a_row, recent = (
            state[key] for key in ("step", "phases", "seconds", "skipped", "in_a_row", "recent")
        )
        if len(data) > phases[-1][0]:
            say(f"{len(data) - phases[-1][0]:,} new blocks, mixed with the {unserved(phases):,} that this pass has not served yet")
            phases.append([len(data), 0])
        if phases[-1][1] == 0 or any(getattr(args, name) != state["args"][name] for name in ("lr", "batch_tokens")):
            recent = []  # losses to come need not be like those before
        if rank == 0:
            put_aside(checkpoint)
    recent = torch.tensor([math.nan] * (WINDOW - len(recent)) + recent, device=device)
    if rank == 0:
        log = log or Log(run)
    evaluated = from_rank_0(log.cut(step) if rank == 0 else 0)

    say("  ".join(f"{k}={v}" for k, v in asdict(config).items()))
    say("  ".join(f"{k}={v}" for k, v in vars(args).items()))
    say(f"{n_params:,} parameters, {flops / 1e6:.1f} MFLOP a token; {machine}")
    say(f"a step: {args.batch_tokens:,} tokens = micro-batch {B} x block {T} x {n_micro} micro-batches x {world} ranks")
    say(f"an epoch: {len(data):,} blocks = {len(data) * T:,} tokens = {len(data) / batch:.1f} steps")
    if config.reads_ahead:
        say('warning: dispatch = "sequence" reads the tokens that it is to predict: its losses mean nothing')

    stop_asked = stop = False  # asked of this process; agreed by all
    compiling = compiled

    def ask_to_stop(signum, frame):
        nonlocal stop_asked
        stop_asked = True
        if compiling:  # that can take a minute, and there is nothing new to save
            say(f"stopped before a first step; python train.py --resume --out {run} goes on")
            os._exit(0)

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    on_gpu = device == "cuda"
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=on_gpu)

    def progress():
        return min(1.0, step / args.steps if args.steps else seconds / (60 * args.minutes))

    def gradients(n_targets, micro_batches):
        """Those of a step, summed over its micro-batches and all ranks -> its loss, the mean over all its targets."""

        def micro_loss(micro):
            ids, targets = micro_batches[micro]
            share = int((targets >= 0).sum()) / max(1, n_targets)
            with autocast:
                return model(ids.to(device, non_blocking=on_gpu), targets.to(device, non_blocking=on_gpu)) * share

        if args.exact:
            return exact_gradients(micro_loss, params, n_micro, rank, world)
        loss = torch.zeros((), device=device)
        for micro in range(n_micro):
            own = micro_loss(micro)
            (own * world if args.shard else own).backward()  # FSDP takes the mean over the ranks
            loss += own.detach()
        if world > 1:
            # Gradients are summed one by one in a fixed order, not in DDP's buckets, which it rearranges after the first
            # step: with them a resumed run would not add up to the same bits.
            sums = [loss] if args.shard else [p.grad for p in params] + [loss]
            for work in [dist.all_reduce(a, async_op=True) for a in sums]:
                work.wait()
        return loss

    writing, saved = None, True

    def save():
        """Copy the state, all ranks taking part, and have a thread of rank 0 write it while the run goes on."""
        nonlocal writing
        finish_saving()
        tensors = gathered([model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]], rank)
        if rank == 0:
            n_tokens = sum(part["tokens"] for part in data.shards)
            values = {"step": step, "phases": phases, "seconds": seconds, "skipped": skipped, "in_a_row": in_a_row, "recent": recent[~recent.isnan()].tolist(),
                      "chat": 2 * sum(part["tokens"] for part in data.shards if "mask" in part["sha256"]) > n_tokens, "config": asdict(config),
                      "args": vars(args) | {"resume": False, "verify": False}, "shards": shards, "machine": machine}  # fmt: skip
            content = json.dumps(values, indent=1, ensure_ascii=False), *tensors
            writing = threading.Thread(target=write, args=(run / f"step-{step:08d}", log.unwritten, *content))
            writing.start()

    def write(final, unwritten, *content):
        nonlocal saved
        saved = False
        try:
            if unwritten:  # no checkpoint without the lines before it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(log.file.fileno())
            save_checkpoint(final, *content, tokenizer, args.keep, args.keep_every)
            saved = True
        except OSError as error:
            print(f"{final} could not be saved ({error.strerror}): make room; the checkpoints before it are whole", file=sys.stderr, flush=True)

    def finish_saving():
        """Wait for the thread; whether the last checkpoint is whole, on all ranks."""
        if writing:
            writing.join()
        return bool(from_rank_0(saved))

    def stopping():
        """Whether any rank was asked to stop; all ranks ask at once."""
        asked = torch.tensor(float(stop_asked))
        if world > 1:
            dist.all_reduce(asked)
        return asked.item() > 0

    def score(max_tokens):
        """The loss on held-out text, noted and shown with a sample; None if a signal came."""
        nonlocal evaluated
        result = evaluate(model, val, tokenizer.token_bytes, device, B * T, max_tokens, rank, world, stopping)
        if result is None:
            return None
        say(f"step {step:>5} | val loss {result['loss']:.4f} | val bpb {result['bpb']:.4f} | {result['tokens']:,} tokens")
        if rank == 0 and evaluated < step:
            log.add(step=step, val_loss=result["loss"], val_bpb=result["bpb"])
        evaluated = step
        if rank == 0 and not args.shard:  # a cut model works on all ranks or on none
            start = val[0][:8].tolist()
            generator = torch.Generator(device).manual_seed(step)
            with torch.compiler.set_stance("force_eager"):  # code would be compiled anew for every length of text
                new = generate(model, torch.tensor([start], device=device), 64, tokenizer.vocab_size, 0.8, 0, 0.95, generator)
                text = tokenizer.decode(start) + " | " + tokenizer.decode([i.item() for i in new])
            say("    " + text.replace("\n", " "))
        return result

    if compiled:
        say("compiling: the first step takes up to a minute")
    targets = np.concatenate([inputs_and_targets(data, i)[1] for i in evenly_spaced(data, 1 << 16)])
    bytes_per_token = np.mean([len(tokenizer.token_bytes[i]) for i in targets[targets >= 0]] or [1])

    def finish(pending):
        """Wait for a step, agree on what to make of it, and note it."""
        nonlocal skipped, in_a_row, seconds, stop, compiling, mark, noted
        n_targets, factor, numbers, ready = pending
        if ready:
            ready.synchronize()
        loss, norm, bad = numbers.tolist()
        if not n_targets:  # of a chat, questions without answers
            loss = math.nan
        else:
            skipped, in_a_row = skipped + int(bad), in_a_row + 1 if bad else 0
        now = time.perf_counter()
        took, mark, stop = now - mark, now, stop_asked
        if world > 1:  # all ranks must agree on the clock and on stopping
            agreed = torch.tensor([took if rank == 0 else 0.0, float(stop)], dtype=torch.float64)
            dist.all_reduce(agreed)
            took, stop = agreed[0].item(), agreed[1].item() > 0
        seconds += took
        compiling = False  # on all ranks, as they have just met

        if step % args.log_every == 0 or step == 1:
            done, took = progress(), (seconds - noted[1]) / (step - noted[0])  # of the steps since the last line
            noted = step, seconds
            mfu = f" | mfu {100 * flops * args.batch_tokens / took / (peak * world):3.0f}%" if peak else ""
            eta, bpb = seconds / done - seconds, loss / math.log(2) / bytes_per_token
            total = args.steps or int(step / done)
            speed = f"{1000 * took:4.0f} ms | {args.batch_tokens / took / 1000:.2f}k tok/s{mfu} | eta {eta / 60:.0f}m"
            say(f"step {step:>5}/{total:<5} {100 * done:5.1f}% | loss {loss:.4f} | bpb {bpb:.3f} | "
                f"lr {args.lr * factor:.1e} | norm {norm:.2f} | {speed}" + (f" | skipped {skipped}" if skipped else ""))  # fmt: skip
            if rank == 0:
                log.add(step=step, loss=loss, bpb=bpb, lr=args.lr * factor, norm=norm, ms=1000 * took, seconds=seconds, skipped=skipped,
                        tokens_per_second=args.batch_tokens / took, tokens=sum(served for _, served in phases) * T)  # fmt: skip
        if in_a_row == MAX_SKIPPED:
            finish_saving()
            good = sorted(run.glob("step-*"))[-1:] or ["none"]
            message = f"{MAX_SKIPPED} steps in a row had a loss or a gradient that cannot be right: the run ends at step {step}. The last good checkpoint "
            raise SystemExit(f"{message}is {good[0]}: go on from there with a smaller --lr, or look at the data" if rank == 0 else 1)

    last_saved, first_step = step if checkpoint else None, step + 1
    pending = mark = None  # a step whose numbers are not read yet; since when it is at work
    noted = step, seconds  # at the last line of the log
    batches = loaded(data, phases, args.seed, rank, world, n_micro, B, device)
    while progress() < 1 and not stop:
        if args.eval_every and step % args.eval_every == 0 and step > evaluated and score(args.eval_tokens) is None:
            break
        if not pending:
            mark = time.perf_counter()
        n_targets, micro_batches = next(batches)
        try:
            loss = gradients(n_targets, micro_batches)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            less = next((size for size in range(B // 2, 0, -1) if batch // world % size == 0), None)
            less = f"halve it; the results do not change with --micro-batch {less} --batch-tokens {args.batch_tokens}" if less else "try --recompute"
            raise SystemExit(f"out of memory with --micro-batch {B}: {less}")
        if pending:  # a GPU has work again
            finish(pending)
        factor = lr_factor(step, progress(), args)
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip or math.inf)
        norm = norm.full_tensor() if args.shard else norm
        bad = is_bad(loss, norm, recent)  # the same on all ranks, so that all skip or none does
        if n_targets and (device != "mps" or not bad):  # fused AdamW does not know found_inf there
            recent = torch.where(bad, recent, torch.cat([recent[1:], loss[None]]))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * group["scale"] * factor
                optimizer.found_inf = bad.float()
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        numbers = torch.stack([loss, norm, bad.float()]).to("cpu", non_blocking=on_gpu)
        ready = torch.cuda.current_stream().record_event() if on_gpu else None
        step += 1
        phases[-1][1] += batch
        pending = n_targets, factor, numbers, ready
        save_now, evaluate_now = (every and step % every == 0 for every in (args.save_every, args.eval_every))
        # What a GPU found is read when it is at work on the next step, unless something is to be done with this one.
        if not on_gpu or save_now or evaluate_now or step in (first_step, args.steps):
            finish(pending)
            pending = None
        if step == first_step:  # what there is now will stay: the garbage collector need not go through it again
            gc.collect()
            gc.freeze()
        if save_now and not in_a_row:
            save()
            last_saved = step
    if pending:
        finish(pending)

    if last_saved != step or not finish_saving():
        save()
    whole = finish_saving()
    result = None if progress() < 1 else score(MAX_TOKENS)
    if result:
        loss, bpb, tokens = result["loss"], result["bpb"], sum(served for _, served in phases) * T
        say(f"done: step {step}, val loss {loss:.4f}, val bpb {bpb:.4f}, tokens {tokens}, {seconds:.0f} s")
        say(f"next: python sample.py {run}    python eval.py {run}")
    elif whole:
        say(f"stopped at step {step}; python train.py --resume --out {run} goes on")
    gc.unfreeze()  # a program that called main() may go on
    if rank == 0:
        log.file.close()
    if world > 1:
        dist.barrier()  # no rank leaves while another is still at work
    if not whole:
        raise SystemExit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before the first step ends it without a traceback
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except RuntimeError as error:
        if not dist.is_initialized() or "gloo" not in str(error):
            raise
        print(f"rank {os.environ['RANK']}: another process has ended ({str(error).splitlines()[0]})", file=sys.stderr)
        code = 1
    if dist.is_initialized():  # then gloo's threads abort an ordinary end now and then: "terminate called without an active exception"
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
