"""The folder of a run: checkpoints, written whole or not at all and read if their hashes are right, and the log of its numbers.

    out/RUN/metrics.jsonl
    out/RUN/step-00000500/    model.pt  optimizer.pt  state.json  a tokenizer  sha256.json, which is written last
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises at code in a file; nothing here is unpickled

import torch

from sources import write_atomically


def save_checkpoint(final, state, weights, optimizer_states, tokenizer, args):
    """Write the checkpoint of a step under a temporary name, flush it to the disk, rename it; then remove old ones."""
    run, temporary = final.parent, final.with_name("." + final.name)
    for path in run.glob(".step-*"):  # of a run that was killed while it saved
        shutil.rmtree(path)
    temporary.mkdir(parents=True)
    for name, tensors in (("model.pt", weights), ("optimizer.pt", optimizer_states)):
        with open(temporary / name, "wb") as file:
            torch.save(tensors, file)
    (temporary / tokenizer.FILE).write_bytes(tokenizer.content)
    (temporary / "state.json").write_text(json.dumps(state, indent=1, ensure_ascii=False), encoding="utf-8")
    hashes = {}
    for path in sorted(temporary.iterdir()):
        with open(path, "rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    with open(temporary / "sha256.json", "w", encoding="utf-8") as file:
        json.dump(hashes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    descriptor = os.open(run, os.O_RDONLY)  # the rename itself must reach the disk before an older checkpoint goes
    os.fsync(descriptor)
    os.close(descriptor)
    # A later one is here only if it was passed over as damaged: it does not count, and the run will come by and replace it.
    for path in sorted(path for path in run.glob("step-*") if path.name <= final.name)[: -args.keep]:
        if not args.keep_every or int(path.name[5:]) % args.keep_every:
            shutil.rmtree(path)


def open_metrics(path, step):
    """The metrics file, opened for appending after a step, and the last step it has been evaluated at; what was written beyond goes."""
    kept, evaluated = [], 0
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}") and (values := json.loads(line))["step"] <= step:
                kept.append(line + "\n")
                evaluated = values["step"] if "val_loss" in values else evaluated
        write_atomically(path, "".join(kept).encode("utf-8"))
    return open(path, "a", encoding="utf-8"), evaluated


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


def read_tensors(path):
    """What torch.save wrote, on the CPU, if it is nothing but tensors in dicts and lists; code in it is refused, not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise SystemExit(f"{path} is not a file of tensors ({str(error).splitlines()[0]}): use another checkpoint")
