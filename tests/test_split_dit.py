"""The DiT on a mesh against the DiT on one device."""

import jax
import jax.numpy as jnp
import numpy as np
from pipelines import random_like

from hybrid_dit import sharding
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.models.wan import WanConfig, WanDiT
from hybrid_dit.ops.spec import from_label
from hybrid_dit.split_dit import SplitDiT

# Kernels are split 4 ways; 3 x 3 x 5 = 45 tokens, which two devices don't divide.
WAN = WanConfig(dim=32, num_heads=2, ffn_dim=64, num_layers=4, in_channels=4, text_dim=8, freq_dim=16)
SHAPE = (3, 6, 10, 4)


def inputs():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    text = rng.standard_normal((2, 5, WAN.text_dim)).astype(np.float32)
    return x, np.float32([900, 500]), (text, np.float32([[1, 1, 1, 0, 9], [1, 0, 0, 0, 11]]))


def test_equals_one_device():
    attention = tuple(from_label(label) for label in ("R2", "softmax", "linear", "R2"))
    params = random_like(abstract_dit(WAN, attention), np.random.default_rng(0))
    x, t, context = inputs()
    expected = jax.jit(WanDiT(WAN, attention).apply)({"params": params}, x, t, *context)
    mesh = sharding.distill_mesh(2, 2, jax.devices()[:4])
    rules = sharding.over_all_axes(mesh, sharding.DIT_RULES)
    placed = sharding.put(params, sharding.param_shardings(mesh, params, rules))
    assert placed["blocks"]["ffn_0"]["kernel"].addressable_shards[0].data.shape == (4, WAN.dim // 4, WAN.ffn_dim)
    velocity = jax.jit(SplitDiT(WAN, attention, jnp.float32, mesh).velocity).lower(placed, x, t, context).compile()
    actual = velocity(placed, x, t, context)
    # Both in float32, sums in another order: 1e-6 for one layer's rounding, ten times that for four blocks.
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)
    assert "all-gather" in velocity.as_text() and "all-reduce" in velocity.as_text()  # parameters, keys; states
