"""How a command ends, files that are whole or not there, and locks."""

import contextlib
import errno
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, run

import common
from common import choose_device, exit_code, flush_folder, lock_file, one_line, read_text, sha256_of, write_atomically
from corpus.work import show_progress
from model import Config

# ----------------------------------------------------------------------------------------------------------------------
# How a command ends

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from common import run_command

def main(argv=None):
    {body}

run_command(main)
"""


@pytest.fixture
def script(tmp_path):
    """Write a command whose main() has this body -> its path."""

    def write(body):
        path = tmp_path / "command.py"
        path.write_text(SCRIPT.format(root=str(ROOT), body=body), encoding="utf-8")
        return path

    return write


def fail(error):
    def main(argv=None):
        raise error

    return main


@pytest.mark.quick
def test_a_mistake_ends_with_one_line_and_code_1(capsys):
    for error, line in (
        (ValueError("--lr -1: expected 0 or more"), "--lr -1: expected 0 or more"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("the download is damaged"), "the download is damaged"),
    ):
        assert exit_code(fail(error)) == 1 and one_line(error) == line
        assert capsys.readouterr().err == line + "\n"


@pytest.mark.quick
def test_the_exit_code_is_what_main_returns():
    for returned, code in ((None, 0), (0, 0), (1, 1), (3, 3)):
        assert exit_code(lambda argv: returned) == code
    assert exit_code(lambda argv: len(argv), ["a", "b"]) == 2


@pytest.mark.quick
def test_a_bug_is_not_taken_for_a_mistake_of_the_user():
    for error in (TypeError("x"), KeyError("x"), RuntimeError("x"), SystemExit(2)):
        with pytest.raises(type(error)):
            exit_code(fail(error))
    with pytest.raises(ValueError, match="Expecting"):  # raised by a library
        exit_code(lambda argv: json.loads("{"))


@pytest.mark.quick
def test_libraries_raise_value_errors_that_main_lets_pass():
    def main(argv=None):
        Config(n_layer=0)

    with pytest.raises(ValueError, match="model configuration: n_layer = 0, expected a positive number"):
        main()  # a SystemExit would be no ValueError
    assert exit_code(main) == 1


@pytest.mark.quick
def test_no_module_ends_the_program_by_itself():
    """Only the functions that stand under `if __name__ == "__main__"` do, and the process that a signal has ended."""
    for path in (path for pattern in ("*.py", "corpus/*.py", "extras/*.py") for path in ROOT.glob(pattern)):
        source = path.read_text(encoding="utf-8")
        assert "raise SystemExit" not in source, path
        assert "sys.exit(" not in source or path.name in ("common.py", "parallel.py"), path


def test_a_command_prints_one_line_and_with_dev_mode_the_traceback(script):
    path = script('print("before"); raise ValueError("the line")')
    result = run(sys.executable, path)
    assert (result.returncode, result.stdout, result.stderr) == (1, "before\n", "the line\n")
    result = run(sys.executable, "-X", "dev", path)
    assert result.returncode == 1 and "Traceback" in result.stderr and "ValueError: the line" in result.stderr


def test_a_closed_pipe_ends_a_command_quietly(script):
    path = script('[print("a line", i, flush=True) for i in range(1_000_000)]')
    process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"a line 0\n"
    process.stdout.close()  # as `| head -1` does
    assert process.stderr.read() == b"" and process.wait(timeout=60) == -signal.SIGPIPE


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_characters_that_cannot_be_printed_become_question_marks(script, encoding):
    path = script('print("5€ 却说😀")')
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, path], env=environment, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == "5€ 却说😀\n".encode(encoding, errors="replace")


def test_a_run_outlives_its_reader_and_a_full_disk(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from parallel import run_rank\n"
    code += "def main(argv):\n    [print('a line', i, flush=True) for i in range(50_000)]\n"
    code += "    print('no stderr', file=sys.stderr)\n    open('done', 'w').close()\n    return 7\nrun_rank(main)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path, bufsize=0)
    assert process.stdout.readline() == b"a line 0\n"
    process.stdout.close()  # as `| head -1` does
    assert process.wait(timeout=60) == 7 and (tmp_path / "done").exists()
    (tmp_path / "done").unlink()
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full, cwd=tmp_path).returncode == 7
    assert (tmp_path / "done").exists()
    result = run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.stdout.splitlines() == [f"a line {i}" for i in range(50_000)] and result.stderr == "no stderr\n"


@pytest.mark.quick
def test_a_folder_that_cannot_be_flushed_is_no_error_and_a_broken_disk_is(tmp_path, monkeypatch):
    for number, is_error in ((errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)):

        def fail(descriptor, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError) if is_error else contextlib.nullcontext():
            flush_folder(tmp_path)
    monkeypatch.undo()
    flush_folder(tmp_path)


def test_ctrl_c_ends_a_command_quietly(script):
    path = script('import time; print("ready", flush=True); time.sleep(60)')
    process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"") and process.returncode == -signal.SIGINT


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.quick
def test_read_text_is_the_same_for_all_line_ends_and_byte_order_marks(tmp_path):
    path = tmp_path / "a.txt"
    text = "却说\n\n曹操\ufeff\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        for end in ("\n", "\r\n", "\r"):
            path.write_bytes(text.replace("\n", end).encode(encoding))
            assert read_text(path) == text
    path.write_bytes(b"")
    assert read_text(path) == ""
    path.write_bytes("滚滚长江".encode("gb18030"))
    with pytest.raises(ValueError, match=f"{path} is not UTF-8 .byte 0.: convert it, e.g. iconv -f gb18030 -t utf-8"):
        read_text(path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


def test_read_text_of_standard_input(script):
    path = script("from common import read_text; sys.stdout.write(ascii(read_text(0)))")
    result = subprocess.run([sys.executable, path], input="却\r\n".encode(), capture_output=True)
    assert result.stdout == rb"'\u5374\n'"
    result = subprocess.run([sys.executable, path], input=b"a\xff", capture_output=True)
    assert result.returncode == 1 and result.stderr.startswith(b"standard input is not UTF-8 (byte 1)")


@pytest.mark.quick
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(common.os, "fsync", full)
        with pytest.raises(OSError):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]
    assert sha256_of(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"


@pytest.mark.quick
def test_a_lock_is_held_until_the_file_is_closed(tmp_path):
    first, second = (open(tmp_path / "lock", "ab") for _ in range(2))
    with first, second:
        assert lock_file(first)
        begin = time.monotonic()
        assert not lock_file(second) and not lock_file(second, wait=0.2)
        assert 0.2 <= time.monotonic() - begin < 5
        first.close()
        assert lock_file(second)


# ----------------------------------------------------------------------------------------------------------------------
# The machine


@pytest.mark.quick
def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device cuda: there is none here; expected one of cpu"):
        choose_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_device("auto") == "cuda"


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="Linux")
@pytest.mark.quick
def test_amx_is_what_the_kernel_says():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        assert common.has_amx() == ("amx_bf16" in file.read().split())


# ----------------------------------------------------------------------------------------------------------------------
# How far it is


def test_lines_say_how_far_it_is_where_there_is_no_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])

    def seconds(each):
        for n in range(5):
            now[0] += each
            yield n

    assert list(common.track(seconds(4), "reading", "files", total=5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == "reading: 8 s to go, 3 of 5 files\n"  # after 12 s; the last one needs no line
    assert list(common.track(seconds(100), "reading", "files", total=5, shown=False)) == [0, 1, 2, 3, 4]
    assert list(common.track(seconds(1), "reading", "files", total=5)) == [0, 1, 2, 3, 4]
    assert common.how_far(200, 5_000, 3.0) == "72 s to go, 200 of 5,000"
    done = threading.Event()
    counts = SimpleNamespace(value=30), SimpleNamespace(value=1_000)

    def wait(seconds):
        now[0] += seconds
        return now[0] > start + 25

    start, done.wait = now[0], wait
    show_progress(counts, done, "cleaning", 4_000, "B")
    said = ["cleaning: 30 s to go, 1,000 of 4,000 B", "cleaning: 60 s to go, 1,000 of 4,000 B"]
    assert capsys.readouterr().err.splitlines() == said


def test_a_terminal_gets_a_bar():
    script = "import time, common\nfor _ in common.track(range(30), 'reading', 'files'): time.sleep(0.1)"
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # else it has no columns
        os.chdir(common.__file__.rpartition("/")[0])
        os.execv(sys.executable, [sys.executable, "-c", script])
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal is one
        while part := os.read(terminal, 4096):
            said += part
    assert os.waitpid(pid, 0)[1] == 0
    assert re.search(rb"reading: +\d+%.*/30 \[.* files/s\]", said) and b"s to go" not in said
