"""Near copies among documents.

    prints = fingerprints(texts, contexts)   # SimHash, [n, 2] uint64
    first = near_copies(prints)              # [n]: for each an earlier text that it is a near copy of, or itself

Equal documents are found before, by their sha256 (prepare.py).
"""

import hashlib
import itertools

import numpy as np

from corpus.ngrams import mixed, ngram_hashes

SHINGLE = 6  # characters
MIN_SHINGLES = 20  # distinct ones; what has fewer is a near copy only of the same text
MAX_DISTANCE = 4  # bits in which the first words of near copies may differ
MAX_DISTANCE_OF_BOTH = 12  # bits in which both words together may
MOST_COMPARED = 128  # of those that agree in two bands, each meets so many: else time would grow with their square

# ----------------------------------------------------------------------------------------------------------------------
# Fingerprints: SimHash (Charikar 2002; Manku et al. 2007)


def fingerprints(texts, contexts=()):
    """A 128-bit SimHash of each text over its distinct shingles of 6 characters -> [len(texts), 2] uint64.

    contexts: of each what it answers, or ""; none given are all "". Its hash is mixed into the bits, so that only texts
    with the same context are near copies: two answers to one question may be, one answer to two questions is not.

    Each distinct shingle votes once, however often it stands in the text: else a ruler of dashes would decide the whole
    fingerprint, as it does in Data-Juicer's document_simhash. A bit is 1 if it is 1 in more than half of the hashes.
    White space is left out: the indentation of programs would make them all alike.

    Where fewer than MIN_SHINGLES vote, a few of them decide: the fingerprint is then a hash of the whole text.
    """
    prints = np.zeros((len(texts), 2), dtype=np.uint64)
    for indices, batch in batches_of(texts):
        hashes, counts = distinct_shingles(batch)
        prints[indices] = simhash(hashes, counts)
        for i in np.flatnonzero(counts < MIN_SHINGLES).tolist():
            prints[indices[i]] = words_of(batch[i])
    for i, context in enumerate(contexts):
        if context:
            prints[i] ^= words_of(context)
    return prints


def words_of(text):
    """128 bits of a hash of the text, [2] uint64."""
    return np.frombuffer(hashlib.sha256(text.encode("utf-8", errors="replace")).digest()[:16], dtype=">u8").astype(
        np.uint64
    )


def batches_of(texts, size=200_000):
    """Yield (indices, texts without white space) of about `size` characters together: numpy needs long arrays."""
    indices, batch, characters = [], [], 0
    for i, text in enumerate(texts):
        indices.append(i)
        batch.append("".join(text.split()))
        characters += len(text)
        if characters > size or len(batch) == 1 << 16:
            yield indices, batch
            indices, batch, characters = [], [], 0
    if batch:
        yield indices, batch


def distinct_shingles(texts):
    """-> 48-bit hashes of the distinct shingles, text after text [m] uint64; how many each text has [len(texts)]."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", errors="replace"), dtype=np.uint32)
    owners = np.repeat(np.arange(len(texts), dtype=np.uint64), [len(text) for text in texts])
    inside = owners[SHINGLE - 1 :] == owners[: len(owners) - SHINGLE + 1]  # a shingle begins and ends in one text
    hashes = mixed(ngram_hashes(codes, SHINGLE)[inside]) >> np.uint64(16)
    keys = np.sort(owners[: len(inside)][inside] << np.uint64(48) | hashes)
    keys = keys[is_first(keys)]
    counts = np.bincount((keys >> np.uint64(48)).astype(np.int64), minlength=len(texts))
    return keys & np.uint64((1 << 48) - 1), counts


def is_first(values):
    """Where a sorted array has a value that is not the one before, [n] bool."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


# For each byte its eight bits, most significant first, as eight counters of a byte each in one number
COUNTERS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).view(np.uint64)[:, 0]
MOST = 255  # that a counter can hold


def simhash(hashes, counts):
    """Hashes of each text's shingles [m], how many each text has [n] -> fingerprints [n, 2] uint64."""
    ones = np.zeros((len(counts), 128), dtype=np.int64)  # how many hashes of a text have each bit
    all_owners = np.repeat(np.arange(len(counts)), counts)
    for start in range(0, len(hashes), 1 << 16):  # bounds the memory that a long text takes
        words, owners = hashes[start : start + (1 << 16)], all_owners[start : start + (1 << 16)]
        words = np.stack([mixed(words), mixed(words ^ np.uint64(0x5851F42D4C957F2D))], axis=1)
        counters = COUNTERS[words.astype(">u8").view(np.uint8)]
        starts = is_first(owners)
        starts[::MOST] = True
        starts = np.flatnonzero(starts)
        sums = np.add.reduceat(counters, starts, axis=0).view(np.uint8)
        owners = owners[starts]
        starts = np.flatnonzero(is_first(owners))
        ones[owners[starts]] += np.add.reduceat(sums, starts, axis=0, dtype=np.int64)
    return np.packbits(2 * ones > counts[:, None], axis=1).view(">u8").astype(np.uint64)


# ----------------------------------------------------------------------------------------------------------------------
# Near copies


def near_copies(prints):
    """Fingerprints [n, 2] uint64 -> [n] int: for each the first earlier one that stays and that it is a near copy of.

    What is near to none of those that stay gives its own index, and stays. Pairs are found whose first words are within
    MAX_DISTANCE: the 64 bits are divided into MAX_DISTANCE + 2 bands, so two such words agree in at least two bands,
    and meet where all are sorted by these two (Manku et al. 2007, section 3). The second words confirm a pair: without
    them, thousands of files under one licence would hang together by a few chance pairs. Nearness is not passed on: a
    copy of a copy stays if it is far enough from what stays. 10 million random prints take 2 GB.
    """
    both = mixed(prints[:, 1])
    both ^= prints[:, 0]
    first, back = np.unique(both, return_index=True, return_inverse=True)[1:]
    del both
    order = np.argsort(first)  # distinct prints in the order of their first appearance
    first, place = first[order], np.argsort(order)
    original = originals(near_pairs(prints, first), len(first))
    return first[original[place[back]]]


def near_pairs(prints, first):
    """The pairs (earlier, later) of near ones among prints[first], [m, 2] indices into first, by the later one."""
    values, found = prints[first, 0], [np.zeros(0, dtype=np.uint64)]
    edges = np.linspace(0, 64, MAX_DISTANCE + 3).astype(int)
    bands = []
    for low, high in zip(edges, edges[1:]):
        bands.append(((values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1), high - low))
    for (one, _), (other, bits) in itertools.combinations(bands, 2):
        # Key and index in one number: sorting numbers is ten times as fast as argsort.
        key = one << np.uint64(bits) | other
        keyed = np.sort(key << np.uint64(32) | np.arange(len(values), dtype=np.uint64))
        index, key = (keyed & np.uint64(0xFFFFFFFF)).astype(np.int64), keyed >> np.uint64(32)
        left = np.arange(len(values))
        for step in range(1, MOST_COMPARED):  # each with the one `step` places later, while their keys are equal
            left = left[: np.searchsorted(left, len(values) - step)]
            left = left[key[left] == key[left + step]]
            if not len(left):
                break
            a, b = index[left], index[left + step]
            distance = np.bitwise_count(values[a] ^ values[b])
            near = distance <= MAX_DISTANCE
            a, b, distance = a[near], b[near], distance[near]
            distance += np.bitwise_count(prints[first[a], 1] ^ prints[first[b], 1])
            near = distance <= MAX_DISTANCE_OF_BOTH
            found.append(b[near].astype(np.uint64) << np.uint64(32) | a[near].astype(np.uint64))
    found = np.unique(np.concatenate(found))
    return np.stack([found & np.uint64(0xFFFFFFFF), found >> np.uint64(32)], axis=1).astype(np.int64)


def originals(pairs, n):
    """Pairs of near_pairs among n -> [n]: of each that is near to one that stays the first such one, else itself."""
    original = np.arange(n)
    for a, b in pairs.tolist():
        if original[a] == a and original[b] == b:
            original[b] = a
    return original
