"""Train a decoder on a prepared folder.

    python train.py                                             # default data, demo model, 10 minutes on a laptop's CPU
    python train.py --data data/mine --out out/mine --steps 2000
    python train.py --resume                                    # continue after a stop, with the flags of the run
    python train.py --data data/mine --mix-share zh=0.8,en=0.2  # parts of the run by language or source; or --mix
    python train.py --recipe sft --data data/chat --init-from out/demo --out out/sft           # fine-tuning on chats
    python train.py --recipe dpo --data data/pairs --init-from out/sft --out out/dpo           # on pairs of answers
    torchrun --nproc_per_node 4 train.py --preset small --data data/mine --steps 20000              # 4 GPUs
    torchrun --nproc_per_node 8 train.py --preset steel-1b --shard ...           # FSDP2: a model too large for one GPU
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...   # on both nodes

A run leaves out/RUN/metrics.jsonl and checkpoints like out/RUN/step-00000500. Ctrl-C or SIGTERM finishes the step,
saves and exits; --resume continues from there as if nothing had happened.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import time
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from checkpoint import (
    Log,
    Saver,
    load,
    make_state,
    newest_checkpoint,
    read_state,
    read_tensors,
    round_goes_on,
    set_aside_newer,
    step_folders,
)
from common import can_compile, choose_device, has_amx, keep_large_buffers
from data import TokenData, batches, read_manifest
from dpo import Preference, add_reference, load_reference, weights_hash
from eval import MAX_TOKENS
from model import CHOICES, Config, Decoder, softmax_gradient
from optim import load_optimizers, lr_factor, make_optimizers, scale_and_clip, update
from order import unserved
from parallel import Stop, apply_fsdp, exact_sums, run_rank, start_ranks, sum_over_ranks, summing_gradients
from plan import PRESETS, print_plan, set_sizes
from prepare import prepare
from report import Reporter, describe_machine, describe_run
from tokenizer import load_tokenizer

DEFAULT_DATA = "data/default"
HASHED_BYTES = 1 << 30  # of the data, to check at each start: a second or two

# Defaults of --recipe, which flags override: those of Steel-LLM (arXiv 2502.06635, sections 6.1 and 6.3)
FINE_TUNING = {"optimizer": "adamw", "schedule": "cosine", "pack": True, "bf16": False}  # fp32 on a CPU, as its scores
RECIPES = {
    "sft": FINE_TUNING | {"epochs": 4.0, "batch_documents": 256, "lr": 2e-5, "warmup": 0, "weight_decay": 0.0},
    "dpo": FINE_TUNING | {"epochs": 3.0, "batch_documents": 128, "lr": 5e-6, "warmup": 0.1, "weight_decay": 0.1},
}

# ----------------------------------------------------------------------------------------------------------------------
# Flags


def get_args(argv=None, **defaults):
    """Flags of the command line; defaults replaces those of the parser (the flags of a run that is resumed)."""
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default=DEFAULT_DATA, help="folder made by prepare.py; the default one is made when missing")
    add("--out", default="out/demo", help="run directory")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out, if any, with its flags")
    add("--init-from", metavar="PATH", help="start from these weights: a checkpoint, a run, or a Hugging Face folder")
    add("--recipe", choices=RECIPES, help="defaults of fine-tuning on chats, or of preferences on pairs of answers")
    add("--seed", type=int, default=0, help="of the initialisation and of the order of the data")
    # What of it
    mix = parser.add_mutually_exclusive_group()
    mix.add_argument("--mix", metavar="web=2,en=0.5", help="epochs of sources or languages in a round; of others 1")
    mix.add_argument("--mix-share", metavar="zh=0.8,en=0.2", help="instead: their parts of the run; others have none")
    # How long, how much at a time
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="length of the run and of its schedule")
    length.add_argument("--epochs", type=float, help="length as times that each sample is served, or rounds of --mix")
    length.add_argument("--minutes", type=float, help="length as time spent on steps; 10 if no length is given")
    own = "a large model on a GPU chooses its own (docs/gpu.md)"
    add("--micro-batch", type=int, help=f"samples in one forward pass: 16; {own}")
    add("--batch-tokens", type=int, help=f"tokens of a step, over all ranks: one micro-batch on each; {own}")
    add("--batch-documents", type=int, help="instead: conversations, or pairs of answers, of a step, about")
    # Optimization
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="for the matrices; AdamW takes the rest")
    add("--lr", type=float, help=f"peak learning rate: 6e-3, tuned for the demo model, larger ones want less; {own}")
    add("--weight-decay", type=float, default=0.1, help="of the matrices")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: no limit")
    add("--schedule", choices=("cosine", "wsd"), default="wsd", help="after the warm-up, down to 0")
    add("--warmup", type=float, default=50, help="steps from 0 to the peak; below 1: that share of the run")
    add("--decay", type=float, default=0.8, help="share of the run in which wsd falls")
    add("--beta", type=float, default=0.1, help="dpo: strength of the pull towards the model of --init-from")
    add("--label-smoothing", type=float, default=0.0, help="dpo: share of the pairs taken to be the wrong way round")
    add("--sft-weight", type=float, default=0.0, help="dpo: weight of the chosen answers' own loss")
    # Now and then
    add("--eval-every", type=int, default=250, help="steps; 0: at the end only")
    add("--eval-tokens", type=int, default=32_768, help="held-out tokens to score along the way")
    add("--save-every", type=int, default=500, help="steps; 0: at the end only")
    add("--keep", type=int, default=2, help="newest checkpoints to keep")
    add("--keep-every", type=int, default=0, help="and those of every so many steps; 0: none")
    add("--log-every", type=int, default=10, help="steps")
    add("--report", choices=("tensorboard", "wandb", "swanlab"), help="mirror metrics.jsonl there: needs its package")
    # Machine
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--compile", action=switch, help="torch.compile; by default where a compiler is found")
    add("--bf16", action=switch, help="on a CPU: matmuls in bf16; by default where it has AMX (CUDA: always)")
    add("--exact", action=switch, default=False, help="the same bits at 1, 2, 4, ... CPU processes")
    add("--shard", action=switch, default=False, help="FSDP2: shard parameters, gradients and optimizer over the ranks")
    add("--recompute", action=switch, default=False, help="activation checkpointing: keep only the input of each block")
    add("--verify", action="store_true", help="hash all shards of the data at the start, not only 1 GB of them")
    add("--dry-run", action="store_true", help="print what the model needs on how many GPUs, and end")
    # Model
    add("--reset-at-eos", action=switch, default=False, help="no reading back over an end of document")
    add("--pack", action=switch, default=False, help="whole conversations in each sample; sets --reset-at-eos")
    add("--preset", choices=PRESETS, help="the model, demo by default; each of its fields has a flag of its own")
    for field in fields(Config):
        if field.name not in ("vocab_size", "reset_id"):  # they follow from the data's tokenizer
            kind = {"action": switch} if field.type is bool else {"type": field.type}
            add(flag(field.name), choices=CHOICES.get(field.name), default=argparse.SUPPRESS, **kind)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.recipe:
        parser.set_defaults(**RECIPES[args.recipe] | {"epochs": None} | defaults)
        args = parser.parse_args(argv)
    check_args(args, parser.error)
    return args


def flag(name):
    return "--" + name.replace("_", "-")


def check_args(args, error):
    if args.report and not find_spec(args.report):
        error(f"--report {args.report} needs the package: pip install {args.report}")
    if args.shard and args.exact:
        error("--exact sums whole gradients: leave --shard out")
    if args.preset and args.init_from:
        error(f"--init-from brings a model of its own: leave --preset {args.preset} out")
    if args.recipe == "dpo" and not args.pack:
        error("--recipe dpo keeps pairs apart: leave --no-pack out")
    if args.recipe != "dpo" and (args.beta, args.label_smoothing, args.sft_weight) != (0.1, 0, 0):
        error("--beta, --label-smoothing and --sft-weight go with --recipe dpo")
    for names, low in (
        ("steps micro_batch batch_tokens batch_documents eval_tokens log_every keep", 1),
        ("minutes epochs", 0.01),
        ("lr weight_decay clip warmup decay sft_weight eval_every save_every keep_every", 0),
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
    """Find what to resume -> args (the run's own, if it is resumed), log, checkpoint, and the checkpoint's state.json.

    A run directory that exists is locked by rank 0, whose log is the lock; on other ranks log is None.
    """
    run = Path(args.out)
    log = Log(run) if ranks.rank == 0 and run.exists() else None
    ranks.barrier()  # rank 0 holds the lock before anybody reads the folder
    if not step_folders(run):
        if args.resume:
            ranks.say(f"no checkpoint in {run} yet: from the beginning")
        return args, log, None, None
    if not args.resume:
        raise ValueError(f"--out {run} has checkpoints: --resume continues from them, another --out starts anew")
    checkpoint = newest_checkpoint(run)
    saved = read_state(checkpoint)
    flags = {"bf16": False} | saved["args"]  # on a CPU, a run without the flag is in fp32
    if args.steps or args.minutes or args.epochs:  # a new length replaces the old one
        flags = flags | {"steps": None, "minutes": None, "epochs": None}
    if args.mix is not None or args.mix_share is not None:  # and so does a new mix
        flags = flags | {"mix": None, "mix_share": None}
    args = get_args(argv, **flags)
    for name in ("seed", "optimizer", "preset", "init_from", "pack", "recipe"):
        if (getattr(args, name) or None) != ((was := flags.get(name)) or None):
            began = f"the run began with {flag(name)} {was}"
            raise ValueError(f"--resume: {began}: leave the flag out, or change --out")
    return args, log, checkpoint, saved


def check_world(args, device, ranks):
    """Set the default length and precision, and refuse flags that this number of processes cannot have."""
    args.bf16 = device == "cuda" or (device == "cpu" and has_amx() if args.bf16 is None else args.bf16)
    if args.steps is None and args.minutes is None and args.epochs is None:
        args.epochs = RECIPES[args.recipe]["epochs"] if args.recipe else None
        args.minutes = None if args.recipe else 10.0
    if args.shard and ranks.world == 1:
        raise ValueError("--shard needs several processes: torchrun --nproc_per_node N train.py, or --no-shard")
    if args.exact and ranks.world & (ranks.world - 1):
        raise ValueError(f"--exact sums in pairs: {ranks.world} processes are not a power of two")


def ensure_data(args, ranks):
    """Prepare the default data if they are missing; other data must be there."""
    manifest = Path(args.data, "manifest.json")
    if args.data == DEFAULT_DATA and not manifest.exists() and ranks.rank == 0:
        prepare([], Path(args.data), workers=os.cpu_count())
    ranks.barrier()
    if not manifest.exists():
        fix = "say with --data where it is" if args.resume else f"python prepare.py FILE_OR_DIR --out {args.data}"
        raise ValueError(f"no data in {args.data}: {fix}")


def check_ranks_agree(args, checkpoint, ranks):
    """All ranks must have been started alike and see the same files."""
    ranks.check_equal("flags", json.dumps(vars(args)))
    ranks.check_equal("data", json.dumps(read_manifest(args.data)))
    ranks.check_equal("checkpoint", (checkpoint / "sha256.json").read_text(encoding="utf-8") if checkpoint else "")


def make_model(args, tokenizer, checkpoint, saved):
    """The checkpoint's model, or one from --init-from, or a preset's, with the fields that flags change; on the CPU."""
    torch.manual_seed(args.seed)
    given = given_fields(args) | {"reset_id": tokenizer.eos_id if args.reset_at_eos or args.pack else -1}
    if checkpoint:
        base = Config(**saved["config"])
        config = replace(base, **given)
        if config != base:
            other = f"the model differs from the one in {checkpoint} ({changes(base, config)})"
            raise ValueError(f"--resume: {other}: change --out")
        model = Decoder(config)
        model.load_state_dict(read_tensors(checkpoint / "model.pt"))
    elif args.recipe and not args.init_from:
        raise ValueError(f"--recipe {args.recipe} goes on from a trained model: name it with --init-from")
    elif args.init_from:
        origin, its_tokenizer, info = load(args.init_from)
        if its_tokenizer.content != tokenizer.content:
            raise ValueError(
                f"--init-from {info.path}: another tokenizer: prepare the data with --tokenizer {info.path}"
            )
        if its_tokenizer.brings:
            print(f"warning: {info.path} brings {its_tokenizer.brings}: the run trains and answers without")
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
    """-> training and held-out samples. Each process of a machine hashes a part of their files."""
    max_bytes = math.inf if args.verify else HASHED_BYTES
    seed = saved["step"] if saved else 0  # so that a run hashes other files at each start
    train, val = (TokenData(args.data, split, block_size, args.pack) for split in ("train", "val"))
    if train.pairs != (args.recipe == "dpo"):
        has = "pairs of answers" if train.pairs else "no pairs of answers"
        fix = "--recipe dpo trains on them" if train.pairs else "--recipe sft trains on chats"
        raise ValueError(f"{args.data} has {has}: {fix}")
    for split in (train, val):
        split.check_hashes(max_bytes, seed, ranks.local_rank, ranks.local_world)
    return train, val


def move_to_device(model, args, device, compiled, ranks):
    """Move the model to its device, compiled and sharded (FSDP2) as the flags say."""
    keep_large_buffers()
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA for what is not bf16
    for block in model.blocks:
        block.recompute = args.recompute
        if args.bf16 and device == "cpu":  # the backward of its bf16 attention takes five times as long
            block.attention.dtype = torch.float32
        if compiled:  # all blocks share one code; not dynamic, or an evaluation's batch size would change training's
            block.compile(dynamic=False)
    if compiled and device == "cuda":  # on a CPU a compiled loss does not pay, and flex_attention has no backward
        model.softmax_gradient, model.uses_flex = torch.compile(softmax_gradient, dynamic=False), True
    if device == "cuda" and torch.cuda.get_device_capability()[0] == 9:  # Hopper
        with contextlib.suppress(ImportError, RuntimeError):  # where it is installed, with both kernels
            torch.nn.attention.activate_flash_attention_impl("FA3")
    if args.shard:
        apply_fsdp(model, device, ranks.world)
    model.to(device)


def run_constants(args, model, data, saved):
    """The parts of state.json that do not change during a run."""
    return {
        "reference": saved.get("reference") if saved else weights_hash(model) if args.recipe == "dpo" else None,
        "chat": data.mostly_chat(),
        "config": asdict(model.config),
        "args": vars(args)
        | {"resume": False, "verify": False, "data": str(Path(args.data).resolve())}
        | ({"steps": None} if args.epochs else {}),  # they follow from the data, which may grow
        "shards": data.shard_hashes(),
    }


def add_references(args, model, splits, constants, saved, ranks):
    """For --recipe dpo: add to each split what the reference, the model of --init-from, says of its answers."""

    def reference():
        weights, eos_id, device = constants["reference"], model.config.reset_id, model.embedding.device
        return load_reference(args.init_from, weights, eos_id, device) if saved else model

    if args.recipe == "dpo":
        add_reference(splits, constants["reference"], reference, args.micro_batch, ranks)


def check_resume(args, data, machine, checkpoint, saved, ranks):
    """Refuse data that has lost shards of the run; say what else is new; rename damaged newer checkpoints."""
    shards = data.shard_hashes()
    for before, now in itertools.zip_longest(saved["shards"], shards[: len(saved["shards"])]):
        if before != now:
            lost = f"shard {before[0]}, which {args.data} has lost or changed"
            raise ValueError(f"--resume: {checkpoint} was trained on {lost}: bring it back")
    others = [f"{key} {was} -> {machine[key]}" for key, was in saved["machine"].items() if machine[key] != was]
    if others:
        ranks.say(f"note: {', '.join(others)}: the run continues, but not to the same bits")
    ranks.say(f"continues from {checkpoint}")
    if ranks.rank == 0:
        set_aside_newer(checkpoint)
    if new := len(data) - sum(saved["phases"][-1]["samples"].values()):
        left = f", mixed with the {sum(unserved(saved['phases']).values()):,} that this round has not served yet"
        ranks.say(f"{new:,} new samples{left if round_goes_on(args, saved) else ''}")


def dry_run(args):
    base = load(args.init_from)[0].config if args.init_from else PRESETS[args.preset or "demo"]
    print_plan(replace(base, **given_fields(args)), args)


# ----------------------------------------------------------------------------------------------------------------------
# A step


class Likelihood:
    """The objective but for --recipe dpo: nats of the targets. Sums over a micro-batch, as those of dpo.Preference."""

    NAMES = ()

    def __call__(self, model, ids, targets):
        """[B, T] each -> [2]: the nats, and how many targets count."""
        nats = model(ids, targets, reduction="sum")
        return torch.stack([nats, (targets >= 0).sum().to(nats.dtype)])


def gradients(model, objective, micro_batches, args, ranks, device):
    """Set every gradient to that of the step's sum of the objective -> its sums over all ranks, [2 + its NAMES]."""
    params = list(model.parameters())

    def forward(i):
        arrays = (a.to(device, non_blocking=True) for a in micro_batches[i])
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            return objective(model, *arrays)

    def micro_sums(i):
        sums = forward(i)
        return [sums.detach(), *torch.autograd.grad(sums[0], params)]

    if args.exact:
        totals, *sums = exact_sums(micro_sums, len(micro_batches), ranks)
        for p, gradient in zip(params, sums):
            p.grad = gradient.contiguous()  # fused AdamW on a CPU reads it in the order of memory
        return totals
    totals = 0
    for i in range(len(micro_batches)):
        sums = forward(i)
        is_last = i == len(micro_batches) - 1
        with summing_gradients(params if is_last and not args.shard else []):  # FSDP sums by itself
            sums[0].backward()
        totals = totals + sums.detach()
    sum_over_ranks([totals])
    return totals


@contextlib.contextmanager
def out_of_memory_advice(args, n_micro):
    """Where memory runs out, name the flags that need less and give the same results, up to rounding."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        B = args.micro_batch
        smaller = next((size for size in range(B // 2, 0, -1) if n_micro * B % size == 0), None)
        flags = f"--micro-batch {smaller} --batch-tokens {args.batch_tokens}"
        advice = f"the results are the same, up to rounding, with {flags}" if smaller else "try --recompute"
        raise ValueError(f"out of memory with --micro-batch {B}: {advice}") from None


# ----------------------------------------------------------------------------------------------------------------------
# The run


def main(argv=None):
    args = get_args(argv)
    if args.dry_run:
        return dry_run(args)
    device = choose_device(args.device)
    ranks = start_ranks(device)

    # Set-up: the folder of the run, its data, its model, its state
    args, log, checkpoint, saved = open_run(args, argv, ranks)
    check_world(args, device, ranks)
    ensure_data(args, ranks)
    check_ranks_agree(args, checkpoint, ranks)
    tokenizer = load_tokenizer(args.data)
    model = make_model(args, tokenizer, checkpoint, saved)
    objective = Preference(args.beta, args.label_smoothing, args.sft_weight) if args.recipe == "dpo" else Likelihood()
    data, val = open_data(args, model.config.block_size, saved, ranks)
    n_micro = set_sizes(args, model, data, device, ranks)
    compiled = can_compile(device) if args.compile is None else args.compile
    machine = describe_machine(args, device, compiled, ranks)
    if checkpoint:
        check_resume(args, data, machine, checkpoint, saved, ranks)
    constants = run_constants(args, model, data, saved)
    move_to_device(model, args, device, compiled, ranks)
    add_references(args, model, (data, val), constants, saved, ranks)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay, args.bf16)
    state = make_state(args, data, device, saved)
    if checkpoint:
        load_optimizers(optimizers, read_tensors(checkpoint / "optimizer.pt"))
    if ranks.rank == 0 and not log:  # only now: a run that is refused leaves no folder
        log = Log(Path(args.out))
    least = -1 if args.recipe else 0  # of a model that is tuned, what it was before is worth a line
    state.evaluated = max(least, ranks.from_rank_0(log.cut(state.step) if log else 0))
    saver = Saver(args, tokenizer, log, ranks, constants={**constants, "machine": machine})
    saver.last = state.step if checkpoint else None
    stop = Stop(args.out, compiled, ranks)
    describe_run(args, model, data, n_micro, machine, state, ranks)
    reporter = Reporter(args, model, objective, data, tokenizer, log, ranks, state)

    first_step, clock = state.step + 1, time.perf_counter()
    for micro_batches in batches(data, state.phases, args.seed, ranks, n_micro, args.micro_batch, device):
        if stop.asked_of_any or state.progress(args) >= 1:
            break
        if state.due(args.eval_every) and state.step > state.evaluated:
            if not reporter.score(state, val, args.eval_tokens, stop):
                break
            clock = time.perf_counter()

        with out_of_memory_advice(args, n_micro):
            sums = gradients(model, objective, micro_batches, args, ranks, device)
        loss, count = sums[0] / sums[1], sums[1]
        norm = scale_and_clip(model.parameters(), count, args.clip)
        lr = args.lr * lr_factor(state.step, state.progress(args), args)
        update(optimizers, lr, skip=state.judge(loss, norm, count))
        state.advance(n_micro * args.micro_batch * ranks.world)

        log_now = state.due(args.log_every) or state.step == 1
        if log_now or state.due(args.save_every) or state.due(args.eval_every):
            state.check(saver)  # waits for the device
        state.seconds += stop.agree(time.perf_counter() - clock)
        if state.step == first_step:
            stop.compiling = False
            gc.collect()
            gc.freeze()  # what is there now stays: the garbage collector need not look at it again
        if log_now:
            reporter.line(state, sums.tolist(), norm.item(), lr)
        if state.due(args.save_every) and not state.in_a_row:
            saver.save(model, optimizers, state)
        clock = time.perf_counter()

    state.check(saver)
    if saver.last != state.step or not saver.wait():
        saver.save(model, optimizers, state)
    whole = saver.wait()
    result = reporter.score(state, val, MAX_TOKENS, stop) if state.progress(args) >= 1 else None
    reporter.end(state, result, whole)
    gc.unfreeze()  # for a program that called main()
    if log:
        log.close()
    ranks.barrier()  # no rank leaves while another is still at work
    return 0 if whole else 1


if __name__ == "__main__":
    run_rank(main)
