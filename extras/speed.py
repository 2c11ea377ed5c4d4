"""Measure speed and memory. Run it on an otherwise idle machine, and compare only the numbers of one run.

    python -m extras.speed                    # the causal Soft MoE beside a dense layer of equal parameters, compiled
    python -m extras.speed --no-compile
    python -m extras.speed speed              # training steps, decoding, the loss; beside transformers and plain torch
    python -m extras.speed scale --png FILE   # cost of a token against the number of parameters and the length of text
    python -m extras.speed run                # runs of train.py: start, --resume, loading, saving, two processes
    python -m extras.speed data               # the data stage: tokenising, cleaning, near copies, processes, memory
    python -m extras.speed dpo                # a step of preference tuning: time and memory beside the plain form
    python -m extras.speed gpu                # this GPU: training and decoding by model and part, beside transformers
    python -m extras.speed curve out/demo out/baseline --png FILE   # val bits per byte against minutes of training

Shapes: B batch, T time.
"""

import argparse
import collections
import functools
import multiprocessing
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from common import can_compile, choose_device, flops_per_token, keep_large_buffers, run_command
from extras.gpu import benchmark_gpu, transformers_model
from extras.plot import pyplot
from extras.speed_data import benchmark_data
from extras.speed_dpo import benchmark_dpo
from extras.speed_runs import benchmark_run, draw_curves
from extras.timing import autocast, median_seconds, peak_memory
from model import Config, Decoder, Dense, SoftMoE, place_tokens, softmax_gradient
from plan import PRESETS
from sample import compile_step, generate

COMMANDS = ("layer", "speed", "scale", "run", "data", "dpo", "curve", "gpu")


def get_args(argv=None):
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m extras.speed", description=__doc__.split("\n\n")[0], formatter_class=defaults
    )
    add = parser.add_argument
    add("what", nargs="?", choices=COMMANDS, default="layer")
    add("runs", nargs="*", metavar="RUN", help="runs to draw with curve")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of layer, speed and scale")
    add("--d-model", type=int, default=512, help="width of the layer")
    add("--n-expert", type=int, default=6, help="experts of the layer")
    add("--repeats", type=int, default=15, help="measurements, of which the median is printed")
    add("--megabytes", type=float, default=24, help="of text for the data stage")
    add("--documents", type=int, default=10_000_000, help="made-up documents to search for copies")
    add("--json", metavar="FILE", help="where gpu saves what it measured")
    add("--png", metavar="FILE", help="where to draw the curves of scale and curve (needs matplotlib)")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: where a compiler is found")
    args = parser.parse_intermixed_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: expected 1 or more")
    if bool(args.runs) != (args.what == "curve"):
        parser.error("curve takes one RUN or more, the others none")
    args.device = choose_device(args.device)
    args.compile = can_compile(args.device) if args.compile is None else args.compile
    args.config = Config(d_model=args.d_model, n_expert=args.n_expert, n_layer=1, vocab_size=256)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# layer: one feed-forward layer

LAYER_TOKENS = {"cpu": 4096, "cuda": 65_536}  # in one forward, at any length of text


def make_layer(kind, args):
    """A randomly initialised layer, "dense" or "causal"."""
    layer = (Dense(args.config) if kind == "dense" else SoftMoE(args.config)).to(args.device)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=args.d_model**-0.5)
    if args.compile:
        layer.compile(dynamic=False)  # separate code for each length
    return layer


def layer_step(layer, T, args):
    """A function that runs forward and backward once on texts of T tokens, LAYER_TOKENS in all."""
    x = torch.randn(LAYER_TOKENS[args.device] // T, T, args.d_model, device=args.device, requires_grad=True)
    place = place_tokens(torch.zeros(1, T, device=args.device), args.config, None, torch.float32)

    def step():
        with autocast(args.device):
            loss = layer(x, place).sum()
        loss.backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def benchmark_layer(args):
    keep_large_buffers()
    torch.manual_seed(0)
    tokens = LAYER_TOKENS[args.device]
    config = args.config
    layers = {kind: make_layer(kind, args) for kind in ("dense", "causal")}
    count = {kind: sum(p.numel() for p in layer.parameters()) for kind, layer in layers.items()}
    machine = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{machine}, width {args.d_model}, {args.n_expert} experts, window {config.window}, "
        f"{tokens:,} tokens, {'compiled' if args.compile else 'eager'}; "
        f"parameters: dense {count['dense']:,}, causal {count['causal']:,}"
    )

    steps = [layer_step(layer, 1024, args) for layer in layers.values()]
    dense, causal = (1000 * t for t in median_seconds(steps, args.repeats, args.device))
    print(f"forward + backward at T = 1024: dense {dense:.1f} ms, causal {causal:.1f} ms: {causal / dense:.3f}x")

    dense, causal = (peak_memory(step, args.device) / 1e6 for step in steps)
    print(f"peak memory of a step: dense {dense:.0f} MB, causal {causal:.0f} MB: {causal / dense:.3f}x")

    lengths = (512, 1024, 2048, 4096)
    steps = [layer_step(make_layer("causal", args), T, args) for T in lengths]
    times = median_seconds(steps, args.repeats, args.device)
    cells = ", ".join(f"{T}: {1e6 * t / tokens:.2f}" for T, t in zip(lengths, times))
    print(f"microseconds a token at T = {cells}: within {100 * (max(times) / min(times) - 1):.0f} %")
    benchmark_layer_decoding(args)


@torch.no_grad()
def benchmark_layer_decoding(args):
    """The time that one Soft MoE layer takes for one new token, after texts of several lengths."""
    model = Decoder(args.config).to(args.device)
    lengths, steps, caches = (64, 256, 1024, 4096), [], []
    for length in lengths:
        cache = model.new_cache(1, length + 1)
        model(torch.randint(256, (1, length), device=args.device), cache=cache)
        x = torch.randn(1, 1, args.d_model, device=args.device)
        place = place_tokens(torch.zeros(1, 1, device=args.device), args.config, cache, torch.float32)
        steps.append(functools.partial(model.blocks[0].ffn, x, place, cache, 0))
        caches.append(cache)
    times = median_seconds(steps, 20 * args.repeats, args.device)
    micros = ", ".join(f"{1e6 * t:.0f}" for t in times)
    state = ", ".join(str(sum(a.numel() for a in cache.recent[0])) for cache in caches)
    counts = ", ".join(map(str, lengths))
    print(f"decoding, microseconds a token after {counts} tokens: {micros}; state: {state} numbers")


# ----------------------------------------------------------------------------------------------------------------------
# speed: training steps, the loss, decoding


def benchmark_speed(args):
    # In a new process, which returns its 16 GB when it ends
    settings = {"device": args.device, "compiled": args.compile and args.device == "cuda"}
    loss = multiprocessing.get_context("spawn").Process(target=benchmark_loss, kwargs=settings)
    loss.start()
    loss.join()
    if loss.exitcode:
        print(f"the loss was not measured (exit code {loss.exitcode}): it takes 16 GB of memory")
    keep_large_buffers()
    small = Config(n_layer=4, d_model=192, vocab_size=4096, block_size=256, tie_embeddings=True)
    medium = replace(small, n_layer=6, d_model=512, n_head=8, n_kv_head=8, vocab_size=8192, block_size=512)
    cases = [(small, 8), (medium, 4)] + ([(PRESETS["small"], 16)] if args.device == "cuda" else [])
    for config, B in cases:
        benchmark_training(config, B, args)
    benchmark_decoding(replace(small, block_size=2048), args)


def compile_model(model, device):
    """Compile what train.py compiles."""
    for block in model.blocks:
        block.compile(dynamic=False)
    if device == "cuda":
        model.softmax_gradient = torch.compile(softmax_gradient, dynamic=False)


def training_step(model, loss, device):
    """A function that makes one step of AdamW on loss()."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        with autocast(device):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def benchmark_training(config, B, args):
    """Whole steps of B texts with AdamW, in percent of the FLOP/s of a matmul that is timed between them."""
    device, T = args.device, config.block_size
    ids = torch.randint(config.vocab_size, (B, T + 1), device=device)
    x, targets = ids[:, :-1], ids[:, 1:]
    ours = {"dense": Decoder(replace(config, ffn="dense")), "causal Soft MoE": Decoder(config)}
    theirs = {"transformers, eager": transformers_model(config)}
    if args.compile:
        theirs["transformers, compiled"] = transformers_model(config)
        theirs["transformers, compiled"].compile()
        for model in ours.values():
            compile_model(model, device)

    def our_loss(model):
        return model(x, targets)

    def their_loss(model):
        return model(input_ids=x, labels=x).loss  # shifts the labels itself

    losses = [(model.to(device), functools.partial(our_loss, model)) for model in ours.values()]
    losses += [(model.to(device), functools.partial(their_loss, model)) for model in theirs.values()]
    steps = [training_step(model, loss, device) for model, loss in losses]
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    square = torch.randn(n, n, device=device, dtype=dtype)
    *times, matmul = median_seconds([*steps, lambda: square @ square], args.repeats, device)
    flops, peak = flops_per_token(ours["dense"], T) * B * T, 2 * n**3 / matmul
    n_params = ours["dense"].n_params()
    print(f"steps of {B} x {T} tokens, {n_params:,} parameters; a matmul reaches {peak / 1e9:.0f} GFLOP/s")
    for name, took in zip([*ours, *theirs], times):
        print(
            f"    {name:<24}{1000 * took:>8.1f} ms{B * T / took:>9,.0f} tokens/s   {100 * flops / took / peak:3.0f} %"
        )


def benchmark_loss(V=151_936, D=512, T=1024, B=8, device="cpu", compiled=False):
    """A step of one block at Qwen's vocabulary, with the loss in chunks and with all logits at once."""
    model = Decoder(Config(n_layer=1, d_model=D, vocab_size=V, block_size=T, tie_embeddings=True)).to(device)
    if compiled:
        compile_model(model, device)
    ids = torch.randint(V, (B, T + 1), device=device)
    x, targets = ids[:, :-1], ids[:, 1:]

    def in_chunks():
        return model(x, targets)

    def at_once():
        return F.cross_entropy(model(x).flatten(0, 1), targets.flatten())

    def step(loss):
        with autocast(device):
            value = loss()
        value.backward()
        model.zero_grad()

    steps = [functools.partial(step, loss) for loss in (in_chunks, at_once)]
    memory, plain_memory = (peak_memory(step, device) for step in steps)
    took, plain_took = median_seconds(steps, 3, device, warm_up=0)
    print(
        f"step of {B} x {T} tokens, width {D}, vocabulary {V:,}: "
        f"loss in chunks {took:.1f} s, {memory / 1e9:.2f} GB; "
        f"all logits at once {plain_took:.1f} s, {plain_memory / 1e9:.2f} GB: "
        f"{took / plain_took:.2f}x the time, {memory / plain_memory:.2f}x the memory"
    )


def benchmark_decoding(config, args, new=128):
    """Greedy tokens/s of one text and of 16 at once, after a short and a long prompt, whose time is subtracted."""
    models = {}
    for name, shape in (("causal", config), ("dense", replace(config, ffn="dense"))):
        models[name] = Decoder(shape)
        if args.compile:
            models[name + ", compiled"] = Decoder(shape)
            compile_step(models[name + ", compiled"])
    models["transformers"] = transformers_model(config)
    for model in models.values():
        model.to(args.device).eval()

    def run(name, B, T, new):
        ids = torch.randint(config.vocab_size, (B, T), device=args.device)
        if name == "transformers":
            exactly = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            models[name].generate(ids, attention_mask=torch.ones_like(ids), **exactly)
        else:
            collections.deque(generate(models[name], ids, new, config.vocab_size, temperature=0), maxlen=0)

    cases = [(name, B, T) for name in models for B, T in ((1, 64), (16, 64), (1, 1024 - new))]
    calls = [functools.partial(run, *case, length) for case in cases for length in (1, new + 1)]
    times = median_seconds(calls, max(1, args.repeats // 3), args.device)
    for (name, B, T), prompt, whole in zip(cases, times[::2], times[1::2]):
        speed = B * new / (whole - prompt)
        print(f"    greedy, {name:<18}{B:>3} at once after {T:>5} tokens: {speed:>7,.0f} tokens/s")


# ----------------------------------------------------------------------------------------------------------------------
# scale: what a token costs in training

SIZES = [(4, 128), (5, 256), (8, 448), (12, 832)]  # layers, width


def token_cost(config, T, args, tokens=4096):
    """-> (parameters, microseconds a token) of a training step on texts of T tokens."""
    torch.compiler.reset()  # code for this length, not for any
    model = Decoder(replace(config, block_size=T)).to(args.device)
    ids = torch.randint(config.vocab_size, (max(1, tokens // T), T + 1), device=args.device)
    if args.compile:
        compile_model(model, args.device)
    step = training_step(model, lambda: model(ids[:, :-1], ids[:, 1:]), args.device)
    (took,) = median_seconds([step], args.repeats, args.device, warm_up=2)
    return model.n_params(), 1e6 * took / ids[:, 1:].numel()


def benchmark_scale(args, sizes=SIZES, lengths=(256, 512, 1024, 2048, 4096), width=256, T=256):
    """Costs against size and length. An exponent is the slope of the straight line through the logarithms."""
    keep_large_buffers()
    curves = {}
    for name, ffn in (("dense", "dense"), ("causal", "soft_moe")):
        config = Config(vocab_size=4096, tie_embeddings=True, ffn=ffn)
        by_size = []
        for n_layer, d_model in sizes:
            heads = d_model // 32
            shape = replace(config, n_layer=n_layer, d_model=d_model, n_head=heads, n_kv_head=heads)
            by_size.append(token_cost(shape, T, args, 1024))
        config = replace(config, n_layer=4, d_model=width, n_head=width // 64, n_kv_head=width // 64)
        by_length = [(length, token_cost(config, length, args)[1]) for length in lengths]
        n_params = Decoder(config).n_params()
        for what, points in ((f"parameters at T = {T}", by_size), (f"T at {n_params:,} parameters", by_length)):
            exponent = np.polyfit(*np.log(np.array(points)).T, 1)[0]
            curves[what, name] = points, exponent
            cells = ", ".join(f"{x:,}: {y:.1f}" for x, y in points)
            print(f"{name:<6} microseconds a token against {what}: {cells}; exponent {exponent:.2f}")
    if args.png:
        draw_scale(curves, lengths, args.png)


def draw_scale(curves, lengths, path):
    """Two charts, with a curve for each kind of layer: cost against parameters, and against length."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4), sharey=True)
    for (what, name), (points, exponent) in curves.items():
        axis = axes[int(what.startswith("T"))]
        axis.loglog(*zip(*points), "o-", label=f"{name}, exponent {exponent:.2f}")
        axis.set_xlabel(what)
        axis.legend()
    axes[0].set_ylabel("microseconds a token")
    axes[1].set_xticks(lengths, lengths)
    axes[1].minorticks_off()
    figure.savefig(path, dpi=100, bbox_inches="tight")
    print(f"drawn: {path}")


def main(argv=None):
    args = get_args(argv)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # as train.py
    commands = {
        "layer": benchmark_layer,
        "speed": benchmark_speed,
        "scale": benchmark_scale,
        "run": benchmark_run,
        "data": benchmark_data,
        "dpo": lambda args: benchmark_dpo(args.repeats),
        "curve": draw_curves,
        "gpu": benchmark_gpu,
    }
    commands[args.what](args)


if __name__ == "__main__":
    run_command(main)
