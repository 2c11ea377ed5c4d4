"""The study: its outside candidates against other implementations, and a small run of the whole."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, call, refused, run
from test_model import SMALL, randomized

import train
from model import PRESETS, Config, Decoder
from study import CANDIDATES, VARIANTS, Candidate, Convolution, Decay


@torch.no_grad()
def test_the_candidates_are_what_they_say():
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    convolution, decay = (randomized(kind(SMALL).double()) for kind in (Convolution, Decay))
    mixed = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), convolution.kernel.flip(1)[:, None], groups=24).transpose(1, 2)
    torch.testing.assert_close(convolution(x), mixed, rtol=0, atol=1e-12)
    for channel in range(24):
        rate, bonus = decay.rate[channel // 3].abs(), decay.bonus[channel // 3]
        for t in range(30):
            weights = torch.stack([(bonus if s == t else torch.zeros_like(bonus)) - rate * (t - s) for s in range(t + 1)])
            mixed[:, t, channel] = x[:, : t + 1, channel] @ weights.softmax(0)
    torch.testing.assert_close(decay(x), mixed, rtol=0, atol=1e-12)


def test_all_variants_have_as_many_parameters():
    counts = {}
    for name, (flags, _) in VARIANTS.items():
        args = train.get_args(flags.split())
        given = {field.name: getattr(args, field.name) for field in fields(Config) if hasattr(args, field.name)}
        Candidate.mixing = CANDIDATES.get(name)
        counts[name] = (Candidate if name in CANDIDATES else Decoder)(replace(PRESETS["demo"], **given)).n_params()
    assert max(counts.values()) < 1.002 * min(counts.values()), counts


def test_a_small_study_runs_goes_on_and_prints_its_table(small_data, tmp_path):
    flags = ["--data", small_data, "--out", tmp_path / "a study", "--seeds", 1, "--steps", 2]
    tiny = "--flags=" + " ".join(TINY)
    call("study.py", *flags, tiny, "--only", "sequence")
    path = tmp_path / "a study" / "sequence-0" / "result.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | {"speed": 3}), encoding="utf-8")
    result = call("study.py", *flags, tiny, "--only", "convolution", "sequence")
    table = result.stdout.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| convolution", "| sequence"]
    assert f"| {found['loss']:.4f} (it claims {found['claimed']:.4f}) |" in table[3]
    cells = [line.strip("| ").split(" | ") for line in table[2:]]
    assert cells[1][7] == "3" and [row[9] for row in cells] == ["96", "grows"] and all(float(row[8]) > 0 for row in cells)
    assert cells[0][6] == "0.001"  # 512 tokens
    assert "sequence-0" not in result.stderr  # it was not run again
    refused(call("study.py", *flags, "--flags=--lr 1", "--only", "sequence", ok=False), "holds another study", "--out")
    result = call("study.py", *flags[:3], tmp_path / "bad", *flags[4:], "--flags=--lr -1", "--only", "causal", ok=False)
    refused(result, "these runs failed", "causal-0.log")
    for bad, words in ((["--only", "psychic"], "invalid choice"), (["--workers", 0], "--workers 0: expected 1 or more")):
        refused(call("study.py", *bad, ok=False), words)


def test_an_interrupted_study_goes_on_where_it_was(small_data, tmp_path):
    command = ["study.py", "--data", small_data, "--out", tmp_path, "--only", "causal", "--seeds", 1, "--steps", 150, "--workers", 1]
    command = [sys.executable, *map(str, [*command, "--flags=" + " ".join(TINY)])]
    metrics = tmp_path / "causal-0" / "metrics.jsonl"
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    while first.poll() is None and not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") > 20):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.communicate()[1].splitlines() == ["stopped; the same command goes on"] and first.returncode == 1
    stopped_at = int(next(metrics.parent.glob("step-*")).name[5:])
    assert 20 <= stopped_at < 150 and not (metrics.parent / "result.json").exists()
    second = run(*command)
    assert second.returncode == 0 and "| causal |" in second.stdout
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 151))
