"""Filters: what they measure, against numbers worked out by hand."""

import pytest

from corpus import filters

MEASURED = [
    ("alphanumeric", "一2a。", 0.75),
    ("spaced_word_repetition", "却说曹操引兵渡河 " * 11, 1.0),
    ("all_special_characters", "一上a。 1", 5 / 6),
    ("letters_per_word", "ab c1 (", 4 / 3),
    ("average_line_length", "abc\ndefgh\n", 5.0),
    ("maximum_line_length", "abc\ndefgh\n", 5),
    ("character_repetition", "abcdefghij" * 3, 7 / 21),  # of 10 n-grams the int(sqrt(10)) most frequent: 3 + 2 + 2
    ("character_repetition", "abcdefghijklmnopqrst", 0.0),
    ("words_num", "一上 Hello, world! ——", 4),
    ("word_repetition", "a b c d e f g h i j a b c d e f g h i j", 2 / 11),
    ("word_repetition", "却说曹操引兵渡河正遇关" * 2, 4 / 13),
    ("special_characters", "一上a。 1", 1 / 5),  # without the space; 一 and 上 are in Data-Juicer's list of signs
    ("special_characters", "太好了！！！！！ ~~~", 2 / 5),  # a run counts once
    ("special_characters", "3 + 5 = 8", 2 / 5),
    ("special_characters", "|---|\n|---|", 1.0),
    ("sameness", "好" * 100, 90 / 91),
    ("sameness", "abcdefghij" * 10, 81 / 91),
    ("sameness", "好" * 49, 0.0),  # too short to be the same over and over
    ("text_length", "一二", 2),
]


@pytest.mark.quick
@pytest.mark.parametrize("operator, text, expected", MEASURED)
def test_filters(operator, text, expected):
    assert getattr(filters, operator)(text) == pytest.approx(expected)
    assert getattr(filters, operator)("") == 0


@pytest.mark.quick
def test_a_run_of_signs_over_a_space_is_one_run():
    assert filters.special_characters("好！ ！！") == filters.special_characters("好！") == 0.5
