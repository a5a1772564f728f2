"""Stage 2: which block gets which rate, as a multiple-choice knapsack solved to optimality.

    min Σ_b errors[b, r_b]   subject to   Σ_b costs[b, r_b] <= budget,   exactly one rate r_b per block

The solver is a dynamic programme over the Pareto front of partial sums (cost, error), one block at a time. Three things
keep the front small and the answer exact:

* Fixed point. All numbers become int64 multiples of a power of two, so sums don't depend on their order and ties are
  real ties. Integers and floats of moderate range are represented exactly; otherwise the step is 2^-61 of the largest
  possible total, finer than float64 resolves that total.
* Dominance. A partial sum that is no better in cost or error than another is dropped.
* Bounds. With the remaining blocks relaxed to the lower convex hull of their options (the linear programme), a partial
  sum has a lower bound on its final error, and rounding that relaxation down gives a feasible completion; whoever's
  lower bound exceeds the best completion is dropped.
"""

import dataclasses
import math
from fractions import Fraction
from numbers import Real

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from hybrid_dit.errors import UserError

_TOTAL_BITS = 61  # totals stay below 2^61, so that their differences and sums of two stay far from int64's limits
_MAX_FRONT = 2**18  # partial sums kept at once; 40 blocks of random floats need a few hundred


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """One rate per block.

    Attributes:
        choice: index of the chosen rate of each block.
        error: sum of the chosen errors (math.fsum).
        cost: sum of the chosen costs (math.fsum; an exact int where the costs are integers).
    """

    choice: Int[np.ndarray, " B"]
    error: float
    cost: float | int


def solve(errors: ArrayLike, costs: ArrayLike, budget: Real) -> Selection:
    """Returns the choice of least total error within the budget (Stage 2 of the paper, its integer programme).

    Feasible means: the correctly rounded sum of the chosen costs (math.fsum; exact for integers) is <= budget, so that
    0.1 + 0.2 + 0.3 fits into 0.6. Errors are compared by their sums before rounding. Among equal errors the lower cost
    wins, then the lexicographically lowest choice (block 0 decides first).

    Args:
        errors: distillation error of block b at rate r, [B, R], finite.
        costs: cost of block b at rate r in any unit, [B, R], finite; floats or integers.
        budget: largest allowed sum of costs, in the same unit.

    Raises:
        UserError: arrays of the wrong shape or with non-finite entries, a budget below the smallest reachable cost, or
            a problem with millions of near-optimal partial choices (errors that are a linear function of the costs).
    """
    errors, costs = _checked(errors, costs)
    if not math.isfinite(budget):
        raise UserError(f"the budget must be a finite number, got {budget}")
    cheapest = _selection(errors, costs, _cheapest(errors, costs))
    if cheapest.cost > budget:
        raise UserError(
            f"no choice of rates costs at most {budget:g}: the smallest reachable cost is {cheapest.cost:.17g}; "
            "raise the budget or add cheaper rates"
        )
    fixed_errors, _ = _fixed_point(errors)
    fixed_costs, scale = _fixed_point(costs)
    limit = _fixed_limit(costs, budget, scale)
    while True:
        choice = _solve_fixed(fixed_errors, fixed_costs, limit)
        selection = _selection(errors, costs, choice)
        if selection.cost <= budget:
            return selection
        # The limit includes a few steps for the rounding of inputs, and this choice needed them: ask for a cheaper one.
        limit = int(fixed_costs[np.arange(len(choice)), choice].sum()) - 1


def homogeneous(errors: ArrayLike, costs: ArrayLike, rate: int, keep: int, count: int) -> Selection:
    """Returns the paper's baseline: the `count` blocks of least added error at `rate`, all others at `keep`.

    Args:
        errors: [B, R]; costs: [B, R].
        rate: index of the rate of converted blocks.
        keep: index of the rate of the others (softmax).
        count: how many blocks are converted; ties go to the lower block.
    """
    errors, costs = _checked(errors, costs)
    blocks, rates = errors.shape
    if not (0 <= rate < rates and 0 <= keep < rates):
        raise UserError(f"rate index {rate} and keep index {keep} must lie in 0..{rates - 1}")
    if not 0 <= count <= blocks:
        raise UserError(f"can't convert {count} blocks: the model has {blocks}")
    order = np.argsort(errors[:, rate] - errors[:, keep], kind="stable")
    choice = np.full(blocks, keep)
    choice[order[:count]] = rate
    return _selection(errors, costs, choice)


def pareto(errors: ArrayLike, costs: ArrayLike) -> list[Selection]:
    """Returns every efficient selection: nothing costs less at its error, nothing has less error at its cost.

    Together they answer all budgets: the answer to one is the last that costs no more. Costs rise and errors fall
    strictly along the list; of equal choices it has the lexicographically lowest.

    Raises:
        UserError: bad tables, or a front of more than a quarter of a million points. If costs depend on the rate alone
            there are at most C(B + R - 1, B) totals (46,376 for 30 blocks and 5 rates); if they are different floats in
            every block the front can grow exponentially.
    """
    errors, costs = _checked(errors, costs)
    fixed_errors, _ = _fixed_point(errors)
    fixed_costs, _ = _fixed_point(costs)
    front_cost, front_error, history = np.zeros(1, np.int64), np.zeros(1, np.int64), []
    for b in reversed(range(len(errors))):
        cost, error = _sums(fixed_costs[b], front_cost), _sums(fixed_errors[b], front_error)
        state = _efficient(np.arange(len(cost)), cost, error, b)
        history.append((state % len(front_cost), state // len(front_cost)))
        front_cost, front_error = cost[state], error[state]
    front: list[Selection] = []
    for choice in _choices(history, np.arange(len(front_cost))):
        found = _selection(errors, costs, choice)
        if not front or (found.error < front[-1].error and found.cost > front[-1].cost):  # may be equal once rounded
            front.append(found)
    return front


def _checked(errors: ArrayLike, costs: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns both as [B, R] arrays of int64 or float64, or raises UserError."""
    arrays = []
    for name, value in (("errors", errors), ("costs", costs)):
        array = np.asarray(value)
        if array.ndim != 2 or 0 in array.shape:
            raise UserError(f"{name} must be a table [blocks, rates] with entries, got shape {list(array.shape)}")
        if np.issubdtype(array.dtype, np.integer):
            array = array.astype(np.int64)
        else:
            array = array.astype(np.float64)
            bad = np.argwhere(~np.isfinite(array))
            if len(bad):
                b, r = bad[0]
                raise UserError(f"{name}[block {b}, rate index {r}] is {array[b, r]}; every entry must be finite")
        arrays.append(array)
    if arrays[0].shape != arrays[1].shape:
        raise UserError(
            f"errors {list(arrays[0].shape)} and costs {list(arrays[1].shape)} must have the same shape [blocks, rates]"
        )
    return arrays[0], arrays[1]


def _cheapest(errors: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Returns each block's option of least cost, then least error, then lowest index."""
    index = np.broadcast_to(np.arange(costs.shape[1]), costs.shape)
    return np.lexsort((index, errors, costs), axis=1)[:, 0]


def _selection(errors: np.ndarray, costs: np.ndarray, choice: np.ndarray) -> Selection:
    at = np.arange(len(choice)), choice
    exact = np.issubdtype(costs.dtype, np.integer)
    cost = sum(costs[at].tolist()) if exact else math.fsum(costs[at])
    return Selection(choice.astype(np.int64), math.fsum(errors[at]), cost)


def _fixed_point(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns (round(values * 2^scale) as int64, scale), the finest scale whose totals fit; integers: scale 0."""
    if np.issubdtype(values.dtype, np.integer):
        if sum(int(abs(row).max()) for row in values.astype(object)) < 2**_TOTAL_BITS:
            return values, 0
        values = values.astype(np.float64)
    largest = math.fsum(np.abs(values).max(axis=1))
    scale = _TOTAL_BITS - math.frexp(largest)[1] if largest else 0
    return np.rint(np.ldexp(values, scale)).astype(np.int64), scale


def _fixed_limit(costs: np.ndarray, budget: Real, scale: int) -> int:
    """Returns the largest fixed-point cost that may be within the budget."""
    if np.issubdtype(costs.dtype, np.integer) and scale == 0:
        limit = math.floor(budget)
    else:  # fsum rounds: totals up to half a float64 step above the budget still round down to it
        budget = float(budget)
        middle = (Fraction(budget) + Fraction(math.nextafter(budget, math.inf))) / 2
        limit = math.floor(middle * Fraction(2) ** scale) + len(costs)  # each input was rounded by at most 1/2
    return max(-(2**_TOTAL_BITS), min(limit, 2**_TOTAL_BITS))


def _solve_fixed(
    errors: Int[np.ndarray, "B r"], costs: Int[np.ndarray, "B r"], limit: int
) -> Int[np.ndarray, " B"]:
    """Returns the optimal choice for int64 tables; some choice must be within the limit.

    Blocks are added from the last to the first: the lowest rate index of the block being added then settles ties, and
    since block 0 is added last the result is the lexicographically lowest of all equal optima.
    """
    limit -= int(costs.min(axis=1).sum())
    costs = costs - costs.min(axis=1, keepdims=True)
    errors = errors - errors.min(axis=1, keepdims=True)
    relaxations = _relaxations(errors, costs)

    blocks, rates = errors.shape
    front_cost, front_error = np.zeros(1, np.int64), np.zeros(1, np.int64)
    best = np.iinfo(np.int64).max
    history = []  # per block from last to first: (parent state, rate index) of every state of the front
    for b in reversed(range(blocks)):
        cost, error = _sums(costs[b], front_cost), _sums(errors[b], front_error)
        breaks, values = relaxations[b]
        fits = np.flatnonzero(cost <= limit)
        room = limit - cost[fits]
        segment = np.searchsorted(breaks, room, side="right") - 1
        best = min(best, int((error[fits] + values[segment]).min()))
        # np.interp rounds positions and values to float64. The function is convex (slope times position is at most
        # its whole drop), so this moves the bound by a few 2^-53 of the values; 2^-50 is safely above that.
        bound = error[fits] + np.interp(room, breaks, values)
        state = fits[bound <= best + (float(values[0]) + best) * 2.0**-50]
        state = _efficient(state, cost, error, b)
        history.append((state % len(front_cost), state // len(front_cost)))
        front_cost, front_error = cost[state], error[state]

    return _choices(history, np.array([len(front_error) - 1]))[0]  # errors fall strictly along the front


def _sums(options: Int[np.ndarray, " r"], front: Int[np.ndarray, " k"]) -> Int[np.ndarray, " s"]:
    """Every option of a block added to every partial sum; state number = option * k + index in the front."""
    return (options[:, None] + front).ravel()


def _efficient(
    state: Int[np.ndarray, " s"], cost: Int[np.ndarray, " n"], error: Int[np.ndarray, " n"], block: int
) -> Int[np.ndarray, " k"]:
    """The states that no other dominates, by cost, then error, then rate index: each new minimum of the error."""
    state = state[np.lexsort((state, error[state], cost[state]))]
    least = np.minimum.accumulate(error[state])
    state = state[np.r_[True, least[1:] < least[:-1]]]
    if len(state) > _MAX_FRONT:
        raise UserError(
            f"too many choices are equally good within rounding (over {_MAX_FRONT:,} partial sums at block {block}); "
            "round the costs to fewer digits"
        )
    return state


def _choices(history: list[tuple[np.ndarray, np.ndarray]], state: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n B"]:
    """Follows states of the last front back through (parent state, rate index) of each block; block 0 came last."""
    choice = np.empty((len(state), len(history)), np.int64)
    for b, (parent, rate) in enumerate(reversed(history)):
        choice[:, b], state = rate[state], parent[state]
    return choice


def _relaxations(
    errors: Int[np.ndarray, "B r"], costs: Int[np.ndarray, "B r"]
) -> list[tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]]:
    """Returns, for each b, the linear programme's optimum over blocks 0..b-1 as a function of their budget.

    Each is (breaks, values): at budget breaks[i] the optimum is values[i], reached by whole options; in between it is
    linear. breaks[0] = 0, the cheapest options (costs are shifted so that a block's least cost is 0).
    """
    steps = [np.zeros((0, 3), np.int64)]  # rows: block, added cost, (negative) added error
    start = []
    for b, (error, cost) in enumerate(zip(errors, costs)):
        hull = _lower_hull(cost.tolist(), error.tolist())
        start.append(hull[0][1])
        steps += [[(b, c1 - c0, e1 - e0)] for (c0, e0), (c1, e1) in zip(hull, hull[1:])]
    table = np.concatenate([np.asarray(step, np.int64) for step in steps])
    # Steepest descent first; a block's own steps keep their order because the hull is convex and the sort stable.
    table = table[np.argsort(table[:, 2] / table[:, 1], kind="stable")]
    relaxations = []
    for b in range(len(errors)):
        mine = table[table[:, 0] < b]
        breaks = np.r_[0, np.cumsum(mine[:, 1])]
        relaxations.append((breaks, sum(start[:b]) + np.r_[0, np.cumsum(mine[:, 2])]))
    return relaxations


def _lower_hull(costs: list[int], errors: list[int]) -> list[tuple[int, int]]:
    """Returns the strictly decreasing lower convex hull of the points (cost, error), from the cheapest to the best."""
    hull: list[tuple[int, int]] = []
    for cost, error in sorted(zip(costs, errors)):
        if hull and error >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (c0, e0), (c1, e1) = hull[-2:]
            if (e1 - e0) * (cost - c0) < (error - e0) * (c1 - c0):  # Python integers: no overflow
                break
            hull.pop()
        hull.append((cost, error))
    return hull
