"""Several processes: which one this is, what all agree on, sums in a fixed order, and FSDP2.

    ranks = start_ranks("cpu")                # from the environment that torchrun sets; one process without it
    seconds, stop = ranks.sum(seconds if ranks.rank == 0 else 0.0, asked_to_stop)

What ranks agree on are CPU tensors, summed by gloo: a GPU is never waited for.
"""

import contextlib
import hashlib
import os
import platform
import signal
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common import exit_code, print_whatever_happens

# ----------------------------------------------------------------------------------------------------------------------
# The processes


@dataclass(frozen=True)
class Ranks:
    """This process among all (rank of world) and among those of its machine (local_rank of local_world)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    def say(self, text):
        """Print a line, on rank 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def from_rank_0(self, number):
        """A number as rank 0 has it, on all ranks. Also a barrier for everybody else: nobody passes before rank 0."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number)
        dist.broadcast(tensor, 0)
        return tensor.item()

    def sum(self, *numbers):
        """The sums of numbers over all ranks, as floats."""
        if self.world == 1:
            return [float(number) for number in numbers]
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def check_equal(self, what, text):
        """ValueError on a rank whose text differs from rank 0's: nodes started with other flags, or on other disks."""
        digest = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:7])  # fits int64
        if self.from_rank_0(digest) != digest:
            here = f"rank {self.rank} on {platform.node()}"
            raise ValueError(f"{here} has other {what} than rank 0: start all nodes alike, on one shared disk")


def start_ranks(device):
    """Join the process group that torchrun has described in the environment -> Ranks."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in names.items()))
    n_gpus = torch.cuda.device_count() if device == "cuda" else 0
    shared = n_gpus > 0 and ranks.local_world > n_gpus
    backend = "cpu:gloo,cuda:nccl" if n_gpus and not shared else "gloo"  # NCCL refuses two processes on one GPU
    if n_gpus:
        torch.cuda.set_device(ranks.local_rank % n_gpus)
    if ranks.world > 1:
        dist.init_process_group(backend)
        ranks.check_equal("GPUs", backend)
    if shared:
        ranks.say(f"note: {ranks.local_world} processes share {n_gpus} GPUs: gloo sums gradients, which is slow")
    return ranks


class Stop:
    """SIGINT and SIGTERM: finish the step, save, exit. While torch compiles there is nothing to save: exit at once."""

    def __init__(self, run, compiling, ranks):
        self.run, self.compiling, self.ranks = run, compiling, ranks
        self.asked = False  # of this process
        self.asked_of_any = False  # of any rank: what all have agreed on
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, signum, frame):
        self.asked = True
        if self.compiling:
            self.ranks.say(f"stopped before a first step; python train.py --resume --out {self.run} continues")
            os._exit(0)

    def agree(self, seconds=0.0):
        """All ranks meet: set asked_of_any, and return rank 0's seconds, as clocks differ."""
        seconds, asked = self.ranks.sum(seconds if self.ranks.rank == 0 else 0.0, self.asked)
        self.asked_of_any = asked > 0
        return seconds

    def on_any_rank(self):
        """Whether any rank was asked to stop. All ranks must call it."""
        self.agree()
        return self.asked_of_any


def run_rank(main):
    """As common.run_command, for a program that torchrun may have started."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until Stop takes over
    print_whatever_happens()
    try:
        code = exit_code(main)
    except SystemExit as end:  # argparse, at the flags of a resumed run
        code = end.code
    except RuntimeError as error:
        if not dist.is_initialized() or "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        print(f"rank {os.environ['RANK']}: another process has ended ({reason})", file=sys.stderr)
        code = 1
    if dist.is_initialized():  # at an ordinary exit gloo's threads abort now and then
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# ----------------------------------------------------------------------------------------------------------------------
# Sums over ranks


def sum_over_ranks(tensors):
    """All-reduce tensors in place, one by one. (DDP's buckets change after the first step: a resumed run would add up
    in another order, and not to the same bits.)"""
    if dist.is_initialized():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


@contextlib.contextmanager
def summing_gradients(params):
    """All-reduce the gradients that a backward inside makes while it goes on, the last parameter's first.

    A gradient that is made before its turn waits for it: ranks start the same sums in the same order.
    """
    if not dist.is_initialized():
        yield
        return
    waiting, made, started = list(params), set(), []

    def start(p):
        made.add(p)
        while waiting and waiting[-1] in made:
            started.append(dist.all_reduce(waiting.pop().grad, async_op=True))

    hooks = [p.register_post_accumulate_grad_hook(start) for p in params]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for work in started:
        work.wait()
    sum_over_ranks([p.grad for p in reversed(waiting)])


def exact_sums(micro_sums, n_micro, ranks):
    """The sum over all micro-batches of all ranks of micro_sums(i), lists of tensors: the same bits at any world size.

    It is a binary tree over the micro-batches of the step: halves are summed apart as long as they are even. Each rank
    has one branch of it, and what is left of the tree joins the ranks.
    """

    def branch(first, count):
        if count == 1:
            return micro_sums(first)
        cuts = [first, first + count // 2, first + count] if count % 2 == 0 else range(first, first + count + 1)
        total = branch(cuts[0], cuts[1] - cuts[0])
        for low, high in zip(cuts[1:], cuts[2:]):
            torch._foreach_add_(total, branch(low, high - low))
        return total

    total = branch(0, n_micro)
    if ranks.world == 1:
        return total
    flat = torch.cat([part.reshape(-1) for part in total])
    size = len(flat)
    flat = torch.nn.functional.pad(flat, (0, -size % ranks.world))
    # Each rank sums a piece of the numbers for all: as many bytes on the wire as a ring all-reduce.
    rows = torch.empty_like(flat)
    dist.all_to_all_single(rows, flat)
    rows = rows.view(ranks.world, -1)
    while len(rows) > 1:
        rows = rows[0::2] + rows[1::2]
    dist.all_gather_into_tensor(flat, rows[0])
    pieces = flat[:size].split([part.numel() for part in total])
    return [piece.view_as(part) for piece, part in zip(pieces, total)]


# ----------------------------------------------------------------------------------------------------------------------
# FSDP2: a sharded parameter is a DTensor, of which every rank holds its part


def apply_fsdp(model, device, world):
    """Shard every parameter over the ranks. FSDP all-gathers a block's parameters for its forward and its backward,
    those outside of blocks for a whole step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    mesh, options = init_device_mesh(device, (world,)), {}
    if device == "cuda":  # gather weights in bf16: autocast would keep bf16 copies of fp32 ones until backward
        bf16, fp32 = torch.bfloat16, torch.float32
        options["mp_policy"] = MixedPrecisionPolicy(bf16, reduce_dtype=fp32, cast_forward_inputs=False)

    def placement(p):
        return Shard(shard_dim(p, world))

    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=placement, **options)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    for module in (*model.blocks, model):
        module.set_gradient_divide_factor(1.0)  # gradients are summed, and divided once by the targets of the step
        module.set_force_sum_reduction_for_comms(True)  # a factor of 1 is otherwise an operation that gloo lacks


def shard_dim(p, world):
    """The dimension along which to shard a parameter: evenly, and rather between matrices than through them, as Muon
    needs whole ones."""
    return next((dim for dim, size in enumerate(p.shape) if size % world == 0), 0)


def is_dtensor(x):
    """Whether a tensor is sharded. (isinstance would need an import of a second, also for runs of one process.)"""
    return hasattr(x, "placements")


def to_local(x):
    """This rank's part of a DTensor; another tensor as it is."""
    return x.to_local() if is_dtensor(x) else x


def local_shard(whole, like):
    """A tensor that every rank has whole, sharded as `like` is (also if that is not sharded, or of another shape)."""
    if not is_dtensor(like) or whole.shape != like.shape:  # AdamW's step count is a single number
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather_state(value, rank):
    """A copy of nested dicts and lists of tensors in the CPU memory of rank 0, sharded ones gathered one at a time.

    All ranks must call it; on the others every tensor becomes None.
    """
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if is_dtensor(value) else value
        return whole.to("cpu", copy=True) if rank == 0 else None
    if isinstance(value, dict):
        return {key: gather_state(part, rank) for key, part in value.items()}
    return [gather_state(part, rank) for part in value] if isinstance(value, list) else value
