"""Attention with tokens split over 8 fake devices, in the harness of `test_hybrid.py`; and what its program sends."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_hybrid as harness
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_hybrid import EVEN, ODD, SPARSE, D, make_point

from hybrid_dit import hlo
from hybrid_dit.errors import UserError
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops import spec as ops_spec
from hybrid_dit.ops.context_parallel import Split, attention
from hybrid_dit.ops.shards import Shard
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

UNEVEN = (2, 3, 4), 4, 2, 1  # shards of 3 tokens over 8 devices: S starts elsewhere on each


def split(*tokens):
    """Over a mesh of 2 x 4 devices; the axis that tokens are not split over has videos."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "seq"))
    return Split(mesh, tokens, tuple(name for name in mesh.axis_names if name not in tokens))


@pytest.mark.parametrize(
    "spec, shape, axes",
    [
        (AttentionSpec("hybrid", 2), ODD, ("data", "seq")),  # 45 tokens over 8 devices
        (AttentionSpec("hybrid", 4), UNEVEN, ("data", "seq")),
        (AttentionSpec("hybrid", 4, "lattice", FeatureMapSpec("hedgehog"), "lse"), EVEN, ("seq",)),
        (AttentionSpec("hybrid", 8, feature_map=FeatureMapSpec("elu")), SPARSE, ("seq",)),  # devices without S
        (AttentionSpec("linear", feature_map=FeatureMapSpec("elu")), ODD, ("seq",)),
        (AttentionSpec(), (ODD[0], 1, 2, 4), ("seq",)),  # heads divide
        (AttentionSpec(), ODD, ("seq",)),
    ],
    ids=str,
)
def test_values_and_vjp_match_the_oracle(spec, shape, axes, monkeypatch):
    monkeypatch.setattr(harness, "attention", partial(attention, split=split(*axes)))
    harness.check(spec, shape[0], make_point(spec, shape))


def traffic(spec, grid, batch, heads, backward, split):
    """{kind: traffic} of attention compiled for float32 and rows where their devices are."""
    n = math.prod(grid)
    rows = NamedSharding(split.mesh, PartitionSpec(split.videos or None, split.tokens))
    x = jax.ShapeDtypeStruct((batch, n, heads, D), jnp.float32, sharding=rows)
    phi = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), heads, D, spec.feature_map))
    whole = NamedSharding(split.mesh, PartitionSpec())
    phi = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), phi)
    run = partial(attention, spec=spec, grid=grid, split=split)
    both = lambda g, *args: (lambda y, pull: (y, pull(g)))(*jax.vjp(run, *args))  # noqa: E731
    f, args, places = run, (x, x, x, phi), rows
    if backward:
        f, args, places = both, (x, *args), (rows, (rows, rows, rows, whole))
    text = jax.jit(f, out_shardings=places).lower(*args).compile().as_text()
    return hlo.collectives(hlo.parse(text))[0], 4 * sum(a.size for a in jax.tree.leaves(phi))


@pytest.mark.parametrize("grid, rows", [((2, 4, 16), 4), ((2, 3, 12), 3)])  # S starts anew on each device, or elsewhere
def test_keys_of_s_and_states_are_all_that_travels(grid, rows):
    """Bytes of each whole array, both videos being on every device: those of S's keys, exactly, never of all keys."""
    spec, (b, h) = AttentionSpec("hybrid", 4), (2, 3)
    keys = 2 * 4 * b * 8 * rows * h * D  # k and v, float32
    state = 4 * b * h * 2 * D * (D + 1)  # F = 2 D features; the normaliser is one more column
    forward, _ = traffic(spec, grid, b, h, False, split("data", "seq"))
    assert {kind: t.bytes for kind, t in forward.items()} == {"all-gather": keys, "all-reduce": state}
    both, phi = traffic(spec, grid, b, h, True, split("data", "seq"))
    assert {kind: t.bytes for kind, t in both.items()} == {
        "all-gather": keys,
        "reduce-scatter": keys + keys // 2,  # over two devices, and what is left over the four of the other axis
        "all-reduce": 2 * state + phi,
    }


def test_linear_attention_sends_no_keys_and_softmax_exchanges_heads():
    spec = AttentionSpec("linear", feature_map=FeatureMapSpec("elu"))
    linear, _ = traffic(spec, (2, 4, 8), 2, 4, False, split("seq"))
    assert {kind: t.bytes for kind, t in linear.items()} == {"all-reduce": 4 * 4 * D * (D + 1)}  # one video a device
    softmax, _ = traffic(AttentionSpec(), (2, 4, 8), 2, 4, False, split("seq"))
    assert {kind: t.bytes for kind, t in softmax.items()} == {"all-to-all": 4 * 4 * 16 * 4 * D}  # q, k, v, y of 16 rows


def test_gradients_of_16_bit_keys_are_summed_in_float32():
    """In the program before XLA's passes: on CPU XLA would do so by itself, on a TPU it sums what it is given."""
    shard, grid, spec = Shard(("x",), 8), (1, 4, 8), AttentionSpec("hybrid", 4)
    mesh, rows = Mesh(np.array(jax.devices()), ("x",)), PartitionSpec(None, "x")

    def pulled(k):
        keys, pull = jax.vjp(lambda k: shard.softmax_keys(k, grid, spec), k)
        return pull(keys)[0]

    run = jax.jit(jax.shard_map(pulled, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    k = jax.ShapeDtypeStruct((1, 32, 1, 1), jnp.bfloat16)
    assert run.eval_shape(k).dtype == jnp.bfloat16
    text = run.lower(k).as_text()
    assert re.findall(r"all_gather.*tensor<1x(?:1|8)x1x1x(\w+)>$", text, re.MULTILINE) == ["bf16"]
    assert re.findall(r"\}\) : \(tensor<8x(?:1x)*(\w+)>\) -> tensor<\w+>$", text, re.MULTILINE) == ["f32"]


def test_an_unknown_backend_is_told():
    point = make_point(AttentionSpec("hybrid", 2), ODD)
    with pytest.raises(UserError, match="attention backend 'gpus' is unknown"):
        attention(*point, spec=AttentionSpec("hybrid", 2), grid=ODD[0], split=split("seq"), backend="gpus")


def test_a_kind_of_attention_that_it_does_not_know_is_told(monkeypatch):
    monkeypatch.setattr(ops_spec, "KINDS", (*ops_spec.KINDS, "window"))
    point = make_point(AttentionSpec("hybrid", 2), ODD)
    with pytest.raises(UserError, match="attention of kind 'window' is not written for tokens split over devices"):
        attention(*point, spec=AttentionSpec("window"), grid=ODD[0], split=split("seq"))


@pytest.mark.parametrize(
    "spec, shape, backend",
    [
        (AttentionSpec("hybrid", 2, "lattice", FeatureMapSpec("hedgehog"), "lse"), ODD, "tpu"),  # 45 tokens as 4 x 12
        (AttentionSpec(), (UNEVEN[0], 1, 1, 2), "tpu"),  # heads do not divide
        (AttentionSpec("hybrid", 4), UNEVEN, "gpu"),
        (AttentionSpec("hybrid", 2), ((2, 3, 4), 1, 1, 1), "gpu"),  # alike on all devices: S's keys are left out
    ],
    ids=lambda x: x if isinstance(x, str) else harness.name_of(x),
)
def test_kernels_match_the_oracle(spec, shape, backend, monkeypatch):
    """Interpreted, where S starts elsewhere on each device."""
    monkeypatch.setattr(harness, "attention", partial(attention, split=split("seq"), backend=backend))
    monkeypatch.setattr(harness, "D", 16 if backend == "gpu" else D)  # the narrowest head that the kernels take
    harness.check(spec, shape[0], make_point(spec, shape))
