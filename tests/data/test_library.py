"""What all formats have in common: the same samples come out of each, and of broken ones a reason."""

import json
import threading
import time

import latent_sets
import ml_dtypes
import numpy as np
import pytest
from latent_sets import VAE

from hybrid_dit.data import library
from hybrid_dit.data.library import BadSample, Cache, is_finite, latent_shape, transposed, used_rows
from hybrid_dit.data.open_source import LIBRARIES
from hybrid_dit.data.read_tar import TarLibrary
from hybrid_dit.errors import UserError

KINDS = ("tar", "parquet", "csv", "tfds")
SHAPES = ((3, 4, 6), (1, 6, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_samples(kind, tmp_path, capsys):
    pairs = latent_sets.samples(7, SHAPES)
    latent_sets.write_set(kind, tmp_path / "set", pairs)
    found = LIBRARIES[kind](tmp_path / "set", VAE, tmp_path / "cache")
    entries = found.index.entries
    assert [e.shape for e in entries] == [SHAPES[i % 2] for i in range(7)] and not found.index.bad
    if kind in ("parquet", "tfds"):
        assert [e.length for e in entries] == [len(text) for _, text in pairs]
    for i, (latents, text) in enumerate(pairs):
        sample = found.read(i)
        assert sample.text.astype(np.float32).tobytes() == text.astype(np.float32).tobytes()
        if kind == "parquet":
            # To the VAE's scale and back in float32. Of x std + mean, the subtraction and the product with 1 / std
            # (itself rounded), each of five roundings is at most half an epsilon of |x| or |x| + |mean| / std.
            exact = latents.astype(np.float64)
            size = np.abs(exact) + np.abs(np.array(VAE.latents_mean) / VAE.latents_std)
            assert (np.abs(sample.latents - exact) <= 2.5 * np.finfo(np.float32).eps * size).all()
        else:
            assert sample.latents.dtype == latents.dtype and sample.latents.tobytes() == latents.tobytes()
    assert len({found.key(i) for i in range(7)}) == 7

    again = LIBRARIES[kind](tmp_path / "set", VAE, tmp_path / "cache")
    assert again.index.digest() == found.index.digest() and again.index.entries == entries
    told = capsys.readouterr().out
    assert told.count("100%") == (2 if kind == "tfds" else 1)  # the second time it was in the cache


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_or_missing_folder_says_what_was_expected(kind, tmp_path):
    with pytest.raises(UserError, match="there is no folder .*config.data.path"):
        LIBRARIES[kind](tmp_path / "nowhere", VAE)
    with pytest.raises(UserError, match=f"no data of the kind {kind}: expected "):
        LIBRARIES[kind](tmp_path, VAE)


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_is_told(kind, tmp_path):
    latent_sets.write_set(kind, tmp_path, latent_sets.samples(2))
    other = library.VAEConfig(z_dim=3, latents_mean=(0.0,) * 3, latents_std=(1.0,) * 3)
    with pytest.raises(BadSample, match="latents have 4 channels, those of the model's VAE have 3"):
        LIBRARIES[kind](tmp_path, other).read(0)


def test_the_scale_can_be_said(tmp_path):
    (latents, text), *_ = pairs = latent_sets.samples(1)
    latent_sets.write_csv(tmp_path, pairs)
    got = LIBRARIES["csv"](tmp_path, VAE, raw=True).read(0).latents
    expected = (latents.astype(np.float64) - np.array(VAE.latents_mean)) / np.array(VAE.latents_std)
    np.testing.assert_allclose(got, expected, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(expected).max())


def test_a_changed_file_is_looked_through_again(tmp_path):
    pairs = latent_sets.samples(4)
    latent_sets.write_tar(tmp_path / "set" / "a.tar", pairs[:2])
    first = LIBRARIES["tar"](tmp_path / "set", VAE, tmp_path)
    latent_sets.write_tar(tmp_path / "set" / "a.tar", pairs[:3])
    second = LIBRARIES["tar"](tmp_path / "set", VAE, tmp_path)
    assert (len(first.index.entries), len(second.index.entries)) == (2, 3)
    assert first.index.digest() != second.index.digest()


def test_a_damaged_cache_file_is_made_again(tmp_path):
    latent_sets.write_tar(tmp_path / "set" / "a.tar", latent_sets.samples(2))
    LIBRARIES["tar"](tmp_path / "set", VAE, tmp_path)
    (kept,) = tmp_path.glob("index_*.json")
    assert len(json.loads(kept.read_text())) == 1
    kept.write_text("[")
    assert len(LIBRARIES["tar"](tmp_path / "set", VAE, tmp_path).index.entries) == 2


def test_a_file_that_could_not_be_read_once_is_tried_again(tmp_path, monkeypatch):
    latent_sets.write_set("tar", tmp_path / "set", latent_sets.samples(4))
    scan, broken = TarLibrary.scan, ["shard_000001.tar"]

    def flaky(self, file):
        if file.name in broken:
            raise OSError(5, "Input/output error")
        return scan(self, file)

    monkeypatch.setattr(TarLibrary, "scan", flaky)
    first = TarLibrary(tmp_path / "set", VAE, tmp_path)
    assert len(first.index.entries) == 2 and "Input/output error" in first.index.bad["shard_000001.tar"]
    broken.clear()
    second = TarLibrary(tmp_path / "set", VAE, tmp_path)
    assert len(second.index.entries) == 4 and not second.index.bad
    broken += ["shard_000000.tar", "shard_000001.tar"]  # now both are kept
    assert len(TarLibrary(tmp_path / "set", VAE, tmp_path).index.entries) == 4


def test_a_block_is_made_once_for_all_threads_and_the_oldest_leaves():
    cache, made = Cache(2), []

    def slow(name):
        time.sleep(0.02)
        made.append(name)
        return name

    threads = [threading.Thread(target=cache.get, args=("a", lambda: slow("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["a"]
    for name in ("b", "a", "c", "a", "b"):  # c drives b out, since a was wanted later
        assert cache.get(name, lambda name=name: slow(name)) == name
    assert made == ["a", "b", "c", "b"]

    def fails():
        raise BadSample("no")

    for _ in range(2):  # a failure is not kept
        with pytest.raises(BadSample):
            cache.get("d", fails)
    assert cache.get("d", lambda: 1) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_helpers_on_arrays(dtype):
    array = np.random.default_rng(0).standard_normal((5, 7)).astype(dtype)
    assert transposed(array).tobytes() == np.array(array.T, order="C").tobytes()
    assert is_finite(array) and is_finite(np.array([np.finfo(np.float16).max, 0, -0.0]).astype(dtype))
    for value in (np.nan, np.inf, -np.inf, -np.nan):
        array[3, 2] = value
        assert not is_finite(array)
    text = np.zeros((6, 3), dtype)
    assert used_rows(text) == 0
    text[3, 1] = 1  # a zero row before it is a token's, as far as one can know
    assert used_rows(text) == 4


def test_shapes_of_latents():
    assert latent_shape((16, 3, 4, 5)) == latent_shape((1, 16, 3, 4, 5)) == (3, 4, 5)
    for shape in ((3, 4, 5), (2, 16, 3, 4, 5), (16, 0, 4, 5), ()):
        with pytest.raises(BadSample, match="are not"):
            latent_shape(shape)
