"""The flow-matching objective that Wan trains with."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.sampling.schedule import TRAIN_STEPS, shift_sigma


def flow_matching_loss(
    velocity: Callable[[Array, Array], Array],
    latents: Float[Array, "b t y x c"],
    key: Array,
    shift: float,
) -> Float[Array, "b"]:
    """‖v(x_s, 1000 s) − (ε − x_0)‖², x_s = (1 − s) x_0 + s ε, averaged over each sample's elements; float32.

    Noise levels are uniform before the timestep shift and stratified over the batch (one per equal slice of [0, 1]),
    which keeps the expectation and lowers the variance.

    Args:
        velocity: (noisy latents float32, timesteps float32 [b] in [0, 1000]) -> velocity.
        latents: clean, normalised.
        key: random key of this step.
        shift: timestep shift.
    """
    key_order, key_level, key_noise = jax.random.split(key, 3)
    b = latents.shape[0]
    uniform = (jax.random.permutation(key_order, b) + jax.random.uniform(key_level, (b,))) / b
    level = shift_sigma(uniform, shift)
    clean = latents.astype(jnp.float32)
    noise = jax.random.normal(key_noise, latents.shape)
    s = level[:, None, None, None, None]
    predicted = velocity((1 - s) * clean + s * noise, TRAIN_STEPS * level)
    return jnp.square(predicted - (noise - clean)).mean(axis=(1, 2, 3, 4))
