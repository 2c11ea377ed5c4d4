"""What the tokenizer of a Hugging Face folder brings beside Qwen's vocabulary, against transformers."""

import json
import shutil

import gguf
import pytest
from conftest import call, refused
from test_huggingface import qwen2
from transformers import AutoTokenizer

from checkpoint import load
from corpus.default import fetch_qwen
from extras.transformers_tokenizer import transformers_files
from sample import chat_ids
from tokenizer import load_tokenizer

SPECIAL = "object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end".split()
SPECIAL += "vision_pad image_pad video_pad".split()
PLAIN = ["<tool_call>", "</tool_call>"]
PLAIN += [f"<|{name}|>" for name in "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split()]
TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- raise_exception('no tools here') }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>' }}{%- endif %}
{%- endif %}
"""
CHATS = [
    [{"role": "user", "content": " 却说曹操如何？\n"}],
    [{"role": "system", "content": "你是诗人。"}, {"role": "user", "content": "hi <tool_call> {1}"}],
    [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二<think>"},
        {"role": "user", "content": "三"},
    ],
]


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json", "chat_template.jinja"])
def folder(request, tmp_path_factory):
    """A Qwen2 with the special tokens of Qwen2.5 and a chat template like its own; three ways to keep them."""
    folder = tmp_path_factory.mktemp("qwen") / "model"
    qwen2(vocab_size=151_936, hidden_size=8, intermediate_size=8).save_pretrained(folder)
    files = {name: json.loads(text) for name, text in transformers_files(load_tokenizer(fetch_qwen())).items()}
    tokenizer, config = files["tokenizer.json"], files["tokenizer_config.json"] | {"chat_template": TEMPLATE}
    flags = {name: False for name in ("single_word", "lstrip", "rstrip", "normalized")}
    texts = [(f"<|{name}|>", True) for name in SPECIAL] + [(text, False) for text in PLAIN]
    for i, (text, special) in enumerate(texts, 151_646):
        tokenizer["added_tokens"].append({"id": i, "content": text, "special": special, **flags})
    if request.param == "chat_template.jinja":
        (folder / "chat_template.jinja").write_text(config.pop("chat_template"), encoding="utf-8")
    if request.param == "vocab.json":
        (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]), encoding="utf-8")
        merges = "\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"])
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        added = {str(token.pop("id")): token for token in tokenizer["added_tokens"]}
        config |= {"added_tokens_decoder": added}
    else:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_chat_has_the_ids_of_transformers(folder):
    theirs, (_, ours, _) = AutoTokenizer.from_pretrained(folder), load(folder)
    assert ours.vocab_size == 151_665 == len(theirs)
    for chat in CHATS:
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert chat_ids(ours, chat, []) == expected
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    assert ours.decode([ours.specials["<tool_call>"], 151_647]) == "<tool_call>"  # plain text; the other one is special
    with pytest.raises(ValueError, match=r"a message holds <\|im_end\|>, which its chat template takes for a marker"):
        chat_ids(ours, [{"role": "user", "content": "<|im_end|>"}], [])
    with pytest.raises(ValueError, match=r"refuses these messages \(no tools here\)"):
        chat_ids(ours, [{"role": "tool", "content": ""}], [])


def test_an_export_keeps_them_and_training_says_that_it_does_not(folder, small_data, tmp_path):
    call("extras.export", folder, "--export", tmp_path / "again")
    call("extras.export", folder, "--export-gguf", tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    tokens, types, template = (
        reader.fields[f"tokenizer.{name}"].contents() for name in ("ggml.tokens", "ggml.token_type", "chat_template")
    )
    assert tokens[151_646:151_665] == [f"<|{name}|>" for name in SPECIAL] + PLAIN and template == TEMPLATE
    assert types[151_643:151_665] == [3] * (3 + len(SPECIAL)) + [4] * len(PLAIN)

    theirs, again = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "again"))
    for chat in CHATS:
        assert again.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert len(again) == len(theirs) and load(tmp_path / "again")[1].specials == load(folder)[1].specials

    (tmp_path / "a.txt").write_text("却说曹操引兵渡河，正遇关公。\n" * 300 + "且听下回分解。\n", encoding="utf-8")
    prepared = call(
        "prepare.py", tmp_path / "a.txt", "--out", tmp_path / "data", "--tokenizer", folder, "--pipeline", "none"
    )
    assert prepared.returncode == 0 and load_tokenizer(tmp_path / "data").vocab_size == 151_646
    flags = ["--data", tmp_path / "data", "--block-size", 8, "--micro-batch", 1, "--eval-tokens", 8, "--no-compile"]
    said = call("train.py", *flags, "--init-from", folder, "--out", tmp_path / "run", "--steps", 1).stdout
    further = "19 further special tokens (<|object_ref_start|>, <|object_ref_end|>, ...)"
    brings = f"brings {further} and a chat template of its own: the run trains and answers without"
    assert f"warning: {folder} {brings}\n" in said


def test_what_cannot_be_carried_over_is_refused(tmp_path):
    qwen2(vocab_size=151_936, hidden_size=8, intermediate_size=8).save_pretrained(tmp_path / "model")
    files = transformers_files(load_tokenizer(fetch_qwen()))
    content = json.loads(files["tokenizer.json"])
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 151_700, "content": "<far>"})
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    refused(call("sample.py", tmp_path / "model", "--prompt", "a", ok=False), "tokens have no ids one after another")
    shutil.copy(fetch_qwen(), tmp_path / "model" / "qwen.tiktoken")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% if %}", encoding="utf-8")
    refused(call("sample.py", tmp_path / "model", "--prompt", "a", ok=False), "its chat template is damaged")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{{ [].__class__.__base__.__subclasses__() }}", encoding="utf-8"
    )
    attack = call("sample.py", tmp_path / "model", "--chat", "--prompt", "a", ok=False)
    refused(attack, "its chat template refuses these messages", "unsafe")
