"""Preference tuning and the recipes: against float64 definitions, each pair alone, kill -9 and other world sizes."""

import json
import math
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, finish, log_lines, refused, start, state_of, train, weights, what_a_run_leaves
from test_model import small

import dpo
import train as train_script
from checkpoint import load
from data import TokenData, inputs_and_targets
from dpo import Preference, answer_sums
from model import Decoder, cross_entropy
from parallel import Ranks
from tokenizer import load_tokenizer

EOS = 1
MODEL = ["--block-size", "256", "--batch-tokens", "512", "--micro-batch", "2"]


# ----------------------------------------------------------------------------------------------------------------------
# The objective


def conversation(draw):
    return draw.choices(range(2, 50), k=draw.randrange(3, 9)), draw.choices(range(2, 50), k=draw.randrange(1, 6))


def row_of(pairs, T):
    """inputs and targets [T] of pairs ((prompt, chosen), (prompt, rejected)) of ids, packed as TokenData does."""
    ids, counted = [EOS], [0]
    for sides in pairs:
        for prompt, answer in sides:
            ids += [*prompt, *answer, EOS]
            counted += [0] * len(prompt) + [1] * len(answer) + [0]
    ids += [EOS] * (T + 1 - len(ids))
    targets = [i if c else -1 for i, c in zip(ids, counted + [0] * T)]
    return ids[:-1], targets[1:]


def log_probability(model, prompt, answer):
    """The definition: of one answer, from the logits of its text alone."""
    ids = torch.tensor([[EOS, *prompt, *answer]])
    logits = model(ids[:, :-1])[0].log_softmax(-1)
    return sum(logits[len(prompt) + i, token] for i, token in enumerate(answer))


def example(seed):
    """Rows of two, one and no pairs, and the pairs."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(3):
        prompt, chosen = conversation(draw)
        pairs.append(((prompt, chosen), (prompt, conversation(draw)[1])))
    rows = [row_of(pairs[:2], 64), row_of(pairs[2:], 64), row_of([], 64)]
    ids, targets = (torch.tensor(column) for column in zip(*rows))
    return ids, targets, pairs


@pytest.mark.parametrize("choices", [{}, {"beta": 0.7, "label_smoothing": 0.2}, {"sft_weight": 0.5}], ids=str)
def test_loss_and_every_gradient_are_those_of_the_definition(choices):
    model, origin = small(reset_id=EOS), small(reset_id=EOS)
    torch.manual_seed(1)
    for other in (model, origin):
        for p in other.parameters():
            torch.nn.init.normal_(p, std=0.3)
    ids, targets, pairs = example(0)
    objective = Preference(**choices)
    with torch.no_grad():
        reference, _ = answer_sums(origin(ids, targets, reduction="none"), targets, 4)
        gains = [[log_probability(origin, *side) for side in pair] for pair in pairs]
    torch.testing.assert_close(reference, torch.tensor([[*gains[0], *gains[1]], [*gains[2], 0, 0], [0] * 4]))
    sums = objective(model, ids, targets, reference)

    terms = []
    for pair, of_origin in zip(pairs, gains):
        of_model = [log_probability(model, *side) for side in pair]
        chosen, rejected = (now - before for now, before in zip(of_model, of_origin))
        z = objective.beta * (chosen - rejected)
        s = objective.label_smoothing
        loss = (1 - s) * torch.log(1 + torch.exp(-z)) + s * torch.log(1 + torch.exp(z))
        loss = loss - objective.sft_weight * of_model[0] / len(pair[0][1])
        kl = -(chosen + rejected) / 2
        rewards = objective.beta * chosen, objective.beta * rejected
        terms.append([loss, torch.ones(()), (z > 0).double(), z, *rewards, kl])
    expected = [sum(column) for column in zip(*terms)]
    torch.testing.assert_close(sums, torch.stack(expected).double(), rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    for got, right in zip(*(torch.autograd.grad(loss, parameters) for loss in (sums[0], expected[0]))):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-10)


@pytest.mark.quick
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_loss_of_each_token_has_the_gradient_of_the_plain_one(chunk):
    hidden = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    targets, factors = torch.randint(-1, 40, (3, 9)), torch.randn(3, 9, dtype=torch.float64)
    ours = cross_entropy(hidden, weight, targets, "none", chunk=chunk)
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    torch.testing.assert_close(ours, plain.view(3, 9), rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((factors * x.view(3, 9)).sum(), (hidden, weight)) for x in (ours, plain))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Data and runs


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tuning(tmp_path_factory):
    """Folders of a base model (base), chats and pairs with its tokenizer (chat, pairs)."""
    folder = tmp_path_factory.mktemp("tuning")
    draw = random.Random(0)
    chats, pairs = [], []
    for i in range(120):
        question = {"role": "user", "content": f"{i}?"}
        answer = "".join(draw.choices("好很不坏的书", k=draw.randrange(1, 9)))
        chats.append({"messages": [question, {"role": "assistant", "content": answer}]})
        pairs.append({"prompt": f"{i}?", "chosen": "好" + answer, "rejected": "坏" + answer})
    flags = ["--vocab-size", "300", "--workers", "1"]
    call("prepare.py", write_rows(folder / "chat.jsonl", chats), "--out", folder / "chat", *flags)
    shared = ["--workers", "1", "--tokenizer", folder / "chat"]
    call("prepare.py", write_rows(folder / "pairs.jsonl", pairs), "--out", folder / "pairs", *shared)
    train(folder / "chat", folder / "base", *MODEL, "--steps", "4")
    return folder


def tune(tuning, recipe, out, *flags, ok=True):
    """Run train.py with a recipe on the data of its kind, from the base."""
    data = tuning / {"sft": "chat", "dpo": "pairs"}[recipe]
    fixed = ["--micro-batch", "2", "--eval-tokens", "4096", "--log-every", "1", "--no-compile"]
    argv = ["--recipe", recipe, "--data", data, "--init-from", tuning / "base", "--out", out, *fixed, *flags]
    return call("train.py", *argv, ok=ok)


def test_samples_of_pairs_are_whole_and_hold_each_pair_once(tuning):
    tokenizer, seen = load_tokenizer(tuning / "pairs"), []
    for split in ("train", "val"):
        samples = TokenData(tuning / "pairs", split, 256)
        for i in range(len(samples)):
            ids, targets = inputs_and_targets(samples, i)
            answers, runs = [], np.flatnonzero(np.diff(np.append(-1, targets) >= 0))
            for start_of_run in runs[0::2]:
                stop = start_of_run + int(np.argmax(targets[start_of_run:] < 0))
                answers.append(tokenizer.decode(targets[start_of_run : stop - 1].tolist()))
            assert len(answers) % 2 == 0 and answers
            for chosen, rejected in zip(answers[0::2], answers[1::2]):
                assert chosen[0] == "好" and rejected[0] == "坏" and chosen[1:] == rejected[1:]
                seen.append(chosen)
    assert len(seen) == 120


def test_a_pair_too_long_for_a_sample_is_left_out_and_counted(tuning):
    with pytest.raises(ValueError, match="no train pair of answers fits into a block of 16"):
        TokenData(tuning / "pairs", "train", 16)
    lengths = np.diff(np.load(next((tuning / "pairs").glob("*-train.ends.npy"))).astype(int))
    samples = TokenData(tuning / "pairs", "train", int(np.median(lengths)))
    conversations = sum(rows.conversations for rows in samples.rows.values())
    left_out = sum(rows.left_out for rows in samples.rows.values())
    total = sum(shard["documents"] for shard in samples.shards)
    assert samples.documents == conversations == total - left_out and 0 < left_out < total
    assert (
        f"{conversations:,} pairs in {len(samples):,} samples" in samples.packed() and "0 lost" not in samples.packed()
    )


def test_the_reference_is_computed_once_and_known_by_its_weights(tuning):
    model, _, _ = load(tuning / "base")
    samples = TokenData(tuning / "pairs", "train", 256)
    samples.path = tuning / "cache"
    samples.path.mkdir()
    made = []

    def get_model():
        made.append(1)
        return model

    dpo.add_reference([samples], "a", get_model, 3, Ranks())
    first = samples.reference
    samples.reference = None
    dpo.add_reference([samples], "a", None, 5, Ranks())
    assert np.array_equal(samples.reference, first) and len(made) == 1
    dpo.add_reference([samples], "b", get_model, 5, Ranks())
    np.testing.assert_allclose(samples.reference, first, rtol=1e-5, atol=1e-4)
    assert len(made) == 2 and len(list(samples.path.glob("reference-*.npy"))) == 2
    ids, targets = (torch.from_numpy(a)[None] for a in inputs_and_targets(samples, 7))
    logits = model(ids).double().log_softmax(-1)[0]
    sums = [0.0]
    for t, target in enumerate(targets[0].tolist()):  # one run of targets after another
        if target >= 0:
            sums[-1] += logits[t, target].item()
        elif sums[-1]:
            sums.append(0.0)
    assert first[7].tolist() == pytest.approx((sums + [0.0] * 99)[: first.shape[1]], abs=1e-3)


def test_recipes_set_defaults_that_flags_override(tuning, tmp_path):
    args = train_script.get_args(["--recipe", "sft", "--lr", "0.01"])
    assert (args.lr, args.weight_decay, args.schedule, args.pack, args.optimizer) == (0.01, 0, "cosine", True, "adamw")
    printed = tune(tuning, "sft", tmp_path / "sft", "--batch-documents", "16", "--eval-every", "2", "--lr", "0.003")
    state = state_of(tmp_path / "sft", max(line["step"] for line in log_lines(tmp_path / "sft")))
    assert state["args"]["recipe"] == "sft" and state["args"]["epochs"] == 4 and state["chat"]
    assert "recipe=sft" in printed.stdout and "packed: " in printed.stdout
    scores = [line["val_loss"] for line in log_lines(tmp_path / "sft") if "val_loss" in line]
    assert scores[-1] < scores[0] and len(scores) > 2
    origin, tokenizer, _ = load(tuning / "base")
    base = Decoder(replace(origin.config, reset_id=tokenizer.eos_id))
    base.load_state_dict(origin.state_dict())
    held_out = TokenData(tuning / "chat", "val", 256, pack=True)
    logits, targets = (
        torch.cat(parts)
        for parts in zip(
            *(
                (base(torch.from_numpy(ids)[None])[0], torch.from_numpy(targets))
                for ids, targets in (inputs_and_targets(held_out, i) for i in range(len(held_out)))
            )
        )
    )
    assert scores[0] == pytest.approx(F.cross_entropy(logits, targets, ignore_index=-1).item(), abs=1e-5)
    result = call("train.py", "--resume", "--out", tmp_path / "sft", "--recipe", "dpo", ok=False)
    refused(result, "--resume: the run began with --recipe sft")


def test_preference_tuning_prefers_what_people_do(tuning, tmp_path):
    flags = ["--batch-documents", "16", "--lr", "0.003", "--eval-every", "4"]
    printed = tune(tuning, "dpo", tmp_path / "dpo", *flags).stdout
    lines = [line for line in log_lines(tmp_path / "dpo") if "val_loss" in line]
    assert lines[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-5) and lines[0]["step"] == 0
    assert lines[-1]["val_accuracy"] == 1 and lines[-1]["val_loss"] < 0.6
    assert lines[-1]["val_margin"] == pytest.approx(lines[-1]["val_chosen"] - lines[-1]["val_rejected"], abs=1e-5)
    assert "accuracy 1.000 | margin" in printed
    scored = call("eval.py", tmp_path / "dpo").stdout.splitlines()
    assert scored[0].split() == ["checkpoint", "loss", *Preference.NAMES, "likelier", "pairs"]
    _, loss, accuracy, *_ = scored[1].split()
    assert float(accuracy) == 1 and float(loss) == pytest.approx(lines[-1]["val_loss"], abs=1e-4)
    plain = call("eval.py", tuning / "base", "--data", tuning / "pairs").stdout.splitlines()
    assert plain[0].split() == ["checkpoint", "likelier", "pairs"]
    origin, tokenizer, _ = load(tuning / "base")
    base, held_out = Decoder(replace(origin.config, reset_id=tokenizer.eos_id)), TokenData(tuning / "pairs", "val", 256)
    base.load_state_dict(origin.state_dict())
    likelier = []
    for ids, targets in (map(torch.from_numpy, inputs_and_targets(held_out, i)) for i in range(len(held_out))):
        log_p = base(ids[None])[0].log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        ends = [i for i in range(len(targets)) if targets[i] < 0 <= targets[i - 1]]
        begins = [i for i in range(1, len(targets)) if targets[i - 1] < 0 <= targets[i]]
        answers = [log_p[begin:end].sum() for begin, end in zip(begins, [*ends, len(targets)])]
        likelier += [bool(chosen > rejected) for chosen, rejected in zip(answers[::2], answers[1::2])]
    assert float(plain[1].split()[1]) == pytest.approx(np.mean(likelier), abs=1e-4)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_five_kills_leave_the_bits_of_a_run_without_any(tuning, tmp_path, recipe, world):
    flags = ["--batch-documents", "8", "--save-every", "1", "--keep", "100", "--steps", "12", "--lr", "0.003"]
    data, out = tuning / {"sft": "chat", "dpo": "pairs"}[recipe], tmp_path / "killed"
    fixed = ["--micro-batch", "2", "--eval-tokens", "4096", "--log-every", "1", "--no-compile", "--eval-every", "0"]
    argv = ["--recipe", recipe, "--data", data, "--init-from", tuning / "base", *fixed, *flags]
    finish(start(world, ROOT / "train.py", *argv, "--out", tmp_path / "whole"))
    draw = random.Random(world)
    for kill in range(5):
        processes = start(world, ROOT / "train.py", *argv, "--out", out, "--resume")
        processes[0].wait_for(f"step {2 * kill + draw.randrange(1, 3):>5}/")
        for process in draw.sample(processes, len(processes)):
            process.kill()
        for process in processes:
            process.communicate()
    finish(start(world, ROOT / "train.py", *argv, "--out", out, "--resume"))
    assert weights(out, 12) == weights(tmp_path / "whole", 12)
    assert what_a_run_leaves(out, 12) == what_a_run_leaves(tmp_path / "whole", 12)


def test_exact_preference_runs_are_the_same_bits_at_1_and_2_processes(tuning, tmp_path):
    flags = ["--recipe", "dpo", "--data", tuning / "pairs", "--init-from", tuning / "base", "--micro-batch", "2"]
    flags += ["--batch-documents", "16", "--steps", "3", "--exact", "--no-compile", "--lr", "0.003"]
    for world in (1, 2):
        finish(start(world, ROOT / "train.py", *flags, "--out", tmp_path / str(world)))
    assert weights(tmp_path / "1", 3) == weights(tmp_path / "2", 3)


DPO = ["--recipe", "dpo", "--init-from", "BASE", "--data", "PAIRS"]
BAD = [
    (["--recipe", "sft", "--init-from", "BASE", "--data", "PAIRS"], "has pairs of answers: --recipe dpo"),
    (["--recipe", "dpo", "--init-from", "BASE", "--data", "CHAT"], "has no pairs of answers"),
    (["--data", "PAIRS", "--block-size", "256"], "has pairs of answers: --recipe dpo"),
    (["--recipe", "dpo", "--data", "PAIRS"], "--recipe dpo goes on from a trained model: name it with --init-from"),
    ([*DPO, "--beta", "0"], "--beta 0.0: expected more than 0"),
    ([*DPO, "--beta", "-1"], "--beta -1.0: expected more than 0"),
    ([*DPO, "--no-pack"], "--recipe dpo keeps pairs apart"),
    (["--data", "CHAT", "--sft-weight", "1"], "--sft-weight go with --recipe dpo"),
    ([*DPO, "--label-smoothing", "0.5"], "--label-smoothing 0.5: expected 0 or more, below 0.5"),
]


@pytest.mark.parametrize("flags, words", BAD)
def test_what_a_recipe_cannot_use_is_one_line(tuning, tmp_path, flags, words):
    named = {"BASE": tuning / "base", "PAIRS": tuning / "pairs", "CHAT": tuning / "chat"}
    flags = [named.get(flag, flag) for flag in flags]
    refused(call("train.py", "--out", tmp_path / "out", "--no-compile", *flags, ok=False), words)
    assert not (tmp_path / "out").exists()


def test_another_reference_at_a_resume_is_refused_unless_its_sums_are_there(tuning, tmp_path):
    origin = shutil.copytree(tuning / "base", tmp_path / "base")
    pairs = shutil.copytree(tuning / "pairs", tmp_path / "pairs", ignore=shutil.ignore_patterns("reference-*"))
    flags = ["--recipe", "dpo", "--data", pairs, "--init-from", origin, "--batch-documents", "8", "--micro-batch", "2"]
    flags += ["--no-compile", "--eval-every", "0", "--out", tmp_path / "dpo"]
    call("train.py", *flags, "--steps", "2")
    train(tuning / "chat", tmp_path / "other", *MODEL, "--steps", "5", "--seed", "1")
    shutil.rmtree(origin)
    shutil.copytree(tmp_path / "other", origin)
    call("train.py", *flags, "--steps", "3", "--resume")  # the file beside the data is enough
    for path in pairs.glob("reference-*"):
        path.unlink()
    refused(call("train.py", *flags, "--steps", "4", "--resume", ok=False), "is not the model that the run began with")
    refused(call("eval.py", tmp_path / "dpo", ok=False), "is not the model that the run began with")
    assert not list(pairs.glob("reference-*"))


def test_a_resume_computes_lost_or_damaged_sums_of_the_reference_again(tuning, tmp_path):
    pairs = shutil.copytree(tuning / "pairs", tmp_path / "pairs", ignore=shutil.ignore_patterns("reference-*"))
    flags = ["--recipe", "dpo", "--data", pairs, "--init-from", tuning / "base", "--batch-documents", "8"]
    flags += ["--micro-batch", "2", "--no-compile", "--eval-every", "0", "--out", tmp_path / "dpo"]
    call("train.py", *flags, "--steps", "2")
    sums = {path: np.load(path) for path in pairs.glob("reference-*")}
    lost, damaged = sums
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:50])
    call("train.py", *flags, "--steps", "3", "--resume")
    assert len(sums) == 2
    for path, before in sums.items():
        np.testing.assert_allclose(np.load(path), before, rtol=0, atol=1e-4)


def test_a_kill_before_the_first_checkpoint_repeats_no_line(tuning, tmp_path):
    out = tmp_path / "sft"
    argv = ["--recipe", "sft", "--data", tuning / "chat", "--init-from", tuning / "base", "--no-compile", "--out", out]
    argv += ["--log-every", "1", "--eval-every", "100", "--steps", "6", "--micro-batch", "2", "--batch-documents", "8"]
    (process,) = start(1, ROOT / "train.py", *argv)
    process.wait_for("step     2/")
    process.kill()
    process.communicate()
    finish(start(1, ROOT / "train.py", *argv, "--resume"))
    evaluated = [line["step"] for line in log_lines(out) if "val_loss" in line]
    assert evaluated == [0, 6]


def test_a_folder_with_pairs_and_texts_is_refused(tuning, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i}?", "chosen": "好", "rejected": "坏"} for i in range(30)])
    write_rows(tmp_path / "b.jsonl", [{"text": f"第{i}句话。"} for i in range(30)])
    flags = ["--out", tmp_path / "both", "--tokenizer", tuning / "chat", "--pipeline", "none"]
    call("prepare.py", tmp_path / "a.jsonl", tmp_path / "b.jsonl", *flags)
    with pytest.raises(ValueError, match="has pairs of answers and other text"):
        TokenData(tmp_path / "both", "train", 128)
