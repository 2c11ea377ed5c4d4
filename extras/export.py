"""Write a checkpoint as a Hugging Face folder, or as a GGUF file.

    python -m extras.export out/demo --export out/demo-hf             # a step, or a run: its newest checkpoint
    python -m extras.export out/dense --export-gguf out/dense.gguf    # for llama.cpp and ollama

A dense model becomes a Qwen2 or a Qwen3, and a token-wise Soft MoE with a linear router a Qwen2-MoE, which other
programs know. Every other model is written with its own code, for transformers (extras/huggingface.py has the table).
"""

import argparse

from checkpoint import load
from common import run_command
from extras.chat_template import files_of
from extras.gguf_file import export_gguf
from extras.huggingface import OWN, architecture, export_folder
from extras.model_card import model_card
from extras.transformers_tokenizer import transformers_files

OWN_NOTE = """\
transformers runs this model by the code in the folder: from_pretrained(DIR, trust_remote_code=True)
vLLM and llama.cpp do not: they know ffn = dense, and vLLM also dispatch = token with router = linear"""


def get_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m extras.export", description=__doc__.split("\n\n")[0])
    newest = "a step or a run (default: the newest run under out)"
    parser.add_argument("checkpoint", nargs="?", default="out", metavar="CHECKPOINT", help=newest)
    parser.add_argument("--export", metavar="DIR", help="a Hugging Face folder, new or empty")
    parser.add_argument("--export-gguf", metavar="FILE", help="a file for llama.cpp, of a dense model")
    args = parser.parse_args(argv)
    if not (args.export or args.export_gguf):
        parser.error("name what to write: --export DIR or --export-gguf FILE")
    return args


def main(argv=None):
    args = get_args(argv)
    model, tokenizer, info = load(args.checkpoint)
    for flag, path, write in (("--export", args.export, to_folder), ("--export-gguf", args.export_gguf, export_gguf)):
        if path:
            try:
                write(model, tokenizer, info, path)
            except OSError as error:
                raise ValueError(f"{flag} {path}: {error.strerror}: name another place, or make room") from None
            kind = architecture(model.config)
            print(f"exported: {info.path} -> {path}, {kind}")
            if kind == OWN:
                print(OWN_NOTE)


def to_folder(model, tokenizer, info, folder):
    if tokenizer.brings:  # of a folder: its tokenizer as it is
        files = files_of(info.path)
    else:
        files = {name: text.encode("utf-8") for name, text in transformers_files(tokenizer).items()}
        files[tokenizer.FILE] = tokenizer.content
    files["README.md"] = model_card(model, tokenizer, info, architecture(model.config)).encode("utf-8")
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": [tokenizer.eos_id, tokenizer.chat_end_id]}
    padding_ids = range(tokenizer.vocab_size, model.config.vocab_size)
    export_folder(model, folder, files, ends, padding_ids, info.chat, info.eos_first)


if __name__ == "__main__":
    run_command(main)
