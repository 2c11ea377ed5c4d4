"""Hugging Face folders in and out, compared with transformers; and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import transformers
from conftest import TINY, call, python, refused
from test_model import SMALL, randomized, released_steel_layer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from checkpoint import load
from extras.huggingface import export_folder, load_folder
from model import Decoder
from plan import PRESETS
from sample import generate
from tokenizer import load_tokenizer

transformers.utils.logging.disable_progress_bar()

QWEN2 = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
QWEN2_MOE = QWEN2 | {
    "num_experts": 3,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 5,
}


def qwen2(**changes):
    """A random Qwen2 of transformers."""
    return randomized(Qwen2ForCausalLM(Qwen2Config(**(QWEN2 | changes))), std=0.3).eval()


def qwen3(**changes):
    """A random Qwen3 of transformers, whose heads are wider than hidden_size / num_attention_heads."""
    return randomized(Qwen3ForCausalLM(Qwen3Config(**(QWEN2 | {"head_dim": 10} | changes))), std=0.3).eval()


@torch.no_grad()
def qwen2_moe(**changes):
    """A random Qwen2-MoE of transformers, whose shared experts do nothing."""
    model = randomized(Qwen2MoeForCausalLM(Qwen2MoeConfig(**(QWEN2_MOE | changes))), std=0.3).eval()
    for layer in model.model.layers:
        layer.mlp.shared_expert.down_proj.weight.zero_()
    return model


def ours(**changes):
    """A random model of ours."""
    return randomized(Decoder(replace(SMALL, norm_eps=1e-5, rope_base=5000.0, **changes)), std=0.3)


def model_of(folder):
    """The model of a folder."""
    return load_folder(folder)[0]


def assert_close_logits(model, theirs, ids):
    logits = model(ids)
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-5 * logits.abs().max().item())


@torch.no_grad()
def assert_same_function(theirs, model):
    """Equal logits, and equal greedy text."""
    ids = torch.randint(50, (2, 40))
    assert_close_logits(model, theirs, ids)
    prompt = ids[:1, :5]
    greedy = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
    assert continued[0, 5:].tolist() == [new.item() for new in generate(model, prompt, 20, 50, temperature=0)]


def assert_same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


# ----------------------------------------------------------------------------------------------------------------------
# In


@pytest.mark.parametrize(
    "make, changes",
    [
        (qwen2, {}),
        (qwen2, {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
        (qwen3, {}),
        (qwen3, {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
        (qwen3, {"head_dim": 6}),
        (qwen2_moe, {}),
        (qwen2_moe, {"tie_word_embeddings": True, "norm_topk_prob": True, "shared_expert_intermediate_size": 0}),
    ],
    ids=["qwen2", "qwen2 tied", "qwen3", "qwen3 tied", "qwen3 narrow", "moe", "moe tied"],
)
def test_models_of_transformers_are_the_same_function_here_and_exported_again(make, changes, tmp_path):
    theirs = make(**changes)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    model, config_json = load_folder(tmp_path / "theirs")
    assert model.config.block_size == 64
    assert config_json == json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8"))
    assert_same_function(theirs, model)
    export_folder(model, tmp_path / "again", {}, {})
    assert_same_function(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_training_goes_on_from_a_qwen3_folder(small_data, tmp_path):
    tokenizer = load_tokenizer(small_data)
    theirs = qwen3(vocab_size=tokenizer.vocab_size)
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copy(small_data / tokenizer.FILE, tmp_path / "theirs")
    flags = ["--data", small_data, "--block-size", 32, "--micro-batch", 2, "--eval-tokens", 256, "--no-compile"]
    python("train.py", *flags, "--init-from", tmp_path / "theirs", "--out", tmp_path / "run", "--steps", 1, "--lr", 0)
    model = load(tmp_path / "run")[0]
    assert model.config == replace(model_of(tmp_path / "theirs").config, block_size=32)
    assert_same_bits(model, model_of(tmp_path / "theirs"))  # after a step of length 0
    ids = torch.randint(tokenizer.vocab_size, (2, 30))
    assert_close_logits(model, theirs, ids)


def test_layers_of_qwen3s_published_size_are_the_same_function(tmp_path):
    """Qwen3-0.6B, with two of its 28 layers and 50 ids."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    theirs = qwen3(
        **shape, head_dim=128, tie_word_embeddings=True, max_position_embeddings=40_960, rope_parameters=rope
    )
    for p in theirs.parameters():
        p.data *= 0.1 if p.ndim > 1 else 1  # of a size at which 1e-5 is a strict bound
    theirs.save_pretrained(tmp_path)
    model = model_of(tmp_path)
    preset = replace(PRESETS["qwen3-0.6b"], n_layer=2, vocab_size=50, block_size=40_960)
    assert model.config == preset
    assert_same_function(theirs, model)


@pytest.mark.parametrize("make", [qwen2, qwen3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_fp32(dtype, make, tmp_path):
    make().to(dtype).save_pretrained(tmp_path)
    model = model_of(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same_function(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), model)


def write_old_config(folder, **changes):
    """Rewrite config.json as transformers wrote it before version 5, with changes; None deletes a field."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config |= {"torch_dtype": config.pop("dtype", "float32"), "rope_theta": rope["rope_theta"]} | changes
    content = {name: value for name, value in config.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_fields_of_older_configs_are_understood(tmp_path):
    theirs = qwen2(num_key_value_heads=4)
    theirs.save_pretrained(tmp_path)
    write_old_config(tmp_path, num_key_value_heads=None, layer_types=None, use_mrope=False)
    assert_same_function(theirs, model_of(tmp_path))


class ReleasedSoftMoE(nn.Module):
    """Steel-LLM's layer as it was released, on a batch."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors

    def forward(self, x):
        return torch.stack([released_steel_layer(row, self.tensors) for row in x])


SWIGLU, SWIGLU2 = ["gate", "up", "down"], ["gate_up", "up", "gate_down", "down"]


@pytest.mark.parametrize("mlp_type, names", [("senet", SWIGLU2), ("raw", SWIGLU)])
@pytest.mark.parametrize("architecture", ["SteelForCausalLM", "Qwen2ForCausalLM"])  # as released; in the training code
@torch.no_grad()
def test_a_released_steel_model_is_the_same_function(mlp_type, names, architecture, tmp_path):
    theirs = qwen2(num_key_value_heads=4, intermediate_size=28)
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if ".mlp." not in name}
    for i, layer in enumerate(theirs.model.layers):
        own = {"phi": torch.randn(24, 3, 2), "scale": torch.tensor([3.0])}
        for e in range(3):
            shapes = {name: (24, 7) if "down" in name else (7, 24) for name in names}
            own |= {f"experts.{e}.{name}_proj.weight": torch.randn(shape) for name, shape in shapes.items()}
        layer.mlp = ReleasedSoftMoE(own)
        tensors |= {f"model.layers.{i}.mlp.{name}": tensor for name, tensor in own.items()}
    theirs.config.save_pretrained(tmp_path)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    write_old_config(
        tmp_path,
        architectures=[architecture],
        n_experts=3,
        slots_per_expert=2,
        mlp_div_ratio=4,
        FFN_type="softmoe_v3",
        mlp_type=mlp_type,
        auto_map={"AutoConfig": "x"},
        _attn_implementation="sdpa",
    )
    model = model_of(tmp_path)
    assert model.config.dispatch == "sequence"
    assert_close_logits(model, theirs, torch.randint(50, (2, 30)))


# ----------------------------------------------------------------------------------------------------------------------
# Out


THEIRS_TOO = [
    {"ffn": "dense"},
    {"ffn": "dense", "qk_norm": True},
    {"ffn": "dense", "qk_norm": True, "head_dim": 10},
    {"dispatch": "token", "router": "linear"},
]


@pytest.mark.parametrize("changes", THEIRS_TOO, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_can_express_is_the_same_function_there(changes, tied, tmp_path):
    model = ours(tie_embeddings=tied, **changes)
    export_folder(model, tmp_path / "out", {}, {"bos_token_id": 49, "eos_token_id": [49]})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.generation_config.eos_token_id = None
    assert_same_function(theirs, model)
    again = model_of(tmp_path / "out")
    if model.config.ffn == "dense":
        assert_same_bits(again, model)
    else:  # the factor of three experts rounds the down projections
        for p, q in zip(again.parameters(), model.parameters()):
            torch.testing.assert_close(p, q, rtol=2**-23, atol=0)


OURS_ONLY = [
    {},
    {"window": 1, "tie_embeddings": True},
    {"expert": "swiglu2", "slots_per_expert": 2},
    {"dispatch": "token"},
    {"dispatch": "token", "router": "linear", "slots_per_expert": 2},
    {"dispatch": "token", "router": "linear", "expert": "swiglu2"},
    {"dispatch": "token", "router": "linear", "reset_id": 0},
    {"router": "linear"},
    {"dispatch": "sequence"},
    {"ffn": "dense", "reset_id": 0},
    {"ffn": "dense", "head_dim": 10},
    {"qk_norm": True, "head_dim": 10},
    {"dispatch": "token", "router": "linear", "qk_norm": True},
    {"ffn": "dense", "value_embedding": True},
]


@pytest.mark.quick
@pytest.mark.parametrize("changes", OURS_ONLY, ids=str)
def test_what_transformers_cannot_express_comes_back_here_bit_for_bit(changes, tmp_path):
    model = ours(**changes)
    export_folder(model, tmp_path / "out", {}, {})
    again = model_of(tmp_path / "out")
    assert again.config == model.config
    assert_same_bits(again, model)
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_qwen2_moe_with_a_power_of_two_of_experts_comes_back_bit_for_bit(tmp_path):
    model = ours(dispatch="token", router="linear", n_expert=4)
    export_folder(model, tmp_path / "out", {}, {})
    assert_same_bits(model_of(tmp_path / "out"), model)


def test_the_cosine_router_is_not_linear():
    """Why dispatch = token with the cosine router is not exported as Qwen2-MoE: its logits ignore the length of x."""
    ffn = ours(dispatch="token").blocks[0].ffn
    x = torch.randn(1, 1, 24)
    torch.testing.assert_close(ffn.router_logits(2 * x), ffn.router_logits(x))


def test_an_export_fills_an_empty_folder_and_leaves_any_other_as_it_is(tmp_path):
    model, folder = ours(), tmp_path / "empty"
    folder.mkdir()
    export_folder(model, folder, {"tokenizer.model": b"..."}, {}, suppress=range(48, 50))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"suppress_tokens": [48, 49]}
    assert (folder / "tokenizer.model").read_bytes() == b"..."
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="empty exists and is not empty: name a new folder"):
        export_folder(model, folder, {}, {})
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "changes, architecture",
    [({"dispatch": "token", "router": "linear"}, "Qwen2MoeForCausalLM"), ({"ffn": "dense"}, "Qwen2ForCausalLM")],
)
def test_an_export_has_the_same_text_tokenizer_and_scores_in_transformers(changes, architecture, small_data, tmp_path):
    tokenizer = load_tokenizer(small_data)
    n_ids, source, exported = tokenizer.vocab_size, tmp_path / "a", tmp_path / "b"
    model = ours(vocab_size=n_ids + 5, block_size=32_768, **changes)
    export_folder(model, source, {tokenizer.FILE: tokenizer.content}, {})
    said = python("-m", "extras.export", source, "--export", exported).stdout
    assert said == f"exported: {source} -> {exported}, {architecture}\n"

    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert theirs.generation_config.eos_token_id == [tokenizer.eos_id, tokenizer.chat_end_id]
    assert theirs.generation_config.suppress_tokens == list(range(n_ids, n_ids + 5))
    assert their_tokenizer("却说曹操 a").input_ids == tokenizer.encode("却说曹操 a")
    prompt = their_tokenizer("却说", return_tensors="pt")
    ids = theirs.generate(**prompt, do_sample=False, max_new_tokens=10)[0]
    flags = ("--prompt", "却说", "--temperature", 0, "--max-new-tokens", 10)
    said = call("sample.py", exported, *flags).stdout
    assert said.partition("\n")[2] == their_tokenizer.decode(ids) + "\n"

    (tmp_path / "text.txt").write_bytes("却说\r\n".encode())
    scored = call("eval.py", exported, "--text", tmp_path / "text.txt").stdout.splitlines()[1].split()
    assert scored[0] == str(exported) and int(scored[4]) == len(tokenizer.encode("却说\n"))
    assert call("eval.py", exported, "--data", small_data).stdout.count("\n") == 2


def test_the_command_refuses_what_it_cannot_write_or_read(small_data, tmp_path):
    tokenizer = load_tokenizer(small_data)
    files = {tokenizer.FILE: tokenizer.content}
    for name, vocab_size in (("a", tokenizer.vocab_size), ("small", 100)):
        export_folder(ours(vocab_size=vocab_size), tmp_path / name, files, {})
    (tmp_path / "file").touch()
    refused(call("extras.export", tmp_path / "a", "--export", tmp_path / "small", ok=False), "small", "not empty")
    inside_file = call("extras.export", tmp_path / "a", "--export", tmp_path / "file" / "x", ok=False)
    refused(inside_file, "--export", "Not a directory")
    refused(call("eval.py", tmp_path / "a", ok=False), tmp_path / "a", "give --data, --text or --task")
    refused(call("sample.py", tmp_path / "small", ok=False), "has 4000 ids, the model beside it 100")


def test_an_export_with_its_own_code_says_so_and_samples_the_same_text(small_data, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    call("train.py", "--data", small_data, "--out", run, *TINY, "--steps", 2)
    said = call("extras.export", run, "--export", out).stdout
    assert "NanoSteelForCausalLM\ntransformers runs this model by the code in the folder: from_pretrained" in said
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{load(run)[0].n_params():,} parameters" in card and "512 tokens of" in card and "| all | " in card
    texts = [call("sample.py", path, "--temperature", 0).stdout.partition("\n")[2] for path in (run, out)]
    assert texts[0] == texts[1]

    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    model, _, info = load(out)
    assert config["chat"] is False and not info.chat and info.eos_first
    assert_same_bits(model, load(run)[0])
    (out / "config.json").write_text(json.dumps(config | {"chat": True}), encoding="utf-8")
    assert load(out)[2].chat


def test_training_starts_from_a_folder(small_data, tmp_path):
    tokenizer = load_tokenizer(small_data)
    config = replace(SMALL, vocab_size=tokenizer.vocab_size, ffn="dense", n_expert=1, d_expert=16)
    model = randomized(Decoder(config), std=0.1)
    export_folder(model, tmp_path / "a", {tokenizer.FILE: tokenizer.content}, {})
    shape = "--n-layer 2 --d-model 24 --n-kv-head 2 --ffn dense --n-expert 1 --d-expert 16".split()
    short = "--block-size 32 --micro-batch 2 --eval-tokens 64 --steps 1 --lr 1e-30 --no-compile".split()
    call("train.py", "--data", small_data, "--out", tmp_path / "run", "--init-from", tmp_path / "a", *shape, *short)
    assert_same_bits(load(tmp_path / "run")[0], model)


# ----------------------------------------------------------------------------------------------------------------------
# Folders that are refused


def change_json(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


def change_tensors(folder, changes):
    """Replace, add or (None) delete tensors."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors") | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def refusal_of(folder):
    """The one line that a folder is refused with."""
    with pytest.raises(ValueError) as refusal:
        load_folder(folder)
    line = str(refusal.value)
    assert "\n" not in line
    return line


WRONG_CONFIG = [  # a change to the config.json of a Qwen2-MoE; words of the line that refuses it
    ({"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM"),
    ({"architectures": None}, "architecture None, expected one of"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type = 'yarn'"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_theta = None, expected float"),
    ({"head_dim": 8}, "head_dim = 8"),
    ({"hidden_size": "24"}, "hidden_size = '24', expected int"),
    (
        {"num_attention_heads": 5, "num_key_value_heads": 5},
        "head_dim, or d_model / n_head, is 4.8, expected an even number",
    ),
    ({"num_attention_heads": 0}, "n_head = 0, expected a positive number"),
    ({"qkv_bias": False}, "qkv_bias = False"),
    ({"num_experts_per_tok": 2}, "num_experts_per_tok = 2, expected 3"),
    ({"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ({"partial_rotary_factor": 0.5, "new_thing": 1}, "unknown new_thing, partial_rotary_factor"),
    (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantised (quantization_config, gptq): use the folder",
    ),
    ({"quantization_config": {"bits": 4}}, "quantised (quantization_config, of an unknown kind)"),
    ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling"),
    (
        {"num_experts": 4, "num_experts_per_tok": 4},
        "model.layers.0.mlp.experts.3.gate_proj.weight is missing",
    ),
    ({"FFN_type": "softmoe_v2"}, "FFN_type = 'softmoe_v2'"),
]
WRONG_QWEN3 = [  # the same for a Qwen3
    ({"attention_bias": True}, "attention_bias = True, expected False"),
    ({"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window = True"),
    ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type = 'yarn'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised (quantization_config, awq)"),
    ({"head_dim": 9}, "head_dim, or d_model / n_head, is 9, expected an even number"),
    ({"head_dim": 12}, "model.layers.0.self_attn.k_norm.weight is [10], expected [12]"),
]
BIAS = "model.layers.0.self_attn.q_proj.bias"
SHARED = "model.layers.1.mlp.shared_expert.down_proj.weight"
WRONG_TENSORS = [  # the same for its tensors
    ({BIAS: None}, f"{BIAS} is missing"),
    ({BIAS: torch.zeros(23)}, f"{BIAS} is [23], expected [24]"),
    ({"rotary.inv_freq": torch.zeros(3)}, "rotary.inv_freq is not in this architecture"),
    ({SHARED: torch.full((24, 5), 0.1)}, f"{SHARED} is not zero"),
]


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    qwen2_moe().save_pretrained(folder)
    return folder


@pytest.mark.quick
@pytest.mark.parametrize("changes, words", WRONG_CONFIG, ids=[words for _, words in WRONG_CONFIG])
def test_a_config_that_cannot_be_represented_is_refused_by_field(changes, words, moe_folder, tmp_path):
    folder = shutil.copytree(moe_folder, tmp_path / "moe")
    change_json(folder / "config.json", **changes)
    line = refusal_of(folder)
    assert line.startswith(str(folder)) and words in line


@pytest.mark.quick
@pytest.mark.parametrize("changes, words", WRONG_QWEN3, ids=[words for _, words in WRONG_QWEN3])
def test_what_cannot_be_represented_of_a_qwen3_is_refused_by_name(changes, words, tmp_path):
    qwen3().save_pretrained(tmp_path / "qwen3")
    change_json(tmp_path / "qwen3" / "config.json", **changes)
    assert words in refusal_of(tmp_path / "qwen3")


@pytest.mark.quick
@pytest.mark.parametrize("changes, words", WRONG_TENSORS, ids=[words for _, words in WRONG_TENSORS])
def test_tensors_of_another_model_are_refused_by_name(changes, words, moe_folder, tmp_path):
    folder = shutil.copytree(moe_folder, tmp_path / "moe")
    change_tensors(folder, changes)
    line = refusal_of(folder)
    assert line.startswith(str(folder)) and words in line


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_named_though_their_config_is_silent(dtype, moe_folder, tmp_path):
    folder = shutil.copytree(moe_folder, tmp_path / "moe")
    name = "model.layers.0.self_attn.q_proj.weight"
    change_tensors(folder, {name: torch.zeros(24, 24).to(dtype)})
    line = refusal_of(folder)
    assert f"{name} has dtype" in line and "quantised weights: use the folder of the model" in line
    assert "download" not in line


@pytest.mark.quick
def test_an_adapter_is_refused_by_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"is an adapter \(LoRA\), not a model: merge it"):
        load(tmp_path)


def test_a_head_beside_tied_embeddings_is_read_if_it_is_the_embedding(tmp_path):
    model = qwen2(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    embedding = model.model.embed_tokens.weight.detach().clone()
    change_tensors(tmp_path, {"lm_head.weight": embedding})
    for rope in (None, {"rope_type": "default"}, {"type": "default"}):
        change_json(tmp_path / "config.json", rope_scaling=rope)
        ours_now = load_folder(tmp_path)[0]
        assert ours_now.config.tie_embeddings and torch.equal(ours_now.embedding, embedding)
    change_tensors(tmp_path, {"lm_head.weight": embedding + 1})
    assert "lm_head.weight is not the embedding, although tie_word_embeddings is true" in refusal_of(tmp_path)


def test_a_whole_file_beside_an_index_is_what_transformers_reads(tmp_path):
    from transformers import AutoModelForCausalLM

    model = qwen2()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(0.5)  # fine-tuned, and saved as one file by another program
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).model.embed_tokens.weight
    assert torch.equal(load_folder(tmp_path)[0].embedding, theirs) and (theirs == 0.5).all()


def test_our_own_config_with_a_field_too_many_is_refused(tmp_path):
    export_folder(ours(), tmp_path / "out", {}, {})
    change_json(tmp_path / "out" / "config.json", n_layers=3)
    assert "config.json: unknown n_layers" in refusal_of(tmp_path / "out")


def test_safetensors_files_that_do_not_match_their_index_are_refused(tmp_path):
    whole = tmp_path / "whole"
    qwen2().save_pretrained(whole, max_shard_size="10KB")
    index_name = "model.safetensors.index.json"
    index = json.loads((whole / index_name).read_text(encoding="utf-8"))["weight_map"]
    first = min(index.values())

    def line_after(change):
        folder = shutil.copytree(whole, tmp_path / "damaged", dirs_exist_ok=True)
        change(folder)
        return refusal_of(folder)

    def set_index(value):
        return lambda folder: change_json(folder / index_name, weight_map=value)

    def duplicate_without_index(folder):
        (folder / index_name).unlink()
        shutil.copy(folder / first, folder / "z.safetensors")

    def pickle_instead(folder):
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        torch.save({}, folder / "pytorch_model.bin")

    assert f"{first}: No such file" in line_after(lambda folder: (folder / first).unlink())
    for outside in ("../whole/" + first, str(whole / first), "..", 7):
        assert "in the same folder" in line_after(set_index(index | {"lm_head.weight": outside}))
    assert "expected a weight_map" in line_after(set_index(None))
    assert "no *.safetensors" in line_after(set_index({}))
    without_head = {name: file for name, file in index.items() if name != "lm_head.weight"}
    assert "lm_head.weight is in no file, it is in" in line_after(set_index(without_head))
    assert f"extra is in {first}, it is in no file" in line_after(set_index(index | {"extra": first}))
    assert "is not a JSON object" in line_after(lambda folder: (folder / index_name).write_bytes(b"{"))
    assert f"is in {first} and in z.safetensors" in line_after(duplicate_without_index)
    assert "no *.safetensors" in line_after(pickle_instead)
