"""Weights in and out: safetensors files, and folders as Hugging Face's loaders read them (config.json + *.safetensors).

    python model.py out/demo --export out/demo-hf     # a checkpoint -> such a folder
    model = Decoder.load("Qwen1.5-0.5B")              # such a folder -> the model, here called load()

    architecture             in Config
    Qwen2ForCausalLM         ffn = dense
    Qwen2MoeForCausalLM      dispatch = token, router = linear, expert = swiglu: every token goes to every expert
    SteelForCausalLM         dispatch = sequence: the layer as Steel-LLM released it; only read
    NanoSteelForCausalLM     all else: config.json holds our Config, and no other program can run it

What a folder says is taken over completely or refused: no field, no tensor and no byte of a file is passed over.
"""

import argparse
import contextlib
import json
import math
import os
import re
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from checkpoint import description
from model import Config, Decoder
from tokenizer import load_tokenizer


def get_args(argv=None):
    parser = argparse.ArgumentParser(prog="model.py", description="Write a checkpoint as a folder for Hugging Face's loaders.")
    parser.add_argument("checkpoint", nargs="?", default="out", metavar="CHECKPOINT", help="a step or a run (default: newest under out)")
    parser.add_argument("--export", required=True, metavar="DIR", help="a folder, new or empty")
    return parser.parse_args(argv)


@contextlib.contextmanager
def refused(path, expected):
    """Errors of reading path become the one line that ends the program."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}: copy or download it again")
    except ValueError as error:
        raise SystemExit(f"{path} is not {expected} ({error}): copy or download it again")


def json_object(content):
    """UTF-8 bytes -> dict. Whatever is not one JSON object, or says a name twice, is a ValueError."""

    def unique(pairs):
        found = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name} is there twice")
            found[name] = value
        return found

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("JSON nested too deeply")
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def read_json(path):
    with refused(path, "a JSON object"):
        return json_object(path.read_bytes())


# ---------------------------------------------------------------------------------------------------------------
# safetensors: 8 bytes with the length of the header, little-endian; the header, JSON {name: {dtype, shape, data_offsets}};
# the tensors, little-endian and back to back (github.com/huggingface/safetensors, README, "Format")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def read_safetensors(path):
    """A file -> {name: tensor}, mapped into memory: what is not used is not read. A damaged file is refused."""
    with refused(path, f"a whole safetensors file of {', '.join(DTYPES)}"):
        content = np.memmap(path, np.uint8, mode="c")  # a private copy of what is written to: torch has no read-only tensors
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        if start > len(content):
            raise ValueError(f"the header ends at byte {start}, the file at {len(content)}")
        header, data = json_object(content[8:start].tobytes()), content[start:]
        header.pop("__metadata__", None)
        return {
            name: torch.from_numpy(data[begin:end]).view(DTYPES[dtype]).view(shape)
            for begin, end, name, dtype, shape in spans(header, len(data))
        }


def spans(header, size):
    """What a header says of size bytes -> [(begin, end, name, dtype, shape)] in the order of the bytes, which they cover once."""
    found, at = [], 0
    counts = lambda value: isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)
    for name, entry in header.items():
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets")) if isinstance(entry, dict) else [None] * 3
        if not (isinstance(dtype, str) and counts(shape) and counts(offsets) and len(offsets) == 2):
            raise ValueError(f"{name} lacks dtype, shape or data_offsets")
        if dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {dtype}")
        begin, end = offsets
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name} has {end - begin} bytes, which is not {shape} x {dtype}")
        found.append((begin, end, name, dtype, shape))
    found.sort()
    for begin, end, name, _, _ in found:
        if begin != at:
            raise ValueError(f"{name} begins at byte {begin} of the data, expected {at}")
        at = end
    if at != size:
        raise ValueError(f"the tensors take {at} bytes, there are {size}")
    return found


def write_safetensors(path, tensors):
    """{name: tensor} -> a file; tensors of any layout, on any device. (export() writes into a folder that is renamed when whole.)"""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    head = json.dumps(header, ensure_ascii=False).encode("utf-8")
    head += b" " * (-len(head) % 8)  # tensors begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def read_folder(folder):
    """All tensors of a folder: of the files that model.safetensors.index.json names, or without one of every *.safetensors."""
    index = folder / "model.safetensors.index.json"
    where, files = None, sorted(path.name for path in folder.glob("*.safetensors"))
    if index.exists():
        where = read_json(index).get("weight_map")
        inside = lambda file: isinstance(file, str) and re.fullmatch(r"[^/\\]+\.safetensors", file)
        if not isinstance(where, dict) or not all(map(inside, where.values())):
            raise SystemExit(f"{index}: expected a weight_map of tensors to *.safetensors files in the same folder: download it again")
        files = sorted(set(where.values()))
    if not files:
        raise SystemExit(f"{folder} has a config.json and no *.safetensors: expected weights in this format, others are not read")
    tensors, found = {}, {}
    for file in files:
        for name, tensor in read_safetensors(folder / file).items():
            if name in found:
                raise SystemExit(f"{folder}: {name} is in {found[name]} and in {file}: remove one of the files")
            tensors[name], found[name] = tensor, file
    if where and found != where:
        name = min(found.items() ^ where.items())[0]
        says, holds = (files.get(name, "no file") for files in (where, found))
        raise SystemExit(f"{index} says that {name} is in {says}, it is in {holds}: download both again")
    return tensors


# ---------------------------------------------------------------------------------------------------------------
# config.json

QWEN2, QWEN2_MOE, STEEL, OWN = "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "SteelForCausalLM", "NanoSteelForCausalLM"

FIELDS = {  # their name -> ours
    "vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head", "max_position_embeddings": "block_size", "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base", "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
ONLY = {  # what would make it another function; left out or null, it is this
    "hidden_act": "silu", "qkv_bias": True, "use_sliding_window": False, "rope_scaling": None, "rope_type": "default",
    "use_mrope": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
# What does not change the function: names, training, sampling, windows and dense layers that are not used; norm_topk_prob, as all
# experts together sum to 1.
NO_MATTER = set("""
    architectures auto_map model_type _name_or_path transformers_version torch_dtype dtype use_cache _attn_implementation
    initializer_range attention_dropout output_router_logits router_aux_loss_coef bos_token_id eos_token_id pad_token_id
    sliding_window max_window_layers intermediate_size norm_topk_prob chat
""".split())


def architecture(config):
    """The architecture that computes exactly what a model of this Config does."""
    if config.reset_id >= 0:  # theirs read back over every end of a document
        return OWN
    if config.ffn == "dense":
        return QWEN2
    moe = (config.dispatch, config.router, config.expert, config.slots_per_expert)
    return QWEN2_MOE if moe == ("token", "linear", "swiglu", 1) else OWN


def read_config(folder):
    """config.json -> Config, and the width of the shared expert (Qwen2-MoE's; else 0). What Config cannot say is refused by name."""
    path = folder / "config.json"
    found = read_json(path)

    def refuse(problem):
        raise SystemExit(f"{path}: {problem}")

    def take(name, kind, default=None):
        value = found.pop(name, None)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            refuse(f"{name} = {value!r}, expected {kind.__name__}")
        return value

    def only(name, value):
        if (other := found.pop(name, None)) not in (None, value):
            refuse(f"{name} = {other!r}, expected {value!r}: another cannot be represented")

    # Steel-LLM's training code kept the name of the model that it began with.
    kind = STEEL if "FFN_type" in found else (take("architectures", list, []) or [None])[0]
    shared_width = 0
    if kind == OWN:
        values = {field.name: take(field.name, field.type, field.default) for field in fields(Config)}
    elif kind in (QWEN2, QWEN2_MOE, STEEL):
        rope = take("rope_parameters", dict, {})
        if twice := [name for name in rope if found.get(name, rope[name]) != rope[name]]:
            refuse(f"rope_parameters say another {', '.join(twice)}")
        found |= rope
        types, defaults = {field.name: field.type for field in fields(Config)}, {"num_key_value_heads": found.get("num_attention_heads")}
        values = {ours: take(theirs, types[ours], defaults.get(theirs)) for theirs, ours in FIELDS.items()}
        for name, value in ONLY.items():
            only(name, value)
        only("layer_types", ["full_attention"] * values["n_layer"])
        only("head_dim", values["d_model"] // (values["n_head"] or 1))
    else:
        refuse(f"architecture {kind}, expected one of {', '.join((QWEN2, QWEN2_MOE, STEEL, OWN))}")
    if kind == QWEN2:
        values |= dict(ffn="dense", n_expert=1, d_expert=take("intermediate_size", int))
    elif kind == QWEN2_MOE:
        n_expert, active = take("num_experts", int), take("num_experts_per_tok", int)
        if active != n_expert:
            refuse(f"num_experts_per_tok = {active}, expected {n_expert}: here every token goes to all experts")
        shared_width = take("shared_expert_intermediate_size", int)
        values |= dict(dispatch="token", router="linear", n_expert=n_expert, d_expert=take("moe_intermediate_size", int))
    elif kind == STEEL:
        only("FFN_type", "softmoe_v3")
        experts = {"senet": "swiglu2", "raw": "swiglu"}
        if (expert := take("mlp_type", str)) not in experts:
            refuse(f"mlp_type = {expert!r}, expected one of {', '.join(experts)}")
        d_expert = take("intermediate_size", int) // (take("mlp_div_ratio", int) or refuse("mlp_div_ratio = 0, expected a positive number"))
        values |= dict(dispatch="sequence", expert=experts[expert], d_expert=d_expert)
        values |= dict(n_expert=take("n_experts", int), slots_per_expert=take("slots_per_expert", int))
    if unknown := sorted(found.keys() - NO_MATTER):
        refuse(f"unknown {', '.join(unknown)}: what does not change what the model computes can be deleted from the file")
    try:
        return Config(**values), shared_width
    except SystemExit as error:
        refuse(error)


def config_json(config, chat=False):
    """Config -> the content of config.json; chat: what sample.py does with it if nothing is said."""
    kind = architecture(config)
    found = {"architectures": [kind], "chat": chat}
    if kind == OWN:
        return found | asdict(config)
    found |= {"model_type": {QWEN2: "qwen2", QWEN2_MOE: "qwen2_moe"}[kind], "torch_dtype": "float32", "hidden_act": "silu"}
    found |= {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    if kind == QWEN2:
        return found | {"intermediate_size": config.d_dense}
    return found | {
        "num_experts": config.n_expert, "num_experts_per_tok": config.n_expert, "norm_topk_prob": False, "decoder_sparse_step": 1,
        "moe_intermediate_size": config.expert_width, "shared_expert_intermediate_size": SHARED_WIDTH,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Tensors by their names. Every linear weight is [out, in].


def hugging_face_tensors(model):
    """Yield (name, tensor) of every parameter, as transformers names and shapes them; the tensors are views of the parameters.

    Qwen2's trunk; a Soft MoE as Qwen2-MoE or as Steel-LLM released it. `mlp.recency`, of the causal dispatch, is our own.
    """
    config = model.config
    yield "model.embed_tokens.weight", model.embedding
    for i, block in enumerate(model.blocks):
        layer, attention, ffn = f"model.layers.{i}.", block.attention, block.ffn
        heads = [config.n_head, config.n_kv_head, config.n_kv_head]
        for name, weight, bias in zip("qkv", attention.qkv.split(heads), attention.qkv_bias.split(heads)):
            yield layer + f"self_attn.{name}_proj.weight", weight.flatten(0, 1)
            yield layer + f"self_attn.{name}_proj.bias", bias.flatten()
        yield layer + "self_attn.o_proj.weight", attention.out
        yield layer + "input_layernorm.weight", block.attention_norm.weight
        yield layer + "post_attention_layernorm.weight", block.ffn_norm.weight
        if config.ffn == "dense":
            yield from swiglu_tensors(layer + "mlp.", ffn.w_in, ffn.w_out)
            continue
        if architecture(config) == QWEN2_MOE:
            yield layer + "mlp.gate.weight", ffn.phi.T
        else:
            yield layer + "mlp.phi", ffn.phi.unflatten(1, (config.n_expert, -1))
        if config.router == "cosine":
            yield layer + "mlp.scale", ffn.scale
        if ffn.window > 1:
            yield layer + "mlp.recency", ffn.recency
        for e in range(config.n_expert):
            yield from swiglu_tensors(layer + f"mlp.experts.{e}.", ffn.w_in[e], ffn.w_out[..., e, :, :])
    yield "model.norm.weight", model.norm.weight
    if not config.tie_embeddings:
        yield "lm_head.weight", model.head


def swiglu_tensors(prefix, w_in, w_out):
    """w_in [2, h, D], w_out [h, D] (swiglu) or [2, h, D] (swiglu2, whose gates have two names)."""
    twice = w_out.ndim == 3
    yield prefix + ("gate_up_proj.weight" if twice else "gate_proj.weight"), w_in[0]
    yield prefix + "up_proj.weight", w_in[1]
    if twice:
        yield prefix + "gate_down_proj.weight", w_out[0].T
    yield prefix + "down_proj.weight", (w_out[1] if twice else w_out).T


# Qwen2-MoE differs in two ways. Its sum over experts has no factor E: the last matrices have it in them, which rounds them
# unless E is a power of two. And there is one more expert, for all tokens: it is written with zeros, as narrow as can be.
SHARED_WIDTH = 1


def shared_expert(config, width):
    """{name: shape} of the shared experts."""
    if architecture(config) != QWEN2_MOE:
        return {}
    into, out_of = (width, config.d_model), (config.d_model, width)
    shapes = {"_gate": (1, config.d_model), ".gate_proj": into, ".up_proj": into, ".down_proj": out_of}
    return {f"model.layers.{i}.mlp.shared_expert{name}.weight": shape for i in range(config.n_layer) for name, shape in shapes.items()}


@torch.no_grad()
def load(folder):
    """A folder -> Decoder in fp32 on the CPU; .checkpoint is the folder."""
    folder = Path(folder)
    config, shared_width = read_config(folder)
    tensors, shared = read_folder(folder), shared_expert(config, shared_width)
    try:
        with torch.device("meta"):  # names and shapes before any memory is taken
            model = Decoder(config)
    except RuntimeError as error:  # sizes beyond all bounds
        raise SystemExit(f"{folder / 'config.json'}: {str(error).splitlines()[0]}")
    shapes = {name: tuple(tensor.shape) for name, tensor in hugging_face_tensors(model)} | shared
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            problems.append(f"{name} is not in this architecture")
        elif tensor.shape != shapes[name]:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(shapes[name])}")
        elif name in shared and name.endswith("down_proj.weight") and tensor.any():
            problems.append(f"{name} is not zero, and a Soft MoE has no shared expert")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise SystemExit(f"{folder}: " + "; ".join(problems[:3]) + more)
    for name, tensor in hugging_face_tensors(model.to_empty(device="cpu")):
        tensor.copy_(tensors[name])
        if shared and name.endswith("down_proj.weight"):
            tensor /= config.n_expert
    model.checkpoint = folder
    return model


@torch.no_grad()
def export(model, folder, tokenizer_files, ends, suppress=(), chat=False):
    """Write a model as a folder, which appears when all of it is there.

    tokenizer_files {name: bytes}; ends: the ids for bos_token_id and eos_token_id; suppress: ids never to be sampled; chat: a note.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"--export {folder} is there and not empty: name a new folder")
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        raise SystemExit(f"{temporary} is in the way, perhaps left by an export that was interrupted: remove it")
    temporary.mkdir(parents=True)
    config, tensors = model.config, dict(hugging_face_tensors(model))
    if shared := shared_expert(config, SHARED_WIDTH):
        tensors = {name: t * config.n_expert if name.endswith("down_proj.weight") else t for name, t in tensors.items()}
        tensors |= {name: torch.zeros(shape) for name, shape in shared.items()}
    write_safetensors(temporary / "model.safetensors", tensors)
    generation = ends | ({"suppress_tokens": list(suppress)} if suppress else {})
    for name, content in (("config.json", config_json(config, chat) | ends), ("generation_config.json", generation)):
        (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, content in tokenizer_files.items():
        (temporary / name).write_bytes(content)
    temporary.rename(folder)


def main(argv=None):
    args = get_args(argv)
    model = Decoder.load(args.checkpoint)
    config = model.config
    tokenizer = load_tokenizer(model.checkpoint, config.vocab_size)
    files = {name: text.encode("utf-8") for name, text in tokenizer.transformers_files().items()}
    files[tokenizer.FILE] = tokenizer.content
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": [tokenizer.eos_id, tokenizer.chat_end_id]}
    try:
        export(model, args.export, files, ends, range(tokenizer.vocab_size, config.vocab_size), description(model.checkpoint).get("chat", False))
    except OSError as error:
        raise SystemExit(f"--export {args.export}: {error.strerror}: name another folder, or make room")
    kind = architecture(config)
    print(f"exported: {model.checkpoint} -> {args.export}, {kind}")
    if kind == OWN:
        print("only nanoSteel reads this folder: other programs know ffn = dense, and dispatch = token with router = linear,\n"
              "expert = swiglu and slots_per_expert = 1, both without --reset-at-eos")  # fmt: skip
