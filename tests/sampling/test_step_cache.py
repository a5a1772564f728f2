import numpy as np
import pytest

from hybrid_dit.errors import UserError
from hybrid_dit.sampling import reused_steps


def test_changes_add_up_until_the_threshold():
    # Relative L1 changes, by hand: 1/10, 1/11, 1/12, 12/13, 1/25, 1/26; all but the fourth are below 0.15.
    features = np.array([10, 11, 12, 13, 25, 26, 27.0])[:, None, None] * np.array([[0.25, -0.75]])
    # 0.1 < 0.15: reuse; 0.1 + 0.091: compute; 0.083: reuse; 0.083 + 0.92: compute; 0.04: reuse; the last: compute
    expected = [False, True, False, True, False, True, False]
    np.testing.assert_array_equal(reused_steps(features, 0.15), expected)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_threshold_zero_reuses_nothing_and_the_ends_are_always_computed(steps):
    features = np.ones((steps, 3))  # no change at all
    assert not reused_steps(features, 0.0).any()
    expected = np.arange(steps) % (steps - 1 or 1) != 0  # all but the first and the last
    np.testing.assert_array_equal(reused_steps(features, 1e-9), expected)


def test_negative_thresholds_are_refused():
    with pytest.raises(UserError, match="at least 0"):
        reused_steps(np.ones((3, 1)), -0.1)
