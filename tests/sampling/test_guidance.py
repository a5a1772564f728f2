import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_dit.sampling import guided, guided_steps, make_sampler

PARAMS = {"a": jnp.float32(1.5)}
EPSILON = 12 * 2**-23  # guidance 6 weighs two float32 numbers of order 1 by 6 and -5


def velocity(params, x, t, context):
    return jnp.tanh(params["a"] * x + 0.002 * t[:, None] + context)


def counted(batches):
    """`velocity` that notes the batch of every call, when it runs rather than when it is traced."""

    def call(params, x, t, context):
        jax.debug.callback(lambda *a: batches.append(tuple(len(y) for y in a)), x, t, context)
        return velocity(params, x, t, context)

    return call


def inputs():
    return jax.random.normal(jax.random.key(0), (3, 2, 6))  # x, prompts, negative prompts


@pytest.mark.parametrize("negatives", [1, 2])
@pytest.mark.parametrize("sequential", [False, True])
def test_guidance_extrapolates(sequential, negatives):
    batches = []
    x, context, negative = inputs()
    negative, t = negative[:negatives], jnp.array([900.0, 100.0])
    actual = guided(counted(batches), 6.0, sequential=sequential)(PARAMS, x, t, (context, negative))
    cond, uncond = velocity(PARAMS, x, t, context), velocity(PARAMS, x, t, negative)
    np.testing.assert_allclose(actual, uncond + 6 * (cond - uncond), rtol=0, atol=EPSILON)
    jax.effects_barrier()
    assert batches == ([(2, 2, 2)] * 2 if sequential else [(4, 4, 4)])


def test_sequential_branches_need_the_memory_of_one():
    def wide(params, x, t, context):  # its temporaries, [b, 6, 4096], are much larger than its result
        return jnp.sort(jnp.sin(x[..., None] * jnp.arange(4096.0)), axis=-1)[..., 7]

    def temporaries(function, context):
        compiled = jax.jit(function).lower(PARAMS, *inputs()[:1], jnp.ones(2), context).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    x, *context = inputs()
    one = temporaries(wide, x)
    assert one >= 2 * 6 * 4096 * 4  # the array counts
    assert temporaries(guided(wide, 6.0), tuple(context)) > 1.9 * one
    assert temporaries(guided(wide, 6.0, sequential=True), tuple(context)) < 1.1 * one


@pytest.mark.parametrize("sequential", [False, True])
def test_outside_its_interval_guidance_computes_one_branch(sequential):
    batches = []
    x, context, negative = inputs()
    function = jax.jit(guided(counted(batches), 6.0, (300.0, 800.0), sequential))
    for t, inside in ((300.0, True), (299.0, False), (800.0, True), (801.0, False)):
        t = jnp.full(2, t)
        cond, uncond = velocity(PARAMS, x, t, context), velocity(PARAMS, x, t, negative)
        expected = uncond + 6 * (cond - uncond) if inside else cond
        batches.clear()
        actual = function(PARAMS, x, t, (context, negative))
        jax.effects_barrier()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=EPSILON)
        assert len(batches) == (2 if inside and sequential else 1)
        assert batches[0][0] == (4 if inside and not sequential else 2)


def test_each_video_of_a_batch_has_its_own_interval():
    x, context, negative = inputs()
    t = jnp.array([900.0, 500.0])
    actual = guided(velocity, 6.0, (300.0, 800.0))(PARAMS, x, t, (context, negative))
    cond, uncond = velocity(PARAMS, x, t, context), velocity(PARAMS, x, t, negative)
    expected = jnp.stack([cond[0], uncond[1] + 6 * (cond[1] - uncond[1])])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=EPSILON)


def test_guided_steps_are_those_whose_timestep_is_inside():
    times = make_sampler("euler", 10, 3.0).schedule.timesteps
    inside = guided_steps(times, (float(times[6]), float(times[3])))
    np.testing.assert_array_equal(inside, [False] * 3 + [True] * 4 + [False] * 3)
