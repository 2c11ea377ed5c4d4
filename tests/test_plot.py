"""extras.plot and train.py --report: what they show of metrics.jsonl."""

import json
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, call, refused

from extras import plot, reporters
from extras.plot import read_run
from extras.reporters import Mirror


@pytest.fixture
def runs(tmp_path):
    """Two runs: one whose loss falls by 1 each step from 9 to 0, resumed once; and one that is flat, and at work."""
    lines = [{"step": i, "loss": 9.0 - i, "bpb": 1.0, "lr": 0.1, "norm": None} for i in range(8)]
    lines += [{"step": 6, "loss": 3.0}, {"step": 9, "loss": 0.0}, {"step": 9, "val_loss": 1.25, "val_bpb": 0.5}]
    for name, content in (("a", lines), ("b", [{"step": i, "loss": 4.0} for i in range(10)])):
        (tmp_path / name).mkdir()
        text = "\n".join(map(json.dumps, content)) + '\n{"step": 10, "lo' * (name == "b")
        (tmp_path / name / "metrics.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "a", tmp_path / "b"


def test_the_chart_in_the_terminal(runs, monkeypatch):
    monkeypatch.setattr(plot, "WIDTH", 10)
    monkeypatch.setattr(plot, "HEIGHT", 10)
    a, b = runs
    expected = f"""\
   9.000 |*
   8.000 | *
   7.000 |  *
   6.000 |   *
   5.000 |    *
   4.000 |oooooooooo
   3.000 |      *
   2.000 |       *
   1.000 |
   0.000 |         *
         +----------
          0        9
* {a}: loss 0.0000 at step 9, held out 1.2500 at step 9
o {b}: loss 4.0000 at step 9
"""
    assert call("extras.plot", a, b).stdout == expected


def test_a_picture_has_a_chart_for_each_field_that_is_there(runs, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or savefig(self, *a, **k))
    assert call("extras.plot", *runs, "--png", tmp_path / "x.png").stdout == f"drawn: {tmp_path / 'x.png'}\n"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes
    assert [axis.get_ylabel() for axis in axes] == ["loss, nats per token", "bits per byte", "learning rate"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes[0].get_lines()}
    a, b = map(str, runs)
    assert lines[a] == [[i, 9.0 - i] for i in range(8)] + [[9.0, 0.0]]
    assert lines[f"{a}, held out"] == [[9.0, 1.25]] and lines[b] == [[i, 4.0] for i in range(10)]


def test_what_is_no_run_is_refused(runs, tmp_path, monkeypatch):
    refused(call("extras.plot", tmp_path, ok=False), f"{tmp_path} is no run")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n')
    refused(call("extras.plot", tmp_path, ok=False), "has no loss yet")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(call("extras.plot", *runs, "--png", tmp_path / "x.png", ok=False), "--png needs matplotlib")


# ----------------------------------------------------------------------------------------------------------------------
# --report


def events(run):
    """What TensorBoard reads: {field: [(step, value)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(Path(run) / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_has_the_lines_of_a_run_and_of_its_resumption(small_data, tmp_path):
    flags = ["--data", small_data, "--out", tmp_path / "run", "--report", "tensorboard", *TINY]
    call("train.py", *flags, "--steps", 4, "--eval-every", 2)
    call("train.py", "--resume", "--out", tmp_path / "run", "--steps", 6)
    found, expected = events(tmp_path / "run"), read_run(tmp_path / "run")
    expected.pop("step")
    assert found.keys() == expected.keys() and len(found["loss"]) == 6
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == list(values)
        assert [value for _, value in found[name]] == pytest.approx(list(values.values()), rel=1e-6)


def test_a_reporter_that_fails_or_is_slow_or_missing(small_data, tmp_path, monkeypatch, capsys):
    def broken(run, settings, first_step):
        raise SystemExit("no\nnetwork")

    monkeypatch.setitem(reporters.REPORTERS, "tensorboard", broken)
    flags = ["--data", small_data, "--report", "tensorboard", *TINY, "--steps", 2]
    result = call("train.py", *flags, "--out", tmp_path / "run")
    assert "warning: --report tensorboard failed, the run goes on (SystemExit: no network)\n" in result.stderr
    assert len(read_run(tmp_path / "run")["loss"]) == 2

    monkeypatch.setattr(reporters, "WAIT", 0.1)
    monkeypatch.setitem(reporters.REPORTERS, "tensorboard", lambda *_: (lambda *_: time.sleep(3), lambda: None))
    mirror = Mirror("tensorboard", tmp_path, {}, 1)
    start = time.monotonic()
    for step in range(20_000):
        mirror.add({"step": step})
    mirror.close()
    assert time.monotonic() - start < 3
    assert "warning: --report tensorboard: not all was sent in time; metrics.jsonl has them" in capsys.readouterr().err

    monkeypatch.setattr("train.find_spec", lambda name: None)
    refused(
        call("train.py", "--report", "swanlab", ok=False), "--report swanlab needs the package: pip install swanlab"
    )
