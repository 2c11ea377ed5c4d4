"""Files -> documents.

    for part in file_parts(["raw/", "my.txt"]):
        for where, document in part.documents():
            ...

By the ending of a file:

.txt        cut at line ends into documents of about 2,000 characters; UTF-8, or UTF-16 with a byte order mark
.jsonl      a row a line
.json       an array of rows, or rows one after another
.parquet    a row each (needs pyarrow)
.html .htm  a saved page is one document: its main text (needs trafilatura)
.gz         any of them, compressed
"""

import codecs
import contextlib
import functools
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import sha256_of, track
from corpus.documents import Document
from corpus.mappers import open_fence
from corpus.rows import FIELDS, document_of, no_text_in

TEXT_SIZE = 2000  # characters in a document of a .txt file, about
PART_BYTES = 64 << 20  # input is read in parts of about this size, so that several processes can share it

# ----------------------------------------------------------------------------------------------------------------------
# Readers: (open binary file, its path) -> (where, Document) of each document


def read_txt(file, path, first_line=1):
    """Documents of about TEXT_SIZE characters, cut at line ends, but not in a fence of code that is not far longer.

    Lines are numbered from first_line on.
    """
    document, size, longest, fence = [], 0, TEXT_SIZE, ""
    problem, at = "", first_line  # at: the line that is named
    for number, line in enumerate(utf8_lines(file), first_line):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            text = line.decode("utf-8", errors="replace")
            if not problem:
                problem, at = not_utf8(error), number
        for part in LINE_END_OF_OLD_MACS.split(text):
            document.append(part)
            size += len(part)
            if fence != (fence := open_fence(part, fence)):
                longest = 10 * TEXT_SIZE if fence else TEXT_SIZE
            if size >= longest:
                yield f"{path}, line {at}", Document("".join(document), problem=problem)
                document, size, longest = [], 0, TEXT_SIZE  # what is left of a fence that is too long is cut like text
                problem, at = "", number + 1
    if any(document):
        yield f"{path}, line {at}", Document("".join(document), problem=problem)


LINE_END_OF_OLD_MACS = re.compile(r"(?<=\r)(?!\n)")


def utf8_lines(file):
    """The lines of a binary file as UTF-8, of one in UTF-16 too, if it begins with a byte order mark."""
    if not is_utf16(file):
        yield from file
        return
    text = io.TextIOWrapper(file, "utf-16", errors="replace", newline="\n")
    for line in text:
        yield line.encode("utf-8")
    text.detach()  # else the file is closed with it


def is_utf16(file):
    """Whether a binary file begins with the byte order mark of UTF-16. Lines of a part of a file (a list) do not."""
    return hasattr(file, "peek") and file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def not_utf8(error):
    fix = "convert the file, e.g. iconv -f gb18030 -t utf-8, or if it is UTF-16, iconv -f utf-16le -t utf-8"
    return f"not UTF-8 (byte {error.start} of the line): {fix}"


def read_jsonl(file, path, first_line=1):
    """A document for each line that is not blank. Lines are numbered from first_line on."""
    folder = folder_name(path)
    for number, line in enumerate(utf8_lines(file), first_line):
        if line.strip():
            yield f"{path}, line {number}", document_or_problem(functools.partial(parse_line, line), folder, line)


def folder_name(path):
    return path.resolve().parent.name


def parse_line(line):
    return json.loads(line.decode("utf-8-sig"), strict=False)  # control characters in strings are cleaned away later


def document_or_problem(get_row, folder, raw):
    """document_of the row that get_row() gives, or a Document whose problem says why that fails."""
    try:
        return document_of(get_row(), folder)
    except UnicodeDecodeError as error:
        problem = not_utf8(error)
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg})"
    except RecursionError:
        problem = "JSON nested too deeply"
    except ValueError as error:
        problem = str(error)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
    ) as error:  # values that Python or rows.py cannot hold
        problem = f"a value that cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})"
    return Document(raw.decode("utf-8", errors="replace") if isinstance(raw, bytes) else str(raw), problem=problem)


def read_json(file, path):
    """An array of rows, or one row over many lines, or a row a line in spite of the file's name.

    ValueError where it is not JSON, since after an error nobody knows where the next row begins.
    """
    encoding = "utf-16" if is_utf16(file) else "utf-8-sig"
    head = file.read(1 << 16).decode(encoding, errors="replace").lstrip()
    file.seek(0)
    if not head.startswith("[") and head.partition("\n")[0].strip() != "{":
        yield from read_jsonl(file, path)
        return
    folder = folder_name(path)
    number = 0
    try:
        for number, row in enumerate(json_values(io.TextIOWrapper(file, encoding=encoding)), 1):
            yield f"{path}, row {number}", document_or_problem(lambda row=row: row, folder, row)
    except (ValueError, RecursionError) as error:
        reason = f"not JSON ({getattr(error, 'msg', error)})"
        if isinstance(error, UnicodeDecodeError):
            reason = "not UTF-8" if encoding == "utf-8-sig" else "not UTF-16"
        fix = "fix it; in a .jsonl file, with a row a line, only bad lines would be lost"
        raise ValueError(f"{path}: {reason} after row {number}: {fix}") from None


def json_values(file):
    """Yield the values of JSON arrays, or of values one after another, without holding the whole file."""
    decoder = json.JSONDecoder(strict=False)
    separators = re.compile(r"[\s,]*")
    text, at = "", 0
    size = 1 << 20
    in_array = False
    while True:
        at = separators.match(text, at).end()
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
            text, at, size = text[at:] + more, 0, 2 * size  # doubled each time: linear in the longest value
            continue
        size = 1 << 20
        yield value


def read_parquet(file, path):
    """A document for each row. Only columns that a document can be made of are read."""
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    folder = folder_name(path)
    number = 0
    try:
        parquet = ParquetFile(file)
        columns = [name for name in parquet.schema_arrow.names if name in FIELDS]
        if not columns:
            raise ValueError(f"{path}: {no_text_in(parquet.schema_arrow.names)}")
        for batch in parquet.iter_batches(batch_size=1000, columns=columns):
            rows = None
            with contextlib.suppress(ValueError, ArithmeticError, ArrowException):  # then one row at a time: slow
                rows = batch.to_pylist()
            for i in range(batch.num_rows):
                number += 1
                get_row = functools.partial(row_of_batch, rows or batch, i)
                yield f"{path}, row {number}", document_or_problem(get_row, folder, "")
    except (OSError, ArrowException) as error:
        reason = str(error).splitlines()[0]
        fix = "fetch it again, then run the same command again"
        raise ValueError(f"{path}: damaged after row {number} ({reason}): {fix}") from None


def row_of_batch(batch, i):
    """Row i of a list of rows or a pyarrow batch, with bytes as text."""
    row = batch[i] if isinstance(batch, list) else batch.slice(i, 1).to_pylist()[0]
    return {name: value.decode("utf-8") if isinstance(value, bytes) else value for name, value in row.items()}


def read_html(file, path):
    """The main text of a saved page, without menus, scripts and boilerplate."""
    try:
        from trafilatura import extract
    except ImportError:
        fix = "pip install trafilatura lxml_html_clean"
        raise ValueError(f"{path}: reading saved web pages needs trafilatura: {fix}") from None
    content = file.read()
    page = decode_page(content)
    if page is None:
        yield str(path), Document(content.decode("utf-8", errors="replace"), problem="in no encoding that is known")
    else:
        yield str(path), Document(extract(page, favor_precision=True, include_comments=False) or "")


CHARSET = re.compile(rb"""<meta[^<>]*?charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""", re.IGNORECASE)


def decode_page(content):
    """Bytes of a page -> text, by byte order mark, then declared charset, then trial; None if nothing fits."""
    declared = [match.decode("ascii").lower() for match in CHARSET.findall(content[:4096])[:1]]
    declared = [name for name in declared if not name.startswith("utf-16")]  # the declaration was found as ASCII
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        declared = ["utf-16"]
    # Pages that declare one of its subsets use all of GB18030.
    declared = ["gb18030" if name in ("gb2312", "gbk", "gb_2312-80", "x-gbk") else name for name in declared]
    for name in [*declared, "utf-8-sig", "gb18030", "big5"]:
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            return content.decode(name)
    return None


READERS = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".html": read_html,
    ".htm": read_html,
}


def suffix_of(path):
    """What tells the reader: .jsonl for a.jsonl and for a.jsonl.gz."""
    return Path(path.stem).suffix.lower() if is_gzip(path) else path.suffix.lower()


def is_gzip(path):
    return path.suffix.lower() == ".gz"


# ----------------------------------------------------------------------------------------------------------------------
# Parts: the input, divided among processes


@dataclass
class Part:
    """Some whole files, or some lines of a large file: what one process reads and writes to shards of its own."""

    source: str
    paths: list
    hashes: list  # sha256 of each file
    start: int = 0  # bytes; of a large file of lines
    stop: int | None = None
    first_line: int = 1
    size: int = 0  # bytes
    read: Callable | None = None  # of the default data: returns its documents

    @property
    def sha256(self):
        return self.hashes[0] if len(self.hashes) == 1 else hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    @property
    def name(self):
        first = self.paths[0] if self.stop is None else f"{self.paths[0]}, bytes {self.start} to {self.stop}"
        return utf8_name(first if len(self.paths) == 1 else f"{first} and {len(self.paths) - 1} more")

    def documents(self):
        """Yield (where, Document); self.position is how many bytes have been read so far.

        ValueError names a file that cannot be read to its end.
        """
        self.position = 0
        if self.read:
            for number, document in enumerate(self.read(), 1):
                yield f"{self.source}, document {number}", document
            return
        for path in self.paths:
            yield from self._documents_of(path)

    def _documents_of(self, path):
        before, where = self.position, f"{path}, line 1"
        fix = "then run the same command again"
        try:
            with open(path, "rb") as raw:
                if self.stop is None:
                    found = READERS[suffix_of(path)](gzip.open(raw) if is_gzip(path) else raw, path)
                else:
                    raw.seek(self.start)
                    found = READERS[suffix_of(path)](lines_until(raw, self.stop), path, self.first_line)
                for where, document in found:
                    self.position = before + raw.tell() - self.start
                    yield where, document
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            place = where.rpartition(", ")[2]
            raise ValueError(f"{path}: damaged after {place} ({error}): fetch it again, {fix}") from None
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{path}: cannot be read ({reason}): fix or remove it, {fix}") from None


def lines_until(file, stop):
    """Yield the lines of a binary file that begin before byte `stop`."""
    at = file.tell()
    while at < stop and (line := file.readline()):
        at += len(line)
        yield line


def utf8_name(name):
    """A file name as text that can be written, even if its bytes are not UTF-8."""
    return str(name).encode("utf-8", errors="replace").decode("utf-8")


def file_parts(inputs, out=None):
    """Files and folders -> list of Parts of about PART_BYTES each. A source is named after its file or folder.

    Hidden files of a folder are not read, nor what is in the folder `out`. ValueError for what is missing, given twice,
    or of an unknown kind.
    """
    parts, seen = [], set()
    for file_or_folder in map(Path, inputs):
        if not file_or_folder.exists():
            raise ValueError(f"{file_or_folder}: no such file or folder")
        paths = files_in(file_or_folder, out) if file_or_folder.is_dir() else [file_or_folder]
        if not paths or suffix_of(paths[0]) not in READERS:
            expected = f"expected files ending in {', '.join(READERS)}, or .gz of them"
            raise ValueError(f"{file_or_folder}: nothing to read; {expected}")
        for path in paths:
            if path.resolve() in seen:
                raise ValueError(f"{path}: given twice")
            seen.add(path.resolve())
        parts += parts_of_source(source_name(file_or_folder), paths)
    return parts


def source_name(path):
    """my.jsonl.gz -> my; the name of a folder, also of "."."""
    if path.is_dir():
        return utf8_name(path.resolve().name)
    return utf8_name(re.sub(r"\.\w+(\.gz)?$", "", path.name, flags=re.IGNORECASE))


def parts_of_source(source, paths):
    """Small files together, large files of lines cut: parts of about PART_BYTES, in the order of paths."""
    parts, group, group_size = [], [], 0
    for path in track(paths, f"hashing {source}", "files"):
        size = path.stat().st_size
        if size > PART_BYTES and suffix_of(path) in (".txt", ".jsonl") and not is_gzip(path):
            with open(path, "rb") as file:
                has_lines_of_bytes = not is_utf16(file)
            if has_lines_of_bytes:
                parts += line_parts(source, path)
                continue
        if group and group_size + size > PART_BYTES:
            parts.append(whole_files(source, group))
            group, group_size = [], 0
        group.append(path)
        group_size += size
        if not size:
            print(f"{path}: empty", file=sys.stderr)
    return [*parts, whole_files(source, group)] if group else parts


def files_in(folder, out):
    """The files of a folder that can be read, sorted. Prints on stderr what else is there."""
    found, others = [], Counter()
    seen = {folder.resolve()} | ({out.resolve()} if out else set())
    for path in paths_in(folder, seen):
        if path.is_file() and suffix_of(path) in READERS:
            found.append(path)
        else:
            others[path.suffix or "no ending" if path.is_file() else "broken link"] += 1
    if others:
        counts = ", ".join(f"{number} {kind}" for kind, number in others.most_common())
        print(f"{folder}: not read: {counts}", file=sys.stderr)
    return found


def paths_in(folder, seen):
    """Yield what is in a folder and its folders, sorted, without hidden things. Links are followed.

    seen: resolved paths that are passed over; what is yielded is added, so that a loop of links ends.
    """
    for path in sorted(folder.iterdir()):
        resolved = path.resolve()
        if path.name.startswith(".") or resolved in seen:
            continue
        seen.add(resolved)
        if path.is_dir():
            yield from paths_in(path, seen)
        else:
            yield path


def whole_files(source, paths):
    return Part(source, paths, [sha256_of(path) for path in paths], size=sum(path.stat().st_size for path in paths))


def line_parts(source, path):
    """A large file of lines, cut at line ends into Parts of about PART_BYTES."""
    sha256 = hashlib.sha256()
    at, line_number = 0, 1
    cuts = [(at, line_number)]
    with open(path, "rb") as file:
        chunks = iter(functools.partial(file.read, PART_BYTES), b"")
        for chunk in track(chunks, f"hashing {path.name}", "parts", total=path.stat().st_size // PART_BYTES + 1):
            rest = file.readline()  # a part ends with a line
            sha256.update(chunk)
            sha256.update(rest)
            at += len(chunk) + len(rest)
            line_number += chunk.count(b"\n") + rest.count(b"\n")
            cuts.append((at, line_number))
    hashes = [sha256.hexdigest()]
    return [
        Part(source, [path], hashes, start, stop, line, stop - start)
        for (start, line), (stop, _) in zip(cuts, cuts[1:])
    ]
