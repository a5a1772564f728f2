import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from hybrid_dit.errors import UserError
from hybrid_dit.sampling import SAMPLERS, euler_schedule, make_sampler, sample, stepwise, unipc

torch.set_num_threads(1)

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
REFERENCES = {
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "unipc": lambda shift: UniPCMultistepScheduler(**FLOW, flow_shift=shift),
    "dpm++": lambda shift: DPMSolverMultistepScheduler(**FLOW, flow_shift=shift),
}


def run(velocity, name, steps, shift, noise, key=None):
    return jax.jit(functools.partial(sample, velocity, make_sampler(name, steps, shift)))(None, noise, None, key)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])  # the first three: orders are lowered at both ends
def test_matches_diffusers(name, shift, steps):
    noise = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    scheduler = REFERENCES[name](shift)
    scheduler.set_timesteps(steps)
    expected = torch.tensor(noise)
    for t in scheduler.timesteps:
        expected = scheduler.step(torch.tanh(1.5 * expected + 0.002 * t), t, expected)[0]

    def velocity(params, x, t, context):
        return jnp.tanh(1.5 * x + 0.002 * t[:, None, None])

    actual = np.asarray(run(velocity, name, steps, shift, jnp.asarray(noise)), np.float64)
    error = np.linalg.norm(actual - expected.numpy()) / np.linalg.norm(expected.numpy())
    # both are within 5e-7 of diffusers run in float64 (50 steps of float32 rounding); the largest difference is 5e-7
    assert error <= 2e-6


# Data distributed as N(MEAN, STD^2): the exact velocity is known, and so is every marginal of x_s.
MEAN, STD = 0.7, 0.5
COUNT = 40_000


def marginal(s, std=STD):
    return (1 - s) * MEAN, (1 - s) ** 2 * std**2 + s**2


def gaussian_velocity(std):
    def velocity(params, x, t, context):
        s = t[:, None] / 1000
        mean, variance = marginal(s, std)
        noise = s / variance * (x - mean)  # E[eps | x]
        data = MEAN + (1 - s) * std**2 / variance * (x - mean)  # E[x_0 | x]
        return noise - data

    return velocity


def ancestral_moments(steps, shift):
    """Mean and variance after each step of the method with infinitely many samples, in float64.

    Written with the exact estimates of x_0 and eps in place of velocities and coefficient tables.
    """
    sigmas = euler_schedule(steps, shift).sigmas
    mean, variance = 0.0, 1.0
    moments = []
    for s, to in zip(sigmas[:-1], sigmas[1:]):
        down = to**2 / s
        total = marginal(s)[1]
        gain = ((1 - down) * (1 - s) * STD**2 + down * s) / total  # of x in (1 - d) E[x_0 | x] + d E[eps | x]
        mean_down = (1 - down) * MEAN + gain * (mean - marginal(s)[0])
        noise_weight = down * (1 - to) / (1 - down)
        mean = (1 - to) / (1 - down) * mean_down
        variance = ((1 - to) / (1 - down) * gain) ** 2 * variance + to**2 - noise_weight**2
        moments.append((mean, variance))
    return np.array(moments)


def observed_moments(velocity, steps, shift):
    """Mean and variance of COUNT samples after each step."""
    moments = []
    draw = stepwise(velocity, make_sampler("euler_ancestral", steps, shift))
    noise = jax.random.normal(jax.random.key(1), (4, COUNT // 4))
    draw(None, noise, None, jax.random.key(2), lambda done, x: moments.append((np.mean(x), np.var(x))))
    return np.array(moments)


def assert_within_sampling_error(observed, expected):
    # 5 standard errors: of the mean sqrt(var / n), of the variance var sqrt(2 / n) for a normal distribution;
    # 1e-6: float32 rounding, for levels where the variance is 0
    np.testing.assert_array_less(np.abs(observed[:, 0] - expected[:, 0]), 5 * np.sqrt(expected[:, 1] / COUNT) + 1e-6)
    np.testing.assert_array_less(
        np.abs(observed[:, 1] - expected[:, 1]), 5 * expected[:, 1] * np.sqrt(2 / COUNT) + 1e-6
    )


def test_ancestral_samples_follow_the_exact_moments_of_the_method():
    assert_within_sampling_error(observed_moments(gaussian_velocity(STD), 20, 3.0), ancestral_moments(20, 3.0))


def test_ancestral_moments_converge_to_the_true_marginals():
    """The largest bias over all levels vanishes with the step size; with any other amount of noise it would not."""

    def bias(steps):
        sigmas = euler_schedule(steps, 3.0).sigmas[1:]
        return np.abs(ancestral_moments(steps, 3.0) - np.stack(marginal(sigmas), 1)).max(0)

    assert bias(200)[0] < 1e-12  # the mean is exact
    assert bias(400)[1] < 0.05 * STD**2
    assert 3.5 < bias(400)[1] / bias(1600)[1] < 4.1  # the variance is of first order: 4 in the limit


def test_ancestral_marginals_are_exact_for_a_single_datum():
    """With std 0 the model knows x_0, so no step-size error is left: mean and variance are right at every level."""
    sigmas = euler_schedule(10, 3.0).sigmas[1:]
    expected = np.stack(marginal(sigmas, 0.0), 1)
    assert_within_sampling_error(observed_moments(gaussian_velocity(0.0), 10, 3.0), expected)


def test_ancestral_step_keeps_data_and_replaces_noise():
    """x_0 enters with 1 - s', the old noise with d (1 - s') / (1 - d) where d = s'^2 / s; new noise fills up to s'."""
    sampler = make_sampler("euler_ancestral", 4, 3.0)
    s, to = sampler.schedule.sigmas[1:3]
    data, noise = jax.random.normal(jax.random.key(0), (2, 3, 8))
    key = jax.random.key(1)
    _, x = sampler.step((), (1 - s) * data + s * noise, noise - data, 1, key)
    fresh = jax.random.normal(jax.random.fold_in(key, 1), x.shape)
    down = to**2 / s
    kept = down * (1 - to) / (1 - down)
    expected = (1 - to) * data + kept * noise + np.sqrt(to**2 - kept**2) * fresh
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-6)  # float32: a few epsilon of numbers up to 3


def test_ancestral_noise_depends_on_the_key_alone():
    noise = jax.random.normal(jax.random.key(0), (2, 8))
    first, again, other = (
        run(gaussian_velocity(STD), "euler_ancestral", 5, 3.0, noise, jax.random.key(k)) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min() > 1e-4


def test_ancestral_noise_of_a_sample_depends_on_its_own_key_alone():
    """With a key for every sample, a sample is the same to the last bit wherever it is in whatever batch."""
    sampler = make_sampler("euler_ancestral", 4, 3.0)
    x, velocity = jax.random.normal(jax.random.key(0), (2, 3, 8))
    keys = jax.random.split(jax.random.key(1), 3)
    order = np.array([2, 0])
    _, whole = sampler.step((), x, velocity, 1, keys)
    _, part = sampler.step((), x[order], velocity[order], 1, keys[order])
    np.testing.assert_array_equal(part, whole[order])
    _, one = sampler.step((), x[1], velocity[1], 1, keys[1])  # of the same key, as a batch of its own
    np.testing.assert_allclose(one, whole[1], rtol=0, atol=1e-6)  # batched or not, XLA may fuse differently


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_multistep_samplers_are_more_accurate_than_euler(name):
    """Against the closed-form solution of the flow: x_1 = eps maps to MEAN + STD eps, which Euler misses by 1/steps."""
    noise = jax.random.normal(jax.random.key(0), (2, 50))

    def error(method):
        return np.abs(run(gaussian_velocity(STD), method, 50, 3.0, noise) - (MEAN + STD * noise)).max()

    assert error(name) < error("euler") / 5


def test_ancestral_needs_a_key():
    with pytest.raises(ValueError, match="random key"):
        run(gaussian_velocity(STD), "euler_ancestral", 2, 3.0, jnp.zeros((1, 2)))


def test_multistep_needs_a_schedule_below_one():
    with pytest.raises(ValueError, match="starts below 1"):
        unipc(euler_schedule(5, 3.0))


def test_unknown_sampler_names_the_known_ones():
    with pytest.raises(UserError, match=r"euler, euler_ancestral, dpm\+\+, unipc"):
        make_sampler("ddim", 50, 3.0)


@pytest.mark.parametrize("steps,shift", [(0, 3.0), (10, 0.0)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_impossible_schedules_are_refused(name, steps, shift):
    with pytest.raises(UserError, match="at least one step"):
        make_sampler(name, steps, shift)
