"""Text <-> ids. Two tokenizers with one interface:

  tokenizer.model   a sentencepiece BPE that prepare.py trains on your text (train_sentencepiece)
  qwen.tiktoken     the vocabulary of Qwen 1 to 2.5, which Steel-LLM uses too, run by tiktoken.
                    Qwen's tokenizer.json and vocab.json are read as well.

    tokenizer = load_tokenizer("data/default")       # a folder with one of these files, or the file itself
    ids = tokenizer.encode("滚滚长江东逝水")           # text never becomes a special id, even if it contains a marker
    text = tokenizer.decode(ids)

    python tokenizer.py compare my.txt               # all tokenizers under data/ on one text
    python tokenizer.py compare my.txt data/mine vocab.json

Both map each id to a fixed byte string. So decoding joins bytes, the length of a text in bytes is a sum over its ids,
and the round trip is exact for every valid Unicode text (with Qwen: for its NFC form).
"""

import argparse
import base64
import codecs
import hashlib
import io
import json
import os
import re
import time
import unicodedata
from pathlib import Path

import numpy as np

from common import read_text, run_command, write_atomically

END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, CHAT_START, CHAT_END)
DEFAULT_SYSTEM = "You are a helpful assistant."


class Tokenizer:
    """The interface of both tokenizers.

    token_bytes       list: the bytes of each id; empty for special ids
    vocab_size        number of ids; an id >= vocab_size must never be sampled
    embedding_rows    rows of an embedding for this tokenizer: vocab_size, or more where the original models pad it
    eos_id            ends a document; chat_start_id and chat_end_id begin and end a turn of a conversation
    FILE, content     name and bytes of the file that is stored beside data and checkpoints, whatever file was read
    brings            what a Hugging Face folder adds to it, which is not stored, in words; its own chat_template
    """

    brings = chat_template = ""

    def __init__(self, path, content, token_bytes, special_ids, embedding_rows):
        self.path, self.content = Path(path), content
        self.token_bytes = token_bytes
        self.vocab_size = len(token_bytes)
        self.embedding_rows = embedding_rows
        self.eos_id, self.chat_start_id, self.chat_end_id = special_ids

    def encode(self, text):
        """str -> list of ids, never a special one. Lone surrogates, which UTF-8 cannot express, become "?"."""
        raise NotImplementedError

    def encode_array(self, text):
        """Like encode, but returns a uint32 array."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids):
        """ids -> str. Special ids are dropped; invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def stream(self, ids):
        """Iterator of ids -> iterator of str. A character is yielded once all its bytes have arrived."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if text := decoder.decode(self.token_bytes[i]):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def encode_chat(self, messages, open_turn=False):
        """[{"role", "content"}, ...] -> (ids, loss_mask), two lists of equal length, in Qwen's ChatML format.

        loss_mask is 1 on what the assistant writes and on the marker that ends its turn, else 0. open_turn adds the
        start of an assistant's turn, for generation. Content is encoded as plain text, so it cannot forge a marker.
        """
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
        newline = self.encode("\n")
        ids, mask = [], []
        for message in messages:
            head = [self.chat_start_id, *self.encode(message["role"] + "\n")]
            body = [*self.encode(message["content"]), self.chat_end_id]
            ids += head + body + newline
            mask += [0] * len(head) + [int(message["role"] == "assistant")] * len(body) + [0] * len(newline)
        if open_turn:
            head = [self.chat_start_id, *self.encode("assistant\n")]
            ids, mask = ids + head, mask + [0] * len(head)
        return ids, mask


# ----------------------------------------------------------------------------------------------------------------------
# sentencepiece

SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character; in a text it is spelt in bytes instead


class SentencePiece(Tokenizer):
    FILE = "tokenizer.model"

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor

        content = Path(path).read_bytes()
        try:
            sp = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            reason = f"is not a sentencepiece model ({error}): run prepare.py again into a new folder"
            raise ValueError(f"{path} {reason}") from None
        special_ids = [sp.piece_to_id(piece) for piece in SPECIALS]
        has_specials = all(sp.is_control(i) for i in special_ids)
        if not has_specials or not sp.is_byte(sp.piece_to_id("<0x00>")) or sp.is_unknown(sp.piece_to_id(SPACE_MARK)):
            reason = f"lacks byte fallback, a space or the pieces {', '.join(SPECIALS)}: train one with prepare.py"
            raise ValueError(f"{path} {reason}")
        token_bytes = []
        for i in range(len(sp)):
            if sp.is_byte(i):  # "<0xE5>"
                token_bytes.append(bytes([int(sp.id_to_piece(i)[3:5], 16)]))
            elif sp.is_control(i) or sp.is_unknown(i):
                token_bytes.append(b"")
            else:
                token_bytes.append(sp.id_to_piece(i).replace(SPACE_MARK, " ").encode("utf-8"))
        self.processor = sp
        self.space_mark_ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]
        super().__init__(path, content, token_bytes, special_ids, embedding_rows=len(token_bytes))

    def encode(self, text):
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        first, *rest = text.split(SPACE_MARK)
        ids = self.processor.encode(first)
        for part in rest:
            ids += self.space_mark_ids + self.processor.encode(part)
        return ids


# With the default settings of sentencepiece, three of four texts change in a round trip.
TRAINING = {
    "model_type": "bpe",
    # for an exact round trip
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "user_defined_symbols": ["\n"],
    "required_chars": SPACE_MARK,  # where no text has a space, spaces would else be spelt in its bytes
    # for Chinese: rare characters in bytes, words of at most 8 characters
    "character_coverage": 0.9995,
    "max_sentencepiece_length": 8,
    # for code and numbers
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    # ids
    "unk_id": 0,
    "eos_id": 1,
    "eos_piece": END_OF_TEXT,
    "control_symbols": [CHAT_START, CHAT_END],
    "bos_id": -1,
    "pad_id": -1,
}


def train_sentencepiece(texts, vocab_size, path):
    """Train a lossless BPE with byte fallback on an iterable of str and write it to path (a .model file).

    Takes about 33 bytes of memory per byte of text, so give it a sample (sentencepiece's own sampling is different in
    every run). An error that iterating over texts raises is raised here; too little text is a ValueError.
    """
    from sentencepiece import SentencePieceTrainer, set_min_log_level

    failures = []

    def sentences():
        try:
            for text in texts:
                for sentence in re.split(r"(?<=[。！？\n])", text):
                    # The trainer silently drops lines over max_sentence_length; 1,000 characters are <= 4,000 bytes.
                    yield from (sentence[start : start + 1000] for start in range(0, len(sentence), 1000))
        except Exception as error:  # kept, because sentencepiece raises an error of its own
            failures.append(error)
            raise

    set_min_log_level(2)
    model = io.BytesIO()
    settings = {**TRAINING, "vocab_size": vocab_size, "max_sentence_length": 4192}
    try:
        SentencePieceTrainer.train(sentence_iterator=sentences(), model_writer=model, **settings)
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces from this text: {advice(str(error))}") from None
    finally:  # an error of the texts takes precedence over the one that sentencepiece makes of it
        if failures:
            raise failures[0]
    write_atomically(Path(path), model.getvalue())


def advice(error):
    """What to do about an error of sentencepiece's trainer; its own words suit its own flags."""
    if least := re.search(r"vs (\d+)", error):
        return f"its characters alone need {least[1]}: set --vocab-size to that or more"
    if most := re.search(r"value <= (\d+)", error):
        return f"it makes {most[1]} at most: give more text, or set --vocab-size to that or less"
    return re.sub(r"^.*\] *", "", error.strip().splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Qwen

QWEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"  # of qwen.tiktoken
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_TOKENS = 151_643  # without special ones
QWEN_EMBEDDING_ROWS = 151_936  # in Qwen's models and Steel-LLM's: 151,646 ids and padding

# GPT-2's alphabet, in which .json files write bytes: printable bytes as themselves, the others from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = sorted(set(range(0x100)) - set(PRINTABLE))
CHARACTER_OF = {byte: byte for byte in PRINTABLE} | {byte: 0x100 + n for n, byte in enumerate(OTHERS)}


def qwen_content(path):
    """-> the bytes of qwen.tiktoken, one line "base64 rank" per token, from any of the forms of the vocabulary; and the
    added tokens [{id, content, special}] of a tokenizer.json."""
    content, added = path.read_bytes(), []
    if path.suffix != ".json":
        return content, added
    vocab = json.loads(content)
    if isinstance(vocab.get("model"), dict):  # tokenizer.json; in vocab.json "model" is a token like any other
        added = vocab["added_tokens"]
        names = {token["id"]: token["content"] for token in added}
        vocab = vocab["model"]["vocab"]
        if [names.get(len(vocab) + i) for i in range(len(SPECIALS))] != list(SPECIALS):
            raise ValueError("other special tokens")
    byte_of = {character: byte for byte, character in CHARACTER_OF.items()}
    lines = []
    for token, rank in sorted(vocab.items(), key=lambda item: item[1]):
        lines.append(base64.b64encode(token.translate(byte_of).encode("latin-1")) + b" %d\n" % rank)
    return b"".join(lines), added


def further_tokens(path, added):
    """[text, whether it is special] of the tokens that a model's folder adds to Qwen's vocabulary, by their ids.

    A folder with vocab.json has them in its tokenizer_config.json. ValueError if the ids do not follow on each other.
    """
    config = path.with_name("tokenizer_config.json")
    source = config if path.name == "vocab.json" and config.exists() else path
    try:
        if source == config:
            decoder = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
            added = [token | {"id": int(i)} for i, token in decoder.items()]
        first = QWEN_TOKENS + len(SPECIALS)
        further = {token["id"]: [token["content"], token["special"]] for token in added if token["id"] >= first}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{source} is damaged: download it again") from None
    if sorted(further) != list(range(first, first + len(further))):
        raise ValueError(
            f"{source}: its further special tokens have no ids one after another: nanoSteel cannot keep them"
        )
    return [further[i] for i in sorted(further)]


class Qwen(Tokenizer):
    """specials: {text: id} of the three special tokens, and of those that a model's folder adds to them."""

    FILE = "qwen.tiktoken"

    def __init__(self, path):
        import tiktoken

        try:
            content, added = qwen_content(Path(path))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # broken JSON, or of another shape
            content = b""
        if hashlib.sha256(content).hexdigest() != QWEN_SHA256:
            reason = "is not Qwen's vocabulary (sha256 of its ranks differs): fetch it with prepare.py --tokenizer qwen"
            raise ValueError(f"{path} {reason}")
        token_bytes = [base64.b64decode(line.split()[0]) for line in content.splitlines()]
        further = further_tokens(Path(path), added)
        texts = [*SPECIALS, *(text for text, _ in further)]
        self.specials = {text: len(token_bytes) + i for i, text in enumerate(texts)}
        self.encoding = tiktoken.Encoding(
            "qwen",
            pat_str=QWEN_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(token_bytes)},
            special_tokens=self.specials,
        )
        token_bytes += [b""] * len(SPECIALS) + [b"" if special else text.encode("utf-8") for text, special in further]
        special_ids = [self.specials[text] for text in SPECIALS]
        super().__init__(path, content, token_bytes, special_ids, QWEN_EMBEDDING_ROWS)

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_array(self, text):  # straight from tiktoken, without a list of Python integers in between
        text = unicodedata.normalize("NFC", text.encode("utf-8", errors="replace").decode("utf-8"))
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # tiktoken's regex engine fails on e.g. half a million spaces in a row
            pieces = [text[start : start + 10_000] for start in range(0, len(text), 10_000)]
            return np.concatenate([self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])


# ----------------------------------------------------------------------------------------------------------------------
# Loading

FILES = {SentencePiece.FILE: SentencePiece, Qwen.FILE: Qwen, "tokenizer.json": Qwen, "vocab.json": Qwen}


def load_tokenizer(path, rows=None):
    """The tokenizer in a folder (data/NAME, a checkpoint, a Hugging Face model) or in a file, told apart by its ending.

    rows: the vocabulary size of the model that it is for. ValueError if the tokenizer has more ids than that.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).exists()]
        if not found:
            raise ValueError(f"no tokenizer in {path}: expected one of {', '.join(FILES)}")
        path = found[0]
    if not path.exists():
        raise ValueError(f"no tokenizer {path}: expected a folder, a .model, a .tiktoken or a .json file")
    classes = {Path(name).suffix: tokenizer_class for name, tokenizer_class in FILES.items()}
    if path.suffix not in classes:
        raise ValueError(f"{path} is no tokenizer: expected a file ending in {' or '.join(classes)}")
    tokenizer = classes[path.suffix](path)
    size = tokenizer.vocab_size
    if rows is not None and size > rows:
        raise ValueError(f"{path} has {size} ids, the model beside it {rows}: they do not belong together")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# The command: compare tokenizers on one text


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Compare tokenizers on one text.")
    parser.add_argument("command", choices=["compare"])
    parser.add_argument("file", metavar="FILE", help="a UTF-8 text")
    parser.add_argument(
        "tokenizers", nargs="*", metavar="TOKENIZER", help="folders or files (default: all folders under data)"
    )
    return parser.parse_args(argv)


def compare(text, tokenizers):
    """Print a line for each: ids, bytes of text per token, tokens/s of encode, and whether the round trip is exact."""
    print(f"{'tokenizer':<32}{'ids':>9}{'tokens':>12}{'bytes/token':>13}{'tokens/s':>12}  round trip")
    for tokenizer in tokenizers:
        start = time.perf_counter()
        ids = tokenizer.encode_array(text)
        rate = len(ids) / (time.perf_counter() - start)
        bytes_per_token = len(text.encode("utf-8")) / len(ids)
        back = tokenizer.decode(ids)
        round_trip = "exact"
        if back != text:
            same = len(os.path.commonprefix([text, back]))
            round_trip = f"from character {same} on {text[same : same + 8]!r} becomes {back[same : same + 8]!r}"
        name, size = str(tokenizer.path), tokenizer.vocab_size
        print(f"{name:<32}{size:>9,}{len(ids):>12,}{bytes_per_token:>13.3f}{rate:>12,.0f}  {round_trip}")


def main(argv=None):
    args = get_args(argv)
    text = read_text(args.file)
    if not text:
        raise ValueError(f"{args.file} is empty: nothing to compare")
    paths = args.tokenizers or sorted({path.parent for name in FILES for path in Path("data").glob(f"*/{name}")})
    if not paths:
        raise ValueError("no tokenizer under data: name one, or make one with python prepare.py")
    compare(text, [load_tokenizer(path) for path in paths])


if __name__ == "__main__":
    run_command(main)
