"""How well a checkpoint predicts text it has not seen.

    python eval.py                                    # newest checkpoint, on the held-out split of its data
    python eval.py out/demo/step-00000500 out/other   # several, a line each
    python eval.py --text my.txt                      # on a file of one's own

loss         nats per token
perplexity   exp(loss)
bpb          bits per byte of text: comparable between models with different tokenizers
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from model import Decoder, choose_device
from prepare import TokenData, file_sha256
from tokenizer import load_tokenizer

MAX_TOKENS = 1 << 20  # enough for bits per byte to be sure in the third decimal


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="*", default=["out"], metavar="CHECKPOINT", help="step or run directories")
    scored = parser.add_mutually_exclusive_group()
    scored.add_argument("--data", help="a prepared folder, instead of the one the checkpoint was trained on")
    scored.add_argument("--text", help="a UTF-8 file to score instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    return parser.parse_args(argv)


@torch.no_grad()
def evaluate(model, blocks, token_bytes, device="cpu", batch_tokens=4096, max_tokens=MAX_TOKENS, rank=0, world=1):
    """Score blocks of T + 1 ids (-1 after the end of a text: not counted) -> {"loss", "perplexity", "bpb", "tokens"}.

    Of more than max_tokens, evenly spaced blocks are taken. bpb divides by the bytes of the counted targets; special
    ids have none, but their nats count. With world > 1 every rank scores its share and all get the same result.
    """
    T = len(blocks[0]) - 1
    chosen = np.linspace(0, len(blocks) - 1, num=min(len(blocks), max(1, max_tokens // T)), dtype=np.int64)[rank::world]
    byte_lengths = np.array([len(b) for b in token_bytes])
    nats, tokens, text_bytes = 0.0, 0, 0
    batch = max(1, batch_tokens // T)
    training = model.training
    model.eval()
    for start in range(0, len(chosen), batch):
        ids = np.stack([blocks[i] for i in chosen[start : start + batch]])
        counted = ids[:, 1:][ids[:, 1:] >= 0]
        ids = torch.from_numpy(ids).to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            nats += model(ids[:, :-1], ids[:, 1:]).item() * len(counted)
        tokens += len(counted)
        text_bytes += int(byte_lengths[counted].sum())
    model.train(training)
    if world > 1:
        sums = torch.tensor([nats, tokens, text_bytes], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        nats, tokens, text_bytes = sums.tolist()
    loss, bpb = nats / tokens, nats / math.log(2) / max(text_bytes, 1)
    return {"loss": loss, "perplexity": math.exp(loss), "bpb": bpb, "tokens": int(tokens)}


def text_blocks(path, tokenizer, T):
    """A file as blocks of T + 1 ids that begin with eos and overlap by one; the last is filled up with -1."""
    try:
        ids = [tokenizer.eos_id, *tokenizer.encode(Path(path).read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8 (byte {error.start}): convert it, e.g. iconv -f gb18030 -t utf-8")
    if len(ids) == 1:
        raise SystemExit(f"{path} is empty: nothing to score")
    n = math.ceil((len(ids) - 1) / T)
    padded = np.full(n * T + 1, -1, dtype=np.int64)
    padded[: len(ids)] = ids
    return [padded[i * T : i * T + T + 1] for i in range(n)]


def main(argv=None):
    args = get_args(argv)
    device = choose_device(args.device)
    print(f"{'checkpoint':<32}{'loss':>9}{'perplexity':>12}{'bpb':>9}{'tokens':>11}")
    for given in args.checkpoints:
        model = Decoder.load(given).to(device)
        path, config, tokenizer = model.checkpoint, model.config, load_tokenizer(model.checkpoint)
        if args.text:
            blocks = text_blocks(args.text, tokenizer, config.block_size)
        else:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            blocks = TokenData(args.data or state["args"]["data"], "val", config.block_size)
            if blocks.manifest["tokenizer"]["sha256"] != file_sha256(tokenizer.path):
                raise SystemExit(f"{blocks.path} was prepared with another tokenizer than {path}: score its text with --text")
        result = evaluate(model, blocks, tokenizer.token_bytes, device)
        leaky = "  leaky: it reads what it predicts" if config.ffn == "soft_moe" and config.dispatch == "sequence" else ""
        print(f"{str(path):<32}{result['loss']:>9.4f}{result['perplexity']:>12.2f}{result['bpb']:>9.4f}"
              f"{result['tokens']:>11,}{leaky}")  # fmt: skip


if __name__ == "__main__":
    main()
