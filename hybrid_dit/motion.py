"""How much moves in a video: optical flow without a network, in NumPy.

Dense flow after Lucas and Kanade (1981), coarse to fine (Bouguet 2001): at every pixel the displacement d that solves
(Σ ∇I ∇Iᵀ + λ 1) d = −Σ ∇I I_t over a window, refined from a quarter of the resolution upwards. λ makes flow vanish
where there is nothing to see move.
"""

import numpy as np
from scipy import ndimage

from hybrid_dit.array_typing import Float, Shaped
from hybrid_dit.errors import UserError

SIDE = 128  # pixels of the shorter side that videos are reduced to
_LEVELS, _ROUNDS = 3, 2
_WINDOW = 11  # pixels
_SMOOTH = 1.5  # pixels, sigma of the blur before derivatives are taken
_DAMPING = 1.0  # squared levels per pixel, of 255; a soft edge of ten levels has more
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601


def motion_magnitude(video: Shaped[np.ndarray, "t y x 3"]) -> float:
    """Returns Σ |∇I|² |d| / Σ |∇I|², the mean speed of what is seen, in percent of the shorter side per frame.

    Weighted by its squared gradient, the outline of a thing counts and a blank background does not. Things faster
    than about a tenth of the shorter side per frame are lost.

    Args:
        video: uint8, at least two frames.

    Raises:
        UserError: another dtype, or fewer frames.
    """
    if video.dtype != np.uint8 or len(video) < 2:
        raise UserError(f"motion is measured on uint8 videos of two frames or more, got {video.dtype} {video.shape}")
    images = _reduced(video)
    gy, gx = np.gradient(_blurred(images[:-1]), axis=(1, 2))
    weight = gx * gx + gy * gy
    total = weight.sum(dtype=np.float64)
    if total == 0:  # nothing to see
        return 0.0
    speed = np.linalg.norm(optical_flow(images), axis=-1)
    return float(100 * (speed * weight).sum(dtype=np.float64) / total / min(images.shape[1:]))


def optical_flow(images: Float[np.ndarray, "t y x"]) -> Float[np.ndarray, "s y x 2"]:
    """Returns where every pixel of an image (levels 0 to 255) goes in the next, (x, y) in pixels; s = t − 1."""
    pyramid = [images]
    while len(pyramid) < _LEVELS and min(pyramid[-1].shape[1:]) >= 2 * _WINDOW:
        pyramid.append(_halved(pyramid[-1]))
    flow = np.zeros((len(images) - 1, *pyramid[-1].shape[1:], 2), np.float32)
    for level in reversed(pyramid):
        if flow.shape[1:3] != level.shape[1:]:
            flow = 2 * _doubled(flow, level.shape[1:])
        flow = _refine(_blurred(level), flow)
    return flow


def _refine(images: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Returns `flow` improved by a few rounds of Lucas-Kanade at one resolution."""
    before, after = images[:-1], images[1:]
    gy, gx = np.gradient(before, axis=(1, 2))
    xx, yy, xy = _window(gx * gx) + _DAMPING, _window(gy * gy) + _DAMPING, _window(gx * gy)
    determinant = xx * yy - xy * xy
    for _ in range(_ROUNDS):
        moved, seen = _moved(after, flow)
        change = (moved - before) * seen  # what has left the frame says nothing
        bx, by = _window(gx * change), _window(gy * change)
        flow = flow - np.stack([yy * bx - xy * by, xx * by - xy * bx], axis=-1) / determinant[..., None]
    return flow


def _moved(images: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `images` looked up at every pixel's place after `flow`, and whether that place is in the frame."""
    t, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in images.shape), indexing="ij", sparse=True)
    y, x = y + flow[..., 1], x + flow[..., 0]
    seen = (y >= 0) & (y <= images.shape[1] - 1) & (x >= 0) & (x <= images.shape[2] - 1)
    return ndimage.map_coordinates(images, np.broadcast_arrays(t, y, x), order=1, mode="nearest"), seen


def _blurred(images: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(images, (0, _SMOOTH, _SMOOTH))


def _window(x: np.ndarray) -> np.ndarray:
    return ndimage.uniform_filter(x, (0, _WINDOW, _WINDOW), mode="nearest")


def _halved(images: np.ndarray) -> np.ndarray:
    """Returns means of 2 x 2 pixels; an odd last row or column is left out."""
    t, y, x = images.shape
    return images[:, : y // 2 * 2, : x // 2 * 2].reshape(t, y // 2, 2, x // 2, 2).mean(axis=(2, 4))


def _doubled(flow: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns `flow` at twice its resolution, repeated at the edge where that is short of `shape`."""
    large = flow.repeat(2, axis=1).repeat(2, axis=2)
    return np.pad(large, ((0, 0), *((0, s - n) for s, n in zip(shape, large.shape[1:])), (0, 0)), mode="edge")


def _reduced(video: np.ndarray) -> np.ndarray:
    """Returns luma [t, y, x] float32, averaged over squares so that the shorter side comes near `SIDE` pixels."""
    step = max(1, min(video.shape[1:3]) // SIDE)
    t, y, x = len(video), video.shape[1] // step, video.shape[2] // step
    blocks = video[:, : y * step, : x * step] @ _LUMA
    return blocks.reshape(t, y, step, x, step).mean(axis=(2, 4))
