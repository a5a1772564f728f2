"""RoPE against complex multiplication token by token."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hybrid_dit.ops.rope import apply_rope, rope_table

U32, U16 = 2.0**-24, 2.0**-8  # unit roundoff of float32 and bfloat16
GRID = (2, 3, 5)  # three different lengths: a wrong order of the axes shows


def rotated(head_dim, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 30, 3, head_dim)), dtype)
    y = apply_rope(x, rope_table(GRID, head_dim))
    assert y.dtype == dtype
    return np.float64(y), np.asarray(x, np.float64)


# 128 / 2 = 22 + 21 + 21 rotations as in Wan; 24 divides evenly; at 8 frames get 2 of 4; at 4 rows and columns get none.
@pytest.mark.parametrize("head_dim", [128, 24, 8, 4])
def test_rotation_is_the_complex_one(head_dim):
    y, x = rotated(head_dim, jnp.float32)
    # cos and sin, two products and a sum: at most 3 u relative to |pair| <= 2 max|x|.
    assert np.abs(y - oracle.rope(x, GRID)).max() <= 3 * U32 * 2 * np.abs(x).max()


def test_bfloat16_is_rounded_once():
    y, x = rotated(24, jnp.bfloat16)
    expected = oracle.rope(x, GRID)
    assert (np.abs(y - expected) <= U16 * np.abs(expected) + 6 * U32 * np.abs(x).max()).all()


def test_scores_depend_on_relative_positions_only():
    x = jnp.broadcast_to(jnp.asarray(np.random.default_rng(1).standard_normal(24), jnp.float32), (1, 30, 1, 24))
    y = np.asarray(apply_rope(x, rope_table(GRID, 24)), np.float64).reshape(*GRID, 24)
    # One frame, row and column on: the same score wherever the pair lies. 24 products, 3 roundings each and the sum's.
    scores = np.einsum("fryd,fryd->fry", y[:-1, :-1, :-1], y[1:, 1:, 1:])
    assert np.ptp(scores) <= 2 * 24 * 8 * U32 * np.square(x).max()
    assert abs(scores[0, 0, 0] - np.square(x[0, 0]).sum()) > 0.1  # and not because nothing was rotated
