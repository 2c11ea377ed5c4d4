"""The safetensors format, read and written: https://github.com/huggingface/safetensors, README, "Format".

A file is 8 bytes with the length of the header (little-endian), the header, which is JSON
{name: {dtype, shape, data_offsets}}, and the tensors, little-endian and back to back. A file is read only if its header
accounts for every byte.
"""

import contextlib
import json
import math
import os

import numpy as np
import torch

from common import track

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@contextlib.contextmanager
def naming(path, expected):
    """Turn an error of reading `path` into a ValueError of one line that names it and says what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: copy or download it again") from None
    except ValueError as error:
        raise ValueError(f"{path} is not {expected} ({error}): copy or download it again") from None


def parse_object(content):
    """UTF-8 bytes -> dict. ValueError for anything but one JSON object, and for a name that is there twice."""

    def unique(pairs):
        found = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name} is there twice")
            found[name] = value
        return found

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def read_json(path):
    """The JSON object of a file, as a dict."""
    with naming(path, "a JSON object"):
        return parse_object(path.read_bytes())


def read_safetensors(path):
    """A file -> {name: tensor}, memory-mapped, so that unused tensors are not read. ValueError for a damaged file."""
    expected = f"a whole safetensors file of {', '.join(DTYPES)}"
    with naming(path, expected):
        content = np.memmap(path, np.uint8, mode="c")  # copy-on-write, since torch has no read-only tensors
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        if start > len(content):
            raise ValueError(f"the header ends at byte {start}, the file at {len(content)}")
        header = parse_object(content[8:start].tobytes())
        data = content[start:]
        header.pop("__metadata__", None)
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if "weight" in name and str(dtype).startswith(("I", "U", "F8", "F6", "F4")):
            fix = "use the folder of the model that they were made from"
            raise ValueError(f"{path}: {name} has dtype {dtype}, so these are quantised weights: {fix}")
    with naming(path, expected):
        return {
            name: torch.from_numpy(data[begin:end]).view(DTYPES[dtype]).view(shape)
            for begin, end, name, dtype, shape in checked_entries(header, len(data))
        }


def checked_entries(header, size):
    """A header -> [(begin, end, name, dtype, shape)] in order. ValueError unless they cover `size` bytes exactly."""
    entries = sorted(checked_entry(name, entry) for name, entry in header.items())
    at = 0
    for begin, end, name, _, _ in entries:
        if begin != at:
            raise ValueError(f"{name} begins at byte {begin} of the data, expected {at}")
        at = end
    if at != size:
        raise ValueError(f"the tensors take {at} bytes, there are {size}")
    return entries


def checked_entry(name, entry):
    """One entry of a header -> (begin, end, name, dtype, shape)."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and are_counts(shape) and are_counts(offsets) and len(offsets) == 2):
        raise ValueError(f"{name} lacks dtype, shape or data_offsets")
    if dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype}")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has {end - begin} bytes, which is not {shape} x {dtype}")
    return begin, end, name, dtype, shape


def are_counts(value):
    """Whether a JSON value is a list of non-negative integers of a believable size."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def write_safetensors(path, tensors):
    """{name: tensor} -> a file; the tensors may have any layout and be on any device. It is flushed, not renamed."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header, ensure_ascii=False).encode("utf-8")
    head += b" " * (-len(head) % 8)  # align the tensors to 8 bytes
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in track(tensors.values(), f"writing {path.name}", "tensors"):
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
