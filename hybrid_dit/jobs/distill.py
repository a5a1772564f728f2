"""Stage 1: trains the feature maps of every block at every rate at once, on the teacher's own activations.

The teacher samples a video for each training prompt; at every denoising step all blocks take one optimiser step for all
rates on what the teacher just computed (`hybrid_dit.distiller`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from hybrid_dit import generation, processes, sharding, surgery
from hybrid_dit.checkpoint import Checkpoints
from hybrid_dit.convert.pipeline import load_pipeline
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.distill_report import Curves, write_errors
from hybrid_dit.distiller import ACTIVATIONS, BRANCHES, Distiller, State, from_config, jit_step
from hybrid_dit.errors import UserError
from hybrid_dit.interruption import Interruption
from hybrid_dit.ops.nested import fallback_note
from hybrid_dit.progress import Progress
from hybrid_dit.sampling import make_sampler
from hybrid_dit.surgery_io import MAPS_FILE, save_maps, specs_from_config
from hybrid_dit.text_cache import TextCache
from hybrid_dit.workdir import Stage


def run(config, workdir: Path) -> None:
    """Writes `maps.safetensors`, `undistilled.safetensors`, held-out errors and training curves (`distill_report`)."""
    cfg = config.distill
    for name, allowed in (("loss", surgery.LOSSES), ("activations", ACTIVATIONS), ("branches", BRANCHES)):
        if cfg[name] not in allowed:
            raise UserError(f"distill.{name}={cfg[name]!r} is unknown; choose one of {', '.join(allowed)}")
    specs = specs_from_config(cfg)
    mesh = sharding.distill_mesh(config.mesh.data, config.mesh.seq)
    prompts, held_out = read_prompts(config.prompts.train), read_prompts(config.prompts.held_out)
    pipeline = load_pipeline(config.model.weights)
    shape = generation.latent_shape(
        pipeline.wan, pipeline.vae, config.model.frames, config.model.height, config.model.width
    )
    stage = Stage(workdir, "distill", config)
    if stage.done:
        print(f"distill: complete in {stage.folder}")
        return

    rounds = max(cfg.prompts // cfg.batch, 1)
    chosen = [prompts[i % len(prompts)] for i in range(rounds * cfg.batch)]
    held_out = _untrained(held_out, chosen)
    embeddings = Path(cfg.embeddings) if cfg.embeddings else stage.folder / "text"
    text = TextCache(embeddings, pipeline, [config.model.negative_prompt, *chosen, *held_out])

    distiller = from_config(config, pipeline.wan, pipeline.shift, mesh)
    kept = distiller.kept_bytes(shape, cfg.batch)
    print(f"distill: activations {cfg.activations}, {kept / 2**20:.4g} MiB of block inputs kept on each device")
    if note := fallback_note(specs, pipeline.wan.grid(shape)):
        print(note)
    dit = sharding.put(pipeline.dit, distiller.dit_shardings(pipeline.dit))
    maps = {"distilled": _train(config, distiller, dit, text, shape, chosen, stage.folder)}
    maps["undistilled"] = _init(distiller, config.seed)["maps"]
    errors, timesteps = _held_out_errors(config, distiller, dit, text, shape, held_out, maps, pipeline.shift)
    maps = {name: sharding.to_host(tree) for name, tree in maps.items()}
    processes.on_main(_write, stage.folder, list(specs), errors, timesteps, maps)
    summary = {label: round(float(errors["distilled"][..., r].mean()), 5) for r, label in enumerate(specs)}
    print(f"distill: mean relative L1 error on held-out prompts {summary}")
    stage.finish(mean_error=summary)


def _write(folder: Path, labels: list[str], errors, timesteps, maps) -> None:
    write_errors(folder, labels, errors, timesteps)
    for name, file in (("distilled", MAPS_FILE), ("undistilled", "undistilled.safetensors")):
        save_maps(folder / file, maps[name])


def _untrained(held_out: Sequence[str], trained: Sequence[str]) -> list[str]:
    """Held-out prompts without those that are trained on; all of them, with a note, if none would be left."""
    rest = [prompt for prompt in held_out if prompt not in set(trained)]
    if not rest:
        print("note: every held-out prompt is a training prompt too; errors are those of prompts trained on")
    return rest or list(held_out)


def _init(distiller: Distiller, seed: int) -> State:
    """Fresh state, not padded, spread over the devices."""
    key = jax.random.key(seed)
    places = distiller.spread_shardings(jax.eval_shape(distiller.init, key))
    return jax.jit(distiller.init, out_shardings=places)(key)


def _train(config, distiller: Distiller, dit, text: TextCache, shape, prompts: list[str], folder: Path):
    """Runs all trajectories from the last checkpoint on; returns the maps, not padded. Writes the curves.

    Ctrl-C and SIGTERM save after the step at hand. A checkpoint holds the state without padding, whatever the mesh, and
    the trajectory's latents; step n depends on them, the seed and n alone.
    """
    cfg = config.distill
    steps, total = cfg.sample_steps, len(prompts) // cfg.batch * cfg.sample_steps
    key = jax.random.key(config.seed + 1)
    whole = sharding.replicated(distiller.mesh)
    padded = distiller.abstract_state()
    load = jax.jit(distiller.pad, out_shardings=distiller.state_shardings(padded))
    store = jax.jit(distiller.unpad, out_shardings=distiller.spread_shardings(padded))
    step = jit_step(distiller)
    negative = text.context([config.model.negative_prompt])
    with Checkpoints(folder / "checkpoints") as checkpoints, Interruption() as interruption:
        state = _init(distiller, config.seed)
        x = jax.device_put(generation.noise_for(key, shape, range(cfg.batch)), whole)
        first, (state, x) = checkpoints.restore((state, x)) or (0, (state, x))
        state = load(state)
        curves = Curves.load(folder, first) if first else Curves(list(distiller.specs))
        if first:
            print(f"distill: continues after {first} steps")
        progress = Progress("distill", total, start=first)
        for n in range(first, total):
            trajectory, i = divmod(n, steps)
            if i == 0 or n == first:
                context = text.context(prompts[trajectory * cfg.batch :][: cfg.batch]), negative
                key_trajectory = jax.random.fold_in(key, trajectory)
            if i == 0:
                x = jax.device_put(generation.noise_for(key_trajectory, shape, range(cfg.batch)), whole)
            state, x, metrics = step(state, dit, x, i, context, key_trajectory)
            errors = curves.add(jax.device_get(metrics))
            progress.update(n + 1, **{f"error {label}": value for label, value in errors.items()})
            stop = interruption.due()
            if stop or i == steps - 1:
                processes.on_main(curves.save, folder)  # first: a checkpoint without them could not be continued
                checkpoints.save(n + 1, (store(state), x))
            if stop:
                print(f"distill: saving after step {n + 1}", flush=True)
                interruption.stop()
        processes.on_main(curves.report, folder)
        return store(state)["maps"]


def _held_out_errors(
    config, distiller: Distiller, dit, text: TextCache, shape, prompts: list[str], candidates, shift: float
):
    """Relative L1 errors on prompts and timesteps that were not trained on.

    Returns:
        ({name of candidate: float64 [prompts, steps, B, rates], mean of both branches}, timesteps [steps]).
    """
    cfg = config.distill
    trained = set(distiller.sampler.schedule.timesteps.tolist())
    sampler = make_sampler("euler_ancestral", cfg.held_out_steps, shift)
    distiller = dataclasses.replace(distiller, sampler=sampler)
    timesteps = sampler.schedule.timesteps
    new = [i for i, t in enumerate(timesteps.tolist()) if t not in trained] or list(range(len(timesteps)))
    measure = jax.jit(distiller.measure)
    found = {name: [] for name in candidates}
    count = max(cfg.held_out_prompts // cfg.batch, 1)
    progress = Progress("held-out errors", count * cfg.held_out_steps)
    negative = text.context([config.model.negative_prompt])
    for n in range(count):
        batch = [prompts[j % len(prompts)] for j in range(n * cfg.batch, (n + 1) * cfg.batch)]
        key = jax.random.fold_in(jax.random.key(config.seed + 2), n)
        context = text.context(batch), negative
        x = generation.noise_for(key, shape, range(len(batch)))
        for i in range(cfg.held_out_steps):
            x, errors = measure(candidates, dit, x, i, context, key)
            for name, values in jax.device_get(errors).items():
                videos = np.stack([*values.values()], axis=-1).astype(np.float64)  # [B, 2b, rates]
                found[name].append(videos.reshape(len(videos), 2, len(batch), -1).mean(axis=1))
            progress.update(n * cfg.held_out_steps + i + 1)

    def arrange(values):  # a list over trajectories and steps of [B, b, rates] -> [prompts, steps, B, rates]
        stacked = np.stack(values).reshape(count, cfg.held_out_steps, *values[0].shape)
        return np.moveaxis(stacked, 3, 1).reshape(-1, cfg.held_out_steps, *stacked.shape[2:3], stacked.shape[4])[:, new]

    return {name: arrange(values) for name, values in found.items()}, timesteps[new]
