"""Parameter trees of the three models as shapes: nothing is allocated, nothing computed."""

from functools import partial

import jax
import jax.numpy as jnp

from hybrid_dit.models import vae
from hybrid_dit.models.umt5 import UMT5Config, UMT5Encoder
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.wan import WanConfig, WanDiT
from hybrid_dit.ops.spec import AttentionSpec


def abstract_dit(config: WanConfig, attention: tuple[AttentionSpec, ...] = ()) -> dict:
    """Returns the DiT's parameter tree as shapes, feature maps included if a block is converted."""
    latents = jnp.zeros((1, *config.patch, config.in_channels))
    text = jnp.zeros((1, 1, config.text_dim))
    return jax.eval_shape(WanDiT(config, attention).init, jax.random.key(0), latents, jnp.zeros(1), text)["params"]


def abstract_text(config: UMT5Config) -> dict:
    """Returns the text encoder's parameter tree as shapes."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(UMT5Encoder(config).init, jax.random.key(0), ids, ids)["params"]


def abstract_vae(config: VAEConfig) -> dict:
    """Returns the VAE's parameter tree as shapes."""
    return jax.eval_shape(partial(vae.init, config), jax.random.key(0))
