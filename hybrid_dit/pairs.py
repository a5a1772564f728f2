"""Pairs of videos and prompts as the DiT trains on them: latents and packed text embeddings, in host memory.

Rendered moving shapes come so. Other data is read while training goes on, see `hybrid_dit.data.open_source`.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from hybrid_dit import generation
from hybrid_dit.array_typing import Array, Float
from hybrid_dit.convert.files import Weights, write_safetensors
from hybrid_dit.convert.pipeline import Pipeline
from hybrid_dit.data import shapes
from hybrid_dit.models.vae import WanVAE, encode_chunked
from hybrid_dit.progress import Progress

TWO_THINGS = 0.5  # share of rendered scenes with two things
ENCODE_BATCH, ENCODE_CHUNK = 4, 2  # videos and latent frames encoded at once; the fastest of those tried on CPU


class Pairs(NamedTuple):
    """n pairs, or a batch of them; the text is what `hybrid_dit.models.wan.pack_text` returns."""

    latents: Float[Array, "n t y x c"] | Float[np.ndarray, "n t y x c"]  # normalised
    text: Float[Array, "n l e"] | Float[np.ndarray, "n l e"]
    count: Float[Array, "n l"] | Float[np.ndarray, "n l"]


def order_at(n: int, step: int, batch: int, seed: int) -> np.ndarray:
    """Returns which of `n` pairs a training step takes; it depends on nothing but the arguments.

    All pairs are seen once, in random order, before any is seen again.
    """
    position = np.arange(step * batch, (step + 1) * batch)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(n) for epoch in set((position // n).tolist())}
    return np.array([orders[epoch][i] for epoch, i in zip((position // n).tolist(), position % n)])


def batch_at(pairs: Pairs, step: int, batch: int, seed: int) -> Pairs:
    """Returns the batch of a training step, see `order_at`."""
    index = order_at(len(pairs.latents), step, batch, seed)
    return Pairs(*(x[index] for x in pairs))


def rendered_pairs(
    pipeline: Pipeline, count: int, frames: int, size: int, seed: int, cache: Path
) -> tuple[Pairs, Pairs]:
    """Renders and encodes scenes of the training split.

    Args:
        pipeline: encodes videos and prompts.
        count: number of pairs.
        frames: of a video.
        size: height and width.
        seed: decides scenes and places.
        cache: file that keeps the latents, which take long; read if it is there and has as many. Model, size and seed
            are those of its workdir.

    Returns:
        The pairs, and one whose text is the empty prompt's (and whose latents are the first pair's).
    """
    rng = np.random.default_rng(seed)
    scenes = [shapes.sample_scene(rng, "train", TWO_THINGS) for _ in range(count)]
    latents = Weights(cache).read("latents") if cache.is_file() else ()
    if len(latents) != count:  # also those of a run with another count that was refused after they were made
        latents = _encode(pipeline, shapes.place_batch(scenes, rng, frames, size), frames, size)
        write_safetensors(cache, {"latents": latents}, {})
    text, rows = (np.asarray(x) for x in generation.text_context(pipeline, [*(s.prompt for s in scenes), ""]))
    return Pairs(latents, text[:-1], rows[:-1]), Pairs(latents[:1], text[-1:], rows[-1:])


def _encode(pipeline: Pipeline, placements: shapes.Placement, frames: int, size: int) -> np.ndarray:
    vae = WanVAE(pipeline.vae)

    @jax.jit
    def encode(params, placements):
        video = shapes.render_batch(placements, frames=frames, size=size)
        return pipeline.vae.normalize(encode_chunked(vae, params, video, ENCODE_CHUNK)[0])

    count = len(placements.present)
    progress = Progress("finetune: encode", count, "video")
    parts = []
    for start in range(0, count, ENCODE_BATCH):
        index = np.minimum(np.arange(start, start + ENCODE_BATCH), count - 1)  # the last batch is filled up
        parts.append(np.asarray(encode(pipeline.vae_params, jax.tree.map(lambda a, i=index: a[i], placements))))
        progress.update(min(start + ENCODE_BATCH, count))
    return np.concatenate(parts)[:count]
