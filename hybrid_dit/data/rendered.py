"""Rendered moving shapes as a `Source`."""

import numpy as np

from hybrid_dit.data.source import Batch
from hybrid_dit.errors import UserError
from hybrid_dit.pairs import Pairs, order_at


class RenderedSource:
    """Batches of pairs in host memory, the same on every process; each takes its rows of the global batch."""

    def __init__(self, pairs: Pairs, *, batch: int, seed: int, process: int = 0, processes: int = 1):
        """Starts at the first batch.

        Args:
            pairs: from `rendered_pairs`.
            batch: of all processes together.
            seed: of the order.
            process: index of this process.
            processes: their number.

        Raises:
            UserError: the batch can't be divided.
        """
        if batch % processes:
            raise UserError(f"a batch of {batch} can't be divided over {processes} processes; take a multiple of it")
        self._pairs, self._batch, self._seed, self._step = pairs, batch, seed, 0
        local = batch // processes
        self._rows = slice(process * local, (process + 1) * local)

    def next(self) -> Batch:
        """Returns the next batch."""
        index = order_at(len(self._pairs.latents), self._step, self._batch, self._seed)[self._rows]
        self._step += 1
        return Batch(*(np.asarray(x[index]) for x in self._pairs), tuple(f"scene {i}" for i in index))

    def state(self) -> dict:
        """Returns the position."""
        return {"step": self._step}

    def restore(self, state: dict) -> None:
        """Continues where `state` was taken.

        Raises:
            UserError: it was taken with data from files.
        """
        if "step" not in state:
            raise UserError(
                "the data position of the checkpoint belongs to files; give the data.kind and data.path that it was "
                "made with, or start in another --workdir"
            )
        self._step = int(state["step"])
