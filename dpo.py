"""Preference tuning: a model learns which of two answers people prefer, without a model of rewards.

    python prepare.py pairs.jsonl --out data/pairs --tokenizer data/default
    python train.py --recipe dpo --data data/pairs --init-from out/sft --out out/dpo

Direct Preference Optimization (DPO, Rafailov et al. 2023, arXiv 2305.18290, equation 7). The loop is train.py's; here
are the objective and the reference: the model that training starts from, which stays as it is. What it says of every
answer is computed once.

Shapes: B batch, T time, A the most answers in a sample. A sample of pairs is a row of chats, the one with the chosen
answer before the one with the rejected answer; each run of counted targets is an answer.
"""

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import isolate, load
from common import track
from data import evenly_spaced, inputs_and_targets, write_array


def answer_sums(nats, targets, n):
    """nats [B, T] of targets [B, T] (-1: not counted) -> of each answer log-probability and tokens, [B, n] each.

    A row has at most n answers; those that it has not are 0.
    """
    counted = targets >= 0
    begins = counted & ~F.pad(counted[:, :-1], (1, 0))
    number = begins.cumsum(1) - 1
    # A product with 0 and 1, not scatter_add, which on CUDA adds in any order.
    member = counted[..., None] & (number[..., None] == torch.arange(n, device=targets.device))  # [B, T, n]
    return -(nats[..., None] * member).sum(1), member.sum(1)


@dataclass(frozen=True)
class Preference:
    """The objective. Called with a micro-batch it returns sums over its pairs: the loss, the pairs, and of NAMES.

    Rewards are beta (log p(answer) - log p_reference(answer)), in nats. accuracy: whether the chosen answer has the
    larger one; margin: their difference. kl: log p_reference - log p, the mean over both answers; it estimates
    KL(reference, model) as far as the answers are such as the reference gives.
    """

    NAMES = ("accuracy", "margin", "chosen", "rejected", "kl")
    beta: float = 0.1
    label_smoothing: float = 0.0  # the share of pairs that are taken to be the wrong way round
    sft_weight: float = 0.0  # of a second loss: nats of the chosen answer, per token

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise ValueError(f"--beta {self.beta}: expected more than 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label-smoothing {self.label_smoothing}: expected 0 or more, below 0.5")

    def __call__(self, model, ids, targets, reference):
        """ids, targets [B, T], reference [B, A] -> [7], in the order above; the first is the sum to minimise."""
        nats = model(ids, targets, reduction="none")
        return self.sums(*answer_sums(nats, targets, reference.shape[1]), reference)

    def sums(self, answers, lengths, reference):
        """Log-probabilities and tokens of answers, and the reference's, all [B, A] -> [7], as the call."""
        gained = answers - reference
        chosen, rejected, exist = gained[:, 0::2], gained[:, 1::2], lengths[:, 0::2] > 0
        margin = self.beta * (chosen - rejected)
        loss = -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)
        loss = loss - self.sft_weight * answers[:, 0::2] / lengths[:, 0::2].clamp(min=1)
        rewards = self.beta * chosen, self.beta * rejected
        terms = loss, torch.ones_like(loss), (margin > 0).to(loss.dtype), margin, *rewards, -(chosen + rejected) / 2
        return torch.stack([(term * exist).sum() for term in terms])


# ----------------------------------------------------------------------------------------------------------------------
# The reference


def weights_hash(model):
    """sha256 of all weights, as text."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode("utf-8"))
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def most_answers(samples):
    """The most answers in one of the samples, at least two."""
    return 2 * max((int(np.diff(rows.first).max(initial=1)) for rows in samples.rows.values()), default=1)


@torch.no_grad()
def score_answers(model, samples, numbers, batch, ranks, stopping=None):
    """Log-probabilities and tokens of all answers in the samples of these numbers, [len(numbers), A] float32 each.

    Each rank scores a part. stopping(), if given, is asked before each forward: None if it is true.
    """
    device = model.embedding.device
    result = torch.zeros(2, len(numbers), most_answers(samples))
    # -1 pads: all ranks make equally many forwards, as FSDP needs, of one shape
    places = np.pad(np.arange(len(numbers)), (0, -len(numbers) % (batch * ranks.world)), constant_values=-1)
    own = places.reshape(-1, batch)[ranks.rank :: ranks.world]
    for some in track(own, "scoring answers", "batches", shown=ranks.rank == 0):
        if stopping and stopping():
            return None
        rows = zip(*(inputs_and_targets(samples, numbers[max(i, 0)]) for i in some))
        ids, targets = (torch.from_numpy(np.stack(row)).to(device) for row in rows)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            nats = model(ids, targets, reduction="none")
        scored = torch.stack([part.float() for part in answer_sums(nats, targets, result.shape[2])]).cpu()
        result[:, some[some >= 0]] = scored[:, some >= 0]
    if ranks.world > 1:
        torch.distributed.all_reduce(result)  # the others' parts are zeros
    return result


def load_reference(path, weights, eos_id, device):
    """The model that training began with, if its weights_hash is still that; else ValueError."""
    model = load(path)[0]
    if weights_hash(model) != weights:
        raise ValueError(f"--init-from {path} is not the model that the run began with: bring it back")
    return isolate(model, eos_id).to(device)


def read_sums(path, shape):
    """What add_reference wrote, or None if it is not there or damaged: it is then computed again."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        found = np.load(path, allow_pickle=False)
        return found if found.shape == shape else None


def add_reference(splits, weights, get_model, batch, ranks):
    """Set the attribute reference of each of the splits: from a file beside the data, or computed.

    weights: the reference's weights_hash. get_model(): the reference, called only if there is no such file.
    """
    for samples in splits:
        identity = json.dumps([weights, samples.block_size, samples.shard_hashes()])
        path = samples.path / f"reference-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy"
        samples.reference = read_sums(path, (len(samples), most_answers(samples)))
        if ranks.from_rank_0(samples.reference is not None):
            continue
        ranks.say(f"scoring {len(samples):,} samples with the reference, once: they are then read from {path}")
        samples.reference = score_answers(get_model(), samples, range(len(samples)), batch, ranks)[0].numpy()
        if ranks.rank == 0:
            with contextlib.suppress(OSError):  # a folder that cannot be written to: it is done at each start
                write_array(path, samples.reference)
        ranks.barrier()


# ----------------------------------------------------------------------------------------------------------------------
# Held-out pairs


def score_pairs(model, samples, objective, batch, max_tokens, ranks, stopping=None):
    """Means over the pairs of evenly spaced samples -> {"loss", NAMES, "likelier", "pairs"}, or None if stopping().

    likelier: the share of chosen answers that are likelier than the rejected ones. Without a reference there is only
    this.
    """
    numbers = evenly_spaced(samples, max_tokens)
    scored = score_answers(model, samples, numbers, batch, ranks, stopping)
    if scored is None:
        return None
    answers, lengths = scored
    pairs = int((lengths[:, 0::2] > 0).sum())
    means = {"likelier": (answers[:, 0::2] > answers[:, 1::2]).sum().item() / max(pairs, 1), "pairs": pairs}
    if samples.reference is None:
        return means
    loss, _, *others = (objective.sums(answers, lengths, torch.from_numpy(samples.reference[numbers]))).tolist()
    named = zip(("loss", *objective.NAMES), (loss, *others))
    return {name: value / max(pairs, 1) for name, value in named} | means
