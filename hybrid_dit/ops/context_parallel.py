"""Attention over the tokens of a video that are split over devices: only S's keys and the linear part's sums travel.

Every device has N/P rows of q, k and v and computes as many of the output. Forward it gathers the keys and values of
S, N/R rows of each, and sums the state (F×D per head) and normaliser of the linear part over the devices; backward, it
sums the gradients of S's keys and values (a reduce-scatter: each device gets those of its own rows), of the state, and
of φ. Which rows are S's is known everywhere (`ops.shards`), so no device asks another for them, whatever N, R and P
are. Softmax attention, which needs all keys, exchanges tokens for heads where the devices divide these (four N/P rows
per device instead of two N), and gathers all keys elsewhere.

c_i of Eq. 5 is a maximum over S, of which each device has all keys: values are those of one device but for rounding.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from hybrid_dit.array_typing import Array, Float, PyTree
from hybrid_dit.errors import UserError
from hybrid_dit.ops import backends, hybrid, residuals
from hybrid_dit.ops.hybrid import combine, linear_sums, stabilised_sums
from hybrid_dit.ops.kernels import gpu_hybrid, tpu_hybrid
from hybrid_dit.ops.shards import Shard, padded_length
from hybrid_dit.ops.softmax import fused_on_gpu, softmax_attention
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid


@dataclass(frozen=True)
class Split:
    """How videos and their tokens are split over a mesh.

    Attributes:
        mesh: of the program.
        tokens: axes of the mesh that the tokens of a video are split over.
        videos: axes that videos are split over, where that divides them.
    """

    mesh: Mesh
    tokens: tuple[str, ...]
    videos: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        """P, number of devices that share a video."""
        return math.prod(self.mesh.shape[name] for name in self.tokens)

    def rows(self, tokens: int) -> int:
        """How many rows a model pads a video of so many tokens to, once for all blocks, so that devices divide it.

        Each device's rows then begin with a softmax token at the usual rates: the same strided slice on all of them.
        """
        return padded_length(tokens, self.parts, 8)


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    phi: PyTree,
    *,
    spec: AttentionSpec,
    grid: Grid,
    split: Split,
    backend: str = "auto",
) -> Float[Array, "b n h d"]:
    """`ops.hybrid.attention` with tokens split over devices; equal to it, and so are gradients, up to rounding.

    Args:
        q: queries, the whole array, as everywhere under `jit`; so are the others.
        k: keys.
        v: values.
        phi: parameters of the feature maps, whole on every device.
        spec: what to compute; static.
        grid: of the tokens. Rows past its product pad the video: as keys they don't count. An n that the devices don't
            divide is padded here, which moves rows between devices: pad it once for all blocks instead.
        split: over which devices.
        backend: as there.
    """
    n, videos = q.shape[1], math.prod(split.mesh.shape[name] for name in split.videos)
    rate = spec.rate if spec.kind == "hybrid" else 1
    width = ((0, 0), (0, padded_length(n, split.parts, rate) - n), (0, 0), (0, 0))
    rows = PartitionSpec(split.videos if len(q) % videos == 0 else None, split.tokens)
    shard = Shard(split.tokens, split.parts)
    run = jax.shard_map(
        partial(shard_attention, spec=spec, grid=grid, shard=shard, backend=backend),
        mesh=split.mesh,
        in_specs=(rows, rows, rows, PartitionSpec()),
        out_specs=rows,
        check_vma=False,
    )
    return run(*(jnp.pad(x, width) for x in (q, k, v)), phi)[:, :n]


def shard_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    phi: PyTree,
    *,
    spec: AttentionSpec,
    grid: Grid,
    shard: Shard,
    backend: str = "auto",
) -> Float[Array, "b n h d"]:
    """The rows of the output that belong to one device's rows q, k, v; for use inside `shard_map`.

    Args:
        q: queries of the device.
        k: keys, likewise.
        v: values, likewise.
        phi: parameters of the feature maps.
        spec: what to compute.
        grid: of all tokens.
        shard: how they are split.
        backend: as in `ops.hybrid.attention`.

    Raises:
        UserError: a kind of attention that is not known here.
    """
    if shard.parts == 1 and q.shape[1] == math.prod(grid):
        return hybrid.attention(q, k, v, phi, spec=spec, grid=grid, backend=backend)
    chosen = backends.choose(backend, spec, q.shape[-1], q.dtype)
    if spec.kind == "softmax":
        return _softmax(q, k, v, phi, spec, grid, shard, backend, chosen)
    if not spec.is_eq5:
        raise UserError(
            f"attention of kind {spec.kind!r} is not written for tokens split over devices; set mesh.seq=1, or give "
            "it a branch in hybrid_dit/ops/context_parallel.py"
        )
    if chosen == "tpu":
        return tpu_hybrid.attention(partial(_mixed, shard=shard), q, k, v, phi, spec, grid, shard)
    if chosen == "gpu":
        return gpu_hybrid.attention(q, k, v, phi, spec=spec, grid=grid, shard=shard)
    return _mixed(q, k, v, phi, spec, grid, shard)


def _mixed(q, k, v, phi, spec, grid, shard):
    def run(q, k, v, phi, *softmax_keys):
        softmax = stabilised_sums(q, *softmax_keys, spec) if softmax_keys else (jnp.zeros(()), jnp.zeros(()))
        keep = shard.linear_keys(grid, spec, k.shape[1])
        total = lambda sums: residuals.marked(shard.sum(sums))  # noqa: E731
        return combine(softmax, linear_sums(q, k, v, phi, keep, spec, total)).astype(q.dtype)

    # What travels is not computed anew for the backward pass: it would be sent once more.
    softmax_keys = [shard.softmax_keys(x, grid, spec) for x in (k, v)] if spec.kind == "hybrid" else ()
    return residuals.from_inputs(run)(q, k, v, phi, *softmax_keys)


def _softmax(q, k, v, phi, spec, grid, shard, backend, chosen):
    if q.shape[2] % shard.parts:
        plain = partial(_softmax_over_all, shard=shard)
        if chosen == "tpu":  # hybrid attention whose S is everything is softmax attention
            return tpu_hybrid.attention(plain, q, k, v, phi, replace(spec, kind="hybrid", rate=1), grid, shard)
        run = partial(plain, spec=spec, grid=grid)
        return (run if fused_on_gpu(q) else residuals.from_inputs(run))(q, k, v, phi)  # as in `ops.hybrid`
    n, length = math.prod(grid), q.shape[1] * shard.parts
    exchange = partial(jax.lax.all_to_all, axis_name=shard.axes, tiled=True)
    q, k, v = (exchange(x, split_axis=2, concat_axis=1)[:, :n] for x in (q, k, v))
    y = hybrid.attention(q, k, v, phi, spec=spec, grid=grid, backend=backend)
    return exchange(jnp.pad(y, ((0, 0), (0, length - n), (0, 0), (0, 0))), split_axis=1, concat_axis=2)


def _softmax_over_all(q, k, v, phi, spec, grid, shard):
    del phi, spec
    return softmax_attention(q, *(shard.all_keys(x, grid) for x in (k, v)))
