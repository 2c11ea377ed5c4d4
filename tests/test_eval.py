"""Evaluation: loss and bits per byte against a direct computation, and the command."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, refused
from test_model import small

from eval import evaluate, text_blocks
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
