"""Noise levels of Wan's flow: x_s = (1 - s) x_0 + s eps, from s near 1 (noise) down to s = 0 (data).

All schedules space levels evenly and bend them by `shift_sigma`; they differ in the two ends. They are, to the last
bit, those of the diffusers schedulers named below, timesteps included.
"""

import dataclasses

import numpy as np
from jax.typing import ArrayLike

TRAIN_STEPS = 1000  # the model is fed t = 1000 s


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels and what the model is told of them.

    Attributes:
        sigmas: float64 [steps + 1], descending to 0. Values are those of float32, so that coefficients computed from
            them belong to the levels that the reference implementations use.
        timesteps: float32 [steps], what the model is given at `sigmas[:-1]`.
    """

    sigmas: np.ndarray
    timesteps: np.ndarray

    @property
    def num_steps(self) -> int:
        """Number of model evaluations (twice that with guidance)."""
        return len(self.timesteps)


def shift_sigma(sigma: ArrayLike, shift: float) -> ArrayLike:
    """Returns shift * s / (1 + (shift - 1) s): more steps at high noise for larger videos (SD3, arXiv:2403.03206)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unipc_schedule(num_steps: int, shift: float) -> Schedule:
    """The schedule of diffusers' `UniPCMultistepScheduler(use_flow_sigmas=True)`, which its Wan pipelines come with."""
    sigmas = shift_sigma(np.linspace(1, 1 / TRAIN_STEPS, num_steps + 1)[:-1], shift)
    sigmas[0] -= 1e-6  # log(1 - s) must be finite
    return _whole_timesteps(sigmas)


def wan_schedule(num_steps: int, shift: float) -> Schedule:
    """The schedule of diffusers' `DPMSolverMultistepScheduler(use_flow_sigmas=True)`, which is that of Wan's own UniPC.

    Wan's `wan/utils/fm_solvers_unipc.py` starts from 0.999 rounded to float32, hence sigmas equal within 1e-7.
    """
    sigmas = 1 - np.linspace(1, 1 / TRAIN_STEPS, num_steps + 1)
    return _whole_timesteps(shift_sigma(sigmas, shift)[:0:-1])


def euler_schedule(num_steps: int, shift: float) -> Schedule:
    """The schedule of diffusers' `FlowMatchEulerDiscreteScheduler`.

    Its last level before 0 is shifted twice (once as the smallest training level, once with all others), and
    timesteps are not rounded.
    """
    smallest = float(shift_sigma(np.array([1 / TRAIN_STEPS], np.float32), shift)[0])  # float32 arithmetic, as there
    sigmas = shift_sigma(np.linspace(TRAIN_STEPS, smallest * TRAIN_STEPS, num_steps) / TRAIN_STEPS, shift)
    return Schedule(_append_zero(sigmas), sigmas.astype(np.float32) * np.float32(TRAIN_STEPS))


def _whole_timesteps(sigmas: np.ndarray) -> Schedule:
    """Timesteps cut to whole numbers, as both reference implementations do."""
    return Schedule(_append_zero(sigmas), (sigmas * TRAIN_STEPS).astype(np.int64).astype(np.float32))


def _append_zero(sigmas: np.ndarray) -> np.ndarray:
    return np.append(sigmas, 0).astype(np.float32).astype(np.float64)
