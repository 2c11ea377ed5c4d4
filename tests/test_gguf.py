"""GGUF files, read back by the package gguf, and run by llama.cpp (python -m pytest -m slow tests/test_gguf.py)."""

import gguf
import pytest
import torch
from conftest import TINY, call, refused
from test_model import randomized

from checkpoint import Info
from corpus.default import fetch_qwen
from extras.gguf_file import export_gguf
from extras.huggingface import architecture, hugging_face_tensors
from extras.transformers_tokenizer import CHAT_TEMPLATE
from model import Config, Decoder
from sample import generate
from tokenizer import load_tokenizer

KINDS = [
    {},
    {"qk_norm": True, "head_dim": 24},
    {"tie_embeddings": True, "n_kv_head": 2},
]
TEXTS = ["却说曹操", "玄德曰：", "x = 1\n\n    return x", "1998年，  hello world's", "①😀 it's <|im_end|> ②"]


def exported(tokenizer, path, **changes):
    rows = tokenizer.embedding_rows
    config = Config(n_layer=2, d_model=64, ffn="dense", vocab_size=rows, block_size=256, **changes)
    model = randomized(Decoder(config), std=0.15)
    export_gguf(model, tokenizer, Info(path, eos_first=True), path)
    return model


def field(reader, name):
    return reader.fields[name].contents()


@pytest.mark.parametrize("which, changes", [("qwen", KINDS[1]), *(("ours", kind) for kind in KINDS)], ids=str)
def test_tensors_sizes_and_tokens_are_all_in_the_file(which, changes, small_data, tmp_path):
    tokenizer = load_tokenizer(small_data if which == "ours" else fetch_qwen())
    model = exported(tokenizer, tmp_path / "a.gguf", **changes)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    kind = "qwen3" if changes.get("qk_norm") else "qwen2"
    config = model.config
    expected = {
        "general.architecture": kind,
        f"{kind}.block_count": 2,
        f"{kind}.context_length": 256,
        f"{kind}.embedding_length": 64,
        f"{kind}.feed_forward_length": config.d_dense,
        f"{kind}.attention.head_count": 4,
        f"{kind}.attention.head_count_kv": config.n_kv_head,
        f"{kind}.attention.key_length": config.head_width,
        f"{kind}.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "llama" if which == "ours" else "gpt2",
        "tokenizer.ggml.bos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.eot_token_id": tokenizer.chat_end_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {name: field(reader, name) for name in expected} == expected
    tokens, types = (field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    assert len(tokens) == len(types) == tokenizer.vocab_size and len(set(tokens)) == len(tokens)
    assert [tokens[i] for i, kind in enumerate(types) if kind == 3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    tensors = dict(hugging_face_tensors(model, architecture(config)))
    assert len(found) == len(tensors) and ("output.weight" in found) == (not config.tie_embeddings)
    for name, tensor in tensors.items():
        with_id = tensor[: tokenizer.vocab_size] if "embed" in name or "head" in name else tensor
        assert torch.equal(found[names.get_name(name, try_suffixes=(".weight", ".bias"))], with_id), name
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_the_command_writes_dense_models_alone(small_data, tmp_path):
    for name, flags in (("dense", ["--ffn", "dense"]), ("moe", []), ("apart", ["--ffn", "dense", "--reset-at-eos"])):
        call("train.py", "--data", small_data, "--out", tmp_path / name, *TINY, "--steps", 1, *flags)
    said = call("extras.export", tmp_path / "dense", "--export-gguf", tmp_path / "a.gguf").stdout
    assert said.endswith("a.gguf, Qwen2ForCausalLM\n") and (tmp_path / "a.gguf").stat().st_size > 100_000
    moe = call("extras.export", tmp_path / "moe", "--export-gguf", tmp_path / "b.gguf", ok=False)
    refused(moe, "b.gguf: llama.cpp has no Soft MoE: train with --ffn dense")
    apart = call("extras.export", tmp_path / "apart", "--export-gguf", tmp_path / "b.gguf", ok=False)
    refused(apart, "must do without --reset-at-eos")
    nowhere = call("extras.export", tmp_path / "dense", "--export-gguf", tmp_path / "no" / "b.gguf", ok=False)
    refused(nowhere, "b.gguf: no folder")
    refused(call("extras.export", tmp_path / "dense", ok=False), "--export DIR or --export-gguf FILE")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["ours", "qwen"])
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_llama_cpp_has_our_ids_and_our_greedy_text(changes, which, small_data, tmp_path):
    """Needs llama-cpp-python, which pip builds in ten minutes."""
    from llama_cpp import Llama

    tokenizer = load_tokenizer(small_data if which == "ours" else fetch_qwen())
    model = exported(tokenizer, tmp_path / "a.gguf", **changes)
    theirs = Llama(str(tmp_path / "a.gguf"), n_ctx=256, verbose=False)
    for text in TEXTS:
        ids = theirs.tokenize(text.encode("utf-8"), add_bos=True, special=False)
        assert ids == [tokenizer.eos_id, *tokenizer.encode(text)]
        expected = generate(model, torch.tensor([ids]), 40, tokenizer.vocab_size, temperature=0)
        theirs.reset()
        for new, ours in zip(theirs.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0), expected):
            assert new == ours.item()
