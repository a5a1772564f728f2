"""What a config asks for, down to batches, and every way of asking for something that isn't there."""

import dataclasses
from pathlib import Path

import jax
import latent_sets
import ml_dtypes
import numpy as np
import pytest
from pipelines import random_pipeline

from hybrid_dit import generation
from hybrid_dit.command_line import load, override
from hybrid_dit.data import open_source as module
from hybrid_dit.data.open_source import find_buckets, open_source
from hybrid_dit.errors import UserError
from hybrid_dit.pairs import Pairs

PAIRS = latent_sets.samples(12, ((3, 4, 6), (1, 6, 4), (3, 5, 4)))  # the last one has odd rows


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return random_pipeline(tmp_path_factory.mktemp("open") / "pipeline")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "tar"
    latent_sets.write_set("tar", folder, PAIRS)
    return folder


def make_config(path, **changes):
    config = load(str(Path(__file__).parents[2] / "configs" / "finetune.py"))
    values = {"data.kind": "tar", "data.path": path, "data.threads": 0, "finetune.batch": 2, "finetune.videos": 2}
    for key, value in {**values, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        override(config, key, str(value))
    return config.lock()


def test_batches_of_all_shapes_that_the_model_takes(pipeline, path, tmp_path, capsys):
    source, empty = open_source(make_config(path, data__dtype="bfloat16"), pipeline, tmp_path, 0, 1)
    shapes = {source.next().latents.shape for _ in range(source.steps)}
    assert shapes == {(2, 3, 4, 6, 4), (2, 1, 6, 4, 4)}
    told = capsys.readouterr().out
    assert "4 of 1x48x32, 4 of 9x32x48; all of them take 4 steps" in told
    assert "note: 4 samples of other shapes are left out" in told and "9x40x32 which the DiT's patches" in told
    batch = source.next()
    assert empty.text.shape == (1, *batch.text.shape[1:]) and empty.count.shape == (1, batch.count.shape[1])
    assert empty.text.dtype == batch.text.dtype == ml_dtypes.bfloat16
    assert batch.text.shape[1] == 513  # this kind doesn't tell the lengths beforehand


def test_the_empty_prompt_is_the_encoders(pipeline, path, tmp_path):
    config = make_config(path, data__text_rows=24)
    source, empty = open_source(config, pipeline, tmp_path, 0, 1)
    text, count = generation.text_context(pipeline, [""])
    assert empty.text.shape[1] == source.next().text.shape[1] == 25
    length = int(np.asarray(count)[0, :-1].sum())
    np.testing.assert_array_equal(empty.text[:, :length], np.asarray(text)[:, :length])
    assert not empty.text[:, length:].any()
    assert empty.count[0].tolist() == [1] * length + [0] * (24 - length) + [512 - length]


@pytest.mark.parametrize("kind, rows", [("parquet", 9), ("tfds", 9), ("csv", 513)])
def test_text_has_room_for_the_longest_prompt_that_is_known(kind, rows, pipeline, tmp_path):
    latent_sets.write_set(kind, tmp_path / "set", PAIRS[:4])
    source, empty = open_source(make_config(tmp_path / "set", data__kind=kind), pipeline, tmp_path, 0, 1)
    assert source.next().text.shape[1] == empty.text.shape[1] == rows  # 5 tokens, rounded up to 8, and the padding


def test_shapes_can_be_chosen(pipeline, path, tmp_path):
    source, _ = open_source(make_config(path, data__buckets="9x32x48"), pipeline, tmp_path, 0, 1)
    assert {source.next().latents.shape for _ in range(6)} == {(2, 3, 4, 6, 4)}
    library = module.TarLibrary(path, pipeline.vae)
    for wanted in ("9x32x64", "9x40x32"):
        with pytest.raises(UserError, match=f"no samples of the shape {wanted} .*its shapes: 1x48x32 .4., 9x32x48 .4."):
            find_buckets(library, pipeline, (wanted,))


def test_a_set_that_does_not_fit_the_model_at_all_is_told(pipeline, tmp_path):
    latent_sets.write_tar(tmp_path / "a.tar", PAIRS[2:3])
    (tmp_path / "b.tar").write_bytes(b"junk" * 300)
    with pytest.raises(UserError, match="no sample that this model can train on") as error:
        open_source(make_config(tmp_path), pipeline, tmp_path, 0, 1)
    assert "9x40x32" in str(error.value) and "b.tar: not a whole uncompressed tar" in str(error.value)


def test_the_scale_setting_reaches_the_reader(pipeline, path, tmp_path):
    scaled = dataclasses.replace(pipeline, vae=dataclasses.replace(pipeline.vae, latents_std=(2.0,) * 4))
    batches = []
    for scale in ("auto", "normalised", "raw"):
        source, _ = open_source(make_config(path, data__scale=scale), scaled, tmp_path, 0, 1)
        batches.append(source.next().latents)
    np.testing.assert_array_equal(batches[0], batches[1])
    np.testing.assert_array_equal(batches[0], 2 * batches[2])  # a power of two: exact


def test_rendered_shapes_come_through_the_same_door(pipeline, tmp_path, monkeypatch):
    asked = []

    def small(pipeline, count, frames, size, seed, cache):
        asked.append((count, frames, size, seed, cache))
        made = Pairs(*(np.zeros(shape, np.float32) for shape in ((2, 3, 4, 4, 4), (2, 9, 8), (2, 9))))
        return made, Pairs(*(x[:1] + 1 for x in made))

    monkeypatch.setattr(module, "rendered_pairs", small)
    source, empty = open_source(make_config("", data__kind="shapes"), pipeline, tmp_path, 0, 1)
    assert asked == [(2, 33, 128, 0, tmp_path / "latents.safetensors")]
    batch = source.next()
    assert batch.latents.shape == (2, 3, 4, 4, 4) and batch.text.shape[1:] == empty.text.shape[1:]
    assert sorted(batch.keys) == ["scene 0", "scene 1"] and (empty.text == 1).all() and (empty.count == 1).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__kind": "zip"}, "data.kind='zip' is unknown; choose one of shapes, tfds, parquet, tar, csv"),
        ({"data__dtype": "int8"}, "data.dtype='int8' is unknown; choose one of float32, bfloat16"),
        ({"data__scale": "big"}, "data.scale='big' is unknown; choose one of auto, normalised, raw"),
        ({"data__text_rows": -1}, "data.text_rows=-1 must be at least 0"),
        ({"data__threads": -1}, "data.threads=-1 must be at least 0"),
        ({"data__path": ""}, "no data given: set --config.data.path to a folder of the kind tar"),
        ({"data__path": "gs://bucket/x"}, "data.path=gs://bucket/x is an address; mount it or copy it"),
        ({"data__path": "/nowhere"}, "there is no folder /nowhere"),
        ({"data__kind": "shapes", "finetune__videos": 0}, "no training data"),
        ({"data__kind": "shapes", "model__width": 64}, "moving shapes are square"),
        ({"finetune__batch": 3}, "a batch of 3 can't be divided over 2 processes"),
    ],
)
def test_what_is_not_there_is_told(pipeline, path, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        open_source(make_config(path, **changes), pipeline, tmp_path, 0, 2)


def test_processes_that_see_other_data_are_told_on_all_of_them(monkeypatch):
    from jax.experimental import multihost_utils

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for others, differs in (((0, 0, 0), None), ((0, 0, 1), 2), ((0, 7, 7), 1)):
        monkeypatch.setattr(
            multihost_utils, "process_allgather", lambda x, o=others: np.stack([x + np.uint8(n) for n in o])
        )
        if differs is None:
            module._same_everywhere("00ff")
        else:
            with pytest.raises(UserError, match=f"process {differs} sees other data than process 0"):
                module._same_everywhere("00ff")
