"""All rates from one pass over the keys, against the float64 oracle and against each rate computed alone."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from hybrid_dit.ops import nested, row_max, softmax
from hybrid_dit.ops.spec import PATTERNS, STABILISERS, AttentionSpec
from hybrid_dit.ops.tokens import softmax_tokens

U32, U16 = 2.0**-24, 2.0**-8  # unit roundoff of float32 and bfloat16
GRIDS = [(3, 4, 5), (2, 3, 8), (1, 2, 3)]  # odd sizes; a width that the rates divide; fewer tokens than R = 8
RATES = [(2, 4, 8), (3, 6), (1, 2), (4,)]


def point(grid, batch=2, heads=2, dim=6, dtype=jnp.float32, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, math.prod(grid), heads, dim)
    return tuple(jnp.asarray(scale * rng.standard_normal(shape), dtype) for _ in range(3))


def specs_of(rates, pattern="stride", stabiliser="max"):
    return {f"R{r}": AttentionSpec("hybrid", r, pattern, stabiliser=stabiliser) for r in rates}


def exact_sums(q, k, v, spec, grid):
    """Numerator and denominator of Eq. 5 over S in float64, and the largest |s_ij|."""
    q, k, v = oracle.float64((q, k, v))
    rows = oracle.softmax_rows(grid, spec.rate, spec.pattern)
    s = np.einsum("bnhd,bmhd->bnhm", q, k) / q.shape[-1] ** 0.5
    largest = np.abs(s).max()
    s, v = s[..., rows], v[:, rows]
    c = s.max(-1, keepdims=True)
    if spec.stabiliser == "lse":
        c = c + np.log(np.exp(s - c).sum(-1, keepdims=True))
    p = np.exp(s - c)
    return np.einsum("bnhm,bmhd->bnhd", p, v), p.sum(-1), largest


def worst_case(n, d, largest, pieces):
    """Relative error of a sum of n weights, in roundoffs: the exponent (absolute, so times |s|), and the sums.

    Each merge adds an exponential of a difference of maxima (at most 2|s|, itself off by that much in roundoffs) and
    three more operations; "lse" divides once.
    """
    return n + largest * (d + 4) + pieces * (2 * largest * 2 + 4) + 1


@pytest.mark.parametrize("pattern, stabiliser", list(itertools.product(PATTERNS, STABILISERS)))
@pytest.mark.parametrize("rates", RATES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sums_of_every_rate_and_the_teacher_match_the_oracle(grid, rates, pattern, stabiliser):
    q, k, v = point(grid)
    specs = {**specs_of(rates, pattern, stabiliser), "linear": AttentionSpec("linear", pattern=pattern)}
    chain, rest = nested.nested_chain(grid, rates, pattern)
    assert not rest
    teacher, sums = nested.nested_sums(q, k, v, specs, grid)
    assert list(sums) == list(specs) and sums["linear"] == (0, 0)
    largest_v = float(jnp.abs(v).max())
    for label, spec in specs.items():
        if spec.kind == "linear":
            continue
        numerator, denominator, largest = exact_sums(q, k, v, spec, grid)
        relative = worst_case(q.shape[1], q.shape[3], largest, len(chain)) * U32
        got = oracle.float64(sums[label])
        assert (np.abs(got[1] - denominator) <= relative * denominator).all()
        assert (np.abs(got[0] - numerator) <= relative * denominator[..., None] * largest_v).all()
    expected = oracle.attention(oracle.Point(*oracle.float64((q, k, v)), {}), AttentionSpec(), grid)
    assert np.abs(oracle.float64(teacher) - expected).max() <= 2 * relative * largest_v


def test_maxima_are_those_of_each_rates_own_tokens():
    """Logits of 1e4: relative to the maximum over all keys a rate's sums would underflow to 0 / 0."""
    grid = (2, 3, 8)
    q, k, v = point(grid, scale=60.0)
    _, sums = nested.nested_sums(q, k, v, specs_of((2, 4, 8)), grid)
    for _, denominator in sums.values():
        assert (denominator >= 1 - 4 * U32).all()  # the maximum's own term


def test_chains_are_found_by_token_sets():
    assert nested.nested_chain((2, 3, 8), [8, 2, 4], "stride") == ([2, 4, 8], [])
    assert nested.nested_chain((2, 3, 8), [2, 3, 6], "stride") == ([2, 6], [3])
    assert nested.nested_chain((2, 3, 8), [2, 3, 6, 12], "lattice") == ([2, 6, 12], [3])
    # 3 doesn't divide 5, but on 4 tokens S(5) = {0} and S(3) = {0, 3}.
    assert nested.nested_chain((1, 1, 4), [3, 5], "stride") == ([3, 5], [])
    for pattern, grid in itertools.product(PATTERNS, [*GRIDS, (21, 30, 52)]):
        sets = [set(softmax_tokens(grid, r, pattern)) for r in (2, 4, 8, 16)]
        assert all(inner <= outer for outer, inner in itertools.pairwise(sets))


def test_rates_that_do_not_nest_fall_back_and_say_so():
    grid = (3, 4, 5)
    q, k, v = point(grid)
    specs = specs_of((2, 3, 4))
    note = nested.fallback_note(specs, grid)
    assert "R3" in note and "R2" not in note and "R4" not in note
    assert not nested.fallback_note(specs_of((2, 4)), grid)
    assert not nested.fallback_note({"linear": AttentionSpec("linear")}, grid)
    _, sums = nested.nested_sums(q, k, v, specs, grid)
    for label, spec in specs.items():
        numerator, denominator, largest = exact_sums(q, k, v, spec, grid)
        relative = worst_case(q.shape[1], q.shape[3], largest, 2) * U32
        assert (np.abs(oracle.float64(sums[label][1]) - denominator) <= relative * denominator).all()


def test_patterns_can_be_mixed():
    grid = (2, 3, 8)
    q, k, v = point(grid)
    specs = {"a": AttentionSpec("hybrid", 4, "stride"), "b": AttentionSpec("hybrid", 2, "lattice", stabiliser="lse")}
    _, sums = nested.nested_sums(q, k, v, specs, grid)
    for label, spec in specs.items():
        _, denominator, largest = exact_sums(q, k, v, spec, grid)
        relative = worst_case(q.shape[1], q.shape[3], largest, 2) * U32
        assert (np.abs(oracle.float64(sums[label][1]) - denominator) <= relative * denominator).all()


def test_a_shard_of_the_queries_gives_its_rows():
    grid = (2, 3, 8)
    q, k, v = point(grid)
    whole = nested.nested_sums(q, k, v, specs_of((2, 4)), grid)
    part = nested.nested_sums(q[:, 10:21], k, v, specs_of((2, 4)), grid)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part)):
        np.testing.assert_allclose(a[:, 10:21], b, rtol=0, atol=48 * U32 * float(jnp.abs(a).max()))  # sums of 48 terms


def test_no_gradient_flows():
    grid = (1, 2, 4)
    q, k, v = point(grid)

    def total(q, k, v):
        return sum(x.sum() for x in jax.tree.leaves(nested.nested_sums(q, k, v, specs_of((2, 4)), grid)))

    assert not any(g.any() for g in jax.grad(total, argnums=(0, 1, 2))(q, k, v))


def test_no_n_by_n_array(monkeypatch):
    """Temporaries grow as N, not as N², and stay far below one score matrix."""
    monkeypatch.setattr(softmax, "MAX_SCORES", 2**16)

    def temporaries(n):
        x = jax.ShapeDtypeStruct((1, n, 2, 8), jnp.float32)
        f = jax.jit(lambda q, k, v: nested.nested_sums(q, k, v, specs_of((2, 4, 8)), (n // 64, 8, 8)))
        return f.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < min(4 * 4096**2 * 2 / 8, 2.5 * temporaries(2048))


# The GPU's path, with its two kernels replaced or interpreted


@pytest.mark.parametrize("n, m, dtype", [(130, 257, jnp.float32), (128, 128, jnp.bfloat16)])
def test_row_max_is_exact_on_the_same_products(n, m, dtype):
    rng = np.random.default_rng(0)
    # Small integers: products and sums are exact in any order, so the maximum must be too.
    q, k = (jnp.asarray(rng.integers(-4, 5, (1, size, 2, 16)), dtype) for size in (n, m))
    got = row_max.row_max(q, k, interpret=True)
    scores = np.einsum("bnhd,bmhd->bnhm", *oracle.float64((q, k)))
    np.testing.assert_array_equal(got, (scores.max(-1) / 4).astype(np.float32))
    assert row_max.fits(16) and row_max.fits(128) and not row_max.fits(24) and not row_max.fits(256)


@pytest.mark.parametrize("stabiliser", STABILISERS)
def test_log_sum_exps_merge_to_the_same_sums(stabiliser, monkeypatch):
    """What a GPU does, with cuDNN's kernel replaced by its definition: output [b, n, h, d], residual [b, h, n]."""
    grid = (2, 3, 8)
    q, k, v = point(grid)
    expected = nested.nested_sums(q, k, v, specs_of((2, 4, 8), stabiliser=stabiliser), grid)
    calls = []

    def cudnn(q, k, v, *, scale, return_residual):
        calls.append(k.shape[1])
        s = jnp.einsum("bnhd,bmhd->bhnm", q, k) * scale
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(s), v), jax.nn.logsumexp(s, axis=-1)

    def interpreted(q, k):
        return (jnp.einsum("bnhd,bmhd->bnhm", q, k) * q.shape[-1] ** -0.5).max(-1)

    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", cudnn)
    monkeypatch.setattr(nested, "fused_on_gpu", lambda q: True)
    monkeypatch.setattr(row_max, "row_max", interpreted)
    monkeypatch.setattr(row_max, "fits", lambda d: True)
    got = nested.nested_sums(q, k, v, specs_of((2, 4, 8), stabiliser=stabiliser), grid)
    assert sorted(calls) == [6, 6, 12, 24]  # every key once
    _, _, largest = exact_sums(q, k, v, AttentionSpec("hybrid", 2), grid)
    relative = 2 * worst_case(48, 6, largest, 4) * U32
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got)):
        np.testing.assert_allclose(b, a, rtol=0, atol=relative * float(jnp.abs(a).max()))


@pytest.mark.parametrize("backend, kernel, count", [("gpu", "hybrid_softmax", 2), ("tpu", "hybrid_outputs", 3)])
def test_kernels_take_the_keys(backend, kernel, count):
    """A GPU's those whose maximum is asked for, S(4) and S(2) without S(4); a TPU's all."""
    grid, d = (2, 3, 8), 16
    q, k, v = point(grid, batch=1, dim=d)
    runs = {b: jax.jit(lambda *x, b=b: nested.nested_sums(*x, specs_of((2, 4)), grid, b)) for b in ("xla", backend)}
    assert str(jax.make_jaxpr(runs[backend])(q, k, v)).count(f"name={kernel}\n") == count
    _, _, largest = exact_sums(q, k, v, AttentionSpec("hybrid", 2), grid)
    relative = 2 * worst_case(48, d, largest, 3) * U32
    for a, b in zip(*(jax.tree.leaves(run(q, k, v)) for run in runs.values())):
        np.testing.assert_allclose(b, a, rtol=0, atol=relative * float(jnp.abs(a).max()))


def test_16_bit_inputs_lose_only_what_is_rounded():
    grid = (2, 3, 8)
    q, k, v = point(grid, dtype=jnp.bfloat16)
    teacher, sums = nested.nested_sums(q, k, v, specs_of((2, 4)), grid)
    assert teacher.dtype == jnp.bfloat16 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(sums))
    expected = oracle.attention(oracle.Point(*oracle.float64((q, k, v)), {}), AttentionSpec(), grid)
    # Weights are rounded to 16 bits before they meet v, then the output is: independent, each at most u / 2 rms.
    assert np.linalg.norm(oracle.float64(teacher) - expected) <= U16 * np.linalg.norm(expected)
