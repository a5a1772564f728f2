"""Stage 3: fine-tunes the whole hybrid, feature maps included, with flow matching.

The step itself is in `hybrid_dit.trainer`; here are data, the loop with its checkpoints, and what is written.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from hybrid_dit import pictures, processes, sharding, surgery
from hybrid_dit.agreement import gathered
from hybrid_dit.array_typing import PyTree
from hybrid_dit.checkpoint import Checkpoints
from hybrid_dit.convert.pipeline import load_pipeline, save_transformer
from hybrid_dit.data.open_source import open_source
from hybrid_dit.data.source import Source
from hybrid_dit.errors import UserError
from hybrid_dit.interruption import Interruption
from hybrid_dit.loss_log import read_losses, running_mean
from hybrid_dit.optim import Optimiser
from hybrid_dit.surgery_io import CHOICE_FILE, MAPS_FILE, load_choice, load_maps, specs_from_config
from hybrid_dit.train_metrics import AVERAGED, METRICS_FILE, Monitor, step_flops
from hybrid_dit.train_samples import SampleVideos
from hybrid_dit.trainer import State, Trainer, check
from hybrid_dit.workdir import Stage, is_done, require

PROFILE_AFTER = 3  # steps of this run, which are not typical


def run(config, workdir: Path) -> None:
    """Writes `transformer/` (the fine-tuned hybrid), `metrics.jsonl`, `tensorboard/`, `loss.png` and `checkpoints/`.

    Raises:
        UserError: an earlier stage is missing, a setting is out of range, there is no data, or training diverges.
    """
    _check_settings(config.finetune)
    distilled, selected = require(workdir, "distill", config), require(workdir, "select", config)
    folder = workdir / "finetune"
    if is_done(workdir, "finetune", config):
        print(f"finetune: complete in {folder}")
        return
    pipeline = load_pipeline(config.model.weights)
    choice = load_choice(selected / CHOICE_FILE)
    specs = specs_from_config(config.distill)
    attention, params = surgery.assemble(pipeline.dit, load_maps(distilled / MAPS_FILE), choice, specs)
    Optimiser(config.finetune).split(params)  # whether the learning-rate rules are about these parameters
    mesh = sharding.train_mesh(config.mesh.replicas, config.mesh.seq)
    source, empty = open_source(config, pipeline, folder, *sharding.process_share(mesh))
    trainer = Trainer(config, pipeline.wan, attention, pipeline.shift, empty, mesh)
    trainer.check_batch()
    stage = Stage(workdir, "finetune", config)  # not before: settings that were refused must not be kept
    teacher = trainer.place_teacher(pipeline.dit) if config.finetune.teacher else None
    videos = None
    if config.finetune.sample_every:
        videos = SampleVideos(config, pipeline, attention, stage.folder / "samples")
    del pipeline  # the text encoder alone is 23 GB for Wan
    state = train(trainer, params, source, stage.folder, config.to_dict(), teacher, videos)

    tuned = sharding.to_host(state.ema or state.params)
    last = processes.on_main(_write, stage.folder, trainer, tuned)
    which = f"weights averaged with decay {trainer.cfg.ema:g}" if state.ema else "weights of the last step"
    print(f"finetune: {which} in {stage.folder}/transformer")
    stage.finish(blocks=choice, loss=round(last, 6), weights="ema" if state.ema else "last")


def _check_settings(cfg) -> None:
    """Raises UserError for settings that would fail, or train nothing, much later."""
    for name in ("steps", "batch", "save_every", "keep"):
        if cfg[name] < 1:
            raise UserError(f"finetune.{name}={cfg[name]} must be at least 1")
    if not 0 < cfg.learning_rate < math.inf:
        raise UserError(f"finetune.learning_rate={cfg.learning_rate} must be more than 0")
    for name in ("warmup", "weight_decay", "clip", "shift", "teacher", "sample_every", "profile"):
        if cfg[name] < 0:
            raise UserError(f"finetune.{name}={cfg[name]} must be at least 0")
    if not 0 <= cfg.drop_text <= 1 or not 0 <= cfg.ema < 1:
        raise UserError(f"finetune.drop_text={cfg.drop_text} and finetune.ema={cfg.ema} are shares: 0 to 1 (ema below)")
    check(cfg)


def _write(folder: Path, trainer: Trainer, params: PyTree) -> float:
    """Writes the result and the picture of the losses; returns the mean of the last ones."""
    steps, losses = read_losses(folder / METRICS_FILE)
    curves = {"each step": (steps, losses), f"mean of {AVERAGED}": (steps, running_mean(losses, AVERAGED))}
    pictures.loss_curves(folder / "loss.png", curves, value_label="flow-matching loss", title="Fine-tuning")
    save_transformer(folder / "transformer", trainer.wan, trainer.attention, params)
    last = float(running_mean(losses, AVERAGED)[-1])
    print(f"finetune: mean loss of the last {min(AVERAGED, len(losses))} steps {last:.5g}")
    return last


def train(
    trainer: Trainer,
    params: PyTree,
    source: Source,
    folder: Path,
    settings: dict,
    teacher: PyTree = None,
    videos: Callable[[int, PyTree], None] | None = None,
) -> State:
    """Returns the state after the last step, trained from `params` or from the last checkpoint in `folder`.

    Ctrl-C and SIGTERM, in whichever process, save a checkpoint after the step at hand and end the program.

    Args:
        trainer: with its mesh.
        params: untrained, on the host.
        source: of batches; it is put where the checkpoint says.
        folder: of the stage.
        settings: of the run, kept with every checkpoint.
        teacher: from `trainer.place_teacher`, if the loss has a term for it.
        videos: called every `sample_every` steps with the number of steps and the weights.

    Raises:
        UserError: loss or gradient is not finite, or a checkpoint doesn't fit.
    """
    cfg = trainer.cfg
    with Checkpoints(folder / "checkpoints", cfg.keep, keep_best=True) as checkpoints:
        restored = checkpoints.restore(trainer.abstract(params))
        first, state = restored or (0, trainer.init(params))
        if restored:
            source.restore(_position(checkpoints.extra()["data"]))
            print(f"finetune: continues after step {first}")
        if first == cfg.steps:
            return state
        batch = source.next()
        with ThreadPoolExecutor(1) as pool:
            reserved = pool.submit(checkpoints.reserve, state)
            step = trainer.compile(state, batch, teacher)
            reserved.result()
        part, parts = sharding.process_share(trainer.mesh)
        with (
            Monitor(folder, first, cfg.steps, trainer.mesh.size) as monitor,
            Interruption() as interruption,
            Profile(folder / "profile", first + PROFILE_AFTER, cfg.profile) as profile,
        ):
            for n in range(first + 1, cfg.steps + 1):
                began = time.monotonic()
                profile.before(n)
                state, metrics = step(state, batch)
                position = source.state()
                following = source.next() if n < cfg.steps else None  # while the devices are busy
                metrics = jax.device_get(metrics)
                _check(metrics, n, batch.keys, part, checkpoints, cfg)
                shape = (len(batch.latents) * parts, *batch.latents.shape[1:])
                tokens = shape[0] * math.prod(trainer.wan.grid(shape))
                flops = step_flops(trainer.wan, trainer.attention, shape, batch.text.shape[1], teacher is not None)
                monitor.add(n, metrics, time.monotonic() - began, tokens, flops)
                stop = interruption.due()
                if stop or n % cfg.save_every == 0 or n == cfg.steps:
                    positions = [json.loads(text) for text in gathered(json.dumps(position))]
                    extra = {"data": positions, "config": json.loads(json.dumps(settings))}
                    checkpoints.save(n, state, extra, monitor.mean)
                if stop:
                    print(f"finetune: saving after step {n}", flush=True)
                    interruption.stop()
                if videos and n % cfg.sample_every == 0:
                    videos(n, state.ema or state.params)
                batch = following
    return state


class Profile:
    """A trace of `steps` steps after step `after`, for TensorBoard's profiler or Perfetto. Use it with `with`."""

    def __init__(self, folder: Path, after: int, steps: int):
        self._folder, self._after, self._steps, self._running = folder, after, steps, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"finetune: profile in {self._folder}", flush=True)

    def before(self, step: int) -> None:
        """Starts or ends the trace before this step."""
        if self._steps and step == self._after + 1:
            self._running = True
            jax.profiler.start_trace(self._folder)
        elif step == self._after + self._steps + 1:
            self.__exit__()


def _check(metrics, step: int, keys: Sequence[str], part: int, checkpoints: Checkpoints, cfg) -> None:
    """Raises UserError, the same on all processes, if loss or gradient is not finite.

    Args:
        metrics: of the step, equal on all processes.
        step: its number.
        keys: of this process's samples.
        part: of the batch that they are.
        checkpoints: of the run.
        cfg: section `finetune`.
    """
    loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    told = dict(json.loads(text) for text in gathered(json.dumps([part, keys])))  # processes may have the same part
    everything = [key for part in sorted(told) for key in told[part]]
    wrong = [key for key, value in zip(everything, metrics["sample_loss"]) if not math.isfinite(value)]
    which = f"samples whose loss is not finite, of {len(everything)}" if wrong else "its samples"
    good = processes.on_main(lambda: checkpoints.latest)
    saved = f"the last good checkpoint is {checkpoints.folder / str(good)}" if good else "nothing was saved before"
    raise UserError(
        f"fine-tuning diverged at step {step}: loss {loss}, gradient norm {grad_norm}; {which}: "
        f"{', '.join(wrong or everything)}; {saved}. The same command would come to the same step again: look at those "
        "samples, or start in another --workdir with a lower --config.finetune.learning_rate "
        f"(now {cfg.learning_rate})"
    )


def _position(states: list[dict]) -> dict:
    """Returns the position in the data from those of all processes when the checkpoint was saved.

    They differ in what each process has counted alone: where there are as many as then, everyone takes its own.
    """
    return states[jax.process_index() if len(states) == jax.process_count() else 0]
