"""The solver against brute force, against a second dynamic programme, and at full size."""

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from hybrid_dit import knapsack
from hybrid_dit.errors import UserError
from hybrid_dit.knapsack import solve


def brute_force(errors, costs, budget):
    """All R^B choices in lexicographic order; min by exact (error, cost) keeps the first of equals."""
    errors, costs = ([[Fraction(v) for v in row] for row in table.tolist()] for table in (errors, costs))
    choices = itertools.product(range(len(errors[0])), repeat=len(errors))
    sums = ((sum(e[r] for e, r in zip(errors, c)), sum(e[r] for e, r in zip(costs, c)), c) for c in choices)
    return min((s for s in sums if float(s[1]) <= budget), key=lambda s: s[:2])  # float() rounds correctly, like fsum


def integer_table(errors, costs, budget):
    """Least error per exact total cost 0..budget: the textbook programme, for integer costs."""
    least = np.where(np.arange(budget + 1) == 0, 0.0, np.inf)
    for error, cost in zip(errors, costs):
        shifted = [
            np.r_[np.full(min(c, budget + 1), np.inf), least[: max(0, budget + 1 - c)]] + e for e, c in zip(error, cost)
        ]
        least = np.min(shifted, axis=0)
    return least.min()


def _instance(seed, kind):
    rng = np.random.default_rng(seed)
    blocks, rates = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    shape = (blocks, rates)
    if kind == "int":  # few distinct values: many ties
        errors, costs = rng.integers(-1, 4, shape), rng.integers(-1, 4, shape)
    elif kind == "tenths":  # sums of tenths hit the budget only if rounding is treated consistently
        errors, costs = rng.integers(0, 5, shape) * 0.1, rng.integers(1, 5, shape) * 0.1
    else:
        errors, costs = rng.random(shape) * 10.0 ** rng.integers(-3, 3, shape), rng.lognormal(0, 2, shape)
    low, high = costs.min(1).sum(), costs.max(1).sum()
    budget = low + rng.random() * (high - low)
    if kind == "int":
        budget = int(budget)
    elif kind == "tenths":
        budget = math.fsum([0.1] * round(budget * 10))
    return errors, costs, budget if budget >= math.fsum(costs.min(1)) else math.fsum(costs.min(1))


@pytest.mark.parametrize("kind", ["int", "tenths", "float"])
@pytest.mark.parametrize("group", range(4))
def test_brute_force(kind, group):
    for seed in range(40 * group, 40 * (group + 1)):
        errors, costs, budget = _instance(seed, kind)
        error, cost, choice = brute_force(errors, costs, budget)
        found = solve(errors, costs, budget)
        assert (found.error, found.cost) == (float(error), float(cost)), seed
        assert found.choice.tolist() == list(choice), seed


@pytest.mark.parametrize("seed", range(10))
def test_integer_table_at_middle_sizes(seed):
    rng = np.random.default_rng(seed)
    errors, costs = rng.integers(0, 100, (20, 4)), rng.integers(0, 30, (20, 4))
    budget = int(rng.integers(costs.min(1).sum(), costs.max(1).sum()))
    found = solve(errors, costs, budget)
    assert found.error == integer_table(errors, costs, budget)  # integers below 2^53: exact
    at = np.arange(20), found.choice
    assert found.cost == costs[at].sum() <= budget and found.error == errors[at].sum()


def test_equal_costs_of_all_blocks_at_model_size():
    # The usual case: FLOPs depend on the rate only. Integers beyond 2^40, so the table works in units of 10^9.
    rng = np.random.default_rng(1)
    units = np.array([94, 63, 47, 39])
    errors = np.sort(rng.integers(0, 1000, (30, 4)), axis=1)
    budget = 15 * 47 + 15 * 94
    found = solve(errors, np.tile(units, (30, 1)) * 10**9, budget * 10**9)
    assert found.error == integer_table(errors, np.tile(units, (30, 1)), budget)
    assert isinstance(found.cost, int)


def test_ties_go_to_lower_cost_then_lower_index():
    assert solve([[1, 1, 1]], [[5, 3, 3]], 9).choice.tolist() == [1]
    # One of two equal blocks must be converted: converting the later one is lexicographically lower.
    assert solve([[0, 1], [0, 1]], [[2, 1], [2, 1]], 3).choice.tolist() == [0, 1]
    # The same in floats, with repeated runs.
    table = np.full((6, 3), 0.1)
    assert all(solve(table, table, 0.6000000000000001).choice.tolist() == [0] * 6 for _ in range(3))


def test_budget_is_compared_with_the_correctly_rounded_sum():
    costs = [[0.1], [0.2], [0.3]]
    assert 0.1 + 0.2 + 0.3 > 0.6  # what a naive sum would say
    assert solve([[1.0]] * 3, costs, 0.6).cost == 0.6
    with pytest.raises(UserError, match="smallest reachable cost is 0.59999999999999998"):
        solve([[1.0]] * 3, costs, math.nextafter(0.6, 0))


def test_last_bits_of_the_budget():
    # Totals near 1: the fixed-point step is 2^-60, and 1 + 128 steps is where float64 stops rounding down to 1.
    step = 2.0**-60
    # 127.8 steps in all, but 43 each after rounding to the step: must not be lost to that rounding.
    assert solve([[1.0]] * 4, [[1.0]] + [[42.6 * step]] * 3, 1.0).cost == 1.0
    # 129 steps are over, by less than the room left for rounding of inputs: must not be let in.
    assert solve([[0.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 129 * step]], 1.0).choice.tolist() == [0, 0]


def test_integers_beyond_float64_are_exact():
    errors = [[5, 0], [9, 0]]
    costs = [[0, 2**60], [2**58, 2**58 + 1]]  # the options of block 1 are one number in float64
    assert solve(errors, costs, 2**58).choice.tolist() == [0, 0]
    assert solve(errors, costs, 2**58 + 1).choice.tolist() == [0, 1]


def test_cost_offsets_of_a_block_do_not_change_the_choice():
    rng = np.random.default_rng(3)
    errors, costs = rng.integers(-50, 50, (8, 3)), rng.integers(-50, 50, (8, 3))
    offset = rng.integers(-1000, 1000, (8, 1))
    plain = solve(errors, costs, 10)
    moved = solve(errors + offset, costs - offset, 10 - int(offset.sum()))
    assert plain.choice.tolist() == moved.choice.tolist()


def test_full_size_random_floats_in_time():
    # 40 blocks x 5 rates. The bound is 50 ms; the median leaves room for a busy machine (measured: 2 ms, worst of
    # 1,000 instances 7 ms). Optimality at this size: no pair of blocks can be changed for the better.
    times = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        errors, costs = rng.random((40, 5)), rng.random((40, 5))
        budget = costs.min(1).sum() + rng.uniform(0.05, 0.95) * (costs.max(1).sum() - costs.min(1).sum())
        start = time.perf_counter()
        found = solve(errors, costs, budget)
        times.append(time.perf_counter() - start)
        assert found.cost <= budget
        at = np.arange(40), found.choice
        gain, extra = errors[at][:, None] - errors, costs - costs[at][:, None]
        pairs = np.triu(np.ones((40, 40), bool), 1)[:, None, :, None]
        better = gain[:, :, None, None] + gain > 1e-12  # far above rounding, far below typical differences
        fits = found.cost + extra[:, :, None, None] + extra <= budget - 1e-9
        assert not (better & fits & pairs).any()
    assert np.median(times) < 0.05


def test_full_size_random_floats_against_a_mixed_integer_programme():
    # scipy's HiGHS; `benchmarks/knapsack.py` does the same with OR-tools on 1,000 instances. HiGHS lets a budget be
    # missed by 1e-6, hence the look at its choice; that choice's error is then a float sum like ours (40 roundings).
    for seed in range(12):
        rng = np.random.default_rng(seed)
        errors, costs = rng.random((40, 5)), rng.lognormal(size=(40, 5))
        budget = costs.min(1).sum() + rng.uniform(0.05, 0.6) * (costs.max(1).sum() - costs.min(1).sum())
        one_each = LinearConstraint(np.kron(np.eye(40), np.ones(5)), 1, 1)
        within = LinearConstraint(costs.ravel()[None], ub=budget)
        result = milp(
            errors.ravel(),
            integrality=np.ones(200),
            bounds=Bounds(0, 1),
            constraints=[one_each, within],
            options={"mip_rel_gap": 0.0},
        )
        at = np.arange(40), result.x.reshape(40, 5).argmax(1)
        assert result.status == 0 and costs[at].sum() <= budget, seed
        assert solve(errors, costs, budget).error == pytest.approx(errors[at].sum(), rel=40 * 2**-53)


def test_too_many_near_ties_end_with_an_explanation():
    # errors = 1 - costs is a subset-sum problem in 53-bit numbers: no solver with bounded memory is exact on it.
    costs = np.random.default_rng(0).random((40, 5))
    with pytest.raises(UserError, match="round the costs to fewer digits"):
        solve(1 - costs, costs, 20.0)
    rounded = np.round(costs * 1000).astype(int)
    assert solve(1000 - rounded, rounded, 20_000).error == 20_000  # the advice works: the budget is met exactly


def test_homogeneous_converts_the_lowest_added_errors():
    errors = np.array([[0, 3, 9], [0, 1, 9], [1, 2, 9], [0, 2, 9]])  # added at rate 1: 3, 1, 1, 2
    costs = np.tile([10, 6, 1], (4, 1))
    picked = knapsack.homogeneous(errors, costs, rate=1, keep=0, count=2)
    assert picked.choice.tolist() == [0, 1, 1, 0] and picked.cost == 32 and picked.error == 3
    assert knapsack.homogeneous(errors, costs, 1, 0, 1).choice.tolist() == [0, 1, 0, 0]  # tie: the lower block


def test_pareto_points_are_the_efficient_ones():
    rng = np.random.default_rng(5)
    errors, costs = np.sort(rng.integers(0, 30, (4, 3))), np.sort(rng.integers(0, 30, (4, 3)))[:, ::-1]
    everything = [
        (sum(e[r] for e, r in zip(costs, c)), sum(e[r] for e, r in zip(errors, c)))
        for c in itertools.product(range(3), repeat=4)
    ]
    efficient = sorted({p for p in everything if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in everything)})
    assert len(efficient) == 10
    assert [(s.cost, s.error) for s in knapsack.pareto(errors, costs)] == efficient


def test_pareto_answers_every_budget_as_the_solver_does():
    # 30 blocks at 4 rates whose cost depends on the rate alone, once in FLOPs and once in seconds (floats).
    rng = np.random.default_rng(6)
    errors = np.sort(rng.random((30, 4)), axis=1)
    for rates in (np.array([94, 63, 47, 39]) * 10**9, np.array([11.4, 7.6, 4.7, 3.6]) * 1e-3):
        costs = np.tile(rates, (30, 1))
        front = knapsack.pareto(errors, costs)
        assert all(a.cost < b.cost and a.error > b.error for a, b in zip(front, front[1:]))
        for budget in rng.uniform(30 * rates[3], 30 * rates[0], 20):
            answer = [s for s in front if s.cost <= budget][-1]
            found = solve(errors, costs, float(budget))
            assert (answer.error, answer.cost) == (found.error, found.cost)
            assert answer.choice.tolist() == found.choice.tolist()


def test_a_front_that_explodes_is_refused():
    rng = np.random.default_rng(7)
    with pytest.raises(UserError, match="round the costs to fewer digits"):
        costs = rng.random((40, 5))
        knapsack.pareto(1 - costs, costs)


@pytest.mark.parametrize(
    "errors,costs,budget,message",
    [
        ([[0, 1]], [[4, 3]], 2, "at most 2: the smallest reachable cost is 3;"),
        ([[0, math.nan]], [[4, 3]], 5, r"errors\[block 0, rate index 1\] is nan"),
        ([[0, 1]], [[4, math.inf]], 5, r"costs\[block 0, rate index 1\] is inf"),
        ([[0, 1]], [[4]], 5, "same shape"),
        ([0, 1], [4, 3], 5, r"errors must be a table \[blocks, rates\]"),
        (np.zeros((0, 2)), np.zeros((0, 2)), 5, "with entries"),
        ([[0, 1]], [[4, 3]], math.nan, "budget must be a finite number"),
    ],
)
def test_bad_input_is_explained(errors, costs, budget, message):
    with pytest.raises(UserError, match=message):
        solve(errors, costs, budget)
