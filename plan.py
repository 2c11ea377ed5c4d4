"""The presets. What a step needs on a GPU, computed from shapes, and what follows from it: the table of --dry-run, and
the numbers that a run on a GPU chooses itself where no flag has.

torch's fake tensors have shapes and no numbers: no data is read, no memory allocated, no GPU used.
"""

import math
import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import flops_per_token
from model import Config, Decoder, cross_entropy
from optim import make_optimizers
from order import places_of
from parallel import shard_dim

PRESETS = {  # layers, width, heads, key/value heads
    "demo": Config(3, 128, 4, 4),
    "small": Config(12, 768, 6, 6, vocab_size=16_384, block_size=1024, tie_embeddings=True),
    "base-350m": Config(24, 1024, 8, 8, vocab_size=49_152, block_size=2048, tie_embeddings=True),
    "steel-1b": Config(18, 1792, 32, 32, vocab_size=151_936, block_size=2048, d_expert=448, expert="swiglu2",
                       rope_base=1_000_000.0),  # arXiv 2502.06635
    "qwen3-0.6b": Config(28, 1024, 16, 8, head_dim=128, qk_norm=True, vocab_size=151_936, block_size=2048, ffn="dense",
                         n_expert=1, d_expert=3072, tie_embeddings=True, rope_base=1_000_000.0),  # arXiv 2505.09388
}  # fmt: skip

MICRO_BATCH, LR = 16, 6e-3  # found on a CPU, for the demo model
LARGE = 50_000_000  # parameters, from which on a GPU chooses its own
BATCH_TOKENS = 1 << 19  # of a step of a large model
EPOCH_STEPS = 200  # an epoch has at least so many steps: with less text they are smaller
FULL = 0.9  # share of a GPU's memory to plan for
MFU, TERAFLOPS = 0.4, 312  # an A100's bf16 peak, and the share of it that training reaches
CUDA_CHUNK = 8192  # tokens of the loss at a time, as cross_entropy() chooses on CUDA
WORLD_SIZES = (1, 2, 4, 8, 16, 32, 64)

# ----------------------------------------------------------------------------------------------------------------------
# Memory


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


def state_bytes(model, optimizer):
    """{parameter: bytes of one of its numbers}: weight and gradient 4 each, and 4 (Muon) or 8 (AdamW) of optimizer."""
    optimizers = make_optimizers(model, optimizer, lr=1.0, weight_decay=0.0)
    muon_groups = optimizers[0].param_groups if optimizer == "muon" else []
    by_muon = {p for group in muon_groups for p in group["params"]}
    return {p: 12 if p in by_muon else 16 for p in model.parameters()}


def largest_fsdp_shard(p, world):
    """How many numbers of a parameter the rank with the largest part of it holds."""
    size = p.shape[shard_dim(p, world)]
    return p.numel() // size * -(-size // world)


class StepMemory:
    """What a step with micro-batches of `micro_batch` samples needs on a GPU, eager, in bytes.

    args: train.py's flags recompute and optimizer. Compiled it is less, by up to a third.
    """

    def __init__(self, config, micro_batch, args):
        with FakeTensorMode():
            model = Decoder(replace(config, reset_id=-1))  # compiled, documents kept apart need no large mask
            self.activations = activation_bytes(model, micro_batch, args.recompute)
            self.per_number = state_bytes(model, args.optimizer)
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        self.n_params, self.flops = model.n_params(), flops_per_token(model, config.block_size)
        self.state = sum(size * p.numel() for p, size in self.per_number.items())
        # autocast keeps bf16 copies of a block's weights until its backward.
        self.autocast = 2 * (max(blocks) if args.recompute else sum(blocks))
        # FSDP all-gathers embedding and head with their gradients (fp32); and of the largest block its weights and
        # those of the next one (bf16), and its gradient (bf16), which is reduced in fp32.
        self.gathered = 8 * (self.n_params - sum(blocks)) + (2 + 2 + 2 + 4) * max(blocks)

    def on_each(self, world, shard):
        """Of each of `world` GPUs: with the whole model on every one, or sharded by FSDP."""
        if not shard:
            return self.state + self.autocast + self.activations
        local = sum(size * largest_fsdp_shard(p, world) for p, size in self.per_number.items())
        return local + self.gathered + self.activations


def print_plan(config, args):
    """Print the table of --dry-run for a model."""
    micro_batch = args.micro_batch or MICRO_BATCH
    memory = StepMemory(config, micro_batch, args)
    n_params, flops = memory.n_params, memory.flops
    print(f"{n_params:,} parameters, {flops / 1e9:.2f} GFLOP a token. Computed from shapes; nothing was run on a GPU.")
    average = memory.state / n_params
    print(f"A parameter takes 4 bytes, its gradient 4, its state 4 (Muon) or 8 (AdamW): {average:.1f} on average.")
    tokens = f"{micro_batch} x {config.block_size}"
    print(f"What else a micro-batch of {tokens} tokens needs, eager: {memory.activations / 1e9:.1f} GB.")
    print(f"GPUs   GB on each   with --shard   tokens/s at {MFU:.0%} of {TERAFLOPS} TFLOP/s")
    for world in WORLD_SIZES:
        plain, sharded = (memory.on_each(world, shard) / 1e9 for shard in (False, True))
        cell = f"{sharded:.1f}" if world > 1 else ""
        print(f"{world:>4}{plain:>13.1f}{cell:>15}{MFU * TERAFLOPS * 1e12 * world / flops:>18,.0f}")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that no flag has set


def gpu_bytes(ranks):
    """The memory of this GPU; a part of it where processes share one."""
    sharing = math.ceil(ranks.local_world / torch.cuda.device_count())
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory // sharing


def set_sizes(args, model, data, device, ranks):
    """-> micro-batches of a step on each rank. Sets --micro-batch, --batch-tokens and --lr where no flag has, and
    --steps from --epochs. A large model on a GPU gets

    micro-batch   the largest power of two whose step fits into 90 % of the memory
    batch-tokens  2^19, about; fewer where an epoch would have less than 200 steps
    lr            6e-3 sqrt(128 / d_model), times sqrt(tokens / 2^19) for smaller steps (arXiv 1404.5997, section 5);
                  for AdamW a quarter of it, which at width 768 is the usual 6e-4
    """
    config, T = model.config, data.block_size
    is_large, row = device == "cuda" and model.n_params() >= LARGE, T * ranks.world  # row: one sample on each rank
    tokens = args.batch_tokens or wanted_tokens(args, data, is_large, row)
    if args.micro_batch is None and is_large:
        budget = FULL * ranks.from_rank_0(gpu_bytes(ranks))
        args.micro_batch, planned = largest_micro_batch(config, args, budget, tokens / row, ranks.world)
        small = "" if planned <= budget else ": try --recompute, or --shard on several GPUs"
        plan = f"the plan is {planned / 1e9:.1f} GB, {budget / 1e9:.1f} can be used{small}"
        ranks.say(f"micro-batch {args.micro_batch}: {plan}")
    args.micro_batch = args.micro_batch or MICRO_BATCH
    if not args.batch_tokens:
        args.batch_tokens = nearest_step(args.micro_batch, tokens / row) * row
        if is_large and not args.batch_documents and 2 * args.batch_tokens <= BATCH_TOKENS:
            few = f"the data have only {len(data) * T:,} tokens"
            ranks.say(f"warning: {few}: a step takes {args.batch_tokens:,}, not {BATCH_TOKENS:,}")
    if args.lr is None:
        args.lr = peak_lr(args.optimizer, config.d_model, args.batch_tokens) if is_large else LR
    if args.epochs:
        samples = sum(places_of(data.samples(), args.mix).values())  # of a round, or of all data where shares are given
        args.steps = math.ceil(args.epochs * samples * T / args.batch_tokens)
    return count_micro_batches(args, T, ranks.world)


def wanted_tokens(args, data, is_large, row):
    """Tokens of a step where --batch-tokens does not say it; 0: one micro-batch on each rank."""
    epoch = len(data) * data.block_size
    if args.batch_documents:
        return args.batch_documents / data.documents * epoch
    tokens = BATCH_TOKENS if is_large else 0
    while tokens > epoch / EPOCH_STEPS and tokens // 2 >= (args.micro_batch or 1) * row:
        tokens //= 2
    return tokens


def count_micro_batches(args, T, world):
    """Micro-batches of a step on each rank. ValueError if they are no whole number."""
    B = args.micro_batch
    n_micro, rest = divmod(args.batch_tokens, B * T * world)
    if rest:
        divides = next((size for size in range(B - 1, 0, -1) if args.batch_tokens % (size * T * world) == 0), None)
        fix = f": --micro-batch {divides} divides it" if divides else ""
        product = f"micro-batch x block x ranks = {B} x {T} x {world} = {B * T * world}"
        raise ValueError(f"--batch-tokens {args.batch_tokens} is not a multiple of {product}{fix}")
    return n_micro


def nearest_step(size, samples):
    """The multiple of a micro-batch's size nearest to the samples of a step on each rank, at least one."""
    return size * max(1, round(samples / size))


def largest_micro_batch(config, args, budget, samples, world):
    """-> the largest power of two that fits, and what it needs; at least 1.

    samples: of a step on each rank. Given by a flag they must be met, otherwise within 5 %.
    """
    tolerance = 0 if args.batch_tokens else 0.05 * samples

    def needed(size):
        return StepMemory(config, size, args).on_each(world, args.shard)

    size, planned = 1, needed(1)
    while abs(nearest_step(2 * size, samples) - samples) <= tolerance and (more := needed(2 * size)) <= budget:
        size, planned = 2 * size, more
    return size, planned


def peak_lr(optimizer, d_model, batch_tokens):
    rate = LR * math.sqrt(128 / d_model) * math.sqrt(min(1, batch_tokens / BATCH_TOKENS))
    return rate / 4 if optimizer == "adamw" else rate
