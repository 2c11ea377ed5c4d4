"""The safetensors format, compared with the safetensors package; damaged files are refused."""

import json
import math
import random
import struct

import pytest
import safetensors.torch
import torch

from extras.safetensors_io import read_safetensors, write_safetensors


def tensors_of_all_kinds():
    tensors = {"轻": torch.randn(7, 2).T, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    tensors["odd"] = torch.randn(3).half()
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return tensors | {str(dtype): torch.randn(3, 5).to(dtype) for dtype in dtypes}


@pytest.mark.quick
def test_the_safetensors_package_reads_our_files_and_we_read_its_files(tmp_path):
    tensors, mine, theirs = tensors_of_all_kinds(), tmp_path / "ours", tmp_path / "theirs"
    write_safetensors(mine, tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, theirs, {"note": "x"})
    for got in (safetensors.torch.load_file(mine), read_safetensors(mine), read_safetensors(theirs)):
        assert got.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)
    with safetensors.safe_open(mine, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def file_of(header, data=b"\0" * 24, length=None):
    """The bytes of a file with this header (bytes, or an object to write as JSON); length: instead of its own."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(begin, end, shape=(3,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


A, B = {"a": entry(0, 12)}, {"b": entry(12, 24)}
TWO_AS = json.dumps(A)[:-1].encode() + b"," + json.dumps(A)[1:].encode()
DAMAGED = [
    (b"", "empty"),
    (b"\1\0\0", "the header ends at byte 9, the file at 3"),
    (file_of(A | B)[:30], "the header ends at byte"),
    (file_of(A | B, length=2**63), "the header ends at byte 9223372036854775816"),
    (file_of(b"{"), "Expecting property name"),
    (file_of(b"[" * 100_000), "nested too deeply"),
    (file_of(b"[]"), "no JSON object"),
    (file_of(b"\xff\xfe"), "can't decode"),
    (file_of(TWO_AS), "a is there twice"),
    (file_of(A | {"b": [1]}), "b lacks dtype, shape or data_offsets"),
    (file_of(A | {"b": {"dtype": "F32", "shape": [3]}}), "b lacks dtype"),
    (file_of(A | {"b": entry(12, 24, shape=(-3, -1))}), "b lacks dtype"),
    (file_of(A | {"b": entry(12, 24, shape=(True, 3))}), "b lacks dtype"),
    (file_of(A | {"b": entry(12, 24, dtype="Q4")}), "b has dtype Q4"),
    (file_of(A | {"b": entry(12, 24, shape=(4,))}), "b has 12 bytes, which is not [4] x F32"),
    (file_of(A | {"b": entry(24, 12)}), "b has -12 bytes"),
    (file_of(A | {"b": entry(8, 20)}), "b begins at byte 8 of the data, expected 12"),
    (file_of(A | {"b": entry(16, 28)}), "b begins at byte 16 of the data, expected 12"),
    (file_of(A | B, data=b"\0" * 23), "the tensors take 24 bytes, there are 23"),
    (file_of(A | B, data=b"\0" * 25), "the tensors take 24 bytes, there are 25"),
]


@pytest.mark.quick
@pytest.mark.parametrize("content, words", DAMAGED, ids=[words for _, words in DAMAGED])
def test_a_damaged_file_is_refused_by_name(content, words, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        read_safetensors(path)
    line = str(refusal.value)
    assert line.startswith(f"{path} is not a whole safetensors file") and words in line and "\n" not in line


def test_a_truncated_file_is_refused_and_a_changed_one_refused_or_read_within_its_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors_of_all_kinds())
    whole, draw, survived = path.read_bytes(), random.Random(0), 0
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            read_safetensors(path)
    for _ in range(400):
        changed = bytearray(whole)
        changed[draw.randrange(start)] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            for tensor in read_safetensors(path).values():
                assert tensor.nbytes == math.prod(tensor.shape) * tensor.element_size()
            survived += 1
        except ValueError:
            pass
    assert survived  # a changed letter of a tensor's name cannot be noticed
