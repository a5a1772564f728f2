"""Which tokens are softmax tokens: S of the paper's T = S ∪ L, as static NumPy indices."""

import math

import numpy as np

from hybrid_dit.ops.spec import AttentionSpec

Grid = tuple[int, int, int]


def softmax_tokens(grid: Grid, rate: int, pattern: str) -> np.ndarray:
    """Returns the sorted indices of S in the flattened (frame, row, column) order, int32 [|S|].

    Args:
        grid: number of frames, rows and columns of the token grid (their product is N).
        rate: R. "stride": `i % R == 0`, the paper's choice 0-based. "lattice": `(col + 3 row + 5 frame) % R == 0`,
            the same density without falling into columns when the width is divisible by R.
        pattern: "stride" or "lattice".
    """
    n = math.prod(grid)
    if pattern == "stride":
        return np.arange(0, n, rate, dtype=np.int32)
    frame, row, col = np.unravel_index(np.arange(n), grid)
    return np.flatnonzero((col + 3 * row + 5 * frame) % rate == 0).astype(np.int32)


def linear_mask(grid: Grid, rate: int, pattern: str) -> np.ndarray:
    """Returns 1.0 for the tokens of L and 0.0 for those of S, float32 [N]."""
    mask = np.ones(math.prod(grid), np.float32)
    mask[softmax_tokens(grid, rate, pattern)] = 0.0
    return mask


def linear_keys(grid: Grid, spec: AttentionSpec, length: int) -> np.ndarray:
    """Returns 1.0 for the keys of the linear part and 0.0 for the others, float32 [length].

    Args:
        grid: of the tokens.
        spec: of hybrid or linear attention (whose linear part has all tokens of the grid).
        length: number of tokens, with those that pad the grid's so that devices divide them.
    """
    n = math.prod(grid)
    mask = linear_mask(grid, spec.rate, spec.pattern) if spec.kind == "hybrid" else np.ones(n, np.float32)
    return np.pad(mask, (0, length - n))
