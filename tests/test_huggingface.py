"""Weights in and out, held against transformers and the safetensors package; what is refused, and with which line."""

import json
import math
import random
import shutil
import struct
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import transformers
from conftest import TINY, call, python, refused
from test_model import SMALL, randomized, released_steel_layer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from model import Decoder
from sample import generate, trained_to_chat
from tokenizer import load_tokenizer
from weights import export, read_safetensors, write_safetensors

transformers.utils.logging.disable_progress_bar()
QWEN2 = dict(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)  # fmt: skip
MOE = dict(QWEN2, num_experts=3, num_experts_per_tok=3, moe_intermediate_size=8, shared_expert_intermediate_size=5)
SHARED = "model.layers.1.mlp.shared_expert.down_proj.weight"


def qwen2(**changes):
    return randomized(Qwen2ForCausalLM(Qwen2Config(**(QWEN2 | changes))), std=0.3).eval()


@torch.no_grad()
def qwen2_moe(**changes):
    model = randomized(Qwen2MoeForCausalLM(Qwen2MoeConfig(**(MOE | changes))), std=0.3).eval()
    for layer in model.model.layers:
        layer.mlp.shared_expert.down_proj.weight.zero_()
    return model


def ours(**changes):
    return randomized(Decoder(replace(SMALL, norm_eps=1e-5, rope_base=5000.0, **changes)), std=0.3)


@torch.no_grad()
def same_function(theirs, model):
    """Equal logits, and equal greedy text."""
    ids = torch.randint(50, (2, 40))
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5 * model(ids).abs().max().item())
    prompt = ids[:1, :5]
    continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert continued[0, 5:].tolist() == [new.item() for new in generate(model, prompt, 20, 50, temperature=0)]


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


# --- in


@pytest.mark.parametrize(
    "theirs",
    [
        lambda: qwen2(),
        lambda: qwen2(tie_word_embeddings=True, num_key_value_heads=4, rms_norm_eps=1e-5),
        lambda: qwen2_moe(),
        lambda: qwen2_moe(tie_word_embeddings=True, norm_topk_prob=True, shared_expert_intermediate_size=0),
    ],
    ids=["qwen2", "qwen2 tied", "moe", "moe tied"],
)  # fmt: skip
def test_models_of_transformers_are_the_same_function_here_and_there_again(theirs, tmp_path):
    theirs = theirs()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    model = Decoder.load(tmp_path / "theirs")
    assert model.checkpoint == tmp_path / "theirs" and model.config.block_size == 64
    same_function(theirs, model)
    export(model, tmp_path / "again", {}, {})
    same_function(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_fp32(dtype, tmp_path):
    qwen2().to(dtype).save_pretrained(tmp_path)
    model = Decoder.load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    same_function(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), model)


def old_config(folder, **changes):
    """config.json as transformers wrote it before version 5, changed; None deletes a field."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"torch_dtype": config.pop("dtype", "float32"), "rope_theta": config.pop("rope_parameters")["rope_theta"]} | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}), encoding="utf-8")


def test_the_fields_of_older_configs_are_understood(tmp_path):
    theirs = qwen2(num_key_value_heads=4)
    theirs.save_pretrained(tmp_path)
    old_config(tmp_path, num_key_value_heads=None, layer_types=None, use_mrope=False)
    same_function(theirs, Decoder.load(tmp_path))


class ReleasedSoftMoE(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors

    def forward(self, x):
        return torch.stack([released_steel_layer(row, self.tensors) for row in x])


@pytest.mark.parametrize("mlp_type, names", [("senet", ["gate_up", "up", "gate_down", "down"]), ("raw", ["gate", "up", "down"])])
@pytest.mark.parametrize("architecture", ["SteelForCausalLM", "Qwen2ForCausalLM"])  # released; in the training code
@torch.no_grad()
def test_a_released_steel_model_is_the_same_function(mlp_type, names, architecture, tmp_path):
    theirs = qwen2(num_key_value_heads=4, intermediate_size=28)
    trunk = {name: tensor for name, tensor in theirs.state_dict().items() if ".mlp." not in name}
    for i, layer in enumerate(theirs.model.layers):
        tensors = {"phi": torch.randn(24, 3, 2), "scale": torch.tensor([3.0])}
        for e in range(3):
            shapes = {name: (24, 7) if "down" in name else (7, 24) for name in names}
            tensors |= {f"experts.{e}.{name}_proj.weight": torch.randn(shape) for name, shape in shapes.items()}
        layer.mlp = ReleasedSoftMoE(tensors)
        trunk |= {f"model.layers.{i}.mlp.{name}": tensor for name, tensor in tensors.items()}
    theirs.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(trunk, tmp_path / "model.safetensors")
    old_config(
        tmp_path, architectures=[architecture], n_experts=3, slots_per_expert=2, mlp_div_ratio=4, FFN_type="softmoe_v3",
        mlp_type=mlp_type, auto_map={"AutoConfig": "x"}, _attn_implementation="sdpa",
    )  # fmt: skip
    model, ids = Decoder.load(tmp_path), torch.randint(50, (2, 30))
    assert model.config.dispatch == "sequence"
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5 * model(ids).abs().max().item())


# --- out


@pytest.mark.parametrize("changes", [dict(ffn="dense"), dict(dispatch="token", router="linear")], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_can_express_is_the_same_function_there(changes, tied, tmp_path):
    model = ours(tie_embeddings=tied, **changes)
    export(model, tmp_path / "out", {}, {"bos_token_id": 49, "eos_token_id": [49]})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.generation_config.eos_token_id = None
    same_function(theirs, model)
    again = Decoder.load(tmp_path / "out")
    if model.config.ffn == "dense":
        same_bits(again, model)
    else:  # what the factor of three experts rounds
        for p, q in zip(again.parameters(), model.parameters()):
            torch.testing.assert_close(p, q, rtol=2**-23, atol=0)


OWN = [
    dict(), dict(window=1, tie_embeddings=True), dict(expert="swiglu2", slots_per_expert=2), dict(dispatch="token"),
    dict(dispatch="token", router="linear", slots_per_expert=2), dict(dispatch="token", router="linear", expert="swiglu2"),
    dict(dispatch="token", router="linear", reset_id=0), dict(router="linear"), dict(dispatch="sequence"), dict(ffn="dense", reset_id=0),
]  # fmt: skip


@pytest.mark.parametrize("changes", OWN, ids=str)
def test_what_transformers_cannot_express_comes_back_here_bit_for_bit(changes, tmp_path):
    model = ours(**changes)
    export(model, tmp_path / "out", {}, {})
    again = Decoder.load(tmp_path / "out")
    assert again.config == model.config
    same_bits(again, model)
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_qwen2_moe_with_a_power_of_two_of_experts_comes_back_bit_for_bit(tmp_path):
    model = ours(dispatch="token", router="linear", n_expert=4)
    export(model, tmp_path / "out", {}, {})
    same_bits(Decoder.load(tmp_path / "out"), model)


def test_the_cosine_router_is_no_linear_one():
    """Why dispatch = token with the cosine router is not exported as Qwen2-MoE: its logits are not linear in x."""
    ffn = ours(dispatch="token").blocks[0].ffn
    x = torch.randn(1, 1, 24)
    torch.testing.assert_close(ffn.router_logits(2 * x), ffn.router_logits(x))


def test_a_folder_that_is_not_empty_is_refused_and_an_empty_one_filled(tmp_path):
    model = ours()
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty", {"tokenizer.model": b"..."}, {}, suppress=range(48, 50))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
    generation = json.loads((tmp_path / "empty" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"suppress_tokens": [48, 49]} and (tmp_path / "empty" / "tokenizer.model").read_bytes() == b"..."
    before = {path: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    with pytest.raises(SystemExit, match="empty is there and not empty: name a new folder"):
        export(model, tmp_path / "empty", {}, {})
    assert before == {path: path.read_bytes() for path in (tmp_path / "empty").iterdir()}


@pytest.mark.parametrize("changes, architecture", [
    (dict(dispatch="token", router="linear"), "Qwen2MoeForCausalLM"), (dict(ffn="dense"), "Qwen2ForCausalLM")
])  # fmt: skip
def test_the_command_exports_what_transformers_continues_alike_with_our_tokenizer(changes, architecture, small_data, tmp_path):
    tokenizer = load_tokenizer(small_data)
    model = ours(vocab_size=tokenizer.vocab_size + 5, block_size=32_768, **changes)
    export(model, tmp_path / "a", {tokenizer.FILE: tokenizer.content}, {})
    (tmp_path / "text.txt").write_bytes("却说\r\n".encode())
    assert f", {architecture}\n" in python("model.py", tmp_path / "a", "--export", tmp_path / "b").stdout
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "b"), AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs.generation_config.eos_token_id == [tokenizer.eos_id, tokenizer.chat_end_id]
    assert theirs.generation_config.suppress_tokens == list(range(tokenizer.vocab_size, tokenizer.vocab_size + 5))
    assert their_tokenizer("却说曹操 a").input_ids == tokenizer.encode("却说曹操 a")
    text = theirs.generate(**their_tokenizer("却说", return_tensors="pt", return_token_type_ids=False), do_sample=False, max_new_tokens=10)[0]
    flags = ("--prompt", "却说", "--temperature", 0, "--max-new-tokens", 10)
    assert their_tokenizer.decode(text) + "\n" == call("sample.py", tmp_path / "b", *flags).stdout.partition("\n")[2]
    scored = call("eval.py", tmp_path / "b", "--text", tmp_path / "text.txt").stdout.splitlines()[1].split()
    assert scored[0] == str(tmp_path / "b") and int(scored[4]) == len(tokenizer.encode("却说\r\n"))
    assert call("eval.py", tmp_path / "b", "--data", small_data).stdout.count("\n") == 2
    refused(call("eval.py", tmp_path / "b", ok=False), tmp_path / "b", "give --data, --text or --task")
    refused(call("weights.py", tmp_path / "a", "--export", tmp_path / "b", ok=False), tmp_path / "b", "not empty")
    refused(call("weights.py", tmp_path / "a", "--export", tmp_path / "text.txt" / "x", ok=False), "--export", "Not a directory")
    export(ours(vocab_size=100), tmp_path / "small", {tokenizer.FILE: tokenizer.content}, {})
    refused(call("sample.py", tmp_path / "small", ok=False), "has 4000 ids, the model beside it 100")


def test_what_only_this_program_reads_is_said_and_stays_as_it_was(small_data, tmp_path):
    call("train.py", "--data", small_data, "--out", tmp_path / "run", *TINY, "--steps", 2)
    said = call("weights.py", tmp_path / "run", "--export", tmp_path / "out").stdout
    assert "NanoSteelForCausalLM\nonly nanoSteel reads this folder" in said
    texts = [call("sample.py", tmp_path / name, "--temperature", 0).stdout.partition("\n")[2] for name in ("run", "out")]
    assert texts[0] == texts[1]
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["chat"] is False and not trained_to_chat(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"chat": True}), encoding="utf-8")
    assert trained_to_chat(tmp_path / "out") and same_bits(Decoder.load(tmp_path / "out"), Decoder.load(tmp_path / "run")) is None


# --- safetensors


def tensors_of_all_kinds():
    kinds = [torch.randn(3, 5).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
    shapes = {"轻": torch.randn(7, 2).T, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "odd": torch.randn(3).half()}
    return shapes | dict(zip("abcd", kinds))


def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path):
    tensors = tensors_of_all_kinds()
    write_safetensors(tmp_path / "ours", tensors)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"note": "x"})
    for got in (safetensors.torch.load_file(tmp_path / "ours"), read_safetensors(tmp_path / "ours"), read_safetensors(tmp_path / "theirs")):
        assert got.keys() == tensors.keys()
        assert all(got[name].dtype == tensor.dtype and torch.equal(got[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def file_of(header, data=b"\0" * 24, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(begin, end, shape=(3,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


A, B = {"a": entry(0, 12)}, {"b": entry(12, 24)}
DAMAGED = [
    (b"", "empty"),
    (b"\1\0\0", "the header ends at byte 9, the file at 3"),
    (file_of(A | B)[:30], "the header ends at byte"),
    (file_of(A | B, length=2**63), "the header ends at byte 9223372036854775816"),
    (file_of(b"{"), "Expecting property name"),
    (file_of(b"[" * 100_000), "nested too deeply"),
    (file_of(b"[]"), "no JSON object"),
    (file_of(b"\xff\xfe"), "can't decode"),
    (file_of(json.dumps(A)[:-1].encode() + b"," + json.dumps(A)[1:].encode()), "a is there twice"),
    (file_of(A | {"b": [1]}), "b lacks dtype, shape or data_offsets"),
    (file_of(A | {"b": {"dtype": "F32", "shape": [3]}}), "b lacks dtype"),
    (file_of(A | {"b": entry(12, 24, shape=(-3, -1))}), "b lacks dtype"),
    (file_of(A | {"b": entry(12, 24, shape=(True, 3))}), "b lacks dtype"),
    (file_of(A | {"b": entry(12, 24, dtype="Q4")}), "b has dtype Q4"),
    (file_of(A | {"b": entry(12, 24, shape=(4,))}), "b has 12 bytes, which is not [4] x F32"),
    (file_of(A | {"b": entry(24, 12)}), "b has -12 bytes"),
    (file_of(A | {"b": entry(8, 20)}), "b begins at byte 8 of the data, expected 12"),
    (file_of(A | {"b": entry(16, 28)}), "b begins at byte 16 of the data, expected 12"),
    (file_of(A | B, data=b"\0" * 23), "the tensors take 24 bytes, there are 23"),
    (file_of(A | B, data=b"\0" * 25), "the tensors take 24 bytes, there are 25"),
]  # fmt: skip


@pytest.mark.parametrize("content, words", DAMAGED, ids=[words for _, words in DAMAGED])
def test_a_damaged_file_is_refused_by_name(content, words, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as refusal:
        read_safetensors(path)
    line = str(refusal.value)
    assert line.startswith(f"{path} is not a whole safetensors file") and words in line and "\n" not in line


def test_no_truncated_or_changed_file_does_more_than_be_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors_of_all_kinds())
    whole, draw, survived = path.read_bytes(), random.Random(0), 0
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SystemExit):
            read_safetensors(path)
    for _ in range(400):
        changed = bytearray(whole)
        changed[draw.randrange(start)] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            for tensor in read_safetensors(path).values():
                assert tensor.nbytes == math.prod(tensor.shape) * tensor.element_size()
            survived += 1
        except SystemExit:
            pass
    assert survived  # a changed letter of a name is not damage that can be seen


# --- folders that are refused


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def change_tensors(folder, **changes):
    tensors = safetensors.torch.load_file(folder / "model.safetensors") | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


BIAS = "model.layers.0.self_attn.q_proj.bias"
REFUSED = [  # what is changed in the config.json of a Qwen2-MoE, or in its tensors; words of the line
    (dict(architectures=["LlamaForCausalLM"]), "architecture LlamaForCausalLM"),
    (dict(architectures=None), "architecture None, expected one of"),
    (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
    (dict(use_sliding_window=True), "use_sliding_window = True"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (dict(rope_scaling={"type": "yarn"}), "rope_scaling"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "rope_type = 'yarn'"),
    (dict(rope_parameters={"rope_type": "default"}), "rope_theta = None, expected float"),
    (dict(head_dim=8), "head_dim = 8"),
    (dict(hidden_size="24"), "hidden_size = '24', expected int"),
    (dict(num_attention_heads=5, num_key_value_heads=5), "d_model = 24 is not a multiple of 2 x n_head = 10"),
    (dict(num_attention_heads=0), "n_head = 0, expected a positive number"),
    (dict(qkv_bias=False), "qkv_bias = False"),
    (dict(num_experts_per_tok=2), "num_experts_per_tok = 2, expected 3"),
    (dict(mlp_only_layers=[0]), "mlp_only_layers = [0]"),
    (dict(decoder_sparse_step=2), "decoder_sparse_step = 2"),
    (dict(quantization_config={"bits": 4}, partial_rotary_factor=0.5), "unknown partial_rotary_factor, quantization_config"),
    (dict(num_experts=4, num_experts_per_tok=4), "model.layers.0.mlp.experts.3.gate_proj.weight is missing"),
    (dict(FFN_type="softmoe_v2"), "FFN_type = 'softmoe_v2'"),
    (dict(tensors={BIAS: None}), f"{BIAS} is missing"),
    (dict(tensors={BIAS: torch.zeros(23)}), f"{BIAS} is [23], expected [24]"),
    (dict(tensors={"rotary.inv_freq": torch.zeros(3)}), "rotary.inv_freq is not in this architecture"),
    (dict(tensors={SHARED: torch.full((24, 5), 0.1)}), f"{SHARED} is not zero"),
]  # fmt: skip


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    qwen2_moe().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes, words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_another_model_is_refused_by_name(changes, words, moe_folder, tmp_path):
    folder = shutil.copytree(moe_folder, tmp_path / "moe")
    tensors = changes.get("tensors", {})
    change_json(folder / "config.json", **{name: value for name, value in changes.items() if name != "tensors"})
    change_tensors(folder, **tensors)
    with pytest.raises(SystemExit) as refusal:
        Decoder.load(folder)
    line = str(refusal.value)
    assert line.startswith(str(folder)) and words in line and "\n" not in line


def test_a_config_of_ours_with_a_field_too_many_is_refused(tmp_path):
    export(ours(), tmp_path / "out", {}, {})
    change_json(tmp_path / "out" / "config.json", n_layers=3)
    with pytest.raises(SystemExit, match="config.json: unknown n_layers"):
        Decoder.load(tmp_path / "out")


def test_shards_that_do_not_fit_their_index_are_refused(tmp_path):
    qwen2().save_pretrained(tmp_path / "whole", max_shard_size="10KB")
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    shards = sorted(set(index.values()))

    def line(change):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / "damaged", dirs_exist_ok=True)
        change(folder)
        with pytest.raises(SystemExit) as refusal:
            Decoder.load(folder)
        return str(refusal.value)

    def weight_map(value):
        return lambda folder: change_json(folder / "model.safetensors.index.json", weight_map=value)

    assert f"{shards[0]}: No such file" in line(lambda folder: (folder / shards[0]).unlink())
    for outside in ("../whole/" + shards[0], str(tmp_path / "whole" / shards[0]), "..", 7):
        assert "in the same folder" in line(weight_map(index | {"lm_head.weight": outside}))
    assert "expected a weight_map" in line(weight_map(None))
    assert "lm_head.weight is in no file, it is in" in line(weight_map({k: v for k, v in index.items() if k != "lm_head.weight"}))
    assert f"extra is in {shards[0]}, it is in no file" in line(weight_map(index | {"extra": shards[0]}))
    assert "is not a JSON object" in line(lambda folder: (folder / "model.safetensors.index.json").write_bytes(b"{"))

    def twice(folder):
        (folder / "model.safetensors.index.json").unlink()
        shutil.copy(folder / shards[0], folder / "z.safetensors")

    assert f"is in {shards[0]} and in z.safetensors" in line(twice)

    def pickled(folder):
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        torch.save({}, folder / "pytorch_model.bin")

    assert "no *.safetensors" in line(pickled)


def test_training_starts_from_a_folder(small_data, tmp_path):
    tokenizer = load_tokenizer(small_data)
    model = randomized(Decoder(replace(SMALL, vocab_size=tokenizer.vocab_size, ffn="dense", n_expert=1, d_expert=16)), std=0.1)
    export(model, tmp_path / "a", {"tokenizer.model": tokenizer.path.read_bytes()}, {})
    flags = "--n-layer 2 --d-model 24 --n-kv-head 2 --block-size 32 --ffn dense --n-expert 1 --d-expert 16 --micro-batch 2 --eval-tokens 64"
    call("train.py", "--data", small_data, "--out", tmp_path / "run", "--init-from", tmp_path / "a", "--steps", 1, "--lr", 1e-30,
         "--no-compile", *flags.split())  # fmt: skip
    same_bits(Decoder.load(tmp_path / "run"), model)
