"""GGUF, the one file that llama.cpp and ollama read: python -m extras.export CHECKPOINT --export-gguf FILE.

Needs the package gguf. For the dense models that llama.cpp knows, Qwen2's and Qwen3's shape; weights in fp32, which
its own llama-quantize makes smaller.
"""

import os
from pathlib import Path

import torch

from extras.huggingface import OWN, QWEN2, QWEN2_MOE, QWEN3, architecture, hugging_face_tensors
from extras.transformers_tokenizer import CHAT_TEMPLATE, merges_of, qwen_parts
from tokenizer import Qwen

SOFT_MOE = "llama.cpp has no Soft MoE: train with --ffn dense, or use the folder of --export"
OURS = "--reset-at-eos, --pack and --value-embedding"
WHY_NOT = {OWN: f"{SOFT_MOE}; a dense one must do without {OURS}", QWEN2_MOE: SOFT_MOE}


@torch.no_grad()
def export_gguf(model, tokenizer, info, path):
    """Write a model with its tokenizer as a file, which appears only when all of it is written. ValueError if llama.cpp
    could not run it."""
    path, kind = Path(path), architecture(model.config)
    if kind not in (QWEN2, QWEN3):
        raise ValueError(f"--export-gguf {path}: {WHY_NOT[kind]}")
    try:
        import gguf
    except ImportError:
        raise ValueError("--export-gguf needs the package gguf: pip install gguf") from None
    if not path.parent.is_dir():
        raise ValueError(f"--export-gguf {path}: no folder {path.parent}")
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_gguf(gguf, model, tokenizer, info, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_gguf(gguf, model, tokenizer, info, path):
    config, kind = model.config, architecture(model.config)
    theirs = {QWEN2: gguf.MODEL_ARCH.QWEN2, QWEN3: gguf.MODEL_ARCH.QWEN3}[kind]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[theirs])
    writer.add_name(info.name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.d_dense)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    add_tokenizer(writer, tokenizer, info.eos_first)
    names = gguf.get_tensor_name_map(theirs, config.n_layer)
    for name, tensor in hugging_face_tensors(model, kind):
        if name in ("model.embed_tokens.weight", "lm_head.weight"):  # without padding: llama.cpp would sample it
            tensor = tensor[: tokenizer.vocab_size]
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _, BYTE = range(1, 7)  # types of tokens in llama.cpp


def add_tokenizer(writer, tokenizer, eos_first):
    """Add the tokens and how texts begin and end."""
    if isinstance(tokenizer, Qwen):
        *_, vocab, mergeable = qwen_parts(tokenizer)
        tokens = [*vocab, *tokenizer.specials]
        types = [NORMAL] * len(vocab)
        types += [USER_DEFINED if tokenizer.token_bytes[i] else CONTROL for i in tokenizer.specials.values()]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges([" ".join(pair) for pair in merges_of(mergeable)])
        scores = None
    else:
        sp = tokenizer.processor
        tokens = [sp.id_to_piece(i) for i in range(len(sp))]
        types = [type_of_piece(sp, i) for i in range(len(sp))]
        scores = [sp.get_score(i) for i in range(len(sp))]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(False)
        writer.add_remove_extra_whitespaces(False)
    writer.add_token_list(tokens)
    if scores:
        writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.eos_id)  # a document begins after the end of another
    writer.add_add_bos_token(eos_first)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.chat_end_id)
    writer.add_chat_template(tokenizer.chat_template or CHAT_TEMPLATE)


def type_of_piece(sp, i):
    if sp.is_byte(i):
        return BYTE
    if sp.is_control(i):
        return CONTROL
    return UNKNOWN if sp.is_unknown(i) else USER_DEFINED if sp.id_to_piece(i) == "\n" else NORMAL
