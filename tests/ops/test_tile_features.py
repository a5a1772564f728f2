"""Feature maps on a tile: against the oracle's, in relative error, as features may be tiny."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.kernels import tile_features
from hybrid_dit.ops.spec import ACTIVATIONS, FeatureMapSpec

D = 8
POLY = [FeatureMapSpec(activation=a, degree=p) for a, p in itertools.zip_longest(ACTIVATIONS, (2, 3, 1), fillvalue=2)]
SPECS = [*POLY, FeatureMapSpec(layers=3, hidden=5), FeatureMapSpec("elu"), FeatureMapSpec("hedgehog")]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.activation}-{s.degree}-{s.layers}")
def test_maps_are_those_of_the_model(spec, dtype):
    x = jax.random.normal(jax.random.key(0), (1, 32, 1, D)).astype(dtype)
    params = feature_maps.init(jax.random.key(1), 1, D, spec)["q"]
    operands = tile_features.operands(params, dtype)
    phi = tile_features.apply({name: p[0] for name, p in operands.items()}, x[0, :, 0], spec)
    assert tile_features.fits(spec) and phi.dtype == dtype and phi.shape == (32, tile_features.width(spec, D))
    exact = {name: np.asarray(p, np.float64).reshape(params[name].shape) for name, p in operands.items()}
    expected = oracle.features(exact, oracle.float64(x), spec)[0, :, 0]
    # As `test_hybrid.roundings`: (products + about ten element-wise roundings) a layer, times the power; of 16-bit
    # numbers only the hidden layers, whose errors average out over a product, and the features themselves.
    u = 2.0**-24 * spec.layers * (2 * D + 10) if dtype == jnp.float32 else 2.0**-9 * spec.layers * 2
    assert np.abs(oracle.float64(phi) - expected).max() <= 2 * spec.degree * u * np.abs(expected).max()


def test_the_shorter_softplus_is_as_good_as_sixteen_bits_need():
    y = jnp.linspace(-60, 60, 4001, dtype=jnp.float32)
    value, slope = (np.asarray(x, np.float64) for x in tile_features._softplus(y))
    exact = np.asarray(y, np.float64)
    # 2^-11 as derived there; an exponential's argument of size 60 log2(e) is rounded to 2^-24 of itself: 2^-17.
    assert np.abs(value / np.logaddexp(exact, 0) - 1).max() <= 2.0**-11 + 2.0**-15
    assert np.abs(slope * (1 + np.exp(-exact)) - 1).max() <= 2.0**-11 + 2.0**-15


def test_gelu_and_its_slope(optimised):
    """The slope by central differences of the oracle's form, whose error is 1e-10; some 15 roundings of size 1."""
    y = jnp.linspace(-8, 8, 2001, dtype=jnp.float32)
    exact = np.asarray(y, np.float64)
    gelu = lambda y: 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))  # noqa: E731
    value, slope = jax.jit(tile_features._gelu)(y)
    assert np.abs(value - gelu(exact)).max() <= 8 * 15 * 2.0**-24
    assert np.abs(slope - (gelu(exact + 1e-5) - gelu(exact - 1e-5)) / 2e-5).max() <= 8 * 15 * 2.0**-24
