import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_dit.sampling import SAMPLERS, make_sampler, sample, stepwise

PARAMS = {"a": jnp.float32(1.5)}


def velocity(params, x, t, context):
    return jnp.tanh(params["a"] * x + 0.002 * t[:, None] + context)


def inputs():
    noise, context, negative = jax.random.normal(jax.random.key(0), (3, 2, 6))
    return noise, context, negative


@pytest.mark.parametrize("name", SAMPLERS)
def test_python_loop_equals_scan(name):
    noise, context, _ = inputs()
    sampler = make_sampler(name, 6, 3.0)
    scanned = jax.jit(functools.partial(sample, velocity, sampler))(PARAMS, noise, context, jax.random.key(1))
    looped = stepwise(velocity, sampler)(PARAMS, noise, context, jax.random.key(1))
    # the same operations, which XLA may fuse differently: a few roundings (epsilon 1.2e-7) of numbers of order 1
    np.testing.assert_allclose(looped, scanned, rtol=0, atol=3e-6)


def test_one_compilation_serves_all_steps_and_prompts():
    traces = []

    def counting(*args):
        traces.append(1)
        return velocity(*args)

    noise, context, negative = inputs()
    run = stepwise(counting, make_sampler("unipc", 20, 3.0))
    first, second = run(PARAMS, noise, context), run({"a": jnp.float32(0.5)}, noise, negative)
    assert len(traces) == 1
    assert np.abs(first - second).max() > 0.01


def test_progress_reports_every_step_and_ends_with_the_result():
    noise, context, _ = inputs()
    seen = []
    result = stepwise(velocity, make_sampler("euler", 4, 3.0))(PARAMS, noise, context, None, lambda *a: seen.append(a))
    assert [done for done, _ in seen] == [1, 2, 3, 4]
    np.testing.assert_array_equal(seen[-1][1], result)


def test_model_sees_float32_timesteps_of_the_schedule_and_loop_stays_float32():
    sampler = make_sampler("unipc", 5, 3.0)
    seen = []

    def low_precision(params, x, t, context):
        assert (x.dtype, t.dtype, t.shape) == (jnp.float32, jnp.float32, (2,))
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return velocity(params, x, t, context).astype(jnp.bfloat16)

    noise, context, _ = inputs()
    result = stepwise(low_precision, sampler)(PARAMS, noise.astype(jnp.bfloat16), context)
    jax.effects_barrier()
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(np.stack(seen), np.stack([sampler.schedule.timesteps] * 2, 1))


def test_reused_steps_take_the_last_velocity():
    """x += width * velocity by hand, with the velocity of the last step that was computed."""
    calls = []

    def counting(params, x, t, context):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return velocity(params, x, t, context)

    noise, context, _ = inputs()
    sampler = make_sampler("euler", 6, 3.0)
    sigmas, times = sampler.schedule.sigmas, sampler.schedule.timesteps
    reuse = np.array([False, True, False, True, True, False])
    expected = noise
    for i in range(6):
        v = v if reuse[i] else velocity(PARAMS, expected, jnp.full(2, times[i]), context)  # noqa: F821
        expected = expected + np.float32(sigmas[i + 1] - sigmas[i]) * v
    scanned = jax.jit(functools.partial(sample, counting, sampler))(PARAMS, noise, context, None, reuse)
    jax.effects_barrier()
    np.testing.assert_array_equal(calls, times[~reuse])  # nothing is computed at the others
    np.testing.assert_allclose(scanned, expected, rtol=0, atol=3e-6)  # see above


@pytest.mark.parametrize("name", ["unipc", "euler_ancestral"])
def test_reusing_no_step_changes_no_bit(name, optimised):
    noise, context, _ = inputs()
    run = stepwise(velocity, make_sampler(name, 4, 3.0))
    never = run(PARAMS, noise, context, jax.random.key(1), reuse=np.zeros(4, bool))
    np.testing.assert_array_equal(never, run(PARAMS, noise, context, jax.random.key(1)))
