"""The measure of harm: what it counts on its own set, and that it would notice harm."""

import re

from corpus import mappers, pipelines
from extras import harm


def shown(capsys, monkeypatch):
    monkeypatch.setattr(harm, "EACH", 15)
    harm.main([])
    return capsys.readouterr().out


def numbers(output, line):
    [found] = [text for text in output.splitlines() if line in text]
    return [int(number.replace(",", "")) for number in re.findall(r"(?<![.\d])\d[\d,]*(?![.\d])", found)]


def test_cleaning_drops_dirt_and_harms_nothing_else(capsys, monkeypatch):
    output = shown(capsys, monkeypatch)
    good, bad, dropped = numbers(output, "good documents and")
    false = numbers(output, "of these are good")[0]
    assert good > 500 and bad == 240 and false <= dropped / 20
    assert numbers(output, "bad ones are kept")[0] <= bad / 20
    before, after = numbers(output, "Python blocks in chats")
    assert before == after == 30
    for what in harm.CHANGES:
        assert numbers(output, f"{what} changed:")[0] == 0
    assert float(re.search(r"20 times: ([\d.]+)%", output)[1]) < 10


def test_harm_is_noticed(capsys, monkeypatch):
    """With Steel-LLM's filters and without hiding code."""
    published = pipelines.PIPELINES["published"]
    worse = {name: pipeline._replace(has_code=False) for name, pipeline in pipelines.PIPELINES.items()}
    worse["chat"] = worse["chat"]._replace(
        filters=published.filters, mappers=[*mappers_of("zh"), mappers.clean_all_links]
    )
    monkeypatch.setattr(pipelines, "PIPELINES", worse)
    output = shown(capsys, monkeypatch)
    assert numbers(output, "of these are good")[0] > 100
    assert numbers(output, "chats with code changed:")[0] > 10
    before, after = numbers(output, "Python blocks in chats")
    assert after < before == 30


def mappers_of(name):
    return pipelines.PIPELINES[name].mappers
