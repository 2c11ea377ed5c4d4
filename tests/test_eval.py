"""Evaluation: loss and bits per byte against a direct computation, and the command."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, refused
from test_model import CAUSAL_KINDS, small

from checkpoint import newest_checkpoint
from eval import characters, evaluate, leak, noise_loss, routing, text_blocks
from model import Config
from tokenizer import load_tokenizer


@torch.no_grad()
def test_loss_and_bits_per_byte_of_a_text(small_data, tmp_path):
    tokenizer = load_tokenizer(small_data)
    model = small(torch.float32, vocab_size=tokenizer.vocab_size)
    text = "话说天下大势，分久必合，合久必分。\n周末七国分争，并入于秦。𠀀" * 3
    (tmp_path / "text").write_text(text, encoding="utf-8")
    T = 16
    blocks = text_blocks(tmp_path / "text", tokenizer, T)
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    assert np.concatenate([block[1:] for block in blocks]).tolist()[: len(ids) - 1] == ids[1:]

    nats = 0.0  # every token once, from what stands before it in its block
    for i in range(1, len(ids)):
        start = (i - 1) // T * T
        nats -= model(torch.tensor([ids[start:i]]))[0, -1].double().log_softmax(0)[ids[i]].item()
    for batch_tokens in (1, 32, 4096):
        result = evaluate(model, blocks, tokenizer.token_bytes, batch_tokens=batch_tokens)
        assert result["tokens"] == len(ids) - 1
        assert result["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
        assert result["bpb"] == pytest.approx(nats / math.log(2) / len(text.encode("utf-8")), abs=1e-5)


def test_of_too_many_blocks_evenly_spaced_ones_are_taken(small_data):
    model = small(torch.float32, vocab_size=100)
    blocks = [np.random.default_rng(i).integers(0, 100, 17) for i in range(50)]
    token_bytes = [b"x"] * 100
    some = evaluate(model, blocks, token_bytes, max_tokens=160)
    assert some["tokens"] == 160
    chosen = [blocks[round(i * 49 / 9 - 0.499)] for i in range(10)]
    assert some["loss"] == pytest.approx(evaluate(model, chosen, token_bytes)["loss"], abs=1e-6)
    nothing = evaluate(model, [np.array([1, -1, -1])], token_bytes)  # as of a chat, a question without its answer
    assert math.isnan(nothing["loss"]) and nothing["tokens"] == 0


@pytest.mark.parametrize("changes", CAUSAL_KINDS, ids=str)
def test_three_ways_to_score_a_causal_model_agree(changes):
    model, ids = small(torch.float32, **changes), torch.randint(50, (3, 21))
    ids[1, 17:] = -1  # the end of a text
    result = leak(model, ids)
    blocks = [row.numpy() for row in ids]
    assert result["teacher-forced"] == pytest.approx(evaluate(model, blocks, [b"x"] * 50)["loss"], abs=1e-5)
    assert result["honest"] == pytest.approx(result["teacher-forced"], abs=1e-4)
    assert result["cached"] == pytest.approx(result["teacher-forced"], abs=1e-4)


def test_three_ways_to_score_the_published_layer_do_not_agree():
    model, ids = small(torch.float32, dispatch="sequence"), torch.randint(50, (3, 21))
    result = leak(model, ids)
    assert abs(result["honest"] - result["teacher-forced"]) > 1e-3 and result["cached"] is None
    nats = 0.0  # the honest loss by hand, of one text
    for t in range(1, 21):
        nats -= model(ids[:1, :t])[0, -1].double().log_softmax(0)[ids[0, t]].item()
    assert leak(model, ids[:1])["honest"] == pytest.approx(nats / 20, abs=1e-5)


@pytest.mark.parametrize("dispatch, peeks", [("causal", False), ("token", False), ("sequence", True)])
def test_only_the_published_layer_predicts_noise(dispatch, peeks):
    config = Config(n_layer=2, d_model=32, vocab_size=6, block_size=8, n_expert=4, slots_per_expert=2, dispatch=dispatch)
    loss = noise_loss(config, steps=120, batch_tokens=512)
    if peeks:
        assert loss < 1.6  # ln 6 = 1.79
    else:
        assert math.log(6) - 0.005 < loss < math.log(6) + 0.05


@torch.no_grad()
def test_routing_shows_what_the_layer_does():
    model, ids = small(slots_per_expert=2, window=3), torch.randint(50, (1, 9))
    inputs = []
    for block in model.blocks:
        block.ffn_norm.register_forward_hook(lambda module, args, output: inputs.append(output[0]))
    combine, window = routing(model, ids)
    for layer, (x, block) in enumerate(zip(inputs, model.blocks)):
        unit = lambda v: v / v.norm(dim=0, keepdim=True)
        logits = block.ffn.scale * unit(x.T).T @ unit(block.ffn.phi)
        torch.testing.assert_close(combine[layer], logits.softmax(-1))
        for t in range(9):
            back = range(min(3, t + 1))
            scores = torch.stack([logits[t - k] + block.ffn.recency[:, k] for k in back])
            torch.testing.assert_close(window[layer, : len(back), t], scores.softmax(0))
            assert not window[layer, len(back) :, t].any()


def test_every_token_shows_the_characters_it_is_a_part_of():
    token_bytes = [b"a", "却说".encode(), *(bytes([b]) for b in "龘".encode()), b"\n", "曹".encode() + "操".encode()[:1], "操".encode()[1:]]
    assert characters(range(8), token_bytes) == ["a", "却说", "龘", "龘", "龘", "⏎", "曹操", "操"]


def test_the_command(small_data, tmp_path):
    trained = call("train.py", "--data", small_data, "--out", tmp_path / "run", *TINY, "--steps", 2, "--save-every", 1)
    result = call("eval.py", tmp_path / "run", tmp_path / "run" / "step-00000001").stdout.splitlines()
    newest, older = result[1].split(), result[2].split()
    assert newest[0].endswith("step-00000002") and older[0].endswith("step-00000001")
    assert f"val loss {newest[1]}, val bpb {newest[3]}," in trained.stdout  # one function, one number
    (tmp_path / "my.txt").write_text("话说天下大势，分久必合。", encoding="utf-8")
    assert len(call("eval.py", tmp_path / "run", "--text", tmp_path / "my.txt").stdout.splitlines()) == 2
    (tmp_path / "other.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    call("prepare.py", tmp_path / "other.txt", "--out", tmp_path / "other", "--vocab-size", 700)
    refused(call("eval.py", tmp_path / "run", "--data", tmp_path / "other", ok=False), "prepared with another tokenizer")
    (tmp_path / "empty.txt").write_bytes(b"")
    refused(call("eval.py", tmp_path / "run", "--text", tmp_path / "empty.txt", ok=False), "empty.txt is empty")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    refused(call("eval.py", tmp_path / "run", "--text", tmp_path / "bad.txt", ok=False), "bad.txt is not UTF-8 (byte 0)")


def test_the_leak_and_the_routing_of_a_checkpoint(small_data, tmp_path):
    call("train.py", "--data", small_data, "--out", tmp_path / "run", *TINY, "--steps", 2)
    lines = call("eval.py", "--leak", tmp_path / "run").stdout.splitlines()
    assert lines[-1].startswith("they agree to")
    nats = [float(line.split()[1]) for line in lines[2:5]]
    assert max(nats) - min(nats) < 1e-4
    png = tmp_path / "routing.png"
    shown = call("eval.py", "--routing", tmp_path / "run", "--prompt", "却说曹操龘", "--png", png).stdout
    n = len(load_tokenizer(newest_checkpoint(tmp_path / "run")).encode("却说曹操龘"))
    tables = [table.splitlines()[: 3 + n + 1] for table in shown.split("\nlayer ")[1:]]
    assert len(tables) == 2 and all(table[3][0] == "却" and table[2 + n][0] == "龘" and table[-1][:4] == "mean" for table in tables)
    for row in (row for table in tables for row in table[2:]):
        assert sum(int(share) for share in re.findall(r"(\d+) ←", row)) == pytest.approx(100, abs=2) and row.count("*") == 1
    assert set(re.findall(r"←(\S+)", tables[0][2])) == {"0.0"}  # nothing stands before the beginning
    assert png.read_bytes().startswith(b"\x89PNG")
    call("train.py", "--data", small_data, "--out", tmp_path / "dense", *TINY, "--steps", 1, "--ffn", "dense")
    refused(call("eval.py", "--routing", tmp_path / "dense", ok=False), "has no causal Soft MoE (ffn dense")
    assert "it has no cache" not in call("eval.py", "--leak", tmp_path / "dense").stdout
    call("train.py", "--data", small_data, "--out", tmp_path / "seq", *TINY, "--steps", 1, "--dispatch", "sequence")
    verdict = call("eval.py", "--leak", tmp_path / "seq").stdout
    assert "it has no cache" in verdict and verdict.endswith("only the honest loss is one\n")
    refused(call("eval.py", "--png", "x.png", ok=False), "--png goes with --routing")
    refused(call("eval.py", "--routing", "--png", "x.foo", ok=False), "expected a name ending in .png")
