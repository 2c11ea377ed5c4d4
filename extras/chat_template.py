"""What a Hugging Face folder's tokenizer brings beside Qwen's vocabulary: its chat template, and further tokens.

    carry_over(tokenizer, folder)      # checkpoint.load() calls this: encode_chat then renders the folder's template

jinja2 comes with torch. A template is run in jinja2's sandbox: it sees the messages and nothing else.
"""

import json
import unicodedata
from pathlib import Path

from extras.safetensors_io import read_json
from extras.transformers_tokenizer import CHAT_TEMPLATE
from tokenizer import SPECIALS, Qwen

FILES = """
    tokenizer.json tokenizer_config.json chat_template.jinja special_tokens_map.json added_tokens.json vocab.json
    merges.txt tokenizer.model qwen.tiktoken tokenization_nanosteel.py
    """.split()


def carry_over(tokenizer, folder):
    """Give a tokenizer the chat template of its folder, if it is another than ours, and say in .brings what is special
    about it. ValueError for a template that cannot be read."""
    template = template_of(Path(folder))
    further = list(tokenizer.specials)[len(SPECIALS) :] if isinstance(tokenizer, Qwen) else []
    brings = [f"{len(further)} further special tokens ({', '.join(further[:2])}, ...)"] if further else []
    if template and template != CHAT_TEMPLATE and isinstance(tokenizer, Qwen):
        brings.append("a chat template of its own")
        tokenizer.chat_template = template
        render = compiled(template, folder)
        markers = [text for text, i in tokenizer.specials.items() if not tokenizer.token_bytes[i]]

        def encode_chat(messages, open_turn=False):
            for message in messages:
                if found := [marker for marker in markers if marker in message["content"]]:
                    raise ValueError(
                        f"{folder}: a message holds {found[0]}, which its chat template takes for a marker"
                    )
            text = unicodedata.normalize("NFC", render(messages, open_turn))
            return tokenizer.encoding.encode(text, allowed_special="all"), None

        tokenizer.encode_chat = encode_chat
    tokenizer.brings = " and ".join(brings)


def template_of(folder):
    """The chat template of a folder, or None."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template


def compiled(template, folder):
    """-> render(messages, open_turn) -> text."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    try:
        parsed = environment.from_string(template)
    except TemplateError as error:
        raise ValueError(f"{folder}: its chat template is damaged ({error})") from None

    def render(messages, open_turn):
        try:
            return parsed.render(messages=messages, add_generation_prompt=open_turn, eos_token="<|endoftext|>")
        except TemplateError as error:
            raise ValueError(f"{folder}: its chat template refuses these messages ({error})") from None

    return render


def files_of(folder):
    """{name: bytes} of a folder's tokenizer, for an export that keeps them."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
