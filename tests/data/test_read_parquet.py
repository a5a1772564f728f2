"""Parquet files with rows or columns that are missing or contradict themselves."""

import threading

import latent_sets
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from latent_sets import VAE, parquet_row, write_parquet

from hybrid_dit.data import read_parquet
from hybrid_dit.data.library import BadSample
from hybrid_dit.data.read_parquet import ParquetLibrary

PAIRS = latent_sets.samples(6)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"vae_latent_bytes": b"abc"}, r"vae_latent has 3 bytes, which is not what \[4, 3, 4, 6\] of float32 takes"),
        ({"vae_latent_bytes": None}, "vae_latent has no bytes"),
        ({"vae_latent_dtype": "int8"}, "vae_latent has dtype int8; known are bfloat16"),
        ({"vae_latent_dtype": None}, "vae_latent has dtype ;"),
        ({"vae_latent_dtype": "bfloat16"}, "which is not what"),
        ({"vae_latent_shape": [4, 3, 4]}, r"latents \[4, 3, 4\] are not"),
        ({"vae_latent_shape": None}, r"latents \[\] are not"),
        ({"vae_latent_shape": [-4, -3, 4, 6]}, "are not"),
        ({"vae_latent_shape": [4, None, 4, 6]}, "are not"),
        ({"text_embedding_shape": [None, 8]}, r"text embedding \[None, 8\] is not"),
        ({"vae_latent_shape": [2**40, 2**40, 2**40, 2**40]}, "which is not what"),
        ({"text_embedding_shape": [16]}, r"text embedding \[16\] is not \[tokens, width\]"),
        ({"text_embedding_bytes": b""}, "text_embedding has 0 bytes"),
    ],
)
def test_a_bad_row_is_told_and_its_neighbours_are_read(tmp_path, change, reason):
    rows = [parquet_row(*pair, i) for i, pair in enumerate(PAIRS[:3])]
    rows[1] |= change
    write_parquet(tmp_path / "a.parquet", rows, group=3)
    found = ParquetLibrary(tmp_path, VAE)
    told = dict(found.index.bad)
    for i in range(len(found.index.entries)):
        try:
            assert found.read(i).latents.shape == (3, 4, 6, 4)
        except BadSample as error:
            told[found.key(i)] = str(error)
    assert told.keys() == {"a.parquet/1"}
    with pytest.raises(BadSample, match=reason):
        raise BadSample(told["a.parquet/1"])


def test_tensors_of_16_bits_are_read_by_their_dtype(tmp_path):
    latents, text = PAIRS[0]
    row = parquet_row(latents, text)
    half = text.astype(ml_dtypes.bfloat16)
    row |= {"text_embedding_bytes": half.tobytes(), "text_embedding_dtype": "torch.bfloat16"}
    write_parquet(tmp_path / "a.parquet", [row])
    assert ParquetLibrary(tmp_path, VAE).read(0).text.tobytes() == half.tobytes()


def test_another_table_and_a_broken_file_are_named(tmp_path):
    row = parquet_row(*PAIRS[0])
    write_parquet(tmp_path / "good.parquet", [row])
    write_parquet(tmp_path / "other.parquet", [{"caption": "a"}])
    content = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.parquet").write_bytes(b"")
    found = ParquetLibrary(tmp_path, VAE)
    assert len(found.index.entries) == 1
    assert found.index.bad.keys() == {"other.parquet", "cut.parquet", "empty.parquet"}
    assert found.index.bad["other.parquet"].startswith("has no column vae_latent_bytes, vae_latent_shape")
    assert "not a readable parquet file" in found.index.bad["cut.parquet"]


def test_text_that_is_not_utf8_is_a_bad_sample(tmp_path):
    table = pa.Table.from_pylist([parquet_row(*pair, i) for i, pair in enumerate(PAIRS[:3])])
    damaged = pa.array([b"float32", b"float\xff2", b"float32"], pa.binary()).view(pa.string())
    table = table.set_column(table.schema.get_field_index("vae_latent_dtype"), "vae_latent_dtype", damaged)
    pq.write_table(table, tmp_path / "a.parquet")
    found = ParquetLibrary(tmp_path, VAE)
    with pytest.raises(BadSample, match="can't be read: 'utf-8' codec can't decode byte 0xff"):
        found.read(1)
    assert [found.read(i).latents.shape for i in (0, 2)] == [(3, 4, 6, 4)] * 2


@pytest.mark.parametrize("name", ["vae_latent_shape", "text_embedding_shape"])
@pytest.mark.parametrize("cell", [3, b"\xff"])
def test_shapes_of_other_types_are_told_when_the_set_is_looked_through(tmp_path, name, cell):
    write_parquet(tmp_path / "good.parquet", [parquet_row(*PAIRS[0])])
    table = pa.Table.from_pylist([parquet_row(*PAIRS[0])])
    column = pa.array([cell]) if cell == 3 else pa.array([cell], pa.binary()).view(pa.string())
    table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, tmp_path / "other.parquet")
    found = ParquetLibrary(tmp_path, VAE)
    assert len(found.index.entries) == 1
    assert found.index.bad["other.parquet"].startswith("has a column of a type that FastVideo does not write")


def test_columns_of_other_types_are_bad_samples(tmp_path):
    rows = [parquet_row(*pair, i) | {"vae_latent_dtype": 3} for i, pair in enumerate(PAIRS[:2])]
    write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(BadSample, match="has a column of a type that FastVideo does not write"):
        ParquetLibrary(tmp_path, VAE).read(0)


def test_row_groups_too_large_for_memory_are_left_out(tmp_path, monkeypatch):
    sizes = []
    for name, count in (("a", 1), ("b", 5)):
        rows = [parquet_row(*pair, i) for i, pair in enumerate(PAIRS[:count])]
        write_parquet(tmp_path / f"{name}.parquet", rows, group=count)
        with pq.ParquetFile(tmp_path / f"{name}.parquet") as parquet:
            sizes.append(parquet.metadata.row_group(0).total_byte_size)
    monkeypatch.setattr(read_parquet, "MAX_GROUP", sizes[0])
    found = ParquetLibrary(tmp_path, VAE)
    assert [found.key(i) for i in range(len(found.index.entries))] == ["a.parquet/0"]
    assert found.index.bad == {
        "b.parquet, row group 0": f"has 5 rows and {sizes[1]:,} bytes, which are read at once; write smaller row groups"
    }


def test_damage_inside_a_row_group_is_a_bad_sample(tmp_path):
    rows = [parquet_row(*pair, i) for i, pair in enumerate(PAIRS)]
    write_parquet(tmp_path / "a.parquet", rows, group=6)
    found = ParquetLibrary(tmp_path, VAE)
    with pq.ParquetFile(tmp_path / "a.parquet") as parquet:
        names = parquet.schema_arrow.names
        begin = parquet.metadata.row_group(0).column(names.index("vae_latent_bytes")).data_page_offset
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[begin : begin + 200] = bytes(200)
    (tmp_path / "a.parquet").write_bytes(content)
    for i in range(6):
        with pytest.raises(BadSample, match="can't be read"):
            found.read(i)


def test_threads_that_want_rows_of_one_group_read_it_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [parquet_row(*pair, i) for i, pair in enumerate(PAIRS)], group=3)
    found, reads, original = ParquetLibrary(tmp_path, VAE), [], read_parquet._read_group

    def counted(file, group):
        reads.append(group)
        return original(file, group)

    monkeypatch.setattr(read_parquet, "_read_group", counted)
    got = [None] * 6
    threads = [threading.Thread(target=lambda i=i: got.__setitem__(i, found.read(i).text)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reads) == [0, 1]
    for text, (_, expected) in zip(got, PAIRS):
        np.testing.assert_array_equal(text, expected.astype(np.float32))
