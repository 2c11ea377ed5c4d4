"""Text <-> ids. Two tokenizers with one interface:

  tokenizer.model   sentencepiece BPE, trained on one's own data by prepare.py (train_sentencepiece)
  qwen.tiktoken     the vocabulary of Qwen 1 to 2.5, which Steel-LLM uses, run by tiktoken; from its
                    tokenizer.json or vocab.json as well

    tokenizer = load_tokenizer("data/default")       # a folder that holds one of these files, or the file
    ids = tokenizer.encode("滚滚长江东逝水")           # text never becomes a special id, whatever it says
    text = tokenizer.decode(ids)

    python tokenizer.py compare my.txt               # all tokenizers under data/ on a text
    python tokenizer.py compare my.txt data/mine vocab.json

Both map every id to a fixed byte string, so that decoding is joining bytes, the length of a text in bytes is
a sum over its ids, and the round trip is exact for every valid Unicode text (Qwen: for its NFC form).
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

END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, CHAT_START, CHAT_END)
DEFAULT_SYSTEM = "You are a helpful assistant."
CHAT_TEMPLATE = (  # encode_chat once more, in the language of transformers
    "{% if messages[0].role != 'system' %}" f"{CHAT_START}system\n{DEFAULT_SYSTEM}{CHAT_END}\n" "{% endif %}"
    "{% for message in messages %}" f"{CHAT_START}{{{{ message.role }}}}\n{{{{ message.content }}}}{CHAT_END}\n" "{% endfor %}"
    "{% if add_generation_prompt %}" f"{CHAT_START}assistant\n" "{% endif %}"
)  # fmt: skip


class Tokenizer:
    """What both tokenizers share.

    token_bytes       list: the bytes of each id; empty for the specials
    vocab_size        how many ids there are; ids from here on must never be sampled
    embedding_rows    rows of an embedding for this tokenizer: vocab_size, or what the published models pad it to
    eos_id            ends a document; chat_start_id, chat_end_id frame a turn of a conversation
    content           bytes of the file, called FILE, that it is kept in beside data and checkpoints, whatever it was loaded from
    """

    def __init__(self, path, content, token_bytes, special_ids, embedding_rows):
        self.path, self.content = Path(path), content
        self.token_bytes = token_bytes
        self.vocab_size = len(token_bytes)
        self.embedding_rows = embedding_rows
        self.eos_id, self.chat_start_id, self.chat_end_id = special_ids

    def encode(self, text):
        """str -> list of ids, specials excluded. Lone surrogates, which UTF-8 cannot hold, become "?"."""
        raise NotImplementedError

    def encode_array(self, text):
        """As encode, -> uint32 array."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids):
        """ids -> str. Specials vanish; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def stream(self, ids):
        """Iterator of ids -> iterator of str. A character comes out when its last byte is there, never in parts."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if text := decoder.decode(self.token_bytes[i]):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def encode_chat(self, messages, open_turn=False):
        """[{"role", "content"}, ...] -> (ids, loss_mask), both lists of the same length, in Qwen's ChatML template.

        loss_mask is 1 on what the assistant writes and on the mark that ends its turn, else 0. open_turn adds the
        start of an assistant's turn, for generation. Content is encoded as plain text: it cannot forge a marker.
        """
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
        ids, mask = [], []
        newline = self.encode("\n")

        def add(new_ids, counted):
            ids.extend(new_ids)
            mask.extend([counted] * len(new_ids))

        for message in messages:
            head = self.encode(message["role"] + "\n")
            body = self.encode(message["content"])
            add([self.chat_start_id, *head], 0)
            add([*body, self.chat_end_id], int(message["role"] == "assistant"))
            add(newline, 0)
        if open_turn:
            add([self.chat_start_id, *self.encode("assistant\n")], 0)
        return ids, mask

    def transformers_files(self):
        """-> {file name: text}: a folder with these is what AutoTokenizer.from_pretrained of transformers reads.

        It gives the ids of encode, of encode_chat (apply_chat_template), and the text of decode for all that encode gives.
        Two things differ: markers in a text become special ids there (unless split_special_tokens=True), and the own
        tokenizer's ids that stop within a character decode to one U+FFFD for each byte.
        """
        added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        special_ids = (self.eos_id, self.chat_start_id, self.chat_end_id)
        normalizer, pre_tokenizer, decoder, vocab, merged = self.transformers_parts()
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                 "fuse_unk": False, "byte_fallback": "<0x00>" in vocab, "ignore_merges": False,
                 "vocab": vocab, "merges": merges_of(merged)}  # fmt: skip
        tokenizer = {"version": "1.0", "truncation": None, "padding": None,
                     "added_tokens": [{"id": i, "content": text, **added} for i, text in sorted(zip(special_ids, SPECIALS))],
                     "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None,
                     "decoder": decoder, "model": model}  # fmt: skip
        # Without auto_map transformers takes the tokenizer class of Qwen2 for every Qwen2 model, whatever tokenizer_class says.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": [None, "TokenizersBackend"]}, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
                  "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}  # fmt: skip
        write = lambda content: json.dumps(content, ensure_ascii=False)
        return {"tokenizer.json": write(tokenizer), "tokenizer_config.json": write(config)}

    def transformers_parts(self):
        """-> normalizer, pre_tokenizer, decoder, {token: id}, and the tokens that take part in merges, those made first in front."""
        raise NotImplementedError


def merges_of(tokens):
    """[[left, right], ...]: every pair of tokens that makes a token, in the order of the tokens they make.

    Both tokenizers join the neighbours that make the earliest token, whichever they are; transformers wants the pairs.
    """
    known = set(tokens)
    return [[t[:i], t[i:]] for t in tokens for i in range(1, len(t)) if t[:i] in known and t[i:] in known]


# ---------------------------------------------------------------------------------------------------------------
# sentencepiece

SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character, so the character itself needs care


class SentencePiece(Tokenizer):
    FILE = "tokenizer.model"

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor

        content = Path(path).read_bytes()
        try:
            self.processor = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise SystemExit(f"{path} is not a sentencepiece model ({error}): run prepare.py again into a new folder")
        is_special = [self.processor.is_control(self.processor.piece_to_id(piece)) for piece in SPECIALS]
        if not all(is_special) or not self.processor.is_byte(self.processor.piece_to_id("<0x00>")):
            raise SystemExit(f"{path} lacks byte fallback or the control pieces {', '.join(SPECIALS)}: train one with prepare.py")
        pieces = [self.processor.id_to_piece(i) for i in range(len(self.processor))]
        special_ids = [self.processor.piece_to_id(piece) for piece in SPECIALS]
        token_bytes = []
        for i, piece in enumerate(pieces):
            if self.processor.is_byte(i):
                token_bytes.append(bytes([int(piece[3:5], 16)]))
            elif self.processor.is_control(i) or self.processor.is_unknown(i):
                token_bytes.append(b"")
            else:
                token_bytes.append(piece.replace(SPACE_MARK, " ").encode("utf-8"))
        self.space_mark_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]
        super().__init__(path, content, token_bytes, special_ids, embedding_rows=len(token_bytes))

    def encode(self, text):
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        first, *rest = text.split(SPACE_MARK)
        ids = self.processor.encode(first)
        for part in rest:
            ids += self.space_mark_ids + self.processor.encode(part)
        return ids

    def transformers_parts(self):
        sp = self.processor
        tokens = [sp.id_to_piece(i).replace(SPACE_MARK, " ") for i in range(len(sp))]  # so that the mark itself is spelt in bytes there too
        fixed = lambda i: sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or tokens[i] == "\n"  # joined with nothing
        merged = [tokens[i] for i in sorted(range(len(sp)), key=sp.get_score, reverse=True) if not fixed(i)]
        decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
        return None, None, decoder, {token: i for i, token in enumerate(tokens)}, merged


def train_sentencepiece(texts, vocab_size, path):
    """Train a lossless byte-fallback BPE on an iterable of str and write it to path (a .model file).

    Takes about 33 bytes of memory for each byte of text: give it a sample. (Its own sampling is another one in every run.)

    Every setting below is needed for the round trip to be exact or for Chinese to be cut well; with
    sentencepiece's defaults three texts of four do not come back as they were.
    """
    from sentencepiece import SentencePieceTrainer, set_min_log_level

    refusal = None

    def sentences():
        # The trainer drops long lines without a word, so it gets pieces of 1,000 characters (4,000 bytes) at most.
        nonlocal refusal
        try:
            for text in texts:
                for sentence in re.split(r"(?<=[。！？\n])", text):
                    for start in range(0, len(sentence), 1000):
                        yield sentence[start : start + 1000]
        except SystemExit as error:  # sentencepiece would turn it into an error of its own
            refusal = error

    set_min_log_level(2)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            byte_fallback=True, character_coverage=0.9995, split_digits=True, allow_whitespace_only_pieces=True,
            max_sentencepiece_length=8, user_defined_symbols=["\n"],
            control_symbols=[CHAT_START, CHAT_END], unk_id=0, eos_id=1, eos_piece=END_OF_TEXT, bos_id=-1, pad_id=-1,
            max_sentence_length=4192,
        )  # fmt: skip
    except RuntimeError as error:
        if refusal:
            raise refusal
        reason = re.sub(r"^.*\] *", "", str(error).strip().splitlines()[-1])
        raise SystemExit(f"no tokenizer of {vocab_size} pieces from this text ({reason}): more text, a smaller --vocab-size, or another folder's with --tokenizer FOLDER")
    if refusal:
        raise refusal
    temporary = Path(f"{path}.tmp")  # a full disk must not leave half of a model
    temporary.write_bytes(model.getvalue())
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------------
# Qwen

QWEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_EMBEDDING_ROWS = 151_936  # of the published models, Steel-LLM's too: 151,646 ids and padding

# The alphabet in which .json files write bytes (GPT-2's): printable ones as themselves, the others from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
CHARACTER_OF = {byte: byte for byte in PRINTABLE}
CHARACTER_OF |= {byte: 0x100 + n for n, byte in enumerate(sorted(set(range(0x100)) - set(PRINTABLE)))}


def qwen_content(path):
    """What qwen.tiktoken holds, one line "base64 rank" a token, from any of the forms of the vocabulary."""
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    vocab = json.loads(content)
    if isinstance(vocab.get("model"), dict):  # tokenizer.json; in vocab.json "model" is a token like any other
        added = {token["id"]: token["content"] for token in vocab["added_tokens"]}
        vocab = vocab["model"]["vocab"]
        if [added.get(len(vocab) + i) for i in range(len(SPECIALS))] != list(SPECIALS):
            raise ValueError("other special tokens")
    byte_of = {character: byte for byte, character in CHARACTER_OF.items()}
    ranked = sorted(vocab.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token.translate(byte_of).encode("latin-1")) + b" %d\n" % rank for token, rank in ranked)


class Qwen(Tokenizer):
    FILE = "qwen.tiktoken"

    def __init__(self, path):
        import tiktoken

        try:
            content = qwen_content(Path(path))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            content = b""  # JSON of another shape
        if hashlib.sha256(content).hexdigest() != QWEN_SHA256:
            raise SystemExit(f"{path} is not Qwen's vocabulary (sha256 of its ranks differs): fetch it with prepare.py --tokenizer qwen")
        token_bytes = [base64.b64decode(line.split()[0]) for line in content.splitlines()]
        special_ids = [len(token_bytes) + i for i in range(len(SPECIALS))]
        self.encoding = tiktoken.Encoding(
            "qwen", pat_str=QWEN_PATTERN, special_tokens=dict(zip(SPECIALS, special_ids)),
            mergeable_ranks={token: rank for rank, token in enumerate(token_bytes)},
        )  # fmt: skip
        super().__init__(path, content, token_bytes + [b""] * len(SPECIALS), special_ids, QWEN_EMBEDDING_ROWS)

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_array(self, text):  # without a list of Python numbers in between
        text = unicodedata.normalize("NFC", text.encode("utf-8", errors="replace").decode("utf-8"))
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # half a million spaces in a row are too much for tiktoken's regular expressions
            pieces = [text[start : start + 10_000] for start in range(0, len(text), 10_000)]
            return np.concatenate([self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def transformers_parts(self):
        tokens = [token.decode("latin-1").translate(CHARACTER_OF) for token in self.token_bytes[: self.eos_id]]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        return {"type": "NFC"}, pre_tokenizer, byte_level, {token: i for i, token in enumerate(tokens)}, tokens


# ---------------------------------------------------------------------------------------------------------------

FILES = {SentencePiece.FILE: SentencePiece, Qwen.FILE: Qwen, "tokenizer.json": Qwen, "vocab.json": Qwen}


def load_tokenizer(path, rows=None):
    """The tokenizer in a folder (data/NAME, a checkpoint, a Hugging Face model) or in one file, told apart by the file's ending.

    rows: how many ids the model has that it is for; a tokenizer with more is refused.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).exists()]
        if not found:
            raise SystemExit(f"no tokenizer in {path}: expected one of {', '.join(FILES)}")
        path = found[0]
    if not path.exists():
        raise SystemExit(f"no tokenizer {path}: expected a folder, a .model, a .tiktoken or a .json file")
    kinds = {Path(name).suffix: kind for name, kind in FILES.items()}
    if path.suffix not in kinds:
        raise SystemExit(f"{path} is no tokenizer: expected a file ending in {' or '.join(kinds)}")
    tokenizer = kinds[path.suffix](path)
    if rows is not None and tokenizer.vocab_size > rows:
        raise SystemExit(f"{path} has {tokenizer.vocab_size} ids, the model beside it {rows}: they do not belong together")
    return tokenizer


def read_text(path):
    """A UTF-8 file as it is, line ends too; 0 is standard input."""
    name = path or "standard input"
    try:
        with open(path, "rb", closefd=path != 0) as file:
            return file.read().decode("utf-8")
    except OSError as error:
        raise SystemExit(f"{name}: {error.strerror}")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{name} is not UTF-8 (byte {error.start}): convert it, e.g. iconv -f gb18030 -t utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Comparison


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Tokenizers on one text.")
    parser.add_argument("command", choices=["compare"])
    parser.add_argument("file", metavar="FILE", help="a UTF-8 text")
    parser.add_argument("tokenizers", nargs="*", metavar="TOKENIZER", help="folders or files (default: all folders under data)")
    return parser.parse_args(argv)


def compare(text, tokenizers):
    """Print a line for each: its ids, bytes of text per token, tokens/s of encode, and whether decode gives the text again."""
    print(f"{'tokenizer':<32}{'ids':>9}{'tokens':>12}{'bytes/token':>13}{'tokens/s':>12}  round trip")
    for tokenizer in tokenizers:
        start = time.perf_counter()
        ids = tokenizer.encode_array(text)
        seconds = time.perf_counter() - start
        back, round_trip = tokenizer.decode(ids), "exact"
        if back != text:
            same = len(os.path.commonprefix([text, back]))
            round_trip = f"from character {same} on {text[same : same + 8]!r} becomes {back[same : same + 8]!r}"
        print(f"{tokenizer.path!s:<32}{tokenizer.vocab_size:>9,}{len(ids):>12,}{len(text.encode('utf-8')) / len(ids):>13.3f}"
              f"{len(ids) / seconds:>12,.0f}  {round_trip}")  # fmt: skip


def main(argv=None):
    args = get_args(argv)
    text = read_text(args.file)
    if not text:
        raise SystemExit(f"{args.file} is empty: nothing to compare")
    given = args.tokenizers or sorted({path.parent for name in FILES for path in Path("data").glob(f"*/{name}")})
    if not given:
        raise SystemExit("no tokenizer under data: name one, or make one with python prepare.py")
    compare(text, [load_tokenizer(path) for path in given])


if __name__ == "__main__":
    main()
