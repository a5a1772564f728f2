"""Stage 3: fine-tunes the whole hybrid, feature maps included, with flow matching.

The step itself is in `hybrid_dit.trainer`; here are data, the loop with its checkpoints, and what is written.
"""

import math
import time
from pathlib import Path

from hybrid_dit import pictures, sharding, surgery
from hybrid_dit.array_typing import PyTree
from hybrid_dit.checkpoint import Checkpoints
from hybrid_dit.convert.pipeline import Pipeline, load_pipeline, save_transformer
from hybrid_dit.errors import UserError
from hybrid_dit.interruption import Interruption
from hybrid_dit.loss_log import LossLog, read_losses, running_mean
from hybrid_dit.pairs import Pairs, batch_at, rendered_pairs
from hybrid_dit.progress import Progress, duration
from hybrid_dit.surgery_io import CHOICE_FILE, MAPS_FILE, load_choice, load_maps, specs_from_config
from hybrid_dit.trainer import Trainer
from hybrid_dit.workdir import Stage, require

AVERAGED = 20  # steps that the printed loss is a mean of


def run(config, workdir: Path) -> None:
    """Writes `transformer/` (the fine-tuned hybrid), `loss.csv`, `loss.png` and `checkpoints/`.

    Raises:
        UserError: an earlier stage is missing, there is no data, or training diverges.
    """
    distilled, selected = require(workdir, "distill", config), require(workdir, "select", config)
    stage = Stage(workdir, "finetune", config)
    if stage.done:
        print(f"finetune: complete in {stage.folder}")
        return
    pipeline = load_pipeline(config.model.weights)
    choice = load_choice(selected / CHOICE_FILE)
    specs = specs_from_config(config.distill)
    attention, params = surgery.assemble(pipeline.dit, load_maps(distilled / MAPS_FILE), choice, specs)
    pairs, empty = load_pairs(config, pipeline, stage.folder)
    trainer = Trainer(config, pipeline.wan, attention, pipeline.shift, empty, sharding.data_mesh())
    del pipeline  # the text encoder alone is 23 GB for Wan
    params = train(trainer, params, pairs, stage.folder)

    steps, losses = read_losses(stage.folder / "loss.csv")
    curves = {"each step": (steps, losses), f"mean of {AVERAGED}": (steps, running_mean(losses, AVERAGED))}
    pictures.loss_curves(stage.folder / "loss.png", curves, value_label="flow-matching loss", title="Fine-tuning")
    save_transformer(stage.folder / "transformer", trainer.wan, attention, sharding.to_host(params))
    last = float(running_mean(losses, AVERAGED)[-1])
    print(f"finetune: mean loss of the last {min(AVERAGED, len(losses))} steps {last:.5g}; {stage.folder}/transformer")
    stage.finish(blocks=choice, loss=round(last, 6))


def load_pairs(config, pipeline: Pipeline, folder: Path) -> tuple[Pairs, Pairs]:
    """Returns the training pairs and the empty prompt's text, see `rendered_pairs`.

    Raises:
        UserError: the config asks for data that this version can't provide.
    """
    if not config.finetune.videos:
        raise UserError(
            "no training videos: this version can fine-tune on rendered moving shapes alone; say how many with "
            "--config.finetune.videos=48, together with --config.model.height and .width equal to each other"
        )
    if config.model.height != config.model.width:
        raise UserError(
            f"moving shapes are square, but model.height={config.model.height} and model.width={config.model.width}; "
            "set both to the same number"
        )
    cache = folder / "latents.safetensors"
    return rendered_pairs(
        pipeline, config.finetune.videos, config.model.frames, config.model.height, config.seed, cache
    )


def train(trainer: Trainer, params: PyTree, pairs: Pairs, folder: Path) -> PyTree:
    """Returns the trained parameters: from `params` or the last checkpoint in `folder` to the last step.

    Ctrl-C and SIGTERM save a checkpoint after the step at hand and end the program.

    Raises:
        UserError: loss or gradient is not finite.
    """
    cfg, seed = trainer.cfg, trainer.seed
    with Checkpoints(folder / "checkpoints") as checkpoints:
        first, state = checkpoints.restore(trainer.abstract(params)) or (0, trainer.init(params))
        if first:
            print(f"finetune: continues after step {first}")
        if first == cfg.steps:
            return state.params
        began = time.monotonic()
        step = trainer.compile(state, batch_at(pairs, 0, cfg.batch, seed))
        print(f"finetune: train step compiled in {duration(time.monotonic() - began)}", flush=True)
        progress = Progress("finetune", cfg.steps, start=first)
        with LossLog(folder / "loss.csv", first, AVERAGED) as log, Interruption() as interruption:
            for n in range(first + 1, cfg.steps + 1):
                state, metrics = step(state, batch_at(pairs, n - 1, cfg.batch, seed))
                loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    raise UserError(
                        f"fine-tuning diverged at step {n}: loss {loss}, gradient norm {grad_norm}. Delete {folder} "
                        f"and start again with a lower --config.finetune.learning_rate (now {cfg.learning_rate})"
                    )
                log.add(n, loss, grad_norm)
                progress.update(n, loss=log.mean)
                stop = interruption.due()
                if stop or n % cfg.save_every == 0 or n == cfg.steps:
                    checkpoints.save(n, state)
                if stop:
                    print(f"finetune: saving after step {n}", flush=True)
                    interruption.stop()
    return state.params
