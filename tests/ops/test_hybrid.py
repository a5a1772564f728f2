"""One harness over every kind, pattern, feature map and stabiliser: values and VJP against the float64 oracle.

A map entered in `FEATURE_MAPS` is picked up here by itself.
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import Point

from hybrid_dit.errors import UserError
from hybrid_dit.ops import feature_maps, hybrid, softmax
from hybrid_dit.ops.hybrid import attention, combine, linear_part, softmax_part
from hybrid_dit.ops.spec import ACTIVATIONS, PATTERNS, STABILISERS, AttentionSpec, FeatureMapSpec

U32, U16 = 2.0**-24, 2.0**-8  # unit roundoff of float32 and bfloat16
D = 6

# (grid, rate, batch, heads): N odd and not divisible by R; one softmax token, R > N; R = 1, no linear token; even.
ODD, SPARSE, DENSE, EVEN = ((3, 3, 5), 2, 2, 3), ((1, 2, 3), 8, 1, 1), ((2, 3, 4), 1, 1, 3), ((2, 2, 8), 4, 2, 1)
VARIANTS = list(itertools.product(PATTERNS, STABILISERS))


def specs(kind_of_map, rate):
    """Linear and every hybrid variant of one feature map."""
    fm = FeatureMapSpec(kind=kind_of_map, degree=3, layers=2) if rate == 2 else FeatureMapSpec(kind=kind_of_map)
    yield AttentionSpec(kind="linear", feature_map=fm)
    for pattern, stabiliser in VARIANTS:
        yield AttentionSpec("hybrid", rate, pattern, fm, stabiliser)


def cases():
    """Everything crossed on the odd shape; on the other shapes every map, with pattern and stabiliser in rotation."""
    for shape in (ODD, SPARSE, DENSE, EVEN):
        yield AttentionSpec(), shape
    for i, name in enumerate(feature_maps.FEATURE_MAPS):
        for spec in specs(name, ODD[1]):
            yield spec, ODD
        for j, shape in enumerate((SPARSE, DENSE, EVEN)):
            yield list(specs(name, shape[1]))[1 + (i + j) % 4], shape

    for activation in ACTIVATIONS[1:]:  # softplus is above
        yield AttentionSpec("hybrid", EVEN[1], feature_map=FeatureMapSpec(activation=activation)), EVEN
    knobs = {"hidden": 5, "shared": True}
    yield AttentionSpec("hybrid", ODD[1], "lattice", FeatureMapSpec(degree=2, layers=3, **knobs)), ODD
    yield AttentionSpec("linear", feature_map=FeatureMapSpec("hedgehog", shared=True)), EVEN


def name_of(value):
    if isinstance(value, AttentionSpec):
        fm = value.feature_map
        knobs = [str(x) for x in (fm.hidden, fm.activation, fm.shared) if x not in (0, "softplus")]
        return "-".join([value.label, value.pattern, value.stabiliser, fm.kind, *knobs])
    return "x".join(map(str, value[0]))


def make_point(spec, shape, dtype=jnp.float32, seed=0):
    """Random q, k, v [b, n, h, D] in `dtype` and φ in float32 with values of `dtype`, as in mixed precision.

    Biases are random too: a zero would hide a missing one.
    """
    grid, _, batch, heads = shape
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((batch, math.prod(grid), heads, D)), dtype) for _ in range(3))
    phi = feature_maps.init(jax.random.key(seed), heads, D, spec.feature_map) if spec.converted else {}
    phi = jax.tree.map(lambda x: jnp.asarray(x + 0.2 * rng.standard_normal(x.shape), dtype).astype(jnp.float32), phi)
    return Point(q, k, v, phi)


def run(spec, grid, point, cotangent):
    """Output and VJP of the attention under test, in one compiled program."""

    # The same graph in a third less time: what LLVM makes of it is not under test.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(point, cotangent):
        y, vjp = jax.vjp(lambda p: attention(p.q, p.k, p.v, p.phi, spec=spec, grid=grid), point)
        return y, vjp(cotangent)[0]

    return both(point, cotangent)


def roundings(spec, exact):
    """Worst case, in units of the roundoff, of a weight's relative error: all roundings on its longest way agree.

    D products and an exponential, scaled by |s| as an exponent's error is absolute; the layers of φ with about ten
    element-wise roundings each, times the power, twice (φ_q and φ_k); the product over F; the sum over N.
    """
    n, d = exact.q.shape[1], exact.q.shape[3]
    s = np.abs(np.einsum("bnhd,bmhd->bhnm", exact.q, exact.k)).max() / d**0.5
    fm = spec.feature_map
    f = fm.degree * d
    return n + s * (d + 4) + (2 * fm.degree * fm.layers * (f + 10) + f if spec.converted else 0)


def check_values(spec, grid, point, cotangent):
    """Values in float32 agree with the oracle to the worst case of rounding; returns the VJP, known to be finite."""
    exact = oracle.float64(point)
    y, gradient = run(spec, grid, point, cotangent)
    # Relative errors of at most r in the weights move a weighted mean of v by at most 2 r max|v|.
    bound = 2 * roundings(spec, exact) * U32 * np.abs(exact.v).max()
    assert np.abs(oracle.float64(y) - oracle.attention(exact, spec, grid)).max() <= bound
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    return gradient


def vjp_errors(exact, cotangent, gradient, spec, grid):
    """For three random directions u in each leaf: its name, |⟨g, u⟩ − oracle|, and |g| |u| (g: the leaf's gradient)."""
    rng = np.random.default_rng(2)
    leaves, tree = jax.tree_util.tree_flatten_with_path(exact)
    for i, (g, (path, leaf)) in enumerate(zip(jax.tree.leaves(gradient), leaves)):
        for _ in range(3):
            u = rng.standard_normal(leaf.shape)
            direction = jax.tree.unflatten(tree, [u if i == j else np.zeros_like(x) for j, (_, x) in enumerate(leaves)])
            expected = np.vdot(cotangent, oracle.attention_tangent(exact, direction, spec, grid))
            yield jax.tree_util.keystr(path), abs(np.vdot(g, u) - expected), np.linalg.norm(g) * np.linalg.norm(u)


def check(spec, grid, point):
    """Values and VJP in float32 agree with the oracle to the worst case of float32 rounding, and to 1e-5."""
    exact = oracle.float64(point)
    cotangent = np.random.default_rng(1).standard_normal(point.q.shape).astype(np.float32)
    gradient = check_values(spec, grid, point, cotangent)
    # The backward pass goes the chain once more, numerator and denominator each: 4 instead of 2 times the worst case.
    # 1e-9: what central differences in float64 leave of a gradient that is zero.
    relative = 4 * roundings(spec, exact) * U32
    for leaf, error, size in vjp_errors(exact, cotangent, oracle.float64(gradient), spec, grid):
        assert error <= min(relative, 1e-5) * size + 1e-9, leaf


@pytest.mark.parametrize("spec, shape", list(cases()), ids=name_of)
def test_values_and_vjp_match_the_oracle(spec, shape):
    check(spec, shape[0], make_point(spec, shape))


def test_a_map_registered_by_a_user_is_covered(monkeypatch):
    # Given: a map that the oracle has no twin of
    def init(key, heads, head_dim, spec):
        return {"scale": jax.random.normal(key, (heads, head_dim))}

    entry = feature_maps.FeatureMap(init, lambda params, x, spec: (x * params["scale"].astype(x.dtype)) ** 2)
    monkeypatch.setitem(feature_maps.FEATURE_MAPS, "squares", entry)
    assert "squares" not in oracle.TWINS
    # Then: it is among the cases, and they hold
    found = [(spec, shape) for spec, shape in cases() if spec.feature_map.kind == "squares"]
    assert len(found) == 8
    for spec, shape in found[::3]:
        check(spec, shape[0], make_point(spec, shape))


@pytest.mark.parametrize(
    "kind, name", [("softmax", "poly"), *itertools.product(("linear", "hybrid"), feature_maps.FEATURE_MAPS)]
)
def test_bfloat16_costs_only_the_rounding_of_what_is_stored(kind, name):
    """Against the oracle on the same rounded inputs.

    Rounding y alone is u·|y| at worst, 0.5 u·rms(y) in the mean. y is a mean of independent v, of size
    rms(v) / sqrt(N_eff), and independent roundings of p and φ average out likewise: a fraction of u·rms(y), in
    quadrature. So rms(error) <= u·rms(y); a score or a sum rounded to bfloat16 on the way breaks it.
    A gradient passes some eight rounded arrays, u / sqrt(3) each in the mean: sqrt(8 / 3) u, doubled for cancellation.
    """
    spec = AttentionSpec(kind, 2, "lattice", FeatureMapSpec(name))
    point = make_point(spec, ODD, jnp.bfloat16)
    exact = oracle.float64(point)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(point.q.shape), jnp.bfloat16)
    y, gradient = run(spec, ODD[0], point, cotangent)
    assert y.dtype == jnp.bfloat16
    expected = oracle.attention(exact, spec, ODD[0])
    assert np.linalg.norm(oracle.float64(y) - expected) <= U16 * np.linalg.norm(expected)
    for leaf, error, size in vjp_errors(exact, oracle.float64(cotangent), oracle.float64(gradient), spec, ODD[0]):
        assert error <= 2 * (8 / 3) ** 0.5 * U16 * size, leaf


def test_sums_of_the_linear_part_accumulate_in_float32():
    """Integers all the way, exact in float32 and, once past 256, not in bfloat16: sums must be exactly right."""
    spec, grid = AttentionSpec("hybrid", 2, feature_map=FeatureMapSpec("elu")), (7, 11, 13)
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(0, high, (1, math.prod(grid), 2, 4)) for high in (2, 4, 4))
    inputs = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    numerator, denominator = linear_part(*inputs, {"q": {}, "k": {}}, spec, grid)
    weights = np.einsum("bnhf,bmhf->bhnm", q + 1, (k + 1)[:, 1::2])  # elu(x) + 1 = x + 1 for x >= 0
    assert denominator.min() > 2**8 and numerator.max() < 2**24
    np.testing.assert_array_equal(denominator, weights.sum(-1).swapaxes(1, 2))
    np.testing.assert_array_equal(numerator, np.einsum("bhnm,bmhd->bnhd", weights, v[:, 1::2]))


@pytest.mark.parametrize("stabiliser", STABILISERS)
@pytest.mark.parametrize("kind", ["softmax", "hybrid"])
def test_extreme_logits(kind, stabiliser):
    # Given: logits up to ±1e4, whose exponentials overflow (and whose features dwarf the softmax part)
    spec = AttentionSpec(kind, ODD[1], "lattice", stabiliser=stabiliser)
    point = make_point(spec, ODD)
    scale = (1e4 * D**0.5 / np.abs(np.einsum("bnhd,bmhd->bhnm", point.q, point.k)).max()) ** 0.5
    point = point._replace(q=point.q * scale, k=point.k * scale)
    # Then: the error is that of float32 logits, 1e4 · (D + 4) roundings
    check_values(spec, ODD[0], point, jnp.ones_like(point.q))


@pytest.mark.parametrize("stabiliser", STABILISERS)
def test_equal_keys(stabiliser):
    spec = AttentionSpec("hybrid", ODD[1], stabiliser=stabiliser)
    point = make_point(spec, ODD)
    check(spec, ODD[0], point._replace(k=jnp.broadcast_to(point.k[:, :1], point.k.shape)))


@pytest.mark.parametrize(
    "shapes, heads, grid, message",
    [
        (((1, 6, 2, 4), (1, 6, 1, 4), (1, 6, 2, 4)), 2, (1, 2, 3), "q, k and v of one shape"),
        (((0, 6, 2, 4),) * 3, 2, (1, 2, 3), "none of them 0"),
        (((1, 8, 2, 4),) * 3, 2, (1, 2, 3), "8 tokens for a grid of 1 x 2 x 3 = 6"),
        (((1, 6, 2, 4),) * 3, 3, (1, 2, 3), "a feature map of 3 heads for q, k and v of 2"),
    ],
)
def test_shapes_that_do_not_belong_together(shapes, heads, grid, message):
    spec = AttentionSpec("hybrid", 2)
    phi = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), heads, 4, spec.feature_map))
    with pytest.raises(UserError, match=message):
        hybrid._check_shapes(*shapes, phi, grid)


def test_all_backends_refuse_them():
    x = jnp.ones((1, 8, 2, 16))
    for backend in ("xla", "tpu", "gpu"):
        with pytest.raises(UserError, match="8 tokens for a grid of 1 x 2 x 3"):
            attention(x, x, x, {}, spec=AttentionSpec("hybrid", 2), grid=(1, 2, 3), backend=backend)


@pytest.mark.parametrize("bias", [-200.0, 1e6])
@pytest.mark.parametrize("stabiliser", STABILISERS)
def test_one_part_vanishes_beside_the_other(stabiliser, bias):
    """φ underflows to 0 (y is the softmax over S), or is 1e12 (the softmax part is below a roundoff of the linear)."""
    spec = AttentionSpec("hybrid", ODD[1], stabiliser=stabiliser)
    point = make_point(spec, ODD)
    for phi in point.phi.values():
        phi["b1"] = jnp.full_like(phi["b1"], bias)
    check_values(spec, ODD[0], point, jnp.ones_like(point.q))


def test_linear_attention_survives_features_that_are_all_zero():
    spec = AttentionSpec("linear")
    point = make_point(spec, ODD)
    point.phi["q"]["b1"] = jnp.full_like(point.phi["q"]["b1"], -200.0)
    y, gradient = run(spec, ODD[0], point, jnp.ones_like(point.q))
    assert not y.any() and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_parts_combine_to_the_whole_with_the_softmax_part_given():
    """What distillation does: Eq. 5 from a softmax part computed before, differentiated in φ alone."""
    spec, grid = AttentionSpec("hybrid", 2, "lattice"), ODD[0]
    point = make_point(spec, ODD)
    _, whole = run(spec, grid, point, jnp.ones_like(point.q))
    qkv = point.q, point.k, point.v
    given = softmax_part(*qkv, spec, grid)
    grad = jax.jit(jax.grad(lambda phi: combine(given, linear_part(*qkv, phi, spec, grid)).sum()))(point.phi)
    relative = 4 * roundings(spec, oracle.float64(point)) * U32
    for g, expected in zip(jax.tree.leaves(grad), jax.tree.leaves(whole.phi)):
        assert np.linalg.norm(g - expected) <= relative * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "spec", [AttentionSpec(), AttentionSpec("hybrid", 4, "lattice"), AttentionSpec("linear")], ids=name_of
)
def test_no_n_by_n_array_forward_or_backward(spec, monkeypatch):
    """Temporary memory of the compiled program: far below one N×N score matrix, and growing as N, not as N²."""
    monkeypatch.setattr(softmax, "MAX_SCORES", 2**16)
    heads, dim = 2, 8

    def temporaries(n, backward):
        def f(q, k, v, phi):
            return attention(q, k, v, phi, spec=spec, grid=(n // 64, 8, 8)).sum()

        x = jax.ShapeDtypeStruct((1, n, heads, dim), jnp.float32)
        phi = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), heads, dim, spec.feature_map))
        f = jax.grad(f, argnums=(0, 1, 2, 3) if spec.converted else (0, 1, 2)) if backward else f
        return jax.jit(f).lower(x, x, x, phi).compile().memory_analysis().temp_size_in_bytes

    limit = 4 * 4096**2 * heads / 8  # half of the N×N/4 scores of R = 4
    assert temporaries(4096, backward=False) < limit
    assert temporaries(4096, backward=True) < min(limit, 2.5 * temporaries(2048, backward=True))
