"""Small statistics for reporting scores."""

from typing import NamedTuple

import numpy as np

from hybrid_dit.array_typing import Shaped
from hybrid_dit.errors import UserError

_RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: Shaped[np.ndarray, "n"], level: float = 0.95, seed: int = 0) -> Interval:
    """Mean with its percentile-bootstrap interval (Efron 1979): quantiles of the means of 2,000 resamples.

    Args:
        values: independent samples, at least 2, finite. For paired comparisons pass the differences.
        level: coverage of the interval, in (0, 1).
        seed: of the resampling; the same input gives the same interval.

    Raises:
        UserError: too few or non-finite values, or `level` out of range.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise UserError(f"bootstrap_interval needs at least 2 finite values, got {len(values)} ({values[:5]} ...)")
    if not 0 < level < 1:
        raise UserError(f"bootstrap_interval: level is a probability between 0 and 1, got {level}")
    rng = np.random.default_rng(seed)
    # One resample is n draws with replacement: its mean needs only how often each value was drawn.
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=_RESAMPLES)
    means = counts @ values / len(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_ratio(
    values: Shaped[np.ndarray, "n"], reference: Shaped[np.ndarray, "n"], level: float = 0.95, seed: int = 0
) -> Interval:
    """Σ values / Σ reference of paired samples with its percentile-bootstrap interval; pairs are drawn together.

    The ratio of sums, unlike a mean of ratios, stays calm where single references are near zero.

    Args:
        values: at least 2, finite.
        reference: of the same length, at least 0, with a positive sum.
        level: coverage of the interval, in (0, 1).
        seed: of the resampling.

    Raises:
        UserError: too few, unequal or unfit values, or `level` out of range.
    """
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if len(values) != len(reference) or (reference < 0).any() or not reference.sum() > 0:
        raise UserError("bootstrap_ratio needs as many references as values, none negative, with a positive sum")
    bootstrap_interval(values, level)  # refuses what is unfit
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=_RESAMPLES)
    below = counts @ reference
    ratios = (counts @ values)[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.sum() / reference.sum()), float(low), float(high))
