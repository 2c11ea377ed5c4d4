"""The memory that is computed from shapes, compared with what a step really allocates; and what follows from it."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import call
from torch._subclasses.fake_tensor import FakeTensorMode

import plan
from extras.timing import peak_memory
from model import Config, Decoder
from parallel import Ranks
from plan import PRESETS, LiveTensors, StepMemory, set_sizes
from train import get_args


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_computed_from_shapes_is_what_a_forward_allocates(recompute):
    """torch's profiler measures the same forward with real numbers."""

    def forward(model):
        for block in model.blocks:
            block.recompute = recompute
        return model(torch.zeros(2, 128, dtype=torch.long), torch.zeros(2, 128, dtype=torch.long))

    config = Config(n_layer=4, vocab_size=4096, expert="swiglu2")
    model = Decoder(config)
    measured = peak_memory(lambda: forward(model))
    with FakeTensorMode():
        model = Decoder(config)
        with LiveTensors(model.parameters()) as live:
            forward(model)
    assert live.most == pytest.approx(measured, rel=0.01)


@pytest.mark.quick
def test_the_plan_counts_what_each_process_holds():
    said = call("train.py", *"--dry-run --preset steel-1b --micro-batch 1 --recompute".split()).stdout
    with torch.device("meta"):
        n_params = Decoder(PRESETS["steel-1b"]).n_params()
        one_layer = Decoder(replace(PRESETS["steel-1b"], n_layer=1))
    block = sum(p.numel() for p in one_layer.blocks.parameters())
    assert n_params == 18 * block + 2 * 151_936 * 1792 + 1792
    assert said.startswith(f"{n_params:,} parameters")
    rows = [line.split() for line in said.splitlines()[4:]]
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert len({row[1] for row in rows}) == 1  # without FSDP every GPU holds everything
    fsdp = [float(row[2]) for row in rows[1:]]
    assert fsdp == sorted(fsdp, reverse=True) and fsdp[0] < float(rows[0][1])


class Text:
    """A corpus of so many tokens, and conversations."""

    def __init__(self, tokens, block_size, documents=1):
        self.block_size, self.documents, self.samples = block_size, documents, tokens // block_size

    def __len__(self):
        return self.samples


class Alone(Ranks):
    """Rank 0 of several, without the others."""

    def from_rank_0(self, number):
        return number


@functools.cache
def memory_of(config, micro_batch, recompute, optimizer):
    return StepMemory(config, micro_batch, SimpleNamespace(recompute=recompute, optimizer=optimizer))


def step_memory(config, micro_batch, args):
    """StepMemory, computed once for all tests."""
    return memory_of(config, micro_batch, args.recompute, args.optimizer)


def chosen(monkeypatch, flags, tokens, gigabytes, world=1, device="cuda", documents=1):
    """What set_sizes() makes of flags, and the memory of that step, in GB."""
    monkeypatch.setattr(plan, "gpu_bytes", lambda ranks: gigabytes * 10**9)
    monkeypatch.setattr(plan, "StepMemory", step_memory)
    args = get_args(flags.split())
    config = PRESETS[args.preset or "demo"]
    with torch.device("meta"):
        model = Decoder(config)
    set_sizes(args, model, Text(tokens, config.block_size, documents), device, Alone(0, world, 0, world))
    needed = [
        step_memory(config, size, args).on_each(world, args.shard) for size in (args.micro_batch, 2 * args.micro_batch)
    ]
    return SimpleNamespace(**vars(args), needed=needed[0] / 1e9, of_twice=needed[1] / 1e9)


@pytest.mark.quick
@pytest.mark.parametrize(
    "flags, gigabytes, world",
    [
        ("--preset small", 80, 1),
        ("--preset small", 24, 1),
        ("--preset small --recompute", 12, 1),
        ("--preset steel-1b", 80, 4),
        ("--preset steel-1b --shard", 24, 8),
    ],
)
def test_a_large_model_on_a_gpu_gets_the_largest_micro_batch_that_fits(flags, gigabytes, world, monkeypatch):
    got = chosen(monkeypatch, flags, 10**10, gigabytes, world)
    assert got.needed <= 0.9 * gigabytes < got.of_twice
    assert got.batch_tokens == 1 << 19


@pytest.mark.quick
def test_a_step_of_a_large_model_on_gpus_has_2_19_tokens_and_its_rate(monkeypatch, capsys):
    got = chosen(monkeypatch, "--preset small", 10**10, 10_000)
    assert (got.micro_batch, got.batch_tokens) == (512, 512 * 1024)  # no micro-batch is larger than its step
    assert got.lr == pytest.approx(0.00244949)  # 6e-3 / sqrt(6)
    got = chosen(monkeypatch, "--preset small --optimizer adamw", 10**10, 10_000, world=8)
    assert (got.micro_batch, got.batch_tokens, got.lr) == (64, 1 << 19, pytest.approx(0.000612372))
    got = chosen(monkeypatch, "--preset steel-1b", 10**10, 10_000, world=6)
    assert (got.micro_batch, got.batch_tokens) == (4, 11 * 4 * 2048 * 6)  # 540,672: twice 4 would be 6 % off
    assert "warning" not in capsys.readouterr().out
    got = chosen(monkeypatch, "--preset small", 3_000_000, 80)
    assert (got.micro_batch, got.batch_tokens) == (8, 8192)  # 366 steps an epoch; twice as many tokens: 183
    assert got.lr == pytest.approx(0.000306186)  # 6e-3 / sqrt(6) / 8
    said = capsys.readouterr().out
    assert "the data have only 2,999,296 tokens: a step takes 8,192, not 524,288" in said
    got = chosen(monkeypatch, "--preset small", 1_000_000, 80, world=16)
    assert "a step takes 16,384, not 524,288" in capsys.readouterr().out and got.batch_tokens == 16_384
    got = chosen(monkeypatch, "--preset small --micro-batch 32", 3_000_000, 80)
    assert "a step takes 32,768, not 524,288" in capsys.readouterr().out and got.batch_tokens == 32_768
    chosen(monkeypatch, "--preset steel-1b", 10**10, 16)
    assert (
        "micro-batch 1: the plan is 26.4 GB, 14.4 can be used: try --recompute, or --shard" in capsys.readouterr().out
    )


@pytest.mark.quick
def test_flags_and_recipes_come_before_what_a_gpu_chooses(monkeypatch):
    got = chosen(monkeypatch, "--preset small --micro-batch 3 --lr 0.01", 10**10, 80)
    assert (got.micro_batch, got.batch_tokens, got.lr) == (3, 171 * 3 * 1024, 0.01)
    got = chosen(monkeypatch, "--preset small --batch-tokens 12288", 10**10, 80)
    assert (got.micro_batch, got.batch_tokens) == (4, 12288)
    got = chosen(monkeypatch, "--recipe sft --preset small", 10**8, 80, documents=500_000)
    assert (got.lr, got.micro_batch, got.batch_tokens) == (2e-5, 16, 3 * 16 * 1024)  # 256 conversations: 51,200 tokens


@pytest.mark.quick
@pytest.mark.parametrize("device, flags", [("cpu", "--preset small"), ("cuda", ""), ("cpu", "")])
def test_elsewhere_the_numbers_are_those_of_the_demo_model(device, flags, monkeypatch):
    got = chosen(monkeypatch, flags, 10**10, 80, world=2, device=device)
    assert (got.micro_batch, got.lr) == (16, 6e-3)
    assert got.batch_tokens == 2 * 16 * PRESETS[got.preset or "demo"].block_size


@pytest.mark.quick
def test_a_step_that_micro_batches_do_not_divide_is_refused_with_one_that_does(monkeypatch):
    """As when a run of one GPU goes on with eight."""
    with pytest.raises(ValueError, match="1024 x 8 = 1048576: --micro-batch 64 divides it$"):
        chosen(monkeypatch, "--preset small --micro-batch 128 --batch-tokens 524288", 10**10, 80, world=8)
