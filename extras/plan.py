"""What train.py --dry-run prints: the memory that a step of one micro-batch needs on each GPU, and its speed there.

Everything is computed from shapes, with torch's fake tensors: no data is read, no memory allocated, no GPU used.
"""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Decoder, cross_entropy
from optim import make_optimizers
from parallel import shard_dim

MFU, TERAFLOPS = 0.4, 312  # an A100's bf16 peak, and the share of it that training reaches
CUDA_CHUNK = 8192  # tokens of the loss at a time, as cross_entropy() chooses on CUDA
WORLD_SIZES = (1, 2, 4, 8, 16, 32, 64)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active, except those of `before`: `now`, and `most` at one time."""

    def __init__(self, before):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in before}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (part.untyped_storage() for part in tree_leaves(out) if isinstance(part, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)
        return out

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def activation_bytes(model, micro_batch, recompute):
    """What the forward of one micro-batch on CUDA holds at most beside weights and gradients, eager.

    To be called under FakeTensorMode. The blocks' matrices become bf16, as autocast and FSDP use them on CUDA.
    """
    config = model.config
    for module in model.blocks.modules():  # .bfloat16() does not work on fake tensors
        for name, p in list(module.named_parameters(recurse=False)):
            if p.ndim > 1:
                setattr(module, name, torch.nn.Parameter(p.detach().bfloat16()))
    for block in model.blocks:
        block.recompute = recompute
    ids = torch.randint(config.vocab_size, (micro_batch, config.block_size + 1))
    live = LiveTensors(model.parameters())
    with live, torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden_states(ids[:, :-1])
        cross_entropy(hidden, model.head_weight, ids[:, 1:], chunk=CUDA_CHUNK)
    return live.most - 4 * model.head_weight.numel()  # the loss makes the head's gradient in forward; it counts as one


def state_bytes(model, args):
    """{parameter: bytes of one of its numbers}: weight and gradient 4 each, and 4 (Muon) or 8 (AdamW) of optimizer."""
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    muon_groups = optimizers[0].param_groups if args.optimizer == "muon" else []
    by_muon = {p for group in muon_groups for p in group["params"]}
    return {p: 12 if p in by_muon else 16 for p in model.parameters()}


def largest_fsdp_shard(p, world):
    """How many numbers of a parameter the rank with the largest part of it holds."""
    size = p.shape[shard_dim(p, world)]
    return p.numel() // size * -(-size // world)


def plan_bytes(config, args):
    """-> bytes that one GPU needs without FSDP: state, autocast's bf16 copies of the blocks' weights, activations."""
    with FakeTensorMode():
        model = Decoder(config)
        activations = activation_bytes(model, args.micro_batch, args.recompute)
        state = sum(size * p.numel() for p, size in state_bytes(model, args).items())
    return state + autocast_bytes(model, args.recompute) + activations


def autocast_bytes(model, recompute):
    """autocast keeps bf16 copies of a block's weights until its backward."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return 2 * (max(blocks) if recompute else sum(blocks))


def print_plan(config, args):
    """Print the table for a model; args are train.py's flags (micro_batch, recompute, optimizer, lr, weight_decay)."""
    B, T = args.micro_batch, config.block_size
    with FakeTensorMode():
        model = Decoder(config)
        activations = activation_bytes(model, B, args.recompute)
        bytes_of = state_bytes(model, args)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    n_params, flops = model.n_params(), model.flops_per_token(T)
    state = sum(size * p.numel() for p, size in bytes_of.items())
    print(f"{n_params:,} parameters, {flops / 1e9:.2f} GFLOP a token. Computed from shapes; nothing was run on a GPU.")
    average = state / n_params
    print(f"A parameter takes 4 bytes, its gradient 4, its state 4 (Muon) or 8 (AdamW): {average:.1f} on average.")
    print(f"What else a micro-batch of {B} x {T} tokens needs, eager: {activations / 1e9:.1f} GB.")
    print(f"GPUs   GB on each   with --shard   tokens/s at {MFU:.0%} of {TERAFLOPS} TFLOP/s")
    autocast = autocast_bytes(model, args.recompute)
    # FSDP all-gathers embedding and head with their gradients (fp32); and of the largest block its weights and those of
    # the next one (bf16), and its gradient (bf16), which is reduced in fp32
    gathered = 8 * (n_params - sum(blocks)) + (2 + 2 + 2 + 4) * max(blocks)
    for world in WORLD_SIZES:
        local = sum(size * largest_fsdp_shard(p, world) for p, size in bytes_of.items())
        plain, fsdp = state + autocast + activations, local + gathered + activations
        cell = f"{fsdp / 1e9:.1f}" if world > 1 else ""
        print(f"{world:>4}{plain / 1e9:>13.1f}{cell:>15}{MFU * TERAFLOPS * 1e12 * world / flops:>18,.0f}")
