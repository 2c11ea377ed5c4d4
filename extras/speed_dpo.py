"""A step of preference tuning beside the plain form, and beside two steps of fine-tuning on as many tokens."""

import functools

import torch
import torch.nn.functional as F

from dpo import Preference
from extras.timing import median_seconds, peak_memory
from model import Config, Decoder

VOCABULARY, PAIRS, T, ANSWER = 151_936, 8, 512, 200  # Qwen's; two sides of T / 2 tokens, with an answer each


def plain(model, ids, targets, reference):
    """The loss as it is written down: logits of all positions, their log-softmax, and the same reference."""
    log_p = model(ids).log_softmax(-1)
    picked = log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    gained = torch.stack([picked[:, : T // 2].sum(1), picked[:, T // 2 :].sum(1)], dim=1) - reference
    return -F.logsigmoid(0.1 * (gained[:, 0] - gained[:, 1])).sum()


def benchmark_dpo(repeats):
    model = Decoder(Config(vocab_size=VOCABULARY, block_size=T, d_model=128))
    ids, reference = torch.randint(VOCABULARY, (PAIRS, T)), torch.full((PAIRS, 2), -ANSWER * 12.0)
    targets = torch.full_like(ids, -1)
    for end in (T // 2 - 1, T - 1):
        targets[:, end - ANSWER : end] = torch.randint(VOCABULARY, (PAIRS, ANSWER))

    def step(*losses):
        for loss in losses:
            loss().backward()
        for p in model.parameters():
            p.grad = None

    halves = [(ids[half], targets[half]) for half in (slice(PAIRS // 2), slice(PAIRS // 2, None))]
    tuning = [functools.partial(model, *half, reduction="sum") for half in halves]
    steps = {
        "dpo.py": functools.partial(step, lambda: Preference()(model, ids, targets, reference)[0]),
        "plain": functools.partial(step, lambda: plain(model, ids, targets, reference)),
        "two steps of fine-tuning": functools.partial(step, *tuning),
    }
    print(
        f"{PAIRS} pairs in samples of {T} tokens, two answers of {ANSWER} each, vocabulary {VOCABULARY:,}; CPU, eager"
    )
    for (name, one), seconds in zip(steps.items(), median_seconds(list(steps.values()), repeats, warm_up=1)):
        print(f"    {name:<26}{seconds:>8.2f} s{peak_memory(one) / 1e6:>10,.0f} MB at the peak")
