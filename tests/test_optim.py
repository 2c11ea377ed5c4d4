"""Optimizers, the schedule, clipping, and what happens in a bad step: by formulas, and in runs of train.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import log_lines, losses, refused, state_of, train, weights

import data as data_module
from checkpoint import State
from data import TokenData
from model import Config, Decoder
from optim import Muon, is_bad, lr_factor, make_optimizers, orthogonalize, scale_and_clip, update
from order import next_phase, samples_at

# ----------------------------------------------------------------------------------------------------------------------
# Muon and its groups


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(8, 8), (5, 16), (16, 5)])
def test_orthogonalize_maps_singular_values_by_its_polynomial(shape):
    x = torch.randn(3, *shape)
    U, s, Vt = np.linalg.svd(x.double().numpy(), full_matrices=False)
    s = s / np.sqrt((s**2).sum(-1, keepdims=True))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(orthogonalize(x).numpy(), (U * s[:, None, :]) @ Vt, atol=2e-4)
    assert (abs(s - 1) < 0.35).mean() > 0.8


@pytest.mark.quick
def test_every_parameter_is_in_one_group_and_learns():
    model = Decoder(Config(n_layer=2, d_model=32, vocab_size=64))
    for name in ("muon", "adamw"):
        optimizers = make_optimizers(model, name, 0.01, 0.1)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        grouped = [p for group in groups for p in group["params"]]
        assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
        before = {name: p.clone() for name, p in model.named_parameters()}
        ids = torch.randint(64, (2, 17))
        for _ in range(3):
            model(ids[:, :-1], ids[:, 1:]).backward()
            update(optimizers, 0.01, torch.tensor(False))
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert [group["lr"] for group in groups] == [0.01 * group["lr_scale"] for group in groups]


@pytest.mark.quick
def test_a_step_of_muon_is_its_formula():
    p = torch.nn.Parameter(torch.randn(2, 6, 4))
    start, gradients = p.detach().clone(), torch.randn(2, 2, 6, 4)
    optimizer = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    momentum, expected = torch.zeros(2, 6, 4), start
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        step = torch.stack([orthogonalize(matrix[None])[0] for matrix in 0.1 * gradient + 0.9 * momentum])
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * step
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(3, 16, 40), (40, 16), (8, 8)])
def test_muon_in_bf16_is_near_its_formula(shape):
    """Singular values that come out near 1 within 2 %; the weights themselves stay in fp32."""
    U, _, Vt = np.linalg.svd(np.random.default_rng(0).standard_normal(shape), full_matrices=False)
    gradient = torch.tensor(U @ Vt, dtype=torch.float32)  # its singular values are all 1: so are all n^-1/2 at first
    s = min(shape[-2:]) ** -0.5
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Muon([p], lr=0.1, bf16=True)
    p.grad = gradient.clone()
    optimizer.step()
    expected = -0.1 * 0.2 * max(shape[-2:]) ** 0.5 * s * gradient
    assert p.dtype == torch.float32
    error = (p.detach() - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.02, error  # fp32 has 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Schedule and clipping


@pytest.mark.quick
def test_learning_rate():
    args = SimpleNamespace(warmup=10, steps=None, schedule="cosine", decay=0.2)
    assert [lr_factor(step, 0.0, args) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert lr_factor(100, 0.5, args) == pytest.approx(0.5) and lr_factor(100, 1.0, args) == 0
    args.schedule = "wsd"
    assert [lr_factor(100, p, args) for p in (0.1, 0.8, 0.9, 1.0)] == pytest.approx([1, 1, 0.5, 0])
    args.warmup = args.decay = 0
    assert [lr_factor(step, p, args) for step, p in ((0, 0.0), (100, 1.0))] == [1, 1]
    args.warmup, args.steps = 0.1, 40  # a share of the run: 4 steps
    assert [lr_factor(step, step / 40, args) for step in (0, 1, 3, 4)] == pytest.approx([0.25, 0.5, 1, 1])
    args.steps = None  # by time
    assert [lr_factor(step, p, args) for step, p in ((0, 0.0), (9, 0.05), (30, 0.2))] == pytest.approx([0, 0.5, 1])


@pytest.mark.quick
@pytest.mark.parametrize("max_norm", [0.01, 0.5, 1e9, 0])
def test_scale_and_clip_equals_clip_grad_norm_on_the_mean_loss(max_norm):
    models = [Decoder(Config(n_layer=1, d_model=32, vocab_size=64)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.randint(64, (2, 17))
    targets = ids[:, 1:].clone()
    targets[0, :5] = -1
    models[0](ids[:, :-1], targets).backward()
    expected = torch.nn.utils.clip_grad_norm_(models[0].parameters(), max_norm or math.inf)
    models[1](ids[:, :-1], targets, reduction="sum").backward()
    norm = scale_and_clip(list(models[1].parameters()), (targets >= 0).sum(), max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-10, atol=0)
    for p, q in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-14)


# ----------------------------------------------------------------------------------------------------------------------
# A bad step


@pytest.mark.quick
def test_a_loss_far_above_the_last_ones_is_a_bad_step():
    recent = [5 + 0.1 * (-1) ** i for i in range(64)]  # mean 5, standard deviation 0.1
    for loss, norm, good_losses, bad in (
        (5.59, 1.0, recent, False),
        (5.61, 1.0, recent, True),
        (4.0, 1.0, recent, False),
        (9.0, 1.0, recent[1:], False),  # too few to compare with
        (math.nan, 1.0, [], True),
        (5.0, math.inf, recent, True),
    ):
        padded = torch.tensor([math.nan] * (64 - len(good_losses)) + good_losses)
        assert is_bad(torch.tensor(loss), torch.tensor(norm), padded).item() == bad


def bits(model, optimizers):
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [p.detach().clone() for p in model.parameters()] + [x.clone() for state in states for x in state.values()]


def set_gradients(model, value=None):
    """Random ones, the same each time, or one value everywhere."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if value is None else torch.full_like(p, value)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_bad_step_changes_no_bit_of_weights_and_optimizers(kind):
    """Whatever its gradients are; and the step after it is as if it had not been."""
    config = Config(n_layer=1, vocab_size=50)
    disturbed, other = Decoder(config), Decoder(config)
    other.load_state_dict(disturbed.state_dict())
    pairs = [(model, make_optimizers(model, kind, 0.01, 0.1)) for model in (disturbed, other)]
    for model, optimizers in pairs:
        set_gradients(model)
        update(optimizers, 0.01, torch.tensor(False))
    before = bits(*pairs[0])
    assert len(before) > len(list(disturbed.parameters()))
    for bad in (math.nan, math.inf, 1e30, -math.inf):
        set_gradients(disturbed, bad)
        update(pairs[0][1], 0.01, torch.tensor(True))
        assert all(map(torch.equal, bits(*pairs[0]), before)), bad
    for model, optimizers in pairs:
        set_gradients(model)
        update(optimizers, 0.01, torch.tensor(False))
    assert all(map(torch.equal, bits(*pairs[0]), bits(*pairs[1])))


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_step_without_targets_changes_no_bit_and_is_not_counted_as_skipped(kind):
    model = Decoder(Config(n_layer=1, vocab_size=50))
    optimizers, state = make_optimizers(model, kind, 0.01, 0.1), State.create("cpu", [[10, 0]])
    set_gradients(model)
    update(optimizers, 0.01, torch.tensor(False))
    before, ids = bits(model, optimizers), torch.randint(50, (2, 8))
    state.judge(torch.tensor(5.0), torch.tensor(1.0), torch.tensor(16))
    state.judge(torch.tensor(math.nan), torch.tensor(1.0), torch.tensor(16))
    for _ in range(6):
        nats, count = model(ids, torch.full_like(ids, -1), reduction="sum"), torch.tensor(0.0)
        nats.backward()
        norm = scale_and_clip(list(model.parameters()), count, 1.0)
        update(optimizers, 0.01, state.judge(nats / count, norm, count))
    assert all(map(torch.equal, bits(model, optimizers), before))
    counts = state.read()
    assert (counts["skipped"], counts["in_a_row"], counts["recent"]) == (1, 1, [5.0])


# ----------------------------------------------------------------------------------------------------------------------
# Bad steps of runs


@pytest.fixture
def break_steps(monkeypatch):
    """break_steps([3, 4]) makes the loss NaN in the third and fourth step from now on, of 4 micro-batches each."""
    forward = Decoder.forward

    def break_steps(steps):
        calls = 0

        def broken(self, ids, targets=None, cache=None, reduction="mean"):
            nonlocal calls
            loss = forward(self, ids, targets, cache, reduction)
            if targets is None or not self.training:  # a sample, an evaluation
                return loss
            calls += 1
            return loss * math.nan if (calls + 3) // 4 in steps else loss

        monkeypatch.setattr(Decoder, "forward", broken)

    return break_steps


def saved_steps(run):
    return [int(path.name[5:]) for path in sorted(run.glob("step-*"))]


def test_five_bad_steps_in_a_row_end_the_run_and_leave_its_weights(small_data, tmp_path, break_steps):
    break_steps([3, 4, 5, 6, 7])
    flags = ["--steps", 20, "--eval-every", 0, "--save-every", 1, "--keep", 9]
    result = train(small_data, tmp_path, *flags, ok=False)
    ends = "5 steps in a row had a loss or a gradient that cannot be right: the run ends at step 7. The last good"
    advice = "continue from there with a smaller --lr, or look at the data"
    refused(result, ends, f"checkpoint is {tmp_path / 'step-00000002'}: {advice}")
    assert saved_steps(tmp_path) == [1, 2]
    assert [line["skipped"] for line in log_lines(tmp_path)] == [0, 0, 1, 2, 3, 4]


def test_bad_steps_are_counted_over_a_restart(small_data, tmp_path, break_steps):
    break_steps([3, 4])
    flags = ["--eval-every", 0, "--save-every", 0]
    train(small_data, tmp_path, "--steps", 4, *flags)
    state = state_of(tmp_path, 4)
    assert (state["in_a_row"], state["skipped"], len(state["recent"])) == (2, 2, 2)
    break_steps([1, 2, 3])
    refused(train(small_data, tmp_path, "--resume", "--steps", 20, ok=False), "5 steps in a row", "ends at step 7")


@pytest.mark.parametrize(
    "steps, ends_at", [([3, 4, 5, 6, 7], 8), ([7, 8, 9, 10, 11], 11)], ids=["midway", "last steps"]
)
def test_five_bad_steps_between_two_lines_of_the_log_end_the_run_too(small_data, tmp_path, break_steps, steps, ends_at):
    """The device is only waited for when a line is logged, and at the end of a run."""
    break_steps(steps)
    flags = ["--steps", 11, "--log-every", 4, "--eval-every", 0, "--save-every", 0]
    result = train(small_data, tmp_path, *flags, ok=False)
    refused(result, f"5 steps in a row had a loss or a gradient that cannot be right: the run ends at step {ends_at}")
    assert saved_steps(tmp_path) == [] and "done" not in result.stdout


def test_nothing_is_saved_between_bad_steps(small_data, tmp_path, break_steps):
    break_steps([3, 4, 6])
    flags = ["--steps", 8, "--log-every", 4, "--eval-every", 0, "--save-every", 1, "--keep", 9]
    train(small_data, tmp_path, *flags)
    assert saved_steps(tmp_path) == [1, 2, 5, 7, 8]
    assert state_of(tmp_path, 8)["skipped"] == 3 and [line["skipped"] for line in log_lines(tmp_path)[:3]] == [0, 2, 3]


def test_a_run_goes_on_over_a_step_without_targets(small_data, tmp_path, monkeypatch):
    data = TokenData(small_data, "train", 32)
    phases = next_phase([], data.samples())
    empty = {data.number(*sample) for sample in samples_at(16, 8, phases, 0)}  # the third step's samples
    inputs_and_targets = data_module.inputs_and_targets

    def without_targets(samples, i):
        ids, targets = inputs_and_targets(samples, i)
        return ids, np.full_like(targets, -1) if i in empty else targets

    monkeypatch.setattr(data_module, "inputs_and_targets", without_targets)
    train(small_data, tmp_path, "--steps", 4, "--eval-every", 0, "--save-every", 1, "--keep", 9)
    assert [loss is None for loss in losses(tmp_path)] == [False, False, True, False]
    assert [weights(tmp_path, step) == weights(tmp_path, 2) for step in (1, 3, 4)] == [False, True, False]
    assert state_of(tmp_path, 4)["skipped"] == 0 and len(state_of(tmp_path, 4)["recent"]) == 3
