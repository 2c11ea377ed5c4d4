"""What makes a step of gradients: Muon for the matrices, AdamW for the rest, the schedule, the test for a bad step.

    optimizers = make_optimizers(model, "muon", lr=6e-3, weight_decay=0.1)
    norm = scale_and_clip(params, count, max_norm=1.0)   # after backward of a sum over `count` targets
    bad = is_bad(loss, norm, recent)
    update(optimizers, lr, skip=bad)

Nothing here waits for a GPU: loss, norm and bad are tensors on the device.
"""

import math

import torch
import torch.distributed as dist

from parallel import is_dtensor, local_shard, to_local

# ----------------------------------------------------------------------------------------------------------------------
# Muon

MUON_BATCH = 1 << 26  # numbers to orthogonalize at a time: all layers of a large model together would take gigabytes


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The last two dimensions of a parameter are the matrix; each expert and each head has its own. Updates have the size
    of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate serves both. found_inf = 1 (a tensor) skips
    the step, as in torch's fused AdamW. bf16: orthogonalize in it, else in fp32.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, bf16=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.bf16 = bf16
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self):
        good = 1 - self.found_inf
        for group in self.param_groups:
            for params, sharded in same_shapes(group["params"]):
                gradients = [self.nesterov(p, group["momentum"], good) for p in params]
                sizes = [len(gradient) for gradient in gradients]
                x = torch.cat(gradients)
                x = x.to(torch.bfloat16 if self.bf16 else torch.float32)
                updates = (orthogonalize(x) if sharded else orthogonalize_over_ranks(x)).split(sizes)
                rate = group["lr"] * 0.2 * max(params[0].shape[-2:]) ** 0.5 * good
                decay = 1 - group["lr"] * group["weight_decay"] * good
                for p, update in zip(params, updates):
                    if is_dtensor(p) and splits_matrices(p):  # every rank has the whole matrices: it takes its part
                        update = local_shard(update.view(p.shape), p).to_local()
                    p = to_local(p)
                    p.mul_(decay).addcmul_(update.view_as(p), rate, value=-1)

    def nesterov(self, p, momentum, good):
        """Update the momentum of p; the gradient to orthogonalize, whole matrices [n, rows, columns]."""
        if not self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        gradient = p.grad.nan_to_num_(0, 0, 0)  # 0 times NaN would still be NaN
        buffer = self.state[p]["momentum"].lerp_(gradient, (1 - momentum) * good)
        x = gradient.lerp(buffer, momentum)
        x = x.full_tensor() if is_dtensor(x) and splits_matrices(p) else to_local(x)
        return x.reshape(-1, *p.shape[-2:])


def same_shapes(params):
    """Group parameters whose matrices have one shape, to orthogonalize them together, at most MUON_BATCH numbers each.

    Yields (params, sharded): sharded if each rank already holds different matrices.
    """
    groups = {}
    for p in params:
        batches = groups.setdefault((p.shape[-2:], is_dtensor(p) and not splits_matrices(p)), [[]])
        if batches[-1] and sum(q.numel() for q in batches[-1]) + p.numel() > MUON_BATCH:
            batches.append([])
        batches[-1].append(p)
    for (_, sharded), batches in groups.items():
        for batch in batches:
            yield batch, sharded


def splits_matrices(p):
    """Whether FSDP shards the matrices of p themselves, so that a rank holds parts of them."""
    return p.placements[0].dim >= p.ndim - 2


def orthogonalize_over_ranks(x):
    """orthogonalize() of matrices that every rank has: each rank does its part of them, all get the result."""
    if not dist.is_initialized():
        return orthogonalize(x)
    world, rank = dist.get_world_size(), dist.get_rank()
    part = orthogonalize(torch.nn.functional.pad(x, (0, 0) * 2 + (0, -len(x) % world)).chunk(world)[rank])
    whole = part.new_empty(world * len(part), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous())
    return whole[: len(x)]


def orthogonalize(x, steps=5):
    """[N, m, n] -> about the nearest matrices with singular values 1, by a quintic Newton-Schulz iteration."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):  # x <- 3.4445 x + (-4.7750 g + 2.0315 g^2) x, where g = x x^T
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers

# Learning rates as multiples of --lr, found on the demo model. An embedding row sees few tokens and wants large steps;
# norms, biases and routers take the same. The last matrix of a feed-forward layer wants small ones.
REST_RATE, HEAD_RATE, W_OUT_RATE = 12.0, 6.0, 1 / 6
GROUPS = {"qkv": "matrices", "out": "matrices", "w_in": "matrices", "w_out": "w_out", "head": "head"}  # others: "rest"


def make_optimizers(model, optimizer, lr, weight_decay, bf16=False):
    """Muon (in bf16 or fp32) and AdamW, or "adamw": all of it at one rate, as in nanoGPT. Each parameter is in exactly
    one group; `lr_scale` multiplies the rate."""
    groups = {"matrices": [], "w_out": [], "head": [], "rest": []}
    for name, p in model.named_parameters():
        groups[GROUPS.get(name.rpartition(".")[2], "rest")].append(p)
    if optimizer == "adamw":
        decayed, others = groups["matrices"] + groups["w_out"], groups["head"] + groups["rest"]
        by_decay = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        by_decay = [group | {"lr_scale": 1.0} for group in by_decay]
        return [torch.optim.AdamW(by_decay, lr=lr, betas=(0.9, 0.95), fused=True)]
    matrices = [
        {"params": groups["matrices"], "lr_scale": 1.0, "weight_decay": weight_decay},
        {"params": groups["w_out"], "lr_scale": W_OUT_RATE, "weight_decay": weight_decay},
    ]
    rest = [
        {"params": groups["rest"], "lr_scale": REST_RATE, "weight_decay": 0.0},
        {"params": groups["head"], "lr_scale": HEAD_RATE, "weight_decay": 0.0},
    ]
    rest = [group for group in rest if group["params"]]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.8, 0.99), fused=True)  # betas: docs/experiments.md
    return [Muon(matrices, lr=lr, bf16=bf16), adamw]


def load_optimizers(optimizers, saved):
    """Take over the state of every parameter from saved state dicts; rates and decay stay as the flags say now."""
    for optimizer, state_dict in zip(optimizers, saved, strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            i: {key: local_shard(value, params[i]).clone() for key, value in values.items()}
            for i, values in state_dict["state"].items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def update(optimizers, lr, skip):
    """One step at learning rate lr with the gradients that are there, and without them afterwards.

    skip: a bool tensor on the device; where it is true no bit of weights and optimizers changes.
    """
    # Fused AdamW does not know found_inf on MPS: there the device is waited for.
    skipped = skip.device.type == "mps" and bool(skip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.found_inf = skip.float()
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ----------------------------------------------------------------------------------------------------------------------
# Schedule, clipping, bad steps


def lr_factor(step, progress, args):
    """Share of the peak learning rate at a step (0 is the first) and at a share of the run in [0, 1]."""
    # 1. linear warm-up, over steps or over a share of the run
    done = step + 1 if args.warmup >= 1 else progress + (1 / args.steps if args.steps else 0)
    warm = min(1.0, done / args.warmup) if args.warmup else 1.0
    # 2. wsd: constant, then linearly to 0 over the last `decay` of the run
    if args.schedule == "wsd":
        return min(warm, (1 - progress) / args.decay) if args.decay else warm
    # 3. cosine, down to 0
    return warm * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def scale_and_clip(params, count, max_norm):
    """Divide the gradients of a sum by its count and clip them to max_norm (0: no limit) -> the norm before clipping.

    One pass over the gradients does both. All tensors stay on the device.
    """
    gradients = [p.grad for p in params]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = (norm.full_tensor() if is_dtensor(norm) else norm) / count
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)
    torch._foreach_mul_([to_local(gradient) for gradient in gradients], clip / count)
    return norm


# A step is bad, and skipped, if its loss or gradient is NaN or infinite, or if the loss stands out from those before.
SPIKE = 6.0  # standard deviations above the mean
RECENT_STEPS = 64  # good steps to compare with
MAX_SKIPPED = 5  # bad steps in a row that end a run


def is_bad(loss, norm, recent):
    """Whether to skip a step, a bool tensor: from its loss, the norm of its gradient, and the losses of the last
    RECENT_STEPS good steps (NaN where there were none yet: then no loss stands out)."""
    return ~(loss + norm).isfinite() | (loss > recent.mean() + SPIKE * recent.std(correction=0))
