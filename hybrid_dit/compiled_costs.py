"""What the TPU compiler expects self-attention to cost at every rate, for rates selected by `select.costs=compiled`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit import cost, hlo, targets
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import SelfAttention, WanConfig
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.rope import rope_table
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.plan_steps import cost_shape
from hybrid_dit.surgery_io import specs_from_config
from hybrid_dit.targets import Target


def estimate(config, wan: WanConfig, shape: tuple[int, ...], target: Target) -> dict:
    """Returns the TPU compiler's cycles for one block's self-attention with its projections, per label, on one device.

    Raises:
        UserError: the target is no TPU, or an attention does not fit on one device.
    """
    if not target.is_tpu:
        raise UserError(f"target={target.name}: costs are estimated by the TPU compiler; name a TPU such as v5e:1x1")
    specs = {"softmax": AttentionSpec(), **specs_from_config(config.distill)}
    size = cost_shape(wan, shape)
    flops = {label: cost.self_attention_flops(size, spec) for label, spec in specs.items()}
    costs = {}
    print(f"self-attention of one block, {size.tokens:,} tokens, one {target.name.split(':')[0]} device, batch 1")
    for label, spec in specs.items():
        lowered = attention_step(wan, shape, spec, jnp.dtype(config.model.compute_dtype), target)
        try:
            compiled = targets.compile_anew(lowered)
        except targets.DoesNotFit as error:
            raise UserError(f"{label} on {target.name}: {error}") from error
        costs[label] = hlo.estimated_cycles(hlo.parse(compiled.as_text()))
        faster = f"{costs['softmax'] / costs[label]:.2f}x (by FLOPs {flops['softmax'] / flops[label]:.2f}x)"
        print(f"  {label:8} {costs[label]:>14,} cycles   {faster}", flush=True)
    return {
        "costs": costs,
        "unit": "cycles",
        "target": target.name,
        "model": config.preset or config.model.weights,
        "tokens": size.tokens,
        "flops": flops,
    }


def attention_step(wan: WanConfig, shape: tuple[int, ...], spec: AttentionSpec, dtype, target: Target):
    """Self-attention of one block with its q, k, v, o projections, lowered for one device of the target."""
    grid = wan.grid(shape)
    place = NamedSharding(Mesh(np.array(target.devices[:1]), ("one",)), PartitionSpec())
    module = SelfAttention(wan, (spec,), grid, dtype)
    rope = rope_table(grid, wan.head_dim)
    x = jax.ShapeDtypeStruct((1, math.prod(grid), wan.dim), dtype)
    phi = jax.eval_shape(lambda key: feature_maps.init(key, wan.num_heads, wan.head_dim, spec.feature_map), KEY)
    params = jax.eval_shape(lambda x, phi: module.init(jax.random.key(0), x, 0, phi, rope), x, phi)["params"]
    inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), (params, x, phi))
    forward = lambda params, x, phi: module.apply({"params": params}, x, 0, phi, rope)  # noqa: E731
    return jax.jit(forward, out_shardings=place).lower(*inputs)


KEY = jax.eval_shape(jax.random.key, 0)
