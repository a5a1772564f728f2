import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_dit.sampling import SAMPLERS, guided, make_sampler, sample, stepwise

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


@pytest.mark.parametrize("negatives", [1, 2])
def test_guidance_extrapolates_in_one_call_of_twice_the_batch(negatives):
    batches = []

    def counting(params, x, t, context):
        batches.append((x.shape[0], t.shape[0], context.shape[0]))
        return velocity(params, x, t, context)

    x, context, negative = inputs()
    negative, t = negative[:negatives], jnp.array([900.0, 100.0])
    actual = guided(counting, 6.0)(PARAMS, x, t, (context, negative))
    cond, uncond = velocity(PARAMS, x, t, context), velocity(PARAMS, x, t, negative)
    assert batches == [(4, 4, 4)]
    np.testing.assert_allclose(actual, uncond + 6 * (cond - uncond), rtol=0, atol=2e-6)  # 12 x epsilon, rounded up
