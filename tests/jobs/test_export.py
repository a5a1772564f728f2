import dataclasses
import json

import jax
import numpy as np
import pytest
from workdirs import CHOICE, finish_stages, tiny_config

from hybrid_dit.convert import tables
from hybrid_dit.convert.pipeline import load_pipeline, load_transformer
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import export


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    config = tiny_config("export", root)
    finish_stages(config, root / "run")
    export.run(config, root / "run")
    return root


def test_exported_pipeline_is_the_finetuned_hybrid_bit_for_bit(root):
    _, attention, params = load_transformer(root / "run" / "finetune" / "transformer")
    teacher, found = load_pipeline(root / "pipeline"), load_pipeline(root / "run" / "export" / "pipeline")
    assert [spec.label for spec in found.attention] == CHOICE
    assert found.attention == attention
    for expected, there in (
        (params, found.dit),
        (teacher.vae_params, found.vae_params),
        (teacher.text_params, found.text_params),
    ):
        jax.tree.map(np.testing.assert_array_equal, expected, there)
    assert np.abs(found.dit["feature_maps"]["q"]["w0"][0]).max() > 0
    assert found.shift == teacher.shift
    assert not np.array_equal(found.dit["head"]["kernel"], teacher.dit["head"]["kernel"])  # fine-tuned, not the teacher


def test_summary_says_what_it_is(root):
    value = json.loads((root / "run" / "export" / "summary.json").read_text())
    assert value["blocks"] == CHOICE
    found = load_pipeline(root / "run" / "export" / "pipeline")
    assert value["parameters"]["transformer"] == sum(x.size for x in jax.tree.leaves(found.dit))
    folder = root / "run" / "export" / "pipeline"
    assert {folder / name for name in value["files"]} == {f for f in folder.rglob("*") if f.is_file()}


def test_running_again_does_nothing(root, capsys):
    file = root / "run" / "export" / "pipeline" / "model_index.json"
    before = file.stat().st_mtime_ns
    export.run(tiny_config("export", root), root / "run")
    assert "complete" in capsys.readouterr().out and file.stat().st_mtime_ns == before


def test_a_single_other_bit_is_found(root):
    folder = root / "run" / "export" / "pipeline"
    pipeline = load_pipeline(folder)
    flat = {name: array.copy() for name, array in tables.flatten(pipeline.dit).items()}
    flat["head/bias"][0] = 0.0
    zero = dataclasses.replace(pipeline, dit=tables.unflatten(flat))
    export.check_equal(zero, zero, folder)
    flat = {name: array.copy() for name, array in flat.items()}
    flat["head/bias"][0] = -0.0  # equal as a number
    other = dataclasses.replace(pipeline, dit=tables.unflatten(flat))
    with pytest.raises(UserError, match="dit/head/bias"):
        export.check_equal(zero, other, folder)
    with pytest.raises(UserError, match="attention"):
        export.check_equal(zero, dataclasses.replace(zero, attention=()), folder)


def test_needs_the_finetuned_hybrid(root, tmp_path):
    with pytest.raises(UserError, match="configs/finetune.py"):
        export.run(tiny_config("export", root), tmp_path)
    assert not list(tmp_path.iterdir())
