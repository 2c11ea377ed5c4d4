"""Operators: what they do to a text and what they measure, against exact strings."""

import random
import sys

import pytest

from corpus import operators
from corpus.copies import fingerprints
from corpus.documents import Document
from corpus.operators import clean_text
from corpus.pipelines import PIPELINES, apply_mappers, clean, filtered_by, language
from extras.speed_data import HOSTILE


@pytest.mark.quick
def test_clean_text():
    assert clean_text("\ufeff a\r\nb  \r\n\r\n\r\n\r\nc\x00\td\u3000\n") == " a\nb\n\nc\td"
    assert clean_text("a\ud800b") == "a?b" and clean_text(" \n\t\n") == ""
    assert clean_text("    indented\n  code") == "    indented\n  code"


MAPPED = [
    ("clean_email", "写信给ab.c+1@mail-x.example.com。好", "写信给。好"),
    ("clean_email", "a@b 不是", "a@b 不是"),
    ("clean_ip", "从192.168.0.255来，到2001:0db8:0:0:0:0:0:1去", "从来，到去"),
    ("clean_ip", "版本1.2.3", "版本1.2.3"),
    ("clean_links", "请看http://a.cn/b(c)d。很好", "请看。很好"),  # right after Chinese, and no further than Chinese
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
    (
        "expand_macro",
        "\\newcommand{\\R}{real}\n\\def\\a{one}\n\\R and \\Rx \\a.",
        "\\newcommand{real}{real}\n\\defone{one}\nreal and \\Rx one.",
    ),
    ("fix_unicode", "cafe\u0301 &lt;，。！", "caf\u00e9 <，。！"),
    ("punctuation_normalization", "“好”，１…", '"好","...'),
    ("remove_repeat_sentences", "好的。走吧！好的。\n嗯。嗯。走吧？", "好的。走吧！\n嗯。嗯。"),
    ("remove_repeat_sentences", "好、的。好的。 好的！", "好、的。"),
    (
        "remove_repeat_sentences",
        "Good one. Next thing! Good one. Next thing! The end.",
        "Good one. Next thing! The end.",
    ),
    ("remove_repeat_sentences", "图1. Apple公司。售价。图1. Apple公司。售价。最后。", "图1. Apple公司。售价。最后。"),
    ("remove_repeat_sentences", "1.50\n2.50\n第1章\n第2章\n", "1.50\n2.50\n第1章\n第2章\n"),  # digits tell lines apart
    ("remove_specific_chars", "◆一|二●", "一|二"),
    ("remove_chars_and_bars", "◆一|二●", "一二"),
    ("clean_all_links", "请看http://a.cn/b很好 了", "请看 了"),
    ("whitespace_normalization", "\u3000一\u00a0二  三\n四\t", "一 二  三\n四"),
]


@pytest.mark.quick
@pytest.mark.parametrize("operator, text, expected", MAPPED)
def test_mappers(operator, text, expected):
    assert getattr(operators, operator)(text) == expected


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
    ("special_characters", "一上a。 1", 0.5),
    ("text_length", "一二", 2),
]


@pytest.mark.quick
@pytest.mark.parametrize("operator, text, expected", MEASURED)
def test_filters(operator, text, expected):
    assert getattr(operators, operator)(text) == pytest.approx(expected)
    assert getattr(operators, operator)("") == 0


def test_missing_packages_are_done_without_or_named(monkeypatch):
    assert operators.fix_unicode("ä½\xa0å¥½，caf\u00e9") == "你好，caf\u00e9"  # UTF-8 decoded as Latin-1
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert operators.fix_unicode("ä½\xa0å¥½ &lt;e\u0301\r\n") == "ä½\xa0å¥½ <\u00e9\n"
    monkeypatch.setitem(sys.modules, "opencc", None)
    operators.opencc_converter.cache_clear()
    with pytest.raises(ValueError, match="pip install opencc"):
        operators.chinese_convert("漢")


# ----------------------------------------------------------------------------------------------------------------------
# Pipelines


def test_mappers_run_first_then_the_first_filter_that_drops():
    assert apply_mappers("却说曹操。" * 3, "zh") == "却说曹操。" and filtered_by("却说曹操。", "zh") == "text_length"
    assert filtered_by("却说曹操引兵渡河，正遇关公在前。", "zh") is None
    assert filtered_by("！" * 30, "zh") == "words_num"
    assert apply_mappers("a", "none") == "a" and filtered_by("", "none") is None


@pytest.mark.quick
@pytest.mark.parametrize("text", ["却说曹操", "却说 ab"])
def test_a_text_with_enough_chinese_is_chinese(text):
    assert language(text) == "zh"


@pytest.mark.quick
@pytest.mark.parametrize("text", ["却 abcde", "plain English", "", "123"])
def test_any_other_text_is_english(text):
    assert language(text) == "en"


def test_mappers_leave_an_empty_text_empty_and_filters_give_0_for_it():
    assert PIPELINES.keys() == {"zh", "en", "code", "published", "none"}
    for mappers, filters in PIPELINES.values():
        assert [mapper("") for mapper in mappers] == [""] * len(mappers)
        assert [measure("") for measure, _, _ in filters] == [0] * len(filters)
        assert all(low < high for _, low, high in filters)


def chat(*turns):
    return Document([{"role": role, "content": content} for role, content in turns], "chat")


@pytest.mark.quick
def test_a_turn_that_cleaning_empties_is_left_out_and_half_an_emoji_is_replaced():
    link, question = ("user", "https://a.cn/x"), ("user", "你好\ud83d，请问第一回讲什么？")
    answer = ("assistant", "宴桃园豪杰三结义。\ud83d")
    cleaned, dropped_by = clean(chat(link, question, answer), "auto")
    expected = chat(("user", "你好?，请问第一回讲什么？"), ("assistant", "宴桃园豪杰三结义。?"))
    assert dropped_by is None and cleaned == expected
    assert clean(chat(link, answer), "auto")[1] == "empty"
    assert clean(chat(question), "auto")[1] == "empty"  # nobody answers


@pytest.mark.quick
def test_what_drops_a_document_before_any_filter():
    assert clean(Document("好" * 30, problem="not JSON", dropped_by="upvotes"))[1] == "malformed"
    assert clean(Document("好" * 30, dropped_by="upvotes"))[1] == "upvotes"
    assert clean(Document(" \n\x00"))[1] == "empty"
    assert clean(Document([], "chat"))[1] == "empty"
    assert clean(Document("\ufeffa"), "none") == (Document("a"), None)


# ----------------------------------------------------------------------------------------------------------------------
# Steel-LLM's own settings, and what they do to Chinese: each of these lost text


def test_steel_llms_settings_do_to_chinese_what_they_did():
    text = "漢語的“書”，好。子丑寅卯辰巳午未申酉戌亥甲乙丙丁戊己庚辛壬癸，見http://a.cn/b與邊 走|了|看。"
    expected = '汉语的"书",好.子丑寅卯辰巳午未申酉戌亥甲乙丙丁戊己庚辛壬癸,见 走了看.'
    assert apply_mappers(text, "published") == expected and filtered_by(expected, "published") is None
    assert filtered_by("汉语的书好子丑寅卯辰巳午", "published") == "alphanumeric"  # plain prose


@pytest.mark.quick
@pytest.mark.parametrize(
    "theirs, ours, text, expected",
    [
        ("remove_chars_and_bars", "remove_specific_chars", "|姓名|年龄|", "|姓名|年龄|"),
        ("punctuation_normalization", "fix_unicode", "１月，“好”。", "１月，“好”。"),
        ("clean_all_links", "clean_links", "见http://a.cn/b这里很好。 完", "见这里很好。 完"),
    ],
)
def test_mappers_that_damage_chinese_have_a_counterpart_that_does_not(theirs, ours, text, expected):
    assert getattr(operators, ours)(text) == expected != getattr(operators, theirs)(text)


def test_filters_see_chinese_prose_as_prose():
    prose = "滚滚长江东逝水，浪花淘尽英雄。是非成败转头空，青山依旧在，几度夕阳红。"
    prose += "白发渔樵江渚上，惯看秋月春风。一壶浊酒喜相逢，古今多少事，都付笑谈中。"
    one_paragraph = prose + "".join(chr(0x4E00 + i) for i in range(100, 300))
    for text in (prose, one_paragraph, "一上士" * 3 + prose):
        assert filtered_by(text, "zh") is None
    assert filtered_by(one_paragraph, "published") in ("alphanumeric", "average_line_length")
    assert operators.words_num(prose) == sum(c.isalpha() for c in prose)  # not the one word between white space
    assert operators.special_characters("一上士") == 0 < operators.all_special_characters("一上士")


def test_mojibake_is_repaired_before_its_bytes_are_taken_for_control_characters():
    for text in ("中文维基百科", "中文，好。"):
        assert apply_mappers(clean_text(text.encode("utf-8").decode("latin-1")), "zh") == text
    assert apply_mappers("a\x85b\x9f", "zh").isprintable()
    assert apply_mappers("用 &lt;br&gt; 换行，<b>粗</b>", "zh") == "用 <br> 换行，粗"


def test_a_text_without_repeated_sentences_stays_as_it_is():
    def sentence_keys(text):
        parts = (filter(str.isalnum, part) for part in operators.SENTENCE_END.split(text))
        return [key for part in parts if len(key := "".join(part)) > 1]

    random.seed(0)
    for _ in range(500):
        pieces = ["".join(random.choices("ab1 ，.", k=random.randrange(8))) for _ in range(6)]
        text = "".join(piece + random.choice("。！？.!?\n ") for piece in pieces)
        result = operators.remove_repeat_sentences(text)
        keys, left = sentence_keys(text), sentence_keys(result)
        assert (result == text) == (len(set(keys)) == len(keys))
        assert len(set(left)) == len(left) or len(result) < len(text)


def test_code_keeps_what_prose_operators_delete():
    assert apply_mappers('s.replace("&", "&amp;")\n', "code") == 's.replace("&", "&amp;")\n'
    program = "#include <stdio.h>\nint main() {\n    char* word = map[key:value];\n    return 0;\n}\n"
    assert apply_mappers(program, "code") == program and filtered_by(program, "code") is None
    assert operators.clean_html("if a<b:\n    the_rest()") == "if a<b:\n    the_rest()"


# ----------------------------------------------------------------------------------------------------------------------
# Any input

OPERATORS = {operator for pipeline in PIPELINES.values() for operator in pipeline.operators()}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_text_holds_an_operator_up(name):
    """Anything that is not linear would take hours."""
    text = HOSTILE[name][:300_000]
    for operator in (*OPERATORS, clean_text):
        operator(text)
    assert len(fingerprints([text])) == 1
