"""Samplers for flow models: from noise to latents in a few tens of evaluations of the model.

Example:
    sampler = make_sampler("unipc", num_steps=50, shift=3.0)
    run = stepwise(guided(velocity, scale=6.0), sampler)  # velocity(params, x, t, context)
    latents = run(params, noise, (context, negative_context), on_step=lambda done, x: print(done))
"""

from hybrid_dit.sampling.guidance import ALWAYS, check_interval, guided, guided_steps
from hybrid_dit.sampling.loop import one_step, sample, start, stepwise
from hybrid_dit.sampling.schedule import Schedule, euler_schedule, shift_sigma, unipc_schedule, wan_schedule
from hybrid_dit.sampling.step_cache import reused_steps
from hybrid_dit.sampling.steppers import (
    SAMPLERS,
    Sampler,
    dpm_plus_plus,
    euler,
    euler_ancestral,
    make_sampler,
    unipc,
)

__all__ = [
    "ALWAYS",
    "SAMPLERS",
    "Sampler",
    "Schedule",
    "check_interval",
    "dpm_plus_plus",
    "euler",
    "euler_ancestral",
    "euler_schedule",
    "guided",
    "guided_steps",
    "make_sampler",
    "one_step",
    "reused_steps",
    "sample",
    "shift_sigma",
    "start",
    "stepwise",
    "unipc",
    "unipc_schedule",
    "wan_schedule",
]
