"""φ of one head on a tile of tokens and its derivative, in registers: what the GPU kernels fuse with their sums.

A tile's φ is computed as flash attention computes its output: a loop over chunks of hidden units, each of which exists
in registers only, with the pre-activations of φ as accumulators, one [t, d] for each power of the polynomial. (Triton
can't slice a value in registers, hence an accumulator per power.) Where there would be too many of them, the loop runs
several times, each for some of the powers. Weights, 192 KiB a head and map at D = 128, P = 2, don't fit beside
everything else; they come from the L2 cache for every tile. At 32,760 tokens and 12 heads and with tiles of 64 tokens
that is 1.2 GB for a map.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hybrid_dit.array_typing import Array, DTypeLike, PyTree
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.kernels.gpu_tiles import LONGEST, Tile, dot, slices
from hybrid_dit.ops.spec import FeatureMapSpec

LOG2E = math.log2(math.e)
GELU = math.sqrt(2 / math.pi)
# log(1 + e) / e on [0, 1]: of all cubic polynomials the one with the smallest relative error, 2^-11.3.
LOG1P = (0.99960704, -0.48641442, 0.25402585, -0.074343672)

_POLY = feature_maps.FEATURE_MAPS["poly"].apply  # by function: a user may register another map under this name


def fits(spec: FeatureMapSpec) -> bool:
    """Whether φ is computed here: the paper's polynomial after two layers, but of squares, whose sign is lost."""
    entry = feature_maps.FEATURE_MAPS.get(spec.kind)
    return entry is not None and entry.apply is _POLY and spec.layers == 2 and spec.activation != "square"


def operands(phi: PyTree, dtype: DTypeLike) -> tuple[Array, Array, Array, Array]:
    """w0 [h, d, hidden], b0 [h, hidden], w1 [h, hidden, f], b1 [h, f] of one map: matrices in `dtype`, biases float32.

    Hidden units are padded to a multiple of `LONGEST` with zeros, which gelu keeps.
    """
    missing = -phi["b0"].shape[-1] % LONGEST
    w0, b0 = (jnp.pad(phi[x], (*((0, 0),) * (phi[x].ndim - 1), (0, missing))) for x in ("w0", "b0"))
    w1 = jnp.pad(phi["w1"], ((0, 0), (0, missing), (0, 0)))
    return w0.astype(dtype), b0.astype(jnp.float32), w1.astype(dtype), phi["b1"].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Phi:
    """Functions of float32 tiles in a kernel.

    Attributes:
        spec: of the map; `fits` it.
        exact: whether for float32 inputs. Otherwise errors of 2^-11 are taken, a quarter of a rounding to
            bfloat16; (p + 1) times that in the features of power p.
        ptx: whether in a compiled kernel, where single instructions approximate tanh, powers of 2 and roots.
    """

    spec: FeatureMapSpec
    exact: bool
    ptx: bool

    def exp2(self, x: Array) -> Array:
        """2^x."""
        return _instruction("ex2.approx.ftz.f32", x) if self.ptx else jnp.exp2(x)

    def _tanh_of_gelu(self, y):
        square = y * y
        u = y * (GELU + 0.044715 * GELU * square)
        return (plgpu.approx_tanh(u) if self.ptx else jnp.tanh(u)), square

    def gelu(self, y: Array) -> Array:
        """y (1 + tanh u) / 2 with u = GELU (y + 0.044715 y³), as `jax.nn.gelu`."""
        half = 0.5 * y
        return half + half * self._tanh_of_gelu(y)[0]

    def gelu_and_slope(self, y: Array) -> tuple[Array, Array]:
        """`gelu` and its derivative."""
        tanh, square = self._tanh_of_gelu(y)
        half = 0.5 * y
        inner = GELU + 3 * 0.044715 * GELU * square
        return half + half * tanh, 0.5 + 0.5 * tanh + half * (1.0 - tanh * tanh) * inner

    def features(self, y: Array, power: int) -> Array:
        """ψ(y) to the power `power` + 1 of pre-activations y."""
        psi = self._activation(y)
        return self._times_power(psi, psi, power)

    def slope(self, features: Array, power: int) -> Array:
        """Derivative of `features` in y, from their values in float32; 0 where they are 0."""
        psi = self._root(features, power)
        return (power + 1) * self._times_power(self._slope(psi), psi, power)

    def _root(self, features, power):
        """ψ, of which `features` are the power `power` + 1."""
        if power == 0:
            return features
        if power == 1:
            return _instruction("sqrt.approx.ftz.f32", features) if self.ptx else jnp.sqrt(features)
        log2 = _instruction("lg2.approx.ftz.f32", features) if self.ptx else jnp.log2(features)
        return self.exp2(log2 * (1.0 / (power + 1)))

    def _slope(self, psi):
        """ψ'(y) from ψ(y)."""
        match self.spec.activation:
            case "softplus":  # 1 − exp(−ψ), of which little is left where ψ is small: then its series, off by ψ⁴ / 120
                if self.exact:
                    return -jnp.expm1(-psi)
                series = psi * (1.0 - psi * (0.5 - psi * (1 / 6 - psi * (1 / 24))))
                return jnp.where(psi < 0.125, series, 1.0 - self.exp2(-LOG2E * psi))
            case "relu":
                return jnp.where(psi > 0, 1.0, 0.0)
            case "exp":  # constant from y = 12 on, which 16 bits know to 2^-8
                return jnp.where(psi < math.exp(12.0) * (1 - (2.0**-20 if self.exact else 2.0**-8)), psi, 0.0)
            case "elu":
                return jnp.minimum(psi, 1.0)
            case name:
                raise NotImplementedError(name)

    def _times_power(self, first, psi, power):
        """first · ψ^power."""
        for _ in range(power):
            first = first * psi
        return first

    def _activation(self, y):
        """ψ(y), as `feature_maps` defines it."""
        match self.spec.activation:
            case "softplus":  # with e = exp(−|y|) <= 1: max(y, 0) + log(1 + e)
                e = self.exp2(-LOG2E * jnp.abs(y))
                return jnp.maximum(y, 0.0) + (jnp.log1p(e) if self.exact else e * _polynomial(e, LOG1P))
            case "relu":
                return jnp.maximum(y, 0.0)
            case "exp":
                return self.exp2(LOG2E * jnp.minimum(y, 12.0))
            case "elu":
                return jnp.where(y > 0, y + 1.0, self.exp2(LOG2E * jnp.minimum(y, 0.0)))
            case name:
                raise NotImplementedError(name)

    def pre_activations(self, x: Array, refs, chunk: int, parts: Sequence | None = None) -> list[Array]:
        """gelu(x w0 + b0) w1 + b1 of a tile [t, d], in slices of width d: float32 [t, d] each.

        Args:
            x: the tile.
            refs: w0 [d, hidden], b0 [hidden], w1 [hidden, s·d], b1 [s·d] of one head.
            chunk: hidden units at a time.
            parts: the columns of w1 to take, a `pl.ds` for each slice; all of them unless given.
        """
        w0, b0, w1, b1 = refs
        parts = slices(x.shape[1], w1.shape[1]) if parts is None else parts

        def step(j, ys):
            hidden = pl.ds(j * chunk, chunk)
            h = self.gelu(dot(x, w0[:, hidden]) + b0[hidden][None]).astype(x.dtype)
            return tuple(y + dot(h, w1[hidden, part]) for y, part in zip(ys, parts))

        zeros = (jnp.zeros(x.shape, jnp.float32),) * len(parts)
        ys = jax.lax.fori_loop(0, w0.shape[1] // chunk, step, zeros)
        return [y + b1[part][None] for y, part in zip(ys, parts)]

    def each_power(self, x: Array, refs, tile: Tile):
        """Yields (power, its columns of the features, pre-activations [t, d]) for all powers, ready when asked for."""
        parts, size = slices(x.shape[1], refs[2].shape[1]), max(1, tile.width // x.shape[1])
        for first in range(0, len(parts), size):
            group = parts[first : first + size]
            for power, y in enumerate(self.pre_activations(x, refs, tile.chunk, group), first):
                yield power, parts[power], y


def make(spec: FeatureMapSpec, dtype: DTypeLike, interpret: bool) -> Phi:
    """φ for inputs of a dtype."""
    exact = dtype == jnp.float32
    return Phi(spec, exact, ptx=not (exact or interpret))


def _instruction(name: str, x: Array) -> Array:
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    (out,) = plgpu.elementwise_inline_asm(
        f"{name} $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape]
    )
    return out


def _polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    out = jnp.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        out = out * x + c
    return out
