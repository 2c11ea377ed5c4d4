"""The study: its candidates from outside against other implementations, and a small run of the whole."""

import itertools
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
from data import TokenData
from extras.study import VARIANTS, Convolution, Decay, Window, decode_state, decoder_class, halves, optimizers_with
from model import Decoder, place_tokens
from optim import make_optimizers
from plan import PRESETS


@pytest.mark.quick
@torch.no_grad()
def test_the_candidates_compute_what_they_say():
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    convolution, decay = (randomized(kind(24, 24, 4).double()) for kind in (Convolution, Decay))
    padded, kernel = F.pad(x.transpose(1, 2), (3, 0)), convolution.kernel.flip(1)[:, None]
    expected = F.conv1d(padded, kernel, groups=24).transpose(1, 2)
    torch.testing.assert_close(convolution(None, x), expected, rtol=0, atol=1e-12)

    expected = torch.empty_like(x)
    for channel in range(24):
        rate, bonus = decay.rate[channel // 3].abs(), decay.bonus[channel // 3]
        for t in range(30):
            scores = -rate * torch.arange(t, -1, -1)  # by distance
            scores[t] += bonus
            expected[:, t, channel] = x[:, : t + 1, channel] @ scores.softmax(0)
    torch.testing.assert_close(decay(None, x), expected, rtol=0, atol=1e-12)

    window, u, expected = randomized(Window(24, 24, 4).double()), torch.randn(2, 30, 24).double(), torch.empty_like(x)
    for b, t, group in itertools.product(range(2), range(30), range(4)):
        read, phi = x[b, max(0, t - 3) : t + 1].flip(0), window.phi[group]
        cosines = read @ phi / (read.norm(dim=1) * phi.norm())
        weights = (window.scale * cosines + window.recency[group, : len(read)]).softmax(0)
        channels = slice(6 * group, 6 * group + 6)
        expected[b, t, channels] = weights @ u[b, max(0, t - 3) : t + 1, channels].flip(0)
    torch.testing.assert_close(window(x, u), expected, rtol=0, atol=1e-12)


@pytest.mark.quick
@torch.no_grad()
def test_convolutions_at_canons_places_compute_what_they_say():
    """A and C mix what a layer reads, B and D what its first matrix gives; the filters are fixed, or made by x."""
    config = replace(SMALL, ffn="dense", n_layer=1)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    place = place_tokens(torch.zeros(2, 9), config, None, x.dtype)
    plain = randomized(Decoder(config)).double().blocks[0]

    def shifted(u, k):
        return torch.cat([torch.zeros_like(u[:, :k]), u[:, : u.shape[1] - k]], dim=1)

    for name in ("canon-A", "canon-B", "canon-C", "canon-D", "dynamic-B", "dynamic-D"):
        block = randomized(decoder_class(name)(config)).double().blocks[0]
        (kernel,) = (p for key, p in block.named_parameters() if key.endswith("kernel"))
        letter = name[-1]
        layer, own = (block.attention, plain.attention) if letter in "AB" else (block.ffn, plain.ffn)
        own.load_state_dict({key: p for key, p in layer.state_dict().items() if not key.startswith("mixing")})

        def mixed(u):
            if name.startswith("canon"):
                return sum(kernel[:, k] * shifted(u, k) for k in range(4))
            weights = (x @ kernel.T).unflatten(-1, (-1, 4)).repeat_interleave(4 * u.shape[-1] // len(kernel), 2)
            return u + sum(weights[..., k] * shifted(u, k) for k in range(4))

        if letter in "AC":
            expected = own(mixed(x), place)
        elif letter == "D":
            gate, up = mixed(x @ own.w_in.flatten(0, 1).T).chunk(2, dim=-1)
            expected = (F.silu(gate) * up) @ own.w_out
        else:
            project, own.project = own.project, lambda x: mixed(project(x))
            expected = own(x, place)
            own.project = project
        torch.testing.assert_close(layer(x, place), expected, rtol=0, atol=1e-10)


@pytest.mark.quick
def test_convolutions_learn_at_a_rate_of_their_own_and_nothing_else_does():
    model = decoder_class("canon-ABCD")(replace(SMALL, ffn="dense"))
    name_of = {p: name for name, p in model.named_parameters()}

    def rates(optimizers):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        return {name_of[p]: group["lr_scale"] for group in groups for p in group["params"]}

    expected = rates(make_optimizers(model, "muon", 1e-3, 0.1))
    kernels = [name for name in expected if name.endswith("kernel")]
    assert len(kernels) == 4 * SMALL.n_layer
    assert rates(optimizers_with(3.0, model, "muon", 1e-3, 0.1)) == expected | dict.fromkeys(kernels, 3.0)


@pytest.mark.quick
def test_all_variants_have_the_same_number_of_parameters():
    counts = {}
    for name, (flags, _) in VARIANTS.items():
        given = train.given_fields(train.get_args(flags.split()))
        counts[name] = decoder_class(name)(replace(PRESETS["demo"], **given)).n_params()
    with_table = {name: counts.pop(name) for name in ("dense-ve", "causal-ve")}
    assert max(counts.values()) < 1.01 * min(counts.values()), counts
    table = PRESETS["demo"].vocab_size * PRESETS["demo"].d_model
    assert with_table == {f"{name}-ve": counts[name] + table + 3 for name in ("dense", "causal")}  # a factor a layer


@pytest.mark.quick
def test_the_decode_state_counts_what_a_block_keeps_of_earlier_tokens():
    """Of the last 3 tokens: q, k and v and 12 router logits; and for the causal layer 6 logits and A x and B x."""
    found = {}
    for name in ("dense", "causal", "canon-C", "window-B", "causal-window-B", "sequence"):
        given = train.given_fields(train.get_args(VARIANTS[name][0].split()))
        found[name] = decode_state(decoder_class(name)(replace(PRESETS["demo"], **given)))
    window, layer = 3 * (3 * 128 + 12), 3 * (6 + 2 * 384)
    assert found == {
        "dense": 0,
        "causal": layer,
        "canon-C": 3 * 128,
        "window-B": window,
        "causal-window-B": window + layer,
        "sequence": None,
    }


@pytest.mark.quick
def test_settings_are_chosen_on_other_text_than_is_reported(small_data):
    data = TokenData(small_data, "val", 16)
    expected = [[], []]
    for source in ("a zh", "b zh"):
        rows = [data[i].tolist() for i in range(len(data)) if data.source_of(i) == source]
        for half, part in zip(expected, (rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            half += part
    assert min(map(len, expected)) > 1
    assert [[row.tolist() for row in half] for half in halves(data)] == expected


def test_a_small_study_runs_resumes_and_prints_its_table(small_data, tmp_path):
    flags = ["--data", small_data, "--out", tmp_path / "a study", "--seeds", 1, "--steps", 2]
    tiny = "--flags=" + " ".join(TINY)
    call("extras.study", *flags, tiny, "--only", "sequence")
    path = tmp_path / "a study" / "sequence-0" / "result.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | {"speed": 3}), encoding="utf-8")

    result = call("extras.study", *flags, tiny, "--only", "canon-C", "sequence")
    table = result.stdout.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| canon-C", "| sequence"]
    assert f"| {found['loss']:.4f} (it claims {found['claimed']:.4f}) |" in table[3]
    convolution, sequence = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[2:])
    assert sequence[8] == "3" and "sequence-0" not in result.stderr  # read from its file, not run again
    assert convolution[7] == "0.001"  # 512 tokens
    assert (convolution[10], sequence[10]) == ("96", "grows")
    assert float(convolution[9]) > 0 and float(sequence[9]) > 0

    other = call("extras.study", *flags, "--flags=--lr 1", "--only", "sequence", ok=False)
    refused(other, "holds another study", "--out")
    flags[3] = tmp_path / "bad"
    refused(call("extras.study", *flags, "--flags=--lr -1", "--only", "causal", ok=False), "these runs failed")
    assert "--lr -1" in (tmp_path / "bad" / "causal-0.log").read_text(encoding="utf-8")


@pytest.mark.quick
def test_sizes_are_compared_by_compute(tmp_path):
    def write(study, name, flops, loss):
        folder = tmp_path / study / name
        folder.mkdir(parents=True)
        result = {"parameters": 1000, "trained": 2e6, "flops": flops, "loss": loss}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")

    for study, flops in (("large", 1e16), ("small", 1e14), ("medium", 1e15)):
        write(study, "dense-0", flops, 30 * flops**-0.05)
        write(study, "causal-window-B-0", flops, 40 * flops**-0.06 - 0.25)
        write(study, "causal-window-B-1", flops, 40 * flops**-0.06 + 0.25)
    write("small", "token-0", 1e14, 5.5)
    sizes = [tmp_path / name for name in ("large", "small", "medium")]
    lines = call("extras.sizes", *sizes, "--png", tmp_path / "sizes.png").stdout.splitlines()
    assert lines[2:9] == [
        "| causal-window-B | 1,000 | 2.000 | 0.100 | 2 | 5.7818 | 0.5000 |",
        "| causal-window-B | 1,000 | 2.000 | 1.000 | 2 | 5.0357 | 0.5000 |",
        "| causal-window-B | 1,000 | 2.000 | 10.000 | 2 | 4.3859 | 0.5000 |",
        "| dense | 1,000 | 2.000 | 0.100 | 1 | 5.9858 |  |",
        "| dense | 1,000 | 2.000 | 1.000 | 1 | 5.3348 |  |",
        "| dense | 1,000 | 2.000 | 10.000 | 1 | 4.7547 |  |",
        "| token | 1,000 | 2.000 | 0.100 | 1 | 5.5000 |  |",
    ]
    assert lines[9:12] == ["causal-window-B: compute^-0.0600", "dense: compute^-0.0500", "token: one size"]
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG") and len(lines) == 13

    refused(call("extras.sizes", tmp_path, ok=False), "has no results of extras.study")
    path = tmp_path / "small" / "causal-window-B-1" / "result.json"
    path.write_text('{"loss": 5}', encoding="utf-8")
    refused(call("extras.sizes", *sizes, ok=False), "earlier version", "--out")


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
