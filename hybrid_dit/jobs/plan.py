"""Compiles the step of another job for devices that need not be here, and says per device what it takes.

The program is the job's own, with its shardings; only shapes go in. What is read from it: argument and temporary bytes
(XLA's buffer assignment, with the sum of both as the bound), collectives (from its text, loops by their trip count),
and compile time. FLOPs are those of `hybrid_dit.cost`, since XLA counts loop bodies once.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path

from hybrid_dit import hlo, plan_layouts, targets
from hybrid_dit.atomic import write_json
from hybrid_dit.command_line import override
from hybrid_dit.compiled_costs import estimate
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.plan_steps import STEPS, sizes
from hybrid_dit.targets import GIB, Target

LARGEST = 10  # collectives that the JSON file lists with the operation they come from


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
        print(table(report), flush=True)
        if not fits:
            print(f"DOES NOT FIT. {advice(config, report)}", flush=True)
        if config.job == "finetune" and config.layouts and target.memory is not None:
            report["layouts"] = try_layouts(config, wan, shape, target, report)
            print(layouts_table(config, report))
    write_json(file, report)
    print(f"plan: {file}")
    return 0 if fits else 1


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
    if config.job == "finetune":
        report["tokens_per_step"] = config.finetune.batch * report["tokens"]
    began = time.monotonic()
    lowered = lower(config, wan, shape, target)
    report["trace_seconds"] = round(time.monotonic() - began, 1)
    began = time.monotonic()
    try:
        compiled = targets.compile_anew(lowered)
    except targets.DoesNotFit as error:
        # The compiler stops here: there is no program to read anything else from.
        return report | {"needed_bytes": error.needed, "memory_bytes": target.memory or error.available, "fits": False}
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
        "least_seconds": least_seconds(report, program, target),
    }


def least_seconds(report: dict, program: hlo.Program, target: Target) -> dict[str, float]:
    """Returns how long a step takes at least: its FLOPs at the matrix unit's peak, its collectives at the links'.

    Recomputed FLOPs are not counted. Of a collective, its output comes in through a device's links; an all-reduce
    brings twice that. Blocks of several kinds of attention are branches of a conditional, all of whose collectives
    `hlo.collectives` counts: then there is no bound for the links.
    """
    kind, bounds = target.devices[0].device_kind, {}
    if peak := targets.peak(kind):
        bounds["matrix unit"] = report["flops_per_device"] / peak
    links = targets.links(kind)
    if links and all(instruction.opcode != "conditional" for instruction, *_ in program.executed()):
        traffic, _ = hlo.collectives(program)
        moved = sum((2 if name == "all-reduce" else 1) * t.bytes for name, t in traffic.items())
        bounds["links"] = moved / links
    return bounds


def try_layouts(config, wan: WanConfig, shape: tuple[int, ...], target: Target, first: dict) -> dict:
    """Looks for the most videos that a device can train on at once; `first` is the report of the config as it is."""
    copies = config.mesh.replicas or config.slices
    devices = len(target.devices) // copies
    batch = math.ceil(config.finetune.batch / copies)  # of a copy
    given = {"mesh.seq": config.mesh.seq, "finetune.accumulate": config.finetune.accumulate}
    given["finetune.batch"] = config.finetune.batch

    def needed(layout: plan_layouts.Layout) -> int:
        settings = {**layout.settings(), "finetune.batch": layout.batch * copies}
        if settings == given:
            return first["needed_bytes"]
        print(f"trying {layout.videos} videos per device at once: {_arguments(settings)}", flush=True)
        changed = config.copy_and_resolve_references()
        for name, value in settings.items():
            override(changed, name, str(value))
        return plan(changed, wan, shape, target)["needed_bytes"]

    tried = plan_layouts.search(devices, batch, target.memory, needed)
    fit = plan_layouts.fitting(tried, target.memory)
    divided = config.finetune.batch % copies == 0
    best = plan_layouts.recommended(fit[-1], devices, batch) if fit and divided else None
    return {
        "tried": [{"videos_per_device": str(layout.videos), "needed_bytes": size} for layout, size in tried.items()],
        "largest_videos_per_device": str(fit[-1].videos) if fit else None,
        "recommended": best and {name: best.settings()[name] for name in ("mesh.seq", "finetune.accumulate")},
    }


def layouts_table(config, report: dict) -> str:
    """Returns what `try_layouts` found as lines for people."""
    found = report["layouts"]
    sizes = ", ".join(f"{row['videos_per_device']}: {row['needed_bytes'] / GIB:.2f} GiB" for row in found["tried"])
    lines = [f"  videos per device at once: {sizes}"]
    largest = found["largest_videos_per_device"]
    lines.append(f"  largest that fits: {largest}" if largest else "  none of them fits")
    if found["recommended"]:
        lines.append(f"  for a batch of {config.finetune.batch}: {_arguments(found['recommended'])}")
    return "\n".join(lines)


def _arguments(settings: Mapping[str, int]) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in settings.items())


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
    least = report.get("least_seconds", {})
    if least:
        seconds = max(least.values())
        parts = ", ".join(f"{value:.3g} s for the {name}" for name, value in least.items())
        rate = f"{report['tokens_per_step'] / seconds:,.0f} tokens/s" if "tokens_per_step" in report else ""
        lines.append(f"  bound            {rate or f'{seconds:.3g} s'} at the makers' peaks: {parts}")
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
