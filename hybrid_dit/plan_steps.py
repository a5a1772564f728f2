"""The steps that `configs/plan.py` compiles, from shapes alone, and their FLOPs.

Each is the job's own program, with its shardings.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hybrid_dit import cost, distiller, generation, sample_loading, sampling, sharding
from hybrid_dit.convert.abstract import abstract_dit, abstract_vae
from hybrid_dit.convert.pipeline import load_pipeline_config
from hybrid_dit.data.source import Text
from hybrid_dit.errors import UserError
from hybrid_dit.models.vae import VAEConfig, WanVAE, decode
from hybrid_dit.models.wan import PRESETS, WanConfig
from hybrid_dit.ops.nested import nested_chain
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.pairs import Pairs
from hybrid_dit.surgery_io import specs_from_config
from hybrid_dit.targets import Target
from hybrid_dit.trainer import Trainer

TEXT_TOKENS = 512  # the longest prompt


def sizes(config) -> tuple[WanConfig, tuple[int, int, int, int]]:
    """Returns the DiT's sizes and the latents' (t, y, x, c): of the weights' folder, or of a published model."""
    if config.model.weights:
        wan, vae = load_pipeline_config(config.model.weights)
    elif config.preset in PRESETS:
        wan, vae = PRESETS[config.preset], VAEConfig()
    else:
        raise UserError(f"preset={config.preset!r} is unknown; choose {' or '.join(PRESETS)}, or set model.weights")
    return wan, generation.latent_shape(wan, vae, config.model.frames, config.model.height, config.model.width)


def distill_step(config, wan: WanConfig, shape: tuple[int, ...], target: Target) -> jax.stages.Lowered:
    """Stage 1's step."""
    mesh = sharding.distill_mesh(config.mesh.data, config.mesh.seq, target.devices)
    return distiller.abstract_step(config, wan, shape, TEXT_TOKENS + 1, mesh)


def finetune_step(config, wan: WanConfig, shape: tuple[int, ...], target: Target) -> jax.stages.Lowered:
    """Stage 3's step for the hybrid that the budget's name stands for, 15R4: the first 15 blocks at R = 4."""
    cfg = config.finetune
    attention = planned_attention(config, wan)
    text, count = np.zeros((1, TEXT_TOKENS + 1, wan.text_dim), np.float32), np.zeros((1, TEXT_TOKENS + 1), np.float32)
    empty = Text(text, count)
    mesh = sharding.train_mesh(config.mesh.replicas, config.mesh.seq, target.devices)
    trainer = Trainer(config, wan, attention, 3.0, empty, mesh)
    shapes = shape, text.shape[1:], count.shape[1:]
    batch = Pairs(*(jax.ShapeDtypeStruct((cfg.batch, *sizes), np.float32) for sizes in shapes))
    teacher = trainer.abstract_teacher(abstract_dit(wan)) if cfg.teacher else None
    return trainer.lower(trainer.abstract(abstract_dit(wan, attention)), batch, teacher)


def sample_step(config, wan: WanConfig, shape: tuple[int, ...], target: Target) -> jax.stages.Lowered:
    """One denoising step of configs/sample.py: of the teacher, or of a hybrid as for `finetune_step`."""
    cfg, dtype = config.sample, jnp.dtype(config.model.compute_dtype)
    mesh = sample_loading.sampling_mesh(cfg, target.devices)
    whole, by_video = sharding.replicated(mesh), sample_loading.by_video(mesh, cfg.batch)
    attention = sampled_attention(config, wan)
    velocity = generation.make_velocity(wan, attention, dtype, config.model.attention_backend, mesh)
    sampler = sampling.make_sampler(cfg.sampler, cfg.sample_steps, 3.0)
    params = sample_loading.abstract_params(abstract_dit(wan, attention), mesh, dtype)
    prompts, negative = (
        (_float((n, TEXT_TOKENS + 1, wan.text_dim), whole), _float((n, TEXT_TOKENS + 1), whole)) for n in (cfg.batch, 1)
    )
    context = prompts
    if cfg.guidance != 1:
        velocity = sampling.guided(velocity, cfg.guidance, cfg.interval, cfg.sequential)
        context = prompts, negative
    carry = jax.eval_shape(partial(sampling.start, sampler), _float((cfg.batch, *shape), by_video))
    carry = jax.tree.map(lambda x: _float(x.shape, by_video), carry)
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), cfg.batch))
    i = jax.ShapeDtypeStruct((), jnp.int32)
    return sampling.one_step(velocity, sampler).lower(carry, i, params, context, key, None)


def decode_step(config, wan: WanConfig, shape: tuple[int, ...], target: Target) -> jax.stages.Lowered:
    """Decoding of a batch of configs/sample.py, with the DiT kept beside it."""
    cfg = config.sample
    mesh = sample_loading.sampling_mesh(cfg, target.devices)
    whole, vae = sharding.replicated(mesh), vae_config(config)
    dit = abstract_dit(wan, sampled_attention(config, wan))
    dit = sample_loading.abstract_params(dit, mesh, jnp.dtype(config.model.compute_dtype))
    vae_params = jax.tree.map(lambda x: _float(x.shape, whole), abstract_vae(vae))
    latents = _float((cfg.batch, *shape), sample_loading.by_video(mesh, cfg.batch))
    decode = generation.decoder(vae, cfg.batch, cfg.windows, mesh, jnp.dtype(cfg.vae_dtype))
    step = jax.jit(lambda dit, *rest: decode(*rest), out_shardings=whole, keep_unused=True)
    return step.lower(dit, vae_params, latents)


def sampled_attention(config, wan: WanConfig) -> tuple[AttentionSpec, ...]:
    """Returns the attention of what configs/sample.py samples."""
    return () if config.sample.variant == "teacher" else planned_attention(config, wan)


def vae_config(config) -> VAEConfig:
    """Returns the VAE's sizes: of the weights' folder, or the published ones."""
    return load_pipeline_config(config.model.weights)[1] if config.model.weights else VAEConfig()


def _float(shape: tuple[int, ...], place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)


def planned_attention(config, wan: WanConfig) -> tuple[AttentionSpec, ...]:
    """Returns the attention of a model with the name that the budget has; which blocks are converted costs the same."""
    count, label = cost.parse_name(config.select.budget)
    specs = specs_from_config(config.distill)
    if count > wan.num_layers or label not in specs:
        raise UserError(
            f"select.budget={config.select.budget} must name at most {wan.num_layers} blocks and one of "
            f"distill.rates={','.join(specs)}"
        )
    return (specs[label],) * count + (AttentionSpec(),) * (wan.num_layers - count)


def distill_flops(config, wan: WanConfig, shape: tuple[int, ...]) -> int:
    """FLOPs of stage 1's step: both guidance branches through the teacher; forward and backward of all maps.

    Backward of a map counts as twice its forward, and so do products with the state. Softmax parts are the teacher's
    own (`ops.nested`), except those of rates that don't nest; "stacked" takes q, k, v and attention anew.
    """
    cfg, size, specs = config.distill, cost_shape(wan, shape), specs_from_config(config.distill)
    n, d = size.tokens, size.dim
    keys = {label: math.ceil(n / spec.rate) if spec.kind == "hybrid" else 0 for label, spec in specs.items()}
    rates = [spec.rate for spec in specs.values() if spec.kind == "hybrid"]
    _, alone = nested_chain(wan.grid(shape), rates, cfg.pattern)
    block = sum(3 * (cost.attention_flops(size, spec) - 4 * n * keys[label] * d) for label, spec in specs.items())
    block += sum(4 * n * keys[label] * d for label, spec in specs.items() if spec.rate in alone)
    if cfg.activations == "stacked":
        block += 6 * n * d**2 + 4 * n * n * d
    trained = cfg.batch * (2 if cfg.branches == "both" else 1)
    teacher = cost.model_flops(size, (AttentionSpec(),) * wan.num_layers)
    return 2 * cfg.batch * teacher + trained * wan.num_layers * block


def finetune_flops(config, wan: WanConfig, shape: tuple[int, ...]) -> int:
    """FLOPs of stage 3's step: forward, and a backward pass of twice that; recomputation is not counted."""
    return 3 * config.finetune.batch * cost.model_flops(cost_shape(wan, shape), planned_attention(config, wan))


def sample_flops(config, wan: WanConfig, shape: tuple[int, ...]) -> int:
    """FLOPs of one denoising step with guidance."""
    attention = sampled_attention(config, wan) or (AttentionSpec(),) * wan.num_layers
    forwards = config.sample.batch * (1 if config.sample.guidance == 1 else 2)
    return forwards * cost.model_flops(cost_shape(wan, shape), attention)


def decode_flops(config, wan: WanConfig, shape: tuple[int, ...]) -> int:
    """FLOPs of decoding a batch as XLA counts them for whole videos: without the columns that windows share."""
    vae = vae_config(config)
    latents = jax.ShapeDtypeStruct((config.sample.batch, *shape), jnp.float32)
    return int(jax.jit(partial(decode, WanVAE(vae))).lower(abstract_vae(vae), latents).cost_analysis()["flops"])


def cost_shape(wan: WanConfig, shape: tuple[int, ...]) -> cost.Shape:
    """The sizes that decide FLOPs."""
    tokens = math.prod(wan.grid(shape))
    return cost.Shape(wan.dim, wan.num_heads, wan.ffn_dim, wan.num_layers, tokens, TEXT_TOKENS)


STEPS: dict[str, tuple[Callable[..., jax.stages.Lowered], Callable[..., int]]] = {
    "distill": (distill_step, distill_flops),
    "finetune": (finetune_step, finetune_flops),
    "sample": (sample_step, sample_flops),
    "decode": (decode_step, decode_flops),
}
