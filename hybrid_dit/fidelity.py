"""How near a student comes to its teacher, where nobody can score the videos: likeness of pixels, and of velocities."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from hybrid_dit.array_typing import Array, Float, Shaped
from hybrid_dit.sampling.schedule import TRAIN_STEPS

_K1, _K2, _SIGMA, _RADIUS = 0.01, 0.03, 1.5, 5  # constants of Wang et al. 2004; a window of 11 pixels


def psnr(videos: Shaped[np.ndarray, "n t y x 3"], reference: Shaped[np.ndarray, "n t y x 3"]) -> Float[np.ndarray, "n"]:
    """Returns 10 log10(255² / mean squared error) of every uint8 video, float64; 100 dB at most."""
    pairs = zip(videos, reference)  # one by one: float copies of all of them may not fit
    error = np.array([np.square(a.astype(np.float32) - b).mean(dtype=np.float64) for a, b in pairs])
    return 10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10))  # a limit, so that means of equal videos exist


def ssim(videos: Shaped[np.ndarray, "n t y x 3"], reference: Shaped[np.ndarray, "n t y x 3"]) -> Float[np.ndarray, "n"]:
    """Structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004) of uint8 videos: mean over frames and colours.

    (2 μ_a μ_b + C1)(2 σ_ab + C2) / ((μ_a² + μ_b² + C1)(σ_a² + σ_b² + C2)) under a Gaussian window of σ = 1.5 pixels,
    averaged over the places where the window of 11 x 11 lies in the frame.
    """
    frames = [[_ssim_of_frame(a, b) for a, b in zip(*pair)] for pair in zip(videos, reference)]
    return np.array(frames).reshape(len(videos), -1).mean(axis=1)


def _ssim_of_frame(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _local_mean(a), _local_mean(b)
    var_a, var_b = _local_mean(a * a) - mean_a**2, _local_mean(b * b) - mean_b**2
    shared = _local_mean(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _local_mean(x: np.ndarray) -> np.ndarray:
    smooth = ndimage.gaussian_filter(x, (_SIGMA, _SIGMA, 0), radius=(_RADIUS, _RADIUS, 0))
    return smooth[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]


def probe_times(timesteps: Float[np.ndarray, "steps"], count: int) -> Float[np.ndarray, "probes"]:
    """Returns at most `count` of a schedule's timesteps, evenly spaced over its steps, the first and last included."""
    steps = len(timesteps)
    return np.asarray(timesteps)[np.unique(np.linspace(0, steps - 1, min(count, steps)).round().astype(int))]


def noisy(latents: Float[Array, "b t y x c"], noise: Float[Array, "b t y x c"], time: float) -> Array:
    """Returns x_s = (1 − s) x_0 + s ε at s = time / 1000: where a sampler that ends at x_0 comes through."""
    level = jnp.float32(time) / TRAIN_STEPS
    return (1 - level) * latents + level * noise


def velocities(
    velocity: Callable[..., Array], params, latents: Array, noise: Array, times: np.ndarray, context
) -> Float[np.ndarray, "k b t y x c"]:
    """Returns the velocities at `noisy` latents for every timestep, float32, on the host.

    Args:
        velocity: jitted (params, x, t [b], context), guidance included.
        params: passed on.
        latents: clean and normalised, [b, t, y, x, c].
        noise: standard normal, of their shape.
        times: timesteps, 0 to 1000.
        context: passed on.
    """

    def at(time: float) -> np.ndarray:
        same = jnp.full(len(latents), time, jnp.float32)
        return np.asarray(velocity(params, noisy(latents, noise, time), same, context), np.float32)

    return np.stack([at(time) for time in times.tolist()])


def relative_errors(
    student: Shaped[np.ndarray, "k b t y x c"], teacher: Shaped[np.ndarray, "k b t y x c"]
) -> dict[str, Float[np.ndarray, "k b"]]:
    """Returns ‖v̂ − v‖ / ‖v‖ of every velocity in the norms "l1" and "l2", float64."""
    axes = tuple(range(2, teacher.ndim))
    difference, teacher = student.astype(np.float64) - teacher, teacher.astype(np.float64)
    return {
        "l1": np.abs(difference).sum(axes) / np.abs(teacher).sum(axes),
        "l2": np.sqrt(np.square(difference).sum(axes) / np.square(teacher).sum(axes)),
    }
