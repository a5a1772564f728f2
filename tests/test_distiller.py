"""The distillation step on a tiny random DiT: against a naive loop, both ways of keeping activations, every mesh."""

import dataclasses
import math
import re
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pipelines import random_like

from configs import common
from hybrid_dit import distiller, sharding, surgery
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.errors import UserError
from hybrid_dit.models import wan
from hybrid_dit.ops.hybrid import softmax_part
from hybrid_dit.ops.nested import nested_sums

U32 = 2.0**-24
WAN = wan.WanConfig(dim=24, num_heads=2, ffn_dim=48, num_layers=6, in_channels=4, text_dim=8, freq_dim=16)
SHAPE = (3, 4, 8, 4)  # latents; 3 x 2 x 4 = 24 tokens, which 8 devices divide, and 5 below don't
RATE = 1e-3


def make(mesh=None, wan_config=WAN, **values):
    config = common.get_config("distill", "tiny")
    config.distill.update({"rates": ("R2", "R4", "linear"), "learning_rate": RATE, **values})
    mesh = mesh or sharding.distill_mesh(devices=jax.devices()[:1])
    return distiller.from_config(config, wan_config, shift=3.0, mesh=mesh)


@lru_cache
def inputs(shape=SHAPE):
    """The teacher, latents, step number, context, key."""
    rng = np.random.default_rng(1)
    dit = random_like(abstract_dit(WAN), rng)
    text = [(rng.standard_normal((1, 5, 8)).astype(np.float32), np.ones((1, 5), np.float32)) for _ in range(2)]
    x = rng.standard_normal((1, *shape)).astype(np.float32)
    return dit, x, 1, tuple(text), jax.random.key(2)


def compile_fast(function, *args):
    """The same program, compiled in half the time: what LLVM makes of it is not under test."""
    return function.lower(*args).compile(compiler_options={"xla_backend_optimization_level": 0})


def run(d, args, steps=2):
    """Host results of some steps: (maps without padding, latents, metrics of the last), and the padded state."""
    dit, x, first, context, key = args
    state = d.pad(d.init(jax.random.key(0)))
    state = jax.device_put(state, d.state_shardings(state))
    dit = sharding.put(dit, d.dit_shardings(dit))
    x = jax.device_put(x, sharding.replicated(d.mesh))
    args = state, dit, x, first, context, key
    step = compile_fast(distiller.jit_step(d), *args)
    for i in range(first, first + steps):
        state, x, metrics = step(state, dit, x, i, context, key)
    return jax.device_get((d.unpad(state)["maps"], x, metrics)), state


@lru_cache
def reference(loss="value", branches="both", shape=SHAPE):
    return run(make(loss=loss, branches=branches), inputs(shape))[0]


def assert_same(got, expected):
    """Equal to rounding: errors and latents are float32 sums in another order.

    Adam divides a gradient by its size, so where it is all rounding an update may turn: 2 steps of RATE each, both
    ways, on a few numbers; everywhere else maps agree to a share of an update.
    """
    for a, b in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(expected[1:])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    off = np.concatenate([np.abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (got[0], expected[0])))])
    assert off.max() <= 4 * RATE and (off > 0.02 * RATE).mean() < 1e-3


@pytest.mark.parametrize("loss", surgery.LOSSES)
def test_a_step_equals_training_every_block_and_rate_alone(loss):
    d, (dit, x, i, context, key) = make(loss=loss), inputs()
    state = d.init(jax.random.key(0))
    new, x_next, metrics = compile_fast(jax.jit(d.step), state, dit, x, i, context, key)(state, dit, x, i, context, key)

    # The teacher, branch by branch, and guidance by hand.
    model = wan.WanDiT(WAN)
    t = jnp.asarray(d.sampler.schedule.timesteps)[i][None]
    apply = jax.jit(lambda *inputs: model.apply({"params": dit}, *inputs, mutable=["intermediates"]))
    runs = [apply(x, t, *c) for c in context]
    (cond, cond_vars), (uncond, uncond_vars) = runs
    _, expected = d.sampler.step((), x, uncond + 5.0 * (cond - uncond), i, key)
    # Guidance multiplies float32 rounding of the two branches (6e-8 of their size) by 5 + 4; a factor 10 on top.
    np.testing.assert_allclose(x_next, expected, atol=1e-5 * float(jnp.abs(expected).max()))

    captured = [wan.captured_attention(v) for v in (cond_vars, uncond_vars)]
    grid = WAN.grid(x.shape)
    tx = optax.adamw(RATE)
    for block in (5,):
        q, k, v, y = (jnp.concatenate([c[n][block] for c in captured]) for n in range(4))
        for label, spec in d.specs.items():
            maps = jax.tree.map(lambda a, b=block: a[b], state["maps"][label])

            def alone(phi, spec=spec, q=q, k=k, v=v, y=y):
                sums = softmax_part(q, k, v, spec, grid)
                return surgery.rate_loss(phi, (q, k, v), y, sums, spec, grid, loss, jax.random.fold_in(key, i))

            (value, error), grads = jax.jit(jax.value_and_grad(alone, has_aux=True))(maps)
            updates, _ = tx.update(grads, tx.init(maps), maps)
            np.testing.assert_allclose(metrics["error"][label][block], error, rtol=1e-4)
            np.testing.assert_allclose(metrics["loss"][label][block], value, rtol=1e-4)
            # Adam's first update is the sign of the gradient times the rate: compare where the sign is not rounding.
            trained = jax.tree.map(lambda a, b=block: a[b], new["maps"][label])
            wanted = optax.apply_updates(maps, updates)
            for got, want, g in zip(*map(jax.tree.leaves, (trained, wanted, grads))):
                clear = np.abs(g) > 1e-4 * np.abs(g).max()
                np.testing.assert_allclose(np.asarray(got)[clear], np.asarray(want)[clear], atol=2e-5)


def test_block_inputs_kept_give_the_same_maps():
    choice = {"loss": "attention", "branches": "cond"}
    got, _ = run(make(activations="stacked", **choice), inputs())
    assert_same(got, reference(**choice))


@pytest.mark.parametrize("activations, ways", [("stacked", (1, 2)), ("inside", (2, 2))], ids=str)
def test_eight_devices_give_the_same_maps(activations, ways):
    """4 x 1 x 2: six blocks are padded to eight; 2 x 2 x 2: both branches, and tokens, on devices of their own."""
    shape = (1, 2, 10, 4)  # 5 tokens, which no axis divides
    d = make(sharding.distill_mesh(*ways), activations=activations)
    got, state = run(d, inputs(shape))
    assert_same(got, reference(shape=shape))
    leaves = jax.tree.leaves(state)
    if activations == "stacked":
        assert {x.sharding.spec[0] for x in leaves} == {"block"}
        assert d.padded_blocks == 8 and not any(np.asarray(x)[6:].any() for x in leaves)  # never trained
    else:
        split = [x for x in leaves if not x.is_fully_replicated]
        assert len(split) > len(leaves) / 2 and all(x.shape[0] == 6 for x in leaves)


def test_bytes_kept_are_those_of_the_stacked_inputs():
    """Counted in the program: the only array with a block's tokens for every block is as large as reported."""
    shape, tokens = SHAPE, 24
    assert make().kept_bytes(shape, 1) == 0
    one = make(activations="stacked")
    assert one.kept_bytes(shape, 1) == 6 * 2 * tokens * WAN.dim * 4
    assert make(activations="stacked", branches="cond").kept_bytes(shape, 1) == 6 * tokens * WAN.dim * 4
    eight = make(sharding.distill_mesh(2, 2), activations="stacked")
    assert eight.kept_bytes(shape, 1) == 3 * 1 * 12 * WAN.dim * 4  # 3 blocks, 1 branch, half of the tokens


def test_teacher_attention_is_taken_once_when_gradients_are_inside():
    """FLOPs of the program: N² work is that of one softmax, not of one per rate."""
    shape = (4, 16, 16, 4)  # 256 tokens
    args = inputs(shape)

    def flops(*rates):
        d = make(rates=rates)
        return jax.jit(d.step).lower(d.init(jax.random.key(0)), *args).cost_analysis()["flops"]

    n = math.prod(WAN.grid(args[1].shape))
    linear = flops("linear")
    phi = flops("linear", "R1000") - linear  # what one more rate costs apart from its softmax: one token is in S
    # A loop's body is counted once, here with two branches. A softmax for each rate would add N²d (1/2 + 1/4 + 1/8).
    extra = 2 * 4 * n * n * WAN.dim * (7 / 8)
    assert abs(flops("linear", "R2", "R4", "R8") - linear - 3 * phi) < 0.2 * extra


def test_the_teacher_alone_denoises_as_in_a_step():
    dit, x, first, context, key = inputs()
    d = make()
    denoise = compile_fast(jax.jit(d.denoise), dit, x, first, context, key)
    for i in (first, first + 1):
        x = denoise(dit, x, i, context, key)
    expected = reference()[1]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_measure_gives_each_videos_error():
    d, (dit, x, i, context, key) = make(), inputs()
    maps = d.init(jax.random.key(0))["maps"]
    halved = jax.tree.map(lambda a: a / 2, maps)
    x_next, errors = jax.jit(d.measure)({"fresh": maps, "halved": halved}, dit, x, i, context, key)
    _, expected, _ = jax.jit(d.step)(d.init(jax.random.key(0)), dit, x, i, context, key)
    np.testing.assert_allclose(x_next, expected, rtol=1e-5, atol=1e-5)
    t, grid = jnp.asarray(d.sampler.schedule.timesteps)[i][None], WAN.grid(x.shape)

    @jax.jit
    def alone(trees, c):
        _, variables = wan.WanDiT(WAN).apply({"params": dit}, x, t, *c, mutable=["intermediates"])
        q, k, v, y = (a[3] for a in wan.captured_attention(variables))
        _, sums = nested_sums(q, k, v, d.specs, grid)

        def error(phi, label):
            phi = jax.tree.map(lambda a: a[3], phi)
            return surgery.rate_loss(phi, (q, k, v), y, sums[label], d.specs[label], grid, "value", key)[1]

        return {name: {label: error(tree[label], label) for label in d.specs} for name, tree in trees.items()}

    for video, c in enumerate(context):
        for name, of_maps in alone({"fresh": maps, "halved": halved}, c).items():
            for label, error in of_maps.items():
                assert errors[name][label].shape == (6, 2)
                np.testing.assert_allclose(errors[name][label][3, video], error, rtol=1e-4)


@pytest.mark.parametrize("activations", distiller.ACTIVATIONS)
def test_the_step_of_a_config_can_be_lowered_without_arrays(activations):
    config = common.get_config("distill", "wan_1_3b")
    config.distill.activations = activations
    sizes = wan.WanConfig(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30)
    lowered = distiller.abstract_step(config, sizes, (21, 60, 104, 16), 512, sharding.distill_mesh())
    state = jax.tree.leaves(lowered.args_info[0][0])
    assert {x.shape[0] for x in state} == {32 if activations == "stacked" else 30}
    assert all(x.donated for x in state)


def test_a_backend_takes_all_that_trains():
    """Fused kernels in the traced step: softmax sums of each piece; for each rate φ of keys and of queries, the
    read-out, backward through activations and hidden units of both maps, and sums over tokens for the state, its
    gradient, and two matrices of both maps."""
    wide = dataclasses.replace(WAN, dim=32)  # heads of 16, the narrowest that the kernels take
    args = inputs()[1:]
    dit = abstract_dit(wide)

    def counts(backend):
        config = common.get_config("distill", "tiny")
        config.model.attention_backend = backend
        config.distill.rates = ("R2", "R4", "linear")
        mesh = sharding.distill_mesh(devices=jax.devices()[:1])
        d = distiller.from_config(config, wide, 3.0, mesh)
        text = str(jax.make_jaxpr(d.step)(d.abstract_state(), dit, *args))
        names = ("softmax", "features", "read", "pre_activations_backward", "hidden_backward", "products")
        return [len(re.findall(rf"name=hybrid_{name}\s", text)) for name in names]

    assert counts("gpu") == [2, 6, 3, 6, 6, 18] and not any(counts("auto"))


def test_unknown_choices_are_named():
    with pytest.raises(UserError, match="distill.activations='kept' is unknown; choose one of inside, stacked"):
        make(activations="kept")
    with pytest.raises(UserError, match="distill.branches='none'"):
        make(branches="none")
    with pytest.raises(UserError, match="axes block, data, seq"):
        make(sharding.data_mesh())
