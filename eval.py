"""Score a checkpoint on text it has not seen, and test whether it reads what it predicts.

    python eval.py                                    # the newest checkpoint, on the held-out split of its data
    python eval.py out/demo/step-00000500 out/other   # several checkpoints, a line each
    python eval.py --text my.txt                      # on a file of your own
    python eval.py --leak                             # the same tokens scored in three ways, which must agree
    python eval.py --noise                            # train on noise, which only a leaking layer can predict
    python eval.py --routing --prompt 却说曹操         # which experts a text goes to, and how far back they look
    python eval.py --task cmmlu --questions cmmlu     # a benchmark from its published folder: see extras/benchmarks.py

loss         nats per token
perplexity   exp(loss)
bpb          bits per byte of text: comparable between models with different tokenizers
likelier     of pairs of answers: the share whose chosen answer is likelier than the rejected one
accuracy     the same, with both measured against the reference; this and the rest as in dpo.py

Shapes: B batch, T time. A sample is a row of T + 1 ids.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from checkpoint import isolate, load
from common import choose_device, read_text, run_command, track
from data import TokenData, evenly_spaced, inputs_and_targets
from dpo import Preference, add_reference, load_reference, score_pairs
from model import cross_entropy
from parallel import Ranks
from tokenizer import load_tokenizer

MAX_TOKENS = 1 << 20  # enough for three reliable decimals of bits per byte
BATCH_PAIRS = 16  # samples in a forward
MAX_CONTEXT = 2048  # for Hugging Face models, whose contexts are far longer than most texts
PROMPT = "却说曹操引兵渡河，正遇关公。"

TASKS = ("ceval", "cmmlu", "mmlu", "gsm8k")  # extras/benchmarks.py
TASK_FLAGS = ("questions", "split", "shots", "score", "out")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    checkpoints_help = "steps, runs or Hugging Face folders (default: the newest run under out)"
    split_help = "split of the --task (default: val for ceval, whose test split has no answers, else test)"
    scores = ("letter", "continuation", "chat", "steel", "generate")
    parser.add_argument("checkpoints", nargs="*", default=["out"], metavar="CHECKPOINT", help=checkpoints_help)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--data", help="a prepared folder, instead of the one the checkpoint was trained on")
    text.add_argument("--text", help="a UTF-8 file to score instead")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--leak", action="store_true", help="compare the teacher-forced, honest and cached losses")
    mode.add_argument(
        "--noise", action="store_true", help="no checkpoint: what each dispatch learns from random tokens"
    )
    mode.add_argument("--routing", action="store_true", help="show what the Soft MoE does with --prompt")
    mode.add_argument("--task", choices=TASKS, help="score a benchmark")
    parser.add_argument("--questions", help="folder of the --task, as published")
    parser.add_argument("--split", help=split_help)
    parser.add_argument(
        "--shots", type=int, help="examples before each question of the --task (default: 5; in chats 0)"
    )
    parser.add_argument("--score", choices=scores, help="how a --task is answered: see extras/benchmarks.py")
    parser.add_argument("--out", help="with --task: write every answer into this .jsonl")
    parser.add_argument("--prompt", help="text for --routing")
    parser.add_argument("--png", help="with --routing or --task: draw it into this file too (needs matplotlib)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = parser.parse_args(argv)
    if (args.routing or args.task) and (args.data or args.text):
        parser.error("--routing shows --prompt, --task asks its --questions: leave --data and --text out")
    if args.noise and (args.data or args.text or args.checkpoints != ["out"] or args.device != "auto"):
        parser.error("--noise draws its own tokens and trains its own models on the CPU: leave everything else out")
    goes_with = {"prompt": ("routing",), "png": ("routing", "task"), **dict.fromkeys(TASK_FLAGS, ("task",))}
    for name, modes in goes_with.items():
        if getattr(args, name) is not None and not any(getattr(args, mode) for mode in modes):
            parser.error(f"--{name} goes with " + " or ".join(f"--{mode}" for mode in modes))
    for name, suffix in (("png", ".png"), ("out", ".jsonl")):
        path = getattr(args, name)
        if path and not (Path(path).suffix == suffix and Path(path).absolute().parent.is_dir()):
            parser.error(f"--{name} {path}: expected a name ending in {suffix} in a folder that exists")
    if args.task:
        check_task(parser, args)
    return args


def check_task(parser, args):
    """Fill in and check the flags that depend on the benchmark."""
    scores = {"mmlu": ("letter", "continuation", "chat"), "gsm8k": ("generate", "chat")}
    scores = scores.get(args.task, ("letter", "continuation", "chat", "steel"))
    args.score = args.score or scores[0]
    if args.questions is None:
        parser.error(f"--task {args.task} needs --questions: the folder with its files")
    if args.score not in scores:
        parser.error(f"--score {args.score}: expected {' or '.join(scores)} for {args.task}")
    if args.shots is None:
        args.shots = 0 if args.score in ("chat", "steel") else 5
    if args.shots < 0 or args.shots and args.score in ("chat", "steel"):
        parser.error(f"--shots {args.shots}: expected 0 or more, and none with --score chat or steel")


# ----------------------------------------------------------------------------------------------------------------------
# Loss


@torch.no_grad()
def evaluate(
    model, samples, token_bytes, device="cpu", batch_tokens=4096, max_tokens=MAX_TOKENS, rank=0, world=1, stopping=None
):
    """Score samples of T + 1 ids (-1 after the end of a text) -> {"loss", "perplexity", "bpb", "tokens", "by"}.

    by: the same of each source of a TokenData, and of each language, by name; empty where there is only one source.
    If there are more than max_tokens, evenly spaced samples are scored. bpb divides by the bytes of the counted
    targets; special tokens have no bytes, but their nats count. With world > 1 each rank scores its part, and all get
    the same result. stopping(), if given, is asked before each forward: None if it is true.
    """
    T = len(samples[0]) - 1
    chosen = evenly_spaced(samples, max_tokens)
    batch = max(1, min(batch_tokens // T, -(-len(chosen) // world)))
    # Pad with -1: all forwards have one shape (compiled once), and all ranks make equally many (which FSDP needs)
    chosen = np.pad(chosen, (0, -len(chosen) % (world * batch)), constant_values=-1)[rank::world]
    n_bytes = np.array([len(b) for b in token_bytes])
    names = list(samples.sources) if isinstance(samples, TokenData) else ["text"]
    sums = np.zeros((len(names), 3))  # of each source: nats, tokens, bytes
    training = model.training
    model.eval()
    for start in track(range(0, len(chosen), batch), "evaluating", "batches", shown=rank == 0):
        if stopping and stopping():
            model.train(training)
            return None
        numbers = chosen[start : start + batch]
        pairs = [inputs_and_targets(samples, max(i, 0)) for i in numbers]
        ids, targets = (np.stack(rows) for rows in zip(*pairs))
        targets[numbers < 0] = -1
        counted = targets >= 0
        tokens, text_bytes = counted.sum(1), (n_bytes[targets] * counted).sum(1)
        ids, targets = (torch.from_numpy(a).to(device) for a in (ids, targets))
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            nats = model(ids, targets, reduction="none").sum(1)
        sources = [names.index(samples.source_of(max(i, 0))) if len(names) > 1 else 0 for i in numbers]
        np.add.at(sums, sources, np.stack([nats.cpu().numpy(), tokens, text_bytes], axis=1))
    model.train(training)
    if world > 1:
        torch.distributed.all_reduce(torch.from_numpy(sums))  # in place
    parts = dict(zip(names, sums))
    for language in dict.fromkeys(name.rpartition(" ")[2] for name in names):
        of_language = [part for name, part in parts.items() if name.endswith(" " + language)]
        if 1 < len(of_language) < len(names):
            parts[language] = sum(of_language)
    by = {name: scores(*part.tolist()) for name, part in parts.items() if part[1]}
    return {**scores(*sums.sum(0).tolist()), "by": by if len(by) > 1 else {}}


def scores(nats, tokens, text_bytes):
    """What is reported of so many nats of so many tokens and bytes."""
    loss = nats / tokens if tokens else math.nan
    bpb = nats / math.log(2) / max(text_bytes, 1)
    return {"loss": loss, "perplexity": math.exp(loss), "bpb": bpb, "tokens": int(tokens)}


def text_samples(path, tokenizer, T):
    """A file as samples of T + 1 ids that begin with eos and overlap by one; the last is padded with -1."""
    ids = [tokenizer.eos_id, *tokenizer.encode(read_text(path))]
    if len(ids) == 1:
        raise ValueError(f"{path} is empty: nothing to score")
    n = math.ceil((len(ids) - 1) / T)
    padded = np.full(n * T + 1, -1, dtype=np.int64)
    padded[: len(ids)] = ids
    return [padded[i * T : i * T + T + 1] for i in range(n)]


# ----------------------------------------------------------------------------------------------------------------------
# The leak


@torch.no_grad()
def leak(model, ids):
    """Mean nats of the same targets, ids [B, T + 1] (-1: not counted), scored in three ways.

    teacher-forced   one forward over the text, as in training
    honest           each target from a forward over only the tokens before it
    cached           token by token with the cache, as in sampling; None if the model has no cache
    """
    B, T = ids.shape[0], ids.shape[1] - 1
    count = (ids[:, 1:] >= 0).sum().item()
    teacher_forced = model(ids[:, :-1], ids[:, 1:], reduction="sum").item()
    honest = 0.0
    for t in range(1, T + 1):
        hidden = model.hidden_states(ids[:, :t])[:, -1]
        honest += cross_entropy(hidden, model.head_weight, ids[:, t], reduction="sum").item()
    result = {"teacher-forced": teacher_forced / count, "honest": honest / count, "cached": None}
    if model.has_cache:
        cache, cached = model.new_cache(B, T), 0.0
        for t in range(T):
            cached += model(ids[:, t : t + 1], ids[:, t + 1 : t + 2], cache=cache, reduction="sum").item()
        result["cached"] = cached / count
    return result


def some_of(samples, device):
    """About 4,096 tokens of the samples, [B, T + 1]: few, as leak() makes a forward for every position."""
    return torch.from_numpy(np.stack([samples[i] for i in evenly_spaced(samples, 4096)])).to(device)


def print_leak(model, path, samples, token_bytes, device):
    ids = some_of(samples, device)
    counted = ids[:, 1:][ids[:, 1:] >= 0].tolist()
    bits_per_nat = len(counted) / math.log(2) / max(1, sum(len(token_bytes[i]) for i in counted))
    result = leak(model, ids)
    print(f"{path}, {len(counted):,} tokens\n{'scored':<16}{'nats/token':>12}{'bits/byte':>12}")
    for way, nats in result.items():
        numbers = "   it has no cache" if nats is None else f"{nats:>12.5f}{nats * bits_per_nat:>12.5f}"
        print(f"{way:<16}{numbers}")
    gap = max(abs(nats - result["honest"]) for nats in result.values() if nats is not None)
    print(f"they agree to {gap:.1e} nats" if gap < 1e-4 else f"they differ by {gap:.4f} nats")
    if model.config.reads_ahead:
        print("dispatch = sequence reads what it is to predict: only the honest loss is one")


# ----------------------------------------------------------------------------------------------------------------------
# Pairs of answers


def print_pairs(model, info, samples, eos_id, header):
    """A line of scores, those against a reference only if the model was trained from one -> its header, which is
    printed where it differs from the one before."""
    run, objective = info.state.get("args", {}), None
    if run.get("recipe") == "dpo":

        def reference():
            return load_reference(run["init_from"], info.state["reference"], eos_id, model.embedding.device)

        objective = Preference(run["beta"], run["label_smoothing"], run["sft_weight"])
        add_reference([samples], info.state["reference"], reference, BATCH_PAIRS, Ranks())
    scores = score_pairs(model, samples, objective, BATCH_PAIRS, MAX_TOKENS, Ranks())
    header, before = f"{'checkpoint':<40}" + "".join(f"{name:>10}" for name in scores), header
    if header != before:
        print(header)
    pairs = scores.pop("pairs")
    print(f"{str(info.path):<40}" + "".join(f"{score:>10.4f}" for score in scores.values()) + f"{pairs:>10,}")
    return header


# ----------------------------------------------------------------------------------------------------------------------


def samples_of(args, tokenizer, info, T):
    """What to score: --text, --data, or the held-out split of the data the checkpoint was trained on."""
    if args.text:
        return text_samples(args.text, tokenizer, T)
    pack = info.state.get("args", {}).get("pack", False)
    samples = TokenData(args.data or data_of(info), "val", T, pack)
    if args.data and not pack and samples.mostly_chat():  # so that a base and what was tuned from it are compared
        samples = TokenData(args.data, "val", T, pack=True)
    if load_tokenizer(samples.path).content != tokenizer.content:
        problem = f"{samples.path} was prepared with another tokenizer than {info.path}"
        raise ValueError(f"{problem}: score its text with --text")
    return samples


def data_of(info):
    """The prepared folder a checkpoint was trained on, from its state.json."""
    if not info.state:
        problem = f"{info.path} has no state.json, which names the data it was trained on"
        raise ValueError(f"{problem}: give --data, --text or --task")
    return info.state["args"]["data"]


def main(argv=None):
    args = get_args(argv)
    device = choose_device(args.device)
    if args.noise:
        from extras.noise import print_noise

        return print_noise()
    if args.task:
        from extras.benchmarks import run

        return run(args, device)
    header = ""
    for i, given in enumerate(args.checkpoints):
        model, tokenizer, info = load(given)
        model.to(device)
        if args.routing:
            from extras.routing import print_routing

            print_routing(model, tokenizer, info.path, args.prompt or PROMPT, args.png)
            continue
        T = model.config.block_size
        samples = samples_of(args, tokenizer, info, T if info.state else min(T, MAX_CONTEXT))
        if getattr(samples, "rows", None):  # packed
            isolate(model, tokenizer.eos_id)
        if getattr(samples, "pairs", False) and not args.leak:
            header = print_pairs(model.eval(), info, samples, tokenizer.eos_id, header)
            continue
        if args.leak:
            print_leak(model, info.path, samples, tokenizer.token_bytes, device)
            continue
        result = evaluate(model, samples, tokenizer.token_bytes, device)
        if not result["tokens"]:
            raise ValueError(f"{info.path}: none of the held-out samples has an answer to score: give --data or --text")
        if i == 0:
            print(f"{'checkpoint':<32}{'loss':>9}{'perplexity':>12}{'bpb':>9}{'tokens':>11}")
        leaky = ""
        if model.config.reads_ahead:
            honest = leak(model, some_of(samples, device))["honest"]
            leaky = f"  leaky: it reads what it predicts; honest {honest:.4f}"
        for name, part in {str(info.path): result, **result["by"]}.items():
            numbers = f"{part['loss']:>9.4f}{part['perplexity']:>12.2f}{part['bpb']:>9.4f}{part['tokens']:>11,}"
            print(f"{name if part is result else '    ' + name:<32}{numbers}{leaky if part is result else ''}")


if __name__ == "__main__":
    run_command(main)
