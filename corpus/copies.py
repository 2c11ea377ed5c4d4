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
PIECE = 1 << 21  # so many are compared at once, about: this bounds the memory that it takes
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

EDGES = [64 * i // (MAX_DISTANCE + 2) for i in range(MAX_DISTANCE + 3)]
BANDS = list(zip(EDGES, EDGES[1:]))  # of bits of the first word


def near_copies(prints, find_pairs=None):
    """Fingerprints [n, 2] uint64 -> [n] int: for each the first earlier one that stays and that it is a near copy of.

    What is near to none of those that stay gives its own index, and stays. Pairs are found whose first words are within
    MAX_DISTANCE: the 64 bits are divided into MAX_DISTANCE + 2 bands, so two such words agree in at least two bands,
    and meet where all are sorted by these two (Manku et al. 2007, section 3). The second words confirm a pair: without
    them, thousands of files under one licence would hang together by a few chance pairs. Nearness is not passed on: a
    copy of a copy stays if it is far enough from what stays.

    find_pairs(prints): what near_pairs finds in all pieces_of(len(prints)), a list; without, one after the other here.
    """
    find_pairs = find_pairs or (lambda prints: [near_pairs(piece, prints) for piece in pieces_of(len(prints))])
    both = mixed(prints[:, 1])
    both ^= prints[:, 0]
    first, back = np.unique(both, return_index=True, return_inverse=True)[1:]
    del both
    order = np.argsort(first)  # distinct prints in the order of their first appearance
    first, place = first[order], np.argsort(order)
    back = place[back]
    del order, place
    found = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *find_pairs(prints[first])]))
    return first[originals(found, len(first))[back]]


def pieces_of(n):
    """The pieces in which near_pairs compares n prints: (two bands, first key, the key after the last)."""
    ranges = n // PIECE + 1
    for bands in itertools.combinations(BANDS, 2):
        keys = 1 << sum(high - low for low, high in bands)
        cuts = [keys * i // ranges for i in range(ranges + 1)]
        yield from ((bands, first, stop) for first, stop in zip(cuts, cuts[1:]))


def near_pairs(piece, prints):
    """The pairs of near prints that agree in two bands, with a key in a range: numbers later << 32 | earlier, [m]."""
    ((low, high), (other_low, other_high)), first, stop = piece
    chosen = [np.zeros(0, dtype=np.uint64)]
    for start in range(0, len(prints), 1 << 20):
        words = prints[start : start + (1 << 20), 0]
        key = bits_of(words, low, high) << np.uint64(other_high - other_low) | bits_of(words, other_low, other_high)
        own = np.flatnonzero((key >= first) & (key < stop))
        # Key and index in one number: sorting numbers is ten times as fast as argsort.
        chosen.append(key[own] << np.uint64(32) | (own + start).astype(np.uint64))
    key = np.sort(np.concatenate(chosen))
    index, key = key & np.uint64(0xFFFFFFFF), key >> np.uint64(32)
    words = prints[index.astype(np.int64)]
    found = [np.zeros(0, dtype=np.uint64)]
    left = np.arange(len(key))
    for step in range(1, MOST_COMPARED):  # each with the one `step` places later, while their keys are equal
        left = left[: np.searchsorted(left, len(key) - step)]
        left = left[key[left] == key[left + step]]
        if not len(left):
            break
        distance = np.bitwise_count(words[left, 0] ^ words[left + step, 0])
        near = left[distance <= MAX_DISTANCE]
        distance = np.bitwise_count(words[near] ^ words[near + step]).sum(1)
        near = near[distance <= MAX_DISTANCE_OF_BOTH]
        found.append(index[near + step] << np.uint64(32) | index[near])
    return np.concatenate(found)


def bits_of(words, low, high):
    return (words >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)


def originals(found, n):
    """Sorted pairs of near_pairs, among n -> [n]: of what is near to one that stays the first such one, else itself."""
    original = np.arange(n)
    earlier, later = (found & np.uint64(0xFFFFFFFF)).astype(np.int64), (found >> np.uint64(32)).astype(np.int64)
    for a, b in zip(earlier.tolist(), later.tolist()):
        if original[a] == a and original[b] == b:
            original[b] = a
    return original
