"""The memory that --dry-run computes from shapes, compared with what a step really allocates."""

from dataclasses import replace

import pytest
import torch
from conftest import call
from torch._subclasses.fake_tensor import FakeTensorMode

from extras.plan import LiveTensors
from extras.timing import peak_memory
from model import PRESETS, Config, Decoder


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
