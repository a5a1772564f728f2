"""Videos of a few prompts while a model trains, always from the same noise."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from hybrid_dit import generation, pictures, processes
from hybrid_dit.array_typing import PyTree
from hybrid_dit.convert.pipeline import Pipeline
from hybrid_dit.data.prompts import read_prompts
from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.video_io import write_mp4


class SampleVideos:
    """Samples the first held-out prompts, with the sampler of section `sample`."""

    def __init__(self, config, pipeline: Pipeline, attention: tuple[AttentionSpec, ...], folder: Path):
        """Encodes the prompts; text encoder and DiT of the pipeline are not needed afterwards.

        Args:
            config: sections `model`, `prompts`, `finetune` and `sample`, and the seed.
            pipeline: text encoder, VAE, sizes and shift.
            attention: one spec per block.
            folder: gets a folder per step.

        Raises:
            UserError: there are no held-out prompts.
        """
        held_out = config.prompts.held_out
        self.prompts = (read_prompts(held_out) if held_out else [])[: config.finetune.sample_prompts]
        if not self.prompts:
            raise UserError(
                "finetune.sample_every needs prompts: set --config.prompts.held_out to a file of them and "
                "finetune.sample_prompts to at least 1"
            )
        self.attention, self.folder, self.fps = attention, folder, config.sample.fps
        context = generation.text_context(pipeline, [*self.prompts, config.model.negative_prompt])
        context = jax.tree.map(np.asarray, context)
        self._context, self._negative = ([x[i] for x in context] for i in (slice(-1), slice(-1, None)))
        model, cfg = config.model, config.sample
        shape = generation.latent_shape(pipeline.wan, pipeline.vae, model.frames, model.height, model.width)
        key, which = generation.noise_key(config.seed), range(len(self.prompts))
        self._noise = np.asarray(generation.noise_for(key, shape, which))
        numerics = model.compute_dtype, model.attention_backend
        small = dataclasses.replace(pipeline, dit={}, text_params={})
        how = {"interval": tuple(cfg.interval), "sequential": cfg.sequential, "vae_dtype": cfg.vae_dtype}
        self._generator = generation.Generator(small, cfg.sampler, cfg.sample_steps, cfg.guidance, *numerics, **how)

    def __call__(self, step: int, params: PyTree) -> None:
        """Writes `step-NNNNNN/PROMPT.mp4` and `sheet.png`. All processes must call it; the first one writes.

        Args:
            step: number of finished steps.
            params: of the DiT, on the mesh.
        """
        folder = self.folder / f"step-{step:06d}"
        context, negative = tuple(self._context), tuple(self._negative)
        key = jax.random.key(0)
        latents, _ = self._generator.denoise(self.attention, params, self._noise, context, negative, key=key)
        latents = multihost_utils.process_allgather(latents, tiled=True)
        if not processes.is_main():
            return
        videos = dict(zip(self.prompts, self._generator.decode(latents)[0]))
        pictures.contact_sheet(folder / "sheet.png", videos, title=f"step {step}", fps=self.fps)
        for prompt, video in videos.items():
            write_mp4(folder / f"{generation.file_stem(prompt, 0)}.mp4", video, self.fps)
