"""Softmax by tiles: the oracle's sums whatever the tile size, and float32 sums of 16-bit inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_dit.ops import softmax
from hybrid_dit.ops.softmax import softmax_attention, softmax_sums

U32, U16 = 2.0**-24, 2.0**-8  # unit roundoff of float32 and bfloat16
B, N, M, H, D = 2, 23, 9, 3, 8  # more queries than keys, as in hybrid attention


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, length, H, D)), dtype) for length in (N, M, M)]


def naive_sums(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    s = np.einsum("bnhd,bmhd->bnhm", q, k) / D**0.5
    c = s.max(-1)
    p = np.exp(s - c[..., None])
    return np.einsum("bnhm,bmhd->bnhd", p, v), p.sum(-1), c


# All queries at once; 4 tiles, the last one padded; fewer scores allowed than one query has: one query a tile.
@pytest.mark.parametrize("max_scores", [2**26, B * H * M * 6, 1])
def test_tiles_of_any_size_give_the_sums_of_equation_5(max_scores, monkeypatch):
    monkeypatch.setattr(softmax, "MAX_SCORES", max_scores)
    q, k, v = inputs()
    # Worst case: D + 4 roundings of |s| in the exponent, M of the sum; the sums are at most M max|v| and M.
    relative = (np.abs(naive_sums(q, k, v)[2]).max() * (D + 4) + M) * U32
    for got, expected, size in zip(softmax_sums(q, k, v), naive_sums(q, k, v), (M * np.abs(v).max(), M, 1)):
        assert got.dtype == jnp.float32
        assert np.abs(got - expected).max() <= relative * size


def test_tiles_do_not_change_the_gradient(monkeypatch):
    q, k, v = inputs()

    def gradient():
        return jax.jit(jax.grad(lambda *x: (softmax_attention(*x) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)

    whole = gradient()
    monkeypatch.setattr(softmax, "MAX_SCORES", B * H * M * 6)
    for g, expected in zip(gradient(), whole):
        # The same operations per query; k's and v's gradients add N queries in another order.
        assert np.linalg.norm(g - expected) <= N * U32 * np.linalg.norm(expected)


def test_sums_of_bfloat16_inputs_accumulate_in_float32():
    """Equal keys make every p exactly 1: the sums are integers that float32 holds and bfloat16, past 256, does not."""
    m = 1001
    rng = np.random.default_rng(0)
    v = rng.integers(0, 4, (1, m, 2, 4))
    ones = jnp.ones((1, m, 2, 4), jnp.bfloat16)
    numerator, denominator, _ = softmax_sums(ones[:, :3], ones, jnp.asarray(v, jnp.bfloat16))
    np.testing.assert_array_equal(denominator, np.full((1, 3, 2), m))
    np.testing.assert_array_equal(numerator, np.broadcast_to(v.sum(1, keepdims=True), numerator.shape))


def test_scores_of_bfloat16_inputs_are_float32():
    """Logits 300 and 300.5 differ by less than bfloat16's spacing there (2); their softmax must see the difference."""
    # s = q·k / 2: q = (20, 1, 0, 0) against (30, 0, 0, 0) and (30, 1, 0, 0)
    q = jnp.asarray([[[[20.0, 1.0, 0.0, 0.0]]]], jnp.bfloat16)
    k = jnp.asarray([[[[30.0, 0.0, 0.0, 0.0]], [[30.0, 1.0, 0.0, 0.0]]]], jnp.bfloat16)
    _, denominator, c = softmax_sums(q, k, jnp.ones_like(k))
    assert c.item() == 300.5
    assert abs(denominator.item() - (1 + np.exp(-0.5))) <= 4 * U32


def test_output_has_the_dtype_of_q():
    q, k, v = inputs(jnp.bfloat16)
    numerator, denominator, _ = naive_sums(q, k, v)
    y = softmax_attention(q, k, v)
    assert y.dtype == jnp.bfloat16
    # p and y are rounded, both at most u relative to max|v|.
    assert np.abs(np.float64(y) - numerator / denominator[..., None]).max() <= 2 * U16 * np.abs(np.float64(v)).max()
