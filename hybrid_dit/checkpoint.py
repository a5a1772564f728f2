"""Training state on disk: Orbax checkpoints by step, the last few and the best kept, unfinished ones never chosen.

With several processes all of them save and restore together, each its own devices' part, to a folder that all see.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from hybrid_dit import processes
from hybrid_dit.array_typing import PyTree
from hybrid_dit.errors import UserError


class Checkpoints:
    """Checkpoints of one training run in one folder. Close it (or use it with `with`) so that all get written."""

    def __init__(self, folder: str | Path, keep: int = 2, keep_best: bool = False):
        """Opens the folder, creates it if need be, and removes what an interrupted save left.

        Args:
            folder: a subfolder per step.
            keep: number of checkpoints kept; older ones are deleted once a new one is complete.
            keep_best: keep the one with the lowest loss too; every save has to tell its loss then.
        """
        # Orbax reports every file it touches, and an error once per thread, before it is raised here.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        policies = [preservation_policy.LatestN(keep)]
        if keep_best:
            policies.append(preservation_policy.BestN(get_metric_fn=_loss, reverse=True, n=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=_loss if keep_best else None,
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        self.folder = Path(folder).resolve()
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._saving: int | None = None  # or saved: the last step that was asked for

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the lowest loss, None if there is none."""
        return self._manager.best_step()

    def reserve(self, state: PyTree) -> None:
        """Has JAX allocate the host memory that `save` copies `state` through, and keep it; on GPUs, elsewhere nothing.

        Such memory comes at about a gigabyte a second: training would stop that long for the first save. So call it
        while something else has to be waited for. `state` has to stay until it returns. Where there is not enough
        memory, that is printed.
        """
        if jax.default_backend() != "gpu":
            return
        shards = [x for leaf in jax.tree.leaves(state) for x in leaf.addressable_shards if x.replica_id == 0]
        pinned = [jax.sharding.SingleDeviceSharding(x.device, memory_kind="pinned_host") for x in shards]
        try:
            jax.block_until_ready(jax.device_put([x.data for x in shards], pinned))
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).split("\n")[0][:200]
            print(f"note: no host memory could be reserved for checkpoints: {reason}", flush=True)

    def save(self, step: int, state: PyTree, extra: dict | None = None, loss: float | None = None) -> None:
        """Saves in the background; `state` may be donated or changed right after. A step saved already is left alone.

        Args:
            step: number of finished steps.
            state: a tree of arrays.
            extra: what belongs to it, of values that JSON can hold.
            loss: what the best is chosen by.

        Raises:
            UserError: this or the one before can't be written, say because the disk is full.
        """
        if step == self.latest:
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra or {}))
        with self._written():
            self._manager.wait_until_finished()
        self._saving = step
        with self._written():
            self._manager.save(step, args=items, force=True, metrics=None if loss is None else {"loss": loss})

    def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
        """Returns (step, state) of the last complete checkpoint, bit for bit as saved; None if there is none.

        Args:
            like: tree of arrays, or of `jax.ShapeDtypeStruct`s with a sharding, that says structure, shapes and
                placement. The number of devices may differ from when it was saved.

        Raises:
            UserError: the checkpoint is damaged, or of another model.
        """
        latest = self._shared_latest()
        if latest is None:
            return None
        abstract = jax.tree.map(_abstract, like)
        return latest, self._restored(latest, state=ocp.args.StandardRestore(abstract)).state

    def extra(self) -> dict:
        """Returns what was saved with the last complete checkpoint beside its state.

        Raises:
            UserError: the checkpoint is damaged.
        """
        return self._restored(self._shared_latest(), extra=ocp.args.JsonRestore()).extra

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            UserError: the last one can't be.
        """
        with self._written():
            self._manager.wait_until_finished()
        self._manager.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Raises UserError for what goes wrong with the step that is being saved."""
        try:
            yield
        except (ValueError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            reason = reason if len(reason) <= 300 else f"... {reason[-300:]}"  # the cause comes after all that failed
            good = f"the last good one is {self.latest}" if self.latest else "there is none before it"
            raise UserError(
                f"checkpoint {self.folder / str(self._saving)} could not be written ({reason}); {good}. Make room, or "
                "see to it that the folder can be written to; the same command continues"
            ) from error

    def _shared_latest(self) -> int | None:
        return processes.on_main(lambda: self.latest)  # what the others see of the folder may be older

    def _restored(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(
                f"checkpoint {self.folder / str(step)} is damaged or of another model ({reason}); "
                "delete it to continue from the one before, or the whole folder to start anew"
            ) from error


def _abstract(x) -> jax.ShapeDtypeStruct:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _loss(metrics: dict) -> float:
    return metrics["loss"]
