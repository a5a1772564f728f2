"""The training step of stage 3 for one hybrid on one mesh: flow matching, everything trains unless frozen.

The step is pure and compiled once per shape. Its randomness depends on the seed and the step's number alone, so that
step N is the same whether it is reached in one run or after ten interruptions. The draws are made for the whole batch
before it is cut into parts: accumulated gradients are those of the whole batch, up to rounding.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit import flow, sharding
from hybrid_dit.array_typing import Array, Float, PyTree
from hybrid_dit.convert import tables
from hybrid_dit.data.source import Batch, Text
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig, WanDiT
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.optim import Optimiser, averaged, merged
from hybrid_dit.pairs import Pairs
from hybrid_dit.progress import duration
from hybrid_dit.sampling.schedule import TRAIN_STEPS

# From this many tokens x width x blocks per device on, remat "auto" recomputes activations in the backward pass: 2**24
# keep about 2 GiB of them. The bundled model stays below, Wan is far above.
MAX_KEPT = 2**24
BUCKETS = 4  # ranges of the timestep whose losses are told apart


class State(NamedTuple):
    """What a step changes: parameters, AdamW's moments, averaged parameters ({} if off), number of finished steps."""

    params: PyTree
    opt_state: PyTree
    ema: PyTree
    step: Array


class Samples(NamedTuple):
    """A batch with its random draws."""

    latents: Float[Array, "b t y x c"]
    text: Float[Array, "b l e"]
    count: Float[Array, "b l"]
    level: Float[Array, "b"]
    noise: Float[Array, "b t y x c"]


def check(cfg) -> None:
    """Raises UserError for what is wrong with section `finetune` whatever the model: before anything is read for it."""
    Optimiser(cfg)
    flow.check_distribution(cfg.timesteps)
    if cfg.accumulate < 1 or cfg.batch % cfg.accumulate:
        raise UserError(
            f"finetune.accumulate={cfg.accumulate} must divide finetune.batch={cfg.batch}: it is the number of parts "
            "that a batch is computed in"
        )


class Trainer:
    """The train step of one hybrid on one mesh."""

    def __init__(
        self,
        config,
        wan: WanConfig,
        attention: tuple[AttentionSpec, ...],
        shift: float,
        empty: Text,
        mesh: Mesh,
    ):
        """Prepares the optimiser.

        Args:
            config: sections `model` and `finetune`, and the seed.
            wan: sizes of the DiT.
            attention: one spec per block.
            shift: timestep shift of the pipeline, where the config gives none.
            empty: the empty prompt's text, which replaces a share `drop_text` of the prompts.
            mesh: from `sharding.train_mesh`.

        Raises:
            UserError: see `check`.
        """
        self.cfg, self.seed, self.dtype = config.finetune, config.seed, jnp.dtype(config.model.compute_dtype)
        self.backend = config.model.attention_backend
        self.wan, self.attention, self.empty, self.mesh = wan, attention, empty, mesh
        self.shift = self.cfg.shift or shift
        check(self.cfg)
        self.optimiser = Optimiser(self.cfg)

    # State

    def abstract(self, params: PyTree) -> State:
        """Returns shapes and shardings of the whole state; `params` may be shapes themselves."""
        whole = sharding.replicated(self.mesh)
        places = sharding.param_shardings(self.mesh, params)
        state = State(
            params, jax.eval_shape(self.optimiser.init, params), params if self.cfg.ema else {}, _shape((), jnp.int32)
        )
        moment_places = self.optimiser.places(params, places, whole)
        where = State(places, moment_places, places if self.cfg.ema else {}, whole)
        return jax.tree.map(lambda x, place: _shape(x.shape, x.dtype, sharding=place), state, where)

    def init(self, params: PyTree) -> State:
        """Places parameters (host arrays, float32) on the mesh, with fresh moments."""
        places = jax.tree.map(lambda x: x.sharding, self.abstract(params))
        placed = sharding.put(params, places.params)
        moments = jax.jit(self.optimiser.init, out_shardings=places.opt_state)(placed)
        ema = sharding.put(params, places.ema) if self.cfg.ema else {}
        return State(placed, moments, ema, sharding.put(np.int32(0), places.step))

    def place_teacher(self, params: PyTree) -> PyTree:
        """Places the teacher's parameters; matrices of blocks in the dtype that they are multiplied in anyway."""
        like = self.abstract_teacher(params)
        return jax.tree.map(lambda x, y: sharding.put(np.asarray(x, y.dtype), y.sharding), params, like)

    def abstract_teacher(self, params: PyTree) -> PyTree:
        """Returns shapes and shardings of the teacher's parameters."""
        places = tables.flatten(sharding.param_shardings(self.mesh, params))
        flat = {
            path: _shape(x.shape, self.dtype if _is_matrix_of_block(path) else x.dtype, sharding=places[path])
            for path, x in tables.flatten(params).items()
        }
        return tables.unflatten(flat)

    # The step

    def train_step(self, state: State, batch: Pairs, teacher: PyTree = None) -> tuple[State, dict[str, Array]]:
        """One step of AdamW; returns the new state and metrics before the update, float32 scalars but for three.

        Args:
            state: used up.
            batch: of all processes.
            teacher: its parameters, if the loss has a term for it.

        Returns:
            (state, {"loss", "grad_norm" (before the clip), "learning_rate", "sample_loss" [b] in the batch's order (no
            weights on its terms), "bucket_sum" and "bucket_count" of the flow-matching loss by timestep [BUCKETS]});
            with a teacher also "flow_loss" and "teacher_loss", with trained feature maps also "phi_norm" and
            "phi_grad_norm").
        """
        cfg, parts = self.cfg, self.cfg.accumulate
        samples = self.draw(batch, jax.random.fold_in(jax.random.key(self.seed), state.step))
        trained, frozen = self.optimiser.split(state.params)

        def loss(trained, part):
            return self.loss(merged(state.params, trained, frozen), part, teacher)

        gradient = jax.value_and_grad(loss, has_aux=True)
        place = sharding.batch_sharding(self.mesh, len(batch.latents) // parts)
        rows = sharding.context_split(self.mesh).rows(math.prod(self.wan.grid(batch.latents.shape)))
        with sharding.split_activations(place, rows):
            if parts == 1:
                (value, errors), grads = gradient(trained, samples)
            else:
                samples = jax.tree.map(lambda x: _cut(x, parts, place), samples)
                value, errors, grads = self._accumulate(gradient, trained, samples)
        new, opt_state = self.optimiser.update(grads, state.opt_state, trained)
        params = merged(state.params, new, frozen)
        ema = averaged(state.ema, params, state.step, cfg.ema) if cfg.ema else state.ema

        sums, counts = flow.by_timestep(errors["flow"].reshape(-1), samples.level.reshape(-1), BUCKETS)
        norm = optax.tree_utils.tree_norm
        metrics = {
            "loss": value,
            "grad_norm": norm(grads),
            "learning_rate": jnp.float32(self.optimiser.learning_rate(state.step)),
            "sample_loss": sum(errors.values()).T.reshape(-1),  # accumulated: [parts, b / parts], dealt by `_cut`
            "bucket_sum": sums,
            "bucket_count": counts,
        }
        if teacher is not None:
            metrics |= {"flow_loss": errors["flow"].mean(), "teacher_loss": errors["teacher"].mean()}
        if jax.tree.leaves(grads.get("feature_maps", {})):
            metrics |= {"phi_norm": norm(params["feature_maps"]), "phi_grad_norm": norm(grads["feature_maps"])}
        return State(params, opt_state, ema, state.step + 1), metrics

    def draw(self, batch: Pairs, key: Array) -> Samples:
        """Returns the batch with noise and its levels, some of the prompts replaced by the empty one."""
        cfg = self.cfg
        key_drop, key_flow = jax.random.split(key)
        drop = jax.random.bernoulli(key_drop, cfg.drop_text, (len(batch.latents),))
        empty = fitted_text(self.empty, batch.text.shape[1])
        text = jnp.where(drop[:, None, None], empty.text, batch.text)
        count = jnp.where(drop[:, None], empty.count, batch.count)
        settings = cfg.timesteps, cfg.logit_mean, cfg.logit_std
        level, noise = flow.draw(key_flow, batch.latents.shape, self.shift, *settings)
        return Samples(batch.latents, text, count, level, noise)

    def loss(self, params: PyTree, samples: Samples, teacher: PyTree = None) -> tuple[Array, dict[str, Array]]:
        """Flow-matching loss + `cfg.teacher` · ‖v − v_teacher‖² on the same noisy latents, each averaged; float32.

        Returns:
            (loss, {"flow": per sample [b], "teacher": likewise, if there is one}).
        """
        shape = samples.latents.shape
        tokens = shape[0] * math.prod(self.wan.grid(shape)) // self.mesh.size
        remat = self.cfg.remat
        if remat == "auto":
            remat = "block" if tokens * self.wan.dim * self.wan.num_layers > MAX_KEPT else "none"
        x = flow.noisy(samples.latents, samples.noise, samples.level)
        inputs = x, TRAIN_STEPS * samples.level, samples.text, samples.count
        how = {"dtype": self.dtype, "backend": self.backend, "split": sharding.context_split(self.mesh)}
        velocity = WanDiT(self.wan, self.attention, remat=remat, **how).apply({"params": params}, *inputs)
        errors = {"flow": flow.squared_error(velocity, flow.target(samples.latents, samples.noise))}
        if teacher is None:
            return errors["flow"].mean(), errors
        wanted = WanDiT(self.wan, **how).apply({"params": teacher}, *inputs)
        errors["teacher"] = flow.squared_error(velocity, jax.lax.stop_gradient(wanted))
        return errors["flow"].mean() + self.cfg.teacher * errors["teacher"].mean(), errors

    def _accumulate(self, gradient, trained: PyTree, parts: Samples):
        """Mean of loss and gradient over the parts [parts, b, ...], one after the other; errors stay [parts, b]."""
        places = sharding.param_shardings(self.mesh, trained)

        def add(total, part):
            (value, errors), grads = gradient(trained, part)
            total = jax.tree.map(jnp.add, total, (value, grads))
            return (total[0], jax.lax.with_sharding_constraint(total[1], places)), errors

        zero = jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), trained)
        total, errors = jax.lax.scan(add, zero, parts)
        value, grads = jax.tree.map(lambda x: x / len(parts.level), total)
        return value, errors, grads

    # Programs

    def check_batch(self) -> None:
        """Says so if not all devices can have a part of a batch of their own.

        Raises:
            UserError: several processes need that.
        """
        smallest = self.cfg.batch // self.cfg.accumulate
        parts = self.mesh.size // self.mesh.shape["seq"]
        if parts > 1 and sharding.batch_sharding(self.mesh, smallest).is_fully_replicated:
            if jax.process_count() > 1:
                raise UserError(
                    f"a batch of {smallest} does not divide over {parts} devices, which several processes need; change "
                    "finetune.batch or finetune.accumulate"
                )
            print(f"note: a batch of {smallest} does not divide over {parts} devices; each computes all of it")

    def compile(
        self, state: State, batch: Pairs | Batch, teacher: PyTree = None
    ) -> Callable[[State, Pairs | Batch], tuple[State, dict[str, Array]]]:
        """Returns `train_step` for this process's parts of host batches; it uses up the state it is given.

        Compiled at once for batches like `batch`, later for other shapes.
        """
        _, parts = sharding.process_share(self.mesh)
        programs = {}

        def run(state, batch):
            pairs = Pairs(batch.latents, batch.text, batch.count)
            place = sharding.batch_sharding(self.mesh, len(batch.latents) * parts)
            pairs = sharding.put_batch(pairs, place, parts)
            shapes = tuple(jax.tree.map(lambda x: (x.shape, x.dtype), tuple(pairs)))
            if shapes not in programs:
                programs[shapes] = build(pairs)
            return programs[shapes](state, pairs, teacher)

        def build(pairs):
            began = time.monotonic()
            program = self.lower(state_shapes, pairs, teacher).compile()
            size = "x".join(map(str, pairs.latents.shape[1:4]))
            seconds = duration(time.monotonic() - began)
            print(f"finetune: train step for latents of {size} compiled in {seconds}", flush=True)
            return program

        state_shapes = jax.tree.map(lambda x: _shape(x.shape, x.dtype, sharding=x.sharding), state)
        first = [_shape((len(x) * parts, *x.shape[1:]), x.dtype) for x in (batch.latents, batch.text, batch.count)]
        programs[tuple((x.shape, x.dtype) for x in first)] = build(Pairs(*first))
        return run

    def lower(self, state: State, batch: Pairs, teacher: PyTree = None) -> jax.stages.Lowered:
        """Returns `train_step` traced with explicit shardings; shapes of state, whole batch and teacher are enough."""
        places = jax.tree.map(lambda x: x.sharding, (state, teacher))
        by_batch = sharding.batch_sharding(self.mesh, len(batch.latents))
        return jax.jit(
            self.train_step,
            in_shardings=(places[0], by_batch, places[1]),
            out_shardings=(places[0], sharding.replicated(self.mesh)),
            donate_argnums=0,
        ).lower(state, batch, teacher)


def fitted_text(prompt: Text, rows: int) -> Text:
    """Returns packed text (see `pack_text`) of this many rows: unused ones are dropped or appended.

    Raises:
        UserError: more rows are in use.
    """
    used = np.flatnonzero(np.asarray(prompt.count[0]))
    if len(used) > rows:
        raise UserError(f"the empty prompt takes {len(used)} rows of text, a batch has {rows}")
    text, count = np.asarray(prompt.text)[:, used], np.asarray(prompt.count)[:, used]
    missing = rows - len(used)
    return Text(np.pad(text, ((0, 0), (0, missing), (0, 0))), np.pad(count, ((0, 0), (0, missing))))


def _cut(x: Array, parts: int, place: NamedSharding) -> Array:
    """[b, ...] -> [parts, b / parts, ...], each part made of rows of every device, so that nothing moves."""
    x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, PartitionSpec(None, *place.spec)))


def _is_matrix_of_block(path: str) -> bool:
    return path.startswith("blocks/") and path.endswith("/kernel")


def _shape(shape: tuple[int, ...], dtype, **options) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, **options)
