"""A step over fake CUDA tensors, which have a device and a shape but no numbers: where torch is a CUDA build no GPU is
needed. Fake tensors raise where two devices meet, and where a program waits for a number: .item(), a branch.

Backward and autocast need a driver: gradients are put in place of what backward would make, and all is in fp32.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from checkpoint import State
from dpo import Preference
from model import Config, Decoder, place_tokens
from optim import lr_factor, make_optimizers, scale_and_clip, update
from train import Likelihood, get_args

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this build of torch has no CUDA"),
]
AXES = {
    "dispatch": ("causal", "token"),
    "expert": ("swiglu", "swiglu2"),
    "router": ("cosine", "linear"),
    "slots_per_expert": (1, 2),
    "reset_id": (-1, 0),  # packing resets at ends of documents
}
LAYERS = [dict(zip(AXES, values)) for values in itertools.product(*AXES.values())]
LAYERS += [{"ffn": "dense"}, {"ffn": "dense", "reset_id": 0}, {"dispatch": "sequence"}]
OBJECTIVES = {"text": Likelihood(), "pairs": Preference()}


def micro_batch(objective):
    ids = torch.zeros(2, 128, dtype=torch.long, device="cuda")
    return (ids, ids) if objective == "text" else (ids, ids, torch.zeros(2, 4, device="cuda"))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_no_tensor_of_a_step_is_elsewhere_and_nothing_waits(layer, recompute, objective, optimizer):
    args = get_args(["--steps", "10"])
    with FakeTensorMode():
        with torch.device("cuda"):  # and no further: what a step makes must say itself where it is
            model = Decoder(Config(n_layer=1, **layer))
        for block in model.blocks:
            block.recompute = recompute
        optimizers = make_optimizers(model, optimizer, 1e-3, 0.1)
        state = State.create("cuda", [{"served": 0}])
        for _ in range(2):
            sums = OBJECTIVES[objective](model, *micro_batch(objective)).detach()
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            loss, norm = sums[0] / sums[1], scale_and_clip(model.parameters(), sums[1], 1.0)
            update(
                optimizers,
                1e-3 * lr_factor(state.step, state.progress(args), args),
                skip=state.judge(loss, norm, sums[1]),
            )
            state.advance(2)
        assert state.progress(args) == 0.2
        made = [loss, norm, *model.parameters(), state.skipped]
        made += [value for part in optimizers for values in part.state.values() for value in values.values()]
        assert {tensor.device.type for tensor in made} == {"cuda"}


def test_the_mask_for_flex_attention_waits_for_nothing():
    with FakeTensorMode():
        ids = torch.zeros(2, 300, dtype=torch.long, device="cuda")
        place = place_tokens(ids, Config(reset_id=0), None, torch.float32, by_blocks=True)
        blocks = place.mask.kv_indices
        assert (blocks.device.type, blocks.shape) == ("cuda", (2, 1, 3, 3))


def test_fake_tensors_find_both_kinds_of_fault():
    with FakeTensorMode():
        here, there = torch.zeros(2, device="cuda"), torch.zeros(2)
        with pytest.raises(RuntimeError, match="device"):
            here + there
        with pytest.raises(DataDependentOutputException):
            bool(here.sum())
