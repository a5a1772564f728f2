"""The GPU kernels, interpreted on CPU, in the harness of `test_hybrid.py`: the float64 oracle, and the XLA path."""

import contextlib
import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_hybrid as harness
from jax.extend import core
from jax.sharding import Mesh, PartitionSpec
from test_hybrid import U16, U32

from hybrid_dit import surgery
from hybrid_dit.ops import feature_maps, hybrid, residuals
from hybrid_dit.ops.kernels import gpu_hybrid, gpu_linear, gpu_phi, gpu_softmax
from hybrid_dit.ops.kernels.gpu_tiles import Tile, Tiles, splits
from hybrid_dit.ops.softmax import softmax_attention
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

D = 16  # the narrowest head that the kernels take
SMALL = Tiles(*(Tile(rows=32, chunk=16, width=2 * D),) * 9, programs=6)  # three powers: two of them, then one
GRID = (3, 5, 7)  # 105 tokens: four tiles of 32, seven chunks of 16 keys, none of which they fill
ONE = (GRID, None, 1, 2)
MAX = AttentionSpec("hybrid", 2)
LSE = AttentionSpec("hybrid", 4, "lattice", FeatureMapSpec(degree=3, hidden=20, shared=True), "lse")
LINEAR = AttentionSpec("linear", feature_map=FeatureMapSpec(degree=1))


def make_point(spec, shape=ONE, dtype=jnp.float32, seed=0):
    """As the harness makes it, with heads of width 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "D", D)
        return harness.make_point(spec, shape, dtype, seed)


@lru_cache
def compiled(spec, dtype="float32", backend="gpu", shape=ONE):
    """(point, cotangent) -> (output, VJP), compiled once for all tests of this kind of attention."""
    run = partial(gpu_hybrid.attention, sizes=SMALL) if backend == "gpu" else partial(hybrid.attention, backend="xla")

    def both(point, cotangent):
        y, vjp = jax.vjp(lambda *args: run(*args, spec=spec, grid=shape[0]), *point)
        return y, oracle.Point(*vjp(cotangent))

    point = make_point(spec, shape, jnp.dtype(dtype))
    return jax.jit(both).lower(point, point.q).compile()


def cotangent_of(point):
    return jnp.asarray(np.random.default_rng(1).standard_normal(point.q.shape), point.q.dtype)


def check_values(spec, point):
    """Values and VJP agree with the oracle to the worst case of float32 rounding (`test_hybrid`); returns them."""
    exact, cotangent = oracle.float64(point), cotangent_of(point)
    y, gradient = compiled(spec)(point, cotangent)
    bound = 2 * harness.roundings(spec, exact) * U32
    assert np.abs(oracle.float64(y) - oracle.attention(exact, spec, GRID)).max() <= bound * np.abs(exact.v).max()
    expected = oracle.gradient(exact, oracle.float64(cotangent), spec, GRID)
    for got, true in zip(jax.tree.leaves(oracle.float64(gradient)), jax.tree.leaves(expected), strict=True):
        # Twice for the backward pass, see `test_hybrid.check`; 1e-9 for gradients that vanish.
        assert np.linalg.norm(got - true) <= 2 * bound * np.linalg.norm(true) + 1e-9
    return y, gradient


@pytest.mark.parametrize("spec", [MAX, LSE, LINEAR], ids=harness.name_of)
def test_values_and_vjp_match_the_oracle(spec):
    point = make_point(spec)
    exact = oracle.float64(point)
    y, gradient = check_values(spec, point)
    assert np.abs(oracle.float64(y) - oracle.attention(exact, spec, GRID)).max() <= 1e-5  # what float32 is asked for
    relative = 4 * harness.roundings(spec, exact) * U32  # as in `test_hybrid.check`
    for leaf, error, size in harness.vjp_errors(exact, cotangent_of(point), oracle.float64(gradient), spec, GRID):
        assert error <= relative * size + 1e-9, leaf
        assert error <= 1e-5 * size, leaf


@pytest.mark.parametrize("spec", [MAX, LSE, LINEAR], ids=harness.name_of)
def test_without_gradients(spec):
    """φ of the queries is computed within the last kernel then: float32 against the oracle, bfloat16 against XLA."""
    point = make_point(spec)
    run = jax.jit(partial(gpu_hybrid.attention, spec=spec, grid=GRID, sizes=SMALL))
    exact = oracle.attention(oracle.float64(point), spec, GRID)
    assert np.abs(oracle.float64(run(*point)) - exact).max() <= 1e-5
    point = make_point(spec, dtype=jnp.bfloat16)
    exact = oracle.attention(oracle.float64(point), spec, GRID)
    plain = jax.jit(partial(hybrid.attention, spec=spec, grid=GRID, backend="xla"))
    fused, plain = (np.linalg.norm(oracle.float64(f(*point)) - exact) for f in (run, plain))
    assert fused <= 1.5 * plain


@pytest.mark.parametrize("rate, n", [(2, 1), (8, 1), (8, 5), (129, 257), (2, 256)])
def test_few_keys_or_as_many_as_tiles_have(rate, n):
    spec = AttentionSpec("hybrid", rate, feature_map=FeatureMapSpec(degree=1))
    point = make_point(spec, ((1, 1, n), 1, 1, 1))

    def gradients(run):
        return jax.jit(lambda *args: jax.vjp(run, *args)[1](point.v))(*point)

    ours = gradients(partial(gpu_hybrid.attention, spec=spec, grid=(1, 1, n), sizes=SMALL))
    plain = gradients(partial(hybrid.attention, spec=spec, grid=(1, 1, n), backend="xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
        # Two programs' roundings of sums of n terms each; with one key q and k have no gradient, but for rounding.
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-6 * np.linalg.norm(point.v)


def test_no_linear_tokens_is_softmax():
    spec, grid = AttentionSpec("hybrid", 1), (1, 2, 3)  # fewer tokens than a tile has
    point = make_point(spec, (grid, 1, 1, 1))

    def vjp(f, *args):
        y, backward = jax.vjp(f, *args)
        return y, *backward(jnp.ones_like(y))

    run = partial(gpu_hybrid.attention, spec=spec, grid=grid, sizes=SMALL)
    *ours, phi = jax.jit(partial(vjp, run))(*point)
    assert not any(g.any() for g in jax.tree.leaves(phi))
    for a, b in zip(ours, jax.jit(partial(vjp, softmax_attention))(*point[:3])):
        # Sums over 6 keys of terms of size 1, two programs' roundings each.
        np.testing.assert_allclose(a, b, rtol=0, atol=32 * U32)


def test_bfloat16_is_no_worse_than_plain_xla():
    """Relative errors of the output, of dq, dk, dv and of φ's gradient; the margin is ours.

    Of φ's leaves the root mean square: a bias has 16 numbers, whose errors' norm scatters by a half.
    """
    point = make_point(MAX, dtype=jnp.bfloat16)
    cotangent = cotangent_of(point)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (point, cotangent))
    # Its derivative was compared with the oracle's above, to 1e-5; bfloat16 makes errors of 1e-3.
    expected = jax.tree.leaves(compiled(MAX)(*exact))

    def errors(backend):
        got = jax.tree.leaves(compiled(MAX, "bfloat16", backend)(point, cotangent))
        each = [np.linalg.norm(oracle.float64(a) - b) / np.linalg.norm(b) for a, b in zip(got, expected)]
        return np.array([*each[:4], np.sqrt(np.mean(np.square(each[4:])))])

    fused, plain = errors("gpu"), errors("xla")
    assert (fused <= 1.5 * plain).all() and (plain <= 4 * U16).all()


def hard(point, how):
    """Logits up to 1e4 in size; all equal; rising from tile to tile, so that all summed before underflows."""
    if how == "equal":
        return point._replace(k=jnp.broadcast_to(point.k[:, :1], point.k.shape))
    if how == "extreme":
        scale = (1e4 * D**0.5 / np.abs(np.einsum("bnhd,bmhd->bhnm", *oracle.float64((point.q, point.k)))).max()) ** 0.5
        return point._replace(**{name: (getattr(point, name) * scale).astype(point.q.dtype) for name in ("q", "k")})
    rise = jnp.linspace(0, 200, point.k.shape[1])[:, None, None]
    return point._replace(k=jnp.ones_like(point.k) * rise / D**0.5)


@pytest.mark.parametrize("spec, how", [(MAX, "extreme"), (LSE, "extreme"), (MAX, "equal"), (LSE, "equal"), (MAX, "up")])
def test_hard_logits(spec, how):
    check_values(spec, hard(make_point(spec), how))


@pytest.mark.parametrize("how", ["equal", "extreme"])
def test_bfloat16_with_hard_logits(how):
    """Root mean squares over seeds of the errors of y, dq, dk, dv and φ's gradient, beside plain XLA's.

    Of equal keys all weights are rounded alike, by 0 to 2^-9 as their number has it: single seeds have up to 1.7 times
    XLA's error in dv.
    """
    squares = {"gpu": [], "xla": []}
    for seed in range(6):
        point = hard(make_point(MAX, dtype=jnp.bfloat16, seed=seed), how)
        exact, cotangent = oracle.float64(point), cotangent_of(point)
        expected = [oracle.attention(exact, MAX, GRID)]
        expected += jax.tree.leaves(oracle.gradient(exact, oracle.float64(cotangent), MAX, GRID))
        for backend, found in squares.items():
            got = jax.tree.leaves(compiled(MAX, "bfloat16", backend)(point, cotangent))
            each = [np.linalg.norm(oracle.float64(a) - b) / np.linalg.norm(b) for a, b in zip(got, expected)]
            found.append(np.square([*each[:4], np.sqrt(np.mean(np.square(each[4:])))]))
    fused, plain = (np.sqrt(np.mean(found, axis=0)) for found in squares.values())
    assert (fused <= 1.5 * plain).all(), fused / plain


@pytest.mark.parametrize("spec, bias", [(MAX, -200.0), (LSE, -200.0), (MAX, 1e6), (LINEAR, -200.0)])
def test_one_part_vanishes(spec, bias):
    """φ underflows to 0, beside a softmax part and alone, or is 1e12 and the softmax part below a roundoff of it."""
    point = make_point(spec)
    for phi in point.phi.values():
        if phi:
            phi["b1"] = jnp.full_like(phi["b1"], bias)
    if spec is LINEAR:
        y, gradient = compiled(spec)(point, cotangent_of(point))
        assert not y.any() and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    else:
        check_values(spec, point)


def test_under_vmap_checkpoint_and_shard_map():
    """Blocks with maps of their own, two to a device: each gets what it gets alone."""
    points = [make_point(MAX, seed=seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *points)

    def gradient(point):
        run = jax.checkpoint(partial(gpu_hybrid.attention, spec=MAX, grid=GRID, sizes=SMALL))
        return jax.vjp(run, *point)[1](cotangent_of(point))

    mesh, split = Mesh(jax.devices()[:2], ("x",)), PartitionSpec("x")
    run = jax.shard_map(jax.vmap(gradient), mesh=mesh, in_specs=(split,), out_specs=split, check_vma=False)
    ours = jax.jit(run)(stacked)
    for i, point in enumerate(points):
        _, alone = compiled(MAX)(point, cotangent_of(point))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(tuple(alone))):
            assert np.linalg.norm(a[i] - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("which", ["all", "kept", "not skipped"])
def test_features_have_no_row_that_is_not_written(which):
    """Whatever was in memory (NaN, where interpreted) would go into sums over tokens, and 0 times NaN is NaN."""
    point = make_point(LINEAR, ((1, 5, 7), None, 1, 1))  # two tiles of 32, of the four in 128 rows
    weights = gpu_phi.operands(point.phi["k"], jnp.float32)
    keep = jnp.ones(35).at[::3].set(0.0) if which == "kept" else None
    rest, skip = (weights, LINEAR.feature_map, SMALL, True), 3 if which == "not skipped" else 0
    found = gpu_linear.features(point.k, keep, *rest, skip=skip)
    assert found.shape == (1, 1, 128, D) and np.isfinite(found).all()
    expected = np.array(gpu_linear.features(point.k, None, *rest))
    if which != "all":
        expected[:, :, 35:] = 0.0
        expected[:, :, :35:3] = 0.0
    if skip:
        left = np.flatnonzero(np.arange(35) % 3)
        expected = np.concatenate([expected[:, :, left], np.zeros((1, 1, 128 - len(left), D))], axis=2)
    assert np.array_equal(found, expected)


def test_no_features_of_the_keys_of_s_where_those_have_a_stride(monkeypatch):
    seen, real = [], gpu_linear.features
    monkeypatch.setattr(gpu_linear, "features", lambda *args, skip=0: seen.append(skip) or real(*args, skip=skip))
    for spec in (MAX, LSE, LINEAR, AttentionSpec("hybrid", 1)):
        gpu_hybrid.attention(*make_point(spec, ((1, 1, 7), 1, 1, 1)), spec=spec, grid=(1, 1, 7), sizes=SMALL)
    assert seen == [2, 0, 0]  # LSE is a lattice, LINEAR has no S, R = 1 has no L


# The linear part of stage 1

SHORT = AttentionSpec("hybrid", 2, feature_map=FeatureMapSpec(degree=1))


def loss(phi, qkv, teacher, spec, grid, backend):
    sums = hybrid.softmax_part(*qkv, spec, grid)
    return surgery.rate_loss(phi, qkv, teacher, sums, spec, grid, "value", jax.random.key(0), backend)


def test_stage_one_gets_the_same_loss_and_gradient():
    """With tokens that pad the grid's, and blocks side by side as in distillation."""
    grid, padded = (1, 5, 7), (1, 5, 8)
    points = [make_point(SHORT, (padded, 2, 1, 1), seed=seed) for seed in (0, 1)]
    q, k, v, phi = jax.tree.map(lambda *x: jnp.stack(x), *points)

    def run(backend):
        f = jax.value_and_grad(partial(loss, spec=SHORT, grid=grid, backend=backend), has_aux=True)
        return jax.jit(jax.vmap(f))(phi, (q, k, v), v)

    for a, b in zip(jax.tree.leaves(run("gpu")), jax.tree.leaves(run("xla"))):
        # Gradients of an L1 norm are signs: they add up without rounding, but a product's sum has some.
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def total(phi, q, k, v, backend):
    numerator, denominator = hybrid.linear_part(q, k, v, phi, SHORT, (1, 5, 7), backend)
    return (numerator / (1 + denominator[..., None])).sum()


def test_all_gradients_of_the_linear_part():
    q, k, v, phi = make_point(SHORT, ((1, 5, 7), 2, 1, 1))
    ours, plain = (jax.jit(jax.grad(partial(total, backend=b), (0, 1, 2, 3)))(phi, q, k, v) for b in ("gpu", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_linear_part_without_keys():
    q, k, v, phi = make_point(SHORT, ((1, 1, 3), 1, 1, 1))
    for x in gpu_hybrid.linear_part(q, k, v, phi, AttentionSpec("hybrid", 1, feature_map=SHORT.feature_map), (1, 1, 3)):
        assert x.shape[:3] == q.shape[:3] and not x.any()


def test_gradients_in_q_k_v_are_made_only_where_asked_for():
    q, k, v, phi = make_point(SHORT, ((1, 5, 7), 2, 1, 1))

    for argnums, arrays in ((0, 2), ((0, 1, 2, 3), 3)):  # h and da, then dx; dy, then dv
        jaxpr = jax.make_jaxpr(jax.grad(partial(total, backend="gpu"), argnums))(phi, q, k, v).jaxpr
        kernels = [e for e in every_equation(jaxpr) if e.primitive.name == "pallas_call"]
        outputs = [(e.params["name"], len(e.outvars)) for e in kernels if "backward" in e.params["name"]]
        hidden, activations = "hybrid_hidden_backward", "hybrid_pre_activations_backward"
        assert sorted(outputs) == [(hidden, arrays)] * 2 + [(activations, 1), (activations, arrays - 1)]


def test_what_is_kept_spares_the_softmax_a_second_time():
    """A block computed anew for its backward pass, but for what `residuals.kept` keeps; kernels that are not dead."""
    point = make_point(MAX)

    def names(policy):
        run = jax.checkpoint(partial(gpu_hybrid.attention, spec=MAX, grid=GRID, sizes=SMALL), policy=policy)

        def both(*args):
            y, vjp = jax.vjp(run, *args)
            return y, vjp(y)

        jaxpr = jax.make_jaxpr(both)(*point).jaxpr
        return [e.params["name"] for e in live_equations(jaxpr) if e.primitive.name == "pallas_call"]

    assert names(None).count("hybrid_softmax") == names(None).count("hybrid_read") == 2
    once = names(residuals.kept)
    assert once.count("hybrid_softmax") == once.count("hybrid_read") == 1
    assert once.count("hybrid_features") == names(None).count("hybrid_features") == 4  # of queries and keys, twice


def live_equations(jaxpr):
    """Equations whose results are used, as XLA leaves them: kernels have no side effects."""
    used = set(jaxpr.outvars)
    for equation in reversed(jaxpr.eqns):
        if used.intersection(equation.outvars):
            yield equation
            used.update(x for x in equation.invars if isinstance(x, core.Var))
            for inner in core.jaxprs_in_params(equation.params):
                yield from live_equations(inner)


def every_equation(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from every_equation(inner)


# Without a GPU


def hopper():
    """What GPU to lower for; JAX before 0.11 takes Hopper by itself."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


def test_kernels_lower_to_triton_at_full_size():
    n = 32760
    x = jax.ShapeDtypeStruct((1, n, 12, 128), jnp.bfloat16)
    phi = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), 12, 128, MAX.feature_map))
    run = partial(gpu_hybrid.attention, spec=MAX, grid=(1, 1, n), softmax="triton", interpret=False)
    f = jax.jit(jax.grad(lambda *args: run(*args).astype(jnp.float32).sum(), (0, 1, 2, 3)))
    with hopper():
        text = f.trace(x, x, x, phi).lower(lowering_platforms=("cuda",)).as_text()
    # softmax, dq, dkv; products, read, products for dS; for q and k: features, pre-activations, hidden, 2 x products
    assert text.count("@__gpu$xla.gpu.triton") == 16


@pytest.fixture
def cudnn(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda *_: False)
    return cudnn


def test_only_training_asks_cudnn_for_normalisers(cudnn):
    x = jax.ShapeDtypeStruct((1, 300, 2, 64), jnp.bfloat16)
    spec = AttentionSpec("hybrid", 4, stabiliser="lse")
    phi = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), 2, 64, spec.feature_map))
    run = partial(gpu_hybrid.attention, spec=spec, grid=(1, 1, 300), softmax="cudnn", interpret=False)

    def asked(f):
        equations = every_equation(jax.make_jaxpr(f)(x, x, x, phi).jaxpr)
        return [e.params["is_training"] for e in equations if "attention_fwd" in e.primitive.name]

    assert asked(run) == [False]
    assert asked(lambda *args: jax.vjp(run, *args)[0]) == [True]


def test_cudnn_backward_is_given_the_total_output_and_normaliser(cudnn):
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), jnp.bfloat16) for n in (300, 151))
    total = jax.ShapeDtypeStruct((1, 2, 300), jnp.float32)
    jaxpr = jax.make_jaxpr(gpu_softmax.cudnn_backward)(q, k, k, q, q, total).jaxpr
    names = [e.primitive.name for e in jaxpr.eqns]
    (call,) = (e for e in jaxpr.eqns if "attention" in e.primitive.name)
    g, y, normaliser = jaxpr.invars[3:]
    assert call.primitive.name.startswith("dot_product_attention_bwd") and "dot_product_attention_fwd" not in names
    assert [x for x in call.invars if x in (g, y, normaliser)] == [normaliser, y, g]  # activation, output, cotangent
    assert call.invars[1].aval.shape[1] == 256  # keys padded, and masked by their number
    assert call.params["mask_type"] == cudnn.MaskType.PADDING
    assert [x.aval.shape for x in jaxpr.outvars] == [q.shape, k.shape, k.shape]


def test_tiles_cover_all_rows_once():
    for programs, heads, tiles in ((264, 24, 512), (264, 96, 256), (264, 24, 1), (6, 4, 4), (264, 80, 591)):
        share, each = splits(programs, heads, tiles)
        assert (share - 1) * each < tiles <= share * each
        assert share * heads <= max(programs, heads) and math.ceil(tiles / each) == share
