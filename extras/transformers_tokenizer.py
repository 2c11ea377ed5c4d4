"""Our tokenizers as files for transformers.

    files = transformers_files(tokenizer)     # {"tokenizer.json": text, "tokenizer_config.json": text, ...}

AutoTokenizer.from_pretrained loads them, with trust_remote_code and without. It gives the ids of encode and of
encode_chat (apply_chat_template), and for these ids the text of decode. Two differences remain: there, markers in a
text become special ids unless split_special_tokens=True, and sentencepiece ids that stop in the middle of a character
decode to one U+FFFD per byte.
"""

import json

from tokenizer import CHARACTER_OF, CHAT_END, CHAT_START, DEFAULT_SYSTEM, QWEN_PATTERN, SPACE_MARK, SPECIALS, Qwen

# The format that encode_chat writes, as a Jinja template
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    f"{CHAT_START}system\n{DEFAULT_SYSTEM}{CHAT_END}\n"
    "{% endif %}"
    "{% for message in messages %}"
    f"{CHAT_START}{{{{ message.role }}}}\n{{{{ message.content }}}}{CHAT_END}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    f"{CHAT_START}assistant\n"
    "{% endif %}"
)
# The constant parts of the files
TOKENIZER_JSON = """{
"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
"normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
"model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
"fuse_unk": false, "byte_fallback": false, "ignore_merges": false}}"""
TOKENIZER_CONFIG_JSON = """{
"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": false,
"model_input_names": ["input_ids", "attention_mask"]}"""
# For a Qwen2 model transformers 5 takes Qwen's own pre-tokenizer, whatever tokenizer.json says, unless auto_map names
# another class. It then does without that class, or with trust_remote_code imports it, so the class must be there.
OWN_CLASS = """from transformers import PreTrainedTokenizerFast


class NanoSteelTokenizer(PreTrainedTokenizerFast):
    # tokenizer.json as it is
    pass
"""
OWN_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "auto_map": {"AutoTokenizer": [None, "tokenization_nanosteel.NanoSteelTokenizer"]},
}


def transformers_files(tokenizer):
    """A tokenizer of tokenizer.py -> {file name: text} for a folder that AutoTokenizer can load."""
    is_qwen = isinstance(tokenizer, Qwen)
    parts_of = qwen_parts if is_qwen else sentencepiece_parts
    normalizer, pre_tokenizer, decoder, vocab, mergeable = parts_of(tokenizer)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = sorted(zip((tokenizer.eos_id, tokenizer.chat_start_id, tokenizer.chat_end_id), SPECIALS))
    content = json.loads(TOKENIZER_JSON)
    content["added_tokens"] = [{"id": i, "content": text, **flags} for i, text in specials]
    content |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder}
    content["model"] |= {"byte_fallback": "<0x00>" in vocab, "vocab": vocab, "merges": merges_of(mergeable)}
    config = json.loads(TOKENIZER_CONFIG_JSON) | {"chat_template": CHAT_TEMPLATE}
    config |= {"tokenizer_class": "Qwen2Tokenizer"} if is_qwen else OWN_CONFIG
    contents = {"tokenizer.json": content, "tokenizer_config.json": config}
    files = {name: json.dumps(content, ensure_ascii=False) for name, content in contents.items()}
    return files if is_qwen else files | {"tokenization_nanosteel.py": OWN_CLASS}


def sentencepiece_parts(tokenizer):
    """-> normalizer, pre_tokenizer, decoder, {token: id}, and the mergeable tokens, first merge first."""
    sp = tokenizer.processor
    # With real spaces in the tokens, SPACE_MARK in a text is in no token and is spelt in bytes there too.
    tokens = [sp.id_to_piece(i).replace(SPACE_MARK, " ") for i in range(len(sp))]
    by_score = sorted(range(len(sp)), key=sp.get_score, reverse=True)  # the first merge has the highest score

    def is_mergeable(i):
        return not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or tokens[i] == "\n")

    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    vocab = {token: i for i, token in enumerate(tokens)}
    return None, None, decoder, vocab, [tokens[i] for i in by_score if is_mergeable(i)]


def qwen_parts(tokenizer):
    """The same for Qwen's vocabulary, whose tokens are written in GPT-2's alphabet."""
    tokens = [token.decode("latin-1").translate(CHARACTER_OF) for token in tokenizer.token_bytes[: tokenizer.eos_id]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    return {"type": "NFC"}, pre_tokenizer, byte_level, {token: i for i, token in enumerate(tokens)}, tokens


def merges_of(tokens):
    """[[left, right], ...]: all pairs of tokens that join to a token, in the order of the tokens that they make.

    Both tokenizers merge the neighbours that make the earliest token, whatever its parts; transformers needs the pairs.
    """
    known = set(tokens)
    return [[t[:i], t[i:]] for t in tokens for i in range(1, len(t)) if t[:i] in known and t[i:] in known]
