"""Text from a checkpoint.

    python sample.py                                          # newest checkpoint, from the beginning of a document
    python sample.py out/demo --prompt 却说曹操 --num-samples 3
    python sample.py --file prompt.txt --temperature 0        # greedy

Text streams as it is made, whole characters at a time.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import torch

from model import Decoder, choose_device
from tokenizer import load_tokenizer


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default="out", metavar="CHECKPOINT", help="a step, a run or a Hugging Face folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue")
    prompt.add_argument("--file", help="a UTF-8 file with the text to continue")
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.95, help="only the smallest set with this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = parser.parse_args(argv)
    for name, ok, expected in (
        ("num_samples", args.num_samples >= 1, "1 or more"),
        ("max_new_tokens", args.max_new_tokens >= 1, "1 or more"),
        ("temperature", args.temperature >= 0, "0 or more"),
        ("top_k", args.top_k >= 0, "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "more than 0, at most 1"),
    ):
        if not ok:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")
    return args


# ---------------------------------------------------------------------------------------------------------------
# Logits -> logits, [B, V]


def keep_top_k(logits, k):
    """The k largest; all where k is 0."""
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def keep_top_p(logits, p):
    """The smallest set whose probability is at least p, one token or more (arXiv 1904.09751, section 3.1)."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), -torch.inf)


def pick(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """[B, V] -> [B] ids: the likeliest at temperature 0, else drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = keep_top_p(keep_top_k(logits.float() / temperature, top_k), top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, ids, max_new_tokens, vocab_size, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Yield [B] ids, max_new_tokens times at most, ending early where the context of the model ends.

    ids [B, T], padded on the left with -1 where prompts are of unequal length. Ids from vocab_size on (padding of the
    embedding) are never picked. A model with dispatch = "sequence" has no cache and reads the whole text every time.
    """
    if not model.has_cache and (ids < 0).any():
        raise ValueError('dispatch = "sequence" reads padding too: give it prompts of one length')
    max_new_tokens = min(max_new_tokens, model.config.block_size - ids.shape[1] + 1)
    cache = model.new_cache(len(ids), ids.shape[1] + max_new_tokens) if model.has_cache else None
    for n in range(max_new_tokens):
        logits = model(ids, cache=cache)[:, -1, :vocab_size]
        new = pick(logits, temperature, top_k, top_p, generator)
        yield new
        ids = new[:, None] if cache is not None else torch.cat([ids, new[:, None]], dim=1)


def until(ids, stop_ids):
    """The ids before the first of stop_ids."""
    for i in ids:
        if i in stop_ids:
            return
        yield i


def main(argv=None):
    args = get_args(argv)
    device = choose_device(args.device)
    model = Decoder.load(args.checkpoint).to(device).eval()
    tokenizer = load_tokenizer(model.checkpoint)
    text = args.prompt
    if args.file:
        try:
            text = Path(args.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"--file {args.file}: {error}")
    prompt = [tokenizer.eos_id, *tokenizer.encode(text)]
    if len(prompt) > model.config.block_size:
        context = model.config.block_size
        raise SystemExit(f"the prompt has {len(prompt)} tokens, the model's context is {context}: shorten it")
    generator = torch.Generator(device).manual_seed(args.seed)
    for _ in range(args.num_samples):
        print(f"--- {model.checkpoint}\n{text}", end="", flush=True)
        start, count = time.perf_counter(), 0

        def new_ids():
            nonlocal count
            for new in generate(
                model, torch.tensor([prompt], device=device), args.max_new_tokens, tokenizer.vocab_size,
                args.temperature, args.top_k, args.top_p, generator,
            ):  # fmt: skip
                count += 1
                yield new.item()

        for piece in tokenizer.stream(until(new_ids(), {tokenizer.eos_id, tokenizer.chat_end_id})):
            print(piece, end="", flush=True)
        print(flush=True)
        speed = count / (time.perf_counter() - start)
        full = "; the context is full" if len(prompt) + count > model.config.block_size else ""
        print(f"({count} tokens, {speed:.0f} tok/s{full})", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
