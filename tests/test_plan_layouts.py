"""The search for the most videos per device, against trying everything."""

from fractions import Fraction

import pytest

from hybrid_dit.plan_layouts import LARGEST, Layout, fitting, layout, recommended, search

SIZES = [Fraction(2) ** n for n in range(-6, 6)]


def sizes(fixed, per_video, power):
    return lambda entry: int(fixed + per_video * float(entry.videos) ** power)


@pytest.mark.parametrize("power", [1.0, 0.8, 1.3])
@pytest.mark.parametrize("devices, batch", [(1, 1), (8, 16), (16, 16), (16, 24), (256, 16), (64, 5)])
def test_the_largest_that_fits_is_found_with_few_compilations(devices, batch, power):
    for memory in (120, 300, 1000, 3000, 9000):
        needed = sizes(100, 1000, power)
        tried = search(devices, batch, memory, needed)
        possible = [s for s in SIZES if s * devices >= 1]
        fits = [s for s in possible if needed(layout(s, devices, batch)) <= memory]
        found = fitting(tried, memory)
        if not fits:
            assert not found
            continue
        assert found[-1].videos == max(fits)
        assert any(entry.videos == 2 * max(fits) for entry in tried)  # and it was seen that twice that doesn't
        assert len(tried) <= 6
        best = recommended(found[-1], devices, batch)
        if best:
            assert best.videos <= max(fits) and best.batch == batch
        else:  # no power of two of videos per device makes up such a batch
            assert all(layout(s, devices, batch).batch != batch for s in fits)


def test_layouts_in_the_configs_terms():
    assert layout(Fraction(1, 4), 16, 16) == Layout(Fraction(1, 4), 4, 4, 16)
    assert layout(Fraction(2), 16, 16).settings() == {
        "mesh.seq": 1,
        "finetune.accumulate": 1,
        "finetune.batch": 32,
    }
    assert layout(Fraction(1, 16), 256, 16) == Layout(Fraction(1, 16), 16, 1, 16)
    assert layout(Fraction(1), 16, 24).batch == 32 and recommended(layout(Fraction(1), 16, 24), 16, 24).accumulate == 3


def test_a_size_that_does_not_grow_ends():
    assert max(entry.videos for entry in search(4, 4, 10, lambda _: 5)) == LARGEST
