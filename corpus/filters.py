"""Filters: operators that measure a text, str -> number. pipelines.py says between which bounds it is kept.

They are those of Steel-LLM (arXiv 2502.06635, tables 7 and 8), named as in Data-Juicer (arXiv 2309.02033), with
settings that suit Chinese, English and code. "As Steel-LLM does it" marks those that only its own settings use.

Every filter gives 0 for an empty text, in time linear in the length of the text, whatever it says.
"""

import functools

import numpy as np

from corpus.ngrams import codes_of, ngram_counts

SHORT = 50  # characters, below which nothing is one thing repeated
REPEATED = 10  # repetition is that of n-grams of this many characters or words

# ----------------------------------------------------------------------------------------------------------------------
# Characters and their classes


def code_points(ranges):
    """Ranges in hexadecimal -> set of characters: "0041-0043 0061" gives A, B, C and a."""
    pairs = (part.partition("-") for part in ranges.split())
    return {chr(code) for low, _, high in pairs for code in range(int(low, 16), int(high or low, 16) + 1)}


# Data-Juicer's list of special characters (Apache-2.0), which goes back to BigScience's; ASCII digits are in it.
SPECIAL = code_points("""
    0009-000D 0020-0040 005B-0060 007B-007E 0081-0085 0091-0093 0095-0099 009C-009D 00A1-00AB 00AD-00B4 00B7-00BF 00D7
    00F7-00F8 0131 026A 02BA-02BC 02C8 02CC 02D0 02D8 02DA 02DC 03C0 0413 060C 0647 066A 066C 06E9 093E 0940 0947 094D
    097D 09BE 0E51 2002-2003 2005 2008-200B 2010-2011 2013-2016 2018-201A 201C-2020 2022 2024 2026 202F-2030 2032-2033
    2039-203A 203C 203F 2043-2044 2049 20A8 20AA 20AC 2103 2122 2139 2190-2199 21A9-21AA 21D3 2206 2208 2212 221A
    221E-221F 223C 2248 2256 2264-2265 2295 22C5 231A-231B 2328 23CF 23E9-23F3 23F8-23FA 24C2 2550 25A0 25AA-25AC 25B2
    25B4 25B6-25B7 25BA-25BC 25C0 25C6 25CF 25E6 25FB-25FE 2600-2606 260E 2611 2614-2615 2618 261B 261D 2620 2622-2623
    2626 262A 262E-262F 2638-263B 2640 2642 2648-2653 265F-2661 2663 2665-2666 2668 266B 267B 267E-267F 2692-2697 2699
    269B-269C 26A0-26A1 26A7 26AA-26AB 26B0-26B1 26BD-26BE 26C4-26C5 26C8 26CE-26CF 26D1 26D3-26D4 26E9-26EA 26F0-26F5
    26F7-26FA 26FD 2702 2705 2708-270D 270F 2712-2714 2716 271D 2721 2726 2728 2731 2733-2734 2744 2747 274C 274E
    2753-2757 2763-2764 2795-2797 27A1 27A4 27A9 27B0 27BF 2800 2934-2935 2B05-2B07 2B1B-2B1C 2B50 2B55 3000-3002
    300A-300D 3010-3011 3030 303D 309C 30B7 30C3-30C4 30F3 30FB-30FC 3297 3299 4E00 4E0A 58EB FD3E-FD3F FEFF FF01
    FF08-FF09 FF0C FF0E FF11 FF1A-FF1B FF1F FF3E FF5E FFFC-FFFD 1F004 1F0CF 1F170-1F171 1F17E-1F17F 1F18E 1F191-1F19A
    1F201-1F202 1F21A 1F22F 1F232-1F23A 1F250-1F251 1F300-1F321 1F324-1F393 1F396-1F397 1F399-1F39B 1F39E-1F3F0
    1F3F3-1F3F5 1F3F7-1F4FD 1F4FF-1F53D 1F549-1F54E 1F550-1F567 1F56F-1F570 1F573-1F57A 1F587 1F58A-1F58D 1F590
    1F595-1F596 1F5A4-1F5A5 1F5A8 1F5B1-1F5B2 1F5BC 1F5C2-1F5C4 1F5D1-1F5D3 1F5DC-1F5DE 1F5E1 1F5E3 1F5E8 1F5EF 1F5F3
    1F5FA-1F64F 1F680-1F6C5 1F6CB-1F6D2 1F6D5-1F6D7 1F6DC-1F6E5 1F6E9 1F6EB-1F6EC 1F6F0 1F6F3-1F6FC 1F7E0-1F7EB 1F7F0
    1F90C-1F93A 1F93C-1F945 1F947-1F9FF 1FA70-1FA7C 1FA80-1FA88 1FA90-1FABD 1FABF-1FAC5 1FACE-1FADB 1FAE0-1FAE8
    1FAF0-1FAF8
""")
SIGNS = {character for character in SPECIAL if not character.isalpha()}  # 一, 上, 士 and some kana are in the list
CJK_RANGES = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3134F))
LETTER, ALNUM, CJK, SIGN, LISTED, SPACE = (1 << i for i in range(6))


@functools.cache
def class_table():
    """[0x110000] uint8, the classes of each code point as bits.

    LETTER and ALNUM of any script, CJK, SIGN (in SIGNS), LISTED (in SPECIAL), SPACE.
    """
    table = np.zeros(0x110000, dtype=np.uint8)
    characters = list(map(chr, range(0x110000)))
    tests = {
        LETTER: str.isalpha,
        ALNUM: str.isalnum,
        SPACE: str.isspace,
        SIGN: SIGNS.__contains__,
        LISTED: SPECIAL.__contains__,
    }
    for bit, test in tests.items():
        table |= np.fromiter(map(test, characters), dtype=bool, count=len(characters)) * np.uint8(bit)
    for low, high in CJK_RANGES:
        table[low : high + 1] |= CJK
    return table


@functools.lru_cache(maxsize=2)
def classes_of(text):
    """The classes of each character, [len(text)] uint8 as in class_table."""
    return class_table()[codes_of(text)]


def share_of(bit, text):
    """The share of characters that are in a class."""
    return float(np.count_nonzero(classes_of(text) & bit) / max(len(text), 1))


# ----------------------------------------------------------------------------------------------------------------------
# Measures of a text


def text_length(text):
    return len(text)


def alphanumeric(text):
    """As Steel-LLM does it: the share of letters and digits of any script."""
    return share_of(ALNUM, text)


def letters_per_word(text):
    """Letters and digits per word. Data-Juicer's recipes for code bound this number, under the name alphanumeric."""
    return np.count_nonzero(classes_of(text) & ALNUM) / max(len(text.split()), 1)


def average_line_length(text):
    """Characters per line, line ends included."""
    return len(text) / max(len(text.splitlines()), 1)


def maximum_line_length(text):
    return max(map(len, text.splitlines()), default=0)


def special_characters(text):
    """Share of signs and emoji among the characters, white space left out. A run of one character counts once."""
    classes, codes = classes_of(text), codes_of(text)
    solid = classes & SPACE == 0
    classes, codes = classes[solid], codes[solid]
    first = np.append(True, codes[1:] != codes[:-1])[: len(codes)]
    return float(np.count_nonzero(first & (classes & ALNUM == 0)) / max(np.count_nonzero(first), 1))


def all_special_characters(text):
    """As Steel-LLM does it: a few Chinese characters count as special."""
    return share_of(LISTED, text)


def character_repetition(text, n=REPEATED):
    """Share of the n-grams of characters that are among the most frequent ones, as Data-Juicer defines it.

    Of k distinct n-grams, the sqrt(k) most frequent ones count. Those that occur only once never count.
    """
    counts = ngram_counts(codes_of(text), n)
    top = min(int(len(counts) ** 0.5), np.count_nonzero(counts > 1))
    return float(counts[:top].sum() / max(counts.sum(), 1))


def sameness(text, n=REPEATED):
    """Share of the n-grams of characters that are not the first of their kind: 0.9 where one thing stands ten times.

    What is short is never the same: 哈哈哈 is an answer, and so is the number 10 ** 30.
    """
    if len(text) < SHORT:
        return 0.0
    counts = ngram_counts(codes_of(text), n)
    return float(1 - len(counts) / max(counts.sum(), 1)) if len(counts) else 0.0


@functools.lru_cache(maxsize=2)
def word_codes(text):
    """The words of a text as integers, equal for equal words, [number of words].

    A Chinese character is a word, as there are no spaces between them. Other words are what white space and Chinese
    separate, in lower case, without signs at their ends.
    """
    text = text.lower()
    classes = classes_of(text)
    separators = classes & (CJK | SPACE) > 0
    letters = np.flatnonzero(~separators & ((classes & SIGN == 0) | (classes & ALNUM > 0)))  # digits are in SIGN
    stretch = np.cumsum(separators)[letters]  # equal for letters with no separator between them
    change = stretch[1:] != stretch[:-1]
    starts = letters[np.append(True, change)[: len(letters)]]  # a word goes from the first such letter to the last
    ends = letters[np.append(change, True)[: len(letters)]] + 1
    codes = np.where(classes & CJK, codes_of(text), 0)
    numbers = {}  # of other words
    words = (text[start:end] for start, end in zip(starts.tolist(), ends.tolist()))
    codes[starts] = [numbers.setdefault(word, 0x110000 + len(numbers)) for word in words]
    return codes[codes > 0]


def words_num(text):
    return len(word_codes(text))


def repetition(codes, n=REPEATED):
    """Share of the n-grams of an array of integers that occur more than once."""
    counts = ngram_counts(codes, n)
    return float(counts[counts > 1].sum() / max(counts.sum(), 1))


def word_repetition(text):
    """Share of n-grams of words that occur more than once."""
    return repetition(word_codes(text))


def spaced_word_repetition(text):
    """As Steel-LLM does it: only white space separates words, so a whole Chinese clause is one word."""
    numbers, codes = {}, []
    for word in text.lower().split():
        start, end = 0, len(word)
        while start < end and word[start] in SIGNS:
            start += 1
        while start < end and word[end - 1] in SIGNS:
            end -= 1
        if start < end:
            codes.append(numbers.setdefault(word[start:end], len(numbers)))
    return repetition(np.array(codes))
