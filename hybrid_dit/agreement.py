"""What processes tell each other. With one process nothing is exchanged."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def gathered(text: str) -> list[str]:
    """Returns every process's text, in the order of processes; all of them must ask."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(lengths.max()) - len(data))))
    return [bytes(row[:n]).decode() for row, n in zip(rows, lengths.tolist())]
