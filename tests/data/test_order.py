import collections

import numpy as np
import pytest

from hybrid_dit.data.order import WINDOW, Order
from hybrid_dit.errors import UserError

BUCKETS = {"wide": list(range(0, 40)), "tall": list(range(40, 53))}
ALONE = [None] * 53


def walk(order, steps, start=0):
    return [order.at(step) for step in range(start, start + steps)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_all_samples_without_overlap(processes):
    order, local = Order(BUCKETS, ALONE, 4, 0, processes), 4 // processes
    seen = [collections.Counter() for _ in range(processes)]
    for step in range(20 * order.steps):
        slots = [order.at(step, range(p * local, (p + 1) * local)) for p in range(processes)]
        assert len({slot.bucket for slot in slots}) == 1  # one shape at a time, everywhere
        assert order.at(step).samples.tolist() == np.concatenate([slot.samples for slot in slots]).tolist()
        assert all(len(slot.samples) == 4 // processes for slot in slots)
        for counter, slot in zip(seen, slots):
            assert set(slot.samples.tolist()) <= set(list(BUCKETS.values())[slot.bucket])
            counter.update(slot.samples.tolist())
    shares = [set(counter) for counter in seen]
    assert set().union(*shares) == set(range(53)) and sum(map(len, shares)) == 53
    for name, members in BUCKETS.items():  # all samples of a share come up equally often
        counts = [{counter[i] for i in members if i in counter} for counter in seen]
        assert all(max(c) - min(c) <= 1 for c in counts), name
        sizes = [len(share & set(members)) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_all_samples_of_a_bucket_come_before_any_comes_again():
    order = Order(BUCKETS, ALONE, 4, 0)
    drawn = {0: [], 1: []}
    for slot in walk(order, 40 * order.steps):
        drawn[slot.bucket] += slot.samples.tolist()
    rounds = []
    for bucket, members in enumerate(BUCKETS.values()):
        n = len(members)
        whole = [drawn[bucket][i : i + n] for i in range(0, len(drawn[bucket]) - n + 1, n)]
        assert len(whole) > 10 and all(sorted(r) == members for r in whole)
        rounds += whole
    assert len({tuple(r) for r in rounds}) == len(rounds)  # always in another order


def test_buckets_come_up_in_proportion_to_their_size():
    order = Order(BUCKETS, ALONE, 4, 0)
    assert order.steps == 13  # 40 / 4 and 13 / 4, rounded
    for epoch in range(3):
        chosen = [slot.bucket for slot in walk(order, 13, 13 * epoch)]
        assert (chosen.count(0), chosen.count(1)) == (10, 3)


def test_a_step_depends_on_its_number_alone():
    order, again, other = (Order(BUCKETS, ALONE, 4, seed, 2) for seed in (7, 7, 8))
    forward = walk(order, 40)
    for step in (39, 3, 20, 0, 39):
        slot = again.at(step)
        assert slot.bucket == forward[step].bucket and slot.samples.tolist() == forward[step].samples.tolist()
    assert [s.samples.tolist() for s in walk(other, 40)] != [s.samples.tolist() for s in forward]


def test_a_batch_may_be_larger_than_a_bucket():
    order = Order({"few": [3, 5]}, [None] * 6, 5, 0)
    assert set(order.at(0).samples.tolist()) == {3, 5} and len(order.at(0).samples) == 5


@pytest.mark.parametrize("processes", [1, 2])
def test_blocks_are_read_once_a_round_by_a_reader_that_keeps_a_few(processes):
    blocks = [i // 3 for i in range(90)]
    order = Order({"all": list(range(90))}, blocks, 2 * processes, 0, processes)
    for process in range(processes):
        rows = range(2 * process, 2 * process + 2)
        kept, loads, mixed = collections.OrderedDict(), [], []
        n = 90 // processes
        drawn = np.concatenate([order.at(step, rows).samples for step in range(n // 2)])[: n - n % 2].tolist()
        for i in drawn:
            if blocks[i] not in kept:
                loads.append(blocks[i])
                if len(kept) == WINDOW + 1:
                    kept.popitem(last=False)
            kept[blocks[i]] = None
            kept.move_to_end(blocks[i])
            mixed.append(blocks[i])
        assert sorted(loads) == sorted(set(loads))
        changes = sum(a != b for a, b in zip(mixed, mixed[1:]))
        assert changes > len(set(mixed)) + 5  # more often than if one block was used up after the other


def test_substitutes_are_of_the_same_bucket_and_share_and_repeatable():
    order = Order(BUCKETS, ALONE, 4, 0, 2)
    for step in range(order.steps):
        found = order.substitutes(step, 3, 5).tolist()
        share = list(BUCKETS.values())[order.at(step).bucket]
        assert len(set(found)) == 5 and set(found) <= set(share[len(share) // 2 :])
        assert found == Order(BUCKETS, ALONE, 4, 0, 2).substitutes(step, 3, 5).tolist()
    assert order.substitutes(0, 0, 5).tolist() != order.substitutes(0, 1, 5).tolist()


@pytest.mark.parametrize(
    "buckets, batch, processes, message",
    [
        (BUCKETS, 3, 2, "batch of 3 can't be divided over 2 processes"),
        ({"a": [0, 1, 2], "b": [3]}, 4, 2, r"too few samples for 2 processes: b \(1\)"),
        ({}, 4, 2, "too few samples for 2 processes: none"),
    ],
)
def test_what_can_not_be_divided_is_told(buckets, batch, processes, message):
    with pytest.raises(UserError, match=message):
        Order(buckets, ALONE, batch, 0, processes)
