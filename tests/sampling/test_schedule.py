import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from hybrid_dit.sampling.schedule import euler_schedule, shift_sigma, unipc_schedule, wan_schedule

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}
PAIRS = {
    "unipc": (unipc_schedule, lambda shift: UniPCMultistepScheduler(**FLOW, flow_shift=shift)),
    "wan": (wan_schedule, lambda shift: DPMSolverMultistepScheduler(**FLOW, flow_shift=shift)),
    "euler": (euler_schedule, lambda shift: FlowMatchEulerDiscreteScheduler(1000, shift=shift)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_bit_equal_to_diffusers(name, shift):
    ours, theirs = PAIRS[name]
    for steps in (1, 2, 3, 10, 20, 30, 50):
        schedule, scheduler = ours(steps, shift), theirs(shift)
        scheduler.set_timesteps(steps)
        np.testing.assert_array_equal(schedule.sigmas, scheduler.sigmas.numpy())
        np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
        assert (schedule.num_steps, schedule.timesteps.dtype) == (steps, np.float32)


def test_shift_keeps_ends_and_moves_the_middle():
    np.testing.assert_allclose(shift_sigma(np.array([0, 0.5, 1]), 3.0), [0, 0.75, 1])
