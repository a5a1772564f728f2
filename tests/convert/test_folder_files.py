"""Which files of a folder are read: indices, shards, variants, links, and what an index may not say."""

import json
import os

import numpy as np
import pytest

from hybrid_dit.convert.files import Weights, write_safetensors
from hybrid_dit.errors import UserError


def put(path, **values):
    write_safetensors(path, {name: np.float32([value]) for name, value in values.items()}, {})


def index(folder, name="model", **weight_map):
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read(folder):
    weights = Weights(folder)
    return {name: float(weights.read(name)[0]) for name in weights.shapes}


def test_shards_with_and_without_index_are_one(tmp_path):
    put(tmp_path / "model-00001-of-00002.safetensors", a=1, b=2)
    put(tmp_path / "model-00002-of-00002.safetensors", c=3)
    assert read(tmp_path) == {"a": 1, "b": 2, "c": 3}
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index(tmp_path, a=first, b=first, c=second)
    weights = Weights(tmp_path)
    assert read(tmp_path) == {"a": 1, "b": 2, "c": 3} and weights.notes == ()
    assert weights.file_of("c") == tmp_path / second and weights.source == tmp_path
    put(tmp_path / "lora.safetensors", d=4)
    assert read(tmp_path) == {"a": 1, "b": 2, "c": 3}
    assert Weights(tmp_path).notes == ("left out lora.safetensors: not in model.safetensors.index.json",)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    put(tmp_path / "x.safetensors", a=1)
    put(tmp_path / "y.safetensors", a=1)
    with pytest.raises(UserError, match="tensor a is in two files, x.safetensors and y.safetensors"):
        Weights(tmp_path)


def test_plain_files_come_before_variants(tmp_path):
    put(tmp_path / "model.fp16.safetensors", a=2)
    assert read(tmp_path) == {"a": 2} and Weights(tmp_path).notes == ()  # the only ones there
    put(tmp_path / "model-00001-of-00001.safetensors", a=1)
    assert read(tmp_path) == {"a": 1}
    assert Weights(tmp_path).notes == ("left out model.fp16.safetensors: a variant of one that was read",)
    index(tmp_path, "model.fp16", a="model.fp16.safetensors")
    assert read(tmp_path) == {"a": 1}
    index(tmp_path, "model", a="model-00001-of-00001.safetensors")
    assert read(tmp_path) == {"a": 1}
    put(tmp_path / "wan2.1_t2v.safetensors", a=1)  # a point in a name makes no variant
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="tensor a is in two files"):
        Weights(tmp_path)


def test_several_indices_are_no_choice_for_us(tmp_path):
    put(tmp_path / "x.safetensors", a=1)
    index(tmp_path, "x", a="x.safetensors")
    index(tmp_path, "y", a="x.safetensors")
    with pytest.raises(UserError, match=r"several indices: x.*, y.*; leave one"):
        Weights(tmp_path)


def test_disagreements_are_listed_together(tmp_path):
    put(tmp_path / "x.safetensors", a=1, b=2, **{f"n{i}": i for i in range(12)})
    put(tmp_path / "y.safetensors", c=3)
    index(tmp_path, a="x.safetensors", b="y.safetensors", c="y.safetensors", d="x.safetensors")
    with pytest.raises(UserError) as error:
        Weights(tmp_path)
    text = str(error.value)
    assert "missing d (in x.safetensors by the index); " in text
    assert "in another file b (x.safetensors, y.safetensors by the index); " in text
    assert "not in the index n0 (in x.safetensors), " in text and " and 2 more; fetch the folder again" in text


@pytest.mark.parametrize(
    "named",
    ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "", ".x.safetensors", "a\\x.safetensors"]
    + ["C:x.safetensors", "x.safetensors\0", "\ud800.safetensors", "x.pth", 7, None, ["x.safetensors"]],
)
def test_an_index_names_plain_files_only(tmp_path, named):
    put(tmp_path / "x.safetensors", a=1)
    (tmp_path / "in" / "a").mkdir(parents=True)
    put(tmp_path / "in" / "a" / "x.safetensors", a=1)
    index(tmp_path / "in", a=named)
    with pytest.raises(UserError, match="model.safetensors.index.json: tensor a is said to be in .*, expected"):
        Weights(tmp_path / "in")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="has no weight_map"):
        Weights(tmp_path)


def test_links_stay_inside_the_folder(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    put(tmp_path / "outside.safetensors", a=1)
    put(folder / "sub" / "inside.safetensors", a=2)
    index(folder, a="link.safetensors")
    link = folder / "link.safetensors"
    for target in ("../outside.safetensors", tmp_path / "outside.safetensors", "/etc/passwd"):
        link.symlink_to(target)
        with pytest.raises(UserError, match="link.safetensors, which .* names, is a link out of the folder"):
            Weights(folder)
        link.unlink()
    link.symlink_to("sub/inside.safetensors")
    assert read(folder) == {"a": 2}
    link.unlink()
    with pytest.raises(UserError, match="link.safetensors is missing, but model.safetensors.index.json names it"):
        Weights(folder)
    link.symlink_to("link.safetensors")
    with pytest.raises(UserError, match="link.safetensors.* can't be followed"):
        Weights(folder)


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_snapshots_of_hugging_face_are_read(tmp_path, inner):
    repo = tmp_path / "models--Wan-AI--Wan2.1"
    folder = repo / "snapshots" / "0123abcd" / inner
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, name in enumerate("ab"):
        put(repo / "blobs" / f"hash{i}", **{name: i})
        target = os.path.relpath(repo / "blobs" / f"hash{i}", folder)
        (folder / f"x-{i}.safetensors").symlink_to(target)
    assert read(folder) == {"a": 0, "b": 1}
    index(folder, "x", a="x-0.safetensors", b="x-1.safetensors")
    assert read(folder) == {"a": 0, "b": 1}
    assert read(folder / "x-0.safetensors") == {"a": 0}
    other = tmp_path / "models--other" / "blobs"
    other.mkdir(parents=True)
    put(other / "hash", b=1)
    (folder / "x-1.safetensors").unlink()
    (folder / "x-1.safetensors").symlink_to(other / "hash")  # the blobs of another repository
    with pytest.raises(UserError, match="is a link out of the folder"):
        Weights(folder)


def test_a_folder_of_pytorch_files_says_how_to_read_one(tmp_path):
    (tmp_path / "models_t5.pth").write_bytes(b"")
    with pytest.raises(UserError, match="no weights at .*; to read models_t5.pth, give the file itself"):
        Weights(tmp_path)
