"""Checkpoints, the log and the state of a run: what is saved comes back, and what is damaged is found."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import call, finish, refused, start, state_of, train, weights, what_a_run_leaves

from checkpoint import Log, Saver, State, checkpoint_problem, load, newest_checkpoint, remove_old, set_aside_newer
from model import Config, Decoder
from parallel import Ranks

# ----------------------------------------------------------------------------------------------------------------------
# Loading


def test_a_run_a_step_and_a_folder_of_runs_are_loaded(whole_run):
    step = whole_run.out / "step-00000008"
    saved = torch.load(step / "model.pt", weights_only=True)
    for path in (step, whole_run.out, whole_run.out.parent):
        model, tokenizer, info = load(path)
        assert info.path == step and info.state["step"] == 8 and info.eos_first and not info.chat
        assert all(torch.equal(p, saved[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())
        assert tokenizer.content == (step / "tokenizer.model").read_bytes()
    assert load(whole_run.out / "step-00000004")[2].state["step"] == 4


def test_a_checkpoint_of_another_version_is_refused(whole_run, tmp_path):
    step = tmp_path / "step-00000008"
    shutil.copytree(whole_run.out / "step-00000008", step)
    state = state_of(tmp_path, 8)
    state["version"] = 1
    replace_file(step, "state.json", json.dumps(state).encode())
    with pytest.raises(ValueError, match="step-00000008 was written by another version of nanoSteel: train again"):
        load(step)


def replace_file(step, name, content):
    """Replace a file of a checkpoint, with its hash."""
    (step / name).write_bytes(content)
    hashes = json.loads((step / "sha256.json").read_text(encoding="utf-8"))
    hashes[name] = hashlib.sha256(content).hexdigest()
    (step / "sha256.json").write_text(json.dumps(hashes), encoding="utf-8")


def test_a_run_from_before_some_flags_is_resumed_with_their_defaults(small_data, tmp_path):
    train(small_data, tmp_path, "--steps", 2)
    state = state_of(tmp_path, 2)
    for name in ("recipe", "pack", "epochs", "batch_documents", "beta", "label_smoothing", "sft_weight"):
        del state["args"][name]
    del state["reference"]
    replace_file(tmp_path / "step-00000002", "state.json", json.dumps(state).encode())
    assert "done: step 3" in call("train.py", "--resume", "--out", tmp_path, "--steps", 3).stdout


def test_a_pickle_in_the_place_of_weights_is_not_run(whole_run, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    step = tmp_path / "step-00000008"
    for name in ("model.pt", "optimizer.pt"):
        shutil.copytree(whole_run.out / "step-00000008", step)
        torch.save({"embedding": Bomb()}, tmp_path / "bomb")
        replace_file(step, name, (tmp_path / "bomb").read_bytes())
        if name == "model.pt":
            refused(call("sample.py", step, ok=False), "model.pt is not a file of tensors")
        refused(call("train.py", "--resume", "--out", tmp_path, ok=False), f"{name} is not a file of tensors")
        shutil.rmtree(step)
    assert not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def test_a_damaged_checkpoint_is_passed_over_and_named(whole_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole_run.out, run)
    newest = run / "step-00000008"
    names = sorted(path.name for path in newest.iterdir())
    assert names == ["model.pt", "optimizer.pt", "sha256.json", "state.json", "tokenizer.model"]
    for name in names:
        content = (newest / name).read_bytes()
        flipped = content[:60] + bytes([content[60] ^ 1]) + content[61:]
        for damaged, why in ((content[:-5], "damaged"), (b"", "empty"), (flipped, "damaged"), (None, "missing")):
            if damaged is None:
                (newest / name).unlink()
            else:
                (newest / name).write_bytes(damaged)
            assert newest_checkpoint(run) == run / "step-00000004"
            expected = f"passed over {newest}: {name} is {why}"
            if name == "sha256.json" and damaged == flipped:  # a wrong hash is found with the file that it is of
                expected = "is damaged"
            assert expected in capsys.readouterr().err
            (newest / name).write_bytes(content)
    assert newest_checkpoint(run) == newest


def test_a_sha256_json_cannot_lead_out_of_its_folder(whole_run, tmp_path):
    step = tmp_path / "step-00000008"
    shutil.copytree(whole_run.out / "step-00000008", step)
    hashes = json.loads((step / "sha256.json").read_text(encoding="utf-8"))
    for damaged in (hashes | {"../x": "0"}, {"state.json": hashes["state.json"]}, [], None):
        (step / "sha256.json").write_text(json.dumps(damaged), encoding="utf-8")
        assert checkpoint_problem(step) == "sha256.json is damaged"


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole_run, tmp_path):
    for name in ("run", "later", "none"):
        shutil.copytree(whole_run.out, tmp_path / name)
    for name in ("run", "later"):
        (tmp_path / name / "step-00000008" / "optimizer.pt").write_bytes(b"")
    result = call("train.py", "--resume", "--out", tmp_path / "run", "--keep", 1, "--save-every", 3)
    assert f"passed over {tmp_path / 'run' / 'step-00000008'}: optimizer.pt is empty" in result.stderr
    assert what_a_run_leaves(tmp_path / "run", 8) == what_a_run_leaves(whole_run.out, 8)
    assert sorted(os.listdir(tmp_path / "run")) == ["damaged-step-00000008", "metrics.jsonl", "step-00000008"]
    # The damaged one does not count among those to keep.
    call("train.py", "--resume", "--out", tmp_path / "later", "--keep", 1, "--steps", 6)
    assert sorted(os.listdir(tmp_path / "later")) == ["damaged-step-00000008", "metrics.jsonl", "step-00000006"]
    for step in (4, 8):
        (tmp_path / "none" / f"step-{step:08d}" / "model.pt").unlink()
    result = call("train.py", "--resume", "--out", tmp_path / "none", ok=False)
    refused(result, "no whole checkpoint in", "none")


@pytest.mark.quick
def test_newer_steps_are_set_aside_once(tmp_path):
    for name in ("step-00000004", "step-00000008", "step-00000012", "damaged-step-00000008"):
        (tmp_path / name).mkdir()
    set_aside_newer(tmp_path / "step-00000004")
    assert sorted(os.listdir(tmp_path)) == ["damaged-step-00000008", "damaged-step-00000012", "step-00000004"]


# ----------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.quick
@pytest.mark.parametrize(
    "keep, keep_every, kept",
    [(1, 0, [12]), (2, 0, [10, 12]), (2, 3, [6, 10, 12]), (9, 0, [2, 4, 6, 8, 10, 12]), (1, 4, [4, 8, 12])],
)
def test_which_checkpoints_are_kept(tmp_path, keep, keep_every, kept):
    for step in range(2, 14, 2):
        (tmp_path / f"step-{step:08d}").mkdir()
    remove_old(tmp_path, keep, keep_every)
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in kept]


def test_only_numbered_steps_count_as_checkpoints(whole_run, tmp_path):
    """A copy that a user makes is not resumed from, not counted and not removed; a file is no checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(whole_run.out, run)
    for name in ("step-best", "step-00000004.bak", "step-999"):
        shutil.copytree(run / "step-00000004", run / name)
    (run / "step-00000099").touch()
    assert newest_checkpoint(run) == run / "step-00000008"
    flags = ["--steps", 11, "--save-every", 1, "--keep", 1, "--keep-every", 5]
    call("train.py", "--resume", "--out", run, *flags)
    left = ["step-00000004.bak", "step-00000010", "step-00000011", "step-00000099", "step-999", "step-best"]
    assert sorted(path.name for path in run.glob("*step-*")) == left


def test_a_checkpoint_that_cannot_be_read_is_passed_over(whole_run, tmp_path, capsys):
    shutil.copytree(whole_run.out, tmp_path / "run")
    path = tmp_path / "run" / "step-00000009"
    (path / "sha256.json").mkdir(parents=True)
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step-00000008"
    assert f"passed over {path}: sha256.json cannot be read (Is a directory)" in capsys.readouterr().err


def test_a_run_keeps_its_newest_checkpoints_and_those_of_keep_every(small_data, tmp_path):
    train(small_data, tmp_path, "--steps", 7, "--save-every", 1, "--keep", 2, "--keep-every", 3, "--eval-every", 0)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", *(f"step-{s:08d}" for s in (3, 6, 7))]


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path):
    """Training continues while the thread writes."""
    model, tokenizer = Decoder(Config(n_layer=1, vocab_size=50)), SimpleNamespace(FILE="tokenizer.model", content=b"x")
    args = SimpleNamespace(out=str(tmp_path), keep=1, keep_every=0)
    saver = Saver(args, tokenizer, Log(tmp_path), Ranks(), constants={"chat": False})
    before = model.embedding.detach().clone()
    saver.save(model, [], State.create("cpu", [{"served": 0}], step=3))
    with torch.no_grad():
        model.embedding.zero_()
    assert saver.wait() and saver.last == 3
    assert torch.equal(torch.load(tmp_path / "step-00000003" / "model.pt", weights_only=True)["embedding"], before)
    assert checkpoint_problem(tmp_path / "step-00000003") is None


LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000,) * 2)
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_full_disk_in_a_save_leaves_the_checkpoints_before_it(whole_run, tmp_path):
    """A limit on the size of files stands for the disk: two saves fail, the run goes on, and its exit code says so."""
    run = tmp_path / "run"
    shutil.copytree(whole_run.out, run)
    shutil.rmtree(run / "step-00000008")
    before = weights(run, 4)
    (tmp_path / "limited.py").write_text(LIMITED, encoding="utf-8")
    (process,) = start(1, tmp_path / "limited.py", "--resume", "--out", run, "--save-every", 3)
    stdout, stderr = process.communicate()
    said = [line for line in stderr.splitlines() if "could not be saved" in line]
    problem = "could not be saved (File too large): make room; the checkpoints before it are whole"
    assert said == [f"{run / f'step-{step:08d}'} {problem}" for step in (6, 8)]
    assert process.returncode == 1 and "done: step 8" in stdout and "Traceback" not in stderr
    assert sorted(os.listdir(run)) == ["metrics.jsonl", "step-00000004"]
    assert weights(run, 4) == before
    call("train.py", "--resume", "--out", run)
    assert what_a_run_leaves(run, 8) == what_a_run_leaves(whole_run.out, 8)


# ----------------------------------------------------------------------------------------------------------------------
# State


@pytest.mark.quick
def test_a_state_that_was_read_and_created_again_judges_alike():
    state = State.create("cpu", [{"served": 0}])
    draw = torch.Generator().manual_seed(1)
    for step in range(80):
        loss = 5 + 0.1 * torch.randn((), generator=draw)
        loss = torch.tensor(math.nan) if step in (3, 70, 78, 79) else loss + 9 * (step == 75)
        copy = State.create("cpu", **json.loads(json.dumps(state.read())))
        assert copy.read() == state.read()
        judged = [s.judge(loss, torch.tensor(1.0), torch.tensor(8)).item() for s in (state, copy)]
        assert judged == [step in (3, 70, 75, 78, 79)] * 2
        assert copy.read() == state.read()
        state.advance(2)
    assert (state.step, state.samples, state.skipped.item(), state.in_a_row.item()) == (80, 160, 5, 2)
    assert len(state.read()["recent"]) == 64


@pytest.mark.quick
def test_five_bad_steps_in_a_row_are_noticed_at_the_next_check():
    state = State.create("cpu", [{"served": 0}])
    saver = SimpleNamespace(run=Path("none"), wait=lambda: True)
    for losses, ends in (([math.nan] * 4, False), ([5.0], False), ([math.nan] * 5 + [5.0], True)):
        for loss in losses:
            state.judge(torch.tensor(loss), torch.tensor(1.0), torch.tensor(8))
        if ends:
            with pytest.raises(ValueError, match="5 steps in a row had .* run ends at step 0. Start again with"):
                state.check(saver)
        else:
            state.check(saver)


@pytest.mark.quick
def test_progress_by_steps_or_by_time():
    state = State.create("cpu", [{"served": 3}, {"served": 4}], step=50, seconds=90.0)
    assert state.progress(SimpleNamespace(steps=200, minutes=None)) == 0.25
    assert state.progress(SimpleNamespace(steps=None, minutes=3.0)) == 0.5
    assert state.progress(SimpleNamespace(steps=40, minutes=None)) == 1
    assert state.samples == 7
    assert [state.due(every) for every in (0, 25, 40, 50)] == [False, True, False, True]


# ----------------------------------------------------------------------------------------------------------------------
# Log

FULL_DISK = """
import resource, sys
from pathlib import Path
from checkpoint import Log
log, hard = Log(Path(sys.argv[1])), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for step in range(1, 1001):
    if step == 100:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    if step == 999:
        assert log.unwritten
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.add(step=step, loss=float("nan"))
assert not log.unwritten
"""


def test_a_full_disk_takes_no_line_from_the_log(tmp_path):
    (tmp_path / "full.py").write_text(FULL_DISK, encoding="utf-8")
    finish(start(1, tmp_path / "full.py", tmp_path))
    expected = "".join(f'{{"step": {step}, "loss": null}}\n' for step in range(1, 1001))
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == expected
    log = Log(tmp_path)
    log.file.write(b'{"step": 1001, "lo')
    assert log.cut(700) == -1
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == expected[: expected.index('{"step": 701')]


@pytest.mark.quick
def test_cut_names_the_last_evaluation_that_stays(tmp_path):
    log = Log(tmp_path)
    for step in range(1, 9):
        log.add(step=step, loss=1.0)
        if step % 3 == 0:
            log.add(step=step, val_loss=2.0)
    for step, evaluated in ((8, 6), (6, 6), (5, 3), (2, -1)):
        assert log.cut(step) == evaluated
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 2


@pytest.mark.quick
def test_the_log_locks_its_run(tmp_path):
    log = Log(tmp_path)
    with pytest.raises(ValueError, match=f"another run is at work in {tmp_path}: wait for it"):
        Log(tmp_path)
    log.file.close()
    Log(tmp_path).file.close()
