"""extras.speed measures and prints every line; the numbers themselves depend on the machine."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, call, refused

from common import can_compile
from extras import speed, speed_data, speed_runs
from extras.timing import peak_memory
from model import Config, Decoder

ARGS = SimpleNamespace(compile=False, repeats=1, device="cpu", png=None)


def assert_lines(lines, beginnings):
    assert len(lines) == len(beginnings), lines
    for line, beginning in zip(lines, beginnings):
        assert line.startswith(beginning), line


# ----------------------------------------------------------------------------------------------------------------------
# The layer


def test_a_small_benchmark_of_the_layer_prints_every_line():
    flags = "--d-model 64 --n-expert 2 --repeats 1 --no-compile --device cpu".split()
    lines = call("extras.speed", *flags).stdout.splitlines()
    threads = f"{torch.get_num_threads()} threads, width 64, 2 experts"
    assert_lines(lines, (threads, "forward + backward", "peak memory", "microseconds a token", "decoding"))
    peaks = [int(number) for number in re.findall(r"(\d+) MB", lines[2])]
    assert len(peaks) == 2 and min(peaks) > 0
    # At any length, 3 tokens back: 2 logits, and gate and up of 88 for each of two experts
    assert lines[4].endswith("state: 1062, 1062, 1062, 1062 numbers")


@pytest.mark.quick
def test_peak_memory_counts_what_is_alive_at_once():
    def step():
        a = torch.ones(1000)
        b = a + 1
        del a
        return b * b * b  # b, b * b and the result

    assert peak_memory(step) == 3 * 4000


def test_the_memory_of_the_compiled_causal_layer_is_near_that_of_the_dense_one():
    """1.25 times as much with torch 2.13; the compiler of torch 2.11 keeps more for backward, 1.83 times."""
    if not can_compile("cpu"):
        pytest.skip("torch.compile needs a C++ compiler and Python's headers: apt install g++ python3-dev")
    args = speed.get_args(["--device", "cpu"])
    layers = [speed.make_layer(kind, args) for kind in ("dense", "causal")]
    dense, causal = (peak_memory(speed.layer_step(layer, 1024, args)) for layer in layers)
    most = 1.3 if torch.__version__ >= "2.13" else 1.9
    assert dense < causal < most * dense


# ----------------------------------------------------------------------------------------------------------------------
# Training, decoding, the loss


def test_models_of_equal_size_are_compared(capsys):
    config = Config(n_layer=1, d_model=32, vocab_size=64, block_size=16, tie_embeddings=True)
    dense = Decoder(replace(config, ffn="dense"))
    assert speed.transformers_model(config).num_parameters() == dense.n_params()
    speed.benchmark_training(config, 2, ARGS)
    speed.benchmark_decoding(replace(config, block_size=1024), ARGS, new=2)
    speed.benchmark_loss(64, 8, 16, 4)
    models = ["    dense", "    causal Soft MoE", "    transformers, eager"]
    greedy = [f"    greedy, {name} " for name in ("causal", "dense", "transformers") for _ in range(3)]
    lines = capsys.readouterr().out.splitlines()
    assert_lines(lines, ["steps of 2 x 16 tokens", *models, *greedy, "step of 4 x 16 tokens, width 8"])


def test_costs_are_measured_and_drawn(tmp_path, capsys):
    args = SimpleNamespace(**vars(ARGS) | {"png": str(tmp_path / "curves.png")})
    speed.benchmark_scale(args, [(1, 64), (2, 64)], (16, 32), 64, 16)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["dense", "dense", "causal", "causal", "drawn:"]
    shape = Config(d_model=64, vocab_size=4096, tie_embeddings=True, ffn="dense")
    sizes = [Decoder(replace(shape, n_layer=n)).n_params() for n in (1, 2)]
    cells = rf"{sizes[0]:,}: [\d.]+, {sizes[1]:,}: [\d.]+; exponent -?[\d.]+"
    assert re.fullmatch(f"dense  microseconds a token against parameters at T = 16: {cells}", lines[0])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------------------------
# Runs of train.py, the data stage


def test_runs_are_measured(small_data, capsys):
    speed_runs.benchmark_run(ARGS, ("--data", str(small_data), *TINY), steps=8)
    start = "from the command to the end of the first step"
    lines = capsys.readouterr().out.splitlines()
    assert_lines(lines, (start, "loading: ", "copying the state: ", "a step of one process of one thread"))


def test_a_small_benchmark_of_the_data_stage_prints_every_line(monkeypatch):
    monkeypatch.setattr(speed_data, "HOSTILE", {"spaces": " " * 1000})
    lines = call("extras.speed", "data", "--megabytes", 0.3, "--documents", 5000).stdout.splitlines()
    lines = [line for line in lines if not line.startswith("fetching")]
    beginnings = ["tokenising", "pipeline zh", "    of 0 MB: ", "    of 1 MB: "]
    beginnings += [
        "all of prepare.py on 1.2 MB: 1 process",
        "a GB takes",
        "    by this, hours",
        "slowest operators",
        "copies among 5,000",
    ]
    assert_lines(lines, beginnings)
    assert lines[8].endswith("MB, 3 near copies found")  # documents 2,500, 3,500 and 4,500 are three bits off


# ----------------------------------------------------------------------------------------------------------------------
# The curve of a run


def write_metrics(run, *lines, end=""):
    run.mkdir()
    content = "".join(json.dumps(line) + "\n" for line in lines) + end
    (run / "metrics.jsonl").write_text(content, encoding="utf-8")
    return run


@pytest.mark.quick
def test_a_curve_has_each_evaluation_at_the_time_of_the_training_line_before_it(tmp_path):
    steps = [{"step": step, "loss": 5.0, "seconds": 6.0 * step} for step in (10, 20, 30)]
    evaluations = [{"step": step, "val_loss": 5.0, "val_bpb": bpb} for step, bpb in ((20, 2.5), (31, 2.0))]
    cut = '{"step": 40, "sec'  # a run at work
    run = write_metrics(tmp_path / "run", *steps[:2], evaluations[0], steps[2], evaluations[1], end=cut)
    assert speed_runs.read_curve(run) == [(2.0, 2.5), (3.0, 2.0)]
    own = write_metrics(tmp_path / "own", {"step": 5, "seconds": 90, "val_loss": 5.0, "val_bpb": 2.25})
    assert speed_runs.read_curve(own) == [(1.5, 2.25)]


def test_curves_are_printed_and_drawn(tmp_path):
    a, b = (
        write_metrics(tmp_path / name, {"step": 1, "seconds": 60}, {"step": 1, "val_bpb": bpb})
        for name, bpb in (("a", 2.5), ("b", 2.25))
    )
    lines = call("extras.speed", "curve", a, b, "--png", tmp_path / "curve.png").stdout.splitlines()
    assert lines == [
        f"{a}: val bpb 2.5000 after 1.0 minutes",
        f"{b}: val bpb 2.2500 after 1.0 minutes",
        f"drawn: {tmp_path / 'curve.png'}",
    ]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    empty = write_metrics(tmp_path / "empty", {"step": 1, "seconds": 60})
    refused(call("extras.speed", "curve", empty, ok=False), empty, "has no evaluation yet")
    refused(call("extras.speed", "curve", tmp_path / "none", ok=False), tmp_path / "none", "No such file")
    refused(call("extras.speed", "curve", ok=False), "curve takes one RUN or more")
