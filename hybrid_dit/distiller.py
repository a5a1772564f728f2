"""One step of stage 1: the teacher denoises, and every block trains its feature maps of all rates on what it computed.

Blocks are independent of each other, so there are two ways to run them:

* "inside": a block trains within the scan over blocks, right after the teacher ran it. Its softmax sums (`ops.nested`)
  are the teacher's own attention, nothing is kept, and the step costs little more than the teacher. All devices work on
  the same block, with tokens and videos split over them.
* "stacked": the teacher runs first and the inputs of all blocks are kept; then each group of devices trains blocks of
  its own, from q, k, v computed anew. The optimiser of a block lives where the block trains.

Both give the same feature maps to rounding.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit import surgery
from hybrid_dit.array_typing import PyTree
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanBlock, WanConfig, WanEmbedding, WanHead
from hybrid_dit.ops.nested import nested_sums
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.placement import Placement
from hybrid_dit.sampling import Sampler, make_sampler
from hybrid_dit.sharding import AXIS, BLOCK, DIT_RULES, SEQ, over_all_axes, padded, param_shardings, replicated, ways
from hybrid_dit.surgery_io import specs_from_config

State = dict[str, Any]  # {"maps": {label: feature maps [B, ...]}, "opt": AdamW's state [B, ...]}

ACTIVATIONS = ("inside", "stacked")
BRANCHES = ("both", "cond", "uncond")


@dataclasses.dataclass(frozen=True, eq=False)
class Distiller:
    """The pure functions of stage 1 for one teacher on one mesh.

    Attributes:
        wan: sizes of the teacher.
        specs: label -> attention to distil to.
        sampler: of the teacher's trajectories (the paper: 50 Euler-ancestral steps).
        guidance: classifier-free guidance scale of the trajectories.
        loss: "value" or "attention".
        learning_rate: of AdamW.
        dtype: of the teacher's activations.
        mesh: from `sharding.distill_mesh`.
        activations: "inside" or "stacked", see the module.
        branches: of guidance, that are training data: "both", "cond" or "uncond".
        backend: of the attention that trains, a name of `ops.backends.BACKENDS`.
    """

    wan: WanConfig
    specs: Mapping[str, AttentionSpec]
    sampler: Sampler
    guidance: float
    loss: str
    learning_rate: float
    dtype: str
    mesh: Mesh
    activations: str = "inside"
    branches: str = "both"
    backend: str = "auto"

    def __post_init__(self):
        for name, allowed in (("loss", surgery.LOSSES), ("activations", ACTIVATIONS), ("branches", BRANCHES)):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"distill.{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}"
                )
        if self.mesh.axis_names != (BLOCK, AXIS, SEQ):
            raise UserError(f"distillation needs a mesh with axes block, data, seq; got {self.mesh.axis_names}")

    # State

    def init(self, key: jax.Array) -> State:
        """Returns fresh maps and optimiser states, blocks stacked in front of every leaf; not padded."""
        keys = jax.random.split(key, len(self.specs))
        maps = {s: surgery.init_maps(k, self.wan, spec) for k, (s, spec) in zip(keys, self.specs.items())}
        return {"maps": maps, "opt": jax.vmap(self._tx.init)(maps)}

    def abstract_state(self) -> State:
        """Returns the shapes of the padded state."""
        return jax.eval_shape(lambda key: self.pad(self.init(key)), jax.random.key(0))

    @property
    def padded_blocks(self) -> int:
        """Number of blocks in the state on the devices: a multiple of the block axis if blocks are split over it."""
        return padded(self.wan.num_layers, self.mesh.shape[BLOCK] if self.activations == "stacked" else 1)

    def pad(self, tree: PyTree) -> PyTree:
        """Appends blocks of zeros, which never train, to the leading axis of every leaf."""
        missing = self.padded_blocks - self.wan.num_layers
        return jax.tree.map(lambda x: jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))), tree) if missing else tree

    def unpad(self, tree: PyTree) -> PyTree:
        """Inverse of `pad`."""
        return jax.tree.map(lambda x: x[: self.wan.num_layers], tree)

    def state_shardings(self, state: PyTree) -> PyTree:
        """Where the padded leaves [B, ...] live: "stacked": split by blocks; "inside": spread."""
        if self.activations == "inside":
            return self.spread_shardings(state)
        return jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec(BLOCK)), state)

    def spread_shardings(self, state: PyTree) -> PyTree:
        """Splits leaves [B, ...] by their last axis over all devices, where that divides."""

        def choose(leaf):
            fits = leaf.ndim > 1 and leaf.shape[-1] % self.mesh.size == 0
            spec = PartitionSpec(*(None,) * (leaf.ndim - 1), self.mesh.axis_names) if fits else PartitionSpec()
            return NamedSharding(self.mesh, spec)

        return jax.tree.map(choose, state)

    def dit_shardings(self, dit: PyTree) -> PyTree:
        """Where the teacher lives: its matrices are split over all devices."""
        return param_shardings(self.mesh, dit, over_all_axes(self.mesh, DIT_RULES))

    def kept_bytes(self, latent_shape: tuple[int, ...], batch: int) -> int:
        """Returns the bytes of activations that a device keeps from the teacher's forward for training."""
        if self.activations == "inside":
            return 0
        rows, tokens = self._rows(batch), math.prod(self.wan.grid(latent_shape))
        rows = rows.stop - rows.start
        videos = rows // ways(self.mesh, self._place.data(rows))
        tokens = padded(tokens, ways(self.mesh, (BLOCK, SEQ))) // self.mesh.shape[SEQ]
        blocks = self.padded_blocks // self.mesh.shape[BLOCK]
        return blocks * videos * tokens * self.wan.dim * jnp.dtype(self.dtype).itemsize

    # The step

    def step(self, state: State, dit, x, i, context, key) -> tuple[State, jax.Array, dict[str, dict[str, jax.Array]]]:
        """One denoising step of the teacher and one training step of every block and rate.

        Args:
            state: maps and optimiser, padded.
            dit: the teacher's parameters.
            x: latents [b, t, y, x, c] at noise level i of the sampler's schedule.
            i: step number.
            context: (prompts' context, negative context), see `generation.text_context`.
            key: random key of the trajectory.

        Returns:
            (state, latents at level i + 1, {"loss": {label: [B]}, "error": {label: relative L1 [B]}}, both before the
            update).
        """
        train = partial(self._train_block, grid=self.wan.grid(x.shape), key=jax.random.fold_in(key, i))
        run = self._inside if self.activations == "inside" else self._stacked
        velocity, state, metrics = run(state, dit, x, i, context, train)
        return state, self._advance(x, velocity, i, key), metrics

    def denoise(self, dit, x, i, context, key) -> jax.Array:
        """The teacher's part of `step` alone: latents at level i + 1."""
        attend = self._softmax(self.wan.grid(x.shape))

        def body(tokens, xs, conditions):
            return self._block(xs[0], tokens, conditions, attend)[0], ()

        velocity, _, _ = self._teacher(dit, x, i, context, body, ())
        return self._advance(x, velocity, i, key)

    def measure(self, candidates, dit, x, i, context, key) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
        """Errors of several trees of maps without training: {name: {label: relative L1 of every video [B, 2b]}}.

        Args as for `step`; candidates: {name: maps, not padded}. Videos are those of the prompts, then the same
        prompts' unconditional branch.
        """
        grid = self.wan.grid(x.shape)

        def body(tokens, xs, conditions):
            params, candidates = xs
            tokens, (*qkv, teacher, sums) = self._block(params, tokens, conditions, self._nested(grid))
            errors = {
                name: surgery.video_errors(maps, tuple(qkv), teacher, sums, self.specs, grid)
                for name, maps in candidates.items()
            }
            return tokens, errors

        velocity, errors, _ = self._teacher(dit, x, i, context, body, candidates)
        return self._advance(x, velocity, i, key), errors

    def _inside(self, state, dit, x, i, context, train):
        rows, grid = self._rows(len(x)), self.wan.grid(x.shape)

        def body(tokens, xs, conditions):
            params, state = xs
            tokens, kept = self._block(params, tokens, conditions, self._nested(grid))
            state, metrics = train(state, jax.tree.map(lambda a: a[rows] if a.ndim else a, kept))
            return tokens, (state, metrics)

        velocity, (state, metrics), _ = self._teacher(dit, x, i, context, body, state)
        return velocity, state, metrics

    def _stacked(self, state, dit, x, i, context, train):
        rows, grid = self._rows(len(x)), self.wan.grid(x.shape)
        groups = self.mesh.shape[BLOCK]
        attend = self._softmax(grid)

        def body(tokens, xs, conditions):
            return self._block(xs[0], tokens, conditions, attend)[0], tokens[rows]

        velocity, inputs, (*conditions, rope) = self._teacher(dit, x, i, context, body, ())
        conditions = (*jax.tree.map(lambda a: a[rows], conditions), rope)
        nested = self._nested(grid, (SEQ,))

        def one(params, tokens, real, state):
            _, kept = self._block(params, self._place.split(tokens, (SEQ,)), conditions, nested, (SEQ,))
            new, metrics = train(state, kept)
            return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, state), metrics

        # [B] -> [B / groups, groups]: one block after another on each group of devices, all groups at once.
        def arrange(a):
            return a.reshape(groups, -1, *a.shape[1:]).swapaxes(0, 1)

        def arrange_back(a):
            return self._place.by_block(a.swapaxes(0, 1).reshape(-1, *a.shape[2:]))

        params, inputs = self.pad((dit["blocks"], inputs))
        real = jnp.arange(self.padded_blocks) < self.wan.num_layers
        xs = jax.tree.map(arrange, (params, *jax.tree.map(self._place.by_block, (inputs, real, state))))

        def one_per_group(_, xs):
            params = jax.tree.map_with_path(self._gather, xs[0])
            return None, jax.vmap(one, spmd_axis_name=BLOCK)(params, *xs[1:])

        _, out = jax.lax.scan(one_per_group, None, xs)
        state, metrics = jax.tree.map(arrange_back, out)
        return velocity, state, self.unpad(metrics)

    def _train_block(self, state, kept, *, grid, key):
        """One block: loss of every rate, gradient, AdamW. `kept` is what `_nested` returns beside the output."""
        *qkv, teacher, sums = kept
        metrics, grads = {"loss": {}, "error": {}}, {}
        for label, spec in self.specs.items():

            def loss(phi, label=label, spec=spec, qkv=tuple(qkv)):
                phi = jax.tree.map(self._place.whole, phi)
                return surgery.rate_loss(phi, qkv, teacher, sums[label], spec, grid, self.loss, key, self.backend)

            of_rate = jax.value_and_grad(loss, has_aux=True)(state["maps"][label])
            # The next rate waits for this one's gradient, so that one rate's activations are in memory at a time (where
            # the compiler keeps barriers until it has put the program in order: not on CPUs).
            qkv, of_rate = jax.lax.optimization_barrier((qkv, of_rate))
            (metrics["loss"][label], metrics["error"][label]), grads[label] = of_rate
        updates, opt = self._tx.update(grads, state["opt"], state["maps"])
        return {"maps": optax.apply_updates(state["maps"], updates), "opt": opt}, metrics

    # The teacher

    def _teacher(self, dit, x, i, context, body, xs):
        """Runs both branches through the DiT; body(tokens, (a block's parameters, its part of xs), conditions).

        Returns:
            (velocity with guidance [b, t, y, x, c], what `body` returns beside tokens, stacked over blocks, what every
            block gets beside its tokens).
        """
        both = jax.tree.map(lambda c, u: jnp.concatenate([c, jnp.broadcast_to(u, c.shape)]), *context)
        t = jnp.broadcast_to(jnp.asarray(self.sampler.schedule.timesteps)[i], (2 * len(x),))
        dtype = jnp.dtype(self.dtype)
        ends = {name: jax.tree.map(self._place.whole, part) for name, part in dit.items() if name != "blocks"}
        embed = WanEmbedding(self.wan, dtype)
        tokens, time, (*conditions, rope) = embed.apply({"params": ends}, jnp.concatenate([x, x]), t, *both)
        # Padded once: an array whose tokens the devices don't divide ends up whole on all of them.
        n = tokens.shape[1]
        tokens = self._place.split(self._place.pad(tokens, 1, (BLOCK, SEQ)), (BLOCK, SEQ))
        conditions = (*conditions, jax.tree.map(lambda a: self._place.pad(a, 0, (BLOCK, SEQ)), rope))
        tokens, out = jax.lax.scan(partial(body, conditions=conditions), tokens, (dit["blocks"], xs))
        velocity = WanHead(self.wan, dtype).apply({"params": ends}, tokens[:, :n], time, self.wan.grid(x.shape))
        cond, uncond = jnp.split(velocity, 2)
        return uncond + self.guidance * (cond - uncond), out, conditions

    def _block(self, params, tokens, conditions, attend, axes=(BLOCK, SEQ)):
        """Returns (tokens after the block, what `attend` returns beside the attention's output)."""
        params = jax.tree.map_with_path(self._gather, params)
        block = WanBlock(self.wan, (), (0, 0, 0), jnp.dtype(self.dtype), attend)
        (out, _), variables = block.apply({"params": params}, tokens, 0, {}, *conditions, mutable=["intermediates"])
        return self._place.split(out, axes), variables["intermediates"]["self_attn"]["attention"]

    def _gather(self, path, leaf):
        """A block's parameter whole on every device; matrices in the dtype they are used in, half the traffic."""
        return self._place.whole(leaf.astype(self.dtype) if path[-1].key == "kernel" else leaf)

    def _softmax(self, grid):
        """The teacher's attention for `_block`, which keeps nothing."""
        sums_of = partial(nested_sums, specs={}, grid=grid, backend=self.backend)
        run = self._place.over_queries(lambda q, k, v: sums_of(q, k, v)[0], (BLOCK, SEQ), math.prod(grid))
        return lambda q, k, v: (run(q, k, v), ())

    def _nested(self, grid, axes=(BLOCK, SEQ)):
        """Attention for `_block` that keeps q, k, v, its output and the softmax sums of all rates."""
        hybrid = {label: spec for label, spec in self.specs.items() if spec.kind == "hybrid"}
        sums_of = partial(nested_sums, specs=hybrid, grid=grid, backend=self.backend)
        run = self._place.over_queries(sums_of, axes, math.prod(grid))

        def attend(q, k, v):
            q, k, v = (self._place.split(x, axes) for x in (q, k, v))
            y, sums = run(q, k, v)
            zero = jnp.zeros(())
            return y, (q, k, v, y, {label: sums.get(label, (zero, zero)) for label in self.specs})

        return attend

    def _advance(self, x, velocity, i, key):
        return self.sampler.step((), x, velocity, i, key)[1]

    def _rows(self, batch: int) -> slice:
        """Rows of the doubled batch that train."""
        return {"both": slice(0, 2 * batch), "cond": slice(0, batch), "uncond": slice(batch, 2 * batch)}[self.branches]

    @cached_property
    def _place(self) -> Placement:
        return Placement(self.mesh)

    @cached_property
    def _tx(self) -> optax.GradientTransformation:
        return optax.adamw(self.learning_rate)


def abstract_step(
    config, wan: WanConfig, latent_shape: tuple[int, int, int, int], text_tokens: int, mesh: Mesh
) -> jax.stages.Lowered:
    """Returns the training step of a config lowered for a mesh, whose devices need not exist.

    Args:
        config: sections `model` and `distill`.
        wan: sizes of the teacher.
        latent_shape: (t, y, x, c) of one video.
        text_tokens: rows of text per prompt.
        mesh: from `sharding.distill_mesh`; its devices may be those of a topology description.
    """
    distiller = from_config(config, wan, shift=3.0, mesh=mesh)
    batch = config.distill.batch

    def text(count):
        shapes = (count, text_tokens, wan.text_dim), (count, text_tokens)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    x = jax.ShapeDtypeStruct((batch, *latent_shape), jnp.float32)
    state = distiller.abstract_state()
    return jit_step(distiller).lower(
        _placed(state, distiller.state_shardings(state)),
        _placed(abstract_dit(wan), distiller.dit_shardings(abstract_dit(wan))),
        x,
        jax.ShapeDtypeStruct((), jnp.int32),
        (text(batch), text(1)),
        jax.eval_shape(lambda: jax.random.key(0)),
    )


def from_config(config, wan: WanConfig, shift: float, mesh: Mesh) -> Distiller:
    """Returns the distiller of a config's sections `model` and `distill`; `shift` is the pipeline's."""
    cfg = config.distill
    return Distiller(
        wan=wan,
        specs=specs_from_config(cfg),
        sampler=make_sampler("euler_ancestral", num_steps=cfg.sample_steps, shift=shift),
        guidance=cfg.guidance,
        loss=cfg.loss,
        learning_rate=cfg.learning_rate,
        dtype=config.model.compute_dtype,
        mesh=mesh,
        activations=cfg.activations,
        branches=cfg.branches,
        backend=config.model.attention_backend,
    )


def jit_step(distiller: Distiller):
    """Returns `distiller.step` jitted with explicit shardings; it uses up the state it is given.

    Latents, text and metrics are whole on every device: what is costly, the tokens in the model, is split inside.
    """
    state = distiller.abstract_state()
    states, dit = distiller.state_shardings(state), distiller.dit_shardings(abstract_dit(distiller.wan))
    whole = replicated(distiller.mesh)
    return jax.jit(
        distiller.step,
        in_shardings=(states, dit, whole, whole, whole, whole),
        out_shardings=(states, whole, whole),
        donate_argnums=0,
    )


def _placed(tree: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
