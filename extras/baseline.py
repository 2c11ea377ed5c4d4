"""Train a nanoGPT-style model on our data, to compare train.py with.

    python -m extras.baseline --data data/default --out out/baseline --minutes 10
    python -m extras.speed curve out/demo out/baseline --png curve.png

Model and recipe are those of nanoGPT (https://github.com/karpathy/nanoGPT, README, "I only have a macbook"): learned
positions, LayerNorm, GELU, no biases, a tied head; 4 layers, 4 heads, width 128, block 64, batch 12; AdamW, cosine
schedule, eager, on the CPU. Three things differ: the schedule follows the clock instead of a number of steps, the
tokens are our shards', and the loss is eval.py's, on the held-out tokens that train.py scores the demo model on.

Shapes: B batch, T time, D width, H heads, K head dim, V vocabulary.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import Log
from common import run_command
from data import TokenData, batch_at, evenly_spaced
from eval import MAX_TOKENS, evaluate
from order import next_phase
from plan import PRESETS
from tokenizer import load_tokenizer

N_LAYER, N_HEAD, D_MODEL, BLOCK, BATCH = 4, 4, 128, 64, 12
LR, MIN_LR, WARMUP, WEIGHT_DECAY, CLIP = 1e-3, 1e-4, 100, 0.1, 1.0
LOG_EVERY, EVAL_TOKENS = 10, 32_768


def get_args(argv=None):
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.baseline", description=__doc__.split("\n\n")[0], formatter_class=defaults
    )
    parser.add_argument("--data", default="data/default", help="folder made by prepare.py")
    parser.add_argument("--out", type=Path, default=Path("out/baseline"), help="folder for metrics.jsonl")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training; evaluations do not count")
    parser.add_argument("--eval-every", type=int, default=500, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.minutes > 0 or args.eval_every < 1:
        parser.error("--minutes and --eval-every: expected positive numbers")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm = nn.LayerNorm(D_MODEL, bias=False)
        self.qkv = nn.Linear(D_MODEL, 3 * D_MODEL, bias=False)
        self.out = nn.Linear(D_MODEL, D_MODEL, bias=False)
        self.mlp_norm = nn.LayerNorm(D_MODEL, bias=False)
        self.mlp_in = nn.Linear(D_MODEL, 4 * D_MODEL, bias=False)
        self.mlp_out = nn.Linear(4 * D_MODEL, D_MODEL, bias=False)

    def forward(self, x):
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, N_HEAD, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, K]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class Baseline(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, D_MODEL)
        self.positions = nn.Embedding(BLOCK, D_MODEL)
        self.blocks = nn.Sequential(*(Block() for _ in range(N_LAYER)))
        self.norm = nn.LayerNorm(D_MODEL, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:  # the last matrices of the residual branches start smaller, as in GPT-2
                last = name.endswith("out.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * N_LAYER) if last else 0.02)

    def forward(self, ids, targets, reduction="mean"):
        """ids, targets [B, T] (-1: not counted) -> nats: mean, "sum", or "none": [B, T]."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)  # [B, T, V]
        nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")
        return nats if reduction == "none" else nats.sum() / (1 if reduction == "sum" else (targets >= 0).sum())


# ----------------------------------------------------------------------------------------------------------------------
# Training


def held_out(data, max_tokens):
    """Samples of BLOCK + 1 ids that cover the same tokens as the demo model's evaluation on max_tokens."""
    val = TokenData(data, "val", PRESETS["demo"].block_size)
    rows = [val[i] for i in evenly_spaced(val, max_tokens)]
    return [row[at : at + BLOCK + 1] for row in rows for at in range(0, len(row) - 1, BLOCK)]


def make_optimizer(model):
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY}
    norms = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, norms], lr=LR, betas=(0.9, 0.99), fused=True)


def learning_rate(step, progress):
    """Warm-up over the first steps, then a cosine; progress is the share of the minutes that has passed."""
    warm = min(1.0, (step + 1) / WARMUP)
    return warm * (MIN_LR + 0.5 * (LR - MIN_LR) * (1 + math.cos(math.pi * min(1.0, progress))))


def main(argv=None):
    args = get_args(argv)
    if (args.out / "metrics.jsonl").exists():
        raise ValueError(f"{args.out} has a metrics.jsonl: choose another --out")
    tokenizer = load_tokenizer(args.data)
    data = TokenData(args.data, "train", BLOCK)
    phases = next_phase([], data.samples())
    log = Log(args.out)
    torch.manual_seed(args.seed)
    model = Baseline(tokenizer.embedding_rows)
    optimizer = make_optimizer(model)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params:,} parameters; a step: {BATCH} x {BLOCK} tokens", flush=True)
    step, seconds = 0, 0.0

    def score(max_tokens):
        result = evaluate(model, held_out(args.data, max_tokens), tokenizer.token_bytes)
        loss, bpb = result["loss"], result["bpb"]
        print(f"step {step:>5} | val loss {loss:.4f} | val bpb {bpb:.4f} | {result['tokens']:,} tokens", flush=True)
        log.add(step=step, seconds=seconds, val_loss=loss, val_bpb=bpb)
        return result

    while (progress := seconds / (60 * args.minutes)) < 1:
        start = time.perf_counter()
        ids, targets = batch_at(data, phases, args.seed, step * BATCH, BATCH)
        loss = model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        took = time.perf_counter() - start
        seconds += took
        if step % LOG_EVERY == 0 or step == 1:
            log.add(step=step, loss=loss.item(), ms=1000 * took, seconds=seconds, tokens=step * BATCH * BLOCK)
        if step % args.eval_every == 0:
            score(EVAL_TOKENS)
    result = score(MAX_TOKENS)
    tokens = step * BATCH * BLOCK
    summary = f"val loss {result['loss']:.4f}, val bpb {result['bpb']:.4f}, tokens {tokens}, {seconds:.0f} s"
    log.file.close()
    print(f"done: step {step}, {summary}")


if __name__ == "__main__":
    run_command(main)
