"""Hugging Face folders (config.json + *.safetensors), read and written.

    model, config_json = load_folder("Qwen1.5-0.5B")     # checkpoint.load() calls this for such a folder
    export_folder(model, "out/demo-hf", ...)             # python -m extras.export calls this for a checkpoint

    architecture             in Config
    Qwen2ForCausalLM         ffn = dense
    Qwen3ForCausalLM         ffn = dense, qk_norm
    Qwen2MoeForCausalLM      dispatch = token, router = linear, expert = swiglu: every token goes to every expert
    SteelForCausalLM         dispatch = sequence: the layer as Steel-LLM released it; read only
    NanoSteelForCausalLM     everything else: config.json holds our Config, and the folder the code that computes it

A folder is either represented exactly or refused: no field of config.json and no tensor is ignored silently.
"""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch

from extras.safetensors_io import read_json, read_safetensors, write_safetensors
from model import Config, Decoder

QWEN2, QWEN3, QWEN2_MOE = "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM"
STEEL, OWN = "SteelForCausalLM", "NanoSteelForCausalLM"
CODE = [Path(__file__).parent / "modeling_nanosteel.py", Path(__file__).parent.parent / "model.py"]

# ----------------------------------------------------------------------------------------------------------------------
# config.json

FIELDS = {  # their name -> ours
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "max_position_embeddings": "block_size",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
    "tie_word_embeddings": "tie_embeddings",
}
FIXED = {  # these change what the model computes, and Config has only this value; a missing field or null means it too
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_scaling": None,
    "rope_type": "default",
    "use_mrope": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# These do not change what the model computes: names, settings of training and sampling, sizes of windows and dense
# layers that are not in use. norm_topk_prob is one of them, as the weights of all experts together sum to 1 anyway.
IGNORED = set(
    """
    architectures auto_map model_type _name_or_path transformers_version torch_dtype dtype _attn_implementation
    use_cache initializer_range attention_dropout output_router_logits router_aux_loss_coef
    bos_token_id eos_token_id pad_token_id sliding_window max_window_layers intermediate_size norm_topk_prob
    chat eos_first
    """.split()
)


def architecture(config):
    """The architecture whose forward is exactly that of this Config."""
    if config.reset_id >= 0 or config.value_embedding:  # transformers' attention has neither
        return OWN
    if config.ffn == "dense":
        return QWEN3 if config.qk_norm else OWN if config.head_dim else QWEN2
    if config.qk_norm or config.head_dim:
        return OWN
    moe = (config.dispatch, config.router, config.expert, config.slots_per_expert)
    return QWEN2_MOE if moe == ("token", "linear", "swiglu", 1) else OWN


class ConfigFields:
    """The fields of a config.json. Each is removed as it is read, so that what remains at the end is unknown."""

    def __init__(self, path, values):
        self.path, self.values = path, dict(values)

    def refuse(self, problem):
        raise ValueError(f"{self.path}: {problem}")

    def take(self, name, kind, default=None):
        """The value of a field, which must be of type `kind`; a missing field or null is the default."""
        value = self.values.pop(name, None)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.refuse(f"{name} = {value!r}, expected {kind.__name__}")
        return value

    def require(self, name, value):
        """Refuse any value but this one; a missing field or null is fine."""
        given = self.values.pop(name, None)
        if given not in (None, value):
            self.refuse(f"{name} = {given!r}, expected {value!r}: another cannot be represented")

    def merge_rope_parameters(self):
        """Version 5 of transformers keeps rope_theta in a dict of its own; earlier ones do not."""
        rope = self.take("rope_parameters", dict, {})
        if conflicts := [name for name in rope if self.values.get(name, rope[name]) != rope[name]]:
            self.refuse(f"rope_parameters has another {', '.join(conflicts)}")
        self.values |= rope

    def drop_default_rope_scaling(self):
        """{"rope_type": "default"}, "type" in older files, is another way to write null."""
        if self.values.get("rope_scaling") in ({"rope_type": "default"}, {"type": "default"}):
            del self.values["rope_scaling"]

    def refuse_quantised(self):
        """Refuse a folder whose weights are not numbers but codes of numbers."""
        how = self.values.get("quantization_config")
        if how is not None:
            kind = how.get("quant_method", "") if isinstance(how, dict) else ""
            fix = "use the folder of the model that it was made from"
            self.refuse(f"the weights are quantised (quantization_config, {kind or 'of an unknown kind'}): {fix}")

    def require_nothing_left(self):
        if unknown := sorted(self.values.keys() - IGNORED):
            names = ", ".join(unknown)
            self.refuse(f"unknown {names}: what does not change what the model computes can be deleted from the file")


def read_config(path):
    """config.json -> Config, architecture, width of Qwen2-MoE's shared expert (else 0), the file's content as a dict.

    ValueError, naming the field, for whatever Config cannot represent.
    """
    content = read_json(path)
    given = ConfigFields(path, content)
    given.refuse_quantised()
    shared_width = 0
    # Steel-LLM's training code left the architecture's name of the model it started from
    kind = STEEL if "FFN_type" in content else (given.take("architectures", list, []) or [None])[0]
    if kind == OWN:
        values = {field.name: given.take(field.name, field.type, field.default) for field in fields(Config)}
    elif kind in (QWEN2, QWEN3, QWEN2_MOE, STEEL):
        values = trunk_values(given, kind)
    else:
        given.refuse(f"architecture {kind}, expected one of {', '.join((QWEN2, QWEN3, QWEN2_MOE, STEEL, OWN))}")
    if kind in (QWEN2, QWEN3):
        values |= {"ffn": "dense", "n_expert": 1, "d_expert": given.take("intermediate_size", int)}
    elif kind == QWEN2_MOE:
        moe, shared_width = qwen2_moe_values(given)
        values |= moe
    elif kind == STEEL:
        values |= steel_values(given)
    given.require_nothing_left()
    try:
        return Config(**values), kind, shared_width, content
    except ValueError as error:
        given.refuse(error)


def trunk_values(given, kind):
    """Fields of Config for all but the feed-forward layers: of Qwen2, or of Qwen3, which has norms for biases."""
    given.merge_rope_parameters()
    given.drop_default_rope_scaling()
    types = {field.name: field.type for field in fields(Config)}
    defaults = {"num_key_value_heads": given.values.get("num_attention_heads")}
    values = {ours: given.take(theirs, types[ours], defaults.get(theirs)) for theirs, ours in FIELDS.items()}
    for name, value in FIXED.items():
        given.require(name, value)
    given.require("layer_types", ["full_attention"] * values["n_layer"])
    if kind == QWEN3:
        given.require("attention_bias", False)
        return values | {"qk_norm": True, "head_dim": given.take("head_dim", int, 128)}  # transformers' default
    given.require("qkv_bias", True)
    given.require("head_dim", values["d_model"] // (values["n_head"] or 1))  # Config refuses n_head = 0
    return values


def qwen2_moe_values(given):
    """Fields of Config for Qwen2-MoE's layers, and the width of their shared expert."""
    n_expert, active = given.take("num_experts", int), given.take("num_experts_per_tok", int)
    if active != n_expert:
        given.refuse(f"num_experts_per_tok = {active}, expected {n_expert}: here every token goes to all experts")
    shared_width = given.take("shared_expert_intermediate_size", int)
    d_expert = given.take("moe_intermediate_size", int)
    return {"dispatch": "token", "router": "linear", "n_expert": n_expert, "d_expert": d_expert}, shared_width


def steel_values(given):
    """Fields of Config for the Soft MoE of Steel-LLM as released."""
    given.require("FFN_type", "softmoe_v3")
    experts = {"senet": "swiglu2", "raw": "swiglu"}
    expert = given.take("mlp_type", str)
    if expert not in experts:
        given.refuse(f"mlp_type = {expert!r}, expected one of {', '.join(experts)}")
    width, ratio = given.take("intermediate_size", int), given.take("mlp_div_ratio", int)
    if not ratio:
        given.refuse("mlp_div_ratio = 0, expected a positive number")
    return {
        "dispatch": "sequence",
        "expert": experts[expert],
        "d_expert": width // ratio,
        "n_expert": given.take("n_experts", int),
        "slots_per_expert": given.take("slots_per_expert", int),
    }


def config_json(config, chat=False, eos_first=False):
    """Config -> the content of config.json. chat and eos_first: of checkpoint.Info, for nanoSteel alone."""
    kind = architecture(config)
    content = {"architectures": [kind], "chat": chat, "eos_first": eos_first}
    if kind == OWN:
        auto_map = {"AutoConfig": "NanoSteelConfig", "AutoModel": "NanoSteelModel", "AutoModelForCausalLM": OWN}
        code = {"auto_map": {name: f"modeling_nanosteel.{own}" for name, own in auto_map.items()}}
        return content | {"model_type": "nanosteel", "torch_dtype": "float32"} | code | asdict(config)
    model_type = {QWEN2: "qwen2", QWEN3: "qwen3", QWEN2_MOE: "qwen2_moe"}[kind]
    content |= {"model_type": model_type, "torch_dtype": "float32", "hidden_act": "silu"}
    content |= {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    if kind == QWEN3:
        content |= {"head_dim": config.head_width, "attention_bias": False}
    if kind in (QWEN2, QWEN3):
        return content | {"intermediate_size": config.d_dense}
    return content | {
        "num_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": config.expert_width,
        "shared_expert_intermediate_size": SHARED_WIDTH,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Tensors by name. Every linear weight is [out, in]


def hugging_face_tensors(model, kind):
    """Yield (name, tensor) for every parameter, as an architecture names and shapes it; the tensors are views.

    In a folder of our own the names are ours. Else the trunk is Qwen2's or Qwen3's, and a Soft MoE is named as in
    Qwen2-MoE or as Steel-LLM released it.
    """
    if kind == OWN:
        yield from ((f"model.decoder.{name}", p) for name, p in model.named_parameters())
        return
    config = model.config
    yield "model.embed_tokens.weight", model.embedding
    for i, block in enumerate(model.blocks):
        layer = f"model.layers.{i}."
        attention = block.attention
        heads = [config.n_head, config.n_kv_head, config.n_kv_head]
        for name, weight in zip("qkv", attention.qkv.split(heads)):
            yield layer + f"self_attn.{name}_proj.weight", weight.flatten(0, 1)
        if config.qk_norm:
            yield layer + "self_attn.q_norm.weight", attention.q_norm.weight
            yield layer + "self_attn.k_norm.weight", attention.k_norm.weight
        else:
            for name, bias in zip("qkv", attention.qkv_bias.split(heads)):
                yield layer + f"self_attn.{name}_proj.bias", bias.flatten()
        yield layer + "self_attn.o_proj.weight", attention.out
        yield layer + "input_layernorm.weight", block.attention_norm.weight
        yield layer + "post_attention_layernorm.weight", block.ffn_norm.weight
        if config.ffn == "dense":
            yield from swiglu_tensors(layer + "mlp.", block.ffn.w_in, block.ffn.w_out)
        else:
            yield from soft_moe_tensors(layer + "mlp.", block.ffn, config, kind)
    yield "model.norm.weight", model.norm.weight
    if not config.tie_embeddings:
        yield "lm_head.weight", model.head


def soft_moe_tensors(prefix, ffn, config, kind):
    """Router and experts of one Soft MoE layer."""
    if kind == QWEN2_MOE:
        yield prefix + "gate.weight", ffn.phi.T
    else:
        yield prefix + "phi", ffn.phi.unflatten(1, (config.n_expert, -1))
        yield prefix + "scale", ffn.scale
    for e in range(config.n_expert):
        yield from swiglu_tensors(prefix + f"experts.{e}.", ffn.w_in[e], ffn.w_out[..., e, :, :])


def swiglu_tensors(prefix, w_in, w_out):
    """w_in [2, h, D]; w_out [h, D] (swiglu), or [2, h, D] (swiglu2, whose two gates need two names)."""
    twice_gated = w_out.ndim == 3
    yield prefix + ("gate_up_proj.weight" if twice_gated else "gate_proj.weight"), w_in[0]
    yield prefix + "up_proj.weight", w_in[1]
    if twice_gated:
        yield prefix + "gate_down_proj.weight", w_out[0].T
    yield prefix + "down_proj.weight", (w_out[1] if twice_gated else w_out).T


# Qwen2-MoE differs from our layer in two ways. Its sum over experts has no factor E, so the factor goes into the down
# projections, which rounds them unless E is a power of two. And it has a shared expert, which every token goes to: we
# write one of zeros, of the smallest width.
SHARED_WIDTH = 1


def shared_expert_shapes(config, width):
    """{name: shape} of the shared experts of all layers; empty for the other architectures."""
    if architecture(config) != QWEN2_MOE:
        return {}
    shapes = {
        "_gate": (1, config.d_model),
        ".gate_proj": (width, config.d_model),
        ".up_proj": (width, config.d_model),
        ".down_proj": (config.d_model, width),
    }
    layers = [f"model.layers.{i}.mlp.shared_expert" for i in range(config.n_layer)]
    return {f"{layer}{name}.weight": shape for layer in layers for name, shape in shapes.items()}


def is_down_proj(name):
    return name.endswith("down_proj.weight")


# ----------------------------------------------------------------------------------------------------------------------
# Reading a folder


@torch.no_grad()
def load_folder(folder):
    """A folder -> Decoder (fp32, on the CPU), content of its config.json (dict). ValueError for any other model."""
    folder = Path(folder)
    config, kind, shared_width, content = read_config(folder / "config.json")
    tensors = read_tensors(folder)
    if config.tie_embeddings and "lm_head.weight" in tensors:  # some programs write it all the same
        if not torch.equal(tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")):
            problem = "lm_head.weight is not the embedding, although tie_word_embeddings is true"
            raise ValueError(f"{folder}: {problem}: set it to false in config.json if the head is its own")
    shared = shared_expert_shapes(config, shared_width)
    try:
        with torch.device("meta"):  # names and shapes, before any memory is allocated
            model = Decoder(config)
    except RuntimeError as error:  # torch's own limit on sizes
        raise ValueError(f"{folder / 'config.json'}: {str(error).splitlines()[0]}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in hugging_face_tensors(model, kind)}
    if problems := mismatches(tensors, shapes, shared):
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder}: " + "; ".join(problems[:3]) + more)
    for name, tensor in hugging_face_tensors(model.to_empty(device="cpu"), kind):
        tensor.copy_(tensors[name])
        if shared and is_down_proj(name):
            tensor /= config.n_expert
    return model, content


def read_tensors(folder):
    """All tensors of a folder: of model.safetensors, else of the files that the index names, else of *.safetensors.

    That is what transformers reads, where an index lies beside a whole file.
    """
    index_path = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")
    index = read_index(index_path) if index_path.exists() else None
    files = {path.name for path in folder.glob("*.safetensors")} if index is None else set(index.values())
    if not files:
        expected = "expected weights in this format, others are not read"
        raise ValueError(f"{folder} has a config.json and no *.safetensors: {expected}")
    tensors, file_of = {}, {}
    for file in sorted(files):
        for name, tensor in read_safetensors(folder / file).items():
            if name in file_of:
                raise ValueError(f"{folder}: {name} is in {file_of[name]} and in {file}: remove one of the files")
            tensors[name], file_of[name] = tensor, file
    if index and file_of != index:
        name = min(file_of.items() ^ index.items())[0]
        said, found = index.get(name, "no file"), file_of.get(name, "no file")
        raise ValueError(f"{index_path} says that {name} is in {said}, it is in {found}: download both again")
    return tensors


def read_index(path):
    """The weight_map {tensor: file} of an index; the files must be in its folder."""
    index = read_json(path).get("weight_map")
    files = index.values() if isinstance(index, dict) else [None]
    if not all(isinstance(file, str) and re.fullmatch(r"[^/\\]+\.safetensors", file) for file in files):
        expected = "expected a weight_map of tensors to *.safetensors files in the same folder"
        raise ValueError(f"{path}: {expected}: download it again")
    return index


def mismatches(tensors, shapes, shared):
    """What is wrong with the tensors of a folder, one line each: against the model's shapes and the shared experts'."""
    expected = shapes | shared
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name} is not in this architecture")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(expected[name])}")
        elif name in shared and is_down_proj(name) and tensor.any():
            problems.append(f"{name} is not zero, and a Soft MoE has no shared expert")
    return problems


# ----------------------------------------------------------------------------------------------------------------------
# Writing a folder


@torch.no_grad()
def export_folder(model, folder, files, ends, suppress=(), chat=False, eos_first=False):
    """Write a model as a folder, new or empty, which appears only when all of it is written.

    files             {name: bytes} of the tokenizer and the model card, written beside the weights
    ends              {"bos_token_id": ..., "eos_token_id": ...}
    suppress          ids that must never be sampled: the padding of the embedding
    chat, eos_first   of checkpoint.Info: how texts began in training
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--export {folder} exists and is not empty: name a new folder")
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        raise ValueError(f"{temporary} is in the way, perhaps left by an export that was interrupted: remove it")
    temporary.mkdir(parents=True)
    config, kind = model.config, architecture(model.config)
    tensors = dict(hugging_face_tensors(model, kind))
    if shared := shared_expert_shapes(config, SHARED_WIDTH):
        tensors = {name: t * config.n_expert if is_down_proj(name) else t for name, t in tensors.items()}
        tensors |= {name: torch.zeros(shape) for name, shape in shared.items()}
    write_safetensors(temporary / "model.safetensors", tensors)
    generation = ends | ({"suppress_tokens": list(suppress)} if suppress else {})
    for name, content in (
        ("config.json", config_json(config, chat, eos_first) | ends),
        ("generation_config.json", generation),
    ):
        (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if kind == OWN:
        files = files | {path.name: path.read_bytes() for path in CODE}
    for name, content in files.items():
        (temporary / name).write_bytes(content)
    temporary.rename(folder)
