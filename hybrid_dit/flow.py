"""The flow-matching objective that Wan trains with."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.errors import UserError
from hybrid_dit.sampling.schedule import TRAIN_STEPS, shift_sigma

DISTRIBUTIONS = ("uniform", "logit_normal")


def flow_matching_loss(
    velocity: Callable[[Array, Array], Array],
    latents: Float[Array, "b t y x c"],
    key: Array,
    shift: float,
) -> Float[Array, "b"]:
    """‖v(x_s, 1000 s) − (ε − x_0)‖², x_s = (1 − s) x_0 + s ε, averaged over each sample's elements; float32.

    Args:
        velocity: (noisy latents float32, timesteps float32 [b] in [0, 1000]) -> velocity.
        latents: clean, normalised.
        key: random key of this step, see `draw`.
        shift: timestep shift.
    """
    level, noise = draw(key, latents.shape, shift)
    predicted = velocity(noisy(latents, noise, level), TRAIN_STEPS * level)
    return squared_error(predicted, target(latents, noise))


def draw(
    key: Array, shape: tuple[int, ...], shift: float, distribution: str = "uniform", mean: float = 0.0, std: float = 1.0
) -> tuple[Float[Array, "b"], Float[Array, "b t y x c"]]:
    """Returns noise levels s in [0, 1] and standard normal noise of a whole batch, float32.

    Levels are stratified over the batch (one per slice of equal probability), which keeps the expectation and lowers
    the variance. What a sample gets depends on the key, its place in the batch and the batch's size alone: not on
    devices, nor on the parts that a batch is computed in.

    Args:
        key: random key.
        shape: of the latents, [b, t, y, x, c].
        shift: s -> shift·s / (1 + (shift − 1)·s), after the distribution.
        distribution: "uniform", or "logit_normal": s = sigmoid(z), z normal.
        mean: of z.
        std: of z.

    Raises:
        UserError: an unknown distribution.
    """
    check_distribution(distribution)
    key_order, key_level, key_noise = jax.random.split(key, 3)
    b = shape[0]
    level = (jax.random.permutation(key_order, b) + jax.random.uniform(key_level, (b,))) / b
    if distribution == "logit_normal":
        level = jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(level))
    return shift_sigma(level, shift), jax.random.normal(key_noise, shape)


def check_distribution(name: str) -> None:
    """Raises UserError for an unknown distribution of noise levels."""
    if name not in DISTRIBUTIONS:
        raise UserError(f"finetune.timesteps={name!r} is unknown; choose one of {', '.join(DISTRIBUTIONS)}")


def noisy(
    latents: Float[Array, "b t y x c"], noise: Float[Array, "b t y x c"], level: Float[Array, "b"]
) -> Float[Array, "b t y x c"]:
    """x_s = (1 − s) x_0 + s ε, float32."""
    s = level[:, None, None, None, None]
    return (1 - s) * latents.astype(jnp.float32) + s * noise


def target(latents: Float[Array, "b t y x c"], noise: Float[Array, "b t y x c"]) -> Float[Array, "b t y x c"]:
    """The velocity to predict, ε − x_0, float32."""
    return noise - latents.astype(jnp.float32)


def squared_error(a: Float[Array, "b t y x c"], b: Float[Array, "b t y x c"]) -> Float[Array, "b"]:
    """Mean squared difference per sample, float32."""
    return jnp.square(a.astype(jnp.float32) - b).mean(axis=(1, 2, 3, 4))


def by_timestep(values: Float[Array, "b"], level: Float[Array, "b"], buckets: int) -> tuple[Array, Array]:
    """Returns (sum, count) of the values in each of `buckets` equal ranges of the timestep, float32 [buckets]."""
    bucket = jnp.minimum((level * buckets).astype(jnp.int32), buckets - 1)
    inside = bucket[:, None] == jnp.arange(buckets)
    return jnp.where(inside, values[:, None], 0).sum(axis=0), inside.sum(axis=0).astype(jnp.float32)


def bucket_names(buckets: int) -> list[str]:
    """Returns "0-250", "250-500", ...: the timesteps of each bucket."""
    edges = [math.floor(TRAIN_STEPS * i / buckets) for i in range(buckets + 1)]
    return [f"{low}-{high}" for low, high in zip(edges, edges[1:])]
