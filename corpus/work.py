"""Resumable work files and worker processes of prepare.py."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from common import LINE_EVERY, how_far, lock_file, write_atomically

# ----------------------------------------------------------------------------------------------------------------------
# Work files: results in .work, each named after a hash of all that went into it


def digest_of(*things):
    return hashlib.sha256(repr(things).encode("utf-8", errors="replace")).hexdigest()[:24]


PACKAGES = "numpy ftfy opencc trafilatura lxml_html_clean pyarrow sentencepiece tiktoken".split()


@functools.cache
def surroundings():
    """What shards depend on beside the input: {name: version} of our code, Python and packages."""
    folder = Path(__file__).parent.parent
    files = [folder / name for name in ("prepare.py", "tokenizer.py", "data.py")]
    code = digest_of(*(path.read_bytes() for path in files + sorted(folder.glob("corpus/*.py"))))
    versions = {"code": code, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def code_digest():
    """A hash of all that shards depend on beside the input, so that work files of other code are not used."""
    return digest_of(surroundings())


def read_work(work, name):
    path = work / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_work(work, name, result):
    write_atomically(work / f"{name}.json", json.dumps(result).encode("utf-8"))
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Worker processes

COUNTS = None  # shared between processes: documents and bytes done


def progress(documents, size):
    """Report documents and bytes done, from any process."""
    for counter, increase in zip(COUNTS or (), (documents, size)):
        with counter.get_lock():
            counter.value += increase


def start_worker(counts, parent):
    global COUNTS
    COUNTS = counts
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def end_with_parent():  # a killed parent cannot end its workers, which must not write while the next run does
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def in_parallel(workers, function, tasks, what, total, unit):
    """[function(task) for task in tasks] in several processes, with a bar of `total` documents, or bytes if unit is B.

    function and tasks are pickled for the workers, which are new processes. ValueError if one of them is killed.
    """
    global COUNTS
    context = multiprocessing.get_context("spawn")
    COUNTS = [context.Value("q", 0), context.Value("q", 0)]
    done = threading.Event()
    bar = threading.Thread(target=show_progress, args=(COUNTS, done, what, total, unit))
    bar.start()
    workers = min(workers, len(tasks))
    try:
        if workers == 1:
            return [function(task) for task in tasks]
        with ProcessPoolExecutor(workers, context, start_worker, (COUNTS, os.getpid())) as pool:
            return list(pool.map(function, tasks))
    except BrokenProcessPool:
        fix = "run the same command again with fewer --workers"
        raise ValueError(f"a worker was killed, perhaps because memory ran out: {fix}") from None
    finally:
        done.set()
        bar.join()


def show_progress(counts, done, what, total, unit):
    """Show how far it is until `done` is set: a bar on a terminal, else a line on stderr every ten seconds."""
    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=None) as bar:
        start = time.monotonic()
        finished = False
        while not finished:
            finished = done.wait(LINE_EVERY if bar.disable else 0.2)
            documents, size = (counter.value for counter in counts)
            n, seconds = (size if unit == "B" else documents), time.monotonic() - start
            if bar.disable and n and not finished:
                print(f"{what}: {how_far(n, total, seconds)} {unit.strip()}", file=sys.stderr, flush=True)
            if unit == "B":
                bar.set_postfix_str(f"{documents / seconds:,.0f} documents/s", refresh=False)
            bar.update(n - bar.n)


@contextlib.contextmanager
def folder_lock(out):
    """Hold the lock of a folder, since two runs at once would overwrite each other. ValueError if it is taken."""
    with open(out / ".lock", "w", encoding="utf-8") as file:
        if not lock_file(file, wait=3):  # the workers of a killed run need a moment to end
            raise ValueError(f"another prepare.py is at work in {out}: wait for it, or choose another --out")
        yield
