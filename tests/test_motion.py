"""Motion of moving shapes, whose speed is known, and of what does not move."""

import numpy as np
import pytest

from hybrid_dit.data import shapes
from hybrid_dit.errors import UserError
from hybrid_dit.motion import SIDE, motion_magnitude, optical_flow


def video(kind, colour, radius, velocity, background, size=SIDE):
    """Five frames of one of SHAPES that moves by `velocity` pixels a frame."""
    y, x = np.mgrid[:size, :size]
    frames = []
    for t in range(5):
        dx, dy = x - 0.35 * size - t * velocity[0], y - 0.4 * size - t * velocity[1]
        cover = np.clip(0.5 - shapes.signed_distances(dx, dy, radius, np)[kind], 0, 1)[..., None]
        frames.append(background + cover * (np.array(colour) - background))
    return np.rint(frames).astype(np.uint8)


@pytest.mark.parametrize(
    "kind, colour, radius, background",
    [
        (0, (230, 30, 30), 10.0, (0, 0, 0)),
        (1, (235, 215, 20), 18.0, (255, 255, 255)),
        (2, (40, 60, 230), 10.0, (128, 128, 128)),
    ],
)
@pytest.mark.parametrize("speed", [0.5, 1.6, 2.2, 4.0])
def test_speed_of_a_thing_is_measured(kind, colour, radius, background, speed):
    """Within 5%: colours are rounded to levels and edges are one pixel wide, which half a pixel a frame feels most."""
    for velocity in ((speed, 0.0), (-0.6 * speed, 0.8 * speed)):
        measured = motion_magnitude(video(kind, colour, radius, velocity, background)) * SIDE / 100
        assert measured == pytest.approx(speed, rel=0.05)


def test_flow_has_the_sign_and_the_place_of_the_motion():
    moving = video(0, (230, 30, 30), 10.0, (2.0, -1.0), (0, 0, 0))
    flow = optical_flow(moving[..., 0].astype(np.float32))
    assert flow.shape == (4, SIDE, SIDE, 2)
    x, y = round(0.35 * SIDE) + 8, round(0.4 * SIDE)  # on the outline, at its right end
    np.testing.assert_allclose(flow[0, y, x], (2.0, -1.0), atol=0.15)
    assert np.abs(flow[:, -20:]).max() < 0.01  # far from it


def test_speed_does_not_depend_on_the_size_of_the_video():
    small = motion_magnitude(video(0, (230, 30, 30), 10.0, (2.0, 0.0), (0, 0, 0)))
    large = motion_magnitude(video(0, (230, 30, 30), 20.0, (4.0, 0.0), (0, 0, 0), 2 * SIDE))
    assert large == pytest.approx(small, rel=0.03)


def test_a_moving_texture_counts_whole_and_half_of_it_half():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(SIDE, 2 * SIDE))
    texture = np.fft.ifft2(
        np.fft.fft2(noise)
        * np.exp(
            -8
            * np.pi**2
            * sum(  # Gaussian of sigma 2
                f**2 for f in np.meshgrid(*(np.fft.fftfreq(n) for n in noise.shape), indexing="ij")
            )
        )
    ).real
    texture = np.clip(128 + 50 * texture / texture.std(), 0, 255).astype(np.uint8)
    moving = np.stack([texture[:, 3 * i : 3 * i + SIDE] for i in range(4)])[..., None].repeat(3, axis=-1)
    assert motion_magnitude(moving) == pytest.approx(100 * 3 / SIDE, rel=0.03)
    half = np.where((np.arange(SIDE) < SIDE // 2)[:, None, None], moving, moving[0])
    assert motion_magnitude(half) == pytest.approx(100 * 1.5 / SIDE, rel=0.1)  # the seam adds edges of its own


def test_what_does_not_move_has_no_motion():
    still = np.random.default_rng(0).integers(0, 256, (1, 64, 80, 3), np.uint8).repeat(3, axis=0)
    assert motion_magnitude(still) == 0
    assert motion_magnitude(np.full((3, 32, 32, 3), 7, np.uint8)) == 0


def test_unfit_videos_are_refused():
    with pytest.raises(UserError, match="two frames or more"):
        motion_magnitude(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="uint8"):
        motion_magnitude(np.zeros((2, 32, 32, 3), np.float32))


def test_odd_sizes_are_measured():
    frames = video(0, (230, 30, 30), 10.0, (2.0, 0.0), (0, 0, 0))[:, : SIDE - 3, : SIDE - 5]
    assert motion_magnitude(frames) * (SIDE - 5) / 100 == pytest.approx(2, rel=0.04)
