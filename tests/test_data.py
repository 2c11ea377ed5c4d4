"""The shard format, its reader, and the order in which training serves samples."""

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from data import (
    TokenData,
    evenly_spaced,
    inputs_and_targets,
    read_manifest,
    shard_is_whole,
    write_shard,
)

pytestmark = pytest.mark.quick

# ----------------------------------------------------------------------------------------------------------------------
# Shards

EOS = 7
TEXT = [(np.arange(10, 10 + n), None, 3 * n, np.zeros(4, dtype=np.uint64)) for n in (50, 1, 20)]
CHAT = [(np.arange(100, 130), np.repeat([0, 1, 0], 10).astype(np.uint8), 90, np.ones(4, dtype=np.uint64))]


def write_folder(folder, vocab_size=1000):
    """A prepared folder with two shards of training text, one of them a chat, and a held-out one."""
    tokenizer = SimpleNamespace(vocab_size=vocab_size, eos_id=EOS)
    folder.mkdir()
    shards = []
    for name, documents, split in (("a", TEXT, "train"), ("b", CHAT, "train"), ("c", TEXT[:1], "val")):
        shards.append(
            write_shard(folder, name, documents, tokenizer) | {"split": split, "source": name, "language": "zh"}
        )
    write_manifest(folder, {"tokenizer": {"file": "x"}, "shards": shards, "parts": [], "inputs": [], "ledger": {}})
    return folder


def write_manifest(folder, manifest):
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


def test_the_samples_of_a_source_are_those_of_its_shards(folder):
    manifest = read_manifest(folder)
    for shard, source in zip(manifest["shards"], ("x", "y", "x")):
        shard |= {"source": source, "split": "train"}
    write_manifest(folder, manifest)
    data = TokenData(folder, "train", 8)
    assert data.samples() == {"x zh": 9 + 6, "y zh": 3}  # (74 - 1) // 8 and (51 - 1) // 8; (31 - 1) // 8
    numbers = {source: [data.number(source, i) for i in range(n)] for source, n in data.samples().items()}
    assert numbers == {"x zh": [*range(9), *range(12, 18)], "y zh": [9, 10, 11]}
    assert all(data.source_of(i) == source for source, of_source in numbers.items() for i in of_source)


def test_a_shard_holds_its_documents_with_an_eos_behind_each(folder):
    entry = read_manifest(folder)["shards"][0]
    assert (entry["tokens"], entry["documents"], entry["bytes"]) == (74, 3, 213)
    assert shard_is_whole(folder, entry)
    tokens = np.load(folder / "a.tokens.npy")
    assert tokens.tolist() == [*range(10, 60), EOS, 10, EOS, *range(10, 30), EOS]
    assert np.load(folder / "a.ends.npy").tolist() == [51, 53, 74]
    assert np.load(folder / "b.mask.npy").tolist() == [0] * 10 + [1] * 10 + [0] * 11
    (folder / "a.ends.npy").unlink()
    assert not shard_is_whole(folder, entry)


@pytest.mark.parametrize("vocab_size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_are_stored_in_two_bytes_where_they_fit(tmp_path, vocab_size, dtype):
    folder = write_folder(tmp_path / "data", vocab_size)
    assert np.load(folder / "a.tokens.npy").dtype == dtype
    assert TokenData(folder, "train", 8)[0].dtype == np.int64


@pytest.mark.parametrize("block_size", [1, 7, 25, 73])
def test_samples_hold_every_token_once_as_a_target(folder, block_size):
    data = TokenData(folder, "train", block_size)
    shards = [np.load(folder / f"{name}.tokens.npy") for name in "ab"]
    expected = [shard[1 : (len(shard) - 1) // block_size * block_size + 1] for shard in shards]
    assert np.array_equal(np.concatenate([data[i][1:] for i in range(len(data))]), np.concatenate(expected))
    assert all(len(data[i]) == block_size + 1 for i in range(len(data)))
    for i in (-1, len(data)):
        with pytest.raises(IndexError):
            data[i]


def test_only_answers_count_among_the_targets_of_a_chat(folder):
    data = TokenData(folder, "train", 10)
    ids, targets = inputs_and_targets(data, 0)
    assert ids.tolist() == list(range(10, 20)) and targets.tolist() == list(range(11, 21))
    ids, targets = inputs_and_targets(data, 8)  # the second sample of the chat
    assert ids.tolist() == list(range(110, 120)) and targets.tolist() == [*range(111, 120), -1]
    ids, targets = inputs_and_targets([np.arange(5)], 0)  # a row of ids, without a mask
    assert ids.tolist() == [0, 1, 2, 3] and targets.tolist() == [1, 2, 3, 4]
    assert not data.mostly_chat() and not TokenData(folder, "val", 10).mostly_chat()


@pytest.mark.parametrize("max_tokens, n", [(1, 1), (16, 4), (1000, 10)])
def test_evenly_spaced_samples_reach_from_the_first_to_the_last(max_tokens, n):
    numbers = evenly_spaced([np.zeros(5)] * 10, max_tokens)
    assert len(numbers) == n and numbers[0] == 0 and (n == 1 or numbers[-1] == 9)
    assert len(set(np.diff(numbers) // 3)) <= 1


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_damaged_shards_are_named(folder):
    path, damaged = folder / "a.tokens.npy", "a.tokens.npy is missing or damaged: delete"
    whole = path.read_bytes()
    for content in (b"", whole[:-2], whole[:50]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=damaged):
            TokenData(folder, "train", 8)
    np.save(path, np.zeros(74, dtype=np.int64))
    with pytest.raises(ValueError, match=damaged):
        TokenData(folder, "train", 8)
    path.unlink()
    with pytest.raises(ValueError, match=damaged):
        TokenData(folder, "train", 8)


def test_a_shard_that_cannot_be_read_is_not_called_damaged(folder, monkeypatch):
    def fail(path, *args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(OSError, match="Input/output error") as error:
        TokenData(folder, "train", 8)[0]
    assert error.value.filename.endswith("a.tokens.npy")


def test_a_shard_is_opened_for_its_first_sample(folder):
    path = folder / "b.tokens.npy"
    whole = path.read_bytes()
    path.write_bytes(b"\0" * len(whole))  # of the right size, but no array
    data = TokenData(folder, "train", 8)
    assert data.open.cache_info().currsize == 0
    assert len(data[0]) == 9 and data.open.cache_info().currsize == 1
    with pytest.raises(ValueError, match="b.tokens.npy is missing or damaged: delete"):
        data[9]


SERVE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from data import TokenData
data = TokenData(sys.argv[1], "train", 8)
order = [i for start in range(7) for i in range(start, len(data), 7)]
print(len(data.shards), [data[i].tolist() == list(range(8 * i, 8 * i + 9)) for i in order].count(False))
"""


def test_more_shards_than_files_may_be_open_are_served(tmp_path):
    tokenizer = SimpleNamespace(vocab_size=10_000, eos_id=EOS)
    shards = []
    for k in range(100):
        ids = np.arange(16 * k, 16 * k + 16)
        shard = write_shard(tmp_path, f"s{k}", [(ids, None, 9, np.zeros(4, dtype=np.uint64))], tokenizer)
        array = np.load(tmp_path / f"s{k}.tokens.npy")
        np.save(tmp_path / f"s{k}.tokens.npy", np.append(ids, 16 * k + 16).astype(array.dtype))
        shards.append({"split": "train", "source": "s", "language": "zh", **shard})
    manifest = {"tokenizer": {"file": "t"}, "parts": 1, "inputs": [], "ledger": {}, "shards": shards}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = subprocess.run([sys.executable, "-c", SERVE, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("100 0\n", "")


def test_a_flipped_bit_is_found_by_a_hash_of_its_file(folder):
    path = folder / "a.tokens.npy"
    flipped = bytearray(path.read_bytes())
    flipped[-100] ^= 1
    path.write_bytes(flipped)
    data = TokenData(folder, "train", 8)
    data.check_hashes(max_bytes=0)
    with pytest.raises(ValueError, match="a.tokens.npy is missing or damaged"):
        data.check_hashes()
    # The processes of a node share the files: exactly one finds it. In a large corpus the seed chooses what to hash.
    by_part = [finds_damage(data, part=part, parts=3) for part in range(3)]
    assert sorted(by_part) == [False, False, True]
    by_seed = [finds_damage(data, max_bytes=len(flipped), seed=seed) for seed in range(40)]
    assert any(by_seed) and not all(by_seed)


def finds_damage(data, **choice):
    try:
        data.check_hashes(**choice)
    except ValueError:
        return True
    return False


def test_a_damaged_manifest_is_refused(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for content in ("", "{", "[]", "null", "{}", json.dumps({k: manifest[k] for k in manifest if k != "ledger"})):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="manifest.json is damaged or of another version"):
            TokenData(folder, "train", 8)
    path.unlink()
    with pytest.raises(ValueError, match="no data in .*: python prepare.py FILE_OR_DIR"):
        TokenData(folder, "train", 8)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "sub/a"])
def test_a_manifest_cannot_lead_out_of_its_folder(folder, name):
    manifest = read_manifest(folder)
    manifest["shards"][0]["name"] = name
    write_manifest(folder, manifest)
    with pytest.raises(ValueError, match=f"names {name}, which is not a file of its folder: do not use it"):
        TokenData(folder, "train", 8)


def test_a_pickle_in_the_place_of_a_shard_is_not_run(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    np.save(folder / "a.tokens.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="missing or damaged"):
        TokenData(folder, "train", 8)
    assert not (tmp_path / "executed").exists()


def test_a_block_beyond_the_data_is_refused_with_the_numbers(folder):
    assert len(TokenData(folder, "val", 50)) == 1
    with pytest.raises(ValueError, match="a block of 51 needs 52 tokens, the longest val shard has 51"):
        TokenData(folder, "val", 51)
