"""eval.py --routing: the numbers against the layer's formulas, and the command."""

import re

import pytest
import torch
from conftest import TINY, call, refused
from test_model import small

from checkpoint import newest_checkpoint
from extras.routing import characters, routing
from tokenizer import load_tokenizer


def unit(x, dim):
    return x / x.norm(dim=dim, keepdim=True)


@pytest.mark.quick
@torch.no_grad()
def test_routing_records_what_the_layer_computes():
    model, ids = small(slots_per_expert=2, window=3), torch.randint(50, (1, 9))
    inputs = []
    for block in model.blocks:
        block.ffn_norm.register_forward_hook(lambda module, args, output: inputs.append(output[0]))
    combine, window = routing(model, ids)
    for layer, (x, block) in enumerate(zip(inputs, model.blocks)):
        logits = block.ffn.scale * unit(x, 1) @ unit(block.ffn.phi, 0)
        torch.testing.assert_close(combine[layer], logits.softmax(-1))
        for t in range(9):
            back = range(min(3, t + 1))
            scores = torch.stack([logits[t - k] + block.ffn.recency[:, k] for k in back])
            torch.testing.assert_close(window[layer, : len(back), t], scores.softmax(0))
            assert not window[layer, len(back) :, t].any()


@pytest.mark.quick
def test_every_token_shows_the_characters_it_is_a_part_of():
    rare = [bytes([byte]) for byte in "龘".encode()]
    token_bytes = [b"a", "却说".encode(), *rare, b"\n", "曹".encode() + "操".encode()[:1], "操".encode()[1:]]
    assert characters(range(8), token_bytes) == ["a", "却说", "龘", "龘", "龘", "⏎", "曹操", "操"]


def test_the_command(small_data, tmp_path):
    call("train.py", "--data", small_data, "--out", tmp_path / "run", *TINY, "--steps", 2)
    png = tmp_path / "routing.png"
    shown = call("eval.py", "--routing", tmp_path / "run", "--prompt", "却说曹操龘", "--png", png).stdout
    n = len(load_tokenizer(newest_checkpoint(tmp_path / "run")).encode("却说曹操龘"))
    tables = [table.splitlines()[: 3 + n + 1] for table in shown.split("\nlayer ")[1:]]
    assert len(tables) == 2
    for table in tables:
        assert table[3][0] == "却" and table[2 + n][0] == "龘" and table[-1][:4] == "mean"
        for row in table[2:]:
            shares = [int(share) for share in re.findall(r"(\d+) ←", row)]
            assert sum(shares) == pytest.approx(100, abs=2) and row.count("*") == 1
    assert set(re.findall(r"←(\S+)", tables[0][2])) == {"0.0"}  # nothing comes before the beginning
    assert png.read_bytes().startswith(b"\x89PNG")
    call("train.py", "--data", small_data, "--out", tmp_path / "dense", *TINY, "--steps", 1, "--ffn", "dense")
    refused(call("eval.py", "--routing", tmp_path / "dense", ok=False), "has no causal Soft MoE (ffn dense")
