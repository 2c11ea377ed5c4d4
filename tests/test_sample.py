"""Sampling: the filters against brute force, cached against uncached generation, the command."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import TINY, call, refused
from test_model import CAUSAL_KINDS, small

from sample import generate, keep_top_k, keep_top_p, pick, until


def test_top_k_keeps_the_k_likeliest():
    logits = torch.randn(5, 20)
    for k in (1, 3, 20, 50, 0):
        kept = keep_top_k(logits, k)
        for row, result in zip(logits.tolist(), kept.tolist()):
            best = sorted(row, reverse=True)[: k or 20]
            assert result == [x if x in best else float("-inf") for x in row]


@pytest.mark.parametrize("p", [0.0001, 0.3, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    logits = torch.randn(6, 7) * 2
    for row, result in zip(logits, keep_top_p(logits, p)):
        probabilities = row.softmax(0).tolist()
        subsets = [s for n in range(1, 8) for s in itertools.combinations(range(7), n)]
        reaching = [s for s in subsets if sum(probabilities[i] for i in s) >= p - 1e-6]
        size = min(map(len, reaching))
        best = max((s for s in reaching if len(s) == size), key=lambda s: sum(probabilities[i] for i in s))
        assert {i for i in range(7) if result[i] > float("-inf")} == set(best)


def test_pick_draws_from_the_softmax_at_its_temperature():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    assert pick(logits, temperature=0).tolist() == [1]
    generator = torch.Generator().manual_seed(0)
    drawn = pick(logits.expand(100_000, 4), temperature=2.0, generator=generator)
    share = torch.bincount(drawn, minlength=4) / 100_000
    torch.testing.assert_close(share, (logits[0] / 2).softmax(0), rtol=0, atol=0.006)  # 4 standard errors


@pytest.mark.parametrize("changes", [*CAUSAL_KINDS, dict(dispatch="sequence")], ids=str)
@torch.no_grad()
def test_greedy_generation_is_that_of_full_forwards(changes):
    model, ids = small(**changes), torch.randint(50, (3, 5))
    got = torch.stack(list(generate(model, ids, 20, vocab_size=40, temperature=0)), 1)
    for n in range(20):
        assert torch.equal(got[:, n], model(torch.cat([ids, got[:, :n]], 1))[:, -1, :40].argmax(-1))
    assert got.max() < 40


def test_generation_ends_at_the_context_and_at_a_stop_id():
    model = small(torch.float32)
    model.config = replace(model.config, block_size=8)
    assert len(list(generate(model, torch.zeros(1, 5, dtype=torch.long), 100, 50))) == 4  # the last needs no forward
    assert list(until(iter([4, 5, 6, 7]), {6, 9})) == [4, 5]


def test_the_command(small_data, tmp_path):
    call("train.py", "--data", small_data, "--out", tmp_path / "run", *TINY, "--steps", 2)
    sample = lambda *flags, **kwargs: call("sample.py", tmp_path / "run", "--max-new-tokens", 8, *flags, **kwargs)
    first, again, other = (sample("--prompt", "却说曹操", "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other
    assert first.splitlines()[1].startswith("却说曹操")
    assert sample("--num-samples", 3).stdout.count("---") == 3
    (tmp_path / "prompt.txt").write_text("却说曹操", encoding="utf-8")
    assert sample("--file", tmp_path / "prompt.txt", "--seed", 1).stdout == first
    refused(sample("--top-p", 0, ok=False), "--top-p 0.0: expected more than 0")
    refused(sample("--prompt", "长" * 100, ok=False), "the prompt has", "the model's context is 32")
    refused(sample("--file", tmp_path / "none.txt", ok=False), "none.txt")
    refused(call("sample.py", tmp_path / "nothing", ok=False), "no checkpoint in", "python train.py")
