"""A whole random pipeline of a few kilobytes, for tests of jobs: nothing is trained, everything has the real layout."""

import math
from pathlib import Path

import numpy as np

from hybrid_dit.convert import tables
from hybrid_dit.convert.abstract import abstract_dit, abstract_text, abstract_vae
from hybrid_dit.convert.pipeline import Pipeline, load_pipeline, save_pipeline
from hybrid_dit.data import shapes
from hybrid_dit.data.tokenizer import build_word_tokenizer
from hybrid_dit.models.umt5 import UMT5Config
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.wan import WanConfig

FRAMES, SIZE = 9, 32  # of a video: 3 x 4 x 4 latents, a token grid of 3 x 2 x 2


def random_pipeline(folder: Path, layers: int = 2, dim: int = 24, heads: int = 2, seed: int = 0) -> Pipeline:
    """Writes a random pipeline (float32) to `folder` and returns it as loaded."""
    text = UMT5Config(vocab_size=len(shapes.all_words()) + 3, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    autoencoder = VAEConfig(
        base_dim=2, num_res_blocks=1, dim_mult=(1, 1, 1, 1), z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4
    )
    sizes = {"ffn_dim": 2 * dim, "in_channels": autoencoder.z_dim, "text_dim": text.d_model, "freq_dim": 16}
    wan = WanConfig(dim=dim, num_heads=heads, num_layers=layers, **sizes)
    rng = np.random.default_rng(seed)
    parts = folder.with_name(f"{folder.name}_parts")
    pipeline = Pipeline(
        wan=wan,
        dit=random_like(abstract_dit(wan), rng),
        attention=(),
        vae=autoencoder,
        vae_params=random_like(abstract_vae(autoencoder), rng),
        text=text,
        text_params=random_like(abstract_text(text), rng),
        tokenizer=build_word_tokenizer(shapes.all_words(), parts / "tokenizer"),
        tokenizer_folder=parts / "tokenizer",
        shift=3.0,
    )
    save_pipeline(folder, pipeline, "float32")
    return load_pipeline(folder)


def random_like(abstract: dict, rng: np.random.Generator) -> dict:
    """Float32 parameters of these shapes: kernels keep their input's scale, norms are near 1, all else is small.

    Much faster than the models' own initialisers, which compile a program per shape; and the DiT's head is not zero.
    """

    def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape).astype(np.float32)
        name = path.rsplit("/", 1)[-1]
        if name == "kernel":
            fan_in = math.prod(shape[:-1]) if len(shape) > 3 else shape[-2]  # a convolution's, or a (stacked) matrix's
            return noise * fan_in**-0.5
        return 1 + 0.1 * noise if name in ("scale", "gamma") else 0.1 * noise

    return tables.unflatten({path: leaf(path, x.shape) for path, x in tables.flatten(abstract).items()})
