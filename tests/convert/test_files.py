"""Weights over any source: one interface, counted reads from several threads, clean errors for what is not there."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from hybrid_dit.convert.files import Weights, write_safetensors
from hybrid_dit.errors import UserError


def test_every_source_gives_the_same(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(tmp_path / "a.safetensors", {"x": array}, {"k": "v"})
    torch.save({"x": torch.from_numpy(array)}, tmp_path / "a.pth")
    for source in (tmp_path, tmp_path / "a.safetensors", tmp_path / "a.pth", str(tmp_path)):
        weights = Weights(source)
        assert (weights.shapes, weights.dtypes, str(weights.source)) == ({"x": (3, 4)}, {"x": "F32"}, str(source))
        assert weights.bytes_read == 0
        np.testing.assert_array_equal(weights.read("x"), array)
        np.testing.assert_array_equal(weights.read_part("x", (slice(1, 3), slice(2, 4))), array[1:3, 2:4])
        assert weights.bytes_read == 48 + 16
        assert weights.metadata == ({} if str(source).endswith("pth") else {"k": "v"})


def test_metadata_of_shards_is_merged_the_first_ones_counts(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(1)}, {"k": "1", "only": "a"})
    write_safetensors(tmp_path / "b.safetensors", {"y": np.zeros(1)}, {"k": "2", "also": "b"})
    assert Weights(tmp_path).metadata == {"k": "1", "only": "a", "also": "b"}


def test_threads_read_at_the_same_time_and_every_byte_is_counted(tmp_path):
    array = np.arange(64 * 64).reshape(64, 64)
    write_safetensors(tmp_path / "a.safetensors", {"x": array}, {})
    weights = Weights(tmp_path)
    columns = [slice(i, i + 2) for i in range(62)] * 5
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda part: weights.read_part("x", (slice(None), part)), columns))
    for part, column in zip(parts, columns):
        np.testing.assert_array_equal(part, array[:, column])
    assert weights.bytes_read == len(columns) * 64 * 2 * 8


def test_files_are_closed_with_their_weights(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(1)}, {})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        Weights(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    for _ in range(50):
        with pytest.raises(UserError):
            Weights(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_what_is_not_there_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    cases = {"none": "no weights at", "empty": "no weights at", "x.safetensors": "no weights at"}
    cases |= {"pipe.safetensors": "is not a file", "gone.safetensors": "no weights at", "none.pth": "no weights at"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            Weights(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
