"""The decoder: Qwen-style attention and a causal Soft Mixture of Experts.

    config = PRESETS["demo"]                     # or Config(n_layer=..., ...)
    model = Decoder(config)
    logits = model(ids)                          # [B, T] -> [B, T, V]
    loss = model(ids, targets)                   # mean nats per counted target
    cache = model.new_cache(batch, max_len)      # then model(ids, cache=cache), any number of times
    model = Decoder.load("out/demo")             # a checkpoint, or the newest one of a run, or a Hugging Face folder

`python model.py out/demo --export DIR` writes a checkpoint as such a folder (weights.py).

Shapes: B batch, T time, D width (d_model), H heads, G key/value heads, K head dim, V vocabulary,
        E experts, P slots per expert, S = E * P slots, W window, h hidden width of an expert.
"""

import functools
import json
import math
import os
import shutil
import sysconfig
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from checkpoint import newest_checkpoint, read_tensors

# ---------------------------------------------------------------------------------------------------------------
# Configuration

CHOICES = {
    "ffn": ("soft_moe", "dense"),
    "dispatch": ("causal", "token", "sequence"),
    "expert": ("swiglu", "swiglu2"),
    "router": ("cosine", "linear"),
}


@dataclass(frozen=True)
class Config:
    n_layer: int = 3
    d_model: int = 128
    n_head: int = 4
    n_kv_head: int = 4
    vocab_size: int = 8192
    block_size: int = 128  # the longest text the model is trained on, in tokens
    ffn: str = "soft_moe"  # or dense: one SwiGLU with as many parameters as all experts together
    dispatch: str = "causal"  # what a slot reads: causal: the last `window` tokens; token: one; sequence: all (leaks)
    window: int = 4
    n_expert: int = 6
    slots_per_expert: int = 1
    expert: str = "swiglu"  # or swiglu2: the second layer is gated as well, as in Steel-LLM
    router: str = "cosine"  # logits of token and slot; linear: their product as it is, which is what Qwen2-MoE has
    d_expert: int = 0  # hidden width of an expert; 0: so that the layer has about 8 d_model^2 weights
    tie_embeddings: bool = False
    reset_id: int = -1  # nothing reads back over this id, which begins a document; -1: texts packed together see each other
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        problems = [
            f"{name} = {getattr(self, name)!r}, expected one of {', '.join(choices)}"
            for name, choices in CHOICES.items()
            if getattr(self, name) not in choices
        ]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < {"d_expert": 0, "reset_id": -1}.get(field.name, 1):
                problems.append(f"{field.name} = {value}, expected a positive number")
            if field.type is float and not 0 < value < math.inf:
                problems.append(f"{field.name} = {value}, expected a positive number")
        if not problems and self.d_model % (2 * self.n_head):
            problems.append(f"d_model = {self.d_model} is not a multiple of 2 x n_head = {2 * self.n_head}")
        if not problems and self.n_head % self.n_kv_head:
            problems.append(f"n_head = {self.n_head} is not a multiple of n_kv_head = {self.n_kv_head}")
        if not problems and self.reset_id >= 0 and self.reads_ahead:
            problems.append("dispatch = sequence reads over every end of document: leave --reset-at-eos out")
        if problems:
            raise SystemExit("model configuration: " + "; ".join(problems))

    @property
    def reads_ahead(self):
        """Whether a position reads later tokens: the published Soft MoE does."""
        return self.ffn == "soft_moe" and self.dispatch == "sequence"

    @property
    def back(self):
        """How many tokens before its own a slot of a Soft MoE reads."""
        return self.window - 1 if self.ffn == "soft_moe" and self.dispatch == "causal" else 0

    @property
    def matrices_per_expert(self):
        return {"swiglu": 3, "swiglu2": 4}[self.expert]

    @property
    def expert_width(self):
        return self.d_expert or 8 * math.ceil(self.d_model / self.matrices_per_expert / self.n_expert)

    @property
    def d_dense(self):
        """Width of the dense SwiGLU with the parameters of all experts."""
        return self.matrices_per_expert * self.n_expert * self.expert_width // 3


PRESETS = {
    "demo": Config(),
    "small": Config(
        n_layer=12, d_model=768, n_head=12, n_kv_head=12, vocab_size=16_384, block_size=1024, tie_embeddings=True
    ),
    "steel-1b": Config(
        n_layer=18, d_model=1792, n_head=32, n_kv_head=32, vocab_size=151_936, block_size=2048,
        n_expert=6, d_expert=448, expert="swiglu2", rope_base=1_000_000.0,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Attention


class Cache:
    """What decoding remembers of each layer: keys and values of every position, and of a Soft MoE what its router and its first matrix
    made of the last W - 1 tokens.

    length   tokens seen so far, the same for every row of the batch
    start    [B, 1]: the number of the token that began the text being read; before it stand padding or other documents
    bounded  whether start can be other than 0
    angles   [max_len, 2, 1, K]: cos and sin of every position
    """

    def __init__(self, config, batch, max_len, device, dtype):
        self.config, self.length, self.max_len, self.bounded = config, 0, max_len, config.reset_id >= 0
        zeros = functools.partial(torch.zeros, device=device, dtype=dtype)
        self.start = zeros(batch, 1, dtype=torch.long)
        head_dim = config.d_model // config.n_head
        self.k, self.v = ([zeros(batch, config.n_kv_head, max_len, head_dim) for _ in range(config.n_layer)] for _ in "kv")
        widths = config.n_expert * config.slots_per_expert, config.n_expert * 2 * config.expert_width
        self.recent = [[zeros(batch, config.back, width) for width in widths] for _ in range(config.n_layer)]
        self.angles = rotary_angles(torch.arange(max_len, device=device), head_dim, config.rope_base, dtype)

    def repeat(self, batch, max_len):
        """This cache of one text for a batch of texts that all begin with it, of max_len positions at most."""
        cache = Cache(self.config, batch, max_len, self.start.device, self.k[0].dtype)
        cache.length, cache.bounded, cache.start = self.length, self.bounded, self.start.repeat(batch, 1)
        for own, ours in zip(cache.k + cache.v, self.k + self.v):
            own[:, :, : self.length] = ours[:, :, : self.length]
        cache.recent = [[a.repeat(batch, 1, 1) for a in recent] for recent in self.recent]
        return cache


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; q, k and v have a bias (Qwen1.5)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.d_model // config.n_head
        n_rows = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Parameter(torch.empty(n_rows, self.head_dim, config.d_model))
        self.qkv_bias = nn.Parameter(torch.empty(n_rows, self.head_dim))
        self.out = nn.Parameter(torch.empty(config.d_model, config.d_model))

    def forward(self, x, place, cache=None, layer=0):
        """x [B, T, D] -> [B, T, D]."""
        B, T, D = x.shape
        qkv = F.linear(x, self.qkv.flatten(0, 1), self.qkv_bias.flatten()).view(B, T, -1, self.head_dim)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        q, k = rotate(qk, *place.angles.unbind(2)).split([self.n_head, self.n_kv_head], dim=2)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # [B, H or G, T, K]
        if cache is not None:
            stored = cache.k[layer], cache.v[layer]
            for store, new in zip(stored, (k, v)):
                store.narrow(2, cache.length, T).copy_(new)
            k, v = (store.narrow(2, 0, cache.length + T) for store in stored)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=place.mask, is_causal=place.mask is None and T > 1, enable_gqa=self.n_head != self.n_kv_head
        )
        return F.linear(y.transpose(1, 2).reshape(B, T, D), self.out)


class Place(NamedTuple):
    """Where the tokens of one forward stand."""

    angles: torch.Tensor  # [B or 1, T, 2, 1, K], cos and sin of the positions, which count from the first token that may be read
    mask: torch.Tensor | None  # [B or 1, 1, T, length + T], true where attention may look; None: at all that came before
    absent: torch.Tensor | None  # [W, B or 1, T, 1], true where a slot's window reaches back over that first token; None: no window


def place_tokens(ids, config, cache, dtype):
    """ids [B, T] -> Place. Nothing looks back over a reset_id, nor into the padding (-1) on the left of a cache's first ids."""
    T = ids.shape[1]
    length, start, bounded = (cache.length, cache.start, cache.bounded) if cache is not None else (0, 0, config.reset_id >= 0)
    index = torch.arange(length, length + T, device=ids.device)[None]
    if cache is not None and length == 0 and (ids < 0).any():
        start, bounded = (ids < 0).sum(1, keepdim=True), True
    if config.reset_id >= 0:
        start = torch.where(ids == config.reset_id, index, start).cummax(1).values  # [B, T]
    positions = (index - start).clamp(min=0)  # padding stands at 0 and reads itself: a softmax over nothing would be NaN
    mask = None
    if bounded or length and T > 1:
        seen = torch.arange(length + T, device=ids.device)
        mask = ((seen <= index[..., None]) & (seen >= (index - positions)[..., None]))[:, None]
    absent = (positions < torch.arange(config.back, -1, -1, device=ids.device)[:, None, None])[..., None] if config.back else None
    if cache is None:
        return Place(rotary_angles(positions, config.d_model // config.n_head, config.rope_base, dtype), mask, absent)
    cache.start, cache.bounded = start.amax(1, keepdim=True), bounded  # the last one; a slice of it would be compiled for by itself
    return Place(cache.angles[positions], mask, absent)


def rotary_angles(positions, head_dim, base, dtype):
    """cos and sin, [..., T, 2, 1, K], of rotary positions (arXiv 2104.09864), half-split; angles in fp32."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[..., None].float() * frequencies.repeat(2)
    return torch.stack([angles.cos(), angles.sin()], dim=-2)[..., None, :].to(dtype)


def rotate(x, cos, sin):
    """x [B, T, heads, K]: turn the pair (x_i, x_{i + K/2}) by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ---------------------------------------------------------------------------------------------------------------
# Feed-forward layers


class Dense(nn.Module):
    """SwiGLU (arXiv 2002.05202, section 2)."""

    def __init__(self, config):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(2, config.d_dense, config.d_model))  # gate, up
        self.w_out = nn.Parameter(torch.empty(config.d_dense, config.d_model))

    def forward(self, x, place, cache=None, layer=0):
        gate, up = F.linear(x, self.w_in.flatten(0, 1)).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.w_out


class WindowMix(torch.autograd.Function):
    """What each slot reads of the first matrix's results: sum over the window of weight * (gate and up of that token).

    Autograd would find the same gradients, but pad every shifted one by itself, and the compiler then masks each load.
    """

    @staticmethod
    def forward(ctx, u, weights):
        """u [B, W - 1 + T, E, 1, 2, h], weights [W, B, T, E, P], the oldest token first -> gate, up, [B, T, E, P, h] each."""
        ctx.save_for_backward(u, weights)
        return tuple(window_mix(part, weights[..., None]) for part in u.unbind(-2))  # apart, or the compiler would keep both

    @staticmethod
    def backward(ctx, *d):
        u, weights = ctx.saved_tensors
        W, _, T, *_ = weights.shape
        d = torch.stack(d, dim=-2)
        d_weights = torch.stack([(d * u[:, k : k + T]).sum((-2, -1)) for k in range(W)])
        # What a token gave to the last place of a window, it gave to the place before in the window one later, and so on.
        d = F.pad(d, (0, 0) * 4 + (W - 1, W - 1))
        weights = F.pad(weights, (0, 0) * 2 + (W - 1, W - 1))[..., None, None]
        d_u = window_mix(d, torch.stack([weights[k, :, W - 1 - k : T + 2 * (W - 1) - k] for k in reversed(range(W))]))
        return d_u.sum(3, keepdim=True), d_weights


def window_mix(u, weights):
    """WindowMix, for where there is no gradient; weights [W, B, T, ...] of as many dimensions as u."""
    T = weights.shape[2]
    first, *others = weights.unbind(0)
    mixed = first * u[:, :T]
    for k, weight in enumerate(others, 1):
        mixed = torch.addcmul(mixed, weight, u[:, k : k + T])
    return mixed


class SoftMoE(nn.Module):
    """Soft Mixture of Experts (arXiv 2308.00951, section 2) whose slots read only the past.

    l[t, j] = scale * <x_t / |x_t|, phi_j / |phi_j|>                  router logits of token t and slot j
    w[t, j] = softmax over k < W of (l[t - k, j] + b[j, k])           dispatch: how slot j weighs the last W tokens
    z[t, j] = sum over k of w[t, j, k] * x[t - k]                     what slot j reads at position t
    y_t     = E * sum over j of softmax_j(l[t])_j * expert(j)(z[t, j])

    The first layer of an expert is linear, so it is applied to x once, and the window is mixed behind it: the same
    function, and no x is ever mixed. dispatch = "token" is W = 1. dispatch = "sequence" is the layer as
    published and as Steel-LLM (arXiv 2502.06635) released it: w is a softmax over all tokens, later ones included,
    the experts get x / |x|, and there is no factor E. router = "linear" is l[t, j] = <x_t, phi_j>.

    Experts are swiglu: silu(A x) * (B x) times C; or swiglu2: u = silu(A x) * (B x), then silu(C u) * (D u).
    """

    def __init__(self, config):
        super().__init__()
        E, P, h, D = config.n_expert, config.slots_per_expert, config.expert_width, config.d_model
        self.dispatch, self.router, self.n_expert = config.dispatch, config.router, E
        self.window = config.window if config.dispatch == "causal" else 1
        self.phi = nn.Parameter(torch.empty(D, E * P))
        if config.router == "cosine":
            self.scale = nn.Parameter(torch.empty(1))
        if self.window > 1:
            self.recency = nn.Parameter(torch.empty(E * P, config.window))  # b
        self.w_in = nn.Parameter(torch.empty(E, 2, h, D))
        self.w_out = nn.Parameter(torch.empty(E, h, D) if config.expert == "swiglu" else torch.empty(2, E, h, D))

    def forward(self, x, place, cache=None, layer=0):
        """x [B, T, D], RMS-normed -> [B, T, D]."""
        if self.dispatch == "sequence":
            return self.published(x)
        B, T, D = x.shape
        back, absent = self.window - 1, place.absent
        if cache is None:  # all texts in one row: nothing reads back beyond the first token, what lies there has weight 0
            x = x.reshape(1, B * T, D)
            absent = absent.expand(-1, B, T, 1).reshape(-1, 1, B * T, 1) if back else None
        logits, u = self.router_logits(x), F.linear(x, self.w_in.flatten(0, 2))
        if back and cache is None:  # the first tokens need something to read with weight 0
            logits, u = (F.pad(a, (0, 0, back, 0)) for a in (logits, u))
        elif back:
            logits, u = (torch.cat(pair, dim=1) for pair in zip(cache.recent[layer], (logits, u)))
            cache.recent[layer] = [a[:, T:].clone() for a in (logits, u)]
        combine = logits[:, back:].softmax(-1) * self.n_expert
        u = u.unflatten(-1, (self.n_expert, 1, 2, -1))  # [B, back + T, E, 1, 2, h], or B T in one row
        combine = combine.to(u.dtype).unflatten(-1, (self.n_expert, -1, 1))  # [B, T, E, P, 1]
        weights = self.window_weights(logits, absent).to(u.dtype).unflatten(3, (self.n_expert, -1)) if back else None  # [W, B, T, E, P]
        if self.w_out.ndim == 4:
            y = self.swiglu2(u, weights, combine)
        elif torch.is_grad_enabled():  # of all this only u is kept for backward: the rest is wide, and cheap to make again
            y = recomputed(self.swiglu, u, weights, combine, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self.swiglu(u, weights, combine)
        return y.view(B, T, D)

    def router_logits(self, x):
        """[B, T, D] -> [B, T, S], in fp32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.router == "linear":
                return x @ self.phi.to(x.dtype)
            phi = self.phi.to(x.dtype)
            lengths = x.norm(dim=-1, keepdim=True) * phi.norm(dim=0)
            return x @ phi * self.scale.to(x.dtype) / lengths.clamp(min=1e-12)

    def window_weights(self, logits, absent):
        """w, the oldest token of a window first: logits [B, W - 1 + T, S], absent [W, B or 1, T, 1] -> [W, B, T, S]."""
        T = absent.shape[2]
        scores = torch.stack([logits[:, k : k + T] for k in range(self.window)])  # unfold's compiled backward would add in any order
        return (scores + self.recency.T.flip(0)[:, None, None]).masked_fill(absent, -torch.inf).softmax(0)

    def hidden(self, u, weights):
        """-> what the slots hold behind the first layer, [B, T, E, P, h]; P is 1 where all slots of an expert read the same."""
        if weights is not None and torch.is_grad_enabled():
            gate, up = WindowMix.apply(u, weights)
        else:
            gate, up = (u if weights is None else window_mix(u, weights[..., None, None])).unbind(-2)
        return F.silu(gate) * up

    def swiglu(self, u, weights, combine):
        """The last layer is linear, so the sum over slots goes before it."""
        hidden = (self.hidden(u, weights) * combine).sum(3)
        return hidden.flatten(2) @ self.w_out.flatten(0, 1)

    def swiglu2(self, u, weights, combine):
        hidden = self.hidden(u, weights)
        B, T, E, P, h = hidden.shape
        hidden = hidden.permute(2, 0, 1, 3, 4).reshape(E, B * T * P, h)
        gate, down = (torch.bmm(hidden, w).view(E, B, T, P, -1) for w in self.w_out)
        return (F.silu(gate) * down * combine.permute(2, 0, 1, 3, 4)).sum((0, 3))

    def published(self, x):
        """dispatch = "sequence"."""
        logits = self.router_logits(x)  # [B, T, S]
        slots = logits.softmax(1).to(x.dtype).transpose(1, 2) @ F.normalize(x, dim=-1)  # [B, S, D]
        u = torch.einsum("bepd,efd->bepf", slots.unflatten(1, (self.n_expert, -1)), self.w_in.flatten(1, 2))
        gate, up = u.chunk(2, dim=-1)
        hidden = F.silu(gate) * up  # [B, E, P, h]
        if self.w_out.ndim == 3:
            y = torch.einsum("beph,ehd->bepd", hidden, self.w_out)
        else:
            gate, down = (torch.einsum("beph,ehd->bepd", hidden, w) for w in self.w_out)
            y = F.silu(gate) * down
        return logits.softmax(2).to(x.dtype) @ y.flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------
# Loss


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy from hidden states, in chunks of tokens, so that [N, V] logits never exist.

    The gradients are made in forward, while a chunk's logits are there; backward only scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, with_gradients):
        """hidden [N, D], weight [V, D], targets [N] (-1: not counted) -> sum of nats, fp32 at least."""
        cast_weight = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if with_gradients:
            d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
            ctx.save_for_backward(d_hidden, d_weight)
        for start in range(0, len(hidden), chunk):
            rows, goal = hidden[start : start + chunk], targets[start : start + chunk]
            counted, index = (goal >= 0)[:, None], goal.clamp(min=0)[:, None]
            logits = (rows @ cast_weight.T).to(total.dtype)
            logits -= logits.amax(-1, keepdim=True)
            picked = logits.gather(1, index)
            p = logits.exp_()  # all in place: what is as large as the logits is made once
            norm = p.sum(-1, keepdim=True)
            total += ((norm.log() - picked) * counted).sum()
            if with_gradients:  # d loss / d logits = softmax - one-hot
                p *= counted / norm
                d_logits = p.scatter_add_(1, index, -counted.to(p.dtype)).to(rows.dtype)
                torch.mm(d_logits, cast_weight, out=d_hidden[start : start + chunk])
                d_weight += (d_logits.T @ rows).to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_total.to(d_hidden.dtype), d_weight * d_total.to(d_weight.dtype), None, None, None


def cross_entropy(hidden, weight, targets, chunk=1024):
    """Mean nats per counted target; hidden [..., D], weight [V, D], targets [...] with -1 for not counted."""
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        total = ChunkedCrossEntropy.apply(hidden, weight, targets, chunk, torch.is_grad_enabled())
    return total / (targets >= 0).sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------
# Decoder


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # of a block that FSDP puts together in bf16, the weight is: torch has no fast path for two dtypes
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    recompute = False  # whether to keep only x for backward, and make all else again there

    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = SoftMoE(config) if config.ffn == "soft_moe" else Dense(config)

    def forward(self, x, place, cache, layer):
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self.run, x, place, cache, layer, use_reentrant=False, preserve_rng_state=False)
        return self.run(x, place, cache, layer)

    def run(self, x, place, cache, layer):
        x = x + self.attention(self.attention_norm(x), place, cache, layer)
        return x + self.ffn(self.ffn_norm(x), place, cache, layer)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every parameter, by name. The last matrix of each residual branch is zero: a block starts as the identity."""
        for name, p in self.named_parameters():
            leaf = name.rpartition(".")[2]
            if name.endswith("norm.weight"):
                nn.init.ones_(p)
            elif leaf in ("embedding", "head"):
                nn.init.normal_(p, std=0.02)
            elif leaf == "phi" and self.config.router == "linear":
                nn.init.normal_(p, std=1 / self.config.d_model)  # logits as small as the cosine's
            elif leaf in ("qkv", "w_in", "phi"):
                nn.init.normal_(p, std=self.config.d_model**-0.5)
            elif leaf in ("qkv_bias", "out"):
                nn.init.zeros_(p)
            elif leaf == "w_out":
                nn.init.zeros_(p)
                if p.ndim == 4:  # swiglu2 multiplies two of them: one must not be zero, or neither gets a gradient
                    nn.init.normal_(p[0], std=p.shape[-2] ** -0.5)
            elif leaf == "scale":
                nn.init.ones_(p)  # near-uniform combine: the layer starts out as the dense one
            elif leaf == "recency":
                nn.init.zeros_(p)
                p[:, 0] = 2.0  # a slot starts out reading mostly its own token
            else:
                raise ValueError(f"no initialisation for parameter {name}")

    def forward(self, ids, targets=None, cache=None):
        """ids [B, T] -> logits [B, T, V]; with targets [B, T] (-1: not counted) -> mean nats per counted target.

        With a cache, ids continue what it holds. A batch of unequal prompts is padded on the left with -1.
        """
        hidden = self.hidden(ids, cache)
        return F.linear(hidden, self.head_weight) if targets is None else cross_entropy(hidden, self.head_weight, targets)

    def hidden(self, ids, cache=None):
        """ids [B, T] -> normed states of the last layer [B, T, D]."""
        if cache is not None:
            if not self.has_cache:
                raise ValueError('dispatch = "sequence" reads the whole text everywhere: it cannot be decoded with a cache')
            if cache.length + ids.shape[1] > cache.max_len:
                raise ValueError(f"the cache holds {cache.max_len} positions, {cache.length + ids.shape[1]} are needed")
        x = F.embedding(ids.clamp(min=0), self.embedding)
        place = place_tokens(ids, self.config, cache, x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, place, cache, layer)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x)

    def next_logits(self, ids, cache=None):
        """Logits of the token behind ids, [B, T] -> [B, V]."""
        return F.linear(self.hidden(ids, cache)[:, -1], self.head_weight)

    def step(self, ids, cache):
        """next_logits() of one more token, [B, 1] -> [B, V]; apart, to be compiled: a prompt, of any length, stays eager."""
        return self.next_logits(ids, cache)

    def compile_step(self):
        """Make step() compiled: at its first calls, code for one length and then for all; one text, several, and padded ones have their own.

        Whether the model's attributes are still the same is not checked at every call, which takes a tenth of it: change none of
        them, and copy no compiled model, as the copy would run this one's weights.
        """
        # The sizes that a kernel checks again are those that a call has checked: 5 %
        options = {"size_asserts": False, "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self.step = torch.compile(self.step, isolate_recompiles=True, options=options)  # isolated: another model's code is not for this one

    def new_cache(self, batch, max_len):
        return Cache(self.config, batch, max_len, self.embedding.device, self.embedding.dtype)

    @property
    def head_weight(self):
        return self.embedding if self.config.tie_embeddings else self.head

    @property
    def has_cache(self):
        return not self.config.reads_ahead

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Forward and backward, per token of a text of T tokens: 6 per weight that multiplies, causal attention at half."""
        weights = self.n_params() - (0 if self.config.tie_embeddings else self.embedding.numel())
        return 6 * weights + 6 * self.config.n_layer * self.config.d_model * T

    @classmethod
    def load(cls, path):
        """The model of a checkpoint directory, of a run directory's newest one, or of a Hugging Face folder (config.json and
        *.safetensors), on the CPU in fp32; .checkpoint is its path."""
        if Path(path, "config.json").exists():
            import weights

            return weights.load(path)
        path = newest_checkpoint(path)
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        model = cls(Config(**state["config"]))
        model.load_state_dict(read_tensors(path / "model.pt"))
        model.checkpoint = path
        return model


def choose_device(name):
    """--device: auto is the best there is; one that is not there is refused."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in there.items() if available)
    if not there[name]:
        raise SystemExit(f"--device {name}: there is none here; expected one of {', '.join(d for d in there if there[d])}")
    return name


def can_compile(device):
    """On a CPU torch.compile needs a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return device == "cuda" or device == "cpu" and bool(shutil.which(os.environ.get("CXX", "g++"))) and headers.exists()


if __name__ == "__main__":
    from weights import main

    main()
