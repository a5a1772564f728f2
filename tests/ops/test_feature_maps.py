"""Feature maps: parameter counts of the paper, the oracle's values, and what every entry must satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hybrid_dit import cost
from hybrid_dit.errors import UserError
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.spec import ACTIVATIONS, AttentionSpec, FeatureMapSpec

U32, U16 = 2.0**-24, 2.0**-8  # unit roundoff of float32 and bfloat16
H, D = 3, 6


# Paper, Table 7: millions per map at d = 1536, 12 heads of 128.
@pytest.mark.parametrize("degree, layers, millions", [(6, 3, 15.4), (4, 2, 3.9), (3, 2, 2.4), (2, 2, 1.2)])
def test_parameter_counts_are_the_papers(degree, layers, millions):
    spec = FeatureMapSpec("poly", degree, layers)
    params = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), 12, 128, spec))
    for one in ("q", "k"):
        count = sum(x.size for x in jax.tree.leaves(params[one]))
        assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("degree, layers", [(1, 1), (2, 2), (3, 1), (6, 3)])
def test_poly_is_the_oracles_at_every_degree_and_depth(degree, layers):
    spec = FeatureMapSpec("poly", degree, layers)
    x = np.random.default_rng(0).standard_normal((2, 5, H, D)).astype(np.float32)
    params = feature_maps.init(jax.random.key(1), H, D, spec)["q"]
    got = jax.jit(lambda p, x: feature_maps.apply(p, x, spec))(params, x)
    expected = oracle.features(oracle.float64(params), oracle.float64(x), spec)
    assert got.shape == expected.shape == (2, 5, H, degree * D)
    # Per layer a product over at most P·D and about ten element-wise roundings; a power P multiplies relative errors.
    relative = degree * layers * (degree * D + 10) * U32
    assert np.abs(got - expected).max() <= relative * max(1.0, expected.max())


@pytest.mark.parametrize("layers, hidden", [(1, 7), (2, 7), (3, 7), (3, 0)])
def test_the_hidden_width_is_counted_and_kept(layers, hidden):
    spec = FeatureMapSpec("poly", degree=2, layers=layers, hidden=hidden)
    params = feature_maps.init(jax.random.key(0), H, D, spec)["q"]
    widths = [D, *[hidden or 2 * D] * (layers - 1), 2 * D]
    assert [params[f"w{i}"].shape for i in range(layers)] == [(H, a, b) for a, b in zip(widths, widths[1:])]
    shape = cost.Shape(dim=H * D, heads=H, ffn=1, blocks=1, tokens=1)
    assert cost.phi_params(shape, AttentionSpec("linear", feature_map=spec)) == sum(x.size for x in params.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_features_start_small_whatever_the_activation(activation):
    """φ_q·φ_k, the weight of a key beside the row's maximum of 1, starts well below it."""
    spec = FeatureMapSpec(activation=activation)
    phi = feature_maps.init(jax.random.key(0), 2, 128, spec)
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 200, 2, 128))
    phi_q, phi_k = feature_maps.apply_pair(phi, q, k, spec)
    weights = np.einsum("bnhf,bmhf->bhnm", phi_q, phi_k)
    assert 0.02 < weights.mean() < 0.3


def test_exponentials_are_bounded_so_that_their_powers_are_finite():
    spec = FeatureMapSpec(degree=6, layers=1, activation="exp")
    phi = feature_maps.init(jax.random.key(0), H, D, spec)["q"]
    x = 1e4 * jax.random.normal(jax.random.key(1), (1, 20, H, D))
    y, vjp = jax.vjp(lambda p: feature_maps.apply(p, x, spec), phi)
    assert np.isfinite(y).all() and all(np.isfinite(g).all() for g in jax.tree.leaves(vjp(jnp.ones_like(y))))


def test_a_shared_map_has_one_set_of_parameters():
    spec = FeatureMapSpec(shared=True)
    phi = feature_maps.init(jax.random.key(0), H, D, spec)
    alone = feature_maps.init(jax.random.key(0), H, D, FeatureMapSpec())
    assert phi["k"] == {}
    jax.tree.map(np.testing.assert_array_equal, phi["q"], alone["q"])
    x = jax.random.normal(jax.random.key(1), (1, 5, H, D))
    phi_q, phi_k = feature_maps.apply_pair(phi, x, x, spec)
    np.testing.assert_array_equal(phi_q, phi_k)
    assert not np.allclose(*feature_maps.apply_pair(alone, x, x, FeatureMapSpec()))


def test_backward_products_of_16_bits_stay_16_bit():
    """Every product in the program of a gradient takes bfloat16 operands; float32 ones would take twice the bytes."""
    spec = FeatureMapSpec()
    phi = feature_maps.init(jax.random.key(0), H, D, spec)["q"]
    x = jnp.ones((1, 5, H, D), jnp.bfloat16)
    text = jax.jit(jax.grad(lambda p: feature_maps.apply(p, x, spec).astype(jnp.float32).sum())).lower(phi).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 5  # two forward; backward the kernels' two and the hidden layer's one
    assert all(line.count("xbf16>") >= 2 for line in products)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", feature_maps.FEATURE_MAPS)
def test_every_map_is_per_head_non_negative_and_keeps_the_dtype(name, dtype):
    spec = FeatureMapSpec(name)
    x = 10 * jax.random.normal(jax.random.key(0), (1, 50, H, D), dtype)
    params = feature_maps.init(jax.random.key(1), H, D, spec)
    apply = jax.jit(lambda params, x: feature_maps.apply(params, x, spec))
    for one in params.values():
        y = apply(one, x)
        assert y.dtype == dtype and y.shape[:3] == x.shape[:3]
        assert (y >= 0).all() and (y > 0).any(axis=-1).all()
        # Head 1 sees head 1 alone, with its own parameters.
        alone = apply(jax.tree.map(lambda p: p[1:2], one), x[:, :, 1:2])
        np.testing.assert_allclose(np.float32(alone[:, :, 0]), np.float32(y[:, :, 1]), rtol=8 * U16, atol=0)


def test_learnable_maps_of_q_and_k_start_apart():
    params = feature_maps.init(jax.random.key(0), H, D, FeatureMapSpec())
    assert not np.allclose(params["q"]["w0"], params["k"]["w0"])
    # fan-in scaling: a unit-variance input keeps its variance, within four standard errors of 2·H·(PD)² samples
    w1 = np.stack([params["q"]["w1"], params["k"]["w1"]])
    assert abs(w1.var() * 2 * D - 1) <= 4 * (2 / w1.size) ** 0.5


def test_products_of_bfloat16_inputs_accumulate_in_float32():
    """256 + 1 − 250 = 7; a bfloat16 sum holds no 257 and gives 6 or 8."""
    spec = FeatureMapSpec("poly", degree=1, layers=1)
    params = {"w0": jnp.zeros((1, 2, 2)).at[0, :, 0].set(jnp.array([256.0, 1.0])), "b0": jnp.array([[-250.0, 0.0]])}
    y = feature_maps.apply(params, jnp.ones((1, 1, 1, 2), jnp.bfloat16), spec)
    assert y[0, 0, 0, 0] == 7.0  # softplus(7) = 7.0009, which bfloat16 rounds to 7


def test_an_unknown_map_is_named_with_the_choices():
    with pytest.raises(UserError, match="unknown feature map 'pony'.*poly, elu, hedgehog"):
        feature_maps.init(jax.random.key(0), H, D, FeatureMapSpec("pony"))
