"""Three-axis rotary position embedding of Wan2.1 (`rope_apply` in the original's wan/modules/model.py)."""

import jax.numpy as jnp
import numpy as np

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.ops.tokens import Grid


def rope_table(grid: Grid, head_dim: int, theta: float = 10000.0) -> tuple[Float[Array, "n r"], Float[Array, "n r"]]:
    """Returns cos and sin of every token's rotation angles, float32 [N, head_dim / 2].

    Of the head's `head_dim / 2` rotations, `head_dim // 6` each belong to rows and columns, the rest (first) to frames.
    Angles are taken in float64 per axis and broadcast, so that only the small per-axis tables are constants.
    """
    per_space = head_dim // 6
    sizes = (head_dim // 2 - 2 * per_space, per_space, per_space)
    tables = []
    for axis, (length, size) in enumerate(zip(grid, sizes)):
        frequency = theta ** (-np.arange(size, dtype=np.float64) / size)
        angle = np.arange(length, dtype=np.float64)[:, None] * frequency
        shape = [1, 1, 1, size]
        shape[axis] = length
        tables.append((np.cos(angle).reshape(shape), np.sin(angle).reshape(shape)))

    def spread(parts):
        full = [jnp.broadcast_to(jnp.asarray(p, jnp.float32), (*grid, p.shape[-1])) for p in parts]
        return jnp.concatenate(full, axis=-1).reshape(-1, head_dim // 2)

    return spread([c for c, _ in tables]), spread([s for _, s in tables])


def apply_rope(
    x: Float[Array, "b n h d"], table: tuple[Float[Array, "n r"], Float[Array, "n r"]]
) -> Float[Array, "b n h d"]:
    """Rotates the pairs (x[..., 2i], x[..., 2i+1]) by the token's angle i; float32 inside, dtype of `x` outside."""
    cos, sin = (t[:, None, :] for t in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape).astype(x.dtype)
