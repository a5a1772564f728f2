"""Writes the finished hybrid as a whole pipeline folder, and proves that reading it gives the same parameters."""

import dataclasses
from pathlib import Path

import numpy as np

from hybrid_dit.atomic import write_json
from hybrid_dit.convert import tables
from hybrid_dit.convert.pipeline import Pipeline, load_pipeline, load_transformer, save_pipeline
from hybrid_dit.errors import UserError
from hybrid_dit.workdir import Stage, is_done, require

FOLDER = "pipeline"


def run(config, workdir: Path) -> None:
    """Writes `export/pipeline`, a pipeline folder in diffusers' layout in float32, and `export/summary.json`."""
    folder = workdir / "export" / FOLDER
    tuned = require(workdir, "finetune", config)
    if is_done(workdir, "export", config):
        print(f"export: complete in {folder}")
        return
    teacher = load_pipeline(config.model.weights)
    _, attention, params = load_transformer(tuned / "transformer")
    hybrid = dataclasses.replace(teacher, attention=attention, dit=params)
    stage = Stage(workdir, "export", config)
    save_pipeline(folder, hybrid, "float32")
    check_equal(hybrid, load_pipeline(folder), folder)
    write_json(stage.folder / "summary.json", summary(hybrid, folder))
    print(f"export: {folder}, read back and found bit-equal")
    stage.finish()


def check_equal(written: Pipeline, read: Pipeline, folder: Path) -> None:
    """Raises UserError unless `read` has bit for bit what was `written` to `folder`."""
    if read.attention != written.attention:
        raise UserError(f"{folder}: attention reads back as {read.attention}, written was {written.attention}")
    for part in ("dit", "vae_params", "text_params"):
        there, here = tables.flatten(getattr(read, part)), tables.flatten(getattr(written, part))
        if there.keys() != here.keys():
            raise UserError(f"{folder}: {part} reads back with other names: {sorted(there.keys() ^ here.keys())[:5]}")
        for name, array in here.items():
            same = there[name].shape == array.shape and there[name].dtype == array.dtype
            # Compared as bytes: as numbers, -0 equals 0 and nothing equals NaN.
            if not same or there[name].tobytes() != np.asarray(array).tobytes():
                raise UserError(f"{folder}: {part}/{name} reads back with other values than written; is the disk full?")


def summary(pipeline: Pipeline, folder: Path) -> dict:
    """Returns what an export is: attention of every block, parameters, files, and how to read it."""

    def count(params) -> int:
        return sum(x.size for x in tables.flatten(params).values())

    blocks = [spec.label for spec in pipeline.attention] or ["softmax"] * pipeline.wan.num_layers
    return {
        "blocks": blocks,
        "parameters": {
            "transformer": count(pipeline.dit),
            "of them feature maps": count(pipeline.dit.get("feature_maps", {})),
            "vae": count(pipeline.vae_params),
            "text_encoder": count(pipeline.text_params),
        },
        "dtype": "float32",
        "checked": "read back, all parameters bit-equal",
        "files": {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()},
        "read": "hybrid_dit.convert.pipeline.load_pipeline(FOLDER), or --config.model.weights=FOLDER",
    }
