"""On a GPU: python -m pytest -m cuda. Elsewhere these tests are skipped; the CPU has tests of the same properties."""

import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, call, losses, what_a_run_leaves
from test_dpo import EOS, example

from data import TokenData, batches
from dpo import Preference
from model import Config, Decoder, cross_entropy, softmax_gradient
from optim import make_optimizers, scale_and_clip, update
from order import next_phase
from parallel import Ranks
from plan import PRESETS, StepMemory
from train import Likelihood, get_args, gradients, move_to_device

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA can use"),
]
LAYERS = [{"dispatch": "causal"}, {"dispatch": "token"}, {"expert": "swiglu2", "slots_per_expert": 2}, {"ffn": "dense"}]


def small_model(**changes):
    """Two layers whose matrices are none of them zero, on the GPU."""
    torch.manual_seed(0)
    model = Decoder(Config(n_layer=2, d_model=128, n_head=2, n_kv_head=2, vocab_size=512, block_size=128, **changes))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model.cuda()


@pytest.mark.parametrize("changes", LAYERS, ids=str)
def test_compiled_bf16_logits_are_causal_to_the_bit(changes):
    model = small_model(**changes)
    for block in model.blocks:
        block.compile(dynamic=False)
    ids = torch.randint(512, (4, 128), device="cuda")
    later = ids.clone()
    later[:, 100:] = torch.randint(512, (4, 28), device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        one, other = model(ids), model(later)
    assert torch.equal(one[:, :100], other[:, :100]) and not torch.equal(one, other)


@pytest.mark.parametrize("changes", LAYERS, ids=str)
def test_bf16_stays_near_fp32(changes):
    """Loss within 1 %, each gradient within 5 % of its norm: bf16 keeps 8 bits."""
    model = small_model(**changes)
    ids = torch.randint(512, (4, 129), device="cuda")
    losses, sums = [], []
    for enabled in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            losses.append(model(ids[:, :-1], ids[:, 1:]))
        sums.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    for (name, _), exact, rounded in zip(model.named_parameters(), *sums):
        assert (exact - rounded).norm() <= 0.05 * exact.norm() + 1e-6, name


def test_the_compiled_loss_is_the_eager_one_and_the_plain_one():
    hidden = torch.randn(1000, 64, device="cuda", requires_grad=True)
    weight = torch.randn(5003, 64, device="cuda", requires_grad=True)
    targets = torch.randint(-1, 5003, (1000,), device="cuda")
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=-1, reduction="sum")
    expected = torch.autograd.grad(plain, (hidden, weight))
    for body in (softmax_gradient, torch.compile(softmax_gradient, dynamic=False)):
        ours = cross_entropy(hidden, weight, targets, "sum", chunk=300, softmax_gradient=body)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
        for got, want in zip(torch.autograd.grad(ours, (hidden, weight)), expected):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("head_dim", [56, 64, 128])
def test_flex_attention_looks_where_the_mask_does(head_dim, recompute):
    """Rows of documents of all sizes: loss within 1 %, gradients within 5 % of their norm, in bf16; and the bits again.

    Not yet run on a GPU.
    """
    config = Config(n_layer=2, d_model=4 * head_dim, n_head=4, n_kv_head=2, vocab_size=512, block_size=1024, reset_id=0)
    torch.manual_seed(0)
    model = Decoder(config).cuda()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    ids = torch.randint(512, (4, 1025), device="cuda")
    ids[0, 1:].clamp_(min=1)  # a row of one document

    def loss_and_gradients():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids[:, :-1], ids[:, 1:])
        return loss.item(), torch.autograd.grad(loss, list(model.parameters()))

    masked, expected = loss_and_gradients()
    move_to_device(model, get_args(["--recompute"] if recompute else []), "cuda", True, Ranks())
    assert model.uses_flex
    loss, got = loss_and_gradients()
    assert loss == pytest.approx(masked, rel=0.01)
    for (name, _), a, b in zip(model.named_parameters(), got, expected):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-6, name
    assert all(map(torch.equal, got, loss_and_gradients()[1]))


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_pairs_of_answers_are_on_the_gpu_what_they_are_on_the_cpu(sft_weight, request):
    """The loss, what is logged, and each gradient: compiled, in fp32, from rows of two, one and no pairs.

    Not yet run on a GPU.
    """
    config = Config(n_layer=2, d_model=128, n_head=2, n_kv_head=2, vocab_size=50, block_size=64, reset_id=EOS)
    model, objective = Decoder(config), Preference(beta=0.5, sft_weight=sft_weight)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    ids, targets, _ = example(0)
    reference = -10 * torch.rand(3, 4)
    results = []
    for device in ("cpu", "cuda"):
        if device == "cuda":
            move_to_device(model, get_args([]), "cuda", True, Ranks())
            torch.set_float32_matmul_precision("highest")
            request.addfinalizer(lambda: torch.set_float32_matmul_precision("high"))
        sums = objective(model, *(a.to(device) for a in (ids, targets, reference)))
        results.append([part.cpu() for part in (sums, *torch.autograd.grad(sums[0], list(model.parameters())))])
    for got, expected in zip(*reversed(results)):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("changes", [{"dispatch": "causal"}, {"ffn": "dense"}], ids=str)
def test_decoding_with_the_cache_gives_the_logits_of_one_forward(changes):
    model = small_model(**changes)
    ids = torch.randint(512, (3, 40), device="cuda")
    with torch.no_grad():
        whole, cache = model(ids), model.new_cache(3, 40)
        parts = [model(ids[:, :25], cache=cache)] + [model(ids[:, t : t + 1], cache=cache) for t in range(25, 40)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_no_step_waits_for_the_gpu(small_data, optimizer):
    """torch raises at whatever waits: .item(), a branch on a tensor, a copy from memory that is not pinned."""
    from checkpoint import State

    args = get_args(["--bf16", "--optimizer", optimizer])
    model = small_model(reset_id=0)
    model = Decoder(Config(**{**model.config.__dict__, "vocab_size": 4096}))
    move_to_device(model, args, "cuda", True, Ranks())
    optimizers = make_optimizers(model, optimizer, 1e-3, 0.1, bf16=True)
    data = TokenData(small_data, "train", 128)
    state = State.create("cuda", next_phase([], data.samples()))
    steps = batches(data, state.phases, 0, Ranks(), 2, 4, "cuda")
    try:
        for step in range(4):
            micro_batches = next(steps)
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one compiles
            nats, count = gradients(model, Likelihood(), micro_batches, args, Ranks(), "cuda")
            loss, norm = nats / count, scale_and_clip(model.parameters(), count, 1.0)
            update(optimizers, 1e-3, skip=state.judge(loss, norm, count))
            state.advance(8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.read()["skipped"] == 0 and len(state.read()["recent"]) == 4


CUDA = [flag for flag in TINY if flag != "--no-compile"] + "--device cuda --save-every 4 --eval-every 4".split()


def test_a_run_killed_on_the_gpu_resumes_to_the_same_bits(small_data, tmp_path):
    flags = ["--data", small_data, *CUDA, "--steps", 12]
    call("train.py", "--out", tmp_path / "whole", *flags)
    command = [sys.executable, "train.py", "--out", tmp_path / "run", *flags]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / "step-00000004").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    call("train.py", "--resume", "--out", tmp_path / "run")
    assert what_a_run_leaves(tmp_path / "run", 12) == what_a_run_leaves(tmp_path / "whole", 12)


def test_an_exact_run_gives_its_own_bits_again(small_data, tmp_path):
    for name in ("one", "other"):
        call("train.py", "--data", small_data, "--out", tmp_path / name, *CUDA, "--steps", 4, "--exact")
    assert what_a_run_leaves(tmp_path / "one", 4) == what_a_run_leaves(tmp_path / "other", 4)


def test_two_processes_on_one_gpu_give_the_loss_of_one(small_data, tmp_path):
    """NCCL refuses two processes on one card, so gloo sums."""
    flags = ["--data", small_data, *CUDA, "--steps", 4, "--optimizer", "adamw", "--lr", "0.001", "--no-compile"]
    call("train.py", "--out", tmp_path / "one", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "train.py"]
    subprocess.run(list(map(str, [*command, "--out", tmp_path / "two", *flags])), cwd=ROOT, check=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-3)


def test_the_memory_of_a_step_is_the_plans(tmp_path):
    """steel-1b, one micro-batch of 4, eager: --dry-run plans what the GPU holds at most, and 15 % too much at most."""
    args, config = get_args(["--bf16", "--preset", "steel-1b"]), PRESETS["steel-1b"]
    planned = StepMemory(config, 4, args).on_each(1, shard=False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = Decoder(config)
    move_to_device(model, args, "cuda", False, Ranks())
    optimizers = make_optimizers(model, "muon", 1e-4, 0.1, bf16=True)
    for _ in range(2):
        ids = torch.randint(config.vocab_size, (4, config.block_size + 1))
        gradients(model, Likelihood(), [(ids[:, :-1], ids[:, 1:])], args, Ranks(), "cuda")
        count = torch.tensor(4.0 * config.block_size, device="cuda")
        norm = scale_and_clip(model.parameters(), count, 1.0)
        update(optimizers, 1e-4, skip=~norm.isfinite())
    measured = torch.cuda.max_memory_allocated()
    print(f"planned {planned / 1e9:.1f} GB, measured {measured / 1e9:.1f} GB")
    assert 0.85 * planned < measured < planned
