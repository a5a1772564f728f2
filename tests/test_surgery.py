"""Losses of stage 1 against their definition in float64 NumPy with N×N matrices, and the assembly of a hybrid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import oracle

from hybrid_dit import surgery
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.hybrid import softmax_part
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec, from_label

GRID, B, H, D = (2, 3, 4), 2, 3, 6
N = 24
U32 = 2.0**-24
SPECS = [AttentionSpec("hybrid", 2), AttentionSpec("hybrid", 4, "lattice"), AttentionSpec("linear")]


def qkv(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(scale * rng.standard_normal((B, N, H, D)), jnp.float32) for _ in range(3))


def phi_for(spec, seed=0):
    return feature_maps.init(jax.random.key(seed), H, D, spec.feature_map)


# Losses


def test_value_loss_is_the_mean_absolute_error():
    teacher, student, _ = qkv()
    loss, relative = surgery.value_loss(teacher, student)
    t, s = oracle.float64((teacher, student))
    # A mean of 864 float32 numbers: pairwise sums round about log2(864) = 10 times.
    np.testing.assert_allclose(loss, np.abs(t - s).mean(), rtol=12 * U32)
    np.testing.assert_allclose(relative, np.abs(t - s).sum() / np.abs(t).sum(), rtol=24 * U32)


def test_value_loss_takes_16_bit_teachers_in_float32():
    teacher, student, _ = qkv()
    rounded = teacher.astype(jnp.bfloat16)
    expected = surgery.value_loss(rounded.astype(jnp.float32), student)
    got = surgery.value_loss(rounded, student)
    assert got[0].dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


def attention_error(q, k, phi, spec):
    """‖exp(s − c) − φ_q φ_kᵀ‖² over the keys of L, per row [b, h, n], from the definition."""
    q, k, phi = oracle.float64((q, k, phi))
    s = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(D)
    rows = oracle.softmax_rows(GRID, spec.rate, spec.pattern) if spec.kind == "hybrid" else np.zeros(N, bool)
    c = (s[..., rows] if rows.any() else s).max(axis=-1, keepdims=True)
    features = [oracle.features(phi[name], x, spec.feature_map) for name, x in (("q", q), ("k", k))]
    error = np.exp(s - c) - np.einsum("bnhf,bmhf->bhnm", *features)
    return np.square(error[..., ~rows]).sum(axis=-1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.label}-{s.pattern}")
def test_attention_loss_is_equation_6_if_all_rows_are_taken(spec):
    q, k, _ = qkv(1)
    phi = phi_for(spec)
    expected = np.log1p(attention_error(q, k, phi, spec).sum() / B)
    got = surgery.attention_loss(q, k, phi, spec, GRID, jax.random.key(0))
    # Scores and features are sums of up to 12 products, then squares and one sum; the logarithm (about 7) divides
    # relative errors of its argument by its value.
    np.testing.assert_allclose(got, expected, rtol=100 * U32)


@pytest.mark.parametrize("spec", SPECS[:1], ids=lambda s: s.label)
def test_sampled_rows_estimate_the_whole_without_bias(spec):
    q, k, _ = qkv(2)
    phi = phi_for(spec)
    keys = jax.random.split(jax.random.key(3), 400)
    losses = jax.vmap(lambda key: surgery.attention_loss(q, k, phi, spec, GRID, key, queries=5))(keys)
    norms = np.expm1(np.asarray(losses, np.float64))
    whole = attention_error(q, k, phi, spec).sum() / B
    assert norms.std() > 1e-3 * whole  # rows do vary
    assert abs(norms.mean() - whole) < 4 * norms.std() / len(keys) ** 0.5  # four standard errors


def test_attention_loss_survives_logits_that_overflow_exp():
    q, k, _ = qkv(4, scale=30.0)  # scores up to about 5000
    loss, grads = jax.value_and_grad(surgery.attention_loss, argnums=2)(
        q, k, phi_for(SPECS[2]), SPECS[2], GRID, jax.random.key(0)
    )
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("loss", surgery.LOSSES)
@pytest.mark.parametrize("spec", SPECS[::2], ids=lambda s: s.label)
def test_rate_loss_is_that_of_eq_5_beside_its_relative_error(spec, loss):
    q, k, v = qkv(5)
    phi = phi_for(spec)
    softmax = oracle.attention(oracle.Point(*oracle.float64((q, k, v)), {}), AttentionSpec(), GRID)
    teacher = jnp.asarray(softmax, jnp.float32)
    sums = softmax_part(q, k, v, spec, GRID)
    value, error = surgery.rate_loss(phi, (q, k, v), teacher, sums, spec, GRID, loss, jax.random.key(0))
    videos = surgery.video_errors({"x": phi}, (q, k, v), teacher, {"x": sums}, {"x": spec}, GRID)
    student = oracle.attention(oracle.Point(*oracle.float64((q, k, v, phi))), spec, GRID)
    distance = np.abs(student - np.asarray(teacher, np.float64))
    expected = distance.mean() if loss == "value" else np.log1p(attention_error(q, k, phi, spec).sum() / B)
    # Attention rounds at a few 1e-7 of its values, of which errors are a tenth and more.
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(error, distance.sum() / np.abs(teacher).sum(), rtol=1e-5)
    each = distance.sum(axis=(1, 2, 3)) / np.abs(teacher).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(videos["x"], each, rtol=1e-5)


@pytest.mark.parametrize("loss", surgery.LOSSES)
def test_gradient_steps_on_the_losses_lower_them(loss):
    q, k, v = qkv(6)
    teacher = jax.nn.dot_product_attention(q, k, v)
    sums = softmax_part(q, k, v, SPECS[1], GRID)

    def objective(phi):
        return surgery.rate_loss(phi, (q, k, v), teacher, sums, SPECS[1], GRID, loss, jax.random.key(0))[0]

    phi = phi_for(SPECS[1])
    step = jax.jit(lambda phi: jax.tree.map(lambda p, g: p - 1e-2 * g, phi, jax.grad(objective)(phi)))
    before = objective(phi)
    for _ in range(20):
        phi = step(phi)
    assert objective(phi) < before


# Assembly


WAN = WanConfig(dim=H * D, num_heads=H, ffn_dim=8, num_layers=4, in_channels=4, text_dim=8)


def some_maps(labels):
    specs = {label: from_label(label) for label in labels}
    return specs, {label: surgery.init_maps(jax.random.key(i), WAN, s) for i, (label, s) in enumerate(specs.items())}


def test_init_maps_has_the_models_shapes_and_differs_from_block_to_block():
    spec = AttentionSpec("hybrid", 2, feature_map=FeatureMapSpec(degree=3, layers=2))
    maps = surgery.init_maps(jax.random.key(0), WAN, spec)
    expected = abstract_dit(WAN, (spec,) * 4)["feature_maps"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), maps, expected)
    assert len({np.asarray(maps["q"]["w0"][block]).tobytes() for block in range(4)}) == 4


def test_assemble_takes_each_blocks_own_maps():
    specs, maps = some_maps(["R2", "R4", "linear"])
    teacher = {"head": np.ones(3)}
    choice = ["R4", "softmax", "R2", "R4"]
    attention, params = surgery.assemble(teacher, maps, choice, specs)
    assert [spec.label for spec in attention] == choice and attention[0] == specs["R4"]
    assert set(teacher) == {"head"} and params["head"] is teacher["head"]
    for block, label in enumerate(choice):
        for side in "qk":
            for name, array in params["feature_maps"][side].items():
                source = np.zeros_like(array[block]) if label == "softmax" else maps[label][side][name][block]
                np.testing.assert_array_equal(array[block], source)


def test_assemble_without_a_converted_block_is_the_teacher():
    specs, maps = some_maps(["R2"])
    attention, params = surgery.assemble({"head": np.ones(3)}, maps, ["softmax"] * 4, specs)
    assert not any(spec.converted for spec in attention) and set(params) == {"head"}


def test_assemble_names_what_was_not_distilled():
    specs, maps = some_maps(["R2"])
    with pytest.raises(UserError, match="no feature maps for R8; distilled are R2"):
        surgery.assemble({}, maps, ["R8", "R2", "softmax", "R8"], specs)


@pytest.mark.parametrize("choice", [["R2"] * 3, ["R2"] * 5])
def test_assemble_wants_a_rate_for_each_block(choice):
    specs, maps = some_maps(["R2"])
    with pytest.raises(UserError, match=f"{len(choice)} rates for 4 blocks: R2, R2, .*one per block"):
        surgery.assemble({}, maps, choice, specs)
