"""AdamW for fine-tuning: schedules, learning rates per group of parameters, freezing, and the averaged weights.

A group is a `(regex, multiplier)` rule over parameter paths (`hybrid_dit.rules`). Multiplier 0 freezes: no gradient, no
moments, no decay, and no part in the gradient's norm.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from hybrid_dit import rules
from hybrid_dit.array_typing import Array, PyTree
from hybrid_dit.convert import tables
from hybrid_dit.errors import UserError

SCHEDULES = ("constant", "cosine")


def learning_rate(cfg) -> Callable[[Array], Array]:
    """Returns the learning rate as a function of the number of finished steps, float32.

    Linear warm-up, whose first step is not lost to a rate of 0; then constant, as in the paper, or half a cosine, whose
    last step is not lost either.

    Args:
        cfg: `learning_rate`, `warmup`, `schedule`, and `steps` for the cosine.

    Raises:
        UserError: an unknown schedule.
    """
    if cfg.schedule not in SCHEDULES:
        raise UserError(f"finetune.schedule={cfg.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")

    def rate(count):
        warm = jnp.minimum((count + 1) / max(cfg.warmup, 1), 1.0)
        if cfg.schedule == "constant":
            return cfg.learning_rate * warm
        progress = jnp.clip((count - cfg.warmup) / max(cfg.steps - cfg.warmup, 1), 0.0, 1.0)
        return cfg.learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return rate


class Optimiser:
    """AdamW with a global-norm clip, over the parameters that are not frozen.

    Attributes:
        learning_rate: of a group with multiplier 1, a function of the number of finished steps.
        tx: of trees as `split` returns them first.
    """

    def __init__(self, cfg):
        """Reads `clip` (0: none), `weight_decay`, `learning_rates` (rules) and what `learning_rate` needs.

        Raises:
            UserError: an unreadable rule or an unknown schedule.
        """
        self.rules = rules.parse_numbers(cfg.learning_rates, "finetune.learning_rates")
        self.learning_rate = learning_rate(cfg)
        self.tx = optax.chain(
            *([optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []),
            optax.adamw(self.learning_rate, weight_decay=cfg.weight_decay),
            *([optax.stateless(self._scale)] if any(value not in (0, 1) for _, value in self.rules) else []),
        )

    def split(self, params: Mapping) -> tuple[dict, dict]:
        """Returns two trees: the parameters that train, and the others.

        Raises:
            UserError: a parameter matches no rule or several, or all are frozen.
        """
        flat = tables.flatten(params)
        multiplier = self._multipliers(flat)
        trained = {path: leaf for path, leaf in flat.items() if multiplier[path]}
        if not trained:
            raise UserError("finetune.learning_rates freezes every parameter; nothing would train")
        frozen = {path: leaf for path, leaf in flat.items() if not multiplier[path]}
        return tables.unflatten(trained), tables.unflatten(frozen)

    def init(self, params: Mapping) -> PyTree:
        """Returns fresh moments."""
        return self.tx.init(self.split(params)[0])

    def update(self, grads: PyTree, opt_state: PyTree, trained: PyTree) -> tuple[PyTree, PyTree]:
        """Returns (new parameters, new moments); `grads` is of the structure of `trained`."""
        updates, opt_state = self.tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    def places(self, params: Mapping, places: Mapping, whole) -> PyTree:
        """Returns where the moments of `params` (or their shapes) live: with their parameters, all else at `whole`."""
        moments = jax.eval_shape(self.init, params)
        return optax.tree_utils.tree_map_params(
            self.tx, lambda _, place: place, moments, self.split(places)[0], transform_non_params=lambda _: whole
        )

    def _multipliers(self, paths) -> dict[str, float]:
        try:
            return rules.assign(self.rules, paths, "learning-rate")
        except ValueError as error:
            raise UserError(f"--config.finetune.learning_rates: {error}") from error

    def _scale(self, updates, _):
        flat = tables.flatten(updates)
        multiplier = self._multipliers(flat)
        return tables.unflatten({path: multiplier[path] * leaf for path, leaf in flat.items()})


def merged(params: Mapping, *parts: Mapping) -> dict:
    """Returns a tree of the structure of `params` with the leaves of trees that split it."""
    flat = {}
    for part in parts:
        flat |= tables.flatten(part)
    return rules.like(params, flat)


def averaged(ema: PyTree, params: PyTree, step: Array, decay: float) -> PyTree:
    """Returns d·ema + (1 − d)·params with d = min(decay, (1 + step) / (10 + step)).

    The warm-up keeps the first average from standing for the untrained model: after step n it spans about n / 10 steps.

    Args:
        ema: averaged parameters, float32.
        params: parameters after the update.
        step: number of steps before it.
        decay: in [0, 1).
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + (1 - d) * (p - a), ema, params)
