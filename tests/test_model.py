"""The decoder: causality, decoding, the limits of the Soft MoE, the loss: compared with something independent."""

import math
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, python
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import flex_attention

from extras.huggingface import STEEL, hugging_face_tensors
from extras.timing import peak_memory
from model import (
    Attention,
    Config,
    Decoder,
    Dense,
    SequenceSoftMoE,
    SoftMoE,
    causal_moe_definition,
    cross_entropy,
    place_tokens,
    softmax_gradient,
)
from plan import PRESETS

SMALL = Config(
    n_layer=2,
    d_model=24,
    n_head=4,
    n_kv_head=2,
    vocab_size=50,
    block_size=64,
    n_expert=3,
    tie_embeddings=False,
)
CAUSAL_KINDS = [
    dict(),
    dict(slots_per_expert=2, window=3),
    dict(expert="swiglu2"),
    dict(expert="swiglu2", slots_per_expert=2, window=2),
    dict(window=6),
    dict(window=1),
    dict(dispatch="token"),
    dict(dispatch="token", slots_per_expert=2),
    dict(router="linear", slots_per_expert=2),
    dict(ffn="dense"),
    dict(ffn="dense", qk_norm=True, head_dim=10),
    dict(qk_norm=True),
    dict(value_embedding=True),
    dict(ffn="dense", value_embedding=True, head_dim=10),
]


def randomized(module, std=0.5):
    """Every parameter random, so that nothing is zero or equal by initialisation."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * std)
    return module


def place_of(x, window=1):
    """The Place of x [B, T, D] whose rows are texts from their beginning."""
    return place_tokens(torch.zeros(x.shape[:2]), replace(SMALL, window=window), None, x.dtype)


def small(dtype=torch.float64, **changes):
    return randomized(Decoder(replace(SMALL, **changes)).to(dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Causality


@pytest.mark.quick
@pytest.mark.parametrize("changes", CAUSAL_KINDS, ids=str)
def test_a_later_token_changes_no_earlier_bit(changes):
    model, ids = small(torch.float32, **changes), torch.randint(50, (2, 40))
    before = model(ids)
    for t in (1, 20, 39):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.quick
def test_the_published_layer_reads_later_tokens():
    model, ids = small(dispatch="sequence"), torch.randint(50, (1, 40))
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 50
    assert (model(ids)[:, :20] - model(changed)[:, :20]).abs().max() > 1e-6


@pytest.mark.quick
@pytest.mark.parametrize("changes", CAUSAL_KINDS, ids=str)
def test_no_gradient_flows_from_an_output_to_a_later_input(changes):
    model, ids = small(**changes), torch.randperm(50)[None, :30]
    for t in (0, 11, 28):
        model.zero_grad()
        model(ids)[0, t].square().sum().backward()
        assert (model.embedding.grad[ids[0, t + 1 :]] == 0).all()
        assert (model.embedding.grad[ids[0, : t + 1]] != 0).any(-1).all()


@pytest.mark.quick
def test_the_published_layer_has_gradients_from_later_inputs():
    model, ids = small(dispatch="sequence"), torch.randperm(50)[None, :30]
    model(ids)[0, 11].square().sum().backward()
    assert (model.embedding.grad[ids[0, 12:]] != 0).any()


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(slots_per_expert=2, window=3, expert="swiglu2"), dict(dispatch="token"), dict(reset_id=0)],
    ids=str,
)
def test_compiled_blocks_are_causal_to_the_last_bit_and_have_the_gradients_of_eager_ones(changes, compiler):
    model, ids = small(torch.float32, **changes), torch.randint(50, (2, 41))
    ids[0, 9] = ids[1, 30] = 0
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 50
    results = []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.compile()
        before, after = model(ids), model(changed)
        assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20], after[:, 20])
        model.zero_grad()
        before.square().mean().backward()
        results.append([before.detach(), *(p.grad for p in model.parameters())])
    for got, expected in zip(*reversed(results)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", [*CAUSAL_KINDS, dict(dispatch="sequence"), dict(reset_id=0)], ids=str)
def test_a_block_compiles_as_one_graph(changes, recompute):
    """No kernel is fused over a break. Needs no compiler: the graph is run eagerly."""
    model, ids = small(torch.float32, **changes), torch.randint(50, (2, 41))
    block, place = model.blocks[0], place_tokens(ids, model.config, None, torch.float32)
    block.recompute = recompute
    torch._dynamo.reset()
    x = torch.randn(2, 41, SMALL.d_model, requires_grad=True)
    explained = torch._dynamo.explain(block)(x, place, None, 0)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


def test_compiled_blocks_give_the_same_bits_again(compiler):
    """Their code must not add in whatever order the threads arrive. Here there are more threads than cores."""
    model, ids, threads = small(torch.float32), torch.randint(50, (4, 512)), torch.get_num_threads()
    for block in model.blocks:
        block.compile(dynamic=False)

    def gradients():
        model.zero_grad()
        model(ids).square().mean().backward()
        return [p.grad for p in model.parameters()]

    torch.set_num_threads(3 * os.cpu_count())
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            first, codes = run_and_get_code(gradients)
        assert len(codes) == 2 and not any("atomic_add" in code for code in codes)  # forward and backward
        for _ in range(20):
            assert all(map(torch.equal, gradients(), first))
    finally:
        torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------------------------------
# Documents packed together


# Each row holds documents of other lengths, 35 tokens together. A row may begin in the middle of a document.
PACKED = [(5, 2, 13, 4, 1, 10), (35,), (1, 1, 1, 20, 12)]


def documents_of(sizes):
    """Random documents of these sizes, each with the reset id 0 in front but for the first."""
    documents = [F.pad(torch.randint(1, 50, (n - 1,)), (1, 0)) for n in sizes]
    documents[0] = torch.randint(1, 50, (sizes[0],))
    return documents


@pytest.mark.quick
@pytest.mark.parametrize("changes", CAUSAL_KINDS, ids=str)
@torch.no_grad()
def test_with_reset_a_packed_document_is_what_it_is_by_itself(changes):
    """In a batch whose rows have other document starts; whole, and read into a cache in pieces."""
    model = small(reset_id=0, **changes)
    rows = [documents_of(sizes) for sizes in PACKED]
    packed = torch.stack([torch.cat(documents) for documents in rows])
    separate = torch.stack([torch.cat([model(d[None])[0] for d in documents]) for documents in rows])
    torch.testing.assert_close(model(packed), separate, rtol=0, atol=1e-10)
    without = small(**changes)
    without.load_state_dict(model.state_dict())
    assert (without(packed) - separate)[0, 5:].abs().max() > 1e-3
    for sizes in ([35], [1] * 35, [7, 1, 12, 15]):
        cache = model.new_cache(len(rows), 64)
        parts = [model(chunk, cache=cache) for chunk in packed.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), separate, rtol=0, atol=1e-10)


@pytest.mark.quick
@pytest.mark.parametrize("changes", [dict(), dict(expert="swiglu2", slots_per_expert=2, window=3)], ids=str)
def test_the_layer_with_reset_is_its_definition_on_each_document(changes):
    """With the gradients of the input and of every parameter."""
    config = replace(SMALL, reset_id=0, **changes)
    layer = randomized(SoftMoE(config).double())
    rows = [documents_of(sizes) for sizes in PACKED]
    ids = torch.stack([torch.cat(documents) for documents in rows])
    x = torch.randn(*ids.shape, 24, dtype=torch.float64, requires_grad=True)
    pieces = [row.split([len(d) for d in documents]) for row, documents in zip(x, rows)]
    defined = torch.stack([torch.cat([causal_moe_definition(layer, z) for z in row]) for row in pieces])
    assert_equal_with_gradients(layer(x, place_tokens(ids, config, None, x.dtype)), defined, [x, *layer.parameters()])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_looks_where_the_mask_does(dtype, recompute, monkeypatch):
    """Loss and gradients as with the dense mask, and all masks share one code. CUDA's way, traced and run eagerly.

    torch refuses the backward on a CPU, where it has no kernel for it; the eager one works.
    """
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    model, backend = small(torch.float32, reset_id=0), CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.recompute = recompute
    batches = [torch.randint(50, (3, 301)) for _ in range(3)]
    batches[0][0, 1:] = torch.randint(1, 50, (300,))  # a row of one document

    def loss_and_gradients(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids[:, :-1], ids[:, 1:])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([part.detach().flatten() for part in (loss, *gradients)])

    expected = [loss_and_gradients(ids) for ids in batches]
    model.uses_flex = True
    for block in model.blocks:
        block.compile(dynamic=False, backend=backend)
    for ids, wanted in zip(batches, expected):
        error = (loss_and_gradients(ids) - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.01)
    assert backend.frame_count == 1


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("changes", CAUSAL_KINDS, ids=str)
@torch.no_grad()
def test_prefill_and_steps_are_one_forward_at_every_split(changes):
    model = small(**changes)
    for T in range(1, 3 * model.config.window + 1):
        ids = torch.randint(50, (2, T))
        whole = model(ids)
        for split in range(T + 1):  # 0: every token a step of its own; T: prefill only
            cache = model.new_cache(2, T)
            parts = [model(ids[:, :split], cache=cache)] if split else []
            parts += [model(ids[:, t : t + 1], cache=cache) for t in range(split, T)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.quick
@torch.no_grad()
def test_a_cache_takes_chunks_of_any_size():
    model, ids = small(), torch.randint(50, (2, 30))
    cache = model.new_cache(2, 30)
    parts = [model(chunk, cache=cache) for chunk in ids.split([7, 1, 2, 13, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize("changes", CAUSAL_KINDS, ids=str)
@torch.no_grad()
def test_a_batch_of_unequal_prompts_equals_single_prompts(changes):
    model = small(**changes)
    prompts = [torch.randint(50, (n,)) for n in (1, 4, 9)]
    steps = torch.randint(50, (3, 5))
    padded = torch.stack([F.pad(prompt, (9 - len(prompt), 0), value=-1) for prompt in prompts])
    cache = model.new_cache(3, 14)
    together = torch.cat([model(padded, cache=cache)] + [model(steps[:, t : t + 1], cache=cache) for t in range(5)], 1)
    for row, prompt in enumerate(prompts):
        single = model(torch.cat([prompt, steps[row]])[None])[0]
        torch.testing.assert_close(together[row, 9 - len(prompt) :], single, rtol=0, atol=1e-10)


@pytest.mark.quick
def test_a_full_cache_and_a_cache_for_the_published_layer_are_refused():
    model = small()
    with pytest.raises(ValueError, match="holds 4 positions, 5"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=model.new_cache(1, 4))
    model = small(dispatch="sequence")
    with pytest.raises(ValueError, match="it has no cache"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=model.new_cache(1, 4))


# ----------------------------------------------------------------------------------------------------------------------
# The layers against their definitions


def plain_soft_moe(layer, x):
    """SoftMoE for dispatch causal and token, x [B, T, D], from the formulas: every z is built, every expert is run.

    Written without the layer's own methods, and fast enough for long texts; causal_moe_definition() is for short ones.
    """
    T, E, P, W = x.shape[1], layer.n_expert, layer.phi.shape[1] // layer.n_expert, layer.window
    logits = x @ layer.phi  # [B, T, S]
    if layer.router == "cosine":
        logits = layer.scale * logits / x.norm(dim=-1, keepdim=True) / layer.phi.norm(dim=0)
    combine = logits.softmax(-1)
    back = torch.arange(T)[:, None] - torch.arange(T)
    y = torch.zeros_like(x)
    for j in range(E * P):
        bias = layer.recency[j] if W > 1 else x.new_zeros(1)
        scores = logits[:, None, :, j] + bias[back.clamp(0, W - 1)]  # [B, T, T]: of a column's token, read in the row
        z = scores.masked_fill((back < 0) | (back >= W), -torch.inf).softmax(-1) @ x
        gate, up = layer.w_in[j // P]
        hidden = F.silu(z @ gate.T) * (z @ up.T)
        if layer.w_out.ndim == 3:
            out = hidden @ layer.w_out[j // P]
        else:
            out = F.silu(hidden @ layer.w_out[0, j // P]) * (hidden @ layer.w_out[1, j // P])
        y = y + E * combine[:, :, j, None] * out
    return y


def assert_equal_with_gradients(got, expected, inputs):
    """Two results of the same inputs, and their gradients, to 1e-12 of the largest number in each tensor."""
    weight = torch.randn_like(got)
    pairs = [(got, expected), *zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (got, expected)))]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1, b.abs().max().item()))


@pytest.mark.quick
@pytest.mark.parametrize("changes", [kind for kind in CAUSAL_KINDS if "ffn" not in kind], ids=str)
def test_the_fused_layer_is_its_definition_with_all_gradients(changes):
    layer = randomized(SoftMoE(replace(SMALL, **changes)).double())
    x = torch.randn(2, 11, 24, dtype=torch.float64, requires_grad=True)
    defined = torch.stack([causal_moe_definition(layer, row) for row in x])
    for expected in (defined, plain_soft_moe(layer, x)):
        assert_equal_with_gradients(layer(x, place_of(x, layer.window)), expected, [x, *layer.parameters()])


@pytest.mark.parametrize("seed", range(12))
def test_the_fused_layer_is_its_definition_at_any_size_and_with_extreme_routers(seed):
    draw = random.Random(seed)
    B, T, W = (draw.randint(1, 3), draw.randint(1, 300), draw.randint(1, 16)) if seed else (2, 300, 16)
    sizes = {"n_expert": draw.randint(1, 4), "slots_per_expert": draw.randint(1, 3), "d_expert": draw.randint(1, 9)}
    config = replace(SMALL, window=W, d_model=8, expert=draw.choice(["swiglu", "swiglu2"]), **sizes)
    layer = randomized(SoftMoE(config).double())
    with torch.no_grad():
        layer.scale.fill_(30 * draw.choice([1, -1]))  # logits reach +-30
        if W > 1:
            layer.recency.uniform_(-50, 50)
    x = torch.randn(B, T, 8, dtype=torch.float64, requires_grad=True)
    assert_equal_with_gradients(layer(x, place_of(x, W)), plain_soft_moe(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("precision", ["float32", "autocast to bfloat16", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [dict(), dict(slots_per_expert=2), dict(expert="swiglu2"), dict(dispatch="token"), dict(dispatch="sequence")],
    ids=str,
)
def test_huge_logits_give_no_nan(changes, precision):
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    config = replace(SMALL, **changes)
    layer = randomized((SequenceSoftMoE if config.reads_ahead else SoftMoE)(config)).to(dtype)
    for scale in (1e2, 1e4, -1e4):
        with torch.no_grad():
            layer.scale.fill_(scale)
        layer.zero_grad()
        x = torch.randn(2, 20, 24, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.startswith("autocast")):
            y = layer(x, place_of(x, layer.window))
        y.float().square().mean().backward()
        assert all(torch.isfinite(a).all() for a in (y, x.grad, *(p.grad for p in layer.parameters())))


def released_steel_layer(x, tensors):
    """Steel-LLM's Soft MoE on one text, x [T, D], from its formulas and its tensors' names."""
    phi, scale = tensors["phi"], tensors["scale"]
    D, E, P = phi.shape
    x = x / x.norm(dim=-1, keepdim=True)
    logits = torch.einsum("td,dep->tep", x, scale * phi / phi.norm(dim=0, keepdim=True))
    dispatch = logits.exp() / logits.exp().sum(0, keepdim=True)
    combine = logits.exp() / logits.exp().sum((1, 2), keepdim=True)
    y = torch.zeros_like(x)
    for e in range(E):
        w = {name.split(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"experts.{e}.")}
        for p in range(P):
            slot = sum(dispatch[t, e, p] * x[t] for t in range(len(x)))
            hidden = F.silu(w["gate_up_proj" if "gate_down_proj" in w else "gate_proj"] @ slot) * (w["up_proj"] @ slot)
            out = w["down_proj"] @ hidden
            if "gate_down_proj" in w:  # "senet", not "raw"
                out = F.silu(w["gate_down_proj"] @ hidden) * out
            y = y + combine[:, e, p, None] * out
    return y


@pytest.mark.quick
@pytest.mark.parametrize("expert", ["swiglu", "swiglu2"])
@pytest.mark.parametrize("slots", [1, 3])
@torch.no_grad()
def test_sequence_dispatch_is_the_released_layer(slots, expert):
    model = small(dispatch="sequence", expert=expert, slots_per_expert=slots)
    prefix = "model.layers.1.mlp."
    of_steel = hugging_face_tensors(model, STEEL)
    tensors = {name.removeprefix(prefix): p for name, p in of_steel if name.startswith(prefix)}
    x = torch.randn(3, 17, 24, dtype=torch.float64)
    expected = torch.stack([released_steel_layer(row, tensors) for row in x])
    torch.testing.assert_close(model.blocks[1].ffn(x, None), expected, rtol=0, atol=1e-12)


@pytest.mark.quick
@torch.no_grad()
def test_a_window_of_one_is_token_dispatch():
    token, causal = (small(dispatch=d, window=w) for d, w in (("token", 4), ("causal", 1)))
    causal.load_state_dict(token.state_dict())
    ids = torch.randint(50, (2, 20))
    assert torch.equal(causal(ids), token(ids))


@pytest.mark.quick
@pytest.mark.parametrize("expert", ["swiglu", "swiglu2"])
@torch.no_grad()
def test_a_window_over_the_whole_text_is_the_published_layer_at_its_end(expert):
    T = 10
    causal = randomized(SoftMoE(replace(SMALL, window=T + 3, expert=expert, slots_per_expert=2)).double())
    published = SequenceSoftMoE(replace(SMALL, dispatch="sequence", expert=expert, slots_per_expert=2)).double()
    causal.recency.zero_()
    published.load_state_dict({k: v for k, v in causal.state_dict().items() if k != "recency"})
    x = F.normalize(torch.randn(2, T, 24, dtype=torch.float64), dim=-1)  # the published experts read unit-length inputs
    got, expected = causal(x, place_of(x, T + 3))[:, -1], causal.n_expert * published(x, None)[:, -1]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.quick
@torch.no_grad()
def test_uniform_combine_on_single_tokens_is_the_dense_layer():
    config = replace(SMALL, dispatch="token")
    layer, dense = randomized(SoftMoE(config).double()), Dense(config).double()
    layer.scale.zero_()
    dense.w_in.copy_(layer.w_in.transpose(0, 1).flatten(1, 2))
    dense.w_out.copy_(layer.w_out.flatten(0, 1))
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x, place_of(x)), dense(x, None), rtol=0, atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("changes", [dict(), dict(qk_norm=True, head_dim=10), dict(value_embedding=True)], ids=str)
@torch.no_grad()
def test_attention_equals_loops_over_positions_and_heads(changes):
    """Two texts, the first of which has a second document from token 2 on."""
    config = replace(SMALL, n_layer=1, reset_id=0, **changes)
    layer = randomized(Attention(config).double())
    ids, starts = torch.tensor([[5, 5, 0, 5, 5, 5], [5, 5, 5, 5, 5, 5]]), [[0, 0, 2, 2, 2, 2], [0] * 6]
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    K, place = config.head_dim or 6, place_tokens(ids, config, None, x.dtype)
    values = torch.randn(2, 6, 2 * K, dtype=torch.float64) if config.value_embedding else None
    got = layer(x, place._replace(values=values))
    frequencies = torch.tensor([config.rope_base ** (-2 * i / K) for i in range(K // 2)], dtype=torch.float64)

    def rotated(vector, position):  # half-split rotation as complex multiplication
        z = torch.complex(vector[: K // 2], vector[K // 2 :]) * torch.exp(1j * position * frequencies)
        return torch.cat([z.real, z.imag])

    for row, start in enumerate(starts):
        heads = torch.einsum("td,rkd->trk", x[row], layer.qkv)
        if config.qk_norm:
            for part, norm in ((slice(0, 4), layer.q_norm), (slice(4, 6), layer.k_norm)):
                of_norm = (heads[:, part].square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
                heads[:, part] *= norm.weight / of_norm
        else:
            heads += layer.qkv_bias
        if config.value_embedding:
            heads[:, 6:] += layer.value_scale * values[row].view(6, 2, K)
        for t in range(6):
            out = []
            for h in range(4):
                past = range(start[t], t + 1)
                q = rotated(heads[t, h], t - start[t])
                scores = [q @ rotated(heads[s, 4 + h // 2], s - start[t]) / math.sqrt(K) for s in past]
                out.append(sum(p * heads[s, 6 + h // 2] for s, p in zip(past, torch.stack(scores).softmax(0))))
            torch.testing.assert_close(got[row, t], layer.out @ torch.cat(out), rtol=0, atol=1e-5)  # angles are fp32


# ----------------------------------------------------------------------------------------------------------------------
# Loss


@pytest.mark.quick
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_loss_is_the_plain_loss_with_its_gradients(chunk):
    hidden = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, 40, (3, 9))
    ours = cross_entropy(hidden, weight, targets, chunk=chunk)
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (ours, plain))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.quick
def test_the_loss_holds_the_numbers_of_one_chunk_at_a_time():
    """Beside gradients of hidden [N, D] and weight [V, D], and a chunk's share of the latter: one chunk of [n, V]."""
    N, V, D, chunk = 400, 5000, 8, 100
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = torch.randint(V, (N,))
    peak = peak_memory(lambda: cross_entropy(hidden, weight, targets, chunk=chunk).backward())
    assert peak < 1.1 * 4 * (chunk * V + 2 * V * D + N * D)
    with torch.autocast("cpu", torch.bfloat16):  # a chunk in fp32, and its gradient in bf16
        peak = peak_memory(lambda: cross_entropy(hidden, weight, targets, chunk=chunk))
    assert peak < 1.1 * (6 * chunk * V + (2 + 4 + 4) * V * D + 4 * N * D)


@pytest.mark.quick
def test_the_loss_of_a_model_is_that_of_its_logits():
    model, ids = small(), torch.randint(50, (2, 21))
    logits = model(ids[:, :-1])
    plain = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), plain, rtol=0, atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("tied", [False, True])
def test_the_sum_is_the_mean_times_the_counted_targets_with_its_gradients(tied):
    model, ids = small(tie_embeddings=tied), torch.randint(50, (3, 21))
    targets = ids[:, 1:].masked_fill(torch.rand(3, 20) < 0.4, -1)
    mean = model(ids[:, :-1], targets) * (targets >= 0).sum()
    total = model(ids[:, :-1], targets, reduction="sum")
    torch.testing.assert_close(total, mean, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (total, mean))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1, b.abs().max().item()))


@pytest.mark.quick
def test_without_targets_loss_and_gradients_are_zero():
    model, ids = small(), torch.randint(50, (2, 9))
    for reduction in ("mean", "sum"):
        loss = model(ids, torch.full_like(ids, -1), reduction=reduction)
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.quick
def test_softmax_gradient_is_that_of_autograd():
    logits = (10 * torch.randn(9, 40, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(-1, 40, (9,))
    plain = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    (expected,) = torch.autograd.grad(plain, logits)
    ones = torch.ones(9, 1)
    nats, gradient = softmax_gradient(logits.detach().clone(), targets, torch.float64, ones)
    torch.testing.assert_close(nats.sum(), plain.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    factors = torch.randn(9, 1, dtype=torch.float64)
    each, weighted = softmax_gradient(logits.detach().clone(), targets, torch.float64, factors)
    torch.testing.assert_close(weighted, factors * expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(each, F.cross_entropy(logits, targets, ignore_index=-1, reduction="none").detach())
    without, none = softmax_gradient(logits.detach().clone(), targets, torch.float64, None)
    assert torch.equal(without, each) and none is None


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["attention as it comes", "attention in fp32"])
@pytest.mark.parametrize("changes", [*CAUSAL_KINDS, dict(dispatch="sequence")], ids=str)
def test_autocast_to_bfloat16_stays_near_fp32(changes, dtype):
    """What training on CUDA and on CPUs with AMX runs under: loss and every gradient."""
    torch.manual_seed(1)
    model, ids = small(torch.float32, **changes), torch.randint(50, (4, 33))
    randomized(model, std=0.1)
    for block in model.blocks:
        block.attention.dtype = dtype
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        assert loss.dtype == torch.float32
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (loss_16, gradients_16) = results
    assert loss_16 == pytest.approx(loss, rel=5e-3)
    for name, gradient in gradients.items():
        error = (gradients_16[name] - gradient).norm() / gradient.norm()
        assert error < 0.25, (name, error)


@pytest.mark.quick
@torch.no_grad()
@pytest.mark.parametrize("changes", CAUSAL_KINDS, ids=str)
def test_a_cache_of_fp32_serves_a_model_under_autocast(changes):
    torch.manual_seed(1)
    model, ids = small(torch.float32, **changes), torch.randint(50, (4, 24))
    randomized(model, std=0.1)
    cache = model.new_cache(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        stepped = torch.cat([model(part, cache=cache) for part in ids.split([9, 1, 1, 13], dim=1)], dim=1)
    expected = model(ids)
    assert (stepped.float() - expected).norm() < 0.01 * expected.norm()  # 0.06 or more without the earlier tokens


# ----------------------------------------------------------------------------------------------------------------------
# Sizes and configuration


@pytest.mark.quick
def test_sizes_of_the_presets():
    with torch.device("meta"):
        steel = Decoder(replace(PRESETS["steel-1b"], dispatch="sequence"))
        assert steel.n_params() == 1_122_922_770
        tensors = list(hugging_face_tensors(steel, STEEL))
        D, V, h = 1792, 151_936, 448
        released = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
        layer = {f"{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        layer |= {"mlp.phi": (D, 6, 1), "mlp.scale": (1,)}
        layer |= {f"self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
        layer |= {f"self_attn.{name}_proj.bias": (D,) for name in "qkv"}
        for e in range(6):
            layer |= {f"mlp.experts.{e}.{name}_proj.weight": (h, D) for name in ("gate_up", "up")}
            layer |= {f"mlp.experts.{e}.{name}_proj.weight": (D, h) for name in ("gate_down", "down")}
        released |= {f"model.layers.{i}.{name}": shape for i in range(18) for name, shape in layer.items()}
        assert len(tensors) == len(released) == 633
        assert {name: tuple(p.shape) for name, p in tensors} == released
        assert Decoder(PRESETS["steel-1b"]).n_params() == 1_122_922_770 + 18 * 6 * 4  # b: slots x window, a layer
        assert 90e6 < Decoder(PRESETS["small"]).n_params() < 110e6
        soft, dense = (
            Decoder(replace(PRESETS["steel-1b"], ffn=ffn, dispatch="token")) for ffn in ("soft_moe", "dense")
        )
        router = 18 * (1792 * 6 + 1)
        assert soft.n_params() - router == dense.n_params()


def test_the_untrained_model_predicts_nearly_uniformly_and_every_parameter_learns():
    for changes in (
        dict(),
        dict(expert="swiglu2"),
        dict(router="linear"),
        dict(dispatch="sequence"),
        dict(ffn="dense"),
    ):
        model = Decoder(replace(SMALL, **changes))
        ids = torch.randint(50, (2, 33))
        assert abs(model(ids[:, :-1], ids[:, 1:]).item() - math.log(50)) < 0.05
        for _ in range(3):
            model.zero_grad()
            model(ids[:, :-1], ids[:, 1:]).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


@pytest.mark.quick
def test_a_new_parameter_needs_an_initialisation():
    class Longer(Decoder):
        def init_weights(self):
            self.extra = torch.nn.Linear(4, 4)
            super().init_weights()

    with pytest.raises(KeyError, match="weight"):
        Longer(Config(n_layer=1, vocab_size=50))


@pytest.mark.quick
def test_a_wrong_configuration_names_every_problem():
    for fields, message in (
        (dict(n_layer=0, dispatch="psychic"), "dispatch = 'psychic', expected one of causal, token, sequence"),
        (dict(n_layer=0, dispatch="psychic"), "n_layer = 0, expected a positive number"),
        (dict(rope_base=math.inf), "rope_base = inf, expected a positive number"),
        (dict(d_model=100), "head_dim, or d_model / n_head, is 25, expected an even number"),
        (dict(n_kv_head=3), "n_head = 4 is not a multiple of n_kv_head = 3"),
        (dict(dispatch="sequence", reset_id=1), "leave --reset-at-eos out"),
    ):
        with pytest.raises(ValueError, match="model configuration: ") as refused:
            Config(**fields)
        assert message in str(refused.value)


ALONE = """
import sys
sys.path.insert(0, "")
import torch, model
decoder = model.Decoder(model.Config(n_layer=1, vocab_size=50))
ids = torch.randint(50, (2, 9))
decoder(ids[:, :-1], ids[:, 1:]).backward()
cache = decoder.new_cache(2, 9)
assert torch.allclose(decoder(ids, cache=cache), decoder(ids), atol=1e-5)
"""


def test_a_copy_of_the_file_works_by_itself(tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    python("-I", "-c", ALONE, cwd=tmp_path)
