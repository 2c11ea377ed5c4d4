"""extras.survey: what it counts, against the texts that were prepared."""

import zlib
from collections import Counter

import numpy as np
import pytest
from conftest import call, novel_texts, refused, write_jsonl

from corpus.reference import NGram
from extras import survey
from extras.survey import measure_perplexity, read_sources, shared_text


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two sources that share a passage, a chat and a program."""
    chapters = novel_texts(0, 12)
    again = chapters[0][500:700]
    english = "It was a bright cold day in April, and the clocks were striking thirteen." * 2
    return {
        "one": [*chapters[:6], chapters[5][:300] + chapters[1][:200] + chapters[4][-300:]],
        "two": [*chapters[6:11], chapters[11][:900] + again, english],
    }


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("survey")
    files = [write_jsonl(folder / f"{name}.jsonl", of_source) for name, of_source in texts.items()]
    chat = [{"role": "user", "content": "却说曹操如何？"}, {"role": "assistant", "content": "且听下回分解，自有分晓。"}]
    files.append(write_jsonl(folder / "chat.jsonl", [{"messages": chat}]))
    flags = ["--out", folder / "data", "--vocab-size", 4000, "--workers", 1, "--pipeline", "none"]
    call("prepare.py", *files, *flags)
    return folder / "data"


def test_the_texts_of_a_source_are_those_that_were_prepared(folder, texts):
    sources = {source.name: source for source in read_sources(folder, 100)}
    assert set(sources) == {"one zh", "two zh", "two en", "chat-messages zh"}
    assert sorted(sources["one zh"].texts) == sorted(texts["one"])
    assert sorted(sources["two zh"].texts) == sorted(texts["two"][:-1]) and sources["two en"].texts == texts["two"][-1:]
    assert sources["chat-messages zh"].texts == ["且听下回分解，自有分晓。"]
    own = "\n".join(sources["one zh"].texts).encode("utf-8")
    assert sources["one zh"].compression() == len(own) / len(zlib.compress(own, 9))
    assert sources["one zh"].total("documents") == 7 and sources["one zh"].language == "zh"
    few = {source.name: source.texts for source in read_sources(folder, 3)}
    assert few["one zh"] == [sources["one zh"].texts[i] for i in (0, 3, 6)] and len(few["two en"]) == 1


def test_shared_text_is_that_of_sets_of_runs(folder, monkeypatch):
    monkeypatch.setattr(survey, "KEPT", 1)
    sources = read_sources(folder, 100)
    runs = [[text[i : i + 24] for text in source.texts for i in range(len(text) - 23)] for source in sources]
    expected = np.zeros((4, 4))
    for i, own in enumerate(runs):
        for j, other in enumerate(runs):
            known = {run for run, n in Counter(other).items() if i != j or n > 1}
            expected[i, j] = sum(run in known for run in own) / max(len(own), 1)
    shares = shared_text(sources)
    assert np.allclose(shares, expected, rtol=0, atol=1e-12)
    names = [source.name for source in sources]
    one, two = names.index("one zh"), names.index("two zh")
    assert shares[one, two] > 0 and shares[one, one] > shares[two, two] == 0


def test_perplexity_is_of_documents_that_the_model_has_not_seen(folder):
    sources = read_sources(folder, 100)
    assert measure_perplexity(sources, "two") == "two"
    model = NGram()
    for source in sources:
        for text in source.texts[::2] if source.name.startswith("two ") else ():
            model.learn(text)
    for source in sources:
        assert source.perplexity == [model.perplexity(text) for text in source.texts[1::2]]
    assert measure_perplexity(sources, None) == "one"  # most text


def test_the_command_prints_tables_and_draws_them(folder, tmp_path):
    said = call("extras.survey", folder, "--documents", 5, "--png", tmp_path / "a.png").stdout
    assert said.startswith(f"{folder}: ") and f"drawn: {tmp_path / 'a.png'}" in said
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.split() for line in said.splitlines()]
    shares = {line[0]: float(line[1].rstrip("%")) for line in lines if line[2:] == ["of", "the", "tokens"]}
    assert set(shares) == {"zh", "en"} and sum(shares.values()) == pytest.approx(100, abs=0.11)
    refused(
        call("extras.survey", folder, "--reference", "three", ok=False),
        "expected one of",
        "one",
        "two",
        "chat-messages",
    )
    refused(call("extras.survey", tmp_path, ok=False), "no data in", "prepare.py")
    refused(call("extras.survey", folder, "--documents", 1, ok=False), "expected 2 or more")
