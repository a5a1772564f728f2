"""Stage 1: trains the feature maps of every block at every rate at once, on the teacher's own activations.

The teacher samples a video for each training prompt; at every denoising step all blocks take one optimiser step for all
rates on what the teacher just computed. Blocks are independent, so they are one `vmap`, optimiser included.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_dit import generation, pictures, surgery
from hybrid_dit.atomic import write_text
from hybrid_dit.checkpoint import Checkpoints
from hybrid_dit.convert.pipeline import Pipeline, load_pipeline
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.errors import UserError
from hybrid_dit.interruption import Interruption
from hybrid_dit.models.wan import WanConfig, WanDiT, captured_attention
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.progress import Progress
from hybrid_dit.sampling import Sampler, make_sampler
from hybrid_dit.sharding import data_mesh, replicated, stacked_sharding, to_host
from hybrid_dit.surgery_io import MAPS_FILE, save_maps, specs_from_config
from hybrid_dit.workdir import Stage

State = dict[str, Any]  # {"maps": {label: [B, ...]}, "opt": likewise}


def run(config, workdir: Path) -> None:
    """Writes `maps.safetensors`, `undistilled.safetensors`, `errors.csv`, `errors.png`, `loss.csv` and `loss.png`."""
    cfg = config.distill
    if cfg.loss not in surgery.LOSSES:
        raise UserError(f"distill.loss={cfg.loss!r} is unknown; choose one of {', '.join(surgery.LOSSES)}")
    specs = specs_from_config(cfg)
    prompts, held_out = read_prompts(config.prompts.train), read_prompts(config.prompts.held_out)
    pipeline = load_pipeline(config.model.weights)
    shape = generation.latent_shape(
        pipeline.wan, pipeline.vae, config.model.frames, config.model.height, config.model.width
    )
    stage = Stage(workdir, "distill", config)
    if stage.done:
        print(f"distill: complete in {stage.folder}")
        return

    distiller = Distiller(
        wan=pipeline.wan,
        specs=specs,
        sampler=make_sampler("euler_ancestral", num_steps=cfg.sample_steps, shift=pipeline.shift),
        guidance=cfg.guidance,
        loss=cfg.loss,
        learning_rate=cfg.learning_rate,
        dtype=config.model.compute_dtype,
    )
    rounds = max(cfg.prompts // cfg.batch, 1)
    chosen = [prompts[i % len(prompts)] for i in range(rounds * cfg.batch)]
    state, history = _train(config, distiller, pipeline, shape, chosen, stage.folder)
    maps = {"undistilled": distiller.init(jax.random.key(config.seed))["maps"], "distilled": state["maps"]}
    errors = _held_out_errors(config, distiller, pipeline, shape, held_out, maps)
    save_maps(stage.folder / MAPS_FILE, to_host(state["maps"]))
    save_maps(stage.folder / "undistilled.safetensors", jax.device_get(maps["undistilled"]))
    _write_errors(stage.folder, list(specs), errors)
    _write_history(stage.folder, list(specs), history)
    summary = {label: round(float(errors["distilled"][:, r].mean()), 5) for r, label in enumerate(specs)}
    print(f"distill: mean relative L1 error on held-out prompts {summary}")
    stage.finish(mean_error=summary)


@dataclasses.dataclass(frozen=True, eq=False)
class Distiller:
    """The pure functions of stage 1 for one teacher.

    Attributes:
        wan: sizes of the teacher.
        specs: label -> attention to distil to.
        sampler: of the teacher's trajectories (the paper: 50 Euler-ancestral steps).
        guidance: classifier-free guidance scale of the trajectories.
        loss: "value" or "attention".
        learning_rate: of AdamW.
        dtype: of the teacher's activations.
    """

    wan: WanConfig
    specs: Mapping[str, AttentionSpec]
    sampler: Sampler
    guidance: float
    loss: str
    learning_rate: float
    dtype: str

    def init(self, key: jax.Array) -> State:
        """Returns fresh maps and optimiser states, blocks stacked in front of every leaf."""
        keys = jax.random.split(key, len(self.specs))
        maps = {s: surgery.init_maps(k, self.wan, spec) for k, (s, spec) in zip(keys, self.specs.items())}
        return {"maps": maps, "opt": jax.vmap(self._tx.init)(maps)}

    @property
    def _tx(self) -> optax.GradientTransformation:
        return optax.adamw(self.learning_rate)

    def step(self, state: State, dit, x, i, context, key) -> tuple[State, jax.Array, dict[str, jax.Array]]:
        """One denoising step of the teacher and one training step of every block and rate.

        Args:
            state: maps and optimiser.
            dit: the teacher's parameters.
            x: latents [b, t, y, x, c] at noise level i of the sampler's schedule.
            i: step number.
            context: (prompts' context, negative context), see `generation.text_context`.
            key: random key of the trajectory.

        Returns:
            (state, latents at level i + 1, {label: relative L1 error [B] before the update}).
        """
        x, attention = self._denoise(dit, x, i, context, key)

        grid = self.wan.grid(x.shape)

        def train_block(maps, opt, *attention):
            loss = partial(self._block_losses, attention=attention, grid=grid, key=jax.random.fold_in(key, i))
            (_, errors), grads = jax.value_and_grad(loss, has_aux=True)(maps)
            updates, opt = self._tx.update(grads, opt, maps)
            return optax.apply_updates(maps, updates), opt, errors

        maps, opt, errors = jax.vmap(train_block)(state["maps"], state["opt"], *attention)
        return {"maps": maps, "opt": opt}, x, errors

    def measure(self, candidates, dit, x, i, context, key) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
        """Like `step` without training: errors of several trees of maps, {name: {label: [B]}}."""
        x, attention = self._denoise(dit, x, i, context, key)
        grid = self.wan.grid(x.shape)
        losses = jax.vmap(lambda maps, *attention: self._block_losses(maps, attention, grid, key)[1])
        return x, {name: losses(maps, *attention) for name, maps in candidates.items()}

    def _denoise(self, dit, x, i, context, key):
        """Both guidance branches go through the teacher in one batch, and both are training data."""
        b = x.shape[0]
        both = jax.tree.map(lambda c, u: jnp.concatenate([c, jnp.broadcast_to(u, c.shape)]), *context)
        t = jnp.broadcast_to(jnp.asarray(self.sampler.schedule.timesteps)[i], (2 * b,))
        model = WanDiT(self.wan, dtype=jnp.dtype(self.dtype))
        velocity, captured = model.apply(
            {"params": dit}, jnp.concatenate([x, x]), t, *both, mutable=["intermediates"]
        )
        cond, uncond = jnp.split(velocity, 2)
        _, x = self.sampler.step((), x, uncond + self.guidance * (cond - uncond), i, key)
        return x, captured_attention(captured)

    def _block_losses(self, maps, attention, grid, key):
        *qkv, teacher = attention
        return surgery.block_losses(maps, tuple(qkv), teacher, self.specs, grid, self.loss, key)


def _train(config, distiller: Distiller, pipeline: Pipeline, shape, prompts: list[str], folder: Path):
    """Runs all trajectories from the last checkpoint on; returns (state, errors [steps, rates] of every step).

    Ctrl-C and SIGTERM save after the step at hand; the state of a checkpoint includes the trajectory's latents.
    """
    cfg = config.distill
    steps = cfg.sample_steps
    key = jax.random.key(config.seed + 1)
    abstract = jax.eval_shape(distiller.init, key)
    sharding = stacked_sharding(abstract)
    state = jax.jit(distiller.init, out_shardings=sharding)(jax.random.key(config.seed))
    whole = replicated(data_mesh())
    x = jax.device_put(generation.noise_for(key, shape, range(cfg.batch)), whole)
    step = jax.jit(distiller.step, donate_argnums=0, out_shardings=(sharding, whole, whole))
    total = len(prompts) // cfg.batch * steps
    with Checkpoints(folder / "checkpoints") as checkpoints, Interruption() as interruption:
        first, (state, x) = checkpoints.restore((state, x)) or (0, (state, x))
        history = _read_history(folder, first) if first else []
        if first:
            print(f"distill: continues after {first} steps")
        progress = Progress("distill", total, start=first)
        for n in range(first, total):
            trajectory, i = divmod(n, steps)
            if i == 0 or n == first:
                batch = prompts[trajectory * cfg.batch :][: cfg.batch]
                context = _contexts(pipeline, batch, config.model.negative_prompt)
                key_trajectory = jax.random.fold_in(key, trajectory)
            if i == 0:
                x = generation.noise_for(key_trajectory, shape, range(cfg.batch))
            state, x, errors = step(state, pipeline.dit, x, i, context, key_trajectory)
            history.append([float(e.mean()) for e in errors.values()])
            progress.update(n + 1, **{f"error {label}": v for label, v in zip(errors, history[-1])})
            if interruption or i == steps - 1:
                _write_history(folder, list(distiller.specs), history)
                checkpoints.save(n + 1, (state, x))
            if interruption:
                print(f"distill: saving after step {n + 1}", flush=True)
                interruption.stop()
    return state, history


def _held_out_errors(config, distiller: Distiller, pipeline: Pipeline, shape, prompts: list[str], candidates):
    """Returns {name of candidate: relative L1 error [B, rates]}, averaged over held-out trajectories."""
    cfg = config.distill
    sampler = make_sampler("euler_ancestral", num_steps=cfg.held_out_steps, shift=pipeline.shift)
    distiller = dataclasses.replace(distiller, sampler=sampler)
    measure = jax.jit(distiller.measure)
    sums = {name: 0.0 for name in candidates}
    count = max(cfg.held_out_prompts // cfg.batch, 1)
    progress = Progress("held-out errors", count * cfg.held_out_steps)
    for n in range(count):
        batch = [prompts[j % len(prompts)] for j in range(n * cfg.batch, (n + 1) * cfg.batch)]
        key = jax.random.fold_in(jax.random.key(config.seed + 2), n)
        context = _contexts(pipeline, batch, config.model.negative_prompt)
        x = generation.noise_for(key, shape, range(len(batch)))
        for i in range(cfg.held_out_steps):
            x, errors = measure(candidates, pipeline.dit, x, i, context, key)
            for name in candidates:
                sums[name] = sums[name] + np.stack([np.asarray(e) for e in errors[name].values()], axis=1)
            progress.update(n * cfg.held_out_steps + i + 1)
    return {name: value / (count * cfg.held_out_steps) for name, value in sums.items()}


def _contexts(pipeline: Pipeline, prompts: list[str], negative: str):
    context = generation.text_context(pipeline, [*prompts, negative])
    return jax.tree.map(lambda a: a[:-1], context), jax.tree.map(lambda a: a[-1:], context)


def _write_errors(folder: Path, labels: list[str], errors: Mapping[str, np.ndarray]) -> None:
    rows = [
        [block, label, f"{errors['undistilled'][block, r]:.6g}", f"{errors['distilled'][block, r]:.6g}"]
        for block in range(len(errors["distilled"]))
        for r, label in enumerate(labels)
    ]
    write_text(folder / "errors.csv", _csv(["block", "rate", "undistilled", "distilled"], rows))
    title = "Relative L1 error of each block's attention after distillation, held-out prompts"
    pictures.error_heatmap(folder / "errors.png", errors["distilled"], labels, title=title)


def _write_history(folder: Path, labels: list[str], history: list[list[float]]) -> None:
    """Writes the curves: relative L1 error, averaged over blocks, of every step."""
    rows = [[step + 1, *(f"{value:.6g}" for value in values)] for step, values in enumerate(history)]
    write_text(folder / "loss.csv", _csv(["step", *labels], rows))
    steps = np.arange(1, len(history) + 1)
    curves = {label: (steps, [row[r] for row in history]) for r, label in enumerate(labels)}
    pictures.loss_curves(folder / "loss.png", curves, log=True, value_label="relative L1 error, mean over blocks")


def _read_history(folder: Path, steps: int) -> list[list[float]]:
    with open(folder / "loss.csv", newline="") as file:
        return [[float(v) for v in row[1:]] for row in list(csv.reader(file))[1 : steps + 1]]


def _csv(header: list[str], rows: list[list]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()
