"""Evaluation: loss and bits per byte against a direct computation, the leak, the command."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, refused
from test_model import CAUSAL_KINDS, small

from data import TokenData
from eval import TASKS, data_of, evaluate, leak, text_samples
from extras import benchmarks
from extras.noise import noise_loss
from model import Config
from tokenizer import load_tokenizer


@torch.no_grad()
def test_loss_and_bits_per_byte_of_a_text(small_data, tmp_path):
    tokenizer = load_tokenizer(small_data)
    model = small(torch.float32, vocab_size=tokenizer.vocab_size)
    text = "话说天下大势，分久必合，合久必分。\n周末七国分争，并入于秦。𠀀" * 3
    (tmp_path / "text").write_text(text, encoding="utf-8")
    T = 16
    samples = text_samples(tmp_path / "text", tokenizer, T)
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    assert np.concatenate([sample[1:] for sample in samples]).tolist()[: len(ids) - 1] == ids[1:]

    nats = 0.0  # each token once, from what comes before it in its sample
    for i in range(1, len(ids)):
        start = (i - 1) // T * T
        nats -= model(torch.tensor([ids[start:i]]))[0, -1].double().log_softmax(0)[ids[i]].item()
    for batch_tokens in (1, 32, 4096):
        result = evaluate(model, samples, tokenizer.token_bytes, batch_tokens=batch_tokens)
        assert result["tokens"] == len(ids) - 1
        assert result["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
        assert result["bpb"] == pytest.approx(nats / math.log(2) / len(text.encode("utf-8")), abs=1e-5)


@pytest.mark.quick
def test_of_too_many_samples_evenly_spaced_ones_are_scored():
    model = small(torch.float32, vocab_size=100)
    samples = [np.random.default_rng(i).integers(0, 100, 17) for i in range(50)]
    token_bytes = [b"x"] * 100
    some = evaluate(model, samples, token_bytes, max_tokens=160)
    assert some["tokens"] == 160
    chosen = [samples[round(i * 49 / 9 - 0.499)] for i in range(10)]
    assert some["loss"] == pytest.approx(evaluate(model, chosen, token_bytes)["loss"], abs=1e-6)
    nothing = evaluate(model, [np.array([1, -1, -1])], token_bytes)  # like a chat's question without its answer
    assert math.isnan(nothing["loss"]) and nothing["tokens"] == 0


@pytest.mark.quick
def test_stopping_ends_an_evaluation_and_restores_the_mode():
    model, answers = small(torch.float32).train(), iter([False, True])
    samples = [np.arange(9) for _ in range(4)]
    assert evaluate(model, samples, [b"x"] * 50, batch_tokens=8, stopping=lambda: next(answers)) is None
    assert model.training


@pytest.mark.quick
@pytest.mark.parametrize("changes", CAUSAL_KINDS, ids=str)
def test_three_ways_to_score_a_causal_model_agree(changes):
    model, ids = small(torch.float32, **changes), torch.randint(50, (3, 21))
    ids[1, 17:] = -1  # the end of a text
    result = leak(model, ids)
    samples = [row.numpy() for row in ids]
    assert result["teacher-forced"] == pytest.approx(evaluate(model, samples, [b"x"] * 50)["loss"], abs=1e-5)
    assert result["honest"] == pytest.approx(result["teacher-forced"], abs=1e-4)
    assert result["cached"] == pytest.approx(result["teacher-forced"], abs=1e-4)


@pytest.mark.quick
def test_three_ways_to_score_the_sequence_layer_do_not_agree():
    model, ids = small(torch.float32, dispatch="sequence"), torch.randint(50, (3, 21))
    result = leak(model, ids)
    assert abs(result["honest"] - result["teacher-forced"]) > 1e-3 and result["cached"] is None
    nats = 0.0  # the honest loss of one text, computed directly
    for t in range(1, 21):
        nats -= model(ids[:1, :t])[0, -1].double().log_softmax(0)[ids[0, t]].item()
    assert leak(model, ids[:1])["honest"] == pytest.approx(nats / 20, abs=1e-5)


@pytest.mark.parametrize("dispatch, leaks", [("causal", False), ("token", False), ("sequence", True)])
def test_only_the_sequence_layer_predicts_noise(dispatch, leaks):
    sizes = dict(n_layer=2, d_model=32, vocab_size=6, block_size=8, n_expert=4, slots_per_expert=2)
    loss = noise_loss(Config(**sizes, dispatch=dispatch), steps=120, batch_tokens=512)
    if leaks:
        assert loss < 1.6  # ln 6 = 1.79
    else:
        assert math.log(6) - 0.005 < loss < math.log(6) + 0.05


@torch.no_grad()
def test_each_source_and_language_is_scored_as_by_itself(small_data, tmp_path):
    (tmp_path / "c.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8") * 3, encoding="utf-8")
    shutil.copytree(small_data, tmp_path / "data")
    call("prepare.py", tmp_path / "c.txt", "--out", tmp_path / "data", "--pipeline", "none")
    tokenizer, samples = load_tokenizer(small_data), TokenData(tmp_path / "data", "train", 16)
    model = small(torch.float32, vocab_size=tokenizer.vocab_size)
    result = evaluate(model, samples, tokenizer.token_bytes)
    rows = {name: [] for name in ("a zh", "b zh", "c en")}
    for i, row in enumerate(samples[i] for i in range(len(samples))):
        rows[samples.source_of(i)].append(row)
    assert list(result["by"]) == [*rows, "zh"]
    for name, of_source in rows.items():
        expected = evaluate(model, of_source, tokenizer.token_bytes)
        assert result["by"][name] == pytest.approx({key: expected[key] for key in result["by"][name]}, rel=1e-5)
    expected = evaluate(model, [*rows["a zh"], *rows["b zh"]], tokenizer.token_bytes)
    assert result["by"]["zh"]["bpb"] == pytest.approx(expected["bpb"], rel=1e-5)


def test_the_command(small_data, tmp_path):
    flags = (*TINY, "--steps", 2, "--save-every", 1)
    trained = call("train.py", "--data", small_data, "--out", tmp_path / "run", *flags)
    result = call("eval.py", tmp_path / "run", tmp_path / "run" / "step-00000001").stdout.splitlines()
    newest, older = result[1].split(), result[4].split()
    assert [line.split()[0] for line in result[2:4]] == ["a", "b"]  # the sources of the held-out text
    assert newest[0].endswith("step-00000002") and older[0].endswith("step-00000001")
    assert f"val loss {newest[1]}, val bpb {newest[3]}," in trained.stdout  # one function, one number
    (tmp_path / "my.txt").write_text("话说天下大势，分久必合。", encoding="utf-8")
    assert len(call("eval.py", tmp_path / "run", "--text", tmp_path / "my.txt").stdout.splitlines()) == 2
    (tmp_path / "other.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    call("prepare.py", tmp_path / "other.txt", "--out", tmp_path / "other", "--vocab-size", 700)
    result = call("eval.py", tmp_path / "run", "--data", tmp_path / "other", ok=False)
    refused(result, "prepared with another tokenizer")
    for name, content, problem in (
        ("empty.txt", b"", "empty.txt is empty"),
        ("bad.txt", b"\xff", "bad.txt is not UTF-8 (byte 0)"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(call("eval.py", tmp_path / "run", "--text", tmp_path / name, ok=False), problem)


def test_the_leak_of_a_checkpoint(small_data, tmp_path):
    def leak_of(name, *flags):
        call("train.py", "--data", small_data, "--out", tmp_path / name, *TINY, "--steps", 2, *flags)
        return call("eval.py", "--leak", tmp_path / name).stdout

    lines = leak_of("run").splitlines()
    assert lines[-1].startswith("they agree to")
    nats = [float(line.split()[1]) for line in lines[2:5]]
    assert max(nats) - min(nats) < 1e-4
    assert "it has no cache" not in leak_of("dense", "--ffn", "dense")
    verdict = leak_of("seq", "--dispatch", "sequence")
    assert "it has no cache" in verdict and verdict.endswith("only the honest loss is one\n")
    scored = call("eval.py", tmp_path / "seq").stdout
    assert "leaky: it reads what it predicts; honest" in scored


@pytest.mark.quick
def test_flags_that_do_not_go_together_are_refused(tmp_path):
    refused(call("eval.py", "--png", "x.png", ok=False), "--png goes with --routing")
    refused(call("eval.py", "--routing", "--png", "x.foo", ok=False), "expected a name ending in .png")
    refused(call("eval.py", "--out", "x.jsonl", ok=False), "--out goes with --task")
    refused(call("eval.py", "--noise", "--text", "x", ok=False), "leave everything else out")
    refused(call("eval.py", "--routing", "--data", "x", ok=False), "leave --data and --text out")
    with pytest.raises(ValueError, match="has no state.json.*--data, --text or --task"):
        data_of(SimpleNamespace(path=tmp_path, state={}))
    assert TASKS == tuple(benchmarks.TASKS)
