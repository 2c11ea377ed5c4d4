"""Near copies among documents.

    prints = fingerprints(texts)        # SimHash, [n] uint64
    first = near_copies(prints)         # [n]: for each the first text that it is a near copy of

Equal documents are found before, by their sha256 (prepare.py).
"""

import itertools
import math

import numpy as np

SHINGLE = 6  # characters
MAX_DISTANCE = 4  # bits in which the fingerprints of near copies may differ

# ----------------------------------------------------------------------------------------------------------------------
# Fingerprints: SimHash (Charikar 2002; Manku et al. 2007), as document_simhash in Data-Juicer


def fingerprints(texts):
    """A 64-bit SimHash of each text over shingles of 6 characters -> [len(texts)] uint64.

    A shingle's hash is the first 8 bytes of its MD5, big endian. A bit of the fingerprint is 1 if it is 1 in more than
    half of the hashes. A text shorter than a shingle is one. White space is left out: the indentation of programs would
    make them all alike.
    """
    ones, counts = np.zeros((len(texts), 64), dtype=np.int64), np.zeros(len(texts), dtype=np.int64)
    for batch in batches_of_pieces(texts):
        owners = [owner for owner, _ in batch]
        piece_ones, piece_counts = shingle_bits([piece for _, piece in batch])
        np.add.at(ones, owners, piece_ones)
        np.add.at(counts, owners, piece_counts)
    return np.packbits(2 * ones > counts[:, None], axis=1).view(">u8").astype(np.uint64)[:, 0]


def batches_of_pieces(texts, size=20_000):
    """Yield lists of (index of a text, piece of it) of about `size` characters. Every shingle is in one piece.

    Short texts are put together, because numpy needs long arrays; long ones are cut, to bound memory.
    """
    batch, characters = [], 0
    for i, text in enumerate(texts):
        text = "".join(text.split()) or "\n"
        for start in range(0, max(len(text) - SHINGLE + 1, 1), size):
            piece = text[start : start + size + SHINGLE - 1]
            batch.append((i, piece))
            characters += len(piece)
            if characters > size:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


# A shingle has at most 24 bytes of UTF-8. MD5 appends the byte 0x80 and reads words of 4 bytes, so 28 bytes suffice.
MESSAGE = 28
KEEP = (np.tri(MESSAGE, MESSAGE, -1) * 255).astype(np.uint8)  # row n: a mask for the first n bytes
MARK = np.eye(MESSAGE, dtype=np.uint8) * 0x80  # row n: the byte 0x80 after them


def shingle_bits(texts):
    """Sums over the hashes of each text's shingles -> [n, 64] how many have each bit set, [n] how many hashes."""
    lengths = np.array([len(text) for text in texts])
    content = np.frombuffer("".join(texts).encode("utf-8") + bytes(MESSAGE), dtype=np.uint8)
    # Byte offsets where characters begin (bytes other than 10xxxxxx), and the end
    at = np.append(np.flatnonzero((content[:-MESSAGE] & 0xC0) != 0x80), len(content) - MESSAGE)
    counts = np.maximum(lengths - SHINGLE + 1, 1)
    begins = np.cumsum(counts) - counts
    first = np.arange(counts.sum()) + np.repeat(np.cumsum(lengths) - lengths - begins, counts)  # character of a shingle
    sizes = at[first + np.repeat(np.minimum(lengths, SHINGLE), counts)] - at[first]
    messages = np.lib.stride_tricks.sliding_window_view(content, MESSAGE)[at[first]]
    messages &= KEEP[sizes]
    messages |= MARK[sizes]
    bits = np.unpackbits(md5_first_half(np.ascontiguousarray(messages.view("<u4").T), sizes), axis=1)
    # Sums in uint8 are fast and hold up to 255 rows; then the sums of these sums.
    pieces = -(-counts // 255)
    firsts = np.cumsum(pieces) - pieces
    starts = np.repeat(begins, pieces) + 255 * (np.arange(pieces.sum()) - np.repeat(firsts, pieces))
    ones = np.add.reduceat(bits, starts, axis=0, dtype=np.uint8)
    return np.add.reduceat(ones, firsts, axis=0, dtype=np.int64), counts


MD5_ADD = [np.uint32(abs(math.sin(i + 1)) * 2**32) for i in range(64)]
MD5_ROTATE = [7, 12, 17, 22] * 4 + [5, 9, 14, 20] * 4 + [4, 11, 16, 23] * 4 + [6, 10, 15, 21] * 4


def md5_first_half(words, sizes):
    """hashlib.md5 for many short messages at once, which is much faster (RFC 1321). Skip it on a first reading.

    words: [7, n] uint32, each message followed by the byte 0x80 and zeros; sizes: [n] bytes, at most 27.
    Returns the first 8 bytes of each hash, [n, 8] uint8.
    """
    message = [*words, *[np.uint32(0)] * 7, (sizes * 8).astype(np.uint32), np.uint32(0)]
    start = [np.full_like(words[0], value) for value in (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)]
    a, b, c, d = start
    for i in range(64):
        if i < 16:
            mix, k = d ^ (b & (c ^ d)), i
        elif i < 32:
            mix, k = c ^ (d & (b ^ c)), 5 * i + 1
        elif i < 48:
            mix, k = b ^ c ^ d, 3 * i + 5
        else:
            mix, k = c ^ (b | ~d), 7 * i
        mix += a
        mix += message[k % 16] + MD5_ADD[i]
        rotated = mix << np.uint32(MD5_ROTATE[i])
        rotated |= mix >> np.uint32(32 - MD5_ROTATE[i])
        rotated += b
        a, b, c, d = d, rotated, b, c
    return np.stack([a + start[0], b + start[1]], axis=1).astype("<u4").view(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Near copies


def near_copies(prints, distance=MAX_DISTANCE):
    """Fingerprints [n] uint64 -> [n] int: for each the first that it is a near copy of, directly or through others.

    A text that is a near copy of no earlier one gives its own index. All pairs within the distance are found: the 64
    bits are divided into distance + 2 bands, so two prints within the distance agree in at least two bands, and meet
    where all are sorted by these two (Manku et al. 2007, section 3). 10 million random prints take 2 GB.
    """
    values, first, back = np.unique(prints, return_index=True, return_inverse=True)
    order = np.argsort(first)  # distinct prints in the order of their first appearance
    values, place = values[order], np.argsort(order)
    root = np.arange(len(values))
    edges = np.linspace(0, 64, distance + 3).astype(int)
    bands = []
    for low, high in zip(edges, edges[1:]):
        bands.append(((values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1), high - low))
    for (one, _), (other, bits) in itertools.combinations(bands, 2):
        # Key and index in one number: sorting numbers is ten times as fast as argsort.
        key = one << np.uint64(bits) | other
        keyed = np.sort(key << np.uint64(32) | np.arange(len(values), dtype=np.uint64))
        index, key = (keyed & np.uint64(0xFFFFFFFF)).astype(np.int64), keyed >> np.uint64(32)
        left = np.arange(len(values))
        for step in itertools.count(1):  # compare each with the one `step` places later, while their keys are equal
            left = left[: np.searchsorted(left, len(values) - step)]
            left = left[key[left] == key[left + step]]
            if not len(left):
                break
            near = np.bitwise_count(values[index[left]] ^ values[index[left + step]]) <= distance
            join_groups(root, index[left[near]], index[left[near] + step])
    while (root != root[root]).any():
        root = root[root]
    return first[order][root[place[back]]]


def join_groups(root, a, b):
    """Union-find over arrays: join the groups of a[i] and b[i] for all i. root[i] <= i leads to a group's first."""
    while len(a):
        a, b = root[a], root[b]
        while (root[a] != a).any() or (root[b] != b).any():
            a, b = root[a], root[b]
        a, b = np.minimum(a, b), np.maximum(a, b)
        a, b = a[a != b], b[a != b]
        np.minimum.at(root, b, a)
