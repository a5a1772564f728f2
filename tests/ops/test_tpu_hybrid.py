"""The TPU kernels, interpreted on CPU, in the harness of `test_hybrid.py`: the float64 oracle, and the XLA path."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_hybrid as harness
from jax.experimental.pallas import tpu as pltpu
from test_hybrid import DENSE, EVEN, ODD, SPARSE, U16, D, make_point

from hybrid_dit.ops.hybrid import attention
from hybrid_dit.ops.kernels import tpu_hybrid
from hybrid_dit.ops.kernels.tpu_blocks import Blocks, tiles
from hybrid_dit.ops.spec import ACTIVATIONS, AttentionSpec, FeatureMapSpec

# Several tiles of everything, none of which N or N/R fills: 399 tokens, of them 200, 100 and 50 at R = 2, 4 and 8.
SMALL = Blocks(**{f.name: 128 for f in dataclasses.fields(Blocks)})
TILED = (3, 7, 19)
QUICK = {"xla_backend_optimization_level": 0}  # what LLVM makes of the interpreted kernels is not under test
MAPS = ("poly", "elu", "hedgehog")


def forward(point, spec, grid, interpret=True):
    run = partial(tpu_hybrid.forward, spec=spec, grid=grid, blocks=SMALL, interpret=interpret)
    return jax.jit(run, compiler_options=QUICK)(*point)


def error(y, point, spec, grid):
    """Largest error against the oracle. Values are means of v, of size 1."""
    return np.abs(oracle.float64(y) - oracle.attention(oracle.float64(point), spec, grid)).max()


def cases():
    """What can differ between specs at tiny sizes, and all of it in pairs on several tiles."""
    hybrid = partial(AttentionSpec, "hybrid")
    yield hybrid(2, "lattice", FeatureMapSpec(degree=2, layers=3, hidden=5, shared=True), "lse"), ODD
    yield hybrid(8, feature_map=FeatureMapSpec("hedgehog")), SPARSE
    yield hybrid(1), DENSE
    for activation in ACTIVATIONS[1:]:
        yield hybrid(4, feature_map=FeatureMapSpec(degree=3, activation=activation)), EVEN
    yield AttentionSpec(), (TILED, 1, 2, 1)
    for rate, name in zip((2, 4, 8), MAPS):
        yield AttentionSpec("linear", feature_map=FeatureMapSpec(name)), (TILED, rate, 1, 2)
        yield hybrid(rate, "stride", FeatureMapSpec(name)), (TILED, rate, 2, 2)
    yield hybrid(2, "lattice", stabiliser="lse"), (TILED, 2, 1, 2)
    yield hybrid(1, stabiliser="lse"), (TILED, 1, 1, 1)


@pytest.mark.parametrize("spec, shape", list(cases()), ids=harness.name_of)
def test_values_match_the_oracle(spec, shape):
    point = make_point(spec, shape)
    y = forward(point, spec, shape[0])
    assert y.shape == point.q.shape and y.dtype == jnp.float32
    assert error(y, point, spec, shape[0]) <= 1e-5  # what float32 is asked for; the worst case is ~1e-4


@pytest.mark.parametrize("spec", [AttentionSpec("hybrid", 4), AttentionSpec("linear"), AttentionSpec()])
def test_bfloat16_is_no_worse_than_plain_xla(spec):
    """Root mean square over 3,000 elements: its own scatter is a few percent, the margin (ours) 1.5."""
    shape = TILED, 4, 1, 1
    point = make_point(spec, shape, jnp.bfloat16)
    expected = oracle.attention(oracle.float64(point), spec, TILED)
    y = forward(point, spec, TILED)
    xla = jax.jit(partial(attention, spec=spec, grid=TILED, backend="xla"))(*point)
    fused, plain = (np.linalg.norm(oracle.float64(x) - expected) for x in (y, xla))
    assert y.dtype == jnp.bfloat16 and fused <= 1.5 * plain <= 1.5 * U16 * np.linalg.norm(expected)


def shifted(point, how):
    """Keys that make softmax hard: logits up to 1e4 in size, rising from tile to tile, all equal, or all below -100."""
    if how == "equal":
        return point._replace(k=jnp.broadcast_to(point.k[:, :1], point.k.shape))
    if how == "low":  # exp(−c) overflows
        return point._replace(q=jnp.abs(point.q) + 1, k=-100 * (jnp.abs(point.k) + 1))
    if how == "extreme":
        scale = (1e4 * D**0.5 / np.abs(np.einsum("bnhd,bmhd->bhnm", point.q, point.k)).max()) ** 0.5
        return point._replace(q=point.q * scale, k=point.k * scale)
    # Rising: every later key's logit is larger for queries of one sign (what was summed before underflows) and smaller
    # for the others (all later keys underflow).
    rise = jnp.linspace(0, 200, point.k.shape[1])[:, None, None]
    return point._replace(k=jnp.ones_like(point.k) * rise / D**0.5)


@pytest.mark.parametrize("how, stabiliser", [("equal", "max"), ("equal", "lse"), ("extreme", "lse"), ("rising", "max")])
def test_hard_logits(how, stabiliser):
    spec, shape = AttentionSpec("hybrid", 2, stabiliser=stabiliser), (TILED, 2, 1, 2)
    point = shifted(make_point(spec, shape), how)
    exact = oracle.float64(point)
    bound = 2 * harness.roundings(spec, exact) * harness.U32 * np.abs(exact.v).max()  # as in `test_hybrid.check_values`
    assert error(forward(point, spec, TILED), point, spec, TILED) <= bound


@pytest.mark.parametrize("kind, bias", [("hybrid", -200.0), ("hybrid", 1e6), ("linear", -200.0)])
def test_one_part_vanishes(kind, bias):
    """φ underflows to 0, beside a softmax part and alone, or is 1e12 and the softmax part below a roundoff of it."""
    spec, shape = AttentionSpec(kind, 2), (TILED, 2, 1, 2)
    point = make_point(spec, shape)
    for phi in point.phi.values():
        phi["b1"] = jnp.full_like(phi["b1"], bias)
    y = forward(point, spec, TILED)
    if kind == "linear":
        assert not y.any()
    else:
        assert error(y, point, spec, TILED) <= 1e-5


@pytest.mark.parametrize("spec", [AttentionSpec("hybrid", 2, "lattice"), AttentionSpec("linear")], ids=harness.name_of)
def test_every_element_is_written_and_nothing_is_read_that_was_not(spec):
    """Outputs, scratch memory and tiles past the end start as NaN here; one that is read or left shows in y."""
    grid = (1, 7, 19)  # 133 tokens, two tiles
    point = make_point(spec, (grid, 2, 1, 1))
    y = forward(point, spec, grid, interpret=pltpu.InterpretParams(uninitialized_memory="nan"))
    assert error(y, point, spec, grid) <= 1e-5


@pytest.mark.parametrize("n, size, multiple", [(32760, 1024, 16), (4095, 2048, 128), (12600, 1024, 16), (1, 512, 128)])
def test_tiles_cover_all_rows_without_a_tile_to_spare(n, size, multiple):
    count, tile = tiles(n, size, multiple)
    assert (count - 1) * tile < n <= count * tile
    assert tile % multiple == 0 and tile <= math.ceil(size / multiple) * multiple


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_for_tpus_at_full_size(target, direction, tmp_path):
    """With libtpu: N = 32,760 at R = 8, default tile sizes, within the memory that the kernels ask for."""
    script = Path(__file__).parents[2] / "benchmarks" / "tpu_schedule.py"
    command = [sys.executable, script, "--targets", target, "--labels", "R8", "--out", tmp_path]
    command += ["--direction", direction]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    (row,) = json.loads((tmp_path / f"{direction}.json").read_text())["rows"]
    assert "error" not in row
    # Schedules are deterministic: what was measured, and a little.
    if row["bound"] and direction == "forward":
        assert row["over_splash_and_linear_bound"] <= 1.15
    elif row["bound"]:
        assert row["over_bound"] <= (1.7 if target == "v6e" else 1.05)
