"""Softmax tokens by definition: indices, density, nesting."""

import math

import numpy as np
import oracle
import pytest

from hybrid_dit.ops.spec import PATTERNS
from hybrid_dit.ops.tokens import linear_mask, softmax_tokens

GRIDS = [(3, 5, 8), (2, 3, 7), (1, 1, 3)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rate", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_indices_and_mask_follow_the_definition(grid, rate, pattern):
    in_s = oracle.softmax_rows(grid, rate, pattern)
    index = softmax_tokens(grid, rate, pattern)
    np.testing.assert_array_equal(index, np.flatnonzero(in_s))
    np.testing.assert_array_equal(linear_mask(grid, rate, pattern), np.where(in_s, 0.0, 1.0))
    assert index[0] == 0  # the paper's S starts with the first token


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rates_are_nested(grid, pattern):
    """S(8) ⊂ S(4) ⊂ S(2) ⊂ T: what lets one pass over the teacher serve every rate."""
    s8, s4, s2, s1 = (set(softmax_tokens(grid, rate, pattern)) for rate in (8, 4, 2, 1))
    assert s8 <= s4 <= s2 <= s1
    assert s1 == set(range(math.prod(grid)))


@pytest.mark.parametrize("rate", [1, 2, 4, 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_density_is_one_in_r(rate, pattern):
    # 3 and 5 are odd, so that rows and frames, too, meet every residue: exact once the width or 8 rows are full.
    for grid in [(3, 5, 8), (3, 8, 7)]:
        assert len(softmax_tokens(grid, rate, pattern)) == math.prod(grid) // rate


def test_lattice_leaves_no_column_without_softmax_tokens():
    grid = (2, 8, 8)
    columns = {pattern: set(softmax_tokens(grid, 8, pattern) % 8) for pattern in PATTERNS}
    assert columns == {"stride": {0}, "lattice": set(range(8))}
