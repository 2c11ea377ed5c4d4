"""The study: its candidates from outside against other implementations, and a small run of the whole."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, call, refused, run
from test_model import SMALL, randomized

import train
from extras.study import VARIANTS, Convolution, Decay, decoder_class
from model import PRESETS


@pytest.mark.quick
@torch.no_grad()
def test_the_candidates_compute_what_they_say():
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    convolution, decay = (randomized(kind(SMALL).double()) for kind in (Convolution, Decay))
    padded, kernel = F.pad(x.transpose(1, 2), (3, 0)), convolution.kernel.flip(1)[:, None]
    expected = F.conv1d(padded, kernel, groups=24).transpose(1, 2)
    torch.testing.assert_close(convolution(x), expected, rtol=0, atol=1e-12)

    expected = torch.empty_like(x)
    for channel in range(24):
        rate, bonus = decay.rate[channel // 3].abs(), decay.bonus[channel // 3]
        for t in range(30):
            scores = -rate * torch.arange(t, -1, -1)  # by distance
            scores[t] += bonus
            expected[:, t, channel] = x[:, : t + 1, channel] @ scores.softmax(0)
    torch.testing.assert_close(decay(x), expected, rtol=0, atol=1e-12)


@pytest.mark.quick
def test_all_variants_have_the_same_number_of_parameters():
    counts = {}
    for name, (flags, _) in VARIANTS.items():
        given = train.given_fields(train.get_args(flags.split()))
        counts[name] = decoder_class(name)(replace(PRESETS["demo"], **given)).n_params()
    assert max(counts.values()) < 1.002 * min(counts.values()), counts


def test_a_small_study_runs_resumes_and_prints_its_table(small_data, tmp_path):
    flags = ["--data", small_data, "--out", tmp_path / "a study", "--seeds", 1, "--steps", 2]
    tiny = "--flags=" + " ".join(TINY)
    call("extras.study", *flags, tiny, "--only", "sequence")
    path = tmp_path / "a study" / "sequence-0" / "result.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | {"speed": 3}), encoding="utf-8")

    result = call("extras.study", *flags, tiny, "--only", "convolution", "sequence")
    table = result.stdout.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| convolution", "| sequence"]
    assert f"| {found['loss']:.4f} (it claims {found['claimed']:.4f}) |" in table[3]
    convolution, sequence = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[2:])
    assert sequence[7] == "3" and "sequence-0" not in result.stderr  # read from its file, not run again
    assert convolution[6] == "0.001"  # 512 tokens
    assert (convolution[9], sequence[9]) == ("96", "grows")
    assert float(convolution[8]) > 0 and float(sequence[8]) > 0

    other = call("extras.study", *flags, "--flags=--lr 1", "--only", "sequence", ok=False)
    refused(other, "holds another study", "--out")
    flags[3] = tmp_path / "bad"
    refused(call("extras.study", *flags, "--flags=--lr -1", "--only", "causal", ok=False), "these runs failed")
    assert "--lr -1" in (tmp_path / "bad" / "causal-0.log").read_text(encoding="utf-8")


def test_mixes_are_compared_by_source(small_data, tmp_path):
    flags = ["--data", small_data, "--out", tmp_path, "--seeds", 2, "--steps", 2, "--flags=" + " ".join(TINY)]
    table = call("extras.study", "--mixes", *flags, "--only", "as it is").stdout.splitlines()
    assert table[0] == "| trained on | a zh | b zh | all |"
    lines = [
        (tmp_path / f"as it is-{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for seed in (0, 1)
    ]
    last = [json.loads(of_run[-1]) for of_run in lines]
    for cell, key in zip(table[2].strip("| ").split(" | ")[1:], ("val_bpb/a zh", "val_bpb/b zh", "val_bpb")):
        one, two = (run[key] for run in last)
        assert cell == f"{(one + two) / 2:.3f} ± {abs(one - two) / 2:.3f}"


@pytest.mark.parametrize(
    "flags, words",
    [(["--only", "psychic"], "invalid choice"), (["--workers", 0], "--workers 0: expected 1 or more")],
)
def test_wrong_flags_are_refused(flags, words):
    refused(call("extras.study", *flags, ok=False), words)


def test_an_interrupted_study_resumes_where_it_was(small_data, tmp_path):
    command = ["-m", "extras.study", "--data", small_data, "--out", tmp_path, "--only", "causal", "--seeds", 1]
    command += ["--steps", 150, "--workers", 1, "--flags=" + " ".join(TINY)]
    command = [sys.executable, *map(str, command)]
    metrics = tmp_path / "causal-0" / "metrics.jsonl"
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    while first.poll() is None and not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") > 20):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.communicate()[1].splitlines() == ["stopped; the same command continues"] and first.returncode == 1
    stopped_at = int(next(metrics.parent.glob("step-*")).name[5:])
    assert 20 <= stopped_at < 150 and not (metrics.parent / "result.json").exists()

    second = run(*command)
    assert second.returncode == 0 and "| causal |" in second.stdout
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 151))
