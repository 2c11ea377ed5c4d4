"""Fingerprints, near copies and the n-gram model, against slow definitions of them."""

import hashlib
import math
import random
from collections import Counter

import numpy as np
import pytest

from corpus.copies import fingerprints, near_copies
from corpus.ngrams import ngram_counts
from corpus.reference import MAX_PERPLEXITY, NGram
from prepare import REFERENCE_CHARACTERS

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


def slow_fingerprint(text):
    text = "".join(text.split()) or "\n"
    shingles = [text[i : i + 6] for i in range(max(1, len(text) - 5))]
    numbers = [int.from_bytes(hashlib.md5(shingle.encode("utf-8")).digest()[:8], "big") for shingle in shingles]
    return sum(1 << bit for bit in range(64) if 2 * sum(number >> bit & 1 for number in numbers) > len(numbers))


@pytest.mark.quick
def test_fingerprints_are_made_of_the_md5_of_shingles():
    texts = ["", "a", " \n", "abcde", "abcdef", "😀" * 7]
    texts += ["".join(random.Random(i).choices(ALPHABET, k=3 * i)) for i in range(200)]
    assert fingerprints(texts).tolist() == list(map(slow_fingerprint, texts))


def test_fingerprints_of_a_long_text_of_none_and_of_indented_code():
    long = "".join(random.Random(0).choices(ALPHABET, k=45_000))
    assert fingerprints(["a", long, "b"]).tolist() == list(map(slow_fingerprint, ["a", long, "b"]))
    assert fingerprints([]).tolist() == []
    assert fingerprints(["def f():\n        a"]) == fingerprints(["def f(): a"])


@pytest.mark.quick
def test_near_copies_are_all_pairs_within_the_distance_joined():
    random.seed(0)
    prints = []
    for _ in range(150):
        original = random.getrandbits(64)
        for _ in range(4):
            copy = original
            for bit in random.sample(range(64), random.randrange(7)):
                copy ^= 1 << bit
            prints.append(copy)
    random.shuffle(prints)
    first = list(range(len(prints)))

    def find(i):
        return i if first[i] == i else find(first[i])

    for i, one in enumerate(prints):
        for j in range(i):
            if (one ^ prints[j]).bit_count() <= 4:
                a, b = sorted((find(i), find(j)))
                first[b] = a
    expected = [find(i) for i in range(len(prints))]
    assert near_copies(np.array(prints, dtype=np.uint64)).tolist() == expected
    assert 100 < len(set(expected)) < 500


@pytest.mark.quick
def test_near_copies_of_no_prints_and_of_many_equal_ones():
    assert near_copies(np.zeros(0, dtype=np.uint64)).tolist() == []
    assert near_copies(np.array([7] * 1000 + [1], dtype=np.uint64)).tolist() == [0] * 1001


@pytest.mark.quick
def test_an_edited_text_is_a_near_copy_and_another_one_of_its_kind_is_not():
    verse = "滚滚长江东逝水，浪花淘尽英雄。是非成败转头空。青山依旧在，几度夕阳红。"
    verse = (verse + "白发渔樵江渚上，惯看秋月春风。一壶浊酒喜相逢。") * 4
    one, other = (verse + "".join(random.Random(seed).choices(verse, k=600)) for seed in range(2))
    prints = fingerprints([one, one.replace("渔樵", "渔翁", 1), other])
    assert near_copies(prints).tolist() == [0, 0, 2]


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
