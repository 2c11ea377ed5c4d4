"""`python -m extras.speed gpu`: speed, memory and time by part on this GPU, beside transformers' Qwen2 in the same run.

A step is measured in two pieces, because their ratio is the user's choice: a micro-batch (forward and backward), and
what follows all micro-batches (clipping and optimizers). Tokens/s are for BATCH_TOKENS tokens a step.
"""

import gc
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from common import flops_per_token, peak_flops
from extras.timing import autocast, median_seconds, timed
from model import Decoder, cross_entropy, place_tokens
from optim import make_optimizers, scale_and_clip, update
from parallel import Ranks
from plan import BATCH_TOKENS, PRESETS
from sample import compile_step, generate
from train import get_args, move_to_device

MICRO_BATCH = {"small": 32, "base-350m": 8, "steel-1b": 8}  # samples
ROWS = [("training", name, kind) for name in MICRO_BATCH for kind in ("dense", "causal")]
ROWS += [("decoding", "small", kind) for kind in ("dense", "causal", "transformers")]
ROWS += [("training", "small", "causal, documents apart")]
ROWS += [("training", name, "transformers") for name in ("small", "steel-1b", "base-350m")]
DOCUMENT = 300  # tokens, on average
SECONDS = 280  # a row that may last longer than what is left of them, as the longest has, is not begun
COLUMNS = {
    "training": {
        "tokens/s": ("tokens_per_second", "{:,.0f}"),
        "mfu": ("mfu", "{:.0%}"),
        "memory, GB": ("memory_gb", "{:.1f}"),
        "micro-batch, ms": ("micro_ms", "{:.1f}"),
        "end of step, ms": ("end_ms", "{:.1f}"),
        "attention, ms": ("attention_ms", "{:.1f}"),
        "feed-forward, ms": ("ffn_ms", "{:.1f}"),
        "loss, ms": ("loss_ms", "{:.1f}"),
    },
    "decoding": {"tokens/s, batch 1": ("batch_1", "{:,.0f}"), "batch 64": ("batch_64", "{:,.0f}")},
}


def transformers_model(config):
    """transformers' dense Qwen2 of the same shape, with its own loss and SDPA attention."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        install = "pip install -r tests/requirements.txt"
        raise ValueError(f"extras.speed compares with transformers: {install}") from None
    shape = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_dense,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.block_size,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
    )
    return Qwen2ForCausalLM(shape)


def shape_of(name, kind):
    ffn = "soft_moe" if kind.startswith("causal") else "dense"
    return replace(PRESETS[name], ffn=ffn, reset_id=0 if kind.endswith("apart") else -1)


def random_ids(config, *shape):
    """Ids, 0 about every DOCUMENT tokens: there documents begin where they are kept apart."""
    ids = torch.randint(config.vocab_size, shape, device="cuda")
    return ids.masked_fill(torch.rand(shape, device="cuda") < 1 / DOCUMENT, 0)


def training_step(name, kind, micro_batch):
    """-> config, model, functions for a micro-batch and for the end of a step."""
    config = shape_of(name, kind)
    args = get_args([])
    ids = random_ids(config, micro_batch, config.block_size + 1)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    with torch.device("cuda"):
        model = transformers_model(config) if kind == "transformers" else Decoder(config)
    if kind == "transformers":
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]
        compiled = torch.compile(model, dynamic=False)

        def micro():
            with autocast("cuda"):
                loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss  # it shifts the labels itself
            loss.backward()

        def finish():
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[0].step()

    else:
        move_to_device(model, args, "cuda", True, Ranks())
        optimizers = make_optimizers(model, "muon", 1e-4, 0.1, bf16=True)
        count = torch.tensor(float(targets.numel()), device="cuda")

        def micro():
            with autocast("cuda"):
                nats = model(inputs, targets, reduction="sum")
            nats.backward()

        def finish():
            kept = [p.grad for p in model.parameters()]
            norm = scale_and_clip(model.parameters(), count, 1.0)
            update(optimizers, 1e-4, skip=~norm.isfinite())
            for p, gradient in zip(model.parameters(), kept):  # update() drops them; this function is measured again
                p.grad = gradient

    return config, model, micro, finish


def loss_seconds(config, model, micro_batch):
    """Of the head and the loss of a micro-batch, forward and backward."""
    shape = micro_batch, config.block_size
    hidden = torch.randn(*shape, config.d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(config.vocab_size, shape, device="cuda")
    body, weight = model.softmax_gradient, model.head_weight

    def step():
        with autocast("cuda"):
            cross_entropy(hidden, weight, targets, "sum", softmax_gradient=body).backward()

    return median_seconds([step], 5, "cuda", warm_up=2)[0]


def part_seconds(config, model, micro_batch):
    """-> seconds of all attention layers and of all feed-forward layers of a micro-batch, each compiled by itself."""
    ids = random_ids(config, micro_batch, config.block_size)
    x = torch.randn(*ids.shape, config.d_model, device="cuda", requires_grad=True)
    place = place_tokens(ids, config, None, torch.float32, model.uses_flex)
    times = []
    for layer in (model.blocks[0].attention, model.blocks[0].ffn):
        code = torch.compile(layer, dynamic=False)

        def step(code=code):
            with autocast("cuda"):
                y = code(x, place)
            y.backward(torch.ones_like(y))

        times.append(config.n_layer * median_seconds([step], 5, "cuda", warm_up=2)[0])
    return times


def measure(name, kind):
    """One row of the table, as a dict."""
    micro_batch = MICRO_BATCH[name] // (4 if kind == "transformers" and name == "steel-1b" else 1)
    torch.cuda.reset_peak_memory_stats()
    config, model, micro, finish = training_step(name, kind, micro_batch)
    compile_seconds = timed(micro, "cuda")[0]
    finish()
    one = median_seconds([micro], 10, "cuda", warm_up=2)[0]
    end = median_seconds([finish], 5, "cuda", warm_up=1)[0]
    memory = torch.cuda.max_memory_allocated()
    speed = BATCH_TOKENS / (BATCH_TOKENS / (micro_batch * config.block_size) * one + end)
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "micro_batch": micro_batch,
        "tokens_per_second": speed,
        "micro_ms": 1000 * one,
        "end_ms": 1000 * end,
        "memory_gb": memory / 1e9,
        "compile_s": compile_seconds,
    }
    if kind != "transformers":
        if peak := peak_flops("cuda", True):
            row["mfu"] = flops_per_token(model, config.block_size) * speed / peak
        row["loss_ms"] = 1000 * loss_seconds(config, model, micro_batch)
        attention, ffn = part_seconds(config, model, micro_batch)
        row |= {"attention_ms": 1000 * attention, "ffn_ms": 1000 * ffn}
    return row


def measure_decoding(name, kind, prompt=64, new=64):
    """Greedy decoding after a prompt, bf16 weights, ours compiled: {"batch_1", "batch_64"}, tokens/s."""
    config = shape_of(name, kind)
    with torch.device("cuda"):
        model = transformers_model(config) if kind == "transformers" else Decoder(config)
    model, row = model.to(torch.bfloat16).eval(), {}
    if kind != "transformers":
        compile_step(model)
    for batch in (1, 64):
        ids = torch.randint(config.vocab_size, (batch, prompt), device="cuda")

        def decode(ids=ids):
            if kind == "transformers":
                with torch.no_grad():
                    model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True)
            else:
                list(generate(model, ids, new, config.vocab_size, temperature=0))

        row[f"batch_{batch}"] = batch * new / median_seconds([decode], 3, "cuda", warm_up=1)[0]
    return row


def matmul_peak():
    """FLOP/s of an 8192^3 bf16 matmul on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return 2 * 8192**3 / median_seconds([lambda: a @ b], 10, "cuda")[0]


def benchmark_gpu(args):
    """Print a line for each model and kind as it is measured, then the tables; --json FILE saves all of it."""
    if not torch.cuda.is_available():
        raise ValueError("gpu measures a GPU that CUDA can use, and there is none here")
    with torch.device("meta"):
        transformers_model(PRESETS["demo"])  # where it is not installed, nothing is measured in vain
    torch.set_float32_matmul_precision("high")
    start, longest = time.perf_counter(), 0.0
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "matmul_flops": matmul_peak(),
        "rows": [],
    }
    matmul = f"8192^3 matmul {result['matmul_flops'] / 1e12:.0f} TFLOP/s"
    print(f"{result['gpu']}, torch {result['torch']}, {matmul}", flush=True)
    for what, name, kind in ROWS:
        began, row = time.perf_counter(), {"what": what, "model": name, "kind": kind}
        try:
            if began - start + longest < SECONDS:
                row |= measure(name, kind) if what == "training" else measure_decoding(name, kind)
            else:
                row["missing"] = "no time left"
        except torch.OutOfMemoryError:
            row["missing"] = "out of memory"
        except RuntimeError as error:
            row["missing"] = str(error).splitlines()[0]
        result["rows"].append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        longest = max(longest, time.perf_counter() - began)
        result["seconds"] = time.perf_counter() - start
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print_tables(result)


def print_tables(result):
    """Tables for docs/gpu.md."""
    for what, columns in COLUMNS.items():
        print(f"\n| {result['gpu']}, {what} | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
        for row in (row for row in result["rows"] if row["what"] == what):
            cells = [form.format(row[key]) if key in row else "" for key, form in columns.values()]
            cells[0] = cells[0] or row["missing"]
            print(f"| {row['model']}, {row['kind']} | {' | '.join(cells)} |")
