"""Hybrid attention (paper Eq. 5) on a GPU from fused kernels, forward and backward.

Forward: φ of the keys (of L alone, see `_skip`) and its sums (`gpu_linear.features`, `gpu_products`), softmax over S's
keys (`gpu_softmax`), `gpu_linear.read` for φ_q and the quotient. Left for the backward pass: the inputs, the output y,
its denominator and log-normaliser, the state, and the features of q and of L's keys, F numbers of 16 bits each a token
and head.

Backward, with y_i = n_i / Z_i (numerator and denominator of Eq. 5, c_i held fixed): dn_i = g_i / Z_i and
dZ_i = −g_i·y_i / Z_i are the cotangents of the linear part's sums as of the softmax part's, so the two branches don't
need each other: `gpu_softmax.backward` with y and log Z_i + c_i, `gpu_linear_backward` with dn_i and dZ_i.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from hybrid_dit.array_typing import Array, DTypeLike, Float, PyTree
from hybrid_dit.ops.kernels import gpu_linear, gpu_linear_backward, gpu_phi, gpu_products, gpu_softmax
from hybrid_dit.ops.kernels.gpu_tiles import LONGEST, TINY, Tiles
from hybrid_dit.ops.residuals import marked
from hybrid_dit.ops.shards import Shard
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid, linear_keys, softmax_tokens

SOFTMAX = ("cudnn", "triton")


@dataclasses.dataclass(frozen=True)
class How:
    """What is static.

    Attributes:
        spec: what to compute.
        grid: of the tokens.
        sizes: of tiles.
        softmax: whose kernels take the softmax part, of `SOFTMAX`; Triton's where cuDNN has none.
        interpret: run on any platform, slowly; "triton" only.
        shard: inside `shard_map`, which part of a video's rows q, k and v are; `grid` is of the whole.
    """

    spec: AttentionSpec
    grid: Grid
    sizes: Tiles
    softmax: str
    interpret: bool
    shard: Shard | None = None

    def total(self, sums: PyTree) -> PyTree:
        """Sums over tokens, given those of the rows at hand."""
        return sums if self.shard is None else self.shard.sum(sums)


def fits(spec: AttentionSpec, head_dim: int, dtype: DTypeLike) -> bool:
    """Whether the kernels compute this attention: bfloat16, and float32 where they are interpreted."""
    widths = 16 <= head_dim <= LONGEST and head_dim & (head_dim - 1) == 0
    dtypes = (jnp.bfloat16,) if _has_gpu() else (jnp.bfloat16, jnp.float32)
    return spec.is_eq5 and gpu_phi.fits(spec.feature_map) and widths and dtype in dtypes


def tuned(device_kind: str) -> bool:
    """Whether tiles are of the sizes for such a GPU (measured on an H200); on others they may not fit, or be slow."""
    return device_kind.startswith(("NVIDIA H100", "NVIDIA H200"))


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _how(spec: AttentionSpec, grid: Grid, sizes: Tiles | None, softmax: str | None, interpret: bool | None) -> How:
    interpret = not _has_gpu() if interpret is None else interpret
    return How(spec, grid, sizes or Tiles(), softmax or ("triton" if interpret else "cudnn"), interpret)


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    phi: PyTree,
    *,
    spec: AttentionSpec,
    grid: Grid,
    sizes: Tiles | None = None,
    softmax: str | None = None,
    interpret: bool | None = None,
    shard: Shard | None = None,
) -> Float[Array, "b n h d"]:
    """Eq. 5 in the dtype of `q`; arguments, values and derivatives as of `ops.hybrid.attention`.

    Args:
        q: queries.
        k: keys.
        v: values.
        phi: parameters of the feature maps.
        spec: what to compute; one that `fits`.
        grid: of the tokens.
        sizes: of tiles.
        softmax: whose kernels take the softmax part, of `SOFTMAX`; cuDNN's where there is a GPU.
        interpret: run on any platform, slowly; where there is no GPU.
        shard: see `How`.
    """
    how = dataclasses.replace(_how(spec, grid, sizes, softmax, interpret), shard=shard)
    # Taken here, so that their gradients find their way back to all keys by themselves.
    softmax_keys = None if spec.kind == "linear" else tuple(_softmax_rows(x, how) for x in (k, v))
    return _attention(how, q, k, v, softmax_keys, phi)


def _softmax_rows(x: Array, how: How) -> Array:
    """Rows of S, [b, m, h, d]."""
    if how.shard is not None:
        return how.shard.softmax_keys(x, how.grid, how.spec)
    n = how.grid[0] * how.grid[1] * how.grid[2]
    if how.spec.pattern == "stride":
        return x[:, : n : how.spec.rate]
    return jnp.take(x, softmax_tokens(how.grid, how.spec.rate, how.spec.pattern), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, q, k, v, softmax_keys, phi):
    return _forward(how, q, k, v, softmax_keys, phi, training=False)[0]


def _forward(how, q, k, v, softmax_keys, phi, training=True):
    out = weight = c = None
    if softmax_keys is not None:
        out, weight, c = _softmax_forward(how, q, *softmax_keys, want_c=training)
    sums = features = None
    y, denominator = out, weight
    if _has_linear(how.spec):
        softmax = None if out is None else (out, weight)
        (y, denominator), sums, features = _linear_sums(how, q, k, v, phi, training, softmax)
    y, denominator, c, sums = marked((y, denominator, c, sums))
    return y, (q, k, v, softmax_keys, phi, y, denominator, c, sums, features)


def _backward(how, residuals, g):
    q, k, v, softmax_keys, phi, y, denominator, c, sums, features = residuals
    g = g.astype(q.dtype)
    delta = jnp.moveaxis((g.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=3), 1, 2)  # [b, h, n]
    dq, dk, dv, dsoftmax = jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), None
    dphi = jax.tree.map(jnp.zeros_like, phi)
    if softmax_keys is not None:
        total = c + jnp.log(denominator)
        dq, *dsoftmax = _softmax_backward(how, q, *softmax_keys, g, y, delta, total)
        dsoftmax = tuple(dsoftmax)
    if sums is not None:
        inverse = 1.0 / jnp.maximum(denominator, TINY)
        dn = (g.astype(jnp.float32) * jnp.moveaxis(inverse, 1, 2)[..., None]).astype(q.dtype)
        dl = jnp.where(denominator > TINY, -delta * inverse, 0.0)
        dphi, (linear_dq, dk, dv) = _linear_backward(how, q, k, v, phi, sums, features, dn, dl, inputs=True)
        dq = (dq.astype(jnp.float32) + linear_dq.astype(jnp.float32)).astype(q.dtype)
    return dq, dk, dv, dsoftmax, dphi


_attention.defvjp(_forward, _backward)


def _has_linear(spec: AttentionSpec) -> bool:
    """With R = 1 every token is a softmax token: nothing is left for the linear part."""
    return spec.kind == "linear" or spec.rate > 1


def _softmax_forward(how, q, k, v, want_c):
    """(o, w, c) as in `gpu_softmax`."""
    lse = how.spec.stabiliser == "lse"
    if lse and _on_cudnn(how, q):
        return gpu_softmax.cudnn_forward(q, k, v, want_c)
    out, weight, c = gpu_softmax.forward(q, k, v, how.sizes, how.interpret)
    return (out, jnp.ones_like(weight), c + jnp.log(weight)) if lse else (out, weight, c)


def _softmax_backward(how, q, k, v, g, y, delta, total):
    if _on_cudnn(how, q):
        return gpu_softmax.cudnn_backward(q, k, v, g, y, total)
    return gpu_softmax.backward(q, k, v, g, delta, total, how.sizes, how.interpret)


def _on_cudnn(how, q) -> bool:
    """cuDNN has no backward for queries in odd number."""
    return how.softmax == "cudnn" and q.shape[1] % 2 == 0


# The linear part


def linear_part(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h d"],
    phi: PyTree,
    spec: AttentionSpec,
    grid: Grid,
    *,
    sizes: Tiles | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]:
    """The sums of Eq. 5 over L in float32, as `ops.hybrid.linear_part`, of which arguments and values are.

    Where q, k and v are constants of the differentiation, as in distillation, their gradients cost nothing.
    """
    numerator, denominator = _linear_part(_how(spec, grid, sizes, "triton", interpret), q, k, v, phi)
    return numerator, jnp.moveaxis(denominator, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_part(how, q, k, v, phi):
    return _linear_sums(how, q, k, v, phi, training=False, divide=False)[0]


def _linear_sums(how, q, k, v, phi, training, softmax=None, divide=True):
    """(what `gpu_linear.read` returns, sums over keys, features of queries, if `training`, and of keys)."""
    weights, of_queries = _weights(phi, "q", q), None
    skip = _skip(how, k)
    keep = None if skip else _keep(how, k)
    of_keys = gpu_linear.features(k, keep, _weights(phi, _keys_map(how.spec), k), *_rest(how), skip=skip)
    sums = how.total(gpu_products.products(of_keys, v, k.shape[3], how.sizes, how.interpret, skip=skip))
    if training:
        of_queries = gpu_linear.features(q, None, weights, *_rest(how))
    out = gpu_linear.read(q, softmax, weights, _rounded(sums, q), *_rest(how), divide=divide, given=of_queries)
    return tuple(out), sums, (of_queries, of_keys)


def _linear_forward(how, q, k, v, phi):
    inputs = () if any(x.perturbed for x in (q, k, v)) else None  # as structure: residuals are arrays
    q, k, v, phi = q.value, k.value, v.value, jax.tree.map(lambda x: x.value, phi)
    out, sums, features = _linear_sums(how, q, k, v, phi, training=True, divide=False)
    return out, (q, k, v, phi, sums, features, inputs)


def _linear_part_backward(how, residuals, cotangents):
    q, k, v, phi, sums, features, inputs = residuals
    dn, dl = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents)
    dphi, (dq, dk, dv) = _linear_backward(how, q, k, v, phi, sums, features, dn.astype(q.dtype), dl, inputs is not None)
    return dq, dk, dv, dphi


_linear_part.defvjp(_linear_forward, _linear_part_backward, symbolic_zeros=True)


def _linear_backward(how, q, k, v, phi, sums, features, dn, dl, inputs: bool):
    """Gradients of the linear part's sums: (in phi, (in q, k and v; None unless `inputs`)).

    Args:
        how: what is static.
        q: queries.
        k: keys.
        v: values.
        phi: parameters of both maps.
        sums: state and normaliser, float32.
        features: of queries and keys, as the forward kernels kept them.
        dn: cotangent of the numerator [b, n, h, d], in the dtype of `q`.
        dl: of the denominator [b, h, n], float32.
        inputs: whether gradients in q, k and v are asked for.
    """
    rest, keys = _rest(how), _keys_map(how.spec)
    d, weights_q, weights_k = q.shape[3], _weights(phi, "q", q), _weights(phi, keys, k)
    skip = _skip(how, k)
    dy_q, _ = gpu_linear_backward.pre_activations(features[0], dn, dl, _rounded(sums, q), *rest)
    dsums = how.total(gpu_products.products(features[0], dn, d, *rest[1:], weight=dl))
    dy_k, dv = gpu_linear_backward.pre_activations(
        features[1], v, None, _rounded(dsums, k), *rest, values=inputs, skip=skip
    )
    dphi, dx = jax.tree.map(jnp.zeros_like, phi), []
    for name, x, *of in (("q", q, dy_q, weights_q, 0), (keys, k, dy_k, weights_k, skip)):
        found, into = _map_backward(how, x, *of, inputs)
        dphi[name] = jax.tree.map(jnp.add, dphi[name], _unpadded(found, phi[name]))
        dx.append(into)
    return dphi, (*dx, dv)


def _map_backward(how, x, dy, weights, skip, inputs):
    """Gradients of one map: (in w0, b0, w1 and b1 as `gpu_phi.operands` has them, in x or None)."""
    h, da, dx = gpu_linear_backward.hidden(x, dy, weights, *_rest(how), inputs=inputs, skip=skip)
    rest = x.shape[3], how.sizes, how.interpret
    sums = gpu_products.products(da, x, *rest, skip=skip), gpu_products.products(dy, h, *rest)
    (dw0, db0), (dw1, db1) = ((w.sum(axis=0).swapaxes(1, 2), b.sum(axis=0)) for w, b in sums)
    return (dw0, db0, dw1, db1), dx


def _unpadded(gradients, phi) -> dict[str, Array]:
    """Gradients of `gpu_phi.operands` as those of φ's parameters."""
    named = dict(zip(("w0", "b0", "w1", "b1"), gradients))
    return {name: named[name][tuple(map(slice, x.shape))].astype(x.dtype) for name, x in phi.items()}


def _skip(how, k) -> int:
    """R where L is the keys whose row R does not divide: φ of the others is not computed then. 0 elsewhere.

    So it is with pattern "stride", if no rows pad the video and all its parts are alike.
    """
    rate, length, parts = how.spec.rate, k.shape[1], how.shard.parts if how.shard else 1
    whole = length * parts == math.prod(how.grid) and (parts == 1 or length % rate == 0)
    return rate if whole and rate > 1 and how.spec.kind == "hybrid" and how.spec.pattern == "stride" else 0


def _keep(how, k) -> Array:
    if how.shard is not None:
        return how.shard.linear_keys(how.grid, how.spec, k.shape[1])
    return jnp.asarray(linear_keys(how.grid, how.spec, k.shape[1]))


def _keys_map(spec: AttentionSpec) -> str:
    return "q" if spec.feature_map.shared else "k"


def _weights(phi, name, x):
    return gpu_phi.operands(phi[name], x.dtype)


def _rounded(sums, x) -> gpu_linear.State:
    return sums[0].astype(x.dtype), sums[1]


def _rest(how):
    return how.spec.feature_map, how.sizes, how.interpret
