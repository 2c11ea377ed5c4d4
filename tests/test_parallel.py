"""Several processes: the same run at any world size, sums in a fixed order, FSDP, nodes."""

import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, call, finish, free_port, log_lines, losses, start, torchrun, weights

from parallel import Ranks, exact_sums, gather_state, local_shard, shard_dim

OVERLAP = """
import os, sys, torch, torch.distributed as dist
from model import Config, Decoder
from parallel import start_ranks, sum_over_ranks, summing_gradients

ranks = start_ranks("cpu")
model = Decoder(Config(tie_embeddings=sys.argv[1] == "tied"))
params = list(model.parameters())
torch.manual_seed(ranks.rank)
ids = torch.randint(8192, (2, 129))
backward = lambda: model(ids[:, :-1], ids[:, 1:]).backward()
backward()
sum_over_ranks([p.grad for p in params])
expected = [p.grad for p in params]
for p in params:
    p.grad = None
number_of, started, events = {p: i for i, p in enumerate(params)}, [], []
all_reduce = dist.all_reduce
def record(tensor, **options):
    started.append(next(i for i, p in enumerate(params) if p.grad is tensor))
    events.append("sum")
    return all_reduce(tensor, **options)
dist.all_reduce = record
with summing_gradients(params):
    backward()
    events.append("end of backward")
assert started == list(reversed(range(len(params)))), started
assert events.index("end of backward") > len(params) // 2, events
assert all(torch.equal(p.grad, whole) for p, whole in zip(params, expected))
backward()
assert len(started) == len(params)  # afterwards nothing is summed by itself
print("equal")
os._exit(0)
"""


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_gradients_summed_during_backward_are_those_summed_after_it(head, tmp_path):
    """The last parameter's first, most of them before backward ends, to the same bits."""
    script = tmp_path / "overlap.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}){OVERLAP}", encoding="utf-8")
    assert torchrun(2, script, head).stdout.count("equal") == 2


# ----------------------------------------------------------------------------------------------------------------------
# Of one process


@pytest.mark.quick
def test_a_single_process_needs_no_group():
    ranks = Ranks()
    ranks.barrier()
    ranks.check_equal("flags", "x")
    assert ranks.from_rank_0(3) == 3 and ranks.sum(1, 2.5) == [1.0, 2.5]


@pytest.mark.quick
@pytest.mark.parametrize("n_micro", [1, 2, 3, 4, 6, 12, 20])
def test_exact_sums_are_a_tree_whose_branches_do_not_depend_on_who_makes_them(n_micro):
    """The halves that two or four processes would sum each, joined, are the same bits as the whole."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(50, generator=generator) * 10.0 ** random.Random(i).randint(-4, 4) for i in range(n_micro)]

    def summed(first, count):
        return exact_sums(lambda i: [numbers[first + i].clone()], count, Ranks())[0]

    whole, world = summed(0, n_micro), 1
    torch.testing.assert_close(whole, torch.stack(numbers).double().sum(0).float(), rtol=1e-5, atol=1e-5)
    while n_micro % (2 * world) == 0:
        world *= 2
        parts = [summed(rank * n_micro // world, n_micro // world) for rank in range(world)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[0::2], parts[1::2])]
        assert torch.equal(parts[0], whole), world


@pytest.mark.quick
def test_fsdp_shards_between_matrices_where_it_can():
    for shape, world, dim in (((6, 4, 8), 2, 0), ((3, 4, 8), 2, 1), ((3, 5, 8), 4, 2), ((3, 5), 2, 0), ((1,), 2, 0)):
        assert shard_dim(torch.empty(shape), world) == dim


@pytest.mark.quick
def test_a_gathered_state_is_a_copy_on_rank_0_and_nothing_elsewhere():
    tensor = torch.ones(3)
    state = {"a": [tensor, 5], "b": {"c": tensor}}
    copy = gather_state(state, rank=0)
    tensor.zero_()
    assert copy["a"][0].tolist() == copy["b"]["c"].tolist() == [1, 1, 1] and copy["a"][1] == 5
    assert gather_state(state, rank=1) == {"a": [None, 5], "b": {"c": None}}
    assert local_shard(tensor, tensor) is tensor


# ----------------------------------------------------------------------------------------------------------------------
# Data parallel


def assert_near(run, other, step):
    """Weights within 1e-3: a step moves an embedding by up to 0.07, by the mere sign of a gradient where it is tiny."""
    one, two = (torch.load(path / f"step-{step:08d}" / "model.pt", weights_only=True) for path in (run, other))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-3)


def test_two_processes_give_the_loss_of_one(whole_run, small_data, tmp_path):
    torchrun(2, "train.py", "--data", small_data, "--out", tmp_path, *TINY, "--steps", 8)
    assert losses(tmp_path) == pytest.approx(losses(whole_run.out), abs=1e-5)
    assert_near(whole_run.out, tmp_path, 8)


def test_two_nodes_are_two_processes(whole_run, small_data, tmp_path):
    """An agent for each node, as they would be started, on one machine."""
    launch = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d".split()
    launch += ["--rdzv_endpoint", f"localhost:{free_port()}"]
    command = [sys.executable, *launch, "train.py", "--data", small_data, "--out", tmp_path, *TINY, "--steps", 8]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    nodes = [subprocess.Popen([str(part) for part in command], cwd=ROOT, **pipes) for _ in range(2)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted(output.count("done: ") for output, _ in outputs) == [0, 1]
    assert losses(tmp_path) == pytest.approx(losses(whole_run.out), abs=1e-5)


OTHER_SEED = """
import os, runpy, sys
sys.argv += ["--seed", os.environ["RANK"]]
runpy.run_path("train.py", run_name="__main__")
"""


def test_ranks_that_were_started_differently_are_refused(small_data, tmp_path):
    script = tmp_path / "other_seed.py"
    script.write_text(OTHER_SEED, encoding="utf-8")
    processes = start(2, script, "--data", small_data, "--out", tmp_path / "run", *TINY, "--steps", 2)
    said = processes[1].communicate()[1]
    processes[0].kill()
    processes[0].communicate()
    assert processes[1].returncode == 1
    expected = "has other flags than rank 0: start all nodes alike, on one shared disk"
    assert expected in said.strip().splitlines()[-1]


HIDDEN_CHECKPOINT = """
import os
import train

def no_checkpoint(args, argv, ranks):
    args, log, *found = open_run(args, argv, ranks)
    return args, log, None, None

open_run = train.open_run
if os.environ["RANK"] == "1":  # as on a node that does not see the disk of the others
    train.open_run = no_checkpoint
train.run_rank(train.main)
"""


def test_a_rank_that_does_not_see_the_checkpoint_is_refused(whole_run, tmp_path):
    shutil.copytree(whole_run.out, tmp_path / "run")
    script = tmp_path / "hidden.py"
    script.write_text(HIDDEN_CHECKPOINT, encoding="utf-8")
    processes = start(2, script, "--resume", "--out", tmp_path / "run", "--steps", 12)
    said = processes[1].communicate()[1]
    processes[0].kill()
    processes[0].communicate()
    assert processes[1].returncode == 1 and "has other checkpoint than rank 0" in said.strip().splitlines()[-1]


NAN_ON_ONE_RANK = """
import math, os
import train
calls, forward = 0, train.Decoder.forward

def broken(self, ids, targets=None, cache=None, reduction="mean"):
    global calls
    loss = forward(self, ids, targets, cache, reduction)
    if targets is None or not self.training:  # a sample, an evaluation
        return loss
    calls += 1  # of 2 micro-batches a step
    return loss * math.nan if os.environ["RANK"] == "1" and (calls + 1) // 2 in (3, 4) else loss

train.Decoder.forward = broken
train.run_rank(train.main)
"""


@pytest.mark.parametrize("mode", [[], ["--shard"], ["--exact"]], ids=" ".join)
def test_a_nan_on_one_rank_is_skipped_by_all(small_data, tmp_path, mode):
    script, run = tmp_path / "nan.py", tmp_path / "run"
    script.write_text(NAN_ON_ONE_RANK, encoding="utf-8")
    flags = ["--steps", 6, "--eval-every", 0, "--save-every", 1, "--keep", 9, *mode]
    output = finish(start(2, script, "--data", small_data, "--out", run, *TINY, *flags))
    assert "| skipped 2" in output
    assert sorted(path.name for path in run.glob("step-*")) == [f"step-{step:08d}" for step in (1, 2, 5, 6)]
    assert [line["skipped"] for line in log_lines(run) if "loss" in line] == [0, 0, 1, 2, 2, 2]


def test_five_bad_steps_of_one_rank_end_the_run_on_all(small_data, tmp_path):
    script = tmp_path / "nan.py"
    script.write_text(NAN_ON_ONE_RANK.replace("in (3, 4)", "> 2"), encoding="utf-8")
    flags = ["--steps", 20, "--eval-every", 0, "--save-every", 1, "--log-every", 2]
    processes = start(2, script, "--data", small_data, "--out", tmp_path / "run", *TINY, *flags)
    said = [process.communicate()[1].strip().splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    for line in said:
        assert line.startswith("5 steps in a row had a loss or a gradient that cannot be right: the run ends at step 7")
        assert str(tmp_path / "run" / "step-00000002") in line


# ----------------------------------------------------------------------------------------------------------------------
# --exact


@pytest.mark.parametrize("precision, tolerance", [("--no-bf16", 1e-5), ("--bf16", 0.01)])
def test_exact_runs_are_the_same_bits_at_1_2_and_4_processes_and_when_their_number_changes(
    small_data, tmp_path, precision, tolerance
):
    flags = ["--data", small_data, *TINY, precision, "--save-every", 0, "--eval-every", 0, "--steps", 6]
    flags += ["--batch-tokens", 768]  # 12 micro-batches
    for world in (1, 2, 4):
        saves = ["--save-every", 2, "--keep", 3] if world == 2 else []
        finish(start(world, "train.py", "--out", tmp_path / str(world), *flags, "--exact", *saves))
    one = weights(tmp_path / "1", 6)
    assert weights(tmp_path / "2", 6) == weights(tmp_path / "4", 6) == one
    for kept, world in ((2, 1), (4, 2)):  # two steps each on two processes, on one, and on two again
        for step in range(kept + 2, 8, 2):
            shutil.rmtree(tmp_path / "2" / f"step-{step:08d}")
        finish(start(world, "train.py", "--resume", "--out", tmp_path / "2"))
    assert weights(tmp_path / "2", 6) == one
    finish(start(2, "train.py", "--out", tmp_path / "plain", *flags))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "1"), abs=tolerance)
    assert weights(tmp_path / "plain", 6) != one


# ----------------------------------------------------------------------------------------------------------------------
# FSDP


def test_fsdp_trains_as_one_process_does_and_checkpoints_are_exchangeable(whole_run, small_data, tmp_path):
    flags = ["--shard", "--save-every", 4, "--eval-every", 4]
    sharded = tmp_path / "sharded"
    finish(start(2, "train.py", "--data", small_data, "--out", sharded, *TINY, "--steps", 8, *flags))
    assert losses(sharded) == pytest.approx(losses(whole_run.out), abs=1e-5)
    assert_near(whole_run.out, sharded, 8)
    # From the middle on: sharded again, which gives the same bits; from one process to FSDP; from FSDP to one process.
    for name, source, world, extra in (
        ("again", sharded, 2, []),
        ("to-fsdp", whole_run.out, 2, ["--shard"]),
        ("to-one", sharded, 1, ["--no-shard"]),
    ):
        shutil.copytree(source, tmp_path / name)
        shutil.rmtree(tmp_path / name / "step-00000008")
        command = ["train.py", "--resume", "--out", tmp_path / name, *extra]
        finish(start(world, *command))
        assert losses(tmp_path / name) == pytest.approx(losses(whole_run.out), abs=1e-5)
    assert weights(tmp_path / "again", 8) == weights(sharded, 8)


def test_fsdp_where_no_matrix_can_be_sharded_evenly(small_data, tmp_path):
    flags = ["--data", small_data, *TINY, "--ffn", "dense", "--optimizer", "adamw", "--steps", 4, "--batch-tokens", 384]
    call("train.py", "--out", tmp_path / "1", *flags)
    finish(start(3, "train.py", "--out", tmp_path / "3", *flags, "--shard"))
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), abs=1e-5)
