"""Attention in PyTorch: the numbers of JAX and of the float64 oracle for every kind, pattern, map, stabiliser."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hybrids import PAPER, relative_error

from hybrid_dit.errors import UserError
from hybrid_dit.ops import feature_maps as jax_maps
from hybrid_dit.ops.hybrid import attention as jax_attention
from hybrid_dit.ops.spec import ACTIVATIONS, PATTERNS, STABILISERS, FeatureMapSpec, from_label
from hybrid_dit.torch import attention, softmax
from hybrid_dit.torch import feature_maps as torch_maps
from hybrid_dit.torch.options import options

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import oracle  # noqa: E402

GRID, B, H, D = (3, 5, 7), 2, 2, 8  # 105 tokens: odd, divisible by no rate
N = 105
ALL_LABELS = ("softmax", "R2", "R4", "R8", "linear")


def inputs(maps=PAPER, seed=0):
    """q, k, v and parameters of maps, float32; biases and all weights are random, so that each is seen to be used."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, N, H, D)).astype(np.float32) for _ in range(3))
    shapes = jax.eval_shape(lambda: jax_maps.init(jax.random.key(0), H, D, maps))
    phi = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32) * 0.3, shapes)
    return q, k, v, phi


def to_torch(tree, dtype=torch.float32):
    return jax.tree.map(lambda x: torch.tensor(x, dtype=dtype), tree)


def check(spec, q, k, v, phi):
    with torch.no_grad():
        out = attention(*to_torch((q, k, v, phi)), spec=spec, grid=GRID)
    assert out.dtype == torch.float32 and out.is_contiguous()
    exact = oracle.attention(oracle.Point(*oracle.float64((q, k, v, phi))), spec, GRID)
    assert relative_error(out, exact) <= 5e-6
    assert relative_error(out, jax_attention(q, k, v, phi, spec=spec, grid=GRID)) <= 1e-5


@pytest.mark.parametrize("feature_map", jax_maps.FEATURE_MAPS)
@pytest.mark.parametrize("label", ALL_LABELS)
def test_equals_jax_and_the_oracle(label, feature_map):
    maps = FeatureMapSpec(feature_map)
    arrays = inputs(maps)
    for pattern in PATTERNS:
        for stabiliser in STABILISERS:
            check(from_label(label, pattern=pattern, stabiliser=stabiliser, feature_map=maps), *arrays)
            if label in ("softmax", "linear"):
                return


@pytest.mark.parametrize("kind", jax_maps.FEATURE_MAPS)
def test_a_shared_map_equals_jax_and_the_oracle(kind):
    maps = FeatureMapSpec(kind, shared=True)
    *qkv, phi = inputs(maps)
    assert phi["k"] == {}
    check(from_label("R4", feature_map=maps), *qkv, phi)


# One layer has no hidden width; P·D is 16 and 24 here.
@pytest.mark.parametrize("degree, layers, hidden", [(2, 1, 5), (2, 2, 5), (3, 3, 40)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_widths_and_activations_equal_jax_and_the_oracle(activation, degree, layers, hidden):
    maps = FeatureMapSpec(degree=degree, layers=layers, hidden=hidden, activation=activation)
    check(from_label("R4", feature_map=maps), *inputs(maps))


@pytest.mark.parametrize("kind", jax_maps.FEATURE_MAPS)
def test_shapes_of_parameters_are_those_of_jax(kind):
    for sizes in ({}, {"shared": True}, {"layers": 1, "hidden": 5}, {"degree": 3, "layers": 3, "hidden": 5}):
        spec = FeatureMapSpec(kind, **sizes)
        params = jax.eval_shape(lambda spec=spec: jax_maps.init(jax.random.key(0), H, D, spec))
        shapes = {x: {name: array.shape for name, array in params[x].items()} for x in "qk"}
        assert torch_maps.parameter_shapes(H, D, spec) == shapes


def test_both_sides_know_the_same_names():
    assert torch_maps.FEATURE_MAPS.keys() == jax_maps.FEATURE_MAPS.keys()
    assert set(ACTIVATIONS) == torch_maps.ACTIVATIONS.keys() == jax_maps._ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_agree_far_out(activation):
    """Where softplus is linear, exp reaches its bound of e^12, and elu ends at 0."""
    y = np.linspace(-30, 30, 121, dtype=np.float32)
    got = torch_maps.ACTIVATIONS[activation](torch.tensor(y)).numpy()
    want = np.asarray(jax_maps._ACTIVATIONS[activation].function(y))
    # A few roundings of unit 2^-24; e^y magnifies that of y by |y| <= 12; elu + 1 near 0 is a difference of ones.
    np.testing.assert_allclose(got, want, rtol=16 * 2.0**-24, atol=2 * 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", ALL_LABELS)
def test_half_precision_stays_within_its_rounding(label, dtype):
    """Against the oracle on the same 16-bit inputs: a few roundings on the way (features, state, output)."""
    q, k, v, phi = to_torch(inputs(), dtype)
    for stabiliser in STABILISERS:
        spec = from_label(label, stabiliser=stabiliser)
        out = attention(q, k, v, phi, spec=spec, grid=GRID)
        assert out.dtype == dtype
        point = jax.tree.map(lambda x: x.double().numpy(), (q, k, v, phi))
        # float16 inputs too pass through bfloat16 sums (unit 2^-8): four roundings that don't all add up.
        assert relative_error(out.double(), oracle.attention(oracle.Point(*point), spec, GRID)) <= 4 * 2.0**-8


def test_float16_sums_do_not_overflow():
    """105 tokens of value 1,000 and features about 1 sum up beyond float16's 65,504."""
    q, k, v, phi = to_torch(inputs(FeatureMapSpec("elu")), torch.float16)
    spec = from_label("linear", feature_map=FeatureMapSpec("elu"))
    out = attention(q, k, torch.full_like(v, 1000.0), phi, spec=spec, grid=GRID)
    assert (out.float() / 1000 - 1).abs().max() <= 3 * 2.0**-8


def test_float16_features_do_not_overflow():
    """exp is bounded by e^12 = 162,755, more than float16's 65,504; equal features weigh all values equally."""
    spec = from_label("linear", feature_map=FeatureMapSpec(degree=1, layers=1, activation="exp"))
    q, k, v, phi = to_torch(inputs(spec.feature_map), torch.float16)
    for params in phi.values():
        params["w0"].zero_(), params["b0"].fill_(20.0)
    out = attention(q, k, torch.ones_like(v), phi, spec=spec, grid=GRID)
    assert (out.float() - 1).abs().max() <= 3 * 2.0**-8


# Both stabilisers (c_i is held fixed) and, with a map that q and k share, the gradient that is the sum of both sides'.
@pytest.mark.parametrize(
    "stabiliser, maps",
    [("max", PAPER), ("lse", FeatureMapSpec(hidden=5, activation="elu", shared=True))],
    ids=STABILISERS,
)
def test_gradient_equals_that_of_jax(stabiliser, maps):
    q, k, v, phi = inputs(maps)
    spec = from_label("R4", stabiliser=stabiliser, feature_map=maps)
    weight = np.random.default_rng(5).standard_normal(q.shape).astype(np.float32)

    def loss(*args):
        return jnp.sum(jax_attention(*args, spec=spec, grid=GRID) * weight)

    want = jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, phi))
    args = jax.tree.map(lambda x: x.requires_grad_(), to_torch((q, k, v, phi)))
    (attention(*args, spec=spec, grid=GRID) * torch.tensor(weight)).sum().backward()
    for got, expected in zip(jax.tree.leaves(args), want):
        assert relative_error(got.grad, expected) <= 1e-4


def test_sums_over_lengths_that_do_not_split(monkeypatch):
    """A prime number of tokens is summed in one piece, 105 in 15; both are the same sum."""
    q, k, v, phi = to_torch(inputs())
    spec = from_label("R2")
    whole = attention(q, k, v, phi, spec=spec, grid=GRID)
    monkeypatch.setattr("hybrid_dit.torch.hybrid.SPLITS", 1)
    assert relative_error(attention(q, k, v, phi, spec=spec, grid=GRID), whole) <= 1e-6
    prime = tuple(x[:, :103] for x in (q, k, v))
    assert attention(*prime, phi, spec=spec, grid=(103, 1, 1)).shape == prime[0].shape


# All queries at once; several tiles, the last one short; fewer scores allowed than one query has.
@pytest.mark.parametrize("max_scores", [2**24, B * H * N * 10, 1])
def test_tiles_of_any_size_give_the_same_sums(max_scores, monkeypatch):
    monkeypatch.setattr(softmax, "MAX_SCORES", max_scores)
    q, k, v, _ = to_torch(inputs())
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, weight = softmax.softmax_part(q, k, v, "max")
    s = q.double() @ k.double().mT * D**-0.5
    p = torch.exp(s - s.amax(-1, keepdim=True))
    assert relative_error(weight, p.sum(-1)) <= 1e-6
    assert relative_error(out, s.softmax(-1) @ v.double()) <= 1e-6


def test_scores_are_never_held_whole():
    """8,192 tokens at R2 have 2 x 8,192 x 4,096 scores (256 MiB); no tensor as large as a quarter of that is made."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(out)
            self.size = max([self.size, *(x.numel() for x in leaves if isinstance(x, torch.Tensor))])
            return out

    n = 8192
    q, k, v = (torch.randn(1, n, H, D) for _ in range(3))
    phi = to_torch(inputs()[3])
    for stabiliser in STABILISERS:
        with torch.no_grad(), Largest() as largest:
            attention(q, k, v, phi, spec=from_label("R2", stabiliser=stabiliser), grid=(8, 32, 32))
        assert 0 < largest.size <= H * n * n / 2 / 4


def test_backends_say_what_they_cannot_do():
    q = torch.zeros(1, 1, 3, 8)
    for name in ("sdpa", "cudnn", "flash"):
        with pytest.raises(UserError, match="returns no maxima"):
            softmax.BACKENDS[name](q, q, q, "max")
    try:
        options.lse = "fast"
        with pytest.raises(UserError, match="unknown softmax backend 'fast'; choose one of plain, sdpa"):
            softmax.softmax_part(q, q, q, "lse")
    finally:
        options.lse = "sdpa"
