"""What every stage needs: whole files or none, hashes, locks, the device, and how a command ends."""

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path

# ----------------------------------------------------------------------------------------------------------------------
# Files


def write_atomically(path, content):
    """Write bytes so that path holds either the old content or all of the new, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256_of(path):
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path):
    """The text of a UTF-8 file, line ends unchanged; 0 is standard input. ValueError if it is not UTF-8."""
    name = path or "standard input"
    with open(path, "rb", closefd=path != 0) as file:
        try:
            return file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"is not UTF-8 (byte {error.start}): convert it, e.g. iconv -f gb18030 -t utf-8"
            raise ValueError(f"{name} {reason}") from None


def lock_file(file, wait=0.0):
    """Lock an open file for this process until it is closed; False if another has it and keeps it for `wait` seconds."""
    with contextlib.suppress(ImportError):
        import fcntl  # not on Windows, where nothing is locked

        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.3)
    return True


# ----------------------------------------------------------------------------------------------------------------------
# The device. torch is imported here and not above, as prepare.py and `--help` do without it


def choose_device(name):
    """--device as torch's name: "auto" is the fastest device present. ValueError for one that is not."""
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in present.items() if available)
    if not present[name]:
        devices = ", ".join(device for device, available in present.items() if available)
        raise ValueError(f"--device {name}: there is none here; expected one of {devices}")
    return name


def can_compile(device):
    """Whether torch.compile works: on a CPU it needs a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return device == "cuda" or device == "cpu" and bool(compiler) and headers.exists()


# ----------------------------------------------------------------------------------------------------------------------
# How a command ends


def exit_code(main, argv=None):
    """Run main(argv) and return its exit code: what it returns, or 1 with one line on stderr for a user's mistake.

    Every module raises ValueError or OSError with that line, and only here does it end a program. `python -X dev`
    shows the traceback instead.
    """
    try:
        return main(argv) or 0
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.stdout.flush()
        print(one_line(error), file=sys.stderr, flush=True)
        return 1


def one_line(error):
    """The message of an exception; an OSError of the system's names its file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error)


def run_command(main):
    """What stands under `if __name__ == "__main__"`. Ctrl-C and a closed pipe (`| head`) end it without a traceback."""
    for name in ("SIGINT", "SIGPIPE"):
        if hasattr(signal, name):  # Windows has no SIGPIPE
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    sys.exit(exit_code(main))
