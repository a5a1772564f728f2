"""Which samples a step trains on: a pure function of the step, so that any position can be continued from.

Samples of one shape form a bucket, and a step takes all of its batch from one bucket. In an epoch a bucket comes up in
proportion to its size. Every bucket is cut into contiguous shares, each of which fills its own rows of the batch and is
gone through in random order before any of it comes again. With as many shares as processes, each process reads its own
files; the order itself knows nothing of processes, so that any number of them can continue it.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_dit.errors import UserError

WINDOW = 4  # blocks whose samples are mixed; a reader that keeps this many and one more reads each block once


class Slot(NamedTuple):
    """What a step trains on: a bucket's number, and sample numbers of the rows that were asked for."""

    bucket: int
    samples: np.ndarray


class Order:
    """The order of training.

    Attributes:
        steps: of an epoch.
    """

    def __init__(
        self,
        buckets: Mapping[str, Sequence[int]],
        blocks: Sequence[object],
        batch: int,
        seed: int,
        shares: int = 1,
    ):
        """Divides the samples.

        Args:
            buckets: name -> sample numbers, in the order of their files.
            blocks: of every sample, what is read together with it; None for a sample that is read alone.
            batch: of all processes together.
            seed: of all random orders; not negative.
            shares: that every bucket is cut into: the number of processes that training began with.

        Raises:
            UserError: the batch doesn't divide, or a bucket has fewer samples than there are shares.
        """
        if batch < 1 or batch % shares:
            raise UserError(f"a batch of {batch} can't be divided over {shares} processes; take a multiple of it")
        small = [f"{name} ({len(members)})" for name, members in buckets.items() if len(members) < shares]
        if small or not buckets:
            raise UserError(
                f"too few samples for {shares} processes: {', '.join(small) or 'none'}; name the shapes to train on "
                "with --config.data.buckets, or add data"
            )
        self._batch, self._rows, self._seed, self._blocks = batch, batch // shares, seed, blocks
        self._shares = [  # of every bucket
            [np.asarray(members)[len(members) * i // shares : len(members) * (i + 1) // shares] for i in range(shares)]
            for members in buckets.values()
        ]
        self._counts = [max(1, round(len(members) / batch)) for members in buckets.values()]
        self.steps = sum(self._counts)
        self._epoch = functools.lru_cache(maxsize=4)(self._epoch)
        self._shuffled = functools.lru_cache(maxsize=4 * len(buckets) * shares)(self._shuffled)

    def at(self, step: int, rows: Sequence[int] | None = None) -> Slot:
        """Returns what `step` (from 0) trains on in these rows of its batch; None: in all of them."""
        epoch, within = divmod(step, self.steps)
        order, earlier = self._epoch(epoch)
        bucket = int(order[within])
        first = (epoch * self._counts[bucket] + int(earlier[within])) * self._rows  # of a share, that came before
        samples = []
        for row in range(self._batch) if rows is None else rows:
            share, place = divmod(row, self._rows)
            round_, position = divmod(first + place, len(self._shares[bucket][share]))
            samples.append(self._shuffled(bucket, share, round_)[position])
        return Slot(bucket, np.array(samples))

    def substitutes(self, step: int, row: int, count: int) -> np.ndarray:
        """Returns up to `count` samples to try, in this order, in place of an unusable one in a row of a batch."""
        share, place = divmod(row, self._rows)
        members = self._shares[self.at(step, ()).bucket][share]
        rng = np.random.default_rng((self._seed, 2, step, place, share))
        return members[rng.permutation(len(members))[:count]]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the buckets of an epoch's steps, and how often each one has come up in it before."""
        order = np.repeat(np.arange(len(self._counts)), self._counts)
        order = np.random.default_rng((self._seed, 0, epoch)).permutation(order)
        earlier = np.zeros_like(order)
        for bucket in range(len(self._counts)):
            mine = order == bucket
            earlier[mine] = np.arange(mine.sum())
        return order, earlier

    def _shuffled(self, bucket: int, share: int, round_: int) -> np.ndarray:
        """Returns a share of a bucket in the order of one round."""
        members = self._shares[bucket][share]
        rng = np.random.default_rng((self._seed, 1, bucket, round_, share))
        together: dict[object, list[int]] = {}
        for i in members.tolist():
            block = self._blocks[i]
            together.setdefault(("alone", i) if block is None else block, []).append(i)
        if len(together) == len(members):
            return rng.permutation(members)
        blocks = list(together.values())
        blocks = [blocks[i] for i in rng.permutation(len(blocks))]
        windows = [sum(blocks[i : i + WINDOW], []) for i in range(0, len(blocks), WINDOW)]
        return np.concatenate([rng.permutation(window) for window in windows])
