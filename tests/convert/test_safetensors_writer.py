"""What we write: read back by the library, PyTorch and diffusers' way of sharding, one tensor in memory at a time."""

import json
import weakref

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from hybrid_dit.convert.files import Weights, write_safetensors, write_sharded

BF16 = np.dtype(ml_dtypes.bfloat16)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        array = np.asarray(array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def examples():
    rng = np.random.default_rng(0)
    return {
        "odd": rng.standard_normal(3).astype(BF16),  # the next one would be misaligned if it came next in the file
        "single": rng.standard_normal((3, 4)).astype(np.float32),
        "transposed": rng.standard_normal((3, 4)).astype(np.float32).T,
        "scalar": np.asarray(1.5, np.float16),
        "empty": np.zeros((0, 2), BF16),
        "flag": np.array([True, False, True]),
        "é": np.arange(3),
        "strided": np.arange(10, dtype=np.uint8)[::3],
    }


def test_the_library_reads_back_the_bits(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, examples(), {"format": "pt", "labels": '["R2"]'})
    same(safetensors.numpy.load_file(path), examples())
    weights = Weights(path)
    same({name: weights.read(name) for name in weights.shapes}, examples())
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == weights.metadata == {"format": "pt", "labels": '["R2"]'}
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_data_is_where_the_library_would_put_it(tmp_path):
    """Aligned header, tensors by width, then by name. (The library orders dtypes of one width in its own way.)"""
    plain = {n: a for n, a in examples().items() if n not in ("scalar", "strided", "flag", "transposed")}
    write_safetensors(tmp_path / "ours.safetensors", plain, {"format": "pt"})
    safetensors.numpy.save_file(plain, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_pytorch_makes_views_of_every_tensor(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", examples(), {})
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    for name, array in examples().items():
        content = found[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert tuple(found[name].shape) == array.shape and content == array.tobytes()


def plan_of(tensors):
    return {name: (array.dtype, array.shape) for name, array in tensors.items()}


@pytest.mark.parametrize("limit, parts", [(10**9, 1), (64, 5), (1, 6)])
def test_shards_are_filled_in_order_and_indexed(tmp_path, limit, parts):
    tensors = {str(i): np.full((i, 4), i, np.float32) for i in (1, 2, 3, 5, 4, 6)}
    files = write_sharded(tmp_path, "model", plan_of(tensors), tensors.items(), {"format": "pt"}, limit)
    weights = Weights(tmp_path)
    same({name: weights.read(name) for name in weights.shapes}, tensors)
    assert weights.metadata == {"format": "pt"} and weights.notes == ()
    if parts == 1:
        assert [file.name for file in files] == ["model.safetensors"]
        return
    shards = [f"model-{i:05d}-of-{parts:05d}.safetensors" for i in range(1, parts + 1)]
    assert [file.name for file in files] == [*shards, "model.safetensors.index.json"]
    assert sorted(files) == sorted(tmp_path.iterdir())
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert {name: weights.file_of(name).name for name in tensors} == index["weight_map"]
    for file in files[:-1]:
        held = safetensors.numpy.load_file(file)
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= limit


def test_each_tensor_is_gone_before_the_next_is_asked_for(tmp_path):
    plan = {str(i): (np.dtype(np.float32), (1000,)) for i in range(20)}
    alive = []

    def stream():
        for name in plan:
            assert sum(ref() is not None for ref in alive) <= 1  # the last one, which the writer's loop still names
            array = np.full(1000, float(name), np.float32)
            alive.append(weakref.ref(array))
            yield name, array
            del array

    write_sharded(tmp_path, "model", plan, stream(), {}, 10_000)
    assert len(alive) == 20 and float(Weights(tmp_path).read("13")[7]) == 13


@pytest.mark.parametrize(
    "stream, message",
    [
        ([("a", np.zeros(3, np.float32))], r"expected tensor b .* next, got nothing"),
        ([("b", np.zeros(3, np.float32))], r"expected tensor a \(float32, \[3\]\) next, got b"),
        ([("a", np.zeros(4, np.float32))], r"next, got a \(float32, \[4\]\)"),
        ([("a", np.zeros(3, BF16))], r"next, got a \(bfloat16, \[3\]\)"),
        ([(n, np.zeros(3, np.float32)) for n in "abc"], "tensor c comes after the last one"),
    ],
)
def test_what_is_not_planned_is_refused(tmp_path, stream, message):
    plan = {name: (np.dtype(np.float32), (3,)) for name in "ab"}
    with pytest.raises(ValueError, match=message):
        write_sharded(tmp_path, "model", plan, stream, {})


def test_dtypes_and_names_that_the_format_lacks_are_refused(tmp_path):
    for tensors in ({"a": np.array(["x"])}, {"a": np.zeros(2, ">f4")}, {"__metadata__": np.zeros(2, np.float32)}):
        with pytest.raises(ValueError, match="safetensors can't store a tensor"):
            write_safetensors(tmp_path / "a.safetensors", tensors, {})
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_jax_are_written_too(tmp_path):
    plan = {"a": (BF16, (2,))}
    write_sharded(tmp_path, "model", plan, [("a", np.asarray(jnp.ones(2, jnp.bfloat16)))], {})
    assert Weights(tmp_path).read("a").tobytes() == np.ones(2, BF16).tobytes()
