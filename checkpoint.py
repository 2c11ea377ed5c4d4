"""The folder of a run: checkpoints, written whole or not at all and read if their hashes are right, and the log of its numbers.

    out/RUN/metrics.jsonl    a line for each step that is noted
    out/RUN/step-00000500/    model.pt  optimizer.pt  state.json  a tokenizer  sha256.json, which is written last
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises at code in a file; nothing here is unpickled

import torch


class Log:
    """metrics.jsonl, a line of JSON for every step or evaluation that is noted. While it is open no other run can have the folder."""

    def __init__(self, run):
        try:
            run.mkdir(parents=True, exist_ok=True)
            self.file, self.unwritten = open(run / "metrics.jsonl", "a+b", buffering=0), b""
        except OSError as error:
            raise SystemExit(f"{error.filename}: {error.strerror}: choose another --out, or make room")
        with contextlib.suppress(ImportError):
            import fcntl  # not on Windows

            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SystemExit(f"another run is at work in {run}: wait for it, end its processes, or choose another --out")

    def cut(self, step):
        """Remove what was written beyond a step; returns the last step that has been evaluated."""
        evaluated, end = 0, 0
        self.file.seek(0)
        for line in self.file.read().splitlines(keepends=True):
            try:
                values = json.loads(line)
                if values["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):  # half of a line, of a run that was killed
                break
            end += len(line)
            evaluated = values["step"] if "val_loss" in values else evaluated
        self.file.truncate(end)
        return evaluated

    def add(self, **values):
        """Numbers that are none become null. What finds no room on the disk stays in .unwritten, for the next time."""
        values = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self.unwritten += json.dumps(values).encode("utf-8") + b"\n"
        with contextlib.suppress(OSError):
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]


def save_checkpoint(final, state, weights, optimizer_states, tokenizer, keep, keep_every):
    """Write the checkpoint of a step under a temporary name, flush it to the disk, rename it; then remove old ones.

    state: JSON. OSError if there is no room: then the checkpoints before it are as they were.
    """
    run, temporary = final.parent, final.with_name("." + final.name)
    for path in run.glob(".step-*"):  # of a run that was killed while it saved
        shutil.rmtree(path)
    try:
        temporary.mkdir()
        for name, tensors in (("model.pt", weights), ("optimizer.pt", optimizer_states)):
            with open(temporary / name, "wb") as file:
                torch.save(tensors, file)
        (temporary / tokenizer.FILE).write_bytes(tokenizer.content)
        (temporary / "state.json").write_text(state, encoding="utf-8")
        hashes = {}
        for path in sorted(temporary.iterdir()):
            with open(path, "rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
        with open(temporary / "sha256.json", "w", encoding="utf-8") as file:
            json.dump(hashes, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(final)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error.__context__, OSError):  # torch.save has an error of its own for a full disk
            raise error.__context__
        raise
    descriptor = os.open(run, os.O_RDONLY)  # the rename itself must reach the disk before an older checkpoint goes
    os.fsync(descriptor)
    os.close(descriptor)
    for path in sorted(run.glob("step-*"))[:-keep]:
        if not keep_every or int(path.name[5:]) % keep_every:
            shutil.rmtree(path)


def put_aside(checkpoint):
    """Rename what is newer than the checkpoint that a run goes on from: it was passed over, and does not count as one to keep."""
    for path in checkpoint.parent.glob("step-*"):
        if path.name > checkpoint.name:
            damaged = path.with_name("damaged-" + path.name)
            if damaged.exists():
                shutil.rmtree(damaged)
            path.rename(damaged)


def newest_checkpoint(path):
    """The checkpoint to read: path itself, the newest of a run directory, or the newest of all runs under path.

    A checkpoint whose files do not have the hashes in its sha256.json is passed over, and said so.
    """
    path = Path(path)
    if (path / "sha256.json").exists() or path.name.startswith("step-"):
        found = [path]
    else:
        found = sorted(path.glob("step-*"), reverse=True)
        found = found or sorted(path.glob("*/step-*"), key=lambda p: (p.stat().st_mtime, p.name), reverse=True)
    for step_dir in found:
        if problem := checkpoint_problem(step_dir):
            print(f"passed over {step_dir}: {problem}", file=sys.stderr)
        else:
            return step_dir
    whole = "whole " if found else ""
    raise SystemExit(f"no {whole}checkpoint in {path}: train one with python train.py, or give its directory")


def checkpoint_problem(path):
    """None if every file of a checkpoint has its recorded sha256, else what is wrong."""
    try:
        content = (path / "sha256.json").read_text(encoding="utf-8")
        if not content:
            return "sha256.json is empty"
        recorded = json.loads(content)
        if not {"model.pt", "optimizer.pt", "state.json"} <= recorded.keys() or any(Path(name).name != name for name in recorded):
            return "sha256.json is damaged"
        for name, sha256 in recorded.items():
            with open(path / name, "rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    return f"{name} is empty"
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError):
        return "sha256.json is damaged"
    return None


def description(path):
    """What a folder says of its model: state.json of a checkpoint, config.json of a Hugging Face folder."""
    for file in (path / "state.json", path / "config.json"):
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
    return {}


def read_tensors(path):
    """What torch.save wrote, on the CPU, if it is nothing but tensors in dicts and lists; code in it is refused, not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # many processes of a machine read it once
    except (UnpicklingError, RuntimeError) as error:
        raise SystemExit(f"{path} is not a file of tensors ({str(error).splitlines()[0]}): use another checkpoint")
