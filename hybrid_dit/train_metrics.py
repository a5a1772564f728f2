"""What one sees of a training run: `metrics.jsonl`, TensorBoard's event files, and a line on the console.

A row has the step, loss and gradient norm, norms of the feature maps and their gradient, learning rate, seconds, tokens
per second, model FLOPs utilisation, and the loss by ranges of the timestep, `loss_t/0-250` (absent if no sample fell
there).
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from hybrid_dit import cost, flow, processes, targets
from hybrid_dit.event_file import EventFile
from hybrid_dit.loss_log import LossLog
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.progress import Progress

METRICS_FILE, EVENTS = "metrics.jsonl", "tensorboard"
AVERAGED = 20  # steps that the printed loss is a mean of


class Monitor:
    """Takes each step's metrics. The first process writes, all know the mean loss. Use it with `with`."""

    def __init__(self, folder: Path, first: int, steps: int, devices: int):
        """Continues the records in `folder`.

        Args:
            folder: of the stage.
            first: finished steps; later rows of an interrupted run are dropped.
            steps: of the whole run.
            devices: that share a step.
        """
        writes = processes.is_main()
        self._log = LossLog(folder / METRICS_FILE if writes else None, first, AVERAGED)
        earlier = processes.on_main(lambda: list(self._log.recent))
        if not writes:  # the best checkpoint is chosen by the mean: it has to be the same everywhere
            self._log.recent.extend(earlier)
        self._events = EventFile(folder / EVENTS, first + 1) if writes else None
        self._progress = Progress("finetune", steps, start=first) if writes else None
        peak = targets.peak(jax.devices()[0].device_kind)
        self._peak = peak * devices if peak else None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._log)
            if self._events:
                stack.enter_context(self._events)

    @property
    def mean(self) -> float:
        """Mean of the last losses."""
        return self._log.mean

    def add(self, step: int, metrics: Mapping[str, np.ndarray], seconds: float, tokens: int, flops: int) -> None:
        """Records a step.

        Args:
            step: number of finished steps.
            metrics: from `Trainer.train_step`, on the host.
            seconds: it took.
            tokens: in the whole batch.
            flops: of the whole step, see `step_flops`.
        """
        row = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
        row |= {"seconds": seconds, "tokens_per_s": tokens / seconds}
        if self._peak:
            row["mfu"] = flops / seconds / self._peak
        sums, counts = metrics["bucket_sum"], metrics["bucket_count"]
        for name, total, count in zip(flow.bucket_names(len(sums)), sums.tolist(), counts.tolist()):
            if count:
                row[f"loss_t/{name}"] = total / count
        self._log.add(step, **row)
        if self._events:
            self._events.add(step, {name if "/" in name else f"train/{name}": value for name, value in row.items()})
            shown = {"loss": self.mean, "grad": row["grad_norm"]} | ({"MFU": row["mfu"]} if "mfu" in row else {})
            self._progress.update(step, **shown)


def step_flops(
    wan: WanConfig,
    attention: tuple[AttentionSpec, ...],
    latents: tuple[int, ...],
    text_tokens: int,
    teacher: bool = False,
) -> int:
    """Returns the FLOPs of a training step: forward, twice that backward, the teacher's forward.

    What is recomputed in the backward pass does not count.

    Args:
        wan: sizes of the DiT.
        attention: one spec per block.
        latents: shape of the whole batch.
        text_tokens: rows of text that are computed with.
        teacher: whether the loss has a term for it.
    """
    tokens = math.prod(wan.grid(latents))
    shape = cost.Shape(wan.dim, wan.num_heads, wan.ffn_dim, wan.num_layers, tokens, text_tokens)
    total = 3 * cost.model_flops(shape, attention)
    return latents[0] * (total + teacher * cost.model_flops(shape, (AttentionSpec(),) * wan.num_layers))
