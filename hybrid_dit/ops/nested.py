"""The softmax parts of all rates, and the teacher's attention, for the price of the teacher's attention alone.

Softmax tokens nest when rates divide each other, S(8) ⊂ S(4) ⊂ S(2) ⊂ T. Sums over the disjoint pieces S(8),
S(4)\\S(8), S(2)\\S(4), T\\S(2) are taken once and merged, which gives Eq. 5's softmax sums at every rate and softmax
over T.

Values only: nothing here is differentiable. In distillation no gradient flows through q, k, v.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.ops import backends, row_max
from hybrid_dit.ops.hybrid import softmax_part
from hybrid_dit.ops.kernels import gpu_softmax, tpu_hybrid
from hybrid_dit.ops.kernels.gpu_tiles import Tiles
from hybrid_dit.ops.softmax import fused_on_gpu, softmax_sums
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid, softmax_tokens


class Sums(NamedTuple):
    """Softmax sums over a set of keys, float32: those of disjoint sets can be merged.

    Attributes:
        numerator: Σ_j exp(s_ij − c_i) v_j, [b, n, h, d].
        denominator: Σ_j exp(s_ij − c_i), [b, n, h].
        c: max_j s_ij, or another number near it where the maximum is not asked for, [b, n, h].
    """

    numerator: Array
    denominator: Array
    c: Array


def nested_chain(grid: Grid, rates: Sequence[int], pattern: str) -> tuple[list[int], list[int]]:
    """Splits rates into a chain of nested token sets, densest first, and the rest; nesting is checked set by set.

    The densest rate is always in the chain: it is the dearest to compute by itself.
    """
    chain, rest = [], []
    outer = None
    for rate in sorted(set(rates)):
        tokens = set(softmax_tokens(grid, rate, pattern).tolist())
        if tokens and (outer is None or tokens <= outer):
            chain.append(rate)
            outer = tokens
        else:
            rest.append(rate)
    return chain, rest


def fallback_note(specs: Mapping[str, AttentionSpec], grid: Grid) -> str:
    """Returns what to tell the user about rates that get a softmax of their own, "" if there is none."""
    alone = [label for label, spec in specs.items() if spec.kind == "hybrid" and label not in _chained(specs, grid)]
    if not alone:
        return ""
    return (
        f"note: the softmax tokens of {', '.join(alone)} do not nest with those of the other rates; "
        "each takes a softmax of its own at every step"
    )


def nested_sums(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    specs: Mapping[str, AttentionSpec],
    grid: Grid,
    backend: str = "xla",
) -> tuple[Float[Array, "b n h d"], dict[str, tuple[Array, Array]]]:
    """Softmax attention over all keys, and the softmax part of Eq. 5 for every spec.

    Args:
        q: queries, all of them or a shard.
        k: keys of every token of the grid (m of them).
        v: values, likewise.
        specs: label -> attention.
        grid: of the tokens.
        backend: a name of `ops.backends.BACKENDS`. With "tpu" our kernel takes all keys; with "gpu" one of ours takes
            the keys whose maximum is asked for.

    Returns:
        (softmax(q kᵀ) v in the dtype of `q`, {label: numerator [b, n, h, d] and denominator [b, n, h], as
        `ops.hybrid.softmax_part` returns them}). No gradient flows through any of it.
    """
    q, k, v = jax.lax.stop_gradient((q, k, v))
    chained = _chained(specs, grid)
    out = {label: softmax_part(q, k, v, spec, grid) for label, spec in specs.items() if label not in chained}
    need_max = any(specs[label].stabiliser == "max" for label in chained)
    chosen = {backends.choose(backend, spec, q.shape[-1], q.dtype) for spec in (*specs.values(), AttentionSpec())}
    kernel = next((name for name in ("tpu", "gpu") if name in chosen), "")

    sums, inner = None, np.array([], np.int32)
    for label in sorted(chained, key=lambda label: -specs[label].rate):  # from the fewest keys to the most
        spec = specs[label]
        tokens = softmax_tokens(grid, spec.rate, spec.pattern)
        sums = _add_keys(sums, q, k, v, np.setdiff1d(tokens, inner), need_max, kernel)
        out[label] = sums.numerator, sums.denominator
        if spec.stabiliser == "lse":  # c_i is the log-sum-exp: the softmax part is normalised
            out[label] = sums.numerator / sums.denominator[..., None], jnp.ones_like(sums.denominator)
        inner = tokens
    sums = _add_keys(sums, q, k, v, np.setdiff1d(np.arange(k.shape[1]), inner), need_max=False, kernel=kernel)
    teacher = (sums.numerator / sums.denominator[..., None]).astype(q.dtype)
    return teacher, {label: out[label] for label in specs}


def _chained(specs: Mapping[str, AttentionSpec], grid: Grid) -> set[str]:
    """Labels of the hybrid specs whose token sets nest with each other; all of one pattern, the first one's."""
    hybrid = {label: spec for label, spec in specs.items() if spec.kind == "hybrid"}
    if not hybrid:
        return set()
    pattern = next(iter(hybrid.values())).pattern
    alike = {label: spec.rate for label, spec in hybrid.items() if spec.pattern == pattern}
    chain, _ = nested_chain(grid, list(alike.values()), pattern)
    return {label for label, rate in alike.items() if rate in chain}


def _add_keys(sums: Sums | None, q, k, v, index: np.ndarray, need_max: bool, kernel: str) -> Sums:
    """Adds the keys of `index`: cuDNN's kernel on a GPU with 16-bit inputs, elsewhere tiles of XLA operations.

    `kernel` has ours instead, for "tpu" or "gpu". cuDNN gives log-sum-exps but no maxima. Where the maximum is part of
    the function (c_i of Eq. 5), our kernel for GPUs takes its place, which is slower than cuDNN's; without it another
    one takes the maximum beside cuDNN's, at the price of computing q·k of these keys once more.
    """
    if not len(index):  # two labels with the same tokens, or R = 1
        return sums
    k, v = _take(k, index), _take(v, index)
    if kernel == "tpu":
        piece = Sums(*tpu_hybrid.softmax_sums(q, k, v))
    elif need_max and kernel == "gpu":
        piece = _flash(q, k, v)
    elif fused_on_gpu(q) and (row_max.fits(q.shape[-1]) or not need_max):
        piece = _cudnn(q, k, v, need_max)
    else:
        piece = Sums(*softmax_sums(q, k, v))
    return piece if sums is None else _merge(sums, piece)


def _merge(a: Sums, b: Sums) -> Sums:
    c = jnp.maximum(a.c, b.c)
    scale_a, scale_b = jnp.exp(a.c - c), jnp.exp(b.c - c)
    numerator = scale_a[..., None] * a.numerator + scale_b[..., None] * b.numerator
    return Sums(numerator, scale_a * a.denominator + scale_b * b.denominator, c)


def _take(x: Array, index: np.ndarray) -> Array:
    """x[:, index]; as a strided slice where the indices are evenly spaced, which is cheaper than a gather."""
    steps = np.unique(np.diff(index))
    if len(steps) == 1:
        return x[:, int(index[0]) : int(index[-1]) + 1 : int(steps[0])]
    return jnp.take(x, index, axis=1)


def _flash(q, k, v) -> Sums:
    output, weight, c = gpu_softmax.forward(q, k, v, Tiles(), interpret=jax.default_backend() != "gpu")
    weight, c = jnp.moveaxis(weight, 1, 2), jnp.moveaxis(c, 1, 2)  # [b, h, n] -> [b, n, h]
    return Sums(output.astype(jnp.float32) * weight[..., None], weight, c)


def _cudnn(q, k, v, need_max: bool) -> Sums:
    """cuDNN's normalised output is a numerator relative to the log-sum-exp, with denominator 1.

    `jax.nn.dot_product_attention` rounds the log-sum-exp to the output's 16 bits, 3% of a weight; hence the inner one.
    """
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    output, lse = dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, return_residual=True)
    lse = jnp.moveaxis(lse.astype(jnp.float32), 1, 2)  # [b, h, n] -> [b, n, h]
    output = output.astype(jnp.float32)
    if not need_max:
        return Sums(output, jnp.ones_like(lse), lse)
    c = row_max.row_max(q, k)
    denominator = jnp.exp(lse - c)
    return Sums(output * denominator[..., None], denominator, c)
