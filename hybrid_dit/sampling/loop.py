"""The sampling loop, compiled whole or one step at a time.

A velocity function is `velocity(params, x, t, context) -> v`: x float32 [b ...], t float32 [b] in 0..1000, `params` and
`context` any pytrees. They are arguments, not closed over, so that jit does not bake gigabytes of weights into the
program and one compiled program serves every prompt.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_dit.array_typing import Array, Bool, Float, PyTree
from hybrid_dit.sampling.guidance import Velocity
from hybrid_dit.sampling.steppers import Sampler


def sample(
    velocity: Velocity,
    sampler: Sampler,
    params: PyTree,
    noise: Float[Array, "b ..."],
    context: PyTree = None,
    key: Array | None = None,
    reuse: Bool[Array, "steps"] | None = None,
) -> Float[Array, "b ..."]:
    """Runs all steps in one `lax.scan`; for use under jit: `jax.jit(functools.partial(sample, velocity, sampler))`.

    Args:
        velocity: see above; wrap it in `guided` for guidance.
        sampler: from `make_sampler`.
        params: passed on to `velocity`.
        noise: standard normal; the state of the loop is float32 whatever the dtype that `velocity` computes in.
        context: passed on to `velocity`.
        key: for samplers that draw noise, see `Sampler`.
        reuse: steps that take the last velocity again in place of calling `velocity`, see `step_cache`.

    Returns:
        the sample, float32.
    """

    def body(carry, i):
        return _step(velocity, sampler, carry, i, params, context, key, reuse), None

    steps = jnp.arange(sampler.schedule.num_steps)
    (_, x, _), _ = jax.lax.scan(body, start(sampler, noise, reuse), steps)
    return x


def stepwise(velocity: Velocity, sampler: Sampler) -> Callable[..., Array]:
    """Returns `run(params, noise, context=None, key=None, on_step=None, reuse=None)`: `sample` as a Python loop.

    Its step is jitted. Keep the returned function: calling it again with equal shapes compiles nothing.
    `on_step(done, x)` is called after each step with the number of finished steps, once the step really is finished.
    """
    step = one_step(velocity, sampler)

    def run(params, noise, context=None, key=None, on_step=None, reuse=None):
        carry = start(sampler, noise, reuse)
        for i in range(sampler.schedule.num_steps):
            carry = step(carry, i, params, context, key, reuse)
            if on_step is not None:
                on_step(i + 1, jax.block_until_ready(carry[1]))
        return carry[1]

    return run


def start(sampler: Sampler, noise: Array, reuse: Array | None = None) -> PyTree:
    """Returns the loop's carry: (the sampler's memory, x, the last velocity if steps may reuse it)."""
    x = noise.astype(jnp.float32)
    return sampler.init(x), x, () if reuse is None else jnp.zeros_like(x)


def one_step(velocity: Velocity, sampler: Sampler):
    """Returns the jitted step (carry, i, params, context, key, reuse) -> carry."""
    return jax.jit(lambda *args: _step(velocity, sampler, *args))


def _step(velocity, sampler, carry, i, params, context, key, reuse):
    state, x, last = carry
    t = jnp.broadcast_to(jnp.asarray(sampler.schedule.timesteps)[i], x.shape[:1])

    def compute():
        return velocity(params, x, t, context).astype(jnp.float32)

    v = compute() if reuse is None else jax.lax.cond(jnp.asarray(reuse)[i], lambda: last, compute)
    return *sampler.step(state, x, v, i, key), () if reuse is None else v
