"""Texts as arrays of integers, and hashes of their n-grams: for filters.py, copies.py and reference.py."""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)  # several filters look at one text
def codes_of(text):
    """The code points of a text, [len(text)] uint32."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def ngram_hashes(codes, n):
    """64-bit hashes of all n-grams of an array of integers -> [max(len - n + 1, 0)] uint64.

    Polynomial hashes, put together by doubling n, as powers are by squaring.
    """
    base = np.uint64(0x9E3779B97F4A7C15)
    hashes = codes = codes.astype(np.uint64)
    size = 1
    for bit in bin(n)[3:]:
        hashes = hashes[: max(len(hashes) - size, 0)] * np.power(base, np.uint64(size)) + hashes[size:]
        size *= 2
        if bit == "1":
            hashes = hashes[: max(len(hashes) - 1, 0)] * base + codes[size:]
            size += 1
    return hashes


def mixed(numbers):
    """A hash of uint64 whose upper bits depend on all bits (the finaliser of splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def ngram_counts(codes, n):
    """How often each n-gram of an array of integers occurs, in descending order."""
    hashes = np.sort(ngram_hashes(codes, n))
    new = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    starts = np.flatnonzero(new)
    return np.sort(np.append(starts[1:], len(hashes))[: len(starts)] - starts)[::-1]
