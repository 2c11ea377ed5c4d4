"""Train a decoder on a prepared folder.

    python train.py                                             # default data, demo model, 10 minutes on a laptop's CPU
    python train.py --data data/mine --out out/mine --steps 2000
    python train.py --resume                                    # go on after a stop, with the flags of the run
    torchrun --nproc_per_node 4 train.py --preset small --data data/mine --steps 20000              # 4 GPUs
    torchrun --nproc_per_node 8 train.py --preset steel-1b --shard ...           # FSDP2: a model too large for one GPU
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...   # on both nodes

A run leaves out/RUN/metrics.jsonl and checkpoints like out/RUN/step-00000500. Ctrl-C or SIGTERM finishes the step,
saves and exits; --resume goes on from there as if nothing had happened.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import platform
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch

from checkpoint import Log, Saver, State, load, newest_checkpoint, read_state, read_tensors, set_aside_newer
from common import can_compile, choose_device, keep_large_buffers, peak_flops
from data import TokenData, batches, evenly_spaced, inputs_and_targets, unserved
from eval import MAX_TOKENS, evaluate
from model import CHOICES, PRESETS, Config, Decoder, softmax_gradient
from optim import load_optimizers, lr_factor, make_optimizers, scale_and_clip, update
from parallel import Stop, apply_fsdp, exact_sums, run_rank, start_ranks, sum_over_ranks
from prepare import prepare
from sample import generate
from tokenizer import load_tokenizer

DEFAULT_DATA = "data/default"
HASHED_BYTES = 1 << 30  # of the data, to check at each start: a second or two

# ----------------------------------------------------------------------------------------------------------------------
# Flags


def get_args(argv=None, **defaults):
    """Flags of the command line; defaults replaces those of the parser (the flags of a run that is resumed)."""
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default=DEFAULT_DATA, help="folder made by prepare.py; the default one is made when missing")
    add("--out", default="out/demo", help="run directory")
    add(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out, if any, with that run's flags"
    )
    add("--init-from", metavar="PATH", help="start from these weights: a checkpoint, a run, or a Hugging Face folder")
    add("--seed", type=int, default=0, help="of the initialisation and of the order of the data")
    # How long, how much at a time
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="length of the run and of its schedule")
    length.add_argument("--minutes", type=float, help="length as time spent on steps; 10 if neither is given")
    add("--micro-batch", type=int, default=16, help="samples in one forward pass")
    add("--batch-tokens", type=int, help="tokens of a step, over all ranks; by default one micro-batch on each")
    # Optimization
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="for the matrices; AdamW takes the rest")
    add("--lr", type=float, default=6e-3, help="peak learning rate; tuned for the demo model, larger ones want less")
    add("--weight-decay", type=float, default=0.1, help="of the matrices")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: no limit")
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
    add("--exact", action=switch, default=False, help="the same bits at 1, 2, 4, ... processes, for a little memory")
    add("--shard", action=switch, default=False, help="FSDP2: shard parameters, gradients and optimizer over the ranks")
    add("--recompute", action=switch, default=False, help="activation checkpointing: keep only the input of each block")
    add("--verify", action="store_true", help="hash all shards of the data at the start, not only 1 GB of them")
    add("--dry-run", action="store_true", help="print what the model needs on how many GPUs, and end")
    # Model
    add("--reset-at-eos", action=switch, default=False, help="no reading back over an end of document")
    add("--preset", choices=PRESETS, help="the model, demo by default; each of its fields has a flag of its own")
    for field in fields(Config):
        if field.name not in ("vocab_size", "reset_id"):  # they follow from the data's tokenizer
            kind = {"action": switch} if field.type is bool else {"type": field.type}
            add(flag(field.name), choices=CHOICES.get(field.name), default=argparse.SUPPRESS, **kind)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    check_args(args, parser.error)
    return args


def flag(name):
    return "--" + name.replace("_", "-")


def check_args(args, error):
    if args.shard and args.exact:
        error("--exact sums whole gradients: leave --shard out")
    if args.preset and args.init_from:
        error(f"--init-from brings a model of its own: leave --preset {args.preset} out")
    for names, low in (
        ("steps micro_batch batch_tokens eval_tokens log_every keep", 1),
        ("minutes", 0.01),
        ("lr weight_decay clip warmup decay eval_every save_every keep_every", 0),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value < math.inf:
                error(f"{flag(name)} {value}: expected {low} or more")


def given_fields(args):
    """The fields of Config that were set by flags."""
    return {field.name: getattr(args, field.name) for field in fields(Config) if hasattr(args, field.name)}


# ----------------------------------------------------------------------------------------------------------------------
# Set-up


def open_run(args, argv, ranks):
    """Lock the run directory -> args (the run's, if it is resumed), log (on rank 0), checkpoint and its state.json."""
    run = Path(args.out)
    log = Log(run) if ranks.rank == 0 and run.exists() else None
    ranks.barrier()  # rank 0 holds the lock before anybody reads the folder
    checkpoint = state = None
    has_steps = any(run.glob("step-*"))
    if has_steps and not args.resume:
        raise ValueError(f"{run} has checkpoints: --resume goes on from them, another --out starts anew")
    if has_steps:
        checkpoint = newest_checkpoint(run)
        state = read_state(checkpoint)
        saved = state["args"] | ({"steps": None, "minutes": None} if args.steps or args.minutes else {})
        args = get_args(argv, **saved)
        for name in ("seed", "optimizer", "preset", "init_from"):
            if getattr(args, name) != saved[name]:
                began = f"the run began with {flag(name)} {saved[name]}"
                raise ValueError(f"--resume: {began}: leave the flag out, or change --out")
    elif args.resume:
        ranks.say(f"no checkpoint in {run} yet: from the beginning")
    if args.shard and ranks.world == 1:
        raise ValueError("--shard needs several processes: torchrun --nproc_per_node N train.py, or --no-shard")
    if args.exact and ranks.world & (ranks.world - 1):
        raise ValueError(f"--exact sums in pairs: {ranks.world} processes are not a power of two")
    if args.steps is None and args.minutes is None:
        args.minutes = 10.0
    return args, log, checkpoint, state


def find_data(args, checkpoint, ranks):
    """Prepare the default data if they are missing; check that all ranks see the same -> the data's tokenizer."""
    manifest = Path(args.data, "manifest.json")
    if args.data == DEFAULT_DATA and not manifest.exists() and ranks.rank == 0:
        prepare([], Path(args.data), workers=os.cpu_count())
    ranks.barrier()
    if not manifest.exists():
        raise ValueError(f"no data in {args.data}: python prepare.py FILE_OR_DIR --out {args.data}")
    ranks.check_equal("flags", json.dumps(vars(args)))
    ranks.check_equal("data", manifest.read_text(encoding="utf-8"))
    if checkpoint:
        ranks.check_equal("checkpoint", (checkpoint / "sha256.json").read_text(encoding="utf-8"))
    return load_tokenizer(args.data)


def make_model(args, tokenizer, checkpoint, saved):
    """The checkpoint's model, or one from --init-from, or a preset's, with the fields that flags change; on the CPU."""
    torch.manual_seed(args.seed)
    given = given_fields(args) | {"reset_id": tokenizer.eos_id if args.reset_at_eos else -1}
    if checkpoint:
        base = Config(**saved["config"])
        config = replace(base, **given)
        if config != base:
            other = f"the model is another one than in {checkpoint} ({changes(base, config)})"
            raise ValueError(f"--resume: {other}: change --out")
        model = Decoder(config)
        model.load_state_dict(read_tensors(checkpoint / "model.pt"))
    elif args.init_from:
        origin, its_tokenizer, info = load(args.init_from)
        if its_tokenizer.content != tokenizer.content:
            advice = f"prepare the data with --tokenizer {info.path}"
            raise ValueError(f"--init-from {info.path}: another tokenizer: {advice}")
        config = replace(origin.config, **given)
        # Weights do not depend on these two.
        base = replace(origin.config, block_size=config.block_size, reset_id=config.reset_id)
        if config != base:
            raise ValueError(f"--init-from {info.path}: the flags say another model ({changes(base, config)})")
        model = Decoder(config)
        model.load_state_dict(origin.state_dict())
    else:
        model = Decoder(replace(PRESETS[args.preset or "demo"], vocab_size=tokenizer.embedding_rows, **given))
    return model


def changes(before, after):
    """The fields in which two Configs differ, in words."""
    before, after = asdict(before), asdict(after)
    return ", ".join(f"{key} {before[key]} -> {after[key]}" for key in after if after[key] != before[key])


def open_data(args, block_size, saved, ranks):
    """-> training and held-out samples, of which each process of a node hashes a part."""
    splits = [TokenData(args.data, split, block_size) for split in ("train", "val")]
    for split in splits:
        max_bytes, seed = math.inf if args.verify else HASHED_BYTES, saved["step"] if saved else 0
        split.check_hashes(max_bytes, seed, ranks.local_rank, ranks.local_world)
    return splits


def count_micro_batches(args, block_size, ranks):
    """Micro-batches of a step on each rank. Sets args.batch_tokens where no flag has."""
    one = args.micro_batch * block_size * ranks.world
    args.batch_tokens = args.batch_tokens or one
    n_micro, rest = divmod(args.batch_tokens, one)
    if rest:
        product = f"micro-batch x block x ranks = {args.micro_batch} x {block_size} x {ranks.world} = {one}"
        raise ValueError(f"--batch-tokens {args.batch_tokens} is not a multiple of {product}")
    return n_micro


def place_model(model, args, device, compiled, ranks):
    """Move the model to its device, compiled and sharded as the flags say."""
    for block in model.blocks:
        block.recompute = args.recompute
        if compiled:  # all blocks share one code; not dynamic, or an evaluation's batch size would change training's
            block.compile(dynamic=False)
    if compiled and device == "cuda":  # on a CPU this does not pay
        model.softmax_gradient = torch.compile(softmax_gradient, dynamic=False)
    if args.shard:
        apply_fsdp(model, device, ranks.world)
    model.to(device)


def make_state(args, data, device, saved):
    """The state of a new run, or a saved one, whose data may have grown."""
    if not saved:
        return State.create(device, [[len(data), 0]])
    names = ("phases", "recent", "skipped", "in_a_row", "step", "seconds")
    state = {name: saved[name] for name in names}
    if len(data) > state["phases"][-1][0]:
        state["phases"].append([len(data), 0])
    new_flags = any(getattr(args, name) != saved["args"][name] for name in ("lr", "batch_tokens"))
    if new_flags or state["phases"][-1][1] == 0:
        state["recent"] = []  # losses to come need not be like those before
    return State.create(device, **state)


def describe_machine(args, device, ranks):
    """What a resumed run needs to be the same, to give the same bits."""
    compiled = can_compile(device) if args.compile is None else args.compile
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "world": ranks.world}
    return machine | {"shard": args.shard, "compile": compiled, "device": device, "cpu": platform.machine()}


def check_resume(args, data, machine, checkpoint, saved, ranks):
    """Refuse data that has lost shards of the run; say what else is new; rename damaged newer checkpoints."""
    shards = data.shard_hashes()
    for before, now in itertools.zip_longest(saved["shards"], shards[: len(saved["shards"])]):
        if before != now:
            lost = f"shard {before[0]}, which {args.data} has lost or changed"
            raise ValueError(f"--resume: {checkpoint} was trained on {lost}: bring it back")
    others = [f"{key} {was} -> {machine[key]}" for key, was in saved["machine"].items() if machine[key] != was]
    if others:
        ranks.say(f"note: {', '.join(others)}: goes on, but not to the same bits")
    ranks.say(f"goes on from {checkpoint}")
    if ranks.rank == 0:
        set_aside_newer(checkpoint)
    if new := len(data) - saved["phases"][-1][0]:
        left = unserved(saved["phases"])
        ranks.say(f"{new:,} new samples, mixed with the {left:,} that this epoch has not served yet")


def describe_run(args, model, data, n_micro, machine, ranks):
    """Print the resolved configuration, and what a step and an epoch break down to."""
    B, T, config = args.micro_batch, data.block_size, model.config
    for values in (asdict(config), vars(args)):
        ranks.say("  ".join(f"{key}={value}" for key, value in values.items()))
    ranks.say(f"{model.n_params():,} parameters, {model.flops_per_token(T) / 1e6:.1f} MFLOP a token; {machine}")
    product = f"micro-batch {B} x block {T} x {n_micro} micro-batches x {ranks.world} ranks"
    ranks.say(f"a step: {args.batch_tokens:,} tokens = {product}")
    steps = len(data) / (n_micro * B * ranks.world)
    ranks.say(f"an epoch: {len(data):,} samples = {len(data) * T:,} tokens = {steps:.1f} steps")
    if config.reads_ahead:
        ranks.say('warning: dispatch = "sequence" reads the tokens that it is to predict: its losses mean nothing')
    if machine["compile"]:
        ranks.say("compiling: the first step takes up to a minute")


def dry_run(args):
    from extras.plan import print_plan

    base = load(args.init_from)[0].config if args.init_from else PRESETS[args.preset or "demo"]
    print_plan(replace(base, **given_fields(args)), args)


# ----------------------------------------------------------------------------------------------------------------------
# A step


def gradients(model, micro_batches, args, ranks, device):
    """Set every gradient to that of the step's sum of nats -> nats, count of targets: tensors, sums over all ranks."""
    params = list(model.parameters())

    def forward(i):
        ids, targets = (a.to(device, non_blocking=True) for a in micro_batches[i])
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            nats = model(ids, targets, reduction="sum")
        return nats, (targets >= 0).sum().to(nats.dtype)

    def micro_sums(i):
        nats, count = forward(i)
        return [nats.detach(), count, *torch.autograd.grad(nats, params)]

    if args.exact:
        nats, count, *sums = exact_sums(micro_sums, len(micro_batches), ranks)
        for p, gradient in zip(params, sums):
            p.grad = gradient.contiguous()  # fused AdamW on a CPU reads it in the order of memory
        return nats, count
    totals = torch.zeros(2, device=device)
    for i in range(len(micro_batches)):
        nats, count = forward(i)
        nats.backward()
        totals += torch.stack([nats.detach(), count])
    sum_over_ranks([totals] if args.shard else [*(p.grad for p in params), totals])  # FSDP has summed the gradients
    return totals.unbind()


@contextlib.contextmanager
def out_of_memory_advice(args, n_micro):
    """Turn a step that finds no memory into a line that says which flags need less and change no result."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        B = args.micro_batch
        smaller = next((size for size in range(B // 2, 0, -1) if n_micro * B % size == 0), None)
        flags = f"--micro-batch {smaller} --batch-tokens {args.batch_tokens}"
        advice = f"halve it; the results do not change with {flags}" if smaller else "try --recompute"
        raise ValueError(f"out of memory with --micro-batch {B}: {advice}") from None


class Reporter:
    """What a run says of itself: lines on the terminal, the same numbers in metrics.jsonl, scores on held-out text."""

    def __init__(self, args, model, data, val, tokenizer, log, ranks, device, state):
        self.args, self.model, self.val, self.tokenizer = args, model, val, tokenizer
        self.log, self.ranks, self.device = log, ranks, device
        self.flops, self.peak = model.flops_per_token(val.block_size), peak_flops(device)
        targets = np.concatenate([inputs_and_targets(data, i)[1] for i in evenly_spaced(data, 1 << 16)])
        self.bytes_per_token = np.mean([len(tokenizer.token_bytes[i]) for i in targets[targets >= 0]] or [1])
        self.step, self.seconds = state.step, state.seconds  # at the last line

    def line(self, state, loss, norm, lr):
        """The step that has just been made; time and speed are means since the last line."""
        args, done, skipped = self.args, state.progress(self.args), state.skipped.item()
        took = (state.seconds - self.seconds) / (state.step - self.step)
        self.step, self.seconds = state.step, state.seconds
        speed, bpb = args.batch_tokens / took, loss / math.log(2) / self.bytes_per_token
        parts = [
            f"step {state.step:>5}/{args.steps or int(state.step / done):<5} {100 * done:5.1f}%",
            f"loss {loss:.4f} | bpb {bpb:.3f} | lr {lr:.1e} | norm {norm:.2f}",
            f"{1000 * took:4.0f} ms | {speed / 1000:.2f}k tok/s",
            f"mfu {100 * self.flops * speed / (self.peak * self.ranks.world):3.0f}%" if self.peak else "",
            f"eta {(state.seconds / done - state.seconds) / 60:.0f}m",
            f"skipped {skipped}" if skipped else "",
        ]
        self.ranks.say(" | ".join(part for part in parts if part))
        if self.log:
            values = {"loss": loss, "bpb": bpb, "lr": lr, "norm": norm, "ms": 1000 * took, "seconds": state.seconds}
            values |= {"skipped": skipped, "tokens_per_second": speed, "tokens": state.samples * self.val.block_size}
            self.log.add(step=state.step, **values)

    def score(self, state, max_tokens, stop):
        """Evaluate, and show a sample -> evaluate()'s result; None if a signal came."""
        batch_tokens = self.args.micro_batch * self.val.block_size
        where = self.device, batch_tokens, max_tokens, self.ranks.rank, self.ranks.world
        result = evaluate(self.model, self.val, self.tokenizer.token_bytes, *where, stop.now)
        if result is None:
            return None
        loss, bpb, tokens = result["loss"], result["bpb"], result["tokens"]
        self.ranks.say(f"step {state.step:>5} | val loss {loss:.4f} | val bpb {bpb:.4f} | {tokens:,} tokens")
        if self.log and state.evaluated < state.step:
            self.log.add(step=state.step, val_loss=loss, val_bpb=bpb)
        state.evaluated = state.step
        if self.ranks.rank == 0 and not self.args.shard:  # a sharded model runs on all ranks or on none
            self.sample(state.step)
        return result

    def sample(self, seed):
        """64 tokens behind the first 8 of the held-out text."""
        prompt = self.val[0][:8].tolist()
        ids = torch.tensor([prompt], device=self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.compiler.set_stance("force_eager"):  # compiled, every length would need code of its own
            new = generate(self.model, ids, 64, self.tokenizer.vocab_size, 0.8, 0, 0.95, generator)
            text = self.tokenizer.decode(prompt) + " | " + self.tokenizer.decode([i.item() for i in new])
        self.ranks.say("    " + text.replace("\n", " "))


# ----------------------------------------------------------------------------------------------------------------------
# The run


def main(argv=None):
    args = get_args(argv)
    if args.dry_run:
        return dry_run(args)
    device = choose_device(args.device)
    ranks = start_ranks(device)
    keep_large_buffers()
    torch.set_float32_matmul_precision("high")

    # Set-up: the folder of the run, its data, its model, its state
    args, log, checkpoint, saved = open_run(args, argv, ranks)
    run = Path(args.out)
    tokenizer = find_data(args, checkpoint, ranks)
    model = make_model(args, tokenizer, checkpoint, saved)
    data, val = open_data(args, model.config.block_size, saved, ranks)
    n_micro = count_micro_batches(args, model.config.block_size, ranks)
    machine = describe_machine(args, device, ranks)
    if checkpoint:
        check_resume(args, data, machine, checkpoint, saved, ranks)
    place_model(model, args, device, machine["compile"], ranks)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    state = make_state(args, data, device, saved)
    if checkpoint:
        load_optimizers(optimizers, read_tensors(checkpoint / "optimizer.pt"))
    log = log or Log(run) if ranks.rank == 0 else None
    state.evaluated = ranks.from_rank_0(log.cut(state.step) if log else 0)
    constants = {"chat": data.mostly_chat(), "config": asdict(model.config), "shards": data.shard_hashes()}
    constants |= {"args": vars(args) | {"resume": False, "verify": False}, "machine": machine}
    saver = Saver(run, tokenizer, log, ranks, args.keep, args.keep_every, last=state.step if checkpoint else None)
    stop = Stop(run, compiling=machine["compile"], ranks=ranks)
    describe_run(args, model, data, n_micro, machine, ranks)
    reporter = Reporter(args, model, data, val, tokenizer, log, ranks, device, state)

    first_step, clock = state.step + 1, time.perf_counter()
    for micro_batches in batches(data, state.phases, args.seed, ranks, n_micro, args.micro_batch, device):
        if stop.by_all or state.progress(args) >= 1:
            break
        if state.due(args.eval_every) and state.step > state.evaluated:
            if not reporter.score(state, args.eval_tokens, stop):
                break
            clock = time.perf_counter()

        with out_of_memory_advice(args, n_micro):
            nats, count = gradients(model, micro_batches, args, ranks, device)
        loss, lr = nats / count, args.lr * lr_factor(state.step, state.progress(args), args)
        norm = scale_and_clip(model.parameters(), count, args.clip)
        update(optimizers, lr, skip=state.judge(loss, norm, count))
        state.advance(n_micro * args.micro_batch * ranks.world)

        log_now = state.due(args.log_every) or state.step == 1
        if log_now or state.due(args.save_every) or state.due(args.eval_every):
            state.check(saver)  # waits for the device
        state.seconds += stop.agree(time.perf_counter() - clock)
        if log_now:
            reporter.line(state, loss.item(), norm.item(), lr)
        if state.step == first_step:
            stop.compiling = False
            gc.freeze()  # what is there now stays: the garbage collector need not look at it again
        if state.due(args.save_every) and not state.in_a_row:
            saver.save(model, optimizers, state.read() | constants)
        clock = time.perf_counter()

    state.check(saver)
    if saver.last != state.step or not saver.wait():
        saver.save(model, optimizers, state.read() | constants)
    whole = saver.wait()
    result = reporter.score(state, MAX_TOKENS, stop) if state.progress(args) >= 1 else None
    if result:
        tokens = state.samples * model.config.block_size
        scores = f"val loss {result['loss']:.4f}, val bpb {result['bpb']:.4f}"
        ranks.say(f"done: step {state.step}, {scores}, tokens {tokens}, {state.seconds:.0f} s")
        ranks.say(f"next: python sample.py {run}    python eval.py {run}")
    elif whole:
        ranks.say(f"stopped at step {state.step}; python train.py --resume --out {run} goes on")
    gc.unfreeze()
    if log:
        log.file.close()
    ranks.barrier()  # no rank leaves while another is still at work
    return 0 if whole else 1


if __name__ == "__main__":
    run_rank(main)
