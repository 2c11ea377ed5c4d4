"""The study: its outside candidates against other implementations, and a small run of the whole."""

import json

import pytest
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
        layer.load_state_dict(dense.state_dict(), strict=False)
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
    flags = ["--data", small_data, "--out", tmp_path, "--seeds", 1, "--flags", " ".join(TINY)]
    names = ["dense", "convolution", "sequence"]
    call("study.py", *flags, "--steps", 2, "--only", "dense")
    (tmp_path / "dense-0" / "result.json").write_text(json.dumps({"loss": 1, "bpb": 2, "speed": 3, "memory": 4e6, "parameters": 5}))
    table = call("study.py", *flags, "--steps", 2, "--only", *names).stdout.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in names]
    assert table[2] == "| dense | 5 | 1 | 1.0000 |  | 2.0000 | 3 | 4 | 0 |"  # not run again
    found = json.loads((tmp_path / "sequence-0" / "result.json").read_text(encoding="utf-8"))
    assert f"{found['loss']:.4f} (it claims {found['forced']:.4f})" in table[4] and "no cache" in table[4]
    refused(call("study.py", *flags, "--steps", 2, "--only", "causal", "--flags=--lr -1", ok=False), "causal-0.log")
    with pytest.raises(AssertionError):
        call("study.py", "--only", "psychic")
