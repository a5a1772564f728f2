import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybrid_dit import optim
from hybrid_dit.errors import UserError

DEFAULTS = {
    "learning_rate": 1e-2,
    "warmup": 2,
    "steps": 6,
    "schedule": "constant",
    "clip": 1.0,
    "weight_decay": 0.1,
    "learning_rates": (".*=1",),
}


def settings(**values):
    return ConfigDict({**DEFAULTS, **values})


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "blocks": {"kernel": rng.standard_normal((3, 4), np.float32), "bias": rng.standard_normal(4, np.float32)},
        "feature_maps": {"q": {"w0": rng.standard_normal((2, 2), np.float32)}, "k": {}},
    }


def adamw(p, grads, rates, norms, clip, decay, multiplier):
    """AdamW in float64 as Loshchilov and Hutter write it, with the gradient scaled to norm `clip` if it is longer."""
    p, m, v = np.float64(p), 0.0, 0.0
    for n, (grad, rate, norm) in enumerate(zip(grads, rates, norms), start=1):
        grad = np.float64(grad) * min(1.0, clip / norm if clip else 1.0)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        step = m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
        p = p - multiplier * rate * (step + decay * p)
    return p


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_steps_are_those_of_adamw_with_clip_decay_groups_and_freezing(clip):
    rules = ("feature_maps/.*=3", ".*kernel=1", ".*bias=0")
    optimiser = optim.Optimiser(settings(clip=clip, learning_rates=rules))
    params, grads = tree(0), [tree(seed) for seed in range(1, 5)]
    trained, frozen = optimiser.split(params)
    assert frozen == {"blocks": {"bias": params["blocks"]["bias"]}}
    state = optimiser.init(params)
    for grad in grads:
        trained, state = optimiser.update(optimiser.split(grad)[0], state, trained)
    got = optim.merged(params, trained, frozen)
    assert jax.tree.structure(got) == jax.tree.structure(params)  # the empty subtree too
    kernels, maps = [g["blocks"]["kernel"] for g in grads], [g["feature_maps"]["q"]["w0"] for g in grads]
    norms = [np.sqrt(np.square(np.float64(a)).sum() + np.square(np.float64(b)).sum()) for a, b in zip(kernels, maps)]
    assert min(norms) > 1  # so that the clip matters; the frozen bias is no part of them
    rates = [0.5e-2, 1e-2, 1e-2, 1e-2]
    expected = adamw(params["blocks"]["kernel"], kernels, rates, norms, clip, 0.1, 1)
    # Four steps of about 12 float32 operations each on numbers below 4.
    np.testing.assert_allclose(got["blocks"]["kernel"], expected, atol=48 * 4 * 2**-24)
    expected = adamw(params["feature_maps"]["q"]["w0"], maps, rates, norms, clip, 0.1, 3)
    np.testing.assert_allclose(got["feature_maps"]["q"]["w0"], expected, atol=48 * 4 * 2**-24)


def test_constant_rates_follow_a_warm_up_that_starts_above_zero():
    rate = optim.learning_rate(settings(learning_rate=1e-3, warmup=4))
    got = [float(rate(jnp.int32(n))) for n in range(6)]
    np.testing.assert_allclose(got, [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3], rtol=2**-23)


def test_cosine_rates_fall_to_zero_after_the_last_step():
    rate = optim.learning_rate(settings(schedule="cosine", learning_rate=1.0, warmup=2, steps=6))
    got = [float(rate(jnp.int32(n))) for n in range(7)]
    half = (1 + np.sqrt(0.5)) / 2  # of 45 degrees
    np.testing.assert_allclose(got, [0.5, 1.0, 1.0, half, 0.5, 1 - half, 0.0], atol=4 * 2**-24)


def test_averages_warm_up_and_keep_their_decay():
    ema, params, expected = {"w": np.float32(1)}, [3.0, -2.0, 5.0], 1.0
    for step, p in enumerate(params):
        ema = optim.averaged(ema, {"w": np.float32(p)}, jnp.int32(step), decay=0.15)
        d = [1 / 10, 0.15, 0.15][step]  # (1 + n) / (10 + n) is 0.1, 0.18, 0.25
        expected = d * expected + (1 - d) * p
    # Nine operations on numbers of at most 5.
    np.testing.assert_allclose(ema["w"], expected, atol=9 * 5 * 2**-24)


def test_everything_frozen_and_rules_that_miss_or_overlap_are_errors():
    for rules, message in [
        ((".*=0",), "freezes every parameter"),
        (("blocks/.*=1",), "feature_maps/q/w0 matches 0 learning-rate rules"),
        ((".*=1", ".*bias=0"), "blocks/bias matches 2 learning-rate rules"),
    ]:
        with pytest.raises(UserError, match=message):
            optim.Optimiser(settings(learning_rates=rules)).split(tree(0))
