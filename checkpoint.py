"""The folder of a run: checkpoints, written whole or not at all and read only if their hashes are right, and the log.

model, tokenizer, info = load("out/demo")    # the newest step of a run, one step, or a Hugging Face folder

out/RUN/metrics.jsonl    a line for every step and every evaluation that is logged
out/RUN/step-00000500/   model.pt  optimizer.pt  state.json  a tokenizer  sha256.json, which is written last
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises for code in a file: it is refused, not run

import torch

from common import flush_folder, lock_file, one_line, track
from model import Config, Decoder
from optim import MAX_SKIPPED, RECENT_STEPS, is_bad
from order import next_phase, places_of
from parallel import gather_state
from tokenizer import load_tokenizer

VERSION = 3  # of state.json

# ----------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass
class Info:
    """Where a model comes from, and how its texts began in training."""

    path: Path  # the checkpoint, or the Hugging Face folder
    state: dict = field(default_factory=dict)  # state.json of a checkpoint of ours, else empty
    chat: bool = False  # trained mostly on conversations
    eos_first: bool = False  # documents begin after an eos: ours do

    @property
    def name(self):
        """Of the run or the folder."""
        path = self.path.resolve()  # of "." too
        return path.parent.name if self.state else path.name


def load(path):
    """-> model (fp32, on the CPU), tokenizer, Info of a step, of a run's newest step, or of a Hugging Face folder."""
    path = Path(path)
    if (path / "config.json").exists():
        from extras.chat_template import carry_over
        from extras.huggingface import load_folder

        model, found = load_folder(path)
        info = Info(path, chat=bool(found.get("chat", False)), eos_first=bool(found.get("eos_first", False)))
        tokenizer = load_tokenizer(path, model.config.vocab_size)
        carry_over(tokenizer, path)
        return model, tokenizer, info
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"{path} is an adapter (LoRA), not a model: merge it into its model first (peft: merge_and_unload)"
        )
    path = newest_checkpoint(path)
    state = read_state(path)
    model = Decoder(Config(**state["config"]))
    model.load_state_dict(read_tensors(path / "model.pt"))
    info = Info(path, state, state["chat"], eos_first=True)
    return model, load_tokenizer(path, model.config.vocab_size), info


def isolate(model, eos_id):
    """Keep the documents of a sample apart, as training does where they are packed -> the model, which is changed."""
    if not model.config.reads_ahead:
        model.config = replace(model.config, reset_id=eos_id)
    return model


STEP_NAME = re.compile(r"step-([0-9]{8,})")


def step_folders(run):
    """The checkpoints of a run, oldest first. Anything else, like a user's copy named step-best, is left alone."""
    steps = [(STEP_NAME.fullmatch(path.name), path) for path in run.glob("step-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in steps if match)]


def newest_checkpoint(path):
    """The checkpoint to read: path itself, the newest of a run, or the newest of all runs in path.

    One whose files differ from the hashes in its sha256.json is passed over, and named on stderr.
    """
    path = Path(path)
    if (path / "sha256.json").exists() or path.name.startswith("step-"):
        found = [path]
    else:
        found = step_folders(path)[::-1]
        of_all_runs = [step for run in path.glob("*/") for step in step_folders(run)]
        found = found or sorted(of_all_runs, key=lambda step: (step.stat().st_mtime, step.name), reverse=True)
    for step_folder in found:
        problem = checkpoint_problem(step_folder)
        if not problem:
            return step_folder
        print(f"passed over {step_folder}: {problem}", file=sys.stderr)
    whole = "whole " if found else ""
    raise ValueError(f"no {whole}checkpoint in {path}: train one with python train.py, or give its directory")


def checkpoint_problem(path):
    """None if every file of a checkpoint has its recorded sha256, else what is wrong."""
    try:
        content = (path / "sha256.json").read_text(encoding="utf-8")
        if not content:
            return "sha256.json is empty"
        recorded = json.loads(content)
        needed = {"model.pt", "optimizer.pt", "state.json"}
        if not needed <= recorded.keys() or any(Path(name).name != name for name in recorded):
            return "sha256.json is damaged"
        for name, sha256 in track(recorded.items(), f"checking {path.name}", "files"):
            with open(path / name, "rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    return f"{name} is empty"
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, AttributeError):
        return "sha256.json is damaged"
    return None


def read_state(path):
    """state.json of a checkpoint. ValueError for one of a version before this."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("version") != VERSION:
        raise ValueError(f"{path} was written by another version of nanoSteel: train again, or use that version")
    return state


def read_tensors(path):
    """What torch.save wrote, on the CPU: tensors in dicts and lists. Code in the file is refused, not run."""
    try:  # mapped into memory, so that all processes of a machine share one copy
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a file of tensors ({reason}): use another checkpoint") from None


# ----------------------------------------------------------------------------------------------------------------------
# State of a run


@dataclass
class State:
    """Where a run is. What the device computes stays there until read() or check(), so that no step waits for it."""

    phases: list  # the place in the data: see order.py
    recent: torch.Tensor  # [RECENT_STEPS]: losses of the last good steps, NaN where there are none yet
    skipped: torch.Tensor  # bad steps so far
    in_a_row: torch.Tensor  # bad steps since the last good one
    worst: torch.Tensor  # the most bad steps in a row since the last check()
    step: int = 0
    seconds: float = 0.0  # spent on steps
    evaluated: int = 0  # the last step that was scored on held-out text; kept in the log, not in state.json

    @classmethod
    def create(cls, device, phases, recent=(), skipped=0, in_a_row=0, **plain):
        """From what read() gave."""
        recent = torch.tensor([math.nan] * (RECENT_STEPS - len(recent)) + list(recent), device=device)
        counts = [torch.tensor(count, device=device) for count in (skipped, in_a_row, in_a_row)]
        return cls(phases, recent, *counts, **plain)

    def read(self):
        """The run's part of state.json."""
        recent = self.recent[~self.recent.isnan()].tolist()
        counts = {"skipped": self.skipped.item(), "in_a_row": self.in_a_row.item()}
        return {"step": self.step, "phases": self.phases, "seconds": self.seconds, **counts, "recent": recent}

    def judge(self, loss, norm, count):
        """Whether to skip this step, a bool tensor: it is bad, or it has no targets (questions without answers)."""
        empty = count == 0
        bad = is_bad(loss, norm, self.recent) & ~empty
        self.recent = torch.where(bad | empty, self.recent, torch.cat([self.recent[1:], loss[None]]))
        self.skipped = self.skipped + bad
        self.in_a_row = torch.where(empty, self.in_a_row, (self.in_a_row + 1) * bad)
        self.worst = torch.maximum(self.worst, self.in_a_row)
        return bad | empty

    def check(self, saver):
        """ValueError where MAX_SKIPPED steps in a row were bad: the run ends. Waits for the device."""
        if self.worst.item() >= MAX_SKIPPED:
            saver.wait()
            good = step_folders(saver.run)
            fix = f"The last good checkpoint is {good[-1]}: continue from there" if good else "Start again"
            fix += " with a smaller --lr, or look at the data"
            problem = f"{MAX_SKIPPED} steps in a row had a loss or a gradient that cannot be right"
            raise ValueError(f"{problem}: the run ends at step {self.step}. {fix}")
        self.worst = self.in_a_row

    def advance(self, samples):
        self.step += 1
        self.phases[-1]["served"] += samples

    @property
    def samples(self):
        """Served since the beginning of the run."""
        return sum(phase["served"] for phase in self.phases)

    def progress(self, args):
        """The share of the run that is done, by steps or by time."""
        return min(1.0, self.step / args.steps if args.steps else self.seconds / (60 * args.minutes))

    def due(self, every):
        return every > 0 and self.step % every == 0


def same_mix(args, saved):
    return all((getattr(args, name) or None) == (saved["args"][name] or None) for name in ("mix", "mix_share"))


def round_goes_on(args, saved):
    """Whether a resumed run first serves what its round has left. With shares there is no end to wait for."""
    return same_mix(args, saved) and not args.mix_share


def make_state(args, data, device, saved):
    """The state of a new run, or a saved one, whose data may have grown, or whose mix may be another."""
    samples = data.samples()
    places = places_of(samples, args.mix, args.mix_share)
    if not saved:
        return State.create(device, next_phase([], samples, places))
    names = ("phases", "recent", "skipped", "in_a_row", "step", "seconds")
    state = {name: saved[name] for name in names}
    if samples != state["phases"][-1]["samples"] or not same_mix(args, saved):
        state["phases"] = next_phase(state["phases"], samples, places, round_goes_on(args, saved))
    new_flags = any(getattr(args, name) != saved["args"][name] for name in ("lr", "batch_tokens"))
    if new_flags or state["phases"][-1]["served"] == 0:
        state["recent"] = []  # losses to come need not be like those before
    return State.create(device, **state)


# ----------------------------------------------------------------------------------------------------------------------
# Saving


class Saver:
    """Writes checkpoints in a thread of rank 0, while training continues."""

    def __init__(self, args, tokenizer, log, ranks, constants):
        """args: out, keep, keep_every. log: the run's Log, on rank 0. constants: what state.json holds beside State."""
        self.run, self.keep, self.keep_every = Path(args.out), args.keep, args.keep_every
        self.tokenizer, self.log, self.ranks, self.constants = tokenizer, log, ranks, constants
        self.thread, self.whole = None, True
        self.last = None  # the step that was saved or loaded last

    def save(self, model, optimizers, state):
        """Copy all tensors to rank 0's memory, all ranks taking part, and start to write them."""
        self.wait()
        self.last = state.step
        weights = gather_state(model.state_dict(), self.ranks.rank)
        optimizer_states = gather_state([optimizer.state_dict() for optimizer in optimizers], self.ranks.rank)
        values = {"version": VERSION, **state.read(), **self.constants}
        if self.ranks.rank == 0:
            state_json = json.dumps(values, indent=1, ensure_ascii=False)
            unwritten = self.log.unwritten
            self.thread = threading.Thread(target=self.write, args=(state_json, weights, optimizer_states, unwritten))
            self.thread.start()

    def write(self, state_json, weights, optimizer_states, unwritten_log):
        folder = self.run / f"step-{self.last:08d}"
        self.whole = False
        try:
            if unwritten_log:  # no checkpoint without the log lines before it: treated as a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.log.file.fileno())
            write_checkpoint(folder, state_json, weights, optimizer_states, self.tokenizer)
            remove_old(self.run, self.keep, self.keep_every)
            self.whole = True
        except OSError as error:
            problem = f"{folder} could not be saved ({error.strerror})"
            print(f"{problem}: make room; the checkpoints before it are whole", file=sys.stderr, flush=True)

    def wait(self):
        """Wait for the thread; whether the last checkpoint is whole, on all ranks."""
        if self.thread:
            self.thread.join()
        return bool(self.ranks.from_rank_0(self.whole))


def write_checkpoint(folder, state_json, weights, optimizer_states, tokenizer):
    """Write a step under a temporary name, flush it to the disk, rename it.

    OSError if there is no room: the checkpoints before it stay as they were.
    """
    temporary = folder.with_name("." + folder.name)
    for path in folder.parent.glob(".step-*"):  # left by a run that was killed while it saved
        shutil.rmtree(path)
    try:
        temporary.mkdir()
        for name, tensors in (("model.pt", weights), ("optimizer.pt", optimizer_states)):
            with open(temporary / name, "wb") as file:
                torch.save(tensors, file)
        (temporary / tokenizer.FILE).write_bytes(tokenizer.content)
        (temporary / "state.json").write_text(state_json, encoding="utf-8")
        hashes = {path.name: flushed_sha256(path) for path in sorted(temporary.iterdir())}
        with open(temporary / "sha256.json", "w", encoding="utf-8") as file:
            json.dump(hashes, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error.__context__, OSError):  # torch.save raises an error of its own for a full disk
            raise error.__context__ from None
        raise
    flush_folder(folder.parent)  # the rename must reach the disk before an older checkpoint goes


def flushed_sha256(path):
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return sha256


def remove_old(run, keep, keep_every):
    """Remove all but the newest `keep` checkpoints and those of every `keep_every` steps."""
    for path in step_folders(run)[:-keep]:
        if not keep_every or int(path.name[5:]) % keep_every:
            shutil.rmtree(path)


def set_aside_newer(checkpoint):
    """Rename steps newer than the one that a run resumes from: they are damaged, and must not count as kept."""
    for path in step_folders(checkpoint.parent):
        if path.name > checkpoint.name:
            damaged = path.with_name("damaged-" + path.name)
            if damaged.exists():
                shutil.rmtree(damaged)
            path.rename(damaged)


# ----------------------------------------------------------------------------------------------------------------------
# Log


class Log:
    """metrics.jsonl: a JSON object a line for every step or evaluation that is logged. It is also the run's lock: while
    it is open, no other run can use the folder."""

    mirror = None  # of extras/reporters.py, for --report

    def __init__(self, run):
        try:
            run.mkdir(parents=True, exist_ok=True)
            self.file, self.unwritten = open(run / "metrics.jsonl", "a+b", buffering=0), b""
        except OSError as error:
            raise OSError(f"{one_line(error)}: choose another --out, or make room") from None
        if not lock_file(self.file):
            raise ValueError(
                f"another run is at work in {run}: wait for it, end its processes, or choose another --out"
            )

    def cut(self, step):
        """Remove what was written beyond a step; returns the last step that was evaluated, or -1."""
        evaluated, end = -1, 0
        self.file.seek(0)
        for line in self.file.read().splitlines(keepends=True):
            try:
                values = json.loads(line)
                if values["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):  # half a line, of a run that was killed
                break
            end += len(line)
            evaluated = values["step"] if "val_loss" in values else evaluated
        self.file.truncate(end)
        return evaluated

    def add(self, **values):
        """Write a line; NaN and inf are written as null. On a full disk it waits in .unwritten for the next time."""
        values = {key: value if math.isfinite(value) else None for key, value in values.items()}
        if self.mirror:
            self.mirror.add(values)
        self.unwritten += json.dumps(values).encode("utf-8") + b"\n"
        with contextlib.suppress(OSError):
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def report(self, kind, run, settings, step):
        """Mirror what is added from now on to a program that draws it, beginning after a step."""
        from extras.reporters import Mirror

        self.mirror = Mirror(kind, run, settings, step + 1)

    def close(self):
        if self.mirror:
            self.mirror.close()
        self.file.close()
