"""The picture of cost against duration: every curve and every size of videos is in it."""

import numpy as np
import pytest
from PIL import Image

from hybrid_dit import duration_picture
from hybrid_dit.errors import UserError

FLOPS = {"softmax": [(81, 1e12), (121, 2e12), (201, 6e12)], "R8": [(81, 2e11), (121, 4e11), (201, 9e11)]}
SECONDS = {"softmax": [(81, 0.01), (201, 0.07)], "R8": [(81, 0.003)]}


def drawn(tmp_path, panels):
    path = tmp_path / "a.png"
    duration_picture.draw(path, panels, title="Attention")
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert (image[0] > 200).all() and (image[:, -1] > 200).all(), "something is cut off at the border"
    return image


def test_counted_and_measured_costs_are_shown(tmp_path):
    first = drawn(tmp_path, {"320x480": (FLOPS, SECONDS)})
    for flops, seconds in (
        (FLOPS | {"R8": [(81, 2e11), (121, 4e11), (201, 2e12)]}, SECONDS),
        (FLOPS, SECONDS | {"R8": [(81, 0.02)]}),
    ):
        other = drawn(tmp_path, {"320x480": (flops, seconds)})
        assert other.shape == first.shape and (other != first).any(-1).mean() > 1e-4


def test_the_picture_grows_with_sizes_and_measurements(tmp_path):
    counted = drawn(tmp_path, {"320x480": (FLOPS, {"softmax": []})})
    timed = drawn(tmp_path, {"320x480": (FLOPS, SECONDS)})
    two = drawn(tmp_path, {"320x480": (FLOPS, SECONDS), "480x832": (FLOPS, SECONDS)})
    assert timed.shape[0] > 1.5 * counted.shape[0] and two.shape[1] > 1.5 * timed.shape[1]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UserError, match="no videos"):
        duration_picture.draw(tmp_path / "a.png", {})
