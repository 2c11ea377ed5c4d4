"""Prepared data: the shard format, its writer and its reader.

    data = TokenData("data/default", split="train", block_size=128)
    ids = data[0]                        # sample 0: block_size + 1 ids
    for micro_batches in batches(...):   # what train.py's loop reads

data/NAME/ holds a tokenizer, manifest.json, and for each shard
    SHARD.tokens.npy    ids (uint16 where the vocabulary fits, else uint32); every document ends with eos
    SHARD.ends.npy      where the documents end, for programs that read whole documents
    SHARD.mask.npy      of chats, and of pairs of answers: 1 where a token counts in the loss
    SHARD.hashes.npy    [documents, 4]: of each 128 bits of a hash of the content, and its fingerprint, to find copies

A sample is a row of block_size + 1 ids of one shard: inputs and targets, shifted by one. Text is cut into them;
conversations can be packed into them whole (packing.py).
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np

from common import sha256_of, track, write_atomically
from order import samples_at
from packing import pack_shard

# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write_array(path, array):
    """Write a .npy file; returns its sha256."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getbuffer())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def write_shard(folder, name, documents, tokenizer):
    """Write one shard from a list of (ids, mask or None, bytes of text, hashes); returns its entry in the manifest."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ids, masks, sizes, hashes = zip(*documents)
    eos, uncounted = np.array([tokenizer.eos_id]), np.zeros(1, dtype=np.uint8)
    arrays = {
        "tokens": np.concatenate([piece for own in ids for piece in (own, eos)], dtype=dtype, casting="unsafe"),
        "ends": np.cumsum([len(own) + 1 for own in ids], dtype=np.uint64),
        "hashes": np.stack(hashes),
    }
    if masks[0] is not None:
        arrays["mask"] = np.concatenate([piece for mask in masks for piece in (mask, uncounted)])
    sha256 = {kind: write_array(shard_path(folder, name, kind), array) for kind, array in arrays.items()}
    return {"name": name, "tokens": len(arrays["tokens"]), "documents": len(ids), "bytes": sum(sizes), "sha256": sha256}


def shard_path(folder, name, kind):
    return Path(folder) / f"{name}.{kind}.npy"


def shard_is_whole(folder, shard):
    """Whether all files of a manifest's entry are there, with their hashes: a killed run may have left others."""
    paths = [(shard_path(folder, shard["name"], kind), sha256) for kind, sha256 in shard["sha256"].items()]
    return all(path.exists() and sha256_of(path) == sha256 for path, sha256 in paths)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def documents_of(folder, shard, numbers):
    """Yield (ids, mask or None) of some documents of a shard, by their numbers in it; the last id ends the document.

    shard: its entry in the manifest.
    """
    arrays = {
        kind: np.load(shard_path(folder, shard["name"], kind), mmap_mode="r", allow_pickle=False)
        for kind in shard["sha256"].keys() & {"tokens", "ends", "mask"}
    }
    for number in numbers:
        own = slice(int(arrays["ends"][number - 1]) if number else 0, int(arrays["ends"][number]))
        yield arrays["tokens"][own], arrays["mask"][own] if "mask" in arrays else None


def read_manifest(folder):
    """manifest.json as a dict. ValueError if it is missing, damaged, or names files outside its folder."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        names = [manifest["tokenizer"]["file"], *(shard["name"] for shard in manifest["shards"])]
        outside = [name for name in names if Path(name).name != name]
        damaged = not {"parts", "inputs", "ledger"} <= manifest.keys()
        damaged |= not all({"source", "language", "split"} <= shard.keys() for shard in manifest["shards"])
    except FileNotFoundError:
        raise ValueError(f"no data in {folder}: python prepare.py FILE_OR_DIR --out {folder}") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        damaged = True
    if damaged:
        raise ValueError(f"{path} is damaged or of another version: delete the folder and run prepare.py again")
    if outside:
        raise ValueError(f"{path} names {outside[0]}, which is not a file of its folder: do not use it")
    return manifest


DTYPES = {"tokens": (np.uint16, np.uint32), "mask": (np.uint8,)}  # of what is served; only chats have masks
HEADER = 128  # bytes of a .npy file of one dimension, before its numbers

MAX_OPEN = 1 << 16


def max_open_files():
    """How many files this process may have open, MAX_OPEN at most. The soft limit is raised as far as it may be."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, most = (MAX_OPEN if limit == resource.RLIM_INFINITY else min(limit, MAX_OPEN) for limit in (soft, hard))
    if soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return soft


class TokenData:
    """The samples of one split of a prepared folder.

    len(data)    number of samples: each shard is cut every block_size tokens; the rest at its end is not used
    data[i]      sample i: block_size + 1 ids, int64. Neighbours overlap by one id, so that each id is a target once

    With pack, a sample of a chat is whole conversations after an end-of-document token, and filled up with more of
    these, which do not count. Pairs of answers are always packed.
    """

    reference = None  # of pairs: what dpo.py's reference says of their answers, [samples, answers]; served with them

    def __init__(self, path, split="train", block_size=128, pack=False):
        """Raises ValueError for anything missing, of the wrong size or type, or too small."""
        self.path, self.block_size = Path(path), block_size
        self.manifest = read_manifest(self.path)
        self.shards = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        self.open = functools.lru_cache(maxsize=max_open_files() // 4)(self._open)
        for k, shard in enumerate(self.shards):
            for kind in DTYPES.keys() & shard["sha256"].keys():
                self._check_size(k, kind)
        self.pairs = any(shard.get("pairs") for shard in self.manifest["shards"])
        if self.pairs and not all(shard.get("pairs") for shard in self.manifest["shards"]):
            raise ValueError(f"{path} has pairs of answers and other text: prepare each in a folder of its own")
        pack = pack or self.pairs
        self.rows = {k: self._pack(k) for k, shard in enumerate(self.shards) if pack and "mask" in shard["sha256"]}
        blocks = [(shard["tokens"] - 1) // block_size for shard in self.shards]
        sizes = [len(self.rows[k]) if k in self.rows else n for k, n in enumerate(blocks)]
        self.first = np.cumsum([0, *sizes])  # first[k] is the number of shard k's first sample
        self.sources = {}  # of each, by its name and language: the numbers of its shards
        for k in range(len(self.shards)):
            self.sources.setdefault(self._source(k), []).append(k)
        # Where the samples of each of its shards end, among those of the source.
        self.source_ends = {source: np.cumsum([sizes[k] for k in ks]) for source, ks in self.sources.items()}
        if len(self) == 0:
            if self.rows:
                fix = f"set --block-size above {block_size}, or give prepare.py shorter ones"
                what = "pair of answers" if self.pairs else "conversation"
                raise ValueError(f"{path}: no {split} {what} fits into a block of {block_size}: {fix}")
            longest = max((shard["tokens"] for shard in self.shards), default=0)
            raise ValueError(
                f"{path}: a block of {block_size} needs {block_size + 1} tokens, the longest {split} shard has "
                f"{longest}: give prepare.py more text, or train.py a smaller --block-size"
            )

    def _check_size(self, k, kind):
        """ValueError if a shard's array is missing or of another size: found here, and not in the middle of a run."""
        path = shard_path(self.path, self.shards[k]["name"], kind)
        sizes = [HEADER + self.shards[k]["tokens"] * np.dtype(dtype).itemsize for dtype in DTYPES[kind]]
        if not path.exists() or path.stat().st_size not in sizes:
            self._refuse(path)

    def _open(self, k, kind):
        """Shard k's array of a kind, mapped into memory.

        self.open does this when the first sample of a shard is asked for, and keeps as many as there may be open files.
        """
        path = shard_path(self.path, self.shards[k]["name"], kind)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            array = None
        if array is None or array.shape != (self.shards[k]["tokens"],) or array.dtype not in DTYPES[kind]:
            self._refuse(path)
        return array

    def _pack(self, k):
        ends = np.load(shard_path(self.path, self.shards[k]["name"], "ends"), allow_pickle=False)
        return pack_shard(self.open(k, "tokens"), self.open(k, "mask"), ends, self.block_size, self.pairs)

    def _refuse(self, path):
        raise ValueError(f"{path} is missing or damaged: delete {self.path} and run prepare.py again")

    def check_hashes(self, max_bytes=math.inf, seed=0, part=0, parts=1):
        """Compare files with the manifest's sha256: all, or a random choice (by `seed`) of at most max_bytes.

        Of several processes each checks its part. ValueError names the first file that differs.
        """
        files = [
            (shard_path(self.path, shard["name"], kind), shard["sha256"][kind])
            for shard in self.shards
            for kind in ("tokens", "mask")
            if kind in shard["sha256"]
        ]
        random.Random(seed).shuffle(files)
        sizes = np.cumsum([path.stat().st_size for path, _ in files])
        chosen = files[: np.searchsorted(sizes, max_bytes, side="right")][part::parts]
        for path, sha256 in track(chosen, f"checking {self.path.name}", "files", shown=part == 0):
            if sha256_of(path) != sha256:
                self._refuse(path)

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, i):
        k, i = self._locate(i)
        return self._ids(k, i, "tokens", fill=int(self.open(k, "tokens")[-1])).astype(np.int64)

    def counted(self, i):
        """Which targets of sample i count in the loss, [block_size] of 0 and 1; None: all of them."""
        k, i = self._locate(i)
        return self._ids(k, i, "mask", fill=0)[1:] if "mask" in self.shards[k]["sha256"] else None

    @property
    def documents(self):
        """How many are in the samples."""
        packed = sum(rows.conversations for rows in self.rows.values())
        return packed + sum(shard["documents"] for k, shard in enumerate(self.shards) if k not in self.rows)

    def shard_hashes(self):
        """[name, sha256 of its files] of each shard, in the order in which samples are numbered."""
        return [[shard["name"], shard["sha256"]] for shard in self.shards]

    def mostly_chat(self):
        """Whether more than half of the tokens are conversations."""
        in_chats = sum(shard["tokens"] for shard in self.shards if "mask" in shard["sha256"])
        return 2 * in_chats > sum(shard["tokens"] for shard in self.shards)

    def packed(self):
        """What packing came to, in words; "" where nothing is packed."""
        rows = self.rows.values()
        n, conversations = sum(map(len, rows)), sum(r.conversations for r in rows)
        cut, left_out = sum(r.cut for r in rows), sum(r.left_out for r in rows)
        share = sum(r.tokens for r in rows) / max(n * self.block_size, 1)
        lost = f"{left_out:,} are too long and left out"
        lost = lost if self.pairs else f"{cut:,} lost their oldest turns, {lost}"
        found = f"{conversations:,} {'pairs' if self.pairs else 'conversations'}"
        packed = f"packed: {found} in {n:,} samples, {share:.1%} of them text; {lost}"
        return packed if n else ""

    def samples(self):
        """{source: how many samples it has}."""
        return {source: int(ends[-1]) for source, ends in self.source_ends.items()}

    def number(self, source, i):
        """The number, among all, of the i-th sample of a source."""
        ends = self.source_ends[source]
        at = int(np.searchsorted(ends, i, side="right"))
        return int(self.first[self.sources[source][at] + 1] - ends[at]) + i

    def source_of(self, i):
        """The source of sample i."""
        return self._source(self._locate(i)[0])

    def _source(self, k):
        return f"{self.shards[k]['source']} {self.shards[k]['language']}"

    def _locate(self, i):
        """The shard of sample i, and its number there."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        k = int(np.searchsorted(self.first, i, side="right")) - 1
        return k, i - int(self.first[k])

    def _ids(self, k, i, kind, fill):
        """Sample i of shard k, of an array of a kind."""
        array = self.open(k, kind)
        if k not in self.rows:
            return array[i * self.block_size : (i + 1) * self.block_size + 1]
        row = np.full(self.block_size + 1, fill, dtype=array.dtype)
        parts = np.concatenate([array[start:stop] for start, stop in self.rows[k][i]])
        row[1 : 1 + len(parts)] = parts  # after an end of document, as every other conversation begins
        return row


def inputs_and_targets(samples, i):
    """Sample i of TokenData, or of a list of rows of ids -> inputs [T], targets [T], int64.

    In a chat only what the assistant says counts: every other target is -1.
    """
    ids, counted = samples[i], samples.counted(i) if isinstance(samples, TokenData) else None
    return ids[:-1], ids[1:] if counted is None else np.where(counted, ids[1:], -1)


def evenly_spaced(samples, max_tokens):
    """Numbers of evenly spaced samples with max_tokens targets at most, but one sample at least."""
    n = min(len(samples), max(1, max_tokens // (len(samples[0]) - 1)))
    return np.linspace(0, len(samples) - 1, num=n, dtype=np.int64)


# ----------------------------------------------------------------------------------------------------------------------
# What training reads


def batch_at(data, phases, seed, first, count):
    """Samples first .. first + count of the last phase -> inputs [count, T], targets [count, T], and of pairs what the
    reference says of their answers, [count, answers]."""
    import torch  # here, as prepare.py's processes do without it

    numbers = [data.number(source, i) for source, i in samples_at(first, count, phases, seed)]
    arrays = [np.stack(rows) for rows in zip(*(inputs_and_targets(data, number) for number in numbers))]
    if data.reference is not None:
        arrays.append(data.reference[numbers])
    return tuple(torch.from_numpy(array) for array in arrays)


def batches(data, phases, seed, ranks, n_micro, micro_batch, device="cpu"):
    """Yield for each step to come this rank's n_micro micro-batches, as batch_at gives them.

    A thread reads the next step's while this one's are in use; for CUDA into pinned memory, so that the copy to the
    device is asynchronous.
    """
    import torch

    pinned = device == "cuda"
    gpu = torch.cuda.current_device() if pinned else None

    def set_gpu():  # a new thread would create a context on the first one
        torch.cuda.set_device(gpu)

    def read(first):
        first += ranks.rank * n_micro * micro_batch  # rank r takes the r-th equal part of a step
        step = [batch_at(data, phases, seed, first + i * micro_batch, micro_batch) for i in range(n_micro)]
        return [tuple(array.pin_memory() for array in arrays) for arrays in step] if pinned else step

    with concurrent.futures.ThreadPoolExecutor(1, initializer=set_gpu if pinned else None) as thread:
        step_samples = ranks.world * n_micro * micro_batch
        coming = None
        for first in itertools.count(phases[-1]["served"], step_samples):
            ready, coming = coming, thread.submit(read, first)
            if ready:
                yield ready.result()
