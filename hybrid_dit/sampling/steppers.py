"""One step of each sampler, as pure functions with coefficient tables computed once in float64.

A table has one row per step and is indexed by the traced step number, so that a loop over steps compiles one step
whatever their number, in `lax.scan` and in a Python loop alike (`hybrid_dit.sampling.loop`).

The model predicts the velocity v = eps - x_0 of x_s = (1 - s) x_0 + s eps; hence x_0 = x_s - s v.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit.array_typing import Array, PyTree
from hybrid_dit.errors import UserError
from hybrid_dit.sampling.schedule import Schedule, euler_schedule, unipc_schedule, wan_schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A schedule and a way to walk down it.

    Attributes:
        schedule: noise levels and timesteps.
        init: x -> state, the memory of multistep methods (a pytree of arrays, empty for one-step methods).
        step: (state, x, velocity, i, key) -> (state, x at level i + 1); x and velocity float32 [b ...], i a traced or
            Python integer. key: of the whole run, one for the batch or one per sample, [b], whose noise then doesn't
            depend on what else is in the batch (deterministic samplers ignore it).
    """

    schedule: Schedule
    init: Callable[[Array], PyTree]
    step: Callable[..., tuple[PyTree, Array]]


def euler(schedule: Schedule) -> Sampler:
    """x += (s' - s) v, the explicit Euler method for dx/ds = v."""
    widths = jnp.asarray(np.diff(schedule.sigmas), jnp.float32)

    def step(state, x, velocity, i, key):
        return state, x + widths[i] * velocity

    return Sampler(schedule, lambda x: (), step)


def euler_ancestral(schedule: Schedule) -> Sampler:
    """Euler down to a level below the next one, then fresh noise up to it; a first-order SDE solver ("eta = 1").

    From level s to s', with d = s'^2 / s <= s' (k-diffusion's rule for eta = 1 with flow levels, as in ComfyUI):
        x_d = x + (d - s) v                                    is (1 - d) x_0 + d eps
        x'  = (1 - s') / (1 - d) x_d + r eps',   r^2 = s'^2 - (d (1 - s') / (1 - d))^2
    The factor brings x_0's weight to 1 - s', and r completes the variance of the noise to s'^2. Noise of step i is
    drawn with `fold_in(key, i)`, of the batch or of every sample.
    """
    s, s_next = schedule.sigmas[:-1], schedule.sigmas[1:]
    down = s_next**2 / s
    scale = (1 - s_next) / (1 - down)
    renoise = np.sqrt(s_next**2 - (down * scale) ** 2)
    table = jnp.asarray(np.stack([scale, scale * (down - s), renoise], 1), jnp.float32)

    def step(state, x, velocity, i, key):
        if key is None:
            raise ValueError("euler_ancestral draws noise at every step: pass a random key")
        noise = _step_noise(key, i, x) if key.ndim == 0 else jax.vmap(_step_noise, (0, None, 0))(key, i, x)
        return state, table[i, 0] * x + table[i, 1] * velocity + table[i, 2] * noise

    return Sampler(schedule, lambda x: (), step)


def _step_noise(key: Array, i, x: Array) -> Array:
    return jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)


def dpm_plus_plus(schedule: Schedule) -> Sampler:
    """DPM-Solver++ (2M), arXiv:2211.01095; as diffusers' `DPMSolverMultistepScheduler`: midpoint, last step Euler."""
    sigmas = jnp.asarray(schedule.sigmas, jnp.float32)
    table = jnp.asarray(_predictor(schedule.sigmas), jnp.float32)

    def step(state, x, velocity, i, key):
        data = x - sigmas[i] * velocity
        return data, table[i, 0] * x + table[i, 1] * data + table[i, 2] * state

    return Sampler(schedule, jnp.zeros_like, step)


def unipc(schedule: Schedule) -> Sampler:
    """UniPC of order 2 with B(h) = e^h - 1, arXiv:2302.04867; as diffusers' `UniPCMultistepScheduler` for Wan.

    The model's answer at a predicted x first corrects that x (UniC); the corrected x then goes through the predictor
    (UniP). The answer is not evaluated anew at the corrected x.
    """
    sigmas = jnp.asarray(schedule.sigmas, jnp.float32)
    correct = jnp.asarray(_corrector(schedule.sigmas), jnp.float32)
    predict = jnp.asarray(_predictor(schedule.sigmas), jnp.float32)

    def step(state, x, velocity, i, key):
        before, data_1, data_2 = state  # corrected x one step ago; estimates of x_0 one and two steps ago
        data = x - sigmas[i] * velocity
        c = correct[i]
        x = c[0] * x + c[1] * before + c[2] * data + c[3] * data_1 + c[4] * data_2
        p = predict[i]
        return (x, data, data_1), p[0] * x + p[1] * data + p[2] * data_1

    return Sampler(schedule, lambda x: (jnp.zeros_like(x),) * 3, step)


SAMPLERS = {
    "euler": (euler, euler_schedule),
    "euler_ancestral": (euler_ancestral, euler_schedule),
    "dpm++": (dpm_plus_plus, wan_schedule),
    "unipc": (unipc, unipc_schedule),
}


def make_sampler(name: str, num_steps: int, shift: float) -> Sampler:
    """Returns a sampler of `SAMPLERS` on its usual schedule; `unipc(wan_schedule(50, 5.0))` gives other combinations.

    Args:
        name: a key of `SAMPLERS`.
        num_steps: number of steps; Wan's setting is 50 with UniPC.
        shift: of the schedule; Wan uses 3 at 480p and 5 at 720p.

    Raises:
        UserError: unknown name, or values that give no schedule.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    if num_steps < 1 or shift <= 0:
        raise UserError(f"a sampler needs at least one step and a positive shift, got {num_steps} steps, shift {shift}")
    method, schedule = SAMPLERS[name]
    return method(schedule(num_steps, shift))


def _log_snr(sigmas: np.ndarray) -> np.ndarray:
    """lambda = log((1 - s) / s), in which the multistep formulas are written; infinite at s = 0."""
    if sigmas[0] >= 1:
        raise ValueError("multistep samplers need a schedule that starts below 1, such as unipc_schedule")
    with np.errstate(divide="ignore"):
        return np.log(1 - sigmas) - np.log(sigmas)


def _predictor(sigmas: np.ndarray) -> np.ndarray:
    """Coefficients of (x, x_0 estimate now, one step ago), float64 [steps, 3]; first and last step are of order 1.

    The estimate at the start of the step plus half a step of its slope in lambda: UniP-2 and DPM-Solver++ (2M) agree.
    """
    lam, steps = _log_snr(sigmas), len(sigmas) - 1
    rows = np.zeros((steps, 3))
    for i in range(steps):
        h = lam[i + 1] - lam[i]
        weight = -(1 - sigmas[i + 1]) * np.expm1(-h)
        slope = 0.5 * weight * h / (lam[i] - lam[i - 1]) if 0 < i < steps - 1 else 0.0
        rows[i] = sigmas[i + 1] / sigmas[i], weight + slope, -slope
    return rows


def _corrector(sigmas: np.ndarray) -> np.ndarray:
    """Coefficients of (predicted x, corrected x before, x_0 estimate now, 1 and 2 steps ago), float64 [steps, 5].

    Row 0 keeps x, for there is no step behind it yet. Row 1 is UniC-1; later rows are UniC-2, whose weights of the
    two differences of x_0 estimates solve the paper's order conditions, with lambda relative to the step.
    """
    lam, steps = _log_snr(sigmas), len(sigmas) - 1
    rows = np.zeros((steps, 5))
    rows[0, 0] = 1
    for i in range(1, steps):
        h = lam[i] - lam[i - 1]
        phi_1 = np.expm1(-h)
        weight = -(1 - sigmas[i]) * phi_1
        now, old = 0.5, 0.0  # weights of (x_0 now - x_0 one ago) and of (x_0 two ago - x_0 one ago)
        if i > 1:
            ratio = (lam[i - 2] - lam[i - 1]) / h
            phi_2 = -phi_1 / h - 1
            phi_3 = -phi_2 / h - 0.5
            old, now = np.linalg.solve([[1, 1], [ratio, 1]], [phi_2 / phi_1, 2 * phi_3 / phi_1])
            old /= ratio
        rows[i] = 0, sigmas[i] / sigmas[i - 1], weight * now, weight * (1 - now - old), weight * old
    return rows
