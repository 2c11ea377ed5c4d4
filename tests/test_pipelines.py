"""Pipelines: what becomes of a whole document, text, program or chat; what stays as it was, and what goes."""

import ast
import inspect
import random
import textwrap

import pytest

from corpus import filters, mappers
from corpus.documents import Document
from corpus.mappers import clean_text
from corpus.pipelines import PIPELINES, apply_mappers, clean, filtered_by, language, pipeline_of, split_long


def chat(*turns):
    return Document([{"role": role, "content": content} for role, content in turns], "chat")


def exchange(question, answer):
    return chat(("user", question), ("assistant", answer))


# ----------------------------------------------------------------------------------------------------------------------
# What must stay as it is

FUNCTION = textwrap.dedent(inspect.getsource(textwrap.indent))
VERSE = "送别\n长亭外，古道边，\n芳草碧连天。\n晚风拂柳笛声残，\n夕阳山外山。\n"
KEPT = {
    "code in a text": Document(
        "两个函数：\n```python\ndef add(x, y):\n    return x + y\n\ndef f(x, y):\n    return x - y\n```"
    ),
    "HTML that a text teaches": Document("标题这样写：\n```html\n<div><h1>标题</h1></div>\n```\n换行用 `<br>` 标签。"),
    "code without a fence": Document(
        '先写：\nimport os\ns.bind(("192.168.0.1", 80))\nx = get("http://a.cn/b")\n就可以了。'
    ),
    "a table": Document("| 月份 | 收入 | 支出 |\n|---|---|---|\n| 一月 | 12000 | 8000 |\n| 二月 | 13500 | 9100 |"),
    "sums": Document("3 + 5 = 8\n12 - 7 = 5\n(3+5)×2=16\n9 ÷ 3 = 3"),
    "a couplet": Document("和尚\n悟空\n师徒四人\n一路西行"),
    "a poem with a refrain": Document(
        (VERSE + "\n") * 2 + "天之涯，地之角，\n知交半零落。\n一壶浊酒尽余欢，\n今宵别梦寒。"
    ),
    "English verse": Document("Tyger Tyger\nburning\nbright\nIn the forests\nof the night"),
    "a story in one line": Document(
        "从前有座山，山里有座庙，庙里有个老和尚，正在给小和尚讲故事。" + "".join(map(chr, range(0x4E00, 0x9000)))
    ),
    "prices, dates and numbers": Document("2009-6-13 9:36:00 您的订单 4491950 已打印，￥5,007.00元，电话 13774321320"),
    "a review with feeling": Document(
        "性价比很不错！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！！"
    ),
    "dialogue": Document("“走吗？”\n“走。”\n“去哪里？”\n“去河边。”\n“好！”"),
    "an inscription": Document("碑文云：大唐贞观□年，□公讳某，字某，河南人也。"),
    "versions": Document("请安装版本 2.30.8.4，详见第 1.1.1.1 节的说明。"),
    "a chat of one word": exchange("一加一等于几？", "2"),
    "a correction": exchange("改错字：我们班的同学都很喜欢在操场上打蓝球。", "我们班的同学都很喜欢在操场上打篮球。"),
    "the same sentence twice": exchange(
        "请抄写两遍：少壮不努力，老大徒伤悲，你说是不是呢。", "少壮不努力，老大徒伤悲，你说是不是呢。" * 2
    ),
    "a chat with code": exchange("写一个函数", f"```python\n{FUNCTION}```"),
    "a chat with a table": exchange("列个表", "| 甲 | 1 |\n|---|---|\n| 乙 | 2 |"),
    "a chat of signs": exchange("1+1=?", "=2"),
    "a chat without a question": chat(("system", "写诗。"), ("assistant", "床前明月光，疑是地上霜。")),
    "a program": Document(
        "#include <stdio.h>\nint main() {\n    char* word = map[key:value];\n    return 0;\n}", "code"
    ),
    "addresses in a program": Document(
        'import socket\ns = socket.socket()\ns.bind(("192.168.0.1", 80))\ns.listen(5)', "code"
    ),
    "entities in a program": Document(
        'def escape(s):\n    return s.replace("&", "&amp;").replace("<", "&lt;")', "code"
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", KEPT)
def test_what_is_no_dirt_stays_as_it_is(kind):
    assert clean(KEPT[kind]) == (KEPT[kind], None)


def test_python_in_an_answer_still_parses():
    functions = [f for module in (ast, inspect) for _, f in inspect.getmembers(module, inspect.isfunction)]
    sources = [source for function in functions if (source := inspect.getsource(function)).startswith("def")]
    assert len(sources) > 50
    for source in sources:
        answer = f"可以这样写：\n```python\n{source.rstrip()}\n```\n其中 `<b>` 见 http://a.cn/b。"
        cleaned, dropped_by = clean(exchange("怎么写？", answer))
        code = cleaned.content[1]["content"].split("```python\n")[1].split("\n```")[0]
        assert dropped_by is None and code == clean_text(source) and "http" not in cleaned.text.split("```")[-1]
        ast.parse(code)


# ----------------------------------------------------------------------------------------------------------------------
# What goes

SPAM = "本公司专业提供北京搬家服务，价格优惠，欢迎来电咨询。我们有二十年的经验，车辆齐全，随叫随到！"
DROPPED = {
    "signs": (Document("！？……——" * 30), "words_num"),
    "keywords": (Document(" ".join(["北京搬家 搬家电话"] * 20)), "word_repetition"),
    "a phrase over and over": (Document("不错" * 30), "word_repetition"),
    "a text twice, in short lines": (
        Document("\n".join(["却说曹操引兵渡河，正遇关公在前。\n云长大怒，提刀便斩。"] * 2)),
        "word_repetition",
    ),
    "one character a line": (Document("\n".join("却说曹操引兵渡河正遇关公在前")), "average_line_length"),
    "a menu": (Document("Home\nNews\nShop\nBlog\nJobs\nHelp"), "average_line_length"),
    "rules of a table": (Document("|---|---|---|\n" * 10 + "一二三四五六"), "special_characters"),
    "a title": (Document("黄头黑鸟"), "text_length"),
    "an answer of one thing": (exchange("讲个笑话", "哈" * 200), "sameness"),
    "a question of one thing": (exchange("在吗？" * 50, "在的。"), "sameness"),
    "a chat that is a book": (exchange("背诵", "".join(map(chr, range(0x4E00, 0x9000))) * 6), "text_length"),
    "data in a program": (Document("x = 1\n" * 20 + "y = [" + "123, " * 300 + "]", "code"), "maximum_line_length"),
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", DROPPED)
def test_what_is_dirt_is_dropped(kind):
    document, filter = DROPPED[kind]
    assert clean(document) == (document, filter)


@pytest.mark.quick
def test_a_page_that_repeats_a_paragraph_keeps_one_of_them():
    assert clean(Document("\n".join([SPAM] * 50 + ["电话在下面，请打电话。"]))) == (
        Document(f"{SPAM}\n电话在下面，请打电话。"),
        None,
    )


@pytest.mark.quick
def test_what_drops_a_document_before_any_filter():
    assert clean(Document("好" * 30, problem="not JSON", dropped_by="upvotes"))[1] == "malformed"
    assert clean(Document("好" * 30, dropped_by="upvotes"))[1] == "upvotes"
    assert clean(Document(" \n\x00"))[1] == "empty"
    assert clean(Document([], "chat"))[1] == "empty"
    assert clean(Document("\ufeffa"), "none") == (Document("a"), None)


KEPT_CHATS = {
    "an answer that is a tag": ["换行用什么标签？", "<br>"],
    "an answer that is a link": ["官网是什么？", "https://www.python.org"],
    "questions around a link": ["官网是什么？", "https://www.python.org", "那 1+1 等于几？", "2"],
    "frameworks": ["前端用什么？", "可以用Vue.js/React.js，后端用Node.js/Express或ASP.NET/PHP。"],
    "files": ["改哪里？", "请修改setup.py/README.md，在/Applications/Xcode.app/Contents里。"],
    "a fence after text": ["怎么写？", '代码如下：```html\n<div class="a">\n  <p>你好</p>\n</div>\n```\n希望有帮助。'],
    "a fence in a list": ["怎么写？", "1. ```html\n<p>你好</p>\n```\n2. 完成"],
    "a number of one digit": ["10的30次方写出来是多少？", "1" + "0" * 30],
    "laughter": ["好笑吗？", "哈" * 20],
    "go on": [text for i in range(60) for text in ("继续", f"第{i}回，{chr(0x4E00 + 37 * i) * 3}出兵。")],
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", KEPT_CHATS)
def test_chats_that_stay_as_they_are(kind):
    turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(KEPT_CHATS[kind])]
    assert clean(chat(*turns)) == (chat(*turns), None)


@pytest.mark.quick
def test_programs_keep_their_products_and_paths():
    program = (
        "import torch\n\nclass L:\n    def f(self, x):\n        y = x@self.weight\n        return y@self.weight.T\n"
    )
    program += "url = 'git@github.com:foo/bar.git'\n# by someone\n"
    assert clean(Document(program.rstrip("\n"), "code")) == (Document(program.rstrip("\n"), "code"), None)


@pytest.mark.quick
def test_mojibake_of_the_marks_of_hidden_code_stays_and_ends_nothing():
    for end in ("ï·\x95", "ï·\x91"):
        text = "这里有一段文字，运行 `ls` 命令。 ï·\x90" + "ï·\x91" * 3 + end + " 再写一些字，够长了。"
        cleaned, dropped_by = clean(Document(text))
        assert dropped_by is None and cleaned.text.count("`ls`") == 1 and cleaned.text.endswith("再写一些字，够长了。")


@pytest.mark.quick
def test_a_long_text_is_not_cut_inside_a_fence():
    section = "## 标题\n\n说明文字。\n\n```html\n" + '<div class="a">\n<p>你好</p>\n</div>\n' * 40 + "```\n\n"
    pieces = split_long(Document(section * 200), "zh")
    assert len(pieces) > 2 and "".join(piece.text for piece in pieces) == section * 200
    assert all(piece.text.count("```") % 2 == 0 and len(piece.text) <= 100_000 for piece in pieces)


FENCED = {  # what begins a fence, what is in it and closes nothing, what closes it
    "backticks in a line": ("```x``` 这是代码。\n```html\n", "", "```\n"),
    "after text": ("如下：```html\n", "", "```\n"),
    "another kind": ("~~~\n", "```\n", "~~~\n"),
    "shorter": ("````\n", "```\n", "`````\n"),
    "not bare": ("```\n", "```python\n``` x\n", "```\r\n"),
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", FENCED)
def test_what_opens_and_closes_a_fence_where_a_text_is_cut(kind):
    opening, within, closing = FENCED[kind]
    section = "说明文字。\n" + opening + within + "<p>你好</p>\n" * 40 + closing
    text = "\n".join(section * 9 + "好" * i for i in range(90))  # so that cuts fall on every place of a section
    pieces = split_long(Document(text))
    assert len(pieces) > 2 and "".join(piece.text for piece in pieces) == text
    for piece in pieces:
        assert piece.text.endswith((closing, "好", "好\n", "。\n")) and len(piece.text) > 50_000


@pytest.mark.quick
def test_a_fence_longer_than_a_piece_is_cut_and_later_ones_are_not():
    section = "说明文字。\n如下：```html\n" + "<p>你好</p>\n" * 40 + "```\n"
    text = "```\n" + "x = 1\n" * 40_000 + "```\n" + section * 300
    pieces = [piece.text for piece in split_long(Document(text))]
    assert "".join(pieces) == text and len(pieces) > 4
    assert all(piece.count("```") % 2 == 0 for piece in pieces if "x = 1" not in piece)


@pytest.mark.quick
def test_a_message_that_cleaning_would_empty_stays_and_is_not_reported():
    for said in ("♡", "◆◆◆◆", "http://example.com/a", "<br>"):
        seen = []
        document = chat(("user", "回我一个字。"), ("assistant", said))
        assert clean(document, "auto", watch=lambda *change: seen.append(change)) == (document, None)
        assert not seen


@pytest.mark.quick
def test_what_is_dirt_in_a_turn_goes_a_turn_that_says_nothing_goes_and_half_an_emoji_is_replaced():
    link, question = ("user", "https://a.cn/x"), ("user", "你好\ud83d，请问第一回讲什么？")
    answer = ("assistant", "宴桃园豪杰三结义。\ud83d")
    cleaned, dropped_by = clean(chat(link, question, answer), "auto")
    expected = chat(("user", "你好?，请问第一回讲什么？"), ("assistant", "宴桃园豪杰三结义。?"))
    assert dropped_by is None and cleaned == expected
    assert clean(chat(("user", "\u200b\u3000\ufeff"), answer), "auto")[1] == "empty"
    assert clean(chat(question), "auto")[1] == "empty"  # nobody answers


@pytest.mark.quick
def test_chats_are_judged_as_prose_on_request_each_side_for_itself():
    question, answer = "请用五个字以上的一句话说一说三国演义的第一回。", "宴桃园豪杰三结义，斩黄巾英雄首立功。"
    good, short, signs = exchange(question, answer), exchange(question, "好"), exchange("？！……", answer)
    repeated = exchange(question, question)  # one side for itself: the other does not make it repetitive
    for pipeline in ("auto", "zh", "en"):
        assert [clean(one, pipeline)[1] for one in (good, short, signs, repeated)] == [None] * 4
        expected = [None, "text_length", "text_length", None]
        assert [clean(one, pipeline, judge_chats=True)[1] for one in (good, short, signs, repeated)] == expected
    assert clean(short, "published")[1] is not None  # Steel-LLM judged the text of a chat as a whole


# ----------------------------------------------------------------------------------------------------------------------
# Which pipeline, in which order


@pytest.mark.quick
def test_which_pipeline_a_document_goes_through():
    zh, en, code, talk = Document("却说曹操"), Document("plain"), Document("却说", "code"), exchange("却说", "曹操")
    expected = {
        "auto": ["zh", "en", "code", "chat"],
        "zh": ["zh", "zh", "zh", "chat"],
        "en": ["en", "en", "en", "chat"],
        "code": ["code"] * 4,
        "published": ["published"] * 4,
        "none": ["none"] * 4,
    }
    assert {name: [pipeline_of(one, name) for one in (zh, en, code, talk)] for name in expected} == expected
    assert expected.keys() - {"auto"} | {"chat"} == PIPELINES.keys()


@pytest.mark.quick
@pytest.mark.parametrize("text", ["却说曹操", "却说 ab"])
def test_a_text_with_enough_chinese_is_chinese(text):
    assert language(text) == "zh"


@pytest.mark.quick
@pytest.mark.parametrize("text", ["却 abcde", "plain English", "", "123"])
def test_any_other_text_is_english(text):
    assert language(text) == "en"


@pytest.mark.quick
def test_changes_are_reported_with_the_code_in_its_place():
    seen = []
    text = "请看`x`这里：<b>好</b>的http://a.cn/b。 \n"
    cleaned, _ = clean(Document(text), watch=lambda *change: seen.append(change))
    steps = [text, text.rstrip(), "请看`x`这里：好的http://a.cn/b。", "请看`x`这里：好的。"]
    names = ["clean_text", "clean_html", "clean_links"]
    assert seen == list(zip(names, steps, steps[1:])) and cleaned.content == steps[-1]


def test_mojibake_is_repaired_before_its_bytes_are_taken_for_control_characters():
    for text in ("中文维基百科", "中文，好。"):
        assert apply_mappers(clean_text(text.encode("utf-8").decode("latin-1")), "zh") == text
    assert apply_mappers("a\x85b\x9f", "zh").isprintable()
    assert apply_mappers("用 &lt;br&gt; 换行，<b>粗</b>", "zh") == "用 <br> 换行，粗"


def test_filters_see_chinese_prose_as_prose():
    prose = "滚滚长江东逝水，浪花淘尽英雄。是非成败转头空，青山依旧在，几度夕阳红。"
    prose += "白发渔樵江渚上，惯看秋月春风。一壶浊酒喜相逢，古今多少事，都付笑谈中。"
    one_paragraph = prose + "".join(chr(0x4E00 + i) for i in range(100, 300))
    for text in (prose, one_paragraph, "一上士" * 3 + prose):
        assert filtered_by(text, "zh") is None
    assert filtered_by(one_paragraph, "published") in ("alphanumeric", "average_line_length")
    assert filters.words_num(prose) == sum(c.isalpha() for c in prose)  # not the one word between white space
    assert filters.special_characters("一上士") == 0 < filters.all_special_characters("一上士")


# ----------------------------------------------------------------------------------------------------------------------
# Long texts


@pytest.mark.quick
@pytest.mark.parametrize("end", ["\n\n", "\n", "\r", "。", "? ".strip() + " ", ""])
def test_a_long_text_is_cut_at_the_best_places_and_loses_nothing(end):
    random.seed(0)
    sentences = ["".join(random.choices("却说曹操引兵渡河", k=random.randrange(5, 60))) + end for _ in range(9000)]
    text = "".join(sentences)
    pieces = [piece.content for piece in split_long(Document(text))]
    assert "".join(pieces) == text and len(pieces) == 4
    assert all(50_000 < len(piece) <= 100_000 for piece in pieces)
    assert all(piece.endswith(end) for piece in pieces)


@pytest.mark.quick
def test_what_is_not_split():
    long = "".join(map(chr, range(0x4E00, 0x9000))) * 6
    assert len(long) > 100_000
    for document, pipeline in [
        (Document("好" * 100_000), "auto"),
        (exchange(long, long), "auto"),
        (Document(long), "published"),
        (Document(long), "none"),
        (Document(long, problem="not JSON"), "auto"),
    ]:
        assert split_long(document, pipeline) == [document]
    pieces = split_long(Document("x = 1\n" * 40_000, "code", "starcoder-python"))
    assert {(piece.kind, piece.format) for piece in pieces} == {("code", "starcoder-python")} and len(pieces) == 3


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
        ("normalize_all_spaces", "whitespace_normalization", "\t\u200b缩进".lstrip() + "\t完", "缩进\t完"),
    ],
)
def test_mappers_that_damage_chinese_have_a_counterpart_that_does_not(theirs, ours, text, expected):
    assert getattr(mappers, ours)(text) == expected != getattr(mappers, theirs)(text)
