"""Checks, tunes and times hybrid attention on one NVIDIA GPU (Hopper), forward and backward, against cuDNN's softmax.

    python benchmarks/attention_gpu.py --out=DIR            # about six minutes on an H200
    python benchmarks/attention_gpu.py --out=DIR --apply    # and makes the best tiles the defaults, in gpu_tiles.py

Five steps, each with a file of rows in DIR, written as they come; --steps picks some:
    check    small shapes in bfloat16: errors of values and gradients against float32 XLA, beside those of bfloat16 XLA
    tune     every kernel by itself at 32,760 tokens, R = 8: all of `gpu_candidates.py`; the best are used below
    stage1   the linear part and its gradient in φ under an L1 loss, as distillation runs it: XLA and fused
    sweep    attention 1 x N x 12 x 128 forward, and forward with all gradients, for N, R, stabiliser and backend
    profile  what each kernel takes within the forward pass at every N and R, by JAX's profiler, log-sum-exp and max
A variant that fails is a row with its error. Speed-ups are over softmax attention by cuDNN, the floor is the ratio of
the FLOPs that the methods need (`hybrid_dit.cost`; with gradients 3.5 times softmax's and 3 times φ's).
"""

import argparse
import collections
import csv
import dataclasses
import json
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import gpu_candidates as candidates
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit import cost
from hybrid_dit.ops import feature_maps, hybrid
from hybrid_dit.ops.kernels import gpu_hybrid, gpu_tiles
from hybrid_dit.ops.kernels.gpu_tiles import Tiles
from hybrid_dit.ops.softmax import softmax_attention
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

HEADS, DIM = candidates.HEADS, candidates.DIM
CHECKED = (1000, 2, 2), (2311, 8, 2), (1000, 4, 3)  # tokens, rate, powers of φ
STEPS = ("check", "tune", "stage1", "sweep", "profile")


class Report:
    """Rows of one step: printed, and written to DIR/STEP.json and .csv, as they come."""

    def __init__(self, folder: Path, step: str):
        self.path, self.rows = folder / step, []

    def add(self, **row) -> None:
        """Adds a row."""
        self.rows.append(row)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        self.path.with_suffix(".json").write_text(json.dumps(self.rows, indent=1) + "\n")
        with self.path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for r in self.rows for k in r)))
            writer.writeheader()
            writer.writerows(self.rows)


def milliseconds(compiled, args, budget: float = 0.15) -> float:
    """Time of a call: the smallest mean of three batches of calls, which share `budget` seconds if they are short."""
    jax.block_until_ready(compiled(*args))
    began = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    calls = max(1, min(100, int(budget / 3 / (time.perf_counter() - began))))
    means = []
    for _ in range(3):
        began = time.perf_counter()
        out = [compiled(*args) for _ in range(calls)][-1]
        jax.block_until_ready(out)
        means.append((time.perf_counter() - began) / calls)
    return 1e3 * min(means)


def compile_all(jobs, report, deadline):
    """Yields (labels, compiled program, its arguments) of those that compile; reports the others.

    Several are compiled at a time, all before the first is given: threads at work would disturb the times.

    Args:
        jobs: (labels, function, arguments) each.
        report: where failures go.
        deadline: `time.monotonic()` after which nothing more is tried.
    """

    def compile_one(function, args):
        if time.monotonic() > deadline:
            raise TimeoutError("not run: out of time")
        return jax.jit(function).lower(*args).compile()

    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(compile_one, function, args) for _, function, args in jobs]
    for (labels, _, args), future in zip(jobs, futures):
        if future.exception() is None:
            yield labels, future.result(), args
        else:  # a variant that the compiler refuses is a result too
            report.add(**labels, error=shown(future.exception()))


def shown(error) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def time_all(jobs, report, deadline, extra=lambda labels, ms: {}) -> None:
    """Rows of `jobs` with their times and what `extra` makes of them."""
    for labels, compiled, args in compile_all(jobs, report, deadline):
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("not run: out of time")
            ms = milliseconds(compiled, args)
            report.add(**labels, ms=ms, **extra(labels, ms))
        except Exception as error:  # out of memory, say
            report.add(**labels, error=shown(error))


def make_inputs(n: int, feature_map: FeatureMapSpec = candidates.PHI, dtype=jnp.bfloat16):
    """Random (q, k, v), φ in float32 with features that matter, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, g = (jax.random.normal(key, (1, n, HEADS, DIM), dtype) for key in keys[:4])
    phi = feature_maps.init(keys[4], HEADS, DIM, feature_map)
    return (q, k, v), phi, g


def with_gradients(run, q, k, v, phi, g):
    """(output, gradients in q, k, v, φ)."""
    y, vjp = jax.vjp(run, q, k, v, phi)
    return y, *vjp(g)


# Steps


def check(report, deadline, sizes, backends) -> None:
    """Relative errors of every output against float32, ours and XLA's in bfloat16."""
    jobs = []
    for n, rate, degree in CHECKED:
        feature_map = FeatureMapSpec(degree=degree)
        (q, k, v), phi, g = make_inputs(n, feature_map)
        args = (q, k, v, phi, g)
        for stabiliser in ("max", "lse"):
            spec = AttentionSpec("hybrid", rate, feature_map=feature_map, stabiliser=stabiliser)
            plain = partial(hybrid.attention, spec=spec, grid=(1, 1, n), backend="xla")
            runs = {"xla": plain} | {f"gpu {name}": fused(spec, n, sizes, name) for name in backends}
            labels = {"n": n, "rate": rate, "P": degree, "stabiliser": stabiliser}
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), args)
            jobs.append(({**labels, "backend": "float32"}, precisely(partial(with_gradients, plain)), wide))
            jobs += [({**labels, "backend": name}, partial(with_gradients, run), args) for name, run in runs.items()]
    truth = base = None  # of the setting at hand: float32 comes first, then XLA
    for labels, compiled, args in compile_all(jobs, report, deadline):
        got = compiled(*args)
        if labels["backend"] == "float32":
            truth, base = got, None
            continue
        errors = relative_errors(got, truth)
        base = errors if base is None else base
        worst = max(errors[name] / base[name] for name in errors)
        report.add(**labels, **errors, worst_over_xla=worst, ok=worst <= 1.5)


def precisely(function):
    """`function` with float32 products as exact as the device has them."""

    def run(*args):
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return run


def relative_errors(got, truth) -> dict[str, float]:
    """Of the output and each gradient; of φ's leaves, some of which are small and scatter, the root mean square."""
    errors = {name: relative(a, b) for name, a, b in zip(("y", "dq", "dk", "dv"), got, truth)}
    phi = [relative(a, b) for a, b in zip(jax.tree.leaves(got[4]), jax.tree.leaves(truth[4]))]
    return {**errors, "dphi": float(np.sqrt(np.mean(np.square(phi))))}


def relative(a, b) -> float:
    """Norm of the difference over the norm; infinite for NaN."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def fused(spec, n, sizes, softmax):
    """The fused attention."""
    return partial(gpu_hybrid.attention, spec=spec, grid=(1, 1, n), sizes=sizes, softmax=softmax)


def tune(report, deadline, n: int = 32760) -> Tiles:
    """Times every candidate; returns the fastest of each kernel, and the best number of programs."""
    shapes, key, chosen = candidates.shapes(n), jax.random.key(0), {}
    arrays = jax.tree.map(lambda x: (0.1 * jax.random.normal(key, x.shape)).astype(x.dtype), shapes)

    def job(name, sizes, training=False, **labels):
        function, inputs = candidates.kernel(name, sizes, training)
        return {"kernel": name, "training": training, **labels}, function, [arrays[x] for x in inputs]

    def rate(labels, ms):
        return {"tflops": candidates.flops(labels["kernel"], n, labels["training"]) / ms / 1e9}

    for name, tiles in candidates.CANDIDATES.items():
        jobs = [
            job(name, candidates.replaced(name, tile), training, **dataclasses.asdict(tile))
            for training in ((False, True) if name in candidates.BOTH else (False,))
            for tile in tiles
        ]
        first = len(report.rows)
        time_all(jobs, report, deadline, rate)
        # The same tile serves with what training adds and without it.
        totals = {}
        for row in report.rows[first:]:
            tile = tuple(row[field.name] for field in dataclasses.fields(gpu_tiles.Tile))
            totals[tile] = totals.get(tile, 0.0) + row.get("ms", float("inf"))
        best = min(totals, key=totals.get)
        if totals[best] < float("inf"):
            chosen[name] = gpu_tiles.Tile(*best)
    sizes = dataclasses.replace(Tiles(), **chosen)
    first = len(report.rows)
    jobs = [job("products", dataclasses.replace(sizes, programs=p), programs=p) for p in candidates.PROGRAMS]
    time_all(jobs, report, deadline, rate)
    totals = {}
    for row in report.rows[first:]:
        totals[row["programs"]] = totals.get(row["programs"], 0.0) + row.get("ms", float("inf"))
    best = min(totals, key=totals.get)
    return dataclasses.replace(sizes, programs=best) if totals[best] < float("inf") else sizes


def stage1(report, deadline, sizes, n: int = 32760) -> None:
    """The linear part of one rate, q, k and v fixed."""
    (q, k, v), phi, _ = make_inputs(n)
    spec, grid = AttentionSpec("hybrid", 8), (1, 1, n)
    sums = jax.jit(lambda *qkv: hybrid.softmax_part(*qkv, spec, grid))(q, k, v)
    parts = {"xla": hybrid.linear_part, "gpu": partial(gpu_hybrid.linear_part, sizes=sizes)}

    def student(part, phi, q, k, v, sums):
        return hybrid.combine(sums, part(q, k, v, phi, spec, grid))

    def loss(phi, part, *rest):
        return jnp.abs(student(part, phi, *rest) - rest[2].astype(jnp.float32)).mean()

    jobs = []
    for name, part in parts.items():
        args = phi, q, k, v, sums
        jobs.append(({"backend": name, "what": "forward"}, partial(student, part), args))
        step = lambda phi, *rest, part=part: jax.value_and_grad(loss)(phi, part, *rest)  # noqa: E731
        jobs.append(({"backend": name, "what": "loss and gradient in phi"}, step, args))
    time_all(jobs, report, deadline)


def sweep(report, deadline, sizes, backends, tokens, rates) -> None:
    """Attention against softmax by cuDNN; plain XLA, which is slow, for the last of `tokens` and first of `rates`."""
    for n in tokens:
        (q, k, v), phi, g = make_inputs(n)
        shape = cost.wan_1_3b(n)
        softmax, base = cost.attention_flops(shape, cost.SOFTMAX), {}

        def jobs_of(run, labels, phi=phi, qkv=(q, k, v), g=g):
            yield {**labels, "what": "forward"}, run, (*qkv, phi)
            yield {**labels, "what": "forward and backward"}, partial(with_gradients, run), (*qkv, phi, g)

        def extra(labels, ms, n=n, shape=shape, base=base, softmax=softmax):
            if labels["backend"] == "cudnn":
                base[labels["what"]] = ms
                factor = 1.0 if labels["what"] == "forward" else 3.5
                return {"tflops": factor * softmax / ms / 1e9}
            spec = AttentionSpec("hybrid", labels["rate"])
            ours = cost.attention_flops(shape, spec)
            keys = 4 * n * -(-n // labels["rate"]) * shape.dim
            if labels["what"] != "forward":
                ours = 3.5 * keys + 3 * (ours - keys)
            floor = (1.0 if labels["what"] == "forward" else 3.5) * softmax / ours
            speed = base.get(labels["what"], float("nan")) / ms
            return {"speedup": speed, "floor": floor, "of_floor": speed / floor}

        plain = lambda q, k, v, phi: softmax_attention(q, k, v)  # noqa: E731
        labels = {"n": n, "rate": 0, "stabiliser": "", "backend": "cudnn"}
        time_all(list(jobs_of(plain, labels)), report, deadline, extra)
        for name in (*(f"gpu {x}" for x in backends), *["xla"] * (n == tokens[-1])):
            jobs = []
            for rate in rates if name != "xla" else rates[:1]:
                for stabiliser in ("max", "lse"):
                    spec = AttentionSpec("hybrid", rate, stabiliser=stabiliser)
                    run = partial(hybrid.attention, spec=spec, grid=(1, 1, n), backend="xla")
                    if name != "xla":
                        run = fused(spec, n, sizes, name.removeprefix("gpu "))
                    jobs += jobs_of(run, {"n": n, "rate": rate, "stabiliser": stabiliser, "backend": name})
            time_all(jobs, report, deadline, extra)


def profile(report, deadline, sizes, softmax, tokens, rates, calls: int = 10) -> None:
    """Kernels of the forward pass, those of cuDNN's softmax over all keys first."""
    for n in tokens:
        (q, k, v), phi, _ = make_inputs(n)
        softmax_alone = lambda q, k, v, phi: softmax_attention(q, k, v)  # noqa: E731
        jobs = [({"n": n, "rate": 0, "stabiliser": ""}, softmax_alone, (q, k, v, phi))]
        for rate in rates:
            for stabiliser in ("lse", "max"):
                labels = {"n": n, "rate": rate, "stabiliser": stabiliser}
                run = fused(AttentionSpec("hybrid", rate, stabiliser=stabiliser), n, sizes, softmax)
                jobs.append((labels, run, (q, k, v, phi)))
        for labels, compiled, args in compile_all(jobs, report, deadline):
            try:
                for kernel, count, ms in kernels_of(compiled, args, calls):
                    report.add(**labels, kernel=kernel, calls=count / calls, ms=ms / calls)
            except Exception as error:
                report.add(**labels, error=shown(error))


def kernels_of(run, args, calls: int) -> list[tuple[str, int, float]]:
    """(name, how many ran, milliseconds of all) of the kernels in `calls` calls, longest first."""
    jax.block_until_ready(run(*args))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([run(*args) for _ in range(calls)])
        file = next(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        found = collections.defaultdict(lambda: [0, 0.0])
        for line in (x for plane in planes if plane.name.startswith("/device:") for x in plane.lines):
            for event in line.events if line.name.startswith("Stream") else ():
                found[event.name][0] += 1
                found[event.name][1] += event.duration_ns / 1e6
    return sorted(((name, *x) for name, x in found.items()), key=lambda x: -x[2])


def apply(sizes: Tiles) -> None:
    """Makes `sizes` the defaults in the source of `gpu_tiles`."""
    path = Path(gpu_tiles.__file__)
    text = path.read_text()
    for field in dataclasses.fields(Tiles):
        value = getattr(sizes, field.name)
        shown = value
        if isinstance(value, gpu_tiles.Tile):
            default = gpu_tiles.Tile()
            changed = {k: v for k, v in dataclasses.asdict(value).items() if v != getattr(default, k)}
            shown = f"Tile({', '.join(f'{k}={v}' for k, v in changed.items())})"
        text, count = re.subn(rf"(?m)^(    {field.name}: \w+ = ).*$", rf"\g<1>{shown}", text)
        assert count == 1, field.name
    path.write_text(text)


def main():
    """Runs the steps and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--steps", nargs="*", default=STEPS, choices=STEPS)
    parser.add_argument("--tokens", nargs="*", type=int, default=[12600, 75600, 32760])
    parser.add_argument("--rates", nargs="*", type=int, default=[8, 4, 2, 1])
    parser.add_argument("--softmax", nargs="*", default=list(gpu_hybrid.SOFTMAX), choices=gpu_hybrid.SOFTMAX)
    parser.add_argument("--seconds", type=float, default=500, help="no new variant is tried after that many")
    parser.add_argument("--apply", action="store_true", help="write the best tiles into the source")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    Report(args.out, "machine").add(device=jax.devices()[0].device_kind, jax=jax.__version__)
    sizes = Tiles()
    for step in args.steps:
        report = Report(args.out, step)
        began = time.monotonic()
        if step == "check":
            check(report, deadline, sizes, args.softmax)
        elif step == "tune":
            sizes = tune(report, deadline)
            (args.out / "tiles.json").write_text(json.dumps(dataclasses.asdict(sizes), indent=1) + "\n")
            print(sizes, flush=True)
            if args.apply:
                apply(sizes)
            check(Report(args.out, "check_tuned"), deadline, sizes, args.softmax)
        elif step == "stage1":
            stage1(report, deadline, sizes)
        elif step == "profile":
            profile(report, deadline, sizes, args.softmax[0], args.tokens, args.rates)
        else:
            sweep(report, deadline, sizes, args.softmax, args.tokens, args.rates)
        print(f"{step}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
