"""Compiles the step of another job for devices that need not be here, and says per device what it takes.

The program is the job's own, with its shardings; only shapes go in. What is read from it: argument and temporary bytes
(XLA's buffer assignment, with the sum of both as the bound), collectives (from its text, loops by their trip count),
and compile time. FLOPs are those of `hybrid_dit.cost`, since XLA counts loop bodies once.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit import cost, distiller, generation, hlo, sample_loading, sampling, sharding, targets
from hybrid_dit.atomic import write_json
from hybrid_dit.convert.abstract import abstract_dit, abstract_vae
from hybrid_dit.convert.pipeline import load_pipeline_config
from hybrid_dit.data.source import Text
from hybrid_dit.errors import UserError
from hybrid_dit.models.vae import VAEConfig, WanVAE, decode
from hybrid_dit.models.wan import PRESETS, SelfAttention, WanConfig
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.nested import nested_chain
from hybrid_dit.ops.rope import rope_table
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.pairs import Pairs
from hybrid_dit.surgery_io import specs_from_config
from hybrid_dit.targets import Target
from hybrid_dit.trainer import Trainer

TEXT_TOKENS = 512  # the longest prompt
LARGEST = 10  # collectives that the JSON file lists with the operation they come from
GIB = 2**30


def run(config, workdir: Path) -> int:
    """Prints the plan and writes it to `plan/NAME.json`; returns 1 if the step does not fit, else 0.

    Raises:
        UserError: an unknown job, target or model, or no libtpu.
    """
    if config.job not in (*STEPS, "select"):
        raise UserError(f"job={config.job!r} can't be planned; choose one of {', '.join(STEPS)}, select")
    target = targets.parse(config.target, config.slices)
    if config.memory_gib:
        target = dataclasses.replace(target, memory=int(config.memory_gib * GIB))
    wan, shape = sizes(config)
    name = f"{config.job}_{config.preset or 'weights'}_{target.name.replace(':', '_')}"
    file = workdir / "plan" / f"{name}{f'_slices{config.slices}' if config.slices > 1 else ''}.json"
    if config.job == "select":
        report, fits = estimate(config, wan, shape, target), True
    else:
        report = plan(config, wan, shape, target)
        fits = report["fits"]
        print(table(report))
        if not fits:
            print(f"DOES NOT FIT. {advice(config, report)}")
    write_json(file, report)
    print(f"plan: {file}")
    return 0 if fits else 1


def sizes(config) -> tuple[WanConfig, tuple[int, int, int, int]]:
    """Returns the DiT's sizes and the latents' (t, y, x, c): of the weights' folder, or of a published model."""
    if config.model.weights:
        wan, vae = load_pipeline_config(config.model.weights)
    elif config.preset in PRESETS:
        wan, vae = PRESETS[config.preset], VAEConfig()
    else:
        raise UserError(f"preset={config.preset!r} is unknown; choose {' or '.join(PRESETS)}, or set model.weights")
    return wan, generation.latent_shape(wan, vae, config.model.frames, config.model.height, config.model.width)


def plan(config, wan: WanConfig, shape: tuple[int, ...], target: Target) -> dict:
    """Compiles the step and returns the report that is written as JSON."""
    lower, flops = STEPS[config.job]
    report = {
        "job": config.job,
        "model": config.preset or config.model.weights,
        "target": target.name,
        "slices": config.slices,
        "devices": len(target.devices),
        "tokens": math.prod(wan.grid(shape)),
        "memory_bytes": target.memory,
        "flops_per_device": flops(config, wan, shape) / len(target.devices),
    }
    began = time.monotonic()
    lowered = lower(config, wan, shape, target)
    report["trace_seconds"] = round(time.monotonic() - began, 1)
    began = time.monotonic()
    try:
        with no_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = targets.needed_bytes(str(error))
        if needed is None:
            raise
        # The compiler stops here: there is no program to read anything else from.
        return report | {"needed_bytes": needed[0], "memory_bytes": target.memory or needed[1], "fits": False}
    report["compile_seconds"] = round(time.monotonic() - began, 1)
    memory = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text())
    traffic, unknown = hlo.collectives(program)
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return report | {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "needed_bytes": needed,
        "fits": target.memory is None or needed <= target.memory,
        "collectives": {kind: dataclasses.asdict(t) for kind, t in traffic.items()},
        "largest_collectives": [
            {"kind": kind, "from": origin, **dataclasses.asdict(t)}
            for (kind, origin), t in list(hlo.collectives_by_origin(program).items())[:LARGEST]
        ],
        "collectives_in_loops_of_unknown_length": unknown,
        "compiler_cycles": hlo.estimated_cycles(program),
    }


@contextlib.contextmanager
def no_cache():
    """Programs from the compilation cache would have no compile time."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


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


def table(report: dict) -> str:
    """Returns the report as lines for people."""
    gib = lambda key: f"{report[key] / GIB:8.2f} GiB"  # noqa: E731
    memory = report["memory_bytes"]
    lines = [
        f"{report['job']} of {report['model']}, {report['tokens']:,} tokens, on {report['target']}: "
        f"{report['devices']} devices; per device:"
    ]
    if "argument_bytes" in report:
        lines += [f"  arguments        {gib('argument_bytes')}", f"  temporaries      {gib('temporary_bytes')}"]
    share = f" of {memory / GIB:.2f} GiB ({report['needed_bytes'] / memory:.0%})" if memory else ""
    lines.append(f"  needed           {gib('needed_bytes')}{share}")
    for kind, traffic in report.get("collectives", {}).items():
        lines.append(f"  {kind:17}{traffic['bytes'] / GIB:8.2f} GiB in {traffic['count']:,}")
    if report.get("collectives_in_loops_of_unknown_length"):
        lines.append(f"  ({report['collectives_in_loops_of_unknown_length']} of them in loops of unknown length)")
    lines.append(f"  FLOPs            {report['flops_per_device']:.3g} (counted by hybrid_dit.cost, evenly shared)")
    if "compile_seconds" in report:
        lines.append(f"  compiled in {report['compile_seconds']} s after {report['trace_seconds']} s of tracing")
    return "\n".join(lines)


def advice(config, report: dict) -> str:
    """Returns what to change so that it fits."""
    needed, memory = report["needed_bytes"], report["memory_bytes"]
    devices = math.ceil(report["devices"] * needed / memory)
    section = "sample" if config.job == "decode" else config.job
    batch = config[section].batch
    divided = report["devices"] if config.job == "finetune" else 1  # a batch below that does not get divided
    smaller = [f"a smaller batch (--config.{section}.batch, now {batch})"] if batch > divided else []
    if config.job == "sample" and not config.sample.sequential:
        smaller.append("one branch of guidance at a time (--config.sample.sequential=True)")
    if config.job == "decode":
        smaller.append(f"more windows (--config.sample.windows, now {config.sample.windows})")
    if config.job == "distill" and config.distill.activations == "stacked":
        smaller.append("no kept activations (--config.distill.activations=inside)")
    if config.job == "distill" and len(config.distill.rates) > 1:
        smaller.append(f"fewer rates at once (--config.distill.rates, now {','.join(config.distill.rates)})")
    smaller.append("a shorter or smaller video (--config.model.frames, .height, .width)")
    # Temporaries include on-chip memory, 128 MiB or less, so the sum may be a little above what the compiler accepts.
    placed = "argument_bytes" in report and needed < 1.02 * memory
    edge = "The compiler can place it, but at the limit. " if placed else ""
    return (
        f"{edge}A device needs {needed / GIB:.2f} GiB and has {memory / GIB:.2f} GiB. Use a larger --config.target "
        f"(what is divided over devices would need {devices} of them), a chip with more memory, {', '.join(smaller)}"
    )


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
            with no_cache():
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = targets.needed_bytes(str(error))
            if needed is None:
                raise
            raise UserError(
                f"{label} needs {needed[0] / GIB:.1f} GiB, {target.name} has {needed[1] / GIB:.1f}"
            ) from error
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
