"""A workdir whose first three stages are complete, made without training, for tests of the jobs that come after."""

from pathlib import Path

import jax
import numpy as np
from pipelines import FRAMES, SIZE, random_pipeline

from hybrid_dit import surgery
from hybrid_dit.command_line import load, override
from hybrid_dit.convert.pipeline import load_pipeline, save_transformer
from hybrid_dit.surgery_io import CHOICE_FILE, MAPS_FILE, save_choice, save_maps, specs_from_config
from hybrid_dit.workdir import Stage

CONFIGS = Path(__file__).parents[2] / "configs"
PROMPTS = [
    "a small red circle moving left on a gray background",
    "a large blue square moving up and a small red circle moving down on a black background",
    "a small cyan triangle moving right on a white background",
]
CHOICE = ["R2", "softmax"]


def tiny_config(job: str, root: Path, **values):
    """The job's config with a random pipeline (written to root/pipeline if it isn't there) and three prompts.

    Args:
        job: name of a file in configs/.
        root: a temporary folder.
        **values: overrides; "evaluate__batch" is evaluate.batch.
    """
    if not (root / "pipeline").is_dir():
        random_pipeline(root / "pipeline")
        (root / "prompts.txt").write_text("\n".join(PROMPTS))
    config = load(str(CONFIGS / f"{job}.py"))
    prompts = str(root / "prompts.txt")
    small = {
        "model.weights": str(root / "pipeline"),
        "model.frames": FRAMES,
        "model.height": SIZE,
        "model.width": SIZE,
        "prompts.train": prompts,
        "prompts.held_out": prompts,
        "distill.rates": "R2,linear",
        "select.rates": "R2,linear",
        "select.budget": "1R2",
        "evaluate.prompts": len(PROMPTS),
        "evaluate.sample_steps": 2,
        "evaluate.batch": 2,
        "sample.prompts": prompts,
        "sample.sample_steps": 2,
        "sample.batch": 2,
    }
    for key, value in {**small, **{k.replace("__", "."): v for k, v in values.items()}}.items():
        override(config, key, str(value))
    return config.lock()


def finish_stages(config, workdir: Path) -> None:
    """Writes the stages distill, select and finetune as complete, with random feature maps."""
    pipeline = load_pipeline(config.model.weights)
    specs = specs_from_config(config.distill)
    stage = Stage(workdir, "distill", config)
    maps = {}
    for seed, name in enumerate(("undistilled.safetensors", MAPS_FILE)):
        keys = jax.random.split(jax.random.key(seed), len(specs))
        maps[name] = {s: surgery.init_maps(k, pipeline.wan, spec) for k, (s, spec) in zip(keys, specs.items())}
        save_maps(stage.folder / name, maps[name])
    stage.finish()
    stage = Stage(workdir, "select", config)
    numbers = {"cost": 1, "softmax_cost": 2, "predicted_error": 0.1, "attention_flops_saved": 0.5}
    save_choice(stage.folder / CHOICE_FILE, CHOICE, budget=config.select.budget, **numbers)
    stage.finish()
    stage = Stage(workdir, "finetune", config)
    attention, params = surgery.assemble(pipeline.dit, maps[MAPS_FILE], CHOICE, specs)
    tuned = jax.tree.map(lambda x: np.asarray(x, np.float32) * np.float32(1.01), params)
    save_transformer(stage.folder / "transformer", pipeline.wan, attention, tuned)
    stage.finish()
