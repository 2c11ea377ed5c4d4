"""Train a decoder on a prepared folder.

    python train.py                                             # default data, demo model, 10 minutes on a laptop's CPU
    python train.py --data data/mine --out out/mine --steps 2000
    python train.py --resume                                    # go on after a stop, with the flags of the run
    torchrun --nproc_per_node 4 train.py --preset small --data data/mine --steps 20000              # 4 GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...   # on both nodes

A run leaves out/RUN/metrics.jsonl and checkpoints like out/RUN/step-00000500. Ctrl-C or SIGTERM finishes the step, saves
and exits; --resume goes on from there as if nothing had happened.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sysconfig
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from eval import MAX_TOKENS, evaluate
from model import CHOICES, PRESETS, Config, Decoder, choose_device, newest_checkpoint, read_tensors
from prepare import TokenData, prepare, targets_of
from sample import generate
from sources import file_sha256, write_atomically
from tokenizer import load_tokenizer

DEFAULT_DATA = "data/default"


def get_args(argv=None, **defaults):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", default=DEFAULT_DATA, help="folder made by prepare.py; the default one is made when missing")
    add("--out", default="out/demo", help="run directory")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, with that run's flags where none is given")
    add("--init-from", metavar="PATH", help="start from the weights of a step, a run or a Hugging Face folder; the optimizer starts anew")
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
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; by default where a compiler is found")
    add("--exact", action="store_true", help="the same bits at 1, 2, 4, ... processes, for a little memory")
    add("--verify", action="store_true", help="hash every shard before training on it")
    # Model
    add("--reset-at-eos", action=argparse.BooleanOptionalAction, default=False, help="no reading back over an end of document")
    add("--preset", choices=PRESETS, default="demo", help="the model; any of its fields can be set by a flag of its own")
    for field in fields(Config):
        if field.name in ("vocab_size", "reset_id"):  # follow from the data's tokenizer
            continue
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        add("--" + field.name.replace("_", "-"), choices=CHOICES.get(field.name), default=argparse.SUPPRESS, **kind)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    for names, low in (
        ("steps micro_batch batch_tokens eval_tokens log_every keep", 1),
        ("minutes", 0.01),
        ("lr weight_decay clip warmup decay eval_every save_every keep_every", 0),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not value >= low:
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
    blocks = [block_at(i, phases, seed) for i in range(first, first + count)]
    return tuple(torch.from_numpy(np.stack(rows)) for rows in ([data[i][:-1] for i in blocks], [targets_of(data, i) for i in blocks]))


# ---------------------------------------------------------------------------------------------------------------
# Optimizer


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    The last two dimensions of a parameter are the matrix, all others count them: experts and heads each get their own.
    Updates are scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate serves both.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}  # matrices of one shape are made orthogonal in one batch, over all layers
            for p in group["params"]:
                by_shape.setdefault(p.shape[-2:], []).append(p)
            for params in by_shape.values():
                updates = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    nesterov = p.grad.lerp(momentum, group["momentum"])
                    updates.append(nesterov.view(-1, *p.shape[-2:]))
                updates = orthogonalized(torch.cat(updates)).split([len(u) for u in updates])
                rate = group["lr"] * 0.2 * max(params[0].shape[-2:]) ** 0.5
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-rate)


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
        dist.all_gather_into_tensor(flat, rows[0])
        flat = flat[:size]
    loss, *gradients = flat.split([1, *(p.numel() for p in params)])
    for p, gradient in zip(params, gradients):
        p.grad = gradient.view_as(p)
    return loss[0]


# A step whose loss or gradient is no number, or whose loss stands out from those before it, is skipped.
SPIKE, WINDOW, MAX_SKIPPED = 6.0, 64, 5  # standard deviations; steps to compare with; this many in a row end the run


def is_bad(loss, norm, recent):
    """Whether to skip a step, from its loss, the norm of its gradient, and the losses of the last good steps."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return True
    return len(recent) == WINDOW and loss > np.mean(recent) + SPIKE * np.std(recent)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(run, state, model, optimizers, tokenizer_file, args):
    """Write the checkpoint of a step under a temporary name, flush it to the disk, rename it; then remove old ones."""
    final = run / f"step-{state['step']:08d}"
    temporary = run / f".{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save(model.state_dict(), temporary / "model.pt")
    torch.save([optimizer.state_dict() for optimizer in optimizers], temporary / "optimizer.pt")
    shutil.copyfile(tokenizer_file, temporary / tokenizer_file.name)
    (temporary / "state.json").write_text(json.dumps(state, indent=1, ensure_ascii=False), encoding="utf-8")
    hashes = {}
    for path in sorted(temporary.iterdir()):
        with open(path, "rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    with open(temporary / "sha256.json", "w", encoding="utf-8") as file:
        json.dump(hashes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    descriptor = os.open(run, os.O_RDONLY)  # the rename itself must reach the disk before an older checkpoint goes
    os.fsync(descriptor)
    os.close(descriptor)
    for path in sorted(run.glob("step-*"))[: -args.keep]:
        if not args.keep_every or int(path.name[5:]) % args.keep_every:
            shutil.rmtree(path)
    return final


def open_metrics(path, step):
    """The metrics file, opened for appending after a step: what an earlier run wrote beyond it goes."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept).encode("utf-8"))
    return open(path, "a", encoding="utf-8")


def weights_for(config, tokenizer, path):
    """The weights of another run's checkpoint, if they are of this model and this tokenizer. Its context may have been another."""
    other = Decoder.load(path)
    free = {"block_size": config.block_size, "reset_id": config.reset_id}
    now, then = asdict(config), asdict(replace(other.config, **free))
    if now != then:
        changed = ", ".join(f"{key} {then[key]}, not {now[key]}" for key in now if now[key] != then[key])
        raise SystemExit(f"--init-from {other.checkpoint}: another model ({changed}): give its flags")
    if file_sha256(load_tokenizer(other.checkpoint).path) != file_sha256(tokenizer.path):
        raise SystemExit(f"--init-from {other.checkpoint}: another tokenizer: prepare the data with --tokenizer {other.checkpoint}")
    return other.state_dict()


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


def can_compile(device):
    """On a CPU torch.compile needs a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return device == "cuda" or device == "cpu" and bool(shutil.which(os.environ.get("CXX", "g++"))) and headers.exists()


# ---------------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = get_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    keep_large_buffers()
    torch.set_float32_matmul_precision("high")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")

    # Run directory: a new one, or the newest checkpoint and the flags it was started with
    run, checkpoint, state = Path(args.out), None, None
    if args.resume:
        checkpoint = newest_checkpoint(run)
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        saved = state["args"] | ({"steps": None, "minutes": None} if args.steps or args.minutes else {})
        args = get_args(argv, **saved)
        for name in ("seed", "optimizer"):
            if getattr(args, name) != saved[name]:
                raise SystemExit(f"--resume: the run began with --{name} {saved[name]}: leave the flag out, or change --out")
    elif any(run.glob("step-*")):
        raise SystemExit(f"{run} has checkpoints: --resume goes on from them, another --out starts anew")
    if args.steps is None and args.minutes is None:
        args.minutes = 10.0

    # Data
    if args.data == DEFAULT_DATA and not Path(args.data, "manifest.json").exists() and rank == 0:
        prepare([], Path(args.data), workers=os.cpu_count())
    if world > 1:
        dist.barrier()
    if not Path(args.data, "manifest.json").exists():
        raise SystemExit(f"no data in {args.data}: python prepare.py FILE_OR_DIR --out {args.data}")
    tokenizer = load_tokenizer(args.data)
    given = {field.name: getattr(args, field.name) for field in fields(Config) if hasattr(args, field.name)}
    reset_id = tokenizer.eos_id if args.reset_at_eos else -1
    config = replace(PRESETS[args.preset], vocab_size=tokenizer.embedding_rows, reset_id=reset_id, **given)
    data, val = (TokenData(args.data, split, config.block_size, args.verify) for split in ("train", "val"))
    shards = {shard["sha256"]["tokens"]: shard["name"] for shard in data.shards}

    # Breakdown of a step
    T, B = config.block_size, args.micro_batch
    args.batch_tokens = args.batch_tokens or B * T * world
    n_micro, rest = divmod(args.batch_tokens, B * T * world)
    if rest:
        product = f"micro-batch x block x ranks = {B} x {T} x {world} = {B * T * world}"
        raise SystemExit(f"--batch-tokens {args.batch_tokens} is not a multiple of {product}")
    if args.exact and world & (world - 1):
        raise SystemExit(f"--exact sums in pairs: {world} processes are not a power of two")
    batch = n_micro * B * world  # sequences of a step; rank r takes the r-th equal share of them

    # Model and optimizers
    torch.manual_seed(args.seed)
    model = Decoder(config)
    if args.init_from and not checkpoint:
        model.load_state_dict(weights_for(config, tokenizer, args.init_from))
    model.to(device)
    optimizers = make_optimizers(model, args)
    step, phases, seconds, skipped, in_a_row, recent = 0, [[len(data), 0]], 0.0, 0, 0, []
    compiled = can_compile(device) if args.compile is None else args.compile
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "world": world, "compile": compiled,
               "device": device, "cpu": platform.machine()}  # fmt: skip
    if checkpoint:
        if state["config"] != asdict(config):
            changed = [f"{k} {v} -> {asdict(config)[k]}" for k, v in state["config"].items() if asdict(config)[k] != v]
            raise SystemExit(f"--resume: the model is another one than in {checkpoint} ({', '.join(changed)}): change --out")
        for sha256, name in state["shards"].items():
            if shards.get(sha256) != name:
                raise SystemExit(f"--resume: {checkpoint} was trained on shard {name}, which {args.data} has lost or changed: bring it back")
        if state["machine"] != machine:
            say(f"note: was {state['machine']}, is {machine}: goes on, but not to the same bits")
        model.load_state_dict(read_tensors(checkpoint / "model.pt", device))
        for optimizer, saved in zip(optimizers, read_tensors(checkpoint / "optimizer.pt", device), strict=True):
            groups = optimizer.state_dict()["param_groups"]  # of the flags now, not of those then
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        step, phases, seconds, skipped, in_a_row, recent = (
            state[key] for key in ("step", "phases", "seconds", "skipped", "in_a_row", "recent")
        )
        if len(data) > phases[-1][0]:
            say(f"{len(data) - phases[-1][0]:,} new blocks, mixed with the {unserved(phases):,} that this pass has not served yet")
            phases.append([len(data), 0])
    if compiled:
        for block in model.blocks:  # one block's code serves all: the time to compile does not grow with depth
            block.compile()
    params = list(model.parameters())
    flops, peak = model.flops_per_token(T), peak_flops(device)
    say("  ".join(f"{k}={v}" for k, v in asdict(config).items()))
    say("  ".join(f"{k}={v}" for k, v in vars(args).items()))
    say(f"{model.n_params():,} parameters, {flops / 1e6:.1f} MFLOP a token; {machine}")
    say(f"a step: {args.batch_tokens:,} tokens = micro-batch {B} x block {T} x {n_micro} micro-batches x {world} ranks")
    say(f"an epoch: {len(data):,} blocks = {len(data) * T:,} tokens = {len(data) / batch:.1f} steps")

    if config.reads_ahead:
        say('warning: dispatch = "sequence" reads the tokens that it is to predict: its losses mean nothing')

    stop_asked = stop = False  # asked of this process; agreed by all

    def ask_to_stop(signum, frame):
        nonlocal stop_asked
        stop_asked = True

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")
    run.mkdir(parents=True, exist_ok=True)
    metrics = open_metrics(run / "metrics.jsonl", step) if rank == 0 else None

    def record(**values):
        if metrics:
            metrics.write(json.dumps(values) + "\n")
            metrics.flush()

    def progress():
        return min(1.0, step / args.steps if args.steps else seconds / (60 * args.minutes))

    def micro_loss(micro):
        """The share of a micro-batch of this rank in the mean loss of the step."""
        first = phases[-1][1] + (rank * n_micro + micro) * B
        ids, targets = (a.to(device, non_blocking=True) for a in batch_at(data, phases, args.seed, first, B))
        with autocast:
            return model(ids, targets) / (n_micro * world)

    def tokens_seen():
        return sum(served for _, served in phases) * T

    def save():
        if rank == 0:
            values = {"step": step, "phases": phases, "seconds": seconds, "skipped": skipped, "in_a_row": in_a_row,
                      "recent": recent, "config": asdict(config), "args": vars(args) | {"resume": False}, "shards": shards, "machine": machine}  # fmt: skip
            save_checkpoint(run, values, model, optimizers, tokenizer.path, args)

    # Compiled code would be made anew for every length of text, so what happens now and then runs without it.
    @torch.compiler.set_stance("force_eager")
    def score(max_tokens):
        result = evaluate(model, val, tokenizer.token_bytes, device, max_tokens=max_tokens, rank=rank, world=world)
        say(f"step {step:>5} | val loss {result['loss']:.4f} | val bpb {result['bpb']:.4f} | {result['tokens']:,} tokens")
        record(step=step, val_loss=result["loss"], val_bpb=result["bpb"])
        return result

    @torch.compiler.set_stance("force_eager")
    def show_sample():
        if rank == 0:
            start = val[0][:8].tolist()
            generator = torch.Generator(device).manual_seed(step)
            new = generate(model, torch.tensor([start], device=device), 64, tokenizer.vocab_size, 0.8, 0, 0.95, generator)
            text = tokenizer.decode(start) + " | " + tokenizer.decode([i.item() for i in new])
            say("    " + text.replace("\n", " "))

    if compiled:
        say("compiling: the first step takes up to a minute")
    bytes_per_token = sum(s["bytes"] for s in data.shards) / sum(s["tokens"] for s in data.shards)
    last_saved = step if checkpoint else None
    while progress() < 1 and not stop:
        start = time.perf_counter()
        factor = lr_factor(step, progress(), args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * group["scale"] * factor
        if args.exact:
            loss = exact_gradients(micro_loss, params, n_micro, rank, world)
        else:
            loss = torch.zeros((), device=device)
            for micro in range(n_micro):
                own = micro_loss(micro)
                own.backward()
                loss += own.detach()
        if world > 1 and not args.exact:
            # Gradients are summed one by one in a fixed order, not in DDP's buckets, which it rearranges after the first
            # step: with them a resumed run would not add up to the same bits.
            for work in [dist.all_reduce(p.grad, async_op=True) for p in params] + [dist.all_reduce(loss, async_op=True)]:
                work.wait()
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip or math.inf)
        loss, norm = torch.stack([loss, norm]).tolist()  # the same on all ranks, so that all skip or none does
        if is_bad(loss, norm, recent):
            skipped, in_a_row = skipped + 1, in_a_row + 1
        else:
            in_a_row, recent = 0, [*recent[1 - WINDOW :], loss]
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        took, stop = time.perf_counter() - start, stop_asked
        if world > 1:  # all ranks must agree on the clock and on stopping
            agreed = torch.tensor([took if rank == 0 else 0.0, float(stop)], dtype=torch.float64, device=device)
            dist.all_reduce(agreed)
            took, stop = agreed[0].item(), agreed[1].item() > 0
        step, seconds = step + 1, seconds + took
        phases[-1][1] += batch

        if step % args.log_every == 0 or step == 1:
            done = progress()
            mfu = f" | mfu {100 * flops * args.batch_tokens / took / (peak * world):3.0f}%" if peak else ""
            eta, bpb = seconds / done - seconds, loss / math.log(2) / bytes_per_token
            total = args.steps or int(step / done)
            speed = f"{1000 * took:4.0f} ms | {args.batch_tokens / took / 1000:.2f}k tok/s{mfu} | eta {eta / 60:.0f}m"
            say(f"step {step:>5}/{total:<5} {100 * done:5.1f}% | loss {loss:.4f} | bpb {bpb:.3f} | "
                f"lr {args.lr * factor:.1e} | norm {norm:.2f} | {speed}" + (f" | skipped {skipped}" if skipped else ""))  # fmt: skip
            record(step=step, loss=loss, bpb=bpb, lr=args.lr * factor, norm=norm, ms=1000 * took,
                   tokens_per_second=args.batch_tokens / took, tokens=tokens_seen(), seconds=seconds, skipped=skipped)  # fmt: skip
        if in_a_row == MAX_SKIPPED:
            good = sorted(run.glob("step-*"))[-1:] or ["none"]
            message = f"{MAX_SKIPPED} steps in a row had a loss or a gradient that cannot be right: the run ends at step {step}. The last good checkpoint "
            raise SystemExit(f"{message}is {good[0]}: go on from there with a smaller --lr, or look at the data" if rank == 0 else 1)
        if args.save_every and step % args.save_every == 0 and not in_a_row:
            save()
            last_saved = step
        if args.eval_every and step % args.eval_every == 0 and progress() < 1 and not stop:
            score(args.eval_tokens)
            show_sample()

    if last_saved != step:
        save()
    if stop:
        say(f"stopped at step {step}; python train.py --resume --out {run} goes on")
    else:
        result = score(MAX_TOKENS)
        show_sample()
        loss, bpb = result["loss"], result["bpb"]
        say(f"done: step {step}, val loss {loss:.4f}, val bpb {bpb:.4f}, tokens {tokens_seen()}, {seconds:.0f} s")
        say(f"next: python sample.py {run}    python eval.py {run}")
    if world > 1:
        dist.barrier()  # a rank that leaves while another is still at work can abort at its exit
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
