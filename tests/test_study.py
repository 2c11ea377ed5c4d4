"""The study: its outside candidates against other implementations, and a small run of the whole."""

import json

import torch
import torch.nn.functional as F
from conftest import TINY, call, refused
from test_model import SMALL, place_of, randomized

from model import Dense
from study import Convolution, Decay


@torch.no_grad()
def test_the_candidates_are_what_they_say():
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    dense = randomized(Dense(SMALL).double())
    convolution, decay = (kind(SMALL).double() for kind in (Convolution, Decay))
    for layer in (convolution, decay):
        randomized(layer)
        layer.w_in.copy_(dense.w_in)
        layer.w_out.copy_(dense.w_out)
    mixed = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), convolution.recency.flip(1)[:, None], groups=24).transpose(1, 2)
    torch.testing.assert_close(convolution(x, place_of(x)), dense(mixed, None), rtol=0, atol=1e-12)
    mixed = torch.empty_like(x)
    for channel in range(24):
        rate, bonus = decay.recency[channel // 3]
        for t in range(30):
            weights = torch.stack([(bonus if s == t else torch.zeros_like(bonus)) - rate.abs() * (t - s) for s in range(t + 1)])
            mixed[:, t, channel] = x[:, : t + 1, channel] @ weights.softmax(0)
    torch.testing.assert_close(decay(x, place_of(x)), dense(mixed, None), rtol=0, atol=1e-12)


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
    refused(call("study.py", *flags, "--flags=--lr 1", "--only", "sequence", ok=False), "is of another study", "--out")
    result = call("study.py", *flags, "--flags=--lr -1", "--only", "causal", ok=False)
    refused(result, "these runs failed", "causal-0.log")
    for bad, words in ((["--only", "psychic"], "invalid choice"), (["--workers", 0], "--workers 0: expected 1 or more")):
        refused(call("study.py", *bad, ok=False), words)
