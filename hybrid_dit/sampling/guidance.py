"""Classifier-free guidance (arXiv:2207.12598): both branches in one call or one after the other, always or at times."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit.array_typing import Array, PyTree
from hybrid_dit.errors import UserError

Velocity = Callable[[PyTree, Array, Array, PyTree], Array]
ALWAYS = (0.0, 1000.0)


def guided(
    velocity: Velocity, scale: float, interval: Sequence[float] = ALWAYS, sequential: bool = False
) -> Velocity:
    """v_uncond + scale (v_cond - v_uncond) where low <= t <= high, v_cond alone elsewhere.

    Guidance in a limited interval: arXiv:2404.07724, which found it harmful at high noise and needless at low. Where no
    video of the batch is guided, the unconditional branch is not computed.

    Args:
        velocity: see `hybrid_dit.sampling.loop`.
        scale: 1 is no guidance.
        interval: (low, high) of the timesteps in 0..1000 that are guided.
        sequential: the branches run one after the other, which needs the memory of one, rather than in one call of
            twice the batch. Same values to rounding.

    Returns:
        a velocity function whose context is a pair (conditional, unconditional) of contexts for `velocity`, with the
        batch in axis 0 of every leaf; that of the unconditional one may be 1.

    Raises:
        UserError: the interval is none.
    """
    low, high = check_interval(interval)

    def both_branches(params, x, t, cond, uncond, scale):
        uncond = jax.tree.map(lambda c, u: jnp.broadcast_to(u, c.shape), cond, uncond)
        if sequential:  # a loop, since independent calls could be scheduled side by side
            stacked = jax.tree.map(lambda c, u: jnp.stack([c, u]), cond, uncond)
            v = jax.lax.map(lambda context: velocity(params, x, t, context).astype(jnp.float32), stacked)
        else:
            stacked = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, uncond)
            v = velocity(params, jnp.concatenate([x, x]), jnp.concatenate([t, t]), stacked).astype(jnp.float32)
            v = jnp.stack(jnp.split(v, 2))
        return v[1] + scale * (v[0] - v[1])

    def combined(params, x, t, context):
        if (low, high) == ALWAYS:
            return both_branches(params, x, t, *context, scale)
        inside = (t >= low) & (t <= high)
        scales = jnp.where(inside, scale, 1.0).reshape(-1, *(1,) * (x.ndim - 1))
        return jax.lax.cond(
            inside.any(),
            lambda: both_branches(params, x, t, *context, scales),
            lambda: velocity(params, x, t, context[0]).astype(jnp.float32),
        )

    return combined


def guided_steps(timesteps: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """Returns which steps of a schedule are guided, bool [steps]."""
    return (timesteps >= interval[0]) & (timesteps <= interval[1])


def check_interval(interval: Sequence[float]) -> tuple[float, float]:
    """Returns (low, high).

    Raises:
        UserError: not two numbers, or low is above high.
    """
    if len(interval) != 2 or interval[0] > interval[1]:
        raise UserError(f"a guided interval is two timesteps LOW,HIGH with LOW <= HIGH, got {tuple(interval)}")
    return tuple(interval)
