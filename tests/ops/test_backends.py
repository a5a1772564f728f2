"""Which backend runs: read off the traced program."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hybrid import ODD, make_point

from hybrid_dit import sharding
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig, WanDiT
from hybrid_dit.ops import backends, context_parallel, feature_maps
from hybrid_dit.ops import spec as ops_spec
from hybrid_dit.ops.hybrid import attention
from hybrid_dit.ops.kernels import gpu_hybrid, tpu_blocks, tpu_hybrid
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

R2 = AttentionSpec("hybrid", 2)


def kernels(spec, backend, dtype=jnp.float32):
    """Whether attention's program has kernels in it."""
    f = partial(attention, spec=spec, grid=ODD[0], backend=backend)
    return "pallas_call" in str(jax.make_jaxpr(f)(*make_point(spec, ODD, dtype)))


def pretend(monkeypatch, platform, kind, count=1):
    """Has `backends` see `count` devices of a kind."""
    device = SimpleNamespace(platform=platform, device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device] * count)
    monkeypatch.setattr(jax, "device_count", lambda: count)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)


def test_auto_is_xla_without_a_tpu_and_tpu_can_be_asked_for():
    assert not kernels(R2, "auto") and not kernels(R2, "xla")
    assert all(kernels(spec, "tpu") for spec in (R2, AttentionSpec("linear"), AttentionSpec()))


@pytest.mark.parametrize("devices, chosen", [(1, "tpu"), (4, "xla")])
def test_auto_on_a_tpu_is_tpu_if_it_is_the_only_one(monkeypatch, devices, chosen):
    pretend(monkeypatch, "tpu", "TPU v5 lite", devices)
    assert backends.choose("auto", R2, 128, jnp.bfloat16) == chosen
    assert backends.choose("auto", R2, 24, jnp.bfloat16) == "xla"
    assert backends.choose("tpu", R2, 128, jnp.bfloat16) == "tpu"


def test_auto_goes_by_the_mesh_inside_shard_map():
    """A program may be compiled for devices that are not here, each of which runs a kernel of its own."""
    seen = []

    def body(x):
        seen.append((backends.choose("auto", R2, 128, jnp.bfloat16), tpu_blocks.default_blocks().queries))
        return x

    def trace(names, axes):
        mesh = jax.sharding.AbstractMesh(
            (2, 2), ("a", "b"), abstract_device=jax.sharding.AbstractDevice("TPU v6 lite", None, "tpu")
        )
        where = jax.sharding.PartitionSpec(names)
        f = jax.shard_map(body, mesh=mesh, in_specs=where, out_specs=where, axis_names=axes, check_vma=False)
        x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, where))
        jax.eval_shape(jax.jit(f), x)

    trace(("a", "b"), {"a", "b"})
    trace("a", {"a"})  # the compiler splits over b
    assert seen == [("tpu", tpu_blocks.BLOCKS["v6e"].queries), ("xla", tpu_blocks.BLOCKS["v5e"].queries)]


@pytest.mark.parametrize(
    "kind, count, chosen",
    [("H100 80GB HBM3", 1, "gpu"), ("H200", 1, "gpu"), ("H200", 2, "xla"), ("GH200", 1, "xla"), ("A100", 1, "xla")],
)
def test_auto_on_a_gpu_is_gpu_where_kernels_are_tuned(monkeypatch, kind, count, chosen):
    pretend(monkeypatch, "gpu", f"NVIDIA {kind}", count)
    assert backends.choose("auto", R2, 128, jnp.bfloat16) == chosen
    assert backends.choose("gpu", R2, 128, jnp.bfloat16) == "gpu"
    for head_dim, dtype in ((24, jnp.bfloat16), (256, jnp.bfloat16), (128, jnp.float32)):
        assert backends.choose("gpu", R2, head_dim, dtype) == "xla"
    assert backends.choose("gpu", AttentionSpec(), 128, jnp.bfloat16) == "xla"


def test_what_kernels_do_not_take_runs_on_xla(monkeypatch):
    assert not kernels(R2, "tpu", jnp.float16)
    # Given: maps of a user, one of them in place of ours
    entry = feature_maps.FEATURE_MAPS["elu"]._replace(apply=lambda params, x, spec: jnp.square(x))
    for name in ("elu", "squares"):
        monkeypatch.setitem(feature_maps.FEATURE_MAPS, name, entry)
        assert not kernels(AttentionSpec("hybrid", 2, feature_map=FeatureMapSpec(name)), "tpu")
    monkeypatch.setattr(ops_spec, "KINDS", (*ops_spec.KINDS, "window"))  # a kind of a user's own
    assert not any(module.fits(AttentionSpec("window"), 64, jnp.bfloat16) for module in (gpu_hybrid, tpu_hybrid))


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(UserError, match="backend 'gpus' is unknown; choose one of auto, xla, tpu, gpu"):
        kernels(R2, "gpus")


def test_a_model_takes_its_backend():
    model = WanConfig(dim=16, num_heads=2, ffn_dim=16, num_layers=1, in_channels=2, text_dim=8, freq_dim=8)
    inputs = np.ones((1, 3, 6, 6, 2), np.float32), np.ones(1, np.float32), np.ones((1, 3, 8), np.float32)
    dits = [WanDiT(model, (R2,), backend=b) for b in ("tpu", "xla")]
    params = jax.eval_shape(dits[1].init, jax.random.key(0), *inputs)
    assert ["pallas_call" in str(jax.make_jaxpr(dit.apply)(params, *inputs)) for dit in dits] == [True, False]


@pytest.mark.parametrize("remat, forwards", [("none", 1), ("block", 2), ("attention", 1)])
def test_how_often_a_step_computes_attention(remat, forwards):
    """Once; once more where blocks are computed anew, unless they keep what attention's backward pass needs."""
    model = WanConfig(dim=128, num_heads=1, ffn_dim=16, num_layers=2, in_channels=2, text_dim=8, freq_dim=8)
    specs = (R2, AttentionSpec())
    inputs = np.ones((2, 3, 6, 6, 2), np.float32), np.ones(2, np.float32), np.ones((2, 3, 8), np.float32)
    split = sharding.context_split(sharding.train_mesh(devices=jax.devices()[:2]))
    params = jax.eval_shape(WanDiT(model, specs).init, jax.random.key(0), *inputs)
    dit = WanDiT(model, specs, jnp.bfloat16, remat, "tpu", split)
    program = str(jax.make_jaxpr(jax.grad(lambda p: dit.apply(p, *inputs).sum()))(params))
    # A branch for each spec, and each with one for TPUs and one, interpreted, for other platforms.
    assert program.count("name=hybrid_outputs") == forwards * len(specs) * 2
    assert program.count("name=hybrid_back_queries") == len(specs) * 2


def test_a_block_computed_anew_runs_the_gpus_softmax_twice_where_heads_do_not_divide(monkeypatch):
    """Three heads on two devices: each takes all keys. The kernel keeps what it returns; once more is the block's."""

    @jax.jit
    def forward_kernel(q, k, v):
        return q + k.mean(axis=1, keepdims=True) * v.mean(axis=1, keepdims=True)

    def forward(*qkv):
        y = forward_kernel(*qkv)
        return y, (*qkv, y)

    def backward(kept, cotangent):
        _, k, v, y = kept
        return cotangent * y, k, v

    stand_in = jax.custom_vjp(lambda *qkv: forward_kernel(*qkv))
    stand_in.defvjp(forward, backward)
    monkeypatch.setattr(context_parallel, "softmax_attention", stand_in)
    monkeypatch.setattr(context_parallel, "fused_on_gpu", lambda q: True)
    model = WanConfig(dim=48, num_heads=3, ffn_dim=16, num_layers=2, in_channels=2, text_dim=8, freq_dim=8)
    inputs = np.ones((1, 3, 8, 8, 2), np.float32), np.ones(1, np.float32), np.ones((1, 3, 8), np.float32)
    split = sharding.context_split(sharding.train_mesh(1, 2, jax.devices()[:2]))
    params = jax.eval_shape(WanDiT(model).init, jax.random.key(0), *inputs)
    dit = WanDiT(model, (), jnp.bfloat16, "block", "xla", split)
    program = jax.jit(jax.grad(lambda p: jnp.square(dit.apply(p, *inputs)).sum())).lower(params).as_text()
    assert program.count("call @forward_kernel") == 2
