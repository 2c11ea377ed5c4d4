"""Formats: files of every kind, pages, and what damaged ones get."""

import gzip
import json
import random
import subprocess
import sys

import pytest
from conftest import call, refused
from test_rows import ROWS, STARCODER

from corpus import formats
from corpus.default import read_stdlib
from corpus.documents import Document
from corpus.formats import decode_page, file_parts, json_values
from corpus.rows import document_of

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
    (b'{"conversations": [{"value": "a"}]}', "line 7: conversations: expected turns as {role, content} or"),
    (b'{"conversations": 3}', "line 7: conversations: expected a list of turns, found 3"),
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


# ----------------------------------------------------------------------------------------------------------------------
# Encodings, line ends, columns and links

LINES = [f"第{i}回 滚滚长江东逝水，浪花淘尽英雄。\u2028" for i in range(200)]


@pytest.mark.quick
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_with_a_byte_order_mark_is_read(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(formats, "PART_BYTES", 1000)  # it is not cut into parts
    mark = "" if encoding == "utf-16" else "\ufeff"
    rows = [json.dumps({"text": line}, ensure_ascii=False) for line in LINES]
    (tmp_path / "a.jsonl").write_bytes((mark + "\r\n".join(rows)).encode(encoding))
    (tmp_path / "b.json").write_bytes((mark + f"[{', '.join(rows)}]").encode(encoding))
    (tmp_path / "c.txt").write_bytes((mark + "\n".join(LINES)).encode(encoding))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((mark + "\n".join(rows)).encode(encoding)))
    found = read(tmp_path)
    documents = {
        name: [d for _, where, d in found if f"{name}," in where] for name in ("a.jsonl", "b.json", "d.jsonl.gz")
    }
    assert all(texts == list(map(Document, LINES)) for texts in documents.values())
    assert "".join(d.text for _, where, d in found if "c.txt" in where) == "\n".join(LINES)


@pytest.mark.quick
@pytest.mark.parametrize("encoding, number", [("gb18030", 0), ("utf-16-le", 1)])
def test_advice_for_another_encoding_works(tmp_path, encoding, number):
    path = tmp_path / "a.txt"
    path.write_bytes("滚滚长江东逝水\n".encode(encoding))
    [(_, _, document)] = read(path)
    command = ["iconv", *document.problem.split("iconv ")[1 + number].split(",")[0].split(), path]
    converted = subprocess.run(command, capture_output=True, check=True).stdout
    assert converted.decode("utf-8") == "滚滚长江东逝水\n"


@pytest.mark.quick
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_every_kind_are_cut(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(end.join(LINES).encode("utf-8"))
    texts = [document.text for _, _, document in read(tmp_path / "a.txt")]
    assert "".join(texts) == end.join(LINES) and len(texts) == 3
    assert all(text.endswith(end) and 2000 <= len(text) < 2050 for text in texts[:-1])


@pytest.mark.quick
def test_columns_that_nobody_reads_are_not_read_and_bytes_are_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    times = {
        "nanoseconds": pyarrow.array([1700000000123456789] * 3, pyarrow.timestamp("ns")),
        "far": pyarrow.array([10**18] * 3, pyarrow.timestamp("us")),
        "zone": pyarrow.array([17] * 3, pyarrow.timestamp("us", tz="Mars/Base")),
    }
    texts = ["一", "二", "三"]
    columns = times | {"text": pyarrow.array([text.encode() for text in texts], pyarrow.binary())}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert [document for _, _, document in read(tmp_path / "a.parquet")] == list(map(Document, texts))

    history = pyarrow.array([None, 10**18, None], pyarrow.timestamp("us"))  # a column that is read
    chats = pyarrow.table({"instruction": texts, "output": texts, "history": history})
    pyarrow.parquet.write_table(chats, tmp_path / "b.parquet")
    one, two, three = (document for _, _, document in read(tmp_path / "b.parquet"))
    assert one.kind == three.kind == "chat" and two.problem.startswith("a value that cannot be read (OverflowError")

    pyarrow.parquet.write_table(pyarrow.table({"body": texts, "n": [1, 2, 3]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet: no text in fields body, n; expected text, content"):
        read(tmp_path / "c.parquet")


@pytest.mark.quick
def test_linked_folders_are_read_once_and_loops_end(tmp_path, capsys):
    raw, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    for folder in (raw / "deep", elsewhere):
        folder.mkdir(parents=True)
    (raw / "a.txt").write_text("一")
    (elsewhere / "b.txt").write_text("二")
    (elsewhere / "c.csv").write_text("三")
    (raw / "linked").symlink_to(elsewhere)
    (raw / "linked again").symlink_to(elsewhere)
    (raw / "deep" / "loop").symlink_to(raw)
    (raw / "same.txt").symlink_to(raw / "a.txt")
    assert [document.text for _, _, document in read(raw)] == ["一", "二"]
    assert capsys.readouterr().err == f"{raw}: not read: 1 .csv\n"


def test_a_long_chinese_file_name_becomes_a_source(tmp_path):
    path = tmp_path / f"《{'却说三国演义之群英荟萃' * 7}》.txt"
    path.write_text(
        "".join(f"第{i}回 滚滚长江东逝水，浪花淘尽英雄{chr(0x4E00 + i)}。\n" for i in range(200)), encoding="utf-8"
    )
    call("prepare.py", path, "--out", tmp_path / "out", "--vocab-size", 600, "--workers", 1)
    [source] = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["ledger"]
    assert source.startswith("《却说三国演义之群英荟萃") and len(source.encode("utf-8")) <= 200


@pytest.mark.quick
def test_a_text_file_is_not_cut_inside_a_fence(tmp_path):
    section = "# 标题\n说明。\n```html\n" + '<div class="a">\n' * 60 + "```\n"
    long = "```\n" + "x = 1\n" * 20_000 + "```\n"
    (tmp_path / "a.md.txt").write_text(section * 50 + long + section * 5, encoding="utf-8")
    texts = [document.text for _, _, document in read(tmp_path / "a.md.txt")]
    assert "".join(texts) == section * 50 + long + section * 5
    whole = [text for text in texts if "x = 1" not in text]
    assert len(whole) > 15 and all(text.count("```") % 2 == 0 for text in whole)
    assert max(map(len, texts)) < 21_000  # a fence that is far longer is cut


@pytest.mark.quick
@pytest.mark.parametrize(
    "opening, closing", [("如下：```html\n", "```\r\n"), ("~~~\n```\n", "~~~~\n"), ("````\n```\n", "````\n")]
)
@pytest.mark.parametrize("before", ["", "```x``` 是代码。\n", "```\n" + "x = 1\n" * 20_000 + "```\n"])
def test_what_opens_and_closes_a_fence_in_a_text_file(tmp_path, before, opening, closing):
    section = "# 标题\n说明。\n" + opening + '<div class="a">\n' * 60 + closing
    (tmp_path / "a.txt").write_text(before + section * 50, encoding="utf-8", newline="")
    texts = [document.text for _, _, document in read(tmp_path / "a.txt")]
    assert "".join(texts) == before + section * 50 and max(map(len, texts)) < 21_000
    whole = [text for text in texts if "x = 1" not in text]
    assert len(whole) > 15 and all(text.endswith(closing) or text.endswith("说明。\n") for text in whole)


@pytest.mark.quick
def test_a_fence_that_is_never_closed_makes_one_long_document(tmp_path):
    (tmp_path / "a.txt").write_text("```\n" + "一二三四五六七八九\n" * 20_000, encoding="utf-8")
    lengths = [len(document.text) for _, _, document in read(tmp_path / "a.txt")]
    assert 20_000 <= lengths[0] < 20_100 and max(lengths[1:]) < 2100
