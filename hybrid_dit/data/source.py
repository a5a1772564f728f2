"""What training reads: batches of latents and text, and the position to continue from.

A source is deterministic: the global batch of step n depends on the data, the seed and the number of processes that
training began with alone. Each process gets its own rows of it, all of one shape.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from hybrid_dit.array_typing import Array, Float


class Batch(NamedTuple):
    """This process's share of a batch; text and count are what `hybrid_dit.models.wan.pack_text` returns."""

    latents: Float[Array, "b t y x c"]  # normalised
    text: Float[Array, "b l e"]
    count: Float[Array, "b l"]
    keys: tuple[str, ...]  # what the samples are called, for messages


class Text(NamedTuple):
    """Packed text of one prompt, such as the empty one's that caption drop-out puts in place of others."""

    text: Float[Array, "1 l e"]
    count: Float[Array, "1 l"]


@runtime_checkable
class Source(Protocol):
    """Batches in order, without end."""

    def next(self) -> Batch:
        """Returns the next batch. Raises UserError if the data has turned out to be unusable."""

    def state(self) -> dict:
        """Returns the position (the batch that comes next) as something JSON can hold."""

    def restore(self, state: dict) -> None:
        """Continues where `state` was taken, in any process. Raises UserError if it is of other data or settings."""


def pack(own: np.ndarray, rows: int, text_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs one prompt's embedding as `pack_text` does, on the host.

    Args:
        own: [l, e], the prompt's own tokens, at most `rows` of them.
        rows: of the result before the one that stands for all padding.
        text_tokens: the padded length that the model was trained with (Wan: 512).

    Returns:
        Text [rows + 1, e] in the dtype of `own`, and counts [rows + 1], float32.
    """
    text = np.zeros((rows + 1, own.shape[1]), own.dtype)
    text[: len(own)] = own
    count = np.zeros(rows + 1, np.float32)
    count[: len(own)] = 1
    count[-1] = text_tokens - len(own)
    return text, count


def own_rows(packed: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns the prompt's own tokens [l, e] of one packed text [rows + 1, e]; the inverse of `pack`."""
    return packed[: int(np.count_nonzero(count[:-1]))]
