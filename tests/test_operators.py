"""The operators: what they do to a text, what they measure, and how copies are found. Against exact strings and slow definitions."""

import hashlib
import math
import random
import sys
from collections import Counter

import numpy as np
import pytest

import clean
from benchmark import HOSTILE, OPERATORS
from clean import PIPELINES, NGram, clean_text, filtered_by, fingerprints, language, mapped, near_copies
from prepare import REFERENCE_CHARACTERS


def test_clean_text():
    assert clean_text("\ufeff a\r\nb  \r\n\r\n\r\n\r\nc\x00\td\u3000\n") == " a\nb\n\nc\td"
    assert clean_text("a\ud800b") == "a?b" and clean_text(" \n\t\n") == "" and clean_text("    indented\n  code") == "    indented\n  code"


@pytest.mark.parametrize(
    "operator, text, expected",
    [
        ("clean_email", "写信给ab.c+1@mail-x.example.com。好", "写信给。好"),
        ("clean_email", "a@b 不是", "a@b 不是"),
        ("clean_ip", "从192.168.0.255来，到2001:0db8:0:0:0:0:0:1去", "从来，到去"),
        ("clean_ip", "版本1.2.3", "版本1.2.3"),
        ("clean_links", "请看http://a.cn/b(c)d。很好", "请看。很好"),  # right behind Chinese, and no further than Chinese
        ("clean_links", "see (https://en.wikipedia.org/wiki/Soft_(MoE)), and www.example.com/x!", "see (), and !"),
        ("clean_links", "file.txt example.com/path a:b", "file.txt  a:b"),
        ("clean_html", "<p>一&amp;二</p><ul><li>甲</li><li>乙</li></ul>", "一&二\n*甲\n*乙"),
        ("clean_html", "if a<b and c>d:\n  x", "if a<b and c>d:\n  x"),  # no tag
        ("clean_html", "x <b and c>, <a href='u'>甲</a> <br/>", "x <b and c>, 甲 "),
        ("clean_html", "<!DOCTYPE html><p hidden>甲<!-- <b> --></p><input disabled>乙 <!-- 丙", "甲乙 <!-- 丙"),
        ("clean_copyright", "/* a /* Copyright */ b */", " b */"),
        ("clean_copyright", "/* Copyright, never closed", "/* Copyright, never closed"),
        ("clean_copyright", "/* Copyright 2020 */\nint a;", "\nint a;"),
        ("clean_copyright", "/* what it does */\nint a;", "/* what it does */\nint a;"),
        ("clean_copyright", "# Copyright me\n#\n# all rights\nimport a", "import a"),
        ("clean_copyright", "#!/bin/sh\n# Copyright me\nls", "#!/bin/sh\n# Copyright me\nls"),
        ("clean_copyright", "#include <a.h>\n#define B", "#include <a.h>\n#define B"),
        ("clean_copyright", "# A title\n\ntext", "# A title\n\ntext"),
        ("expand_macro", "\\newcommand{\\R}{real}\n\\def\\a{one}\n\\R and \\Rx \\a.", "\\newcommand{real}{real}\n\\defone{one}\nreal and \\Rx one."),
        ("fix_unicode", "cafe\u0301 &lt;，。！", "caf\u00e9 <，。！"),
        ("punctuation_normalization", "“好”，１…", '"好","...'),
        ("remove_repeat_sentences", "好的。走吧！好的。\n嗯。嗯。走吧？", "好的。走吧！\n嗯。嗯。"),
        ("remove_repeat_sentences", "好、的。好的。 好的！", "好、的。"),
        ("remove_repeat_sentences", "Good one. Next thing! Good one. Next thing! The end of it.", "Good one. Next thing! The end of it."),
        ("remove_repeat_sentences", "图1. Apple公司。售价。图1. Apple公司。售价。最后。", "图1. Apple公司。售价。最后。"),
        ("remove_repeat_sentences", "1.50\n2.50\n第1章\n第2章\n", "1.50\n2.50\n第1章\n第2章\n"),  # figures tell lines apart
        ("remove_specific_chars", "◆一|二●", "一|二"),
        ("remove_chars_and_bars", "◆一|二●", "一二"),
        ("clean_all_links", "请看http://a.cn/b很好 了", "请看 了"),
        ("whitespace_normalization", "\u3000一\u00a0二  三\n四\t", "一 二  三\n四"),
    ],
)  # fmt: skip
def test_mappers(operator, text, expected):
    assert getattr(clean, operator)(text) == expected


@pytest.mark.parametrize(
    "operator, text, expected",
    [
        ("alphanumeric", "一2a。", 0.75),
        ("spaced_word_repetition", "却说曹操引兵渡河 " * 11, 1.0),
        ("all_special_characters", "一上a。 1", 5 / 6),
        ("letters_per_word", "ab c1 (", 4 / 3),
        ("average_line_length", "abc\ndefgh\n", 5.0),
        ("maximum_line_length", "abc\ndefgh\n", 5),
        ("character_repetition", "abcdefghij" * 3, 7 / 21),  # of 10 kinds the 3 = int(sqrt(10)) most frequent: 3 + 2 + 2
        ("character_repetition", "abcdefghijklmnopqrst", 0.0),
        ("words_num", "一上 Hello, world! ——", 4),
        ("word_repetition", "a b c d e f g h i j a b c d e f g h i j", 2 / 11),
        ("word_repetition", "却说曹操引兵渡河正遇关" * 2, 4 / 13),
        ("special_characters", "一上a。 1", 0.5),
        ("text_length", "一二", 2),
    ],
)
def test_filters(operator, text, expected):
    assert getattr(clean, operator)(text) == pytest.approx(expected)
    assert getattr(clean, operator)("") == 0


@pytest.mark.parametrize("n", [1, 3, 10])
def test_ngram_counts_are_those_of_a_dictionary(n):
    text = "".join(random.Random(n).choices("abc", k=500))
    expected = sorted(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), reverse=True)
    assert clean.ngram_counts(np.array([ord(c) for c in text], dtype=np.uint64), n).tolist() == expected


def test_the_published_settings_do_to_chinese_what_they_did():
    text = "漢語的“書”，好。子丑寅卯辰巳午未申酉戌亥甲乙丙丁戊己庚辛壬癸，見http://a.cn/b與邊 走|了|看。"
    expected = '汉语的"书",好.子丑寅卯辰巳午未申酉戌亥甲乙丙丁戊己庚辛壬癸,见 走了看.'
    assert clean.mapped(text, "published") == expected and clean.filtered_by(expected, "published") is None
    assert clean.filtered_by("汉语的书好子丑寅卯辰巳午", "published") == "alphanumeric"  # plain prose


def test_what_is_not_installed_is_done_without_or_named(monkeypatch):
    assert clean.fix_unicode("ä½\xa0å¥½，caf\u00e9") == "你好，caf\u00e9"  # bytes of UTF-8 that were read as Latin-1
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean.fix_unicode("ä½\xa0å¥½ &lt;e\u0301\r\n") == "ä½\xa0å¥½ <\u00e9\n"
    monkeypatch.setitem(sys.modules, "opencc", None)
    clean.opencc_converter.cache_clear()
    with pytest.raises(SystemExit, match="pip install opencc"):
        clean.chinese_convert("漢")


def test_a_chain_of_mappers_then_the_first_filter_that_drops():
    assert mapped("却说曹操。" * 3, "zh") == "却说曹操。" and filtered_by("却说曹操。", "zh") == "text_length"
    assert filtered_by("却说曹操引兵渡河，正遇关公在前。", "zh") is None
    assert filtered_by("！" * 30, "zh") == "words_num" and mapped("a", "none") == "a" and filtered_by("", "none") is None
    assert [language(text) for text in ("却说曹操", "却说 ab", "却 abcde", "plain English", "", "123")] == ["zh", "zh", "en", "en", "en", "en"]


def test_every_step_of_a_pipeline_is_an_operator_and_mappers_come_first():
    for steps in PIPELINES.values():
        kinds = [isinstance(step, str) for step in steps]
        assert kinds == sorted(kinds, reverse=True)
        for step in steps:
            result = getattr(clean, step if isinstance(step, str) else step[0])("")
            assert result == ("" if isinstance(step, str) else 0)


# --- the published settings and what they do to Chinese (each of these lost text)


@pytest.mark.parametrize("published, ours, text, expected", [
    ("remove_chars_and_bars", "remove_specific_chars", "|姓名|年龄|", "|姓名|年龄|"),
    ("punctuation_normalization", "fix_unicode", "１月，“好”。", "１月，“好”。"),
    ("clean_all_links", "clean_links", "见http://a.cn/b这里很好。 完", "见这里很好。 完"),
])  # fmt: skip
def test_mappers_that_damage_chinese_have_another_that_does_not(published, ours, text, expected):
    assert getattr(clean, ours)(text) == expected != getattr(clean, published)(text)


def test_filters_see_chinese_prose_as_prose():
    prose = "滚滚长江东逝水，浪花淘尽英雄。是非成败转头空，青山依旧在，几度夕阳红。白发渔樵江渚上，惯看秋月春风。一壶浊酒喜相逢，古今多少事，都付笑谈中。"
    one_paragraph = prose + "".join(chr(0x4E00 + i) for i in range(100, 300))
    for text in (prose, one_paragraph, "一上士" * 3 + prose):
        assert filtered_by(text, "zh") is None
    assert filtered_by(one_paragraph, "published") in ("alphanumeric", "average_line_length")
    assert clean.words_num(prose) == sum(c.isalpha() for c in prose)  # not the one word that white space finds
    assert clean.special_characters("一上士") == 0 < clean.all_special_characters("一上士")


def test_mojibake_is_repaired_before_its_bytes_are_taken_for_control_characters():
    for text in ("中文维基百科", "中文，好。"):
        assert mapped(clean_text(text.encode("utf-8").decode("latin-1")), "zh") == text
    assert mapped("a\x85b\x9f", "zh").isprintable() and mapped("用 &lt;br&gt; 换行，<b>粗</b>", "zh") == "用 <br> 换行，粗"


def test_a_text_without_repeated_sentences_stays_as_it_is():
    random.seed(0)
    for _ in range(500):
        pieces = ["".join(random.choices("ab1 ，.", k=random.randrange(8))) + random.choice("。！？.!?\n ") for _ in range(6)]
        text = "".join(pieces)
        result = clean.remove_repeat_sentences(text)
        keys = [key for part in clean.ENDING.split(text) if len(key := "".join(filter(str.isalnum, part))) > 1]
        assert (result == text) == (len(set(keys)) == len(keys))
        left = [key for part in clean.ENDING.split(result) if len(key := "".join(filter(str.isalnum, part))) > 1]
        assert len(set(left)) == len(left) or len(result) < len(text)


def test_code_keeps_what_the_published_operators_delete():
    assert mapped('s.replace("&", "&amp;")\n', "code") == 's.replace("&", "&amp;")\n'
    program = "#include <stdio.h>\nint main() {\n    char* word = map[key:value];\n    return 0;\n}\n"
    assert mapped(program, "code") == program and filtered_by(program, "code") is None
    assert clean.clean_html("if a<b:\n    the_rest()") == "if a<b:\n    the_rest()"


# --- any input


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_text_holds_an_operator_up(name):
    """Anything that is not linear would take hours."""
    text = HOSTILE[name][:300_000]
    for operator in (*OPERATORS, "clean_text"):
        getattr(clean, operator)(text)
    assert len(fingerprints([text])) == 1


# --- perplexity


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


def test_perplexity_is_that_of_a_model_of_dictionaries():
    reference = ["却说曹操引兵渡河，正遇关公在前。", "却说玄德引兵来到江边。", "a"]
    model = NGram()
    for text in reference:
        model.learn(text)
    model.learn("")
    for text in ("却说曹操", "却说关公引兵来到河边。", "好", "abc 却"):
        assert model.perplexity(text) == pytest.approx(slow_perplexity(reference, text), rel=1e-12)
    assert model.perplexity("") == 0 and model.perplexity("却说曹操") < 50 < 1500 < model.perplexity("﹏烫屯＃㊣♀")


def test_a_model_of_the_largest_reference_still_tells_noise_apart():
    rng = np.random.default_rng(0)
    text, noise = ("".join(map(chr, rng.integers(0x4E00, 0x9000, n))) for n in (REFERENCE_CHARACTERS, 2000))
    model = NGram()
    model.learn(text)
    assert model.perplexity(text[1_000_000:1_002_000]) < 100 and model.perplexity(noise) > clean.MAX_PERPLEXITY


# --- near copies


def slow_fingerprint(text):
    text = "".join(text.split()) or "\n"
    shingles = [text[i : i + 6] for i in range(max(1, len(text) - 5))]
    numbers = [int.from_bytes(hashlib.md5(shingle.encode("utf-8")).digest()[:8], "big") for shingle in shingles]
    return sum(1 << bit for bit in range(64) if 2 * sum(number >> bit & 1 for number in numbers) > len(numbers))


def test_fingerprints_are_made_of_the_md5_of_shingles():
    alphabet = "却说曹操引兵渡河ab 1\n，。é😀"
    texts = ["", "a", " \n", "abcde", "abcdef", "😀" * 7, *("".join(random.Random(i).choices(alphabet, k=3 * i)) for i in range(200))]
    assert fingerprints(texts).tolist() == list(map(slow_fingerprint, texts))
    long = "".join(random.Random(0).choices(alphabet, k=45_000))
    assert fingerprints(["a", long, "b"]).tolist() == list(map(slow_fingerprint, ["a", long, "b"]))
    assert fingerprints([]).tolist() == [] and fingerprints(["def f():\n        a"]) == fingerprints(["def f(): a"])


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
    assert 100 < len(set(expected)) < 500 and near_copies(np.zeros(0, dtype=np.uint64)).tolist() == []
    assert near_copies(np.array([7] * 1000 + [1], dtype=np.uint64)).tolist() == [0] * 1001


def test_an_edited_text_is_a_near_copy_and_another_of_its_kind_is_not():
    verse = "滚滚长江东逝水，浪花淘尽英雄。是非成败转头空。青山依旧在，几度夕阳红。白发渔樵江渚上，惯看秋月春风。一壶浊酒喜相逢。" * 4
    numbered = [verse + "".join(random.Random(seed).choices(verse, k=600)) for seed in range(2)]
    prints = fingerprints([numbered[0], numbered[0].replace("渔樵", "渔翁", 1), numbered[1]])
    assert near_copies(prints).tolist() == [0, 0, 2]
