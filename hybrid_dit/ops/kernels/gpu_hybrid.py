"""Hybrid attention (paper Eq. 5) on a GPU from fused kernels, forward and backward.

Forward: `gpu_linear.state` over all keys, softmax over S's keys (`gpu_softmax`), `gpu_linear.read` for φ_q and the
quotient. Kept for the backward pass: the inputs, the output y, its denominator and log-normaliser, and the state.

Backward, with y_i = n_i / Z_i (numerator and denominator of Eq. 5, c_i held fixed): dn_i = g_i / Z_i and
dZ_i = −g_i·y_i / Z_i are the cotangents of the linear part's sums as of the softmax part's, so the two branches don't
need each other: `gpu_softmax.backward` with y and log Z_i + c_i, `gpu_linear_backward` with dn_i and dZ_i.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from hybrid_dit.array_typing import Array, DTypeLike, Float, PyTree
from hybrid_dit.ops.kernels import gpu_linear, gpu_linear_backward, gpu_phi, gpu_softmax
from hybrid_dit.ops.kernels.gpu_tiles import LONGEST, TINY, Tiles
from hybrid_dit.ops.residuals import marked
from hybrid_dit.ops.shards import Shard
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid, linear_keys, softmax_tokens

SOFTMAX = ("cudnn", "triton", "cudnn_unpadded")


@dataclasses.dataclass(frozen=True)
class How:
    """What is static.

    Attributes:
        spec: what to compute.
        grid: of the tokens.
        sizes: of tiles.
        softmax: whose kernels take the softmax part, of `SOFTMAX`.
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
    return spec.converted and gpu_phi.fits(spec.feature_map) and widths and dtype in dtypes


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
    return _forward(how, q, k, v, softmax_keys, phi)[0]


def _forward(how, q, k, v, softmax_keys, phi):
    out = weight = c = None
    if softmax_keys is not None:
        out, weight, c = _softmax_forward(how, q, *softmax_keys)
    sums = denominator = None
    if _has_linear(how.spec):
        sums = _state(how, k, v, phi)
        given = None if out is None else (out, weight)
        y, denominator = gpu_linear.read(q, given, _weights(phi, "q", q), _parts(sums, q), *_rest(how))
    else:
        y, denominator = out, weight
    y, denominator, c, sums = marked((y, denominator, c, sums))
    return y, (q, k, v, softmax_keys, phi, y, denominator, c, sums)


def _backward(how, residuals, g):
    q, k, v, softmax_keys, phi, y, denominator, c, sums = residuals
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
        dphi, (linear_dq, dk, dv) = _linear_backward(how, q, k, v, phi, sums, dn, dl, inputs=True)
        dq = (dq.astype(jnp.float32) + linear_dq.astype(jnp.float32)).astype(q.dtype)
    return dq, dk, dv, dsoftmax, dphi


_attention.defvjp(_forward, _backward)


def _has_linear(spec: AttentionSpec) -> bool:
    """With R = 1 every token is a softmax token: nothing is left for the linear part."""
    return spec.kind == "linear" or spec.rate > 1


def _softmax_forward(how, q, k, v):
    """(o, w, c) as in `gpu_softmax`."""
    if how.softmax != "triton":
        return gpu_softmax.cudnn_forward(q, k, v, how.spec.stabiliser, pad=how.softmax == "cudnn")
    out, weight, c = gpu_softmax.forward(q, k, v, how.sizes, how.interpret)
    if how.spec.stabiliser == "lse":
        return out, jnp.ones_like(weight), c + jnp.log(weight)
    return out, weight, c


def _softmax_backward(how, q, k, v, g, y, delta, total):
    if how.softmax != "triton":
        return gpu_softmax.cudnn_backward(q, k, v, g, y, total, pad=how.softmax == "cudnn")
    return gpu_softmax.backward(q, k, v, g, delta, total, how.sizes, how.interpret)


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
    return _linear_sums(how, q, k, v, phi)[0]


def _linear_sums(how, q, k, v, phi):
    sums = _state(how, k, v, phi)
    return gpu_linear.read(q, None, _weights(phi, "q", q), _parts(sums, q), *_rest(how), divide=False), sums


def _linear_forward(how, q, k, v, phi):
    inputs = () if any(x.perturbed for x in (q, k, v)) else None  # as structure: residuals are arrays
    q, k, v, phi = q.value, k.value, v.value, jax.tree.map(lambda x: x.value, phi)
    out, sums = _linear_sums(how, q, k, v, phi)
    return out, (q, k, v, phi, sums, inputs)


def _linear_part_backward(how, residuals, cotangents):
    q, k, v, phi, sums, inputs = residuals
    dn, dl = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents)
    dphi, (dq, dk, dv) = _linear_backward(how, q, k, v, phi, sums, dn.astype(q.dtype), dl, inputs is not None)
    return dq, dk, dv, dphi


_linear_part.defvjp(_linear_forward, _linear_part_backward, symbolic_zeros=True)


def _linear_backward(how, q, k, v, phi, sums, dn, dl, inputs: bool):
    """Gradients of the linear part's sums: (in phi, (in q, k and v; None unless `inputs`)).

    Args:
        how: what is static.
        q: queries.
        k: keys.
        v: values.
        phi: parameters of both maps.
        sums: state and normaliser, float32.
        dn: cotangent of the numerator [b, n, h, d], in the dtype of `q`.
        dl: of the denominator [b, h, n], float32.
        inputs: whether gradients in q, k and v are asked for.
    """
    rest, keys = _rest(how), _keys_map(how.spec)
    weights_q, weights_k = _weights(phi, "q", q), _weights(phi, keys, k)
    state, normaliser = sums
    dy_q, dstate, dnormaliser = gpu_linear_backward.query(
        q, dn, dl, weights_q, (state.astype(q.dtype), normaliser), *rest
    )
    dstate, dnormaliser = how.total((dstate, dnormaliser))
    dsums = dstate.astype(k.dtype), dnormaliser
    dy_k, dv = gpu_linear_backward.key(k, v, _keep(how, k), weights_k, dsums, *rest, values=inputs)
    dphi = jax.tree.map(jnp.zeros_like, phi)
    for name, x, dy, weights in (("q", q, dy_q, weights_q), (keys, k, dy_k, weights_k)):
        found = gpu_linear_backward.parameters(x, dy, weights, *rest)
        dphi[name] = jax.tree.map(jnp.add, dphi[name], _unpadded(found, phi[name]))
    if not inputs:
        return dphi, (None, None, None)
    dq = gpu_linear_backward.inputs(q, dy_q, weights_q, *rest)
    dk = gpu_linear_backward.inputs(k, dy_k, weights_k, *rest)
    return dphi, (dq, dk, dv)


def _unpadded(gradients, phi) -> dict[str, Array]:
    """Gradients of `gpu_phi.operands` as those of φ's parameters."""
    named = dict(zip(("w0", "b0", "w1", "b1"), gradients))
    return {name: named[name][tuple(map(slice, x.shape))].astype(x.dtype) for name, x in phi.items()}


def _state(how, k, v, phi):
    return how.total(gpu_linear.state(k, v, _keep(how, k), _weights(phi, _keys_map(how.spec), k), *_rest(how)))


def _keep(how, k) -> Array:
    if how.shard is not None:
        return how.shard.linear_keys(how.grid, how.spec, k.shape[1])
    return jnp.asarray(linear_keys(how.grid, how.spec, k.shape[1]))


def _keys_map(spec: AttentionSpec) -> str:
    return "q" if spec.feature_map.shared else "k"


def _weights(phi, name, x):
    return gpu_phi.operands(phi[name], x.dtype)


def _parts(sums, q):
    return gpu_linear.in_parts(sums, q.dtype)


def _rest(how):
    return how.spec.feature_map, how.sizes, how.interpret
