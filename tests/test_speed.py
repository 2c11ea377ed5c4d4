"""The benchmark runs and prints every line; its numbers are a matter of the machine."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, call
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmark
from benchmark import LiveTensors, get_args, make_layer, peak_memory, step_of
from model import PRESETS, Config, Decoder, can_compile


def test_a_small_benchmark_prints_every_line():
    lines = call("benchmark.py", "--d-model", 64, "--n-expert", 2, "--repeats", 1, "--no-compile").stdout.splitlines()
    beginnings = (f"{torch.get_num_threads()} threads, width 64, 2 experts", "forward + backward", "peak memory", "microseconds a token", "decoding")
    assert len(lines) == 5 and all(line.startswith(start) for line, start in zip(lines, beginnings))
    peaks = [int(number) for number in re.findall(r"(\d+) MB", lines[2])]
    assert len(peaks) == 2 and min(peaks) > 0
    assert lines[4].endswith("state: 1062, 1062, 1062, 1062 numbers")  # 3 x (2 logits and 2 x 88 for each expert), at any length


def test_peak_memory_counts_what_is_alive_at_once():
    def step():
        a = torch.ones(1000)
        b = a + 1
        del a
        return b * b * b  # b, b * b and the result

    assert peak_memory(step) == 3 * 4000


def test_the_compiled_causal_layer_takes_at_most_1_3_times_the_memory_of_the_dense_one():
    if not can_compile("cpu"):
        pytest.skip("torch.compile needs a C++ compiler and Python's headers: apt install g++ python3-dev")
    args = get_args([])
    dense, causal = (peak_memory(step_of(make_layer(kind, args), 1024, args)) for kind in ("dense", "causal"))
    assert dense < causal < 1.3 * dense


def test_a_small_benchmark_of_the_data_stage_prints_every_line(monkeypatch):
    monkeypatch.setattr(benchmark, "HOSTILE", {"spaces": " " * 1000})
    lines = call("benchmark.py", "data", "--megabytes", 0.3, "--documents", 5000).stdout.splitlines()
    lines = [line for line in lines if not line.startswith("fetching")]
    beginnings = ("tokenising", "pipeline zh", "    of 0 MB: ", "    of 1 MB: ", "all of prepare.py on 1.2 MB: 1 process", "slowest operators", "copies among 5,000")
    assert len(lines) == 7 and all(line.startswith(start) for line, start in zip(lines, beginnings))
    assert lines[6].endswith("MB, 3 near copies found")  # of documents 2,500, 3,500 and 4,500, three bits off


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_computed_from_shapes_is_what_a_step_takes(recompute):
    """Against torch's profiler of the same forward with real numbers."""

    def forward(model):
        for block in model.blocks:
            block.recompute = recompute
        return model(torch.zeros(2, 128, dtype=torch.long), torch.zeros(2, 128, dtype=torch.long))

    config = Config(n_layer=4, vocab_size=4096, expert="swiglu2")
    model = Decoder(config)
    real = peak_memory(lambda: forward(model))
    with FakeTensorMode():
        model = Decoder(config)
        with LiveTensors(model.parameters()) as live:
            forward(model)
    assert live.most == pytest.approx(real, rel=0.01)


def test_the_plan_of_a_model_counts_what_each_process_holds():
    said = call("train.py", *"--dry-run --preset steel-1b --micro-batch 1 --recompute".split()).stdout
    block = sum(p.numel() for p in Decoder(replace(PRESETS["steel-1b"], n_layer=1)).blocks.parameters())
    assert said.startswith(f"{18 * block + 2 * 151_936 * 1792 + 1792:,} parameters")
    rows = [line.split() for line in said.splitlines()[4:]]
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 32, 64] and len({row[1] for row in rows}) == 1
    shared = [float(row[2]) for row in rows[1:]]
    assert shared == sorted(shared, reverse=True)


def test_costs_are_measured_and_drawn(tmp_path, capsys):
    args = SimpleNamespace(compile=False, repeats=1, png=str(tmp_path / "curves.png"))
    benchmark.benchmark_scale(args, [(1, 64), (2, 64)], (16, 32), 64, 16)
    said = capsys.readouterr().out.splitlines()
    sizes = [Decoder(Config(n_layer=n, d_model=64, vocab_size=4096, tie_embeddings=True, ffn="dense")).n_params() for n in (1, 2)]
    assert re.fullmatch(rf"dense  microseconds a token against parameters at T = 16: {sizes[0]:,}: [\d.]+, {sizes[1]:,}: [\d.]+; exponent -?[\d.]+", said[0])
    assert [line.split()[0] for line in said] == ["dense", "dense", "causal", "causal", "drawn:"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_measured(small_data, capsys):
    benchmark.benchmark_run(SimpleNamespace(repeats=1), ("--data", str(small_data), *map(str, TINY)), steps=8)
    said = capsys.readouterr().out.splitlines()
    beginnings = ("from the command to the end of the first step", "loading: ", "copying the state: ", "a step of one process of one thread")
    assert len(said) == 4 and all(line.startswith(start) for line, start in zip(said, beginnings))


def test_speed_is_measured_of_models_of_equal_size(capsys):
    args = SimpleNamespace(compile=False, repeats=1)
    config = Config(n_layer=1, d_model=32, vocab_size=64, block_size=16, tie_embeddings=True)
    assert benchmark.transformers_model(config).num_parameters() == Decoder(replace(config, ffn="dense")).n_params()
    benchmark.benchmark_training(config, 2, args)
    benchmark.benchmark_decoding(replace(config, block_size=1024), args, new=2)
    benchmark.benchmark_loss(64, 8, 16, 4)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 + 15 + 1 and said[0].startswith("steps of 2 x 16 tokens") and said[-1].startswith("step of 4 x 16 tokens, width 8")
