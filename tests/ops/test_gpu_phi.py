"""φ and its derivative as the GPU kernels compute them: against the oracle, and its central differences, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.kernels import gpu_phi
from hybrid_dit.ops.spec import ACTIVATIONS, FeatureMapSpec

U32 = 2.0**-24
# Steps that miss the kinks of relu, elu and exp.
Y = np.linspace(-9.03, 13.11, 401).astype(np.float32)
FUSED = [a for a in ACTIVATIONS if a != "square"]
MAPS = [FeatureMapSpec(activation=a, degree=p) for a, p in itertools.zip_longest(FUSED, (2, 1), fillvalue=3)]


def power(y, p, activation):
    """ψ(y)^(p + 1) in float64, from the oracle: one layer with the identity as its matrix."""
    spec = FeatureMapSpec(degree=1, layers=1, activation=activation)
    params = {"w0": np.eye(len(y))[None], "b0": np.zeros((1, len(y)))}
    return oracle.poly(params, np.asarray(y, np.float64)[None, None, None], spec)[0, 0, 0] ** (p + 1)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("spec", MAPS, ids=lambda s: s.activation)
def test_features_and_slopes(spec, exact):
    phi = gpu_phi.Phi(spec, exact, ptx=False)
    # Exponents of up to 20 in units of log 2, rounded to 2^-24 of themselves, and the polynomial's 2^-11.3.
    u = 2.0**-11 if spec.activation == "softplus" and not exact else 32 * U32
    for p in range(spec.degree):
        expected = power(Y, p, spec.activation)
        above, below = (power(Y.astype(np.float64) + x, p, spec.activation) for x in (oracle.STEP, -oracle.STEP))
        slope = (above - below) / (2 * oracle.STEP)
        features = phi.features(jnp.asarray(Y), p)
        np.testing.assert_allclose(features, expected, rtol=(p + 1) * u)
        np.testing.assert_allclose(phi.slope(features, p), slope, rtol=(p + 1) * u, atol=1e-8 * expected.max())
    assert not phi.slope(jnp.zeros(3), spec.degree - 1).any()


def test_gelu_and_slope():
    phi = gpu_phi.Phi(FeatureMapSpec(), exact=True, ptx=False)
    with jax.enable_x64(True):
        y = jnp.asarray(Y, jnp.float64)
        expected, slope = map(np.asarray, jax.jvp(jax.nn.gelu, (y,), (jnp.ones_like(y),)))
    # 1 + tanh cancels to an absolute rounding error, times y; a few of them.
    bound = 8 * U32 * (1 + np.abs(Y))
    value, derivative = phi.gelu_and_slope(jnp.asarray(Y))
    assert (np.abs(phi.gelu(jnp.asarray(Y)) - expected) <= bound).all() and (np.abs(value - expected) <= bound).all()
    assert (np.abs(derivative - slope) <= 8 * bound).all()


def test_hidden_units_are_padded_with_zeros_which_change_nothing():
    shapes = {"w0": (2, 16, 20), "b0": (2, 20), "w1": (2, 20, 32), "b1": (2, 32)}
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    w0, b0, w1, b1 = gpu_phi.operands(params, jnp.bfloat16)
    assert w0.shape == (2, 16, 128) and b0.shape == (2, 128) and w1.shape == (2, 128, 32) and b1.shape == (2, 32)
    assert w0[..., :20].all() and b0[:, :20].all() and w1[:, :20].all()
    assert not (w0[..., 20:].any() or b0[:, 20:].any() or w1[:, 20:].any())
    assert w0.dtype == w1.dtype == jnp.bfloat16 and b0.dtype == b1.dtype == jnp.float32


def test_what_fits(monkeypatch):
    assert all(gpu_phi.fits(spec) for spec in MAPS)
    for spec in (FeatureMapSpec(layers=3), FeatureMapSpec("hedgehog"), FeatureMapSpec(activation="square")):
        assert not gpu_phi.fits(spec)
    entry = feature_maps.FEATURE_MAPS["poly"]._replace(apply=lambda params, x, spec: jnp.square(x))
    monkeypatch.setitem(feature_maps.FEATURE_MAPS, "poly", entry)  # a user's, under a known name
    assert not gpu_phi.fits(FeatureMapSpec())
