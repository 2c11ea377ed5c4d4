"""Near copies among documents, and how surprising a text is.

    prints = fingerprints(texts)        # SimHash, [n] uint64
    first = near_copies(prints)         # [n]: for each the first text that it is a near copy of

    model = NGram()                     # the model behind prepare.py --reference
    model.learn(reference_text)
    model.perplexity(text)              # high: not like the reference

Both are made of hashes of n-grams, as are some filters of operators.py.
"""

import functools
import itertools
import math

import numpy as np

SHINGLE = 6  # characters
MAX_DISTANCE = 4  # bits in which the fingerprints of near copies may differ
MAX_PERPLEXITY = 1500  # per character, of prose under a model of a reference source

# ----------------------------------------------------------------------------------------------------------------------
# Texts as integers


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


def ngram_counts(codes, n):
    """How often each n-gram of an array of integers occurs, in descending order."""
    hashes = np.sort(ngram_hashes(codes, n))
    new = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
    starts = np.flatnonzero(new)
    return np.sort(np.append(starts[1:], len(hashes))[: len(starts)] - starts)[::-1]


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

    Short texts go together, as one by one they would be all overhead; long ones are cut, to bound memory.
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


# A shingle has at most 24 bytes of UTF-8. MD5 wants the byte 0x80 behind it, and words of 4 bytes: 28 bytes.
MESSAGE = 28
KEEP = (np.tri(MESSAGE, MESSAGE, -1) * 255).astype(np.uint8)  # row n: a mask for the first n bytes
MARK = np.eye(MESSAGE, dtype=np.uint8) * 0x80  # row n: the byte 0x80 behind them


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
    """The first 8 bytes of the MD5 (RFC 1321) of n short messages at once, much faster than one by one with hashlib.

    words: [7, n] uint32, each message with the byte 0x80 and zeros behind it; sizes: [n] bytes, at most 27.
    Returns [n, 8] uint8.
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

    One that is a near copy of none before it gives its own index. All pairs within the distance are found: the 64 bits
    are divided into distance + 2 bands, so two prints within the distance agree in at least two bands, and meet where
    all are sorted by these two (Manku et al. 2007, section 3). 10 million random prints take 2 GB.
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
        for step in itertools.count(1):  # compare each with the one `step` places behind, while their keys are equal
            left = left[: np.searchsorted(left, len(values) - step)]
            left = left[key[left] == key[left + step]]
            if not len(left):
                break
            near = np.bitwise_count(values[index[left]] ^ values[index[left + step]]) <= distance
            union(root, index[left[near]], index[left[near] + step])
    while (root != root[root]).any():
        root = root[root]
    return first[order][root[place[back]]]


def union(root, a, b):
    """Union-find over arrays: join the groups of a[i] and b[i] for all i. root[i] <= i leads to a group's first."""
    while len(a):
        a, b = root[a], root[b]
        while (root[a] != a).any() or (root[b] != b).any():
            a, b = root[a], root[b]
        a, b = np.minimum(a, b), np.maximum(a, b)
        a, b = a[a != b], b[a != b]
        np.minimum.at(root, b, a)


# ----------------------------------------------------------------------------------------------------------------------
# The reference model


class NGram:
    """Perplexity under a model of 4-grams of characters, counted in a reference.

        p_n(c | n - 1 characters before) = (count(n-gram) + k p_{n-1}(c | n - 2 before)) / (count(context) + k)
        p_0 = 1 / 2^16

    Dirichlet smoothing towards the next shorter context (MacKay and Peto 1995). Counts are in tables addressed by hash.
    No n-gram is taken to be more frequent than its context, so a new one looks known only if both collide with others.
    """

    ORDER, STRENGTH, BITS = 4, 5.0, 23

    def __init__(self, tables=None):
        """tables: [ORDER, 2, 2^BITS] uint32, for each order the counts of n-grams and of their contexts."""
        self.tables = np.zeros((self.ORDER, 2, 1 << self.BITS), dtype=np.uint32) if tables is None else tables

    def cells(self, text):
        """For n = 1 .. ORDER the cells of the n-gram that ends at each character and of its context, [len(text)] each.

        A text begins behind ORDER newlines.
        """
        codes = np.concatenate([np.full(self.ORDER, ord("\n"), dtype=np.uint32), codes_of(text)])
        hashes = [np.zeros(len(codes), dtype=np.uint64)] + [ngram_hashes(codes, n) for n in range(1, self.ORDER + 1)]
        cells = [mixed(h) >> np.uint64(64 - self.BITS) for h in hashes]
        return [(cells[n][-len(text) :], cells[n - 1][-len(text) - 1 : -1]) for n in range(1, self.ORDER + 1)]

    def learn(self, text):
        """Count the n-grams of a text."""
        for tables, cells in zip(self.tables, self.cells(text) if text else ()):
            for table, at in zip(tables, cells):
                np.add.at(table, at, 1)

    def perplexity(self, text):
        """exp of the mean nats per character; 0 for an empty text."""
        if not text:
            return 0.0
        p = 1 / 65_536
        for (grams, contexts), (gram, context) in zip(self.tables, self.cells(text)):
            seen = contexts[context]
            p = (np.minimum(grams[gram], seen) + self.STRENGTH * p) / (seen + self.STRENGTH)
        return float(np.exp(-np.log(p).mean()))


def mixed(numbers):
    """A hash of uint64 whose upper bits depend on all bits (the finaliser of splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
