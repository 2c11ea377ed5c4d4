"""The decoder: Qwen-style attention and a causal Soft Mixture of Experts. Needs torch alone: a copy of this file works.

    model = Decoder(Config())                    # or Config(n_layer=..., ...); plan.py has those of larger models
    logits = model(ids)                          # [B, T] -> [B, T, V]
    loss = model(ids, targets)                   # mean nats per counted target; reduction="sum": their sum
    cache = model.new_cache(batch, max_len)      # then model(ids, cache=cache) any number of times

Shapes: B batch, T time, D width (d_model), H heads, G key/value heads, K head dim, V vocabulary,
        E experts, P slots per expert, S = E * P slots, W window, h hidden width of an expert.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint as recompute

CHOICES = {"ffn": ("soft_moe", "dense"), "dispatch": ("causal", "token", "sequence")}
CHOICES |= {"expert": ("swiglu", "swiglu2"), "router": ("cosine", "linear")}


@dataclass(frozen=True)
class Config:
    n_layer: int = 3
    d_model: int = 128
    n_head: int = 4
    n_kv_head: int = 4
    head_dim: int = 0  # width of a head; 0: d_model / n_head
    value_embedding: bool = False  # attention adds a second embedding of each token, times a learned factor, to its v
    qk_norm: bool = False  # RMSNorm of each head's q and k, and no bias, as in Qwen3; else biases, as in Qwen2
    vocab_size: int = 8192
    block_size: int = 128  # tokens of a sample in training, and the longest context
    ffn: str = "soft_moe"  # or dense: one SwiGLU with as many parameters as all experts together
    dispatch: str = "causal"  # what a slot reads: causal: the last `window` tokens; token: one; sequence: all (leaks)
    window: int = 4
    n_expert: int = 6
    slots_per_expert: int = 1
    expert: str = "swiglu"  # or swiglu2: the second matrix is gated as well, as in Steel-LLM
    router: str = "cosine"  # logits of token and slot: scaled cosine, or linear: the plain product, as in Qwen2-MoE
    d_expert: int = 0  # hidden width of an expert; 0: so that the layer has about 8 d_model^2 weights
    tie_embeddings: bool = False
    reset_id: int = -1  # no position reads back over this id, which begins a document; -1: documents see each other
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        problems = []
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            least = {"d_expert": 0, "head_dim": 0, "reset_id": -1}.get(name, 1)
            if name in CHOICES and value not in CHOICES[name]:
                problems.append(f"{name} = {value!r}, expected one of {', '.join(CHOICES[name])}")
            if field.type is int and value < least or field.type is float and not 0 < value < math.inf:
                problems.append(f"{name} = {value}, expected a positive number")
        if not problems and (width := self.head_dim or self.d_model / self.n_head) % 2:
            problems.append(f"head_dim, or d_model / n_head, is {width:g}, expected an even number")
        if not problems and self.n_head % self.n_kv_head:
            problems.append(f"n_head = {self.n_head} is not a multiple of n_kv_head = {self.n_kv_head}")
        if not problems and self.reset_id >= 0 and self.reads_ahead:
            problems.append("dispatch = sequence reads over every end of document: leave --reset-at-eos out")
        if problems:
            raise ValueError("model configuration: " + "; ".join(problems))

    @property
    def reads_ahead(self):  # whether a position reads later tokens: the published Soft MoE does
        return self.ffn == "soft_moe" and self.dispatch == "sequence"

    @property
    def look_back(self):  # how many earlier tokens a slot of the Soft MoE reads
        return self.window - 1 if self.ffn == "soft_moe" and self.dispatch == "causal" else 0

    @property
    def head_width(self):
        return self.head_dim or self.d_model // self.n_head

    @property
    def expert_width(self):
        return self.d_expert or 8 * math.ceil(self.d_model / (3 if self.expert == "swiglu" else 4) / self.n_expert)

    @property
    def d_dense(self):  # width of the dense SwiGLU with the parameters of all experts
        return (3 if self.expert == "swiglu" else 4) * self.n_expert * self.expert_width // 3


class Place(NamedTuple):
    """Where the tokens of one forward pass stand. Positions count from the first token that may be read."""

    angles: torch.Tensor  # [B or 1, T, 2, 1, K]: cos and sin of the rotary angles
    mask: torch.Tensor | BlockMask | None  # where attention may look, [B or 1, 1, T, length + T]; None: all before
    absent: torch.Tensor | None  # [W, B or 1, T, 1]: true for places of a window before that token; None: no window
    values: torch.Tensor | None = None  # [B, T, G K]: the tokens' value embeddings, for every layer


def place_tokens(ids, config, cache, dtype, by_blocks=False):
    """ids [B, T] -> Place. Nothing looks back over a reset_id, nor into left padding (-1) in a cache's first ids."""
    B, T = ids.shape
    length, start, bounded = (cache.length, cache.start, cache.bounded) if cache else (0, 0, config.reset_id >= 0)
    index = torch.arange(length, length + T, device=ids.device)[None]
    if cache is not None and length == 0 and (ids < 0).any():
        start, bounded = (ids < 0).sum(1, keepdim=True), True
    if config.reset_id >= 0:
        start = torch.where(ids == config.reset_id, index, start).cummax(1).values  # [B, T]
    positions = (index - start).clamp(min=0)  # padding reads itself: a softmax over nothing would be NaN
    mask = absent = None
    if by_blocks and bounded:  # for flex_attention, which skips squares of 128 x 128 where nothing may be seen
        mask = create_block_mask(lambda b, _, q, k: (k <= q) & (k >= q - positions[b, q]), B, None, T, T, ids.device)
    elif bounded or length and T > 1:
        seen = torch.arange(length + T, device=ids.device)
        mask = ((seen <= index[..., None]) & (seen >= (index - positions)[..., None]))[:, None]
    if config.look_back:
        absent = (positions < torch.arange(config.look_back, -1, -1, device=ids.device)[:, None, None])[..., None]
    if cache is not None:  # amax, not [:, -1:]: torch.compile would make code of its own for a strided view
        cache.start, cache.bounded = start.amax(1, keepdim=True), bounded
    return Place(cache.angles[positions] if cache else rotary_angles(positions, config, dtype), mask, absent)


def rotary_angles(positions, config, dtype):
    """cos and sin, [..., T, 2, 1, K], of rotary positions (arXiv 2104.09864), half-split; angles in fp32."""
    places = torch.arange(0, config.head_width, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rope_base ** (-places / config.head_width)
    angles = positions[..., None].float() * frequencies.repeat(2)
    return torch.stack([angles.cos(), angles.sin()], dim=-2)[..., None, :].to(dtype)


class Cache:
    """What decoding keeps of each layer: keys and values, and for a window what it still reaches of the last tokens."""

    def __init__(self, config, batch, max_len, device, dtype):
        like, layers = {"device": device, "dtype": dtype}, range(config.n_layer)
        self.max_len, self.length = max_len, 0  # tokens read so far, the same in every row of the batch
        # Where the document that is being read starts, and whether that can be other than 0.
        self.start, self.bounded = torch.zeros(batch, 1, dtype=torch.long, device=device), config.reset_id >= 0
        self.angles = rotary_angles(torch.arange(max_len, device=device), config, dtype)
        size = batch, config.n_kv_head, max_len, config.head_width
        self.k, self.v = ([torch.zeros(size, **like) for _ in layers] for _ in "kv")
        # Router logits and first-matrix outputs of the last W - 1 tokens: more numbers than x, but nothing to redo.
        widths = config.n_expert * config.slots_per_expert, config.n_expert * 2 * config.expert_width
        self.recent = [[torch.zeros(batch, config.look_back, width, **like) for width in widths] for _ in layers]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, as in Qwen2, or with qk_norm as in Qwen3."""

    dtype = None  # of q, k and v where it is not that of the matrices: train.py sets fp32 for bf16 on a CPU

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, K = config.n_head, config.n_kv_head, config.head_width
        self.qkv = nn.Parameter(torch.empty(self.n_head + 2 * self.n_kv_head, K, config.d_model))
        self.qkv_bias = None if config.qk_norm else nn.Parameter(torch.empty(self.qkv.shape[:2]))
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(K, eps=config.norm_eps) for _ in "qk")
        self.value_scale = nn.Parameter(torch.empty(1)) if config.value_embedding else None
        self.out = nn.Parameter(torch.empty(config.d_model, self.n_head * K))

    def forward(self, x, place, cache=None, layer=0):
        B, T, _ = x.shape
        qkv = self.project(x).unflatten(-1, self.qkv.shape[:2])
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        if place.values is not None:
            v = v + (self.value_scale * place.values).to(v.dtype).view_as(v)
        if self.qkv_bias is None:
            qk = torch.cat([self.q_norm(qk[:, :, : self.n_head]), self.k_norm(qk[:, :, self.n_head :])], dim=2)
        (cos, sin), (first, second) = place.angles.unbind(2), qk.chunk(2, dim=-1)
        qk = (qk * cos + torch.cat([-second, first], dim=-1) * sin).to(v.dtype)  # turn each pair (x_i, x_{i + K/2})
        qkv = (a.to(self.dtype or a.dtype) for a in (*qk.split([self.n_head, self.n_kv_head], dim=2), v))
        q, k, v = (a.transpose(1, 2) for a in qkv)  # [B, H or G, T, K]
        if cache is not None:
            for stored, new in ((cache.k[layer], k), (cache.v[layer], v)):
                stored.narrow(2, cache.length, T).copy_(new)
            k, v = (stored.narrow(2, 0, cache.length + T).to(q.dtype) for stored in (cache.k[layer], cache.v[layer]))
        is_causal, enable_gqa = place.mask is None and T > 1, self.n_head != self.n_kv_head
        if isinstance(place.mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=place.mask, enable_gqa=enable_gqa)
        else:
            with torch.autocast(x.device.type, enabled=False):  # it would cast them again
                y = F.scaled_dot_product_attention(q, k, v, place.mask, is_causal=is_causal, enable_gqa=enable_gqa)
        return F.linear(y.transpose(1, 2).reshape(B, T, -1), self.out)

    def project(self, x):  # [B, T, D] -> [B, T, (H + 2 G) K]
        return F.linear(x, self.qkv.flatten(0, 1), None if self.qkv_bias is None else self.qkv_bias.flatten())


class Dense(nn.Module):
    """SwiGLU (arXiv 2002.05202, section 2)."""

    def __init__(self, config):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(2, config.d_dense, config.d_model))  # gate, up
        self.w_out = nn.Parameter(torch.empty(config.d_dense, config.d_model))

    def forward(self, x, place, cache=None, layer=0):
        gate, up = F.linear(x, self.w_in.flatten(0, 1)).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.w_out


class SoftMoE(nn.Module):
    """Soft Mixture of Experts (arXiv 2308.00951, section 2) whose slots read only the past.

    l[t, j] = scale * <x_t / |x_t|, phi_j / |phi_j|>                 router logits of token t and slot j
    w[t, j, k] = softmax over k < W of (l[t - k, j] + b[j, k])       dispatch: how slot j weighs the last W tokens
    z[t, j] = sum over k of w[t, j, k] x[t - k]                      what slot j reads at position t
    y_t     = E sum over j of softmax_j(l[t])_j f_e(j)(z[t, j])      combine: the experts' outputs, weighed

    Experts are swiglu: f(z) = C (silu(A z) * (B z)), or swiglu2: u = silu(A z) * (B z), f = silu(C u) * (D u).
    dispatch = "token" is W = 1. router = "linear" is l[t, j] = <x_t, phi_j>. causal_moe_definition() is these formulas
    as they stand; forward() is the fused form: A and B are linear, so they are applied to x once, before the window.
    """

    def __init__(self, config):
        super().__init__()
        E, P, h, D = config.n_expert, config.slots_per_expert, config.expert_width, config.d_model
        self.router, self.n_expert, self.window = config.router, E, config.look_back + 1
        self.phi = nn.Parameter(torch.empty(D, E * P))
        if config.router == "cosine":
            self.scale = nn.Parameter(torch.empty(1))
        self.recency = nn.Parameter(torch.empty(E * P, config.window)) if self.window > 1 else None  # b
        self.w_in = nn.Parameter(torch.empty(E, 2, h, D))  # A, B
        self.w_out = nn.Parameter(torch.empty(E, h, D) if config.expert == "swiglu" else torch.empty(2, E, h, D))

    def forward(self, x, place, cache=None, layer=0):
        (B, T, D), look_back, absent = x.shape, self.window - 1, place.absent  # x is RMS-normed
        if cache is None:  # lay all texts end to end in one row (else the compiled layer copies slices for backward)
            x = x.reshape(1, B * T, D)
            absent = absent.expand(-1, B, T, 1).reshape(-1, 1, B * T, 1) if look_back else None
        logits, u = self.router_logits(x), F.linear(x, self.w_in.flatten(0, 2))
        if look_back and cache is None:  # the first windows need something to read with weight 0
            logits, u = (F.pad(a, (0, 0, look_back, 0)) for a in (logits, u))
        elif look_back:
            logits, u = (torch.cat(pair, dim=1) for pair in zip(cache.recent[layer], (logits, u)))
            cache.recent[layer] = [a[:, T:].clone() for a in (logits, u)]
        u = u.unflatten(-1, (self.n_expert, 1, 2, -1))  # [B, W - 1 + T, E, 1, 2, h], or B T in one row
        combine = (logits[:, look_back:].softmax(-1) * self.n_expert).to(u.dtype)
        combine = combine.unflatten(-1, (self.n_expert, -1, 1))  # [B, T, E, P, 1]
        weights = self.window_weights(logits, absent, u.dtype) if look_back else None  # [W, B, T, E, P]
        if self.w_out.ndim == 3 and torch.is_grad_enabled():  # keep only u for backward: the rest is cheap to redo
            y = recompute(self.mix_and_combine, u, weights, combine, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self.mix_and_combine(u, weights, combine)
        return y.view(B, T, D)

    def router_logits(self, x):
        """[B, T, D] -> [B, T, S], in fp32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            phi = self.phi.to(x.dtype)
            if self.router == "linear":
                return x @ phi
            lengths = x.norm(dim=-1, keepdim=True) * phi.norm(dim=0)
            return x @ phi * self.scale.to(x.dtype) / lengths.clamp(min=1e-12)

    def window_weights(self, logits, absent, dtype):
        """w, the oldest token of a window first: logits [B, W - 1 + T, S], absent [W, B, T, 1] -> [W, B, T, E, P]."""
        # stack, not unfold: the compiled backward of unfold adds with atomics, in any order.
        scores = torch.stack([logits[:, k : k + absent.shape[2]] for k in range(self.window)])
        scores = (scores + self.recency.T.flip(0)[:, None, None]).masked_fill(absent, -torch.inf)
        return scores.softmax(0).to(dtype).unflatten(3, (self.n_expert, -1))

    def mix_and_combine(self, u, weights, combine):
        """A x and B x of all tokens, mixed over the window, through the rest of the experts, combined -> [B, T, D]."""
        if weights is None:  # all slots of an expert read the same: P is 1 here
            gate, up = u.unbind(-2)
        elif torch.is_grad_enabled():
            gate, up = WindowMix.apply(u, weights)
        else:
            gate, up = window_mix(u, weights[..., None, None]).unbind(-2)
        hidden = F.silu(gate) * up  # [B, T, E, P, h]
        if self.w_out.ndim == 3:  # C is linear, so the sum over slots goes before it
            return (hidden * combine).sum(3).flatten(2) @ self.w_out.flatten(0, 1)
        gate, down = (torch.einsum("btesh,ehd->btesd", hidden, w) for w in self.w_out)
        return (F.silu(gate) * down * combine).sum((2, 3))

    def apply_expert(self, e, z):  # z [..., D] -> f_e(z) [..., D]
        gate, up = (z @ w.T for w in self.w_in[e])
        hidden = F.silu(gate) * up
        if self.w_out.ndim == 3:
            return hidden @ self.w_out[e]
        gate, down = (hidden @ w for w in self.w_out[:, e])
        return F.silu(gate) * down


def causal_moe_definition(ffn, x):
    """What a SoftMoE computes, in loops: x [T, D], one text -> [T, D]. Tests hold the fused form to it."""
    E, S, y = ffn.n_expert, ffn.phi.shape[1], []
    logits = ffn.router_logits(x[None])[0]  # [T, S]
    recency = ffn.recency.T if ffn.window > 1 else x.new_zeros(1, S)  # [W, S]
    for t in range(len(x)):
        past = range(t, max(-1, t - ffn.window), -1)  # this token, the one before it, ...
        w = torch.stack([logits[s] + recency[t - s] for s in past]).softmax(0)  # [min(W, t + 1), S]
        z = w.T @ torch.stack([x[s] for s in past])  # [S, D]
        y.append(E * sum(share * ffn.apply_expert(j * E // S, z[j]) for j, share in enumerate(logits[t].softmax(0))))
    return torch.stack(y)


class WindowMix(torch.autograd.Function):
    """window_mix() of gate and up. Autograd would pad each shifted gradient, and the compiler then mask each load."""

    @staticmethod
    def forward(ctx, u, weights):
        """u [B, W - 1 + T, E, 1, 2, h], weights [W, B, T, E, P], the oldest token first -> gate, up [B, T, E, P, h]."""
        ctx.save_for_backward(u, weights)
        # One after the other: mixed together, the compiler would keep both for backward.
        return tuple(window_mix(part, weights[..., None]) for part in u.unbind(-2))

    @staticmethod
    def backward(ctx, *d):
        (u, weights), d = ctx.saved_tensors, torch.stack(d, dim=-2)
        W, _, T, *_ = weights.shape
        d_weights = torch.stack([(d * u[:, k : k + T]).sum((-2, -1)) for k in range(W)])
        # Token t was the last of window t, the one before last of window t + 1, and so on: again a mix over a window.
        d = F.pad(d, (0, 0) * 4 + (W - 1, W - 1))
        weights = F.pad(weights, (0, 0) * 2 + (W - 1, W - 1))[..., None, None]
        shifted = [weights[k, :, W - 1 - k : T + 2 * (W - 1) - k] for k in reversed(range(W))]
        return window_mix(d, torch.stack(shifted)).sum(3, keepdim=True), d_weights


def window_mix(u, weights):
    """Sum over the window of weight * u: u [B, W - 1 + T, ...], weights [W, B, T, ...] -> [B, T, ...]."""
    T, (first, *others) = weights.shape[2], weights.unbind(0)
    mixed = first * u[:, :T]
    for k, weight in enumerate(others, 1):
        mixed = torch.addcmul(mixed, weight, u[:, k : k + T])
    return mixed


class SequenceSoftMoE(SoftMoE):
    """The layer as published, and as Steel-LLM (arXiv 2502.06635) released it: w is a softmax over all tokens, later
    ones included, so that in a decoder it leaks. The experts get x / |x|, and there is no factor E."""

    def forward(self, x, place, cache=None, layer=0):
        logits = self.router_logits(x)  # [B, T, S]
        slots = logits.softmax(1).to(x.dtype).transpose(1, 2) @ F.normalize(x, dim=-1)  # [B, S, D]
        y = torch.cat([self.apply_expert(e, z) for e, z in enumerate(slots.chunk(self.n_expert, 1))], 1)  # [B, S, D]
        return logits.softmax(2).to(x.dtype) @ y


class ChunkedCrossEntropy(torch.autograd.Function):
    """Logits [N, V] never exist, only a chunk's. Gradients of a sum are made in forward, of each nat in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, softmax_gradient, each, with_gradients):
        """hidden [N, D], weight [V, D], targets [N] (-1: not counted) -> their nats [N], or the sum; fp32 at least."""
        ctx.again = (chunk, softmax_gradient) if each else None
        factors = torch.ones_like(targets, dtype=torch.float32)[:, None] if with_gradients and not each else None
        nats, *gradients = by_chunks(hidden, weight, targets, chunk, softmax_gradient, factors)
        if with_gradients:
            ctx.save_for_backward(*((hidden, weight, targets) if each else gradients))
        return nats if each else nats.sum()

    @staticmethod
    def backward(ctx, d_nats):
        if ctx.again:
            return *by_chunks(*ctx.saved_tensors, *ctx.again, d_nats[:, None])[1:], *[None] * 5
        return *(d * d_nats.to(d.dtype) for d in ctx.saved_tensors), *[None] * 5


def by_chunks(hidden, weight, targets, chunk, softmax_gradient, factors):
    """-> nats [N] and, of their sum weighted by factors [N, 1], the gradients by hidden and weight (None without)."""
    cast_weight = weight.to(hidden.dtype)
    d_hidden, d_weight = (None, None) if factors is None else (torch.empty_like(hidden), torch.zeros_like(weight))
    nats = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for part in (slice(start, start + chunk) for start in range(0, len(hidden), chunk)):
        weights = None if factors is None else factors[part]
        nats[part], d_logits = softmax_gradient(hidden[part] @ cast_weight.T, targets[part], nats.dtype, weights)
        if factors is not None:
            torch.mm(d_logits, cast_weight, out=d_hidden[part])
            d_weight += (d_logits.T @ hidden[part]).to(weight.dtype)
        del d_logits  # before the next chunk's logits are made
    return nats, d_hidden, d_weight


def softmax_gradient(logits, targets, dtype, factors):
    """logits [n, V], targets [n], factors [n, 1] or None -> nats [n], factors * (softmax - one-hot) [n, V] or None."""
    counted, index = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    out_dtype, logits = logits.dtype, logits.to(dtype)
    logits -= logits.amax(-1, keepdim=True)
    picked = logits.gather(1, index)
    p = logits.exp_()  # in place: a tensor of this size is made once
    norm = p.sum(-1, keepdim=True)
    nats = ((norm.log() - picked) * counted)[:, 0]
    if factors is None:
        return nats, None
    factors = (factors * counted).to(dtype)
    p *= factors / norm
    if torch.compiler.is_compiling():  # all in one kernel: scatter_add would write p once more, in fp32
        return nats, (p - (torch.arange(p.shape[1], device=p.device) == index) * factors).to(out_dtype)
    return nats, p.scatter_add_(1, index, -factors).to(out_dtype)


def cross_entropy(hidden, weight, targets, reduction="mean", chunk=None, softmax_gradient=softmax_gradient):
    """Nats of targets [...] (-1: none) by hidden [..., D] and weight [V, D]: mean, "sum", or "none": of each, [...]."""
    device, rows = hidden.device.type, hidden.flatten(0, -2)
    rows = rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows
    chunk, each = chunk or (8192 if device == "cuda" else 1024), reduction == "none"  # tokens
    inputs = rows, weight, targets.flatten(), chunk, softmax_gradient, each, torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        nats = ChunkedCrossEntropy.apply(*inputs).view(targets.shape if each else ())
    return nats / (targets >= 0).sum().clamp(min=1) if reduction == "mean" else nats


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # FSDP gathers weights in bf16, and torch's fast kernel wants one dtype
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    recompute = False  # whether to keep only x for backward (activation checkpointing)

    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = (Dense if config.ffn == "dense" else SequenceSoftMoE if config.reads_ahead else SoftMoE)(config)

    def forward(self, x, place, cache, layer):
        if self.recompute and cache is None and torch.is_grad_enabled():  # no layer: one code for all blocks
            return recompute(self.run, x, place, use_reentrant=False, preserve_rng_state=False)
        return self.run(x, place, cache, layer)

    def run(self, x, place, cache=None, layer=0):
        x = x + self.attention(self.attention_norm(x), place, cache, layer)
        return x + self.ffn(self.ffn_norm(x), place, cache, layer)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.has_cache = config, not config.reads_ahead
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        if config.value_embedding:
            self.value_embedding = nn.Parameter(torch.empty(config.vocab_size, config.n_kv_head * config.head_width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.softmax_gradient, self.uses_flex = softmax_gradient, False  # train.py compiles one, sets the other
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every parameter, by name. The last matrix of each residual branch is zero: a block starts as the identity."""
        std = self.config.d_model**-0.5
        phi = std if self.config.router == "cosine" else std**2  # logits of the same size
        stds = {"embedding": 0.02, "value_embedding": 0.02, "head": 0.02, "qkv": std, "w_in": std, "phi": phi}
        # scale 1: a near-uniform combine, as in the dense layer
        fixed = {"norm": 1, "scale": 1, "value_scale": 0.5, "qkv_bias": 0, "out": 0, "w_out": 0, "recency": 0}
        for name, p in self.named_parameters():
            leaf = "norm" if name.endswith("norm.weight") else name.rpartition(".")[2]
            if leaf in fixed:
                nn.init.constant_(p, fixed[leaf])
            else:
                nn.init.normal_(p, std=stds[leaf])
            if leaf == "w_out" and p.ndim == 4:  # swiglu2 multiplies two of them: were both zero, neither would learn
                nn.init.normal_(p[0], std=p.shape[-2] ** -0.5)
            if leaf == "recency":  # a slot starts out reading mostly its own token
                p[:, 0] = 2.0

    def forward(self, ids, targets=None, cache=None, reduction="mean"):
        """ids [B, T] -> logits [B, T, V]; with targets [B, T] (-1: not counted) -> nats, mean, "sum" or "none": [B, T].
        With a cache, ids continue what it holds; prompts of unequal length are padded on the left with -1."""
        hidden = self.hidden_states(ids, cache)
        if targets is None:
            return F.linear(hidden, self.head_weight)
        return cross_entropy(hidden, self.head_weight, targets, reduction, softmax_gradient=self.softmax_gradient)

    def hidden_states(self, ids, cache=None):
        """ids [B, T] -> normed states of the last layer [B, T, D]."""
        if cache is not None and (needed := cache.length + ids.shape[1]) > cache.max_len:
            raise ValueError(f"the cache holds {cache.max_len} positions, {needed} are needed")
        x = F.embedding(ids.clamp(min=0), self.embedding)
        place = place_tokens(ids, self.config, cache, x.dtype, self.uses_flex and cache is None)
        if self.config.value_embedding:
            place = place._replace(values=F.embedding(ids.clamp(min=0), self.value_embedding))
        for layer, block in enumerate(self.blocks):
            x = block(x, place, cache, layer)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x)

    def next_logits(self, ids, cache=None):
        """Logits of the token after ids, [B, T] -> [B, V]."""
        return F.linear(self.hidden_states(ids, cache)[:, -1], self.head_weight)

    step = next_logits  # for the tokens after the prompt: sample.py may replace it by a compiled one

    def new_cache(self, batch, max_len):
        if not self.has_cache:
            raise ValueError('dispatch = "sequence" reads the whole text everywhere: it has no cache')
        return Cache(self.config, batch, max_len, self.embedding.device, self.embedding.dtype)

    @property
    def head_weight(self):
        return self.embedding if self.config.tie_embeddings else self.head

    def n_params(self):
        return sum(p.numel() for p in self.parameters())
