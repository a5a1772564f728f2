"""Which samples a step trains on: a pure function of the step, so that any position can be continued from.

Samples of one shape form a bucket, and a step takes all of its batch from one bucket, the same on all processes. In an
epoch a bucket comes up in proportion to its size. Of every bucket each process has its own contiguous share, which
it goes through in random order before any of it comes again.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_dit.errors import UserError

WINDOW = 4  # blocks whose samples are mixed; a reader that keeps this many and one more reads each block once


class Slot(NamedTuple):
    """What a step trains on: a bucket's number, and sample numbers of this process."""

    bucket: int
    samples: np.ndarray


class Order:
    """The order of training on one process.

    Attributes:
        steps: of an epoch.
    """

    def __init__(
        self,
        buckets: Mapping[str, Sequence[int]],
        blocks: Sequence[object],
        batch: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ):
        """Divides the samples.

        Args:
            buckets: name -> sample numbers, in the order of their files; equal on all processes.
            blocks: of every sample, what is read together with it; None for a sample that is read alone.
            batch: of all processes together.
            seed: of all random orders; not negative.
            process: index of this process.
            processes: their number.

        Raises:
            UserError: the batch doesn't divide, or a bucket has fewer samples than there are processes.
        """
        if batch < 1 or batch % processes:
            raise UserError(f"a batch of {batch} can't be divided over {processes} processes; take a multiple of it")
        small = [f"{name} ({len(members)})" for name, members in buckets.items() if len(members) < processes]
        if small or not buckets:
            raise UserError(
                f"too few samples for {processes} processes: {', '.join(small) or 'none'}; name the shapes to train on "
                "with --config.data.buckets, or add data"
            )
        self._local, self._seed, self._process = batch // processes, seed, process
        self._shares = []
        for members in buckets.values():
            n = len(members)
            self._shares.append(np.asarray(members)[n * process // processes : n * (process + 1) // processes])
        self._blocks = blocks
        self._counts = [max(1, round(len(members) / batch)) for members in buckets.values()]
        self.steps = sum(self._counts)
        self._epoch = functools.lru_cache(maxsize=4)(self._epoch)
        self._shuffled = functools.lru_cache(maxsize=4 * len(buckets))(self._shuffled)

    def at(self, step: int) -> Slot:
        """Returns what `step` (from 0) trains on."""
        epoch, within = divmod(step, self.steps)
        order, earlier = self._epoch(epoch)
        bucket = int(order[within])
        share = self._shares[bucket]
        first = (epoch * self._counts[bucket] + int(earlier[within])) * self._local
        rounds, places = np.divmod(np.arange(first, first + self._local), len(share))
        return Slot(bucket, np.array([self._shuffled(bucket, int(r))[p] for r, p in zip(rounds, places)]))

    def substitutes(self, step: int, place: int, count: int) -> np.ndarray:
        """Returns up to `count` samples to try, in this order, in place of an unusable one at `place` of a batch."""
        share = self._shares[self.at(step).bucket]
        rng = np.random.default_rng((self._seed, 2, step, place, self._process))
        return share[rng.permutation(len(share))[:count]]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the buckets of an epoch's steps, and how often each one has come up in it before."""
        order = np.repeat(np.arange(len(self._counts)), self._counts)
        order = np.random.default_rng((self._seed, 0, epoch)).permutation(order)
        earlier = np.zeros_like(order)
        for bucket in range(len(self._counts)):
            mine = order == bucket
            earlier[mine] = np.arange(mine.sum())
        return order, earlier

    def _shuffled(self, bucket: int, round_: int) -> np.ndarray:
        """Returns this process's samples of a bucket in the order of one round."""
        share = self._shares[bucket]
        rng = np.random.default_rng((self._seed, 1, bucket, round_, self._process))
        together: dict[object, list[int]] = {}
        for i in share.tolist():
            block = self._blocks[i]
            together.setdefault(("alone", i) if block is None else block, []).append(i)
        if len(together) == len(share):
            return rng.permutation(share)
        blocks = list(together.values())
        blocks = [blocks[i] for i in rng.permutation(len(blocks))]
        windows = [sum(blocks[i : i + WINDOW], []) for i in range(0, len(blocks), WINDOW)]
        return np.concatenate([rng.permutation(window) for window in windows])
