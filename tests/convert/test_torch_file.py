"""PyTorch's files read without it: the same bits as `torch.load`, and nothing that a pickle says is ever done."""

import collections
import io
import pickle
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from hybrid_dit.convert import tensor_pickle
from hybrid_dit.convert.files import Weights
from hybrid_dit.convert.open_file import OpenFile
from hybrid_dit.convert.torch_file import TorchValue
from hybrid_dit.errors import UserError

FORMATS = [True, False]  # zip, and the one before PyTorch 1.6


def examples():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=generator)
    return {
        "single": base,
        "tied": base,
        "transposed": base.T,
        "part": base[1:4, 2:],
        "column": base[:, 3],
        "bf": torch.randn(2, 3, 4, generator=generator).bfloat16(),
        "half": torch.randn(7, generator=generator).half(),
        "double": torch.randn(2, generator=generator).double(),
        "scalar": torch.tensor(3),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "float8": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
        "u16": torch.arange(4).to(torch.uint16),
        "complex": torch.randn(2, dtype=torch.complex64, generator=generator),
    }


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("zipped", FORMATS, ids=["zip", "old"])
def test_every_tensor_is_read_bit_for_bit(tmp_path, zipped):
    file = tmp_path / "a.pth"
    torch.save(examples(), file, _use_new_zipfile_serialization=zipped)
    weights = Weights(file)
    assert weights.shapes == {name: tuple(t.shape) for name, t in examples().items()}
    names = ["F32"] * 5 + ["BF16", "F16", "F64", "I64", "BOOL", "F32", "F32", "F8_E4M3", "U16", "C64"]
    assert list(weights.dtypes.values()) == names and weights.file_of("bf") == file
    for name, tensor in examples().items():
        found = weights.read(name)
        assert found.shape == tuple(tensor.shape) and found.tobytes() == bits(tensor), name
    assert weights.read("bf").dtype.name == "bfloat16"


@pytest.mark.parametrize("zipped", FORMATS, ids=["zip", "old"])
def test_parts_read_only_their_bytes(tmp_path, zipped):
    torch.save(examples(), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    weights = Weights(tmp_path / "a.pth")
    for name in ("single", "transposed", "bf"):
        before, index = weights.bytes_read, (slice(1, 2), slice(0, 2))
        expected = examples()[name][index]
        assert weights.read_part(name, index).tobytes() == bits(expected)
        # Of a transposed tensor everything is read: 30 numbers.
        assert weights.bytes_read - before == (120 if name == "transposed" else len(bits(expected)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_writes_is_understood(tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))  # an OrderedDict with _metadata
    torch.save(module.state_dict(), tmp_path / "a.pt", pickle_protocol=protocol)
    weights = Weights(tmp_path / "a.pt")
    assert list(weights.shapes) == list(module.state_dict())
    assert all(weights.read(name).tobytes() == bits(tensor) for name, tensor in module.state_dict().items())


def test_usual_wrappings_are_taken_off_and_told(tmp_path):
    inner = {"a": torch.ones(2)}
    value = {"module": {"state_dict": inner}, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    torch.save(value, tmp_path / "a.bin")
    weights = Weights(tmp_path / "a.bin")
    assert list(weights.shapes) == ["a"]
    assert weights.notes == (
        "a.bin: weights are those under 'module'; left out: epoch, optimizer",
        "a.bin: weights are those under 'state_dict'",
    )


@pytest.mark.parametrize(
    "value, message",
    [
        ([torch.ones(2)], "holds a list instead of named tensors"),
        ({}, "holds an empty dict instead of named tensors"),
        (torch.ones(2), "holds a Tensor instead of named tensors"),
        ({"a": torch.ones(2)} | {f"n{i}": i for i in range(12)}, r"no tensor: n0 \(int\), .*n9 \(int\) and 2 more"),
        ({3: torch.ones(2)}, r"holds what is no tensor: 3 \(Tensor\)"),
        ({"a": torch.ones(1).expand(10**9)}, "goes beyond its storage of 4 bytes, or repeats it"),
        ({"a": torch.ones(2).to_sparse()}, "refused: it holds more than tensors"),
        ({"a": np.float32(1)}, "refused: it holds more than tensors"),
    ],
)
def test_what_are_no_named_tensors_is_told(tmp_path, value, message):
    for zipped in FORMATS:
        torch.save(value, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=message) as error:
            Weights(tmp_path / "a.pth")
        assert str(tmp_path / "a.pth") in str(error.value)


class Runs:
    """Unpickling an instance calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("way", ["pickle", "zip", "old"])
def test_no_code_is_run(tmp_path, name, way):
    file, marker = tmp_path / name, tmp_path / "marker"
    value = {"b": Runs(open, str(marker), "w"), "a": torch.ones(2)}
    if way == "pickle":
        file.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, file, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(UserError) as error:
        Weights(file)
    if name == "a.safetensors":
        assert "not a safetensors file" in str(error.value)
    else:
        where = open.__module__  # io, from Python 3.13 on _io
        assert f"is refused: it holds more than tensors ({where}.open)" in str(error.value)
    assert not marker.exists()
    if way != "pickle":
        torch.load(io.BytesIO(file.read_bytes()), weights_only=False)  # does create it
        assert marker.exists()


def bombs():
    """Pickles of a hundred bytes that allocate or compute without bound where they are executed."""
    nested, name = b"(t", b"X\1\0\0\0a"
    for _ in range(60):
        nested += b"2\x86"  # DUP, TUPLE2: 2**60 leaves
    shared = b")q\0" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n("
    tensor += b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0kX\3\0\0\0cpuK\4tQ"
    return {
        "hash": b"\x80\2}" + shared + b"K\1s.",
        "duplicates": b"\x80\2}" + nested + b"K\1s.",
        "bytearray": b"\x80\2}" + name + b"c__builtin__\nbytearray\n\x8a\5\0\0\0\0\4\x85Rs.",
        "memo": b"\x80\2}r\xff\xff\xff\x7f" + name + b"K\1s.",
        "length": b"\x80\2}X\xff\xff\xff\x7fa",
        "frame": b"\x80\4\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        "shape": b"\x80\2}" + name + tensor + b"K\0" + shared + b")\x89NtRs.",
        "itself": b"\x80\2}q\0" + name + b"h\0s.",
        "steps": b"\x80\2" + b"N" * 1_000_000 + b".",
        "stack": b"\x80\2\x87.",
        "call": b"\x80\2ctorch._utils\n_rebuild_parameter\n)R.",
    }


@pytest.mark.parametrize("name", bombs())
def test_bombs_do_not_go_off(tmp_path, name):
    file = tmp_path / "a.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", bombs()[name])
        archive.writestr("a/data/k", bytes(16))
    start = time.perf_counter()
    with pytest.raises(UserError, match="damaged|refused|no tensor|named tensors|has a shape"):
        Weights(file)
    assert time.perf_counter() - start < 5  # the most steps take 0.1 to 0.7 s, and type checks of each that tests add
    if name != "steps":
        tracemalloc.start()
        with pytest.raises(UserError):
            Weights(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000


def test_compressed_and_contradicting_archives_are_refused(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good:
        content = {entry.filename: good.read(entry) for entry in good.infolist()}
    (data,) = [name for name in content if name.endswith("data/0")]
    root = data.removesuffix("data/0")
    cases = {
        "compressed, which PyTorch never does": (content, zipfile.ZIP_DEFLATED),
        "has 396 bytes, expected 400": (content | {data: bytes(396)}, zipfile.ZIP_STORED),
        "has nothing, expected 400": ({n: c for n, c in content.items() if n != data}, zipfile.ZIP_STORED),
        "has 2 entries data.pkl": (content | {"other/data.pkl": b""}, zipfile.ZIP_STORED),
        "high byte first": (content | {f"{root}byteorder": b"big"}, zipfile.ZIP_STORED),
        "bytes": (content | {f"{root}data.pkl": bytes(tensor_pickle.MAX_BYTES + 1)}, zipfile.ZIP_STORED),
    }
    for message, (entries, compression) in cases.items():
        with zipfile.ZipFile(tmp_path / "a.pth", "w", compression) as archive:
            for name, value in entries.items():
                archive.writestr(name, value)
        with pytest.raises(UserError, match=f"a.pth is damaged or not a file of torch.save.*{message}"):
            Weights(tmp_path / "a.pth")


def test_truncated_files_are_told(tmp_path):
    for zipped in FORMATS:
        torch.save({"a": torch.ones(100)}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        content = (tmp_path / "a.pth").read_bytes()
        for length in range(0, len(content), 37):
            (tmp_path / "a.pth").write_bytes(content[:length])
            with pytest.raises(UserError, match="a.pth is damaged or not a file of torch.save"):
                Weights(tmp_path / "a.pth")


def test_pytorch_is_not_needed(tmp_path):
    torch.save(collections.OrderedDict(a=torch.arange(3)), tmp_path / "a.pth")
    code = f"""
import sys
sys.modules["torch"] = None  # importing it raises ImportError
from hybrid_dit.convert.files import Weights
from hybrid_dit.convert.open_file import OpenFile
from hybrid_dit.convert.torch_file import TorchValue
print(Weights({str(tmp_path / "a.pth")!r}).read("a").tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 1, 2]\n"


@pytest.mark.parametrize("zipped", FORMATS, ids=["zip", "old"])
def test_any_value_is_read_from_a_member_of_a_larger_file(tmp_path, zipped):
    stream = io.BytesIO()
    value = {"a": [examples()["bf"], 3], "b": {"c": (examples()["transposed"], "text")}}
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    content = stream.getvalue()
    (tmp_path / "a.tar").write_bytes(bytes(777) + content + b"PK\3\4" + bytes(300))
    found = TorchValue(OpenFile(tmp_path / "a.tar", ("x.pt", 777, len(content))))
    assert found.value["a"][1] == 3 and found.value["b"]["c"][1] == "text"
    for described, tensor in ((found.value["a"][0], "bf"), (found.value["b"]["c"][0], "transposed")):
        array = found.tensor(described)
        assert array.tobytes() == bits(examples()[tensor]) and array.shape == tuple(examples()[tensor].shape)
    with pytest.raises(UserError, match=r"a.tar/x.pt is damaged"):
        TorchValue(OpenFile(tmp_path / "a.tar", ("x.pt", 777, len(content) - 50)))
    with pytest.raises(UserError, match=r"a.tar/x.pt lies beyond the end of the file"):
        OpenFile(tmp_path / "a.tar", ("x.pt", 777, len(content) + 400))


def test_a_tensor_of_any_value_is_checked_before_it_is_read(tmp_path):
    torch.save([torch.ones(1).expand(10**9)], tmp_path / "a.pt")
    found = TorchValue(OpenFile(tmp_path / "a.pt"))
    with pytest.raises(UserError, match="tensor x .*goes beyond its storage"):
        found.tensor(found.value[0], "x")
