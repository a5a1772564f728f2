"""The training step of stage 3 for one hybrid on one mesh: flow matching, everything trains.

The step is pure and compiled once. Its randomness and its samples depend on the seed and the step's number alone, so
that step N is the same whether it is reached in one run or after ten interruptions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from hybrid_dit import sharding
from hybrid_dit.array_typing import Array, Float, PyTree
from hybrid_dit.flow import flow_matching_loss
from hybrid_dit.models.wan import WanConfig, WanDiT
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.pairs import Pairs

# From this many tokens x width x blocks per device on, activations are recomputed in the backward pass: 2**24 keep
# about 2 GiB of them. The bundled model stays below, Wan is far above.
MAX_KEPT = 2**24


class State(NamedTuple):
    """What a step changes: the DiT's parameters, AdamW's moments, and the number of finished steps."""

    params: PyTree
    opt_state: PyTree
    step: Array


class Trainer:
    """The train step of one hybrid on one mesh."""

    def __init__(
        self,
        config,
        wan: WanConfig,
        attention: tuple[AttentionSpec, ...],
        shift: float,
        empty: Pairs,
        mesh: Mesh,
    ):
        """Prepares the optimiser.

        Args:
            config: sections `model` and `finetune`, and the seed.
            wan: sizes of the DiT.
            attention: one spec per block.
            shift: timestep shift.
            empty: its text is the empty prompt's, which replaces a share `drop_text` of the prompts.
            mesh: from `sharding.data_mesh`.
        """
        self.cfg, self.seed, self.dtype = config.finetune, config.seed, jnp.dtype(config.model.compute_dtype)
        self.backend = config.model.attention_backend
        self.wan, self.attention, self.shift, self.empty, self.mesh = wan, attention, shift, empty, mesh
        self.tx = optax.chain(
            optax.clip_by_global_norm(self.cfg.clip),
            optax.adamw(self._learning_rate, weight_decay=self.cfg.weight_decay),
        )

    def abstract(self, params: PyTree) -> State:
        """Returns shapes and shardings of the whole state; `params` may be shapes themselves."""
        whole = sharding.replicated(self.mesh)
        places = sharding.param_shardings(self.mesh, params)
        moments = jax.eval_shape(self.tx.init, params)
        moment_places = optax.tree_utils.tree_map_params(
            self.tx, lambda _, place: place, moments, places, transform_non_params=lambda _: whole
        )
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            State(params, moments, jax.ShapeDtypeStruct((), jnp.int32)),
            State(places, moment_places, whole),
        )

    def init(self, params: PyTree) -> State:
        """Places parameters (host arrays, float32) and fresh moments on the mesh."""
        places = jax.tree.map(lambda x: x.sharding, self.abstract(params))
        params = sharding.put(params, places.params)
        moments = jax.jit(self.tx.init, out_shardings=places.opt_state)(params)
        return State(params, moments, sharding.put(np.int32(0), places.step))

    def train_step(self, state: State, batch: Pairs) -> tuple[State, dict[str, Array]]:
        """One step of AdamW on everything; returns loss and norm of the gradient before the update, float32."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        with sharding.split_activations(self._by_batch(batch)):
            loss, grads = jax.value_and_grad(self.loss)(state.params, batch, key)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state, state.step + 1), {"loss": loss, "grad_norm": optax.tree_utils.tree_norm(grads)}

    def loss(self, params: PyTree, batch: Pairs, key: Array) -> Float[Array, ""]:
        """Flow-matching loss of a batch, some of whose prompts are replaced by the empty one."""
        key_drop, key_flow = jax.random.split(key)
        drop = jax.random.bernoulli(key_drop, self.cfg.drop_text, (len(batch.latents),))
        text = jnp.where(drop[:, None, None], self.empty.text, batch.text)
        count = jnp.where(drop[:, None], self.empty.count, batch.count)
        tokens = len(batch.latents) * math.prod(self.wan.grid(batch.latents.shape)) // self.mesh.size
        remat = tokens * self.wan.dim * self.wan.num_layers > MAX_KEPT
        model = WanDiT(self.wan, self.attention, self.dtype, remat, self.backend)

        def velocity(x, t):
            return model.apply({"params": params}, x, t, text, count)

        return flow_matching_loss(velocity, batch.latents, key_flow, self.shift).mean()

    def compile(self, state: State, batch: Pairs) -> Callable[[State, Pairs], tuple[State, dict[str, Array]]]:
        """Returns `train_step` compiled for states and host batches like these; it uses up the state it is given."""
        by_batch = self._by_batch(batch)
        if by_batch.is_fully_replicated and self.mesh.size > 1:
            print(
                f"note: a batch of {len(batch.latents)} does not divide over {self.mesh.size} devices; "
                "every one computes all of it"
            )
        compiled = self.lower(state, batch).compile()
        return lambda state, batch: compiled(state, sharding.put(batch, Pairs(by_batch, by_batch, by_batch)))

    def lower(self, state: State, batch: Pairs) -> jax.stages.Lowered:
        """Returns `train_step` traced with explicit shardings; shapes of state and batch are enough."""
        places = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(
            self.train_step,
            in_shardings=(places, self._by_batch(batch)),
            out_shardings=(places, sharding.replicated(self.mesh)),
            donate_argnums=0,
        ).lower(state, batch)

    def _by_batch(self, batch: Pairs) -> NamedSharding:
        return sharding.batch_sharding(self.mesh, len(batch.latents))

    def _learning_rate(self, count: Array) -> Array:
        """Linear warm-up, whose first step is not lost to a rate of 0; then constant, as in the paper."""
        return self.cfg.learning_rate * jnp.minimum((count + 1) / max(self.cfg.warmup, 1), 1.0)
