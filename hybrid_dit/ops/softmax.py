"""Softmax attention by query tiles: the N×N score matrix never exists, forward or backward."""

import jax
import jax.numpy as jnp

from hybrid_dit.array_typing import Array, Float

# Scores held at once (float32). 2**26 is 256 MiB: small against any accelerator, large enough to keep it busy.
MAX_SCORES = 2**26


def softmax_sums(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"], Float[Array, "b n h"]]:
    """Σ_j exp(s_ij − c_i) v_j, Σ_j exp(s_ij − c_i) and c_i = max_j s_ij, with s_ij = q_i·k_j / sqrt(D) (paper Eq. 5).

    c_i carries no gradient: in `softmax_attention` it cancels, and in hybrid attention the gradient is defined with c_i
    held fixed. Everything returned is float32, whatever the dtype of the inputs.
    """
    b, n, h, d = q.shape
    tiles = -(-(b * h * n * k.shape[1]) // MAX_SCORES)
    size = -(-n // tiles)

    # Recomputing a tile in the backward pass keeps its scores out of memory in between.
    @jax.checkpoint
    def tile(q_tile):
        s = jnp.einsum("bnhd,bmhd->bhnm", q_tile, k, preferred_element_type=jnp.float32) * d**-0.5
        c = jax.lax.stop_gradient(s.max(axis=-1, keepdims=True))
        p = jnp.exp(s - c)
        o = jnp.einsum("bhnm,bmhd->bnhd", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return o, p.sum(axis=-1).swapaxes(1, 2), c[..., 0].swapaxes(1, 2)

    if size >= n:
        return tile(q)
    padded = jnp.pad(q, ((0, 0), (0, -n % size), (0, 0), (0, 0)))
    stacked = padded.reshape(b, -1, size, h, d).swapaxes(0, 1)
    out = jax.lax.map(tile, stacked)
    return tuple(x.swapaxes(0, 1).reshape(b, -1, *x.shape[3:])[:, :n] for x in out)


def softmax_attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """softmax(q kᵀ / sqrt(D)) v; accumulates in float32, returns the dtype of `q`.

    On a GPU with 16-bit inputs cuDNN's fused kernel runs, elsewhere tiles of XLA operations.
    """
    if fused_on_gpu(q):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    o, normaliser, _ = softmax_sums(q, k, v)
    return (o / normaliser[..., None]).astype(q.dtype)


def fused_on_gpu(q: Array) -> bool:
    """Whether cuDNN's fused attention takes these queries: 16 bits, heads of up to 128, on a GPU."""
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return fits and jax.default_backend() == "gpu"
