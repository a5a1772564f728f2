"""The TPU kernels' gradients, interpreted on CPU: against the float64 oracle, and under JAX's transformations."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_hybrid as harness
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from test_hybrid import ODD, SPARSE, make_point
from test_tpu_hybrid import QUICK, SMALL, TILED, shifted

from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.hybrid import attention
from hybrid_dit.ops.kernels import tpu_blocks, tpu_hybrid
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

hybrid = partial(AttentionSpec, "hybrid")


@functools.cache
def compiled(spec, grid, interpret=True):
    """(point, cotangent) -> gradient by the kernels, all tiles 128, and so 128 keys of S at a time."""
    kernels = {"spec": spec, "grid": grid, "blocks": SMALL, "interpret": interpret}

    def run(point, cotangent):
        kept = tpu_hybrid.forward_and_residuals(*point, **kernels)
        return oracle.Point(*tpu_hybrid.backward(*point, *kept, cotangent, **kernels))

    return jax.jit(run, compiler_options=QUICK)


def cotangent_of(point):
    return jnp.asarray(np.random.default_rng(1).standard_normal(point.q.shape), point.q.dtype)


def errors(gradient, exact):
    """By leaf: norm of the error over norm of what is right."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(exact))
    return {
        jax.tree_util.keystr(path): np.linalg.norm(oracle.float64(g) - expected) / np.linalg.norm(expected)
        for (path, g), expected in leaves
    }


def worst(errors):
    """The largest; NaN, which `max` may pass over, if there is one."""
    return np.max(list(errors.values()))


def check(spec, grid, point, bound=1e-5, **kwargs):
    cotangent = cotangent_of(point)
    exact = oracle.gradient(oracle.float64(point), oracle.float64(cotangent), spec, grid)
    found = errors(compiled(spec, grid, **kwargs)(point, cotangent), exact)
    assert len(found) == len(jax.tree.leaves(point)) and worst(found) <= bound, found


CASES = [
    (hybrid(2), (TILED, 2, 1, 2)),  # four tiles of queries, 200 keys of S in two passes, rows of S placed by the kernel
    (hybrid(3, feature_map=FeatureMapSpec("elu")), (TILED, 3, 1, 1)),
    (hybrid(4, "lattice", FeatureMapSpec(degree=3, layers=3, hidden=5, shared=True), "lse"), (TILED, 4, 2, 1)),
    (hybrid(8, feature_map=FeatureMapSpec("elu")), SPARSE),
    (AttentionSpec("linear", feature_map=FeatureMapSpec("hedgehog")), (TILED, 1, 1, 2)),
    (AttentionSpec(), (TILED, 1, 1, 1)),
]


@pytest.mark.parametrize("spec, shape", CASES, ids=harness.name_of)
def test_gradients_match_the_oracle(spec, shape):
    check(spec, shape[0], make_point(spec, shape))  # float32 is asked for 1e-5; 2.8e-6 is the worst found


def test_the_oracle_agrees_with_its_own_finite_differences():
    spec, shape = CASES[2][0], ((2, 3, 3), 4, 1, 1)
    point = oracle.float64(make_point(spec, shape))
    cotangent = np.random.default_rng(1).standard_normal(point.q.shape)
    found = oracle.gradient(point, cotangent, spec, shape[0])
    for leaf, error, size in harness.vjp_errors(point, cotangent, found, spec, shape[0]):
        assert error <= 1e-8 * size, leaf  # the step's truncation is 1e-10


@pytest.mark.parametrize("spec", [hybrid(4), AttentionSpec()], ids=harness.name_of)
def test_bfloat16_is_no_worse_than_plain_xla(spec):
    """Norms of errors by leaf: over three seeds 0.2 to 1.2 times XLA's (hybrid) and 1.0 to 1.43 times (softmax)."""
    shape = TILED, 4, 1, 2
    point = make_point(spec, shape, jnp.bfloat16)
    cotangent = cotangent_of(point)
    exact = oracle.gradient(oracle.float64(point), oracle.float64(cotangent), spec, TILED)
    ours, plain = compiled(spec, TILED)(point, cotangent), xla(spec, TILED)(point, cotangent)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(point)):
        assert x.dtype == y.dtype
    ours, plain = errors(ours, exact), errors(plain, exact)
    for leaf in ours:
        assert ours[leaf] <= 1.5 * plain[leaf], (leaf, ours, plain)


def test_bfloat16_with_equal_keys():
    """Root mean squares over seeds: all weights are rounded alike; single seeds have up to 1.6 times XLA's error."""
    spec, squares = hybrid(4), {compiled: [], xla: []}
    for seed in range(6):
        point = shifted(make_point(spec, (TILED, 4, 1, 2), jnp.bfloat16, seed), "equal")
        cotangent = cotangent_of(point)
        exact = oracle.gradient(oracle.float64(point), oracle.float64(cotangent), spec, TILED)
        for program, found in squares.items():
            found.append(np.square(list(errors(program(spec, TILED)(point, cotangent), exact).values())))
    ours, plain = (np.sqrt(np.mean(found, axis=0)) for found in squares.values())
    assert (ours <= 1.5 * plain).all(), ours / plain


HARD = [("equal", "max"), ("low", "max"), ("extreme", "max"), ("extreme", "lse"), ("rising", "lse")]


@pytest.mark.parametrize("how, stabiliser", HARD)
def test_hard_logits(how, stabiliser):
    """Keys all equal, logits up to 1e4, and rows in which most of the softmax part underflows."""
    spec, shape = hybrid(2, stabiliser=stabiliser, feature_map=FeatureMapSpec("elu")), (TILED, 2, 1, 1)
    point = shifted(make_point(spec, shape), how)
    # As in `test_hybrid.check`: an error of a logit is one of every weight, and so of the gradient.
    check(spec, TILED, point, bound=4 * harness.roundings(spec, oracle.float64(point)) * harness.U32)


@functools.cache
def xla(spec, grid):
    """(point, cotangent) -> gradient by plain XLA."""
    f = partial(attention, spec=spec, grid=grid, backend="xla")
    return jax.jit(lambda p, g: oracle.Point(*jax.vjp(f, *p)[1](g)), compiler_options=QUICK)


@pytest.mark.parametrize("spec", [CASES[0][0], AttentionSpec("linear")], ids=harness.name_of)
def test_features_underflow(spec):
    """Nothing is divided by zero, beside a softmax part or alone."""
    point = make_point(spec, CASES[0][1])
    for phi in point.phi.values():
        phi["b1"] = jnp.full_like(phi["b1"], -200.0)
    found = compiled(spec, TILED)(point, cotangent_of(point))
    assert not any(g.any() for g in jax.tree.leaves(found.phi))
    if spec.kind == "linear":
        assert not (found.q.any() or found.k.any() or found.v.any())
        # Denominators of about 1e-20 are raised to TINY, which no cotangent passes; the oracle knows no TINY
        point.phi["q"]["b1"], point.phi["k"]["b1"] = (jnp.full_like(phi["b1"], x) for x in (-53.0, 0.2))
        cotangent = cotangent_of(point)
        expected = oracle.float64(xla(spec, TILED)(point, cotangent))
        assert worst(errors(compiled(spec, TILED)(point, cotangent), expected)) <= 1e-5
    else:
        exact = oracle.gradient(oracle.float64(point), oracle.float64(cotangent_of(point)), spec, TILED)
        assert worst(errors(found[:3], exact[:3])) <= 1e-5


def test_every_element_is_written_and_nothing_is_read_that_was_not():
    """Outputs, scratch memory and tiles past the end start as NaN here; one that is read or left shows."""
    spec, grid = hybrid(2), (1, 7, 19)  # 133 tokens, two tiles
    check(spec, grid, make_point(spec, (grid, 2, 1, 1)), interpret=pltpu.InterpretParams(uninitialized_memory="nan"))


def test_under_checkpoint_vmap_and_shard_map():
    """Blocks with maps of their own, as distillation runs them, each over two devices by head; the XLA path agrees."""
    spec, grid = hybrid(2, "lattice"), ODD[0]
    points = [make_point(spec, (grid, 2, 1, 2), seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *points)
    cotangent = jax.random.normal(jax.random.key(1), stacked.q.shape)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("heads",))

    def both(backend):
        return jax.vmap(jax.checkpoint(partial(attention, spec=spec, grid=grid, backend=backend)))

    tokens, maps = P(None, None, None, "heads"), P(None, "heads")
    sharded = jax.shard_map(both("tpu"), mesh=mesh, in_specs=(tokens,) * 3 + (maps,), out_specs=tokens, check_vma=False)

    def run(f):
        def values_and_gradients(point, cotangent):
            y, pull = jax.vjp(f, *point)
            return y, pull(cotangent)

        return jax.jit(values_and_gradients, compiler_options=QUICK)(stacked, cotangent)

    found = errors(run(sharded), oracle.float64(run(both("xla"))))
    assert len(found) == 12 and worst(found) <= 1e-5, found


@pytest.mark.parametrize("width", [128, 6])
def test_heads_that_a_tpu_does_not_take_run_on_xla(width):
    """What a TPU would run, forward and backward (of two blocks at once), read off the lowered program."""
    spec, grid = hybrid(2), (2, 8, 16)
    x = jax.ShapeDtypeStruct((2, 1, 256, 1, width), jnp.bfloat16)
    phi = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), 1, width, spec.feature_map))
    phi = jax.tree.map(lambda p: jax.ShapeDtypeStruct((2, *p.shape), p.dtype), phi)
    f = jax.vmap(partial(attention, spec=spec, grid=grid, backend="tpu"))
    program = jax.jit(lambda *args: jax.vjp(f, *args)[1](args[0])).trace(x, x, x, phi)
    assert program.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == (4 if width == 128 else 0)


@pytest.mark.parametrize("generation", ["v5e", "v6e", "tpu7x"])
def test_all_lengths_lower_for_a_tpu(generation):
    """Videos of real sizes whose keys fill the last tile, and chunks of it, in part, whole, or not at all."""
    blocks = tpu_blocks.BLOCKS[generation]
    for n, rate in ((75600, 1), (75600, 8), (12600, 4), (4725, 2)):  # the last: a sixteenth of the first
        spec = AttentionSpec("hybrid", rate)
        x = jax.ShapeDtypeStruct((1, n, 1, 128), jnp.bfloat16)
        phi = jax.eval_shape(lambda spec=spec: feature_maps.init(jax.random.key(0), 1, 128, spec.feature_map))

        def both(q, k, v, phi, rest=dict(spec=spec, grid=(1, 1, n), blocks=blocks)):  # noqa: B006, B008, C408
            y, kept = tpu_hybrid.forward_and_residuals(q, k, v, phi, **rest)
            return tpu_hybrid.backward(q, k, v, phi, y, kept, y, **rest)

        program = jax.jit(both).trace(x, x, x, phi).lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" in program
