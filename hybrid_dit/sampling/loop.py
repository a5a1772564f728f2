"""The sampling loop, compiled whole or one step at a time, and classifier-free guidance.

A velocity function is `velocity(params, x, t, context) -> v`: x float32 [b ...], t float32 [b] in 0..1000, `params` and
`context` any pytrees. They are arguments, not closed over, so that jit does not bake gigabytes of weights into the
program and one compiled program serves every prompt.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_dit.array_typing import Array, Float, PyTree
from hybrid_dit.sampling.steppers import Sampler

Velocity = Callable[[PyTree, Array, Array, PyTree], Array]


def guided(velocity: Velocity, scale: float) -> Velocity:
    """v_uncond + scale (v_cond - v_uncond), in one call of twice the batch (arXiv:2207.12598).

    Returns:
        a velocity function whose context is a pair (conditional, unconditional) of contexts for `velocity`, with the
        batch in axis 0 of every leaf; that of the unconditional one may be 1.
    """

    def combined(params, x, t, context):
        both = jax.tree.map(lambda c, u: jnp.concatenate([c, jnp.broadcast_to(u, c.shape)]), *context)
        v = velocity(params, jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        cond, uncond = jnp.split(v.astype(jnp.float32), 2)
        return uncond + scale * (cond - uncond)

    return combined


def sample(
    velocity: Velocity,
    sampler: Sampler,
    params: PyTree,
    noise: Float[Array, "b ..."],
    context: PyTree = None,
    key: Array | None = None,
) -> Float[Array, "b ..."]:
    """Runs all steps in one `lax.scan`; for use under jit: `jax.jit(functools.partial(sample, velocity, sampler))`.

    Args:
        velocity: see above; wrap it in `guided` for guidance.
        sampler: from `make_sampler`.
        params: passed on to `velocity`.
        noise: standard normal; the state of the loop is float32 whatever the dtype that `velocity` computes in.
        context: passed on to `velocity`.
        key: for samplers that draw noise.

    Returns:
        the sample, float32.
    """
    x = noise.astype(jnp.float32)

    def body(carry, i):
        return _step(velocity, sampler, carry, i, params, context, key), None

    (_, x), _ = jax.lax.scan(body, (sampler.init(x), x), jnp.arange(sampler.schedule.num_steps))
    return x


def stepwise(velocity: Velocity, sampler: Sampler) -> Callable[..., Array]:
    """Returns `run(params, noise, context=None, key=None, on_step=None)`: `sample` as a Python loop over a jitted step.

    Keep the returned function: calling it again with equal shapes compiles nothing. `on_step(done, x)` is called after
    each step with the number of finished steps, once the step really is finished.
    """
    step = jax.jit(lambda *args: _step(velocity, sampler, *args))

    def run(params, noise, context=None, key=None, on_step=None):
        x = noise.astype(jnp.float32)
        state = sampler.init(x)
        for i in range(sampler.schedule.num_steps):
            state, x = step((state, x), i, params, context, key)
            if on_step is not None:
                on_step(i + 1, jax.block_until_ready(x))
        return x

    return run


def _step(velocity, sampler, carry, i, params, context, key):
    state, x = carry
    t = jnp.broadcast_to(jnp.asarray(sampler.schedule.timesteps)[i], x.shape[:1])
    v = velocity(params, x, t, context).astype(jnp.float32)
    return sampler.step(state, x, v, i, key)
