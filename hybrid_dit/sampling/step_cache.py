"""Which denoising steps may take the velocity of an earlier one, as TeaCache does (arXiv:2411.19108).

What a block computes is modulated by the time embedding, and where that has barely changed the velocity has not either.
The timestep alone decides here, not the video (TeaCache's variant for Wan): so the steps are known before sampling, and
a video doesn't depend on those beside it in the batch. TeaCache's polynomial, fitted for each model, is left out.
"""

import numpy as np
from jax.typing import ArrayLike

from hybrid_dit.errors import UserError


def reused_steps(features: ArrayLike, threshold: float) -> np.ndarray:
    """Returns which steps reuse the last velocity, bool [steps].

    A step is computed when the relative L1 changes |f_i - f_{i-1}| / |f_{i-1}| since the last computed one add up to
    `threshold` or more; the first and the last step always are. With threshold 0 all are.

    Args:
        features: of the schedule's timesteps, [steps, ...]; the DiT's modulation.
        threshold: at least 0.

    Raises:
        UserError: a negative threshold.
    """
    if threshold < 0:
        raise UserError(f"a threshold for reusing steps must be at least 0 (0: never), got {threshold}")
    flat = np.asarray(features, np.float64).reshape(len(features), -1)
    change = np.abs(np.diff(flat, axis=0)).sum(axis=1) / np.abs(flat[:-1]).sum(axis=1)
    reuse, total = np.zeros(len(flat), bool), 0.0
    for i in range(1, len(flat) - 1):
        total += change[i - 1]
        reuse[i] = total < threshold
        total = total if reuse[i] else 0.0
    return reuse
