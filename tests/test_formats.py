"""Formats: rows of every corpus as its publisher ships it, files of every kind, pages, and what damaged ones get."""

import gzip
import json
import random
import sys

import pytest
from conftest import call, refused

from corpus import formats
from corpus.default import read_stdlib
from corpus.documents import Document, document_of
from corpus.formats import decode_page, file_parts, json_values

# ----------------------------------------------------------------------------------------------------------------------
# Rows


def messages(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def chat(format, *contents, dropped_by="", first="user"):
    return Document(messages(*contents, first=first), "chat", format, dropped_by)


def zhihu(upvotes):
    return {"INSTRUCTION": "问", "RESPONSE": "答", "SOURCE": "Zhihu", "METADATA": json.dumps({"upvotes": upvotes})}


def conversation(*turns):
    return {"id": "16012449", "conversations": [{"from": side, "value": text} for side, text in turns]}


EXAM = {
    "id": "1",
    "q_type": "单选题",
    "q_main": "一加一等于几？",
    "option_a": "1",
    "option_b": "2",
    "option_c": "3",
    "option_d": "4",
    "option_e": None,
    "std_ans": "B",
    "answer_detail": "算术。",
    "grade": None,
}
SECTIONS = [{"title": "形态", "content": "红色。"}, {"title": "用途", "content": "入药。"}]
SYSTEM = {"role": "system", "content": "简短。"}
STARCODER = {
    "max_stars_repo_path": "a.py",
    "max_stars_repo_name": "u/r",
    "max_stars_count": 3,
    "id": "1",
    "content": "<reponame>u/r<filename>a.py\nimport os\n",
}

ROWS = {
    "plain": ({"text": "天地玄黄"}, Document("天地玄黄")),
    "skypile with more fields": ({"text": "天地玄黄", "meta": {"url": "u"}}, Document("天地玄黄")),
    "a string": ("天地玄黄", Document("天地玄黄")),
    "wanjuan": ({"id": "BkQQ", "content": "天地玄黄"}, Document("天地玄黄")),
    "wanjuan exam": (
        EXAM,
        Document("一加一等于几？\nA. 1\nB. 2\nC. 3\nD. 4\n标准答案：B\n解析：算术。", format="wanjuan_exam"),
    ),
    "wanjuan exam without options": (
        {"q_main": "何谓道？", "option_a": None, "option_b": "", "std_ans": "不可说", "answer_detail": None},
        Document("何谓道？\n标准答案：不可说", format="wanjuan_exam"),
    ),
    "wikipedia": (
        {"completion": "昭通机场是中国的机场。", "source": "wikipedia.zh2307"},
        Document("昭通机场是中国的机场。", format="wikipedia"),
    ),
    "baike": (
        {"title": "红花", "summary": "一种花。", "sections": SECTIONS, "tags": ["花"], "url": "http://a"},
        Document("红花\n一种花。\n形态\n红色。\n用途\n入药。", format="baike"),
    ),
    "baike without a summary": (  # Steel-LLM's converter loses such a page
        {"title": "红花", "summary": None, "sections": SECTIONS[:1], "tags": [], "url": "u"},
        Document("红花\n形态\n红色。", format="baike"),
    ),
    "baidu qa": (
        {
            "qid": "q1",
            "category": "教育",
            "title": "人站在地球上为什么没有头朝下的感觉？",
            "desc": "",
            "answer": "因为引力。",
        },
        chat("baidu_qa", "人站在地球上为什么没有头朝下的感觉？", "因为引力。"),
    ),
    "baidu qa with a description": (  # Steel-LLM's converter loses it
        {"qid": "q1", "title": "怎么办？", "desc": "电脑打不开了", "answer": "重启。"},
        chat("baidu_qa", "怎么办？\n电脑打不开了", "重启。"),
    ),
    "baidu qa with a description that says it all": (
        {"qid": "q1", "title": "怎么办？ ", "desc": " 电脑打不开了，怎么办？", "answer": "重启。"},
        chat("baidu_qa", "电脑打不开了，怎么办？", "重启。"),
    ),
    "baidu qa with a description that says no more": (
        {"qid": "q1", "title": "电脑打不开了怎么办？", "desc": "电脑打不开了", "answer": "重启。"},
        chat("baidu_qa", "电脑打不开了怎么办？", "重启。"),
    ),
    "zhihu": (zhihu("赞同 123"), chat("zhihu", "问", "答")),
    "zhihu, many votes": (
        zhihu("赞同 1.5 万"),
        chat("zhihu", "问", "答"),
    ),  # Steel-LLM's converter loses the best answers
    "zhihu, few votes": (zhihu("赞同 99"), chat("zhihu", "问", "答", dropped_by="upvotes")),
    "zhihu, no votes": (zhihu("赞同"), chat("zhihu", "问", "答", dropped_by="upvotes")),
    "belle 2M": (
        {"instruction": "翻译：", "input": "早上好", "output": "Good morning"},
        chat("instruction", "翻译：\n早上好", "Good morning"),
    ),
    "alpaca without input": (
        {"instruction": "写诗", "input": "", "output": "床前明月光"},
        chat("instruction", "写诗", "床前明月光"),
    ),
    "belle 3.5M": (
        conversation(("human", "你好"), ("assistant", "您好"), ("human", "再见")),
        chat("conversations", "你好", "您好", "再见"),
    ),
    "turns that do not alternate": (  # pairing by position would give the second question the first answer
        conversation(("human", "一"), ("human", "二"), ("assistant", "答")),
        chat("conversations", "一\n二", "答"),
    ),
    "sharegpt that begins with the answer": (
        conversation(("gpt", "答"), ("human", "问")),
        chat("conversations", "答", "问", first="assistant"),
    ),
    "firefly": ({"kind": "NER", "input": "找出地名", "target": "荆州。"}, chat("firefly", "找出地名", "荆州。")),
    "moss": (
        {
            "conversation_id": 1,
            "conversation": [{"human": "问一", "assistant": "答一"}, {"human": "问二", "assistant": "答二"}],
        },
        chat("moss", "问一", "答一", "问二", "答二"),
    ),
    "openai": (
        {"messages": [SYSTEM, *messages("问", "答")]},
        Document([SYSTEM, *messages("问", "答")], "chat", "messages"),
    ),
    "starcoder": (STARCODER, Document("import os\n", "code", "starcoder-python")),
    "starcoder with stars": (
        {"content": "<gh_stars>10-100\na < b > c"},
        Document("a < b > c", "code", "starcoder-python"),
    ),
    "an answer that ends in a mark keeps it": (
        {"instruction": "说", "output": "</s>好的</s>"},
        chat("instruction", "说", "</s>好的</s>"),
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_every_corpus(name):
    row, expected = ROWS[name]
    assert document_of(row, "python") == expected


MALFORMED = [
    ({"title": "a", "body": "b"}, "no text in fields title, body; expected text, content, messages"),
    ([1, 2], "no text in a row of type list"),
    ({"text": 7}, "expected text, found 7"),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, "a turn of 'narrator', expected one of human, user"),
]


@pytest.mark.quick
@pytest.mark.parametrize("row, words", MALFORMED)
def test_a_malformed_row_says_what_is_wrong(row, words):
    with pytest.raises(ValueError, match=words):
        document_of(row)


@pytest.mark.quick
@pytest.mark.parametrize("name", ROWS)
def test_a_document_survives_json_and_a_map_reaches_each_of_its_texts(name):
    document = ROWS[name][1]._replace(dropped_by="")
    line = document.to_json()
    assert "\n" not in line and Document.from_json(line) == document
    assert document.map(lambda text: text) == document == document.merge_turns()
    emptied = document.map(lambda text: "")
    assert emptied.text.strip("\n") == "" and emptied.merge_turns().content in ("", [])
    assert document.map(str.swapcase).text == document.text.swapcase()


# ----------------------------------------------------------------------------------------------------------------------
# Files


def read(path):
    """All that is found under a path, as (source, where, document)."""
    return [(part.source, where, document) for part in file_parts([path]) for where, document in part.documents()]


def test_files_of_all_kinds_mixed_in_one_folder(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "raw"
    (folder / "python").mkdir(parents=True)
    rows = [row for row, _ in ROWS.values() if isinstance(row, dict)]
    as_lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    (folder / "a.jsonl").write_bytes(as_lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(as_lines))
    (folder / "c.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    (folder / "d.json.gz").write_bytes(gzip.compress(as_lines))  # a row a line, in spite of its name
    (folder / "e.json").write_text(json.dumps({"text": "一行"}, indent=1), encoding="utf-8")
    (folder / "f.txt.gz").write_bytes(gzip.compress("第一行\r\n第二行".encode("utf-8-sig")))
    (folder / "notes.md").write_text("not read")
    starcoder = [STARCODER, STARCODER | {"content": "x = 1"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(starcoder), folder / "python" / "train.parquet")
    found = read(folder)
    assert {source for source, _, _ in found} == {"raw"}
    expected = [document_of(row, "raw") for row in rows] * 4
    expected += [Document("一行"), Document("第一行\r\n第二行")]
    expected += [Document(code, "code", "starcoder-python") for code in ("import os\n", "x = 1")]
    assert [document for _, _, document in found] == expected
    assert found[1][1] == f"{folder / 'a.jsonl'}, line 2"


def test_values_of_an_array_that_is_larger_than_what_is_read_at_once(tmp_path):
    sizes = [3_000_000 if i == 5 else 1000 * i for i in range(40)]
    rows = [{"text": random.Random(i).choice("天地玄") * size, "n": [1, {"a": "]"}]} for i, size in enumerate(sizes)]
    as_lines = "\n".join(json.dumps(row, indent=1) for row in rows)
    expected = [(json.dumps(rows), rows), (as_lines, rows), ("", []), ("[]", [])]
    expected += [(" [ {} , {} ] ", [{}, {}]), ("[{}]\n[{}]", [{}, {}])]
    path = tmp_path / "a.json"
    for text, values in expected:
        path.write_text(text, encoding="utf-8")
        with open(path, encoding="utf-8") as file:
            assert list(json_values(file)) == values


def test_a_large_file_of_lines_is_read_in_parts(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    texts = [f"{i} " + "文" * (i % 90) for i in range(500)]
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    whole = read(path)
    monkeypatch.setattr(formats, "PART_BYTES", 5000)
    parts = file_parts([path])
    assert len(parts) > 5 and sum(part.size for part in parts) == path.stat().st_size
    assert read(path) == whole  # line numbers too


# ----------------------------------------------------------------------------------------------------------------------
# Pages

PAGE = """<!DOCTYPE html><html><head>{meta}<title>赤壁之战</title><script>var menu = "不要";</script>
<style>p {{}}</style></head>
<body><nav><ul><li><a href="/">首页</a></li><li><a href="/a">登录</a></li></ul></nav>
<article><h1>赤壁之战</h1><p>建安十三年，曹操率领水陆大军，号称百万，发起荆州战役，然后讨伐孙权。</p>
<p>孙权和刘备组成联军，由周瑜指挥，在长江赤壁一带大破曹军，从此奠定三国鼎立的基础。镕</p></article>
<footer>版权所有 备案号 12345 <a href="/b">联系我们</a></footer></body></html>"""

ENCODINGS = [
    ("utf-8", '<meta charset="utf-8">'),
    ("utf-8", ""),
    ("utf-8-sig", ""),
    ("gb18030", '<meta charset="gb2312">'),
    ("gb18030", ""),
    ("gb18030", '<meta http-equiv="Content-Type" content="text/html; charset=GBK">'),
    ("gb18030", '<meta charset="utf-8">'),
    ("utf-16", ""),
]


@pytest.mark.parametrize("encoding, meta", ENCODINGS)
def test_the_main_text_of_a_page_in_any_usual_encoding(tmp_path, encoding, meta):
    page = PAGE.format(meta=meta)
    (tmp_path / "a.html").write_bytes(page.encode(encoding))
    assert decode_page(page.encode(encoding)).lstrip("\ufeff") == page
    [(_, _, document)] = read(tmp_path / "a.html")
    assert "曹操率领水陆大军" in document.text and "三国鼎立的基础。镕" in document.text
    assert not any(word in document.text for word in ("首页", "登录", "不要", "备案号", "<p>"))


def test_without_trafilatura_pages_are_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text(PAGE, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    result = call("prepare.py", tmp_path / "a.html", "--out", tmp_path / "out", "--workers", 1, ok=False)
    refused(result, "a.html: reading saved web pages needs trafilatura: pip install trafilatura lxml_html_clean")


# ----------------------------------------------------------------------------------------------------------------------
# Damage

GOOD = [
    json.dumps({"text": f"第{i}回 滚滚长江东逝水，浪花淘尽英雄。"}, ensure_ascii=False).encode() for i in range(300)
]
BAD_LINES = [
    (b'{"text": ', "line 7: not JSON (Expecting value)"),
    (b'{"text": "\xff\xfe"}', "line 7: not UTF-8 (byte 10 of the line)"),
    (b"[" * 100_000, "line 7: JSON nested too deeply"),
    (b'{"conversations": [{"value": "a"}]}', "line 7: lacks 'from'"),
    (b'{"conversations": 3}', "line 7: 'int' object is not iterable"),
    (b'{"n": ' + b"9" * 5000 + b"}", "line 7: Exceeds the limit"),
]


@pytest.mark.quick
@pytest.mark.parametrize("line, problem", BAD_LINES)
def test_a_malformed_row_is_counted_named_and_skipped(tmp_path, line, problem):
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join([*GOOD[:6], line, *GOOD[6:]]))
    found = read(tmp_path / "a.jsonl")
    bad = [(where, document.problem) for _, where, document in found if document.problem]
    assert len(bad) == 1 and problem in f"{bad[0][0]}: {bad[0][1]}" and len(found) == 301
    texts = [document.text for _, _, document in found if not document.problem]
    assert texts == [json.loads(row)["text"] for row in GOOD]


def test_byte_order_marks_nuls_blank_lines_and_very_long_lines(tmp_path):
    long = "长" * 20_000_000
    lines = [b"\xef\xbb\xbf" + GOOD[0], b"", b"\r", b'{"text": "a\x00b"}', json.dumps({"text": long}).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents = [document for _, _, document in read(tmp_path / "a.jsonl")]
    assert documents == [Document(json.loads(GOOD[0])["text"]), Document("a\x00b"), Document(long)]
    path = tmp_path / "b.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\n" + b"\xff\n" + b"b" * 2000 + b"\n" + long.encode())
    first, second = read(path)
    assert first[1] == f"{path}, line 2" and first[2].problem.startswith("not UTF-8 (byte 0 of")
    assert second[2] == Document(long)


BAD_FILES = [
    (
        "a.jsonl.gz",
        gzip.compress(b"\n".join(GOOD))[:-20],
        ["a.jsonl.gz: damaged after line", "fetch it again, then run the same command again"],
    ),
    ("b.jsonl.gz", b"no gzip", ["b.jsonl.gz: damaged after line 1"]),
    ("c.json", b"[" + GOOD[0] + b", {]", ["c.json: not JSON", "after row 1", "a row a line"]),
    ("d.json", b"[" + GOOD[0] + b",", ["d.json: not JSON (Expecting value) after row 1"]),
    ("e.json", b'["\xff"]', ["e.json: not UTF-8 after row 0"]),
    ("g.json", b"[" * 100_000, ["g.json: not JSON"]),
    ("h.json", b'[{"n": ' + b"9" * 5000 + b"}]", ["h.json: not JSON (Exceeds the limit"]),
    ("i.txt.gz", gzip.compress(b"a\n" * 90_000)[:-9], ["i.txt.gz: damaged after line "]),
    ("f.parquet", b"PAR1 cut short", ["f.parquet: damaged after row 0"]),
]


@pytest.mark.parametrize("name, content, words", BAD_FILES)
def test_a_damaged_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(call("prepare.py", tmp_path / name, "--out", tmp_path / "out", "--workers", 1, ok=False), *words)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_value_in_a_parquet_file_that_is_not_utf8_costs_one_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"one", b"\xff\xfe", "三".encode()], type=pyarrow.binary())
    texts = pyarrow.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (_, one, first), (_, two, second), (_, three, third) = read(tmp_path / "a.parquet")
    assert [where.rpartition(", ")[2] for where in (one, two, three)] == ["row 1", "row 2", "row 3"]
    assert [first, third] == [Document("one"), Document("三")]
    assert second.content == "" and second.problem


@pytest.mark.quick
def test_what_a_folder_holds_beside_text_is_named_and_out_is_not_read(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("a.txt", "b.csv", "c.csv", "out/manifest.json", ".hidden/d.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "e.txt").symlink_to(tmp_path / "nowhere")
    assert [path.name for part in file_parts([tmp_path], tmp_path / "out") for path in part.paths] == ["a.txt"]
    assert capsys.readouterr().err == f"{tmp_path}: not read: 2 .csv, 1 broken link\n"


def test_unreadable_and_repeated_files_are_named_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "a.jsonl").write_bytes(GOOD[0])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    missing = call("prepare.py", tmp_path / "b.jsonl", "--out", out, ok=False)
    refused(missing, "b.jsonl: no such file or folder")
    refused(call("prepare.py", tmp_path, tmp_path / "a.jsonl", "--out", out, ok=False), "a.jsonl: given twice")
    assert not out.exists()


def test_the_standard_library_is_code_within_its_budget():
    documents = list(read_stdlib(50_000))
    assert 1 < len(documents) and sum(len(document.text) for document in documents) <= 50_000
    assert {document.kind for document in documents} == {"code"}
