"""Our reader of safetensors against the library's files, NumPy's slicing, and headers made by hand."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from hybrid_dit.convert.files import Weights
from hybrid_dit.convert.safetensors_file import DTYPES
from hybrid_dit.errors import UserError


def examples():
    rng = np.random.default_rng(0)
    shapes = {"bf": (ml_dtypes.bfloat16, (3, 4, 5)), "half": (np.float16, (7,)), "single": (np.float32, (2, 3))}
    shapes |= {"scalar": (ml_dtypes.bfloat16, ()), "empty": (np.float32, (0, 3)), "none": (np.float16, (4, 0))}
    shapes |= {"i64": (np.int64, (2,)), "u8": (np.uint8, (3,)), "flag": (np.bool_, (2, 2)), "f64": (np.float64, (1, 1))}
    return {name: np.asarray(100 * rng.standard_normal(shape)).astype(dtype) for name, (dtype, shape) in shapes.items()}


def test_files_of_the_library_are_read_bit_for_bit(tmp_path):
    tensors = examples()
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "é": "\n"})
    weights = Weights(tmp_path / "a.safetensors")
    assert weights.metadata == {"format": "pt", "é": "\n"} and weights.notes == ()
    assert weights.shapes == {name: array.shape for name, array in tensors.items()}
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as library:
        assert weights.dtypes == {name: library.get_slice(name).get_dtype() for name in tensors}
    for name, array in tensors.items():
        found = weights.read(name)
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert found.flags.c_contiguous and found.flags.writeable
    assert weights.bytes_read == sum(array.nbytes for array in tensors.values())


OURS = {  # what NumPy writes in another way than F32 = f4
    "BOOL": "?",
    "BF16": ml_dtypes.bfloat16,
    "C64": "c8",
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_has_the_width_that_the_format_gives_it(tmp_path, dtype):
    kind = np.dtype(OURS.get(dtype) or f"{dtype[0].lower()}{int(dtype[1:]) // 8}")
    array = np.ones(3, kind)
    info = {"dtype": dtype, "shape": [3], "data_offsets": [0, array.nbytes]}
    write(tmp_path / "a.safetensors", {"a": info}, array.tobytes())
    np.testing.assert_array_equal(Weights(tmp_path / "a.safetensors").read("a"), array)
    # The library's parser checks the same product of width and shape.
    assert safetensors.deserialize((tmp_path / "a.safetensors").read_bytes())[0][1]["dtype"] == dtype


def test_parts_are_those_of_numpy_and_read_nothing_else(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {str(n): rng.integers(0, 2**16, rng.integers(1, 6, n), np.uint16) for n in range(6)}
    tensors |= {name: array.view(ml_dtypes.bfloat16) for name, array in tensors.items()} | {"0": np.float32(3)}
    tensors = {name: np.asarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    weights = Weights(tmp_path / "a.safetensors")
    expected = 0
    for _ in range(1000):
        name = str(rng.integers(6))
        array = tensors[name]
        limits = [rng.integers(-7, 8, 2).tolist() for _ in range(rng.integers(array.ndim + 1))]
        index = tuple(slice(*(None if rng.random() < 0.3 else n for n in pair)) for pair in limits)
        part = weights.read_part(name, index)
        assert part.dtype == array.dtype and part.shape == array[index].shape
        assert part.tobytes() == array[index].tobytes()
        expected += array[index].nbytes
    assert weights.bytes_read == expected > 0


def test_steps_and_too_many_axes_are_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros((2, 2))}, tmp_path / "a.safetensors")
    for index in [(slice(None, None, 2),), (slice(None, None, -1),), (slice(None),) * 3]:
        with pytest.raises(ValueError, match="slices of step 1 only"):
            Weights(tmp_path / "a.safetensors").read_part("a", index)


def write(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def f32(shape, begin, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


DATA = bytes(16)
BROKEN = {  # message -> header, for 16 bytes of data
    "its header starts with b'": b" {}",
    "is not valid JSON": b'{"a":}',
    "the name a occurs twice": b'{"a": 1, "a": 2}',
    "nested too deep": b'{"a":' * 100_000,
    "__metadata__ is {'a': 1}, expected texts by name": {"__metadata__": {"a": 1}},
    "__metadata__ is None": {"__metadata__": None},
    "tensor a is described by 7": {"a": 7},
    "tensor a is described by {'dtype'": {"a": {"dtype": "F32", "shape": [4]}},
    "tensor a has dtype F4, known are": {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 16]}},
    "tensor a has dtype [1], known are": {"a": {"dtype": [1], "shape": [4], "data_offsets": [0, 16]}},
    "tensor a has shape [-4]": {"a": f32([-4], 0, 16)},
    "tensor a has shape [True, 4]": {"a": f32([True, 4], 0, 16)},
    "tensor a has shape [4.0]": {"a": f32([4.0], 0, 16)},
    "tensor a has shape 4": {"a": f32(4, 0, 16)},
    "tensor a has shape [1, 1, 1": {"a": f32([1] * 40 + [4], 0, 16)},
    "more than fits in memory": {"a": f32([0, 2**62, 2**62], 0, 0)},
    "tensor a has data_offsets [16, 0]": {"a": f32([4], 16, 0)},
    "tensor a has data_offsets [0, 16.0]": {"a": f32([4], 0, 16.0)},
    "takes 12 bytes by its data_offsets, expected 16": {"a": f32([4], 0, 12)},
    "takes 16 bytes by its data_offsets, expected 20": {"a": f32([5], 0, 16)},
    "tensor b overlaps the one before it: it begins at 8, expected 12": {"a": f32([3], 0, 12), "b": f32([2], 8, 16)},
    "tensor b leaves a gap before it: it begins at 8, expected 4": {"a": f32([1], 0, 4), "b": f32([2], 8, 16)},
    "16 bytes of tensors are there, expected 12": {"a": f32([3], 0, 12)},
    "16 bytes of tensors are there, expected 20": {"a": f32([5], 0, 20)},
    "is no name for a tensor": b'{"\\ud800": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_headers_are_told(tmp_path, message):
    path = tmp_path / "a.safetensors"
    write(path, BROKEN[message], DATA)
    with pytest.raises(UserError) as error:
        Weights(path)
    assert message in str(error.value) and str(path) in str(error.value) and "fetch it again" in str(error.value)


def test_sizes_that_lie_are_told(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (3, 16 + 3, 2**40, 2**64 - 1):
        write(path, b"{}", DATA, length)
        with pytest.raises(UserError, match="its header should have|not valid JSON"):
            Weights(path)
    for content in (b"", b"\2\0\0", bytes(8)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="its header"):
            Weights(path)
    write(path, b"{" + b" " * 4_000_000 + b"}", b"")
    with pytest.raises(UserError, match="its header has 4,000,002 bytes, at most 4,000,000"):
        Weights(path)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(1000)}, path)
    weights = Weights(path)
    with open(path, "r+b") as file:
        file.truncate(4000)
    with pytest.raises(UserError, match="tensor a ends early; the file changed"):
        weights.read("a")


def test_no_tensors_are_no_error(tmp_path):
    write(tmp_path / "a.safetensors", b"{}      ", b"")
    assert Weights(tmp_path / "a.safetensors").shapes == {}
