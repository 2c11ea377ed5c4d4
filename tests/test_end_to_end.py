"""The README's commands, typed as they stand, with flags behind them that make them small."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_the_two_commands_are_there_and_ci_runs_the_second():
    assert COMMANDS[0] == "pip install -r requirements.txt && python train.py"
    assert COMMANDS[1] == "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest"
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_file_fits_the_lines_that_the_readme_states():
    for name, lines in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(lines), name


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The repository's files in an empty folder; only what was already downloaded is shared, to spare the index."""
    folder = tmp_path_factory.mktemp("fresh")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "data").mkdir()
    (ROOT / "data" / "raw").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "raw").symlink_to(ROOT / "data" / "raw")
    (folder / "my.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8") * 3, encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c or "sample.py" in c or "eval.py" in c or "prepare.py" in c])
def test_a_command_of_the_readme_runs(command, fresh):
    command = command.split("&& ")[-1]  # this environment was made by the part before it
    if "--resume" in command:
        command += " --steps 5"  # two more than the run has done
    elif "train.py" in command:
        command += " --n-layer 1 --d-model 32 --eval-tokens 1000 --no-compile --steps 3"
    if "prepare.py" in command:
        command += " --vocab-size 700"
    if "sample.py" in command:
        command += " --max-new-tokens 5"
    bin_folder = os.path.dirname(sys.executable)
    result = subprocess.run(
        ["bash", "-c", command], cwd=fresh, capture_output=True, text=True, encoding="utf-8", timeout=600,
        env={**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"]},
    )  # fmt: skip
    assert result.returncode == 0, command + "\n" + result.stdout + result.stderr
    if "train.py" in command:
        assert f"done: step {5 if '--resume' in command else 3}, val loss " in result.stdout
