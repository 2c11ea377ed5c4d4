"""Mappers: what they do to a text, against exact strings. Half of the tests are of what they must leave alone."""

import random
import sys

import pytest

from corpus import filters, mappers
from corpus.copies import fingerprints
from corpus.mappers import clean_text, hide_code, remove_repeat_sentences, show_code
from corpus.pipelines import PIPELINES
from extras.speed_data import HOSTILE


@pytest.mark.quick
def test_clean_text():
    assert clean_text("\ufeff a\r\nb  \r\n\r\n\r\n\r\nc\x00\td\u3000\n") == " a\nb\n\nc\td"
    assert clean_text("a\ud800b") == "a?b" and clean_text(" \n\t\n") == ""
    assert clean_text("    indented\n  code") == "    indented\n  code"
    assert clean_text("a\ufdd0\ufdd1b\ufdef") == "ab"  # the noncharacters that mark hidden code


PARAGRAPH = "本公司专业提供北京搬家服务，价格优惠，欢迎来电咨询。我们有二十年的经验，车辆齐全，随叫随到！"
REFRAIN = "长亭外，古道边，芳草碧连天。\n"
MAPPED = [
    ("clean_email", "写信给ab.c+1@mail-x.example.com。好", "写信给。好"),
    ("clean_email", "a@b 不是", "a@b 不是"),
    ("clean_email", "h = x@w.view(1, 2)", "h = x@w.view(1, 2)"),  # a product of matrices
    ("clean_email", "y = q@k.t", "y = q@k.t"),
    ("clean_email", "x@self.in[0] x@w.in() x@w.in.T", "x@self.in[0] x@w.in() x@w.in.T"),
    ("clean_email", "To a@b.com. Thanks, a@b.com... or A@B.Example.COM", "To . Thanks, ... or "),
    ("clean_email", "a@b.com(工作)，a@b.com。", "(工作)，。"),
    ("clean_links", "hr@company.com/jobs@company.com", "hr@company.com/jobs@company.com"),  # two addresses of mail
    ("clean_ip", "从114.114.8.255来，到2400:3200:0:0:0:0:0:1去", "从来，到去"),
    ("clean_ip", "从 47.95.0.123。他的IP是8.8.100.8:80", "从 。他的IP是:80"),
    ("clean_ip", "OpenSSL 1.1.100.2 and from 114.114.100.2", "OpenSSL 1.1.100.2 and from "),
    ("clean_ip", "版本1.2.3", "版本1.2.3"),
    ("clean_ip", "请安装 2.30.8.4，见第 1.1.1.1 节", "请安装 2.30.8.4，见第 1.1.1.1 节"),
    ("clean_ip", "版本 10.0.171.34 和 version 1.0.0.255", "版本 10.0.171.34 和 version 1.0.0.255"),
    ("clean_ip", "Chrome/98.0.47.102 v1.2.3.100 1.2.3.4.100", "Chrome/98.0.47.102 v1.2.3.100 1.2.3.4.100"),
    ("clean_ip", "1:22:33:44:55:66:77:88:99", "1:22:33:44:55:66:77:88:99"),
    ("clean_links", "请看http://a.cn/b(c)d。很好", "请看。很好"),  # right after Chinese, and no further than Chinese
    ("clean_links", "请看http://a.cn很好。", "请看很好。"),
    (
        "clean_links",
        "打开http://localhost:80/x和http://127.0.0.1:5000。",
        "打开http://localhost:80/x和http://127.0.0.1:5000。",
    ),
    ("clean_links", "请看http://intranet:80/x很好。", "请看很好。"),
    ("clean_links", "地址是 http://www.测试.com/a/b.html 请查看。", "地址是  请查看。"),
    ("clean_links", "地址是http://测试.中国/首页，请查看。", "地址是首页，请查看。"),
    ("clean_links", "见www.测试.com。", "见。"),
    ("clean_links", "see (https://en.wikipedia.org/wiki/Soft_(MoE)), and www.example.com/x!", "see (), and !"),
    ("clean_links", "file.txt example.com/path a:b", "file.txt  a:b"),
    ("clean_html", "<p>一&amp;二</p><ul><li>甲</li><li>乙</li></ul>", "一&二\n*甲\n*乙"),
    ("clean_html", "<p>one<br>two</p><p>three</p>", "one\ntwo\nthree"),
    ("clean_html", "<p>一</p>\n\n<p>二<br/>\n三</p>", "一\n二\n三"),
    ("clean_html", "<tr><td>姓名</td><td>年龄</td></tr><tr><td>甲</td>", "姓名  年龄\n甲"),
    ("clean_html", "<h1>标题</h1>正文<b>粗</b>体", "标题\n正文粗体"),
    ("clean_html", "| 甲<br>乙 | <br/>丙 |\n|---|---|\n<br>", "| 甲 乙 |  丙 |\n|---|---|"),
    ("clean_html", "if a<b and c>d:\n  x", "if a<b and c>d:\n  x"),  # no tag
    ("clean_html", "vector<object> v; map<time> t", "vector<object> v; map<time> t"),  # nothing closes these
    ("clean_html", "x <b and c>, <a href='u'>甲</a> <br/>", "x <b and c>, 甲"),
    ("clean_html", "<!DOCTYPE html><p hidden>甲<!-- <b> --></p><input disabled>乙 <!-- 丙", "甲\n乙 <!-- 丙"),
    ("clean_copyright", "/* a /* Copyright */ b */", "b */"),
    ("clean_copyright", "/* Copyright, never closed", "/* Copyright, never closed"),
    ("clean_copyright", "/* Copyright 2020 */\nint a;", "int a;"),
    ("clean_copyright", "/* what it does */\nint a;", "/* what it does */\nint a;"),
    ("clean_copyright", "/* what it does */\n// (c) 2019 X\nint a; // b", "/* what it does */\nint a; // b"),
    (
        "clean_copyright",
        "//****\n// Copyright X\n//****\n#include <a>\nint f();  /* x */\nint g();",
        "#include <a>\nint f();  /* x */\nint g();",
    ),
    ("clean_copyright", "int a; /* Copyright */", "int a; /* Copyright */"),
    ("clean_copyright", "# Copyright me\n#\n# all rights\nimport a", "import a"),
    ("clean_copyright", "#!/bin/sh\n# Copyright me\nls", "#!/bin/sh\nls"),
    ("clean_copyright", "# coding: utf-8\n# Licensed under the MIT License\nx", "# coding: utf-8\nx"),
    ("clean_copyright", "# finds license plates\nimport cv2", "# finds license plates\nimport cv2"),
    ("clean_copyright", "#include <a.h>\n#define B", "#include <a.h>\n#define B"),
    ("clean_copyright", "# A title\n\ntext", "# A title\n\ntext"),
    ("expand_macro", "\\newcommand{\\R}{real}\n\\def\\a{one}\n\\R and \\Rx \\a.", "real and \\Rx one."),
    ("expand_macro", "\\newcommand\\zc{Zero-cost}\n我们称之为 \\zc 的方法", "我们称之为 Zero-cost 的方法"),
    (
        "expand_macro",
        "\\newcommand{\\R}{real}\n\\newcommand{\\S}{s}\n\\R",
        "\\newcommand{\\S}{s}\nreal",
    ),  # \S is not used
    (
        "expand_macro",
        "\\newcommand{\\R}{a}\n\\renewcommand{\\R}{b}\n\\R",
        "\\newcommand{\\R}{a}\n\\renewcommand{\\R}{b}\n\\R",
    ),
    ("expand_macro", "\\newcommand{\\sq}[1]{#1^2}\n\\sq{x}", "\\newcommand{\\sq}[1]{#1^2}\n\\sq{x}"),
    ("fix_unicode", "cafe\u0301 &lt;，。！", "caf\u00e9 <，。！"),
    ("punctuation_normalization", "“好”，１…", '"好","...'),
    # Paragraphs that are repeated go; what is left of a line stays a line.
    ("remove_repeat_sentences", f"{PARAGRAPH}\n{PARAGRAPH}\n{PARAGRAPH}", PARAGRAPH),
    ("remove_repeat_sentences", PARAGRAPH * 3 + "完。", PARAGRAPH + "完。"),
    ("remove_repeat_sentences", f"{PARAGRAPH}甲。\n{PARAGRAPH}乙。\n丙", f"{PARAGRAPH}甲。\n乙。\n丙"),
    (
        "remove_repeat_sentences",
        (REFRAIN + "晚风拂柳笛声残，夕阳山外山。\n") * 3,
        REFRAIN + "晚风拂柳笛声残，夕阳山外山。\n",
    ),
    (
        "remove_repeat_sentences",
        "The first sentence is this one. The second sentence is that one. The first sentence is this one. Good.",
        "The first sentence is this one. The second sentence is that one. Good.",
    ),
    ("remove_specific_chars", "◆一|二●\n ● 三●四\n▲▲", "一|二\n三●四\n"),
    ("remove_specific_chars", "碑文云：大唐贞观□年，□公讳某", "碑文云：大唐贞观□年，□公讳某"),
    ("remove_chars_and_bars", "◆一|二●□", "一二"),
    ("clean_all_links", "请看http://a.cn/b很好 了", "请看 了"),
    ("whitespace_normalization", "\u3000一\u00a0二  三\n四\t", "一 二  三\n四"),
    ("whitespace_normalization", "每\u200b个字\n\t缩进 👩\u200d💻", "每个字\n\t缩进 👩\u200d💻"),
    ("normalize_all_spaces", "每\u200b个字\n\t缩进", "每 个字\n 缩进"),
]


NO_PUBLIC_ADDRESS = """
    192.168.1.1 10.0.0.123 172.16.0.100 user@192.168.1.5 127.0.0.1:8080 127.0.0.100 0.0.0.0 255.255.255.0 169.254.0.1
    224.0.0.251 239.255.255.250 10.0.0.0/8 114.114.114.0/24 fe80:0:0:0:0:0:0:1 192.0.2.100
""".split()


@pytest.mark.quick
@pytest.mark.parametrize("address", NO_PUBLIC_ADDRESS)
def test_addresses_that_are_nobodys_stay(address):
    assert mappers.clean_ip(f"ping {address} 或：{address}。") == f"ping {address} 或：{address}。"


@pytest.mark.quick
@pytest.mark.parametrize("mapper, text, expected", MAPPED)
def test_mappers(mapper, text, expected):
    assert getattr(mappers, mapper)(text) == expected


NOT_REPEATED = {
    "figures and signs": "甲地涨幅1.5%。\n乙地涨幅15%。\n最低-5度。\n最高5度。\n",
    "one sign in a long line": "这次实验当中我们得到了结果x+y>0一式。这次实验当中我们得到了结果x-y>0一式。",
    "capitals": "The name of the variable is Total here. The name of the variable is total here. That is all.",
    "short answers": "问题一\n答案：A\n问题二\n答案：A\n",
    "short sentences in a long line": "好的。走吧！" * 10,
    "items": "1. 哺乳动物\n- 狗\n1. 哺乳动物\n- 猫\n" + f"- {PARAGRAPH}\n" * 2 + f"（一）{PARAGRAPH}\n" * 2,
    "rows of a table": f"| {PARAGRAPH} | 是 |\n" * 2,
    "a refrain": (REFRAIN + "晚风拂柳笛声残，夕阳山外山。\n") * 2 + "天之涯，地之角，知交半零落。\n" + REFRAIN,
    "half of a quotation": f"他说：“{PARAGRAPH}我走了。”她却说：“我们有二十年的经验，车辆齐全，随叫随到！",
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", NOT_REPEATED)
def test_what_is_no_repeat_stays(kind):
    assert remove_repeat_sentences(NOT_REPEATED[kind]) == NOT_REPEATED[kind]


@pytest.mark.quick
def test_a_closing_quote_belongs_to_its_sentence():
    said = "他回过头来对大家说：“我们今天就走到这里吧，明天再来。”"
    end = "于是大家都停了下来，各自回家去了。"
    assert remove_repeat_sentences(said + end + said + "完。") == said + end + "完。"


def test_what_is_left_has_no_repeat_and_no_new_line():
    random.seed(0)
    changed = 0
    for _ in range(500):
        pieces = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz，，(“", k=random.randrange(30))) for _ in range(4)]
        text = "".join(
            piece + random.choice(["。", "！", "? ", "。\n", "\n", "。”"]) for piece in random.choices(pieces, k=12)
        )
        lines, left = text.split("\n"), remove_repeat_sentences(text).split("\n")
        changed += left != lines
        for line in left:  # in order, each is made of characters of one line
            while not is_subsequence(line, lines.pop(0)):
                pass
        assert remove_repeat_sentences("\n".join(left)) == "\n".join(left)
    assert changed > 50


def is_subsequence(short, long):
    characters = iter(long)
    return all(character in characters for character in short)


def test_missing_packages_are_done_without_or_named(monkeypatch):
    assert mappers.fix_unicode("ä½\xa0å¥½，caf\u00e9") == "你好，caf\u00e9"  # UTF-8 decoded as Latin-1
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert mappers.fix_unicode("ä½\xa0å¥½ &lt;e\u0301\r\n") == "ä½\xa0å¥½ <\u00e9\n"
    monkeypatch.setitem(sys.modules, "opencc", None)
    mappers.opencc_converter.cache_clear()
    with pytest.raises(ValueError, match="pip install opencc"):
        mappers.chinese_convert("漢")


# ----------------------------------------------------------------------------------------------------------------------
# Code in prose

CODE = {
    "a fence": "```python\nx = '<b>'  # http://a.cn\n```",
    "a fence of tildes, indented": "  ~~~~\n~~~\n<br>\n  ~~~~",
    "a fence that is never closed": "```\n<p>a</p>\n\n<p>b</p>",
    "a span": "`<br>`",
    "a span of two backticks": "`` <br> ``",
    "statements": 'import os\ns.bind(("127.0.0.1", 80))\nx = s.get("http://a.cn")\nfor x in y:\n    return;',
    "C": '#include <map>\nint main() {\n    printf("你好 <b>");\n}',
}
NO_CODE = [
    "他（老王）说：x比y大；好",
    "<div class='a'>甲</div>;",
    "\\newcommand{\\R}{real}",
    "a<b",
    'class="x"',
    "www.a.cn/x?y=1",
]


@pytest.mark.quick
@pytest.mark.parametrize("kind", CODE)
def test_code_is_hidden_and_comes_back(kind):
    text = f"前面的话。\n{CODE[kind]}" + ("" if "never" in kind else "\n后面的话。")
    hidden, codes = hide_code(text)
    assert codes == [CODE[kind]] and CODE[kind] not in hidden and hidden.startswith("前面的话。\n")
    assert show_code(hidden, codes) == text


@pytest.mark.quick
@pytest.mark.parametrize("text", NO_CODE)
def test_what_is_no_code_is_not_hidden(text):
    assert hide_code(text) == (text, [])


@pytest.mark.quick
def test_many_pieces_of_code_come_back_in_their_places_and_those_in_removed_text_do_not():
    text = "".join(f"第{i}个是 `x{i}`，" for i in range(5000))
    assert show_code(*hide_code(text)) == text and len(hide_code(text)[1]) == 5000
    hidden, codes = hide_code("<!-- `a` -->`b`<p>x</p>")
    assert show_code(mappers.clean_html(hidden), codes) == "`b`\nx"


# ----------------------------------------------------------------------------------------------------------------------
# Any input

OPERATORS = {operator for pipeline in PIPELINES.values() for operator in pipeline.operators()}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_text_holds_an_operator_up(name):
    """Anything that is not linear would take hours."""
    text = HOSTILE[name][:300_000]
    for operator in (*OPERATORS, clean_text, hide_code):
        operator(text)
    assert len(fingerprints([text])) == 1


def test_every_mapper_leaves_an_empty_text_empty_and_every_filter_gives_0_for_it():
    for pipeline in PIPELINES.values():
        assert [mapper("") for mapper in pipeline.mappers] == [""] * len(pipeline.mappers)
        assert [measure("") for measure, _, _ in pipeline.filters] == [0] * len(pipeline.filters)
        assert all(low < high for _, low, high in pipeline.filters)
    assert filters.sameness("") == filters.special_characters("\n ") == 0
