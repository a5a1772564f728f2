"""max_j q_i·k_j / sqrt(D) on a GPU, as one Pallas (Triton) kernel: the scores stay in registers."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hybrid_dit.array_typing import Array, Float

BLOCK_Q, BLOCK_K = 128, 128
LONGEST = 128  # width of a head the tiles are meant for


def row_max(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], interpret: bool = False
) -> Float[Array, "b n h"]:
    """max_j s_ij with s_ij = q_i·k_j / sqrt(D), the c_i of paper Eq. 5; float32. Not differentiable.

    Args:
        q: queries; d is a power of 2, at least 16.
        k: keys.
        interpret: run on any backend, slowly, for tests.
    """
    b, n, h, d = q.shape
    q = jnp.pad(q, ((0, 0), (0, -n % BLOCK_Q), (0, 0), (0, 0)))
    k = jnp.pad(k, ((0, 0), (0, -k.shape[1] % BLOCK_K), (0, 0), (0, 0)), mode="edge")  # repeats change no maximum
    out = pl.pallas_call(
        functools.partial(_kernel, scale=d**-0.5),
        grid=(q.shape[1] // BLOCK_Q, b, h),
        in_specs=[
            pl.BlockSpec((None, BLOCK_Q, None, d), lambda i, j, head: (j, i, head, 0)),
            pl.BlockSpec((None, k.shape[1], None, d), lambda i, j, head: (j, 0, head, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, BLOCK_Q), lambda i, j, head: (j, head, i)),
        out_shape=jax.ShapeDtypeStruct((b, h, q.shape[1]), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="row_max",
    )(q, k)
    return jnp.moveaxis(out, 1, 2)[:, :n]


def fits(head_dim: int) -> bool:
    """Whether the kernel takes heads of this width."""
    return 16 <= head_dim <= LONGEST and head_dim & (head_dim - 1) == 0


def _kernel(q_ref, k_ref, out_ref, *, scale: float):
    q = q_ref[...]

    def body(i, top):
        k = k_ref[pl.dslice(i * BLOCK_K, BLOCK_K), :]
        return jnp.maximum(top, plgpu.dot(q, k.T).max(axis=-1))

    top = jax.lax.fori_loop(0, k_ref.shape[0] // BLOCK_K, body, jnp.full((BLOCK_Q,), -jnp.inf, jnp.float32))
    out_ref[...] = top * scale
