"""Bootstrap intervals against the normal approximation and their own coverage."""

import numpy as np
import pytest

from hybrid_dit.errors import UserError
from hybrid_dit.metrics import bootstrap_interval, bootstrap_ratio


def test_interval_matches_the_normal_approximation():
    values = np.random.default_rng(0).normal(50, 10, 400)
    mean, low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    # 2.5% quantile of 2,000 resampled means: standard error sqrt(.025 * .975 / 2000) / density(1.96) = 0.06 sigma,
    # 3% of the half width; four of them.
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.12)


def test_interval_covers_the_true_mean_at_its_level():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        _, low, high = bootstrap_interval(rng.uniform(0, 1, 60), level=0.8, seed=seed)
        hits += low <= 0.5 <= high
    assert abs(hits - 160) <= 23  # 4 standard deviations of 200 draws at 0.8


def test_higher_level_is_wider_and_seed_repeats():
    values = np.arange(30.0)
    wide, narrow = bootstrap_interval(values, level=0.99), bootstrap_interval(values, level=0.5)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_constant_values_have_no_width():
    assert bootstrap_interval(np.full(5, 7.0)) == pytest.approx((7, 7, 7))


@pytest.mark.parametrize(
    ("values", "level", "expected"),
    [([1.0], 0.95, "at least 2"), ([1.0, np.nan], 0.95, "finite"), ([1.0, 2.0], 95.0, "between 0 and 1")],
)
def test_bad_input_is_refused(values, level, expected):
    with pytest.raises(UserError, match=expected):
        bootstrap_interval(np.array(values), level=level)


def test_ratio_matches_the_delta_method():
    rng = np.random.default_rng(2)
    reference = rng.uniform(1, 3, 400)
    values = 0.5 * reference + rng.normal(0, 0.1, 400)
    mean, low, high = bootstrap_ratio(values, reference)
    assert mean == pytest.approx(values.sum() / reference.sum())
    half = 1.96 * (values - mean * reference).std() / 20 / reference.mean()
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.12)  # as above


def test_ratio_of_proportional_pairs_has_no_width_even_with_zeros():
    reference = np.array([0.0, 1.0, 0.0, 5.0])
    assert bootstrap_ratio(0.3 * reference, reference) == pytest.approx((0.3, 0.3, 0.3))


@pytest.mark.parametrize(
    "values, reference",
    [([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [-1.0, 3.0]), ([1.0, np.nan], [1.0, 1.0])],
)
def test_unfit_pairs_are_refused(values, reference):
    with pytest.raises(UserError):
        bootstrap_ratio(np.array(values), np.array(reference))
