"""Rows of devices against the tokens of the whole."""

import itertools
import math

import numpy as np
import pytest

from hybrid_dit.ops.shards import padded_length, softmax_rows
from hybrid_dit.ops.spec import PATTERNS, AttentionSpec
from hybrid_dit.ops.tokens import softmax_tokens


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_all_devices_are_the_softmax_tokens_in_order(pattern):
    for grid, rate, parts in itertools.product([(3, 3, 5), (1, 2, 3), (2, 3, 8), (3, 7, 19)], (1, 2, 3, 8), (1, 4, 7)):
        n = math.prod(grid)
        for length in (-(-n // parts), padded_length(n, parts, rate) // parts):
            rows, positions = softmax_rows(grid, AttentionSpec("hybrid", rate, pattern), parts, length)
            assert rows.min() >= 0 and rows.max() < length  # each device reads its own rows alone
            gathered = (rows + length * np.arange(parts)[:, None]).reshape(-1)
            np.testing.assert_array_equal(gathered[positions], softmax_tokens(grid, rate, pattern))
            assert pattern == "lattice" or rows.shape[1] <= -(-length // rate)  # what travels


def test_wan_over_sixteen_devices_is_aligned():
    """480x832x81: 32,760 tokens. Every device has 2,048 rows, S starts with the first on each."""
    assert padded_length(32760, 16, 8) == 32768 and padded_length(32760, 8, 8) == 32760
    rows, positions = softmax_rows((21, 30, 52), AttentionSpec("hybrid", 8), 16, 2048)
    assert (rows == np.arange(0, 2048, 8)).all()
    np.testing.assert_array_equal(positions, np.arange(4095))
