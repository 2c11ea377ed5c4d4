"""The benchmark runs and prints every line; its numbers are a matter of the machine."""

import re

import torch
from conftest import call

import benchmark
from benchmark import peak_memory


def test_a_small_benchmark_prints_every_line():
    lines = call("benchmark.py", "--d-model", 64, "--n-expert", 2, "--repeats", 1, "--no-compile").stdout.splitlines()
    beginnings = (f"{torch.get_num_threads()} threads, width 64, 2 experts", "forward + backward", "peak memory", "microseconds a token", "decoding")
    assert len(lines) == 5 and all(line.startswith(start) for line, start in zip(lines, beginnings))
    peaks = [int(number) for number in re.findall(r"(\d+) MB", lines[2])]
    assert len(peaks) == 2 and min(peaks) > 0
    assert lines[4].endswith("state: 192, 192, 192, 192 numbers")  # W - 1 inputs of width 64, at any length


def test_peak_memory_counts_what_is_alive_at_once():
    def step():
        a = torch.ones(1000)
        b = a + 1
        del a
        return b * b * b  # b, b * b and the result

    assert peak_memory(step) == 3 * 4000


def test_a_small_benchmark_of_the_data_stage_prints_every_line(monkeypatch):
    monkeypatch.setattr(benchmark, "HOSTILE", {"spaces": " " * 1000})
    lines = call("benchmark.py", "data", "--megabytes", 0.3, "--documents", 5000).stdout.splitlines()
    lines = [line for line in lines if not line.startswith("fetching")]
    beginnings = ("tokenising", "pipeline zh", "    of 0 MB: ", "    of 1 MB: ", "all of prepare.py on 1.2 MB: 1 process", "slowest operators", "copies among 5,000")
    assert len(lines) == 7 and all(line.startswith(start) for line, start in zip(lines, beginnings))
    assert lines[6].endswith("MB, 3 near copies found")  # of documents 2,500, 3,500 and 4,500, three bits off
