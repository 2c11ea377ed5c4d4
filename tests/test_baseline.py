"""The nanoGPT-style baseline: its size, that it is causal and learns, and that it is scored on the same text."""

import json

import pytest
import torch
from conftest import call, refused

from data import TokenData
from extras.baseline import BLOCK, LR, MIN_LR, Baseline, held_out, learning_rate
from extras.speed_runs import read_curve
from plan import PRESETS


@pytest.fixture
def one_thread():
    """Steps of a predictable length, also beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.quick
@torch.no_grad()
def test_the_baseline_is_causal_and_of_nanogpts_size(one_thread):
    with torch.device("meta"):
        assert sum(p.numel() for p in Baseline(8192).parameters()) == 1_844_352
    model = Baseline(50)
    ids, targets = torch.randint(50, (2, 2, BLOCK)).unbind(0)
    changed, first_half = ids.clone(), targets.clone()
    changed[:, BLOCK // 2 :] = 0
    first_half[:, BLOCK // 2 :] = -1
    assert torch.equal(model(ids, first_half), model(changed, first_half))
    assert not torch.equal(model(ids, targets), model(changed, targets))
    total, mean = (model(ids, first_half, reduction=reduction) for reduction in ("sum", "mean"))
    torch.testing.assert_close(total, mean * BLOCK)  # two rows of half a block


@pytest.mark.quick
def test_its_learning_rate_warms_up_and_falls_with_the_time():
    assert learning_rate(0, 0.0) == LR / 100 and learning_rate(99, 0.0) == LR
    assert learning_rate(5000, 0.5) == pytest.approx((LR + MIN_LR) / 2)
    assert learning_rate(9000, 1.0) == learning_rate(9000, 1.1) == pytest.approx(MIN_LR)


def test_it_is_scored_on_the_tokens_that_the_demo_model_is_scored_on(small_data):
    val = TokenData(small_data, "val", PRESETS["demo"].block_size)
    samples = held_out(small_data, 1 << 20)
    assert {len(sample) for sample in samples} == {BLOCK + 1}
    assert [i for sample in samples for i in sample[1:]] == [i for sample in val for i in sample[1:]]
    assert len(held_out(small_data, 1000)) * BLOCK == 896  # seven samples of 128


def test_it_trains_and_its_curve_can_be_drawn(small_data, tmp_path, one_thread):
    flags = ("--data", small_data, "--out", tmp_path / "run", "--minutes", 0.05, "--eval-every", 4)
    said = call("extras.baseline", *flags).stdout.splitlines()
    assert said[0].endswith("a step: 12 x 64 tokens") and said[-1].startswith("done: step ")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["step"] == 1 and {"loss", "ms", "seconds", "tokens"} <= first.keys()
    curve = read_curve(tmp_path / "run")
    assert len(curve) >= 2 and curve[-1][1] < curve[0][1]
    assert 0.05 <= curve[-1][0] < 0.1  # evaluations do not count
    refused(call("extras.baseline", *flags, ok=False), "has a metrics.jsonl")
    refused(call("extras.baseline", "--minutes", 0, ok=False), "expected positive numbers")
