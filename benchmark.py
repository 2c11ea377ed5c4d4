"""What the causal Soft MoE costs, next to a dense layer of equal parameters. Ratios of one run on an otherwise idle machine.

    python benchmark.py                   # width 512, 6 experts, 1,024 tokens, compiled
    python benchmark.py --no-compile
"""

import argparse
import itertools
import statistics
import time

import torch

from model import Config, Decoder, Dense, SoftMoE, place_tokens
from train import can_compile, keep_large_buffers

TOKENS = 4096  # in one forward pass, at any length of text


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-expert", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=can_compile("cpu"))
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: expected 1 or more")
    args.config = Config(d_model=args.d_model, n_expert=args.n_expert, n_layer=1, vocab_size=256)
    return args


def make_layer(kind, args):
    layer = Dense(args.config) if kind == "dense" else SoftMoE(args.config)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=args.d_model**-0.5)
    if args.compile:
        layer.compile(dynamic=False)  # code of its own for every length
    return layer


def step_of(layer, T, args):
    """A function that runs forward and backward once, on TOKENS tokens in texts of T."""
    x = torch.randn(TOKENS // T, T, args.d_model, requires_grad=True)
    place = place_tokens(torch.zeros(1, T), args.config, None, torch.float32)

    def step():
        layer(x, place).sum().backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def seconds(steps, repeats):
    """Medians of several functions' times, taken in turns, so that a slow spell of the machine hits all of them."""
    for step in steps * 3:
        step()
    times = [[] for _ in steps]
    for _ in range(repeats):
        for step, own in zip(steps, times):
            start = time.perf_counter()
            step()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def peak_memory(step):
    """Most bytes that tensors hold at one time of a step, beyond what was there before: exact, and the same in every run."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def main(argv=None):
    args = get_args(argv)
    keep_large_buffers()
    torch.manual_seed(0)
    layers = {kind: make_layer(kind, args) for kind in ("dense", "causal")}
    count = {kind: sum(p.numel() for p in layer.parameters()) for kind, layer in layers.items()}
    print(f"{torch.get_num_threads()} threads, width {args.d_model}, {args.n_expert} experts, window {args.config.window}, "
          f"{TOKENS:,} tokens, {'compiled' if args.compile else 'eager'}; "
          f"parameters: dense {count['dense']:,}, causal {count['causal']:,}")  # fmt: skip

    dense, causal = seconds([step_of(layers[kind], 1024, args) for kind in ("dense", "causal")], args.repeats)
    print(f"forward + backward at T = 1024: dense {1000 * dense:.1f} ms, causal {1000 * causal:.1f} ms: {causal / dense:.3f}x")

    peak = {kind: peak_memory(step_of(layers[kind], 1024, args)) for kind in ("dense", "causal")}
    print(f"peak memory of a step: dense {peak['dense'] / 1e6:.0f} MB, causal {peak['causal'] / 1e6:.0f} MB: "
          f"{peak['causal'] / peak['dense']:.3f}x")  # fmt: skip

    lengths, steps = (512, 1024, 2048, 4096), []
    for T in lengths:
        steps.append(step_of(make_layer("causal", args), T, args))
    times = seconds(steps, args.repeats)
    cells = ", ".join(f"{T}: {1e6 * t / TOKENS:.2f}" for T, t in zip(lengths, times))
    print(f"microseconds a token at T = {cells}: within {100 * (max(times) / min(times) - 1):.0f} %")

    # Decoding: one new token behind texts of several lengths, the Soft MoE layer alone
    model = Decoder(args.config)
    steps, caches = [], []
    for length in (64, 256, 1024, 4096):
        cache = model.new_cache(1, length + 1)
        model(torch.randint(256, (1, length)), cache=cache)
        x, place = torch.randn(1, 1, args.d_model), place_tokens(torch.zeros(1, 1), args.config, cache, torch.float32)
        steps.append(torch.no_grad()(lambda x=x, place=place, cache=cache: model.blocks[0].ffn(x, place, cache, 0)))
        caches.append(cache)
    times = seconds(steps, 20 * args.repeats)
    print("decoding, microseconds a token behind 64, 256, 1024, 4096 tokens: " + ", ".join(f"{1e6 * t:.0f}" for t in times)
          + f"; state: {', '.join(str(cache.recent.numel()) for cache in caches)} numbers")  # fmt: skip


if __name__ == "__main__":
    main()
