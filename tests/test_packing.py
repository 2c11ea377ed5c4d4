"""Packing: whole conversations in rows, against a slow best fit, against each conversation alone, and in training."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import call, losses, refused, train, what_a_run_leaves
from test_model import small

from data import TokenData, inputs_and_targets
from packing import best_fit, pack_shard
from tokenizer import load_tokenizer

START, ASSISTANT, EOS = 90, 91, 99


def slow_best_fit(lengths, capacity):
    rooms, row_of = [], [-1] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not lengths[i]:
            continue
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[i]]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        least = min(rooms[row] for row in fitting)
        row_of[i] = max(row for row in fitting if rooms[row] == least)
        rooms[row_of[i]] -= lengths[i]
    return rooms, row_of


@pytest.mark.quick
@pytest.mark.parametrize("seed", range(8))
def test_best_fit_is_that_of_a_slow_search(seed):
    draw = random.Random(seed)
    lengths = [draw.choice([0, *range(1, 51)]) for _ in range(draw.randrange(200))]
    rooms, expected = slow_best_fit(lengths, 50)
    row_of = best_fit(np.array(lengths, dtype=int), 50).tolist()
    filled = [sum(length for length, row in zip(lengths, row_of) if row == r) for r in range(len(rooms))]
    assert max(row_of, default=-1) + 1 == len(rooms) and max(filled, default=0) <= 50
    assert sorted(filled) == sorted(50 - room for room in rooms)  # which of equally full rows is taken does not matter
    assert [row < 0 for row in row_of] == [length == 0 for length in lengths]


def conversation(draw, turns, size):
    """ids and mask of a system turn and some (question, answer) turns."""
    ids, mask = [START, *draw.choices(range(50), k=3)], [0] * 4
    for turn in range(turns):
        for counted in (0, 1):
            n = draw.randrange(1, size)
            ids += [START, 80 + turn, *draw.choices(range(50), k=n)]
            mask += [0, 0] + [counted] * n
    return [*ids, EOS], [*mask, 0]


def shard_of(conversations):
    ids, masks = zip(*conversations)
    ends = np.cumsum([len(some) for some in ids])
    return np.concatenate(ids), np.concatenate(masks).astype(np.uint8), ends


@pytest.mark.quick
def test_every_conversation_that_fits_is_in_one_row_and_whole():
    draw = random.Random(0)
    conversations = [conversation(draw, draw.randrange(1, 5), 9) for _ in range(300)]
    tokens, mask, ends = shard_of(conversations)
    rows = pack_shard(tokens, mask, ends, 100)
    found = []
    for i in range(len(rows)):
        row = np.concatenate([tokens[start:stop] for start, stop in rows[i]])
        assert len(row) <= 100 and row[-1] == EOS
        found += [part.tolist() for part in np.split(row, np.flatnonzero(row == EOS)[:-1] + 1)]
    assert sorted(found) == sorted(ids for ids, _ in conversations)
    assert (rows.conversations, rows.cut, rows.left_out, rows.tokens) == (300, 0, 0, len(tokens))
    assert len(rows) < 1.06 * len(tokens) / 100 + 1
    again = pack_shard(tokens, mask, ends, 100)
    assert (again.parts == rows.parts).all() and (again.first == rows.first).all()


@pytest.mark.quick
def test_a_long_conversation_loses_its_oldest_turns_and_never_its_system_turn():
    draw = random.Random(1)
    ids, mask = conversation(draw, 6, 9)
    tokens, masks, ends = shard_of([(ids, mask), ([START, 1, EOS], [0, 0, 0])])
    turn_starts = [i for i, token in enumerate(ids) if token == START]
    questions = turn_starts[1::2]
    for capacity in range(5, len(ids)):
        rows = pack_shard(tokens, masks, ends, capacity)
        kept = next((q for q in questions if questions[0] + len(ids) - q <= capacity), None)
        assert (rows.cut, rows.left_out) == (int(kept is not None), int(kept is None))
        if kept is not None:
            assert [part for i in range(len(rows)) for part in rows[i]][:2] == [[0, questions[0]], [kept, len(ids)]]


def test_conversations_in_a_sample_do_not_see_each_other(small_data, tmp_path):
    """The nats of a packed sample are those of its conversations alone, each after an end of document."""
    data, tokenizer = prepared_chats(small_data, tmp_path, 40), load_tokenizer(small_data)
    packed = TokenData(data, "train", 256, pack=True)
    model = small(torch.float64, vocab_size=tokenizer.vocab_size, block_size=256, reset_id=tokenizer.eos_id)
    several = 0
    for i in range(len(packed)):
        ids, targets = inputs_and_targets(packed, i)
        assert len(ids) == len(targets) == 256 and ids[0] == tokenizer.eos_id
        with torch.no_grad():
            together = model(torch.tensor(ids[None]), torch.tensor(targets[None]), reduction="sum").item()
            alone, ends = 0.0, np.flatnonzero(ids == tokenizer.eos_id).tolist()
            for start, end in zip(ends, [*ends[1:], 256]):  # each from the end of the one before
                one, wanted = (torch.tensor(a[start:end][None]) for a in (ids, targets))
                if (wanted >= 0).any():
                    alone += model(one, wanted, reduction="sum").item()
                    several += 1
        assert together == pytest.approx(alone, abs=1e-9)
    assert several > len(packed) + 5


def prepared_chats(small_data, tmp_path, n):
    draw = random.Random(0)
    words = "却说曹操引兵渡河正遇关公在前云长大怒提刀便斩"
    rows = []
    for i in range(n):
        question, answer = ("".join(draw.choices(words, k=draw.randrange(3, 20))) for _ in range(2))
        rows.append({"question": f"{i}{question}", "answer": answer})
    (tmp_path / "chat.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    call("prepare.py", tmp_path / "chat.jsonl", "--out", tmp_path / "data", "--tokenizer", small_data, "--workers", 1)
    return tmp_path / "data"


def test_a_packed_run_resumes_to_the_same_bits_and_is_scored_as_it_was_trained(small_data, tmp_path):
    data = prepared_chats(small_data, tmp_path, 120)
    flags = ["--pack", "--block-size", 256, "--micro-batch", 1, "--log-every", 1]
    whole = train(data, tmp_path / "whole", *flags, "--steps", 6)
    train(data, tmp_path / "halves", *flags, "--steps", 6, "--save-every", 3)
    for path in (tmp_path / "halves").glob("step-00000006"):
        path.rename(tmp_path / "later")
    call("train.py", "--resume", "--out", tmp_path / "halves")
    assert what_a_run_leaves(tmp_path / "halves", 6) == what_a_run_leaves(tmp_path / "whole", 6)
    [line] = [line for line in whole.stdout.splitlines() if line.startswith("packed: ")]
    packed = TokenData(data, "train", 256, pack=True)
    assert line == packed.packed() and f"conversations in {len(packed)} samples" in line and "0 lost" in line
    assert len(losses(tmp_path / "whole")) == 6
    val_loss = whole.stdout.splitlines()[-2].split("val loss ")[1].split(",")[0]
    assert call("eval.py", tmp_path / "whole").stdout.splitlines()[1].split()[1] == val_loss
    refused(call("train.py", "--resume", "--out", tmp_path / "whole", "--no-pack", ok=False), "began with --pack True")
