"""What every stage needs: whole files or none, hashes, locks, the device, and how a command ends."""

import codecs
import contextlib
import ctypes
import errno
import hashlib
import io
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import traceback
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


def flush_folder(folder):
    """Flush what was renamed in a folder to the disk. Some file systems, and Windows, cannot: then nothing is done."""
    cannot = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.EBADF, errno.EISDIR)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in cannot:
            raise


def read_text(path):
    """The text of a file, with \\n at line ends; 0 is standard input. ValueError if it is not UTF-8.

    A byte order mark is dropped; after that of UTF-16 the file is read as UTF-16.
    """
    name = path or "standard input"
    with open(path, "rb", closefd=path != 0) as file:
        content = file.read()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"is not {error.encoding.upper()} (byte {error.start}): convert it, e.g. iconv -f gb18030 -t utf-8"
        raise ValueError(f"{name} {reason}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lock_file(file, wait=0.0):
    """Lock an open file for this process until it is closed; False if another process keeps it for `wait` seconds."""
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
# The machine. torch is imported here and not above, as prepare.py and `--help` do without it


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


def has_amx():
    """Whether this CPU multiplies matrices in bf16 several times as fast as in fp32."""
    import torch

    return torch.cpu.get_capabilities().get("amx_bf16", False)


def keep_large_buffers():
    """Tell glibc not to give large buffers back to the kernel after every use: a fifth of a CPU step is page faults."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mmap for large blocks
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is freed


# Dense bf16 peaks, FLOP/s, from the data sheets. The longer name first: an H200 is no H20.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12}
PEAKS |= {"A800": 312e12, "L40S": 362e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12, "B200": 2250e12}


def peak_flops(device, bf16):
    """FLOP/s that a matmul reaches on this CPU (measured), the bf16 peak of a known GPU, else None."""
    import torch

    if device == "cpu":
        a, best = torch.randn(1024, 1024, dtype=torch.bfloat16 if bf16 else None), math.inf
        for _ in range(10):
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
        return 2 * 1024**3 / best
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((flops for part, flops in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def flops_per_token(model, T):
    """Forward and backward, per token of a text of T tokens: 6 per weight in a matmul; causal attention is half."""
    looked_up = [] if model.config.tie_embeddings else [model.embedding]
    looked_up += [model.value_embedding] if model.config.value_embedding else []
    weights = model.n_params() - sum(table.numel() for table in looked_up)
    return 6 * weights + 6 * model.config.n_layer * model.config.n_head * model.config.head_width * T


# ----------------------------------------------------------------------------------------------------------------------
# How far it is

LINE_EVERY = 10  # seconds


def track(items, what, unit, total=None, shown=True):
    """Yield the items, and show how far that is: a bar on a terminal, else a line on stderr every ten seconds.

    Nothing is shown of what is done at once. total: how many there are, where items has no length.
    """
    from tqdm import tqdm

    total = len(items) if total is None else total
    start = said = time.monotonic()
    with tqdm(total=total, desc=what, unit=f" {unit}", leave=False, delay=1, disable=None if shown else True) as bar:
        for n, item in enumerate(items, 1):
            yield item
            bar.update()
            now = time.monotonic()
            if shown and bar.disable and now - said >= LINE_EVERY and n < total:
                print(f"{what}: {how_far(n, total, now - start)} {unit}", file=sys.stderr, flush=True)
                said = now


def how_far(n, total, seconds):
    """In words, such as: 8 s to go, 20 of 100. seconds: since the first of them began."""
    return f"{seconds / n * (total - n):,.0f} s to go, {n:,} of {total:,}"


# ----------------------------------------------------------------------------------------------------------------------
# How a command ends


def exit_code(main, argv=None):
    """Run main(argv) and return its exit code: what it returns, or 1 with one line on stderr for a user's mistake.

    Every module raises ValueError or OSError with that line, and only here does it end a program. A ValueError that a
    library raised is a bug and keeps its traceback; `python -X dev` shows the traceback of all.
    """
    try:
        return main(argv) or 0
    except RuntimeError as error:
        if sys.flags.dev_mode or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        cause = next((line for line in lines[::-1] if "error:" in line), lines[0])
        print(f"torch.compile failed ({cause}): do without it, in train.py with --no-compile", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode or isinstance(error, ValueError) and raised_by_library(error):
            raise
        if isinstance(error, BrokenPipeError):  # the reader of stdout, like `head`, has enough
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, sys.stdout.fileno())  # or Python's exit would fail at what is left to print
            return 1
        print(one_line(error), file=sys.stderr, flush=True)
        return 1


def raised_by_library(error):
    """Whether an exception was raised in Python's standard library or an installed package."""
    if type(error.__cause__).__name__ == "_RemoteTraceback":  # from a worker process, whose code is ours
        return False
    innermost = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    folders = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(innermost.is_relative_to(folder) for folder in folders)


def one_line(error):
    """The message of an exception; an OSError of the system's names its file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error)


class Tolerant(io.RawIOBase):
    """A stream that drops what it cannot write: a full disk behind stdout, or a reader that is gone, ends no run."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    def write(self, data):
        with contextlib.suppress(OSError):
            return os.write(self.descriptor, data)
        return len(data)

    def writable(self):
        return True

    def fileno(self):
        return self.descriptor

    def isatty(self):
        return os.isatty(self.descriptor)


def print_whatever_happens():
    """Make stdout and stderr Tolerant: for a run, which must not end because a line cannot be printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = io.BufferedWriter(Tolerant(stream.fileno()))
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=stream.line_buffering))


def replace_what_cannot_be_printed():
    """Print "?" for characters that the encoding of stdout lacks, as a Chinese Windows' GBK lacks most of Unicode."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def run_command(main):
    """What stands under `if __name__ == "__main__"`. Ctrl-C and a closed pipe (`| head`) end it without a traceback."""
    for name in ("SIGINT", "SIGPIPE"):
        if hasattr(signal, name):  # Windows has no SIGPIPE
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    replace_what_cannot_be_printed()
    sys.exit(exit_code(main))
