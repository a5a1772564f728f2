"""Compiles the GPU kernels of hybrid attention for Hopper without a GPU: registers, spills and shared memory of each.

    python -m venv /tmp/triton && /tmp/triton/bin/pip install triton==3.6.0
    python benchmarks/triton_aot.py --triton=/tmp/triton/bin/python --out=triton_aot.json

JAX lowers each kernel to Triton's language on any machine; the `triton` package (of the interpreter given, since few
machines without a GPU have it) compiles that for sm_90 and its cuobjdump reads the result. XLA brings a Triton of
its own, of about the same age: numbers are close to what runs, not equal.

Limits on Hopper: 255 registers a thread and 65,536 a multiprocessor (8 warps of 255 fill it), 227 KiB of shared memory
for a program. Spilled bytes are per thread; `wgmma` and `mma` count instructions for Hopper's matrix unit and for the
older, slower way to it.
"""

import argparse
import contextlib
import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path

import gpu_candidates
import jax
from jax._src.lib.mlir import ir
from jax._src.pallas.triton import lowering

from hybrid_dit.ops.kernels.gpu_tiles import Tiles

COMPILE = r"""
import json, re, subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton._C.libtriton import ir
target = GPUTarget("cuda", 90, 32)
backend = make_backend(target)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for path in sys.argv[1:]:
    about = json.loads(Path(path).with_suffix(".json").read_text())
    try:
        options = {"num_warps": about["warps"], "num_stages": about["stages"]}
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        module = ir.parse_mlir_module(path, context)  # a file skips the first stage, in which sums join their products
        module.context = context
        backend.make_ttir(module, {}, backend.parse_options(options), 90)
        Path(path).write_text(str(module))
        kernel = triton.compile(path, target=target, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
        row = {"registers": int(usage["REG"]), "spilled": int(usage["LOCAL"]) + int(usage["STACK"])}
        row |= {"shared_kib": kernel.metadata.shared / 1024, "wgmma": kernel.asm["ptx"].count("wgmma.mma_async")}
        row |= {"mma": kernel.asm["ptx"].count("mma.sync"), "fits": kernel.metadata.shared <= 232448}
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"[:200]}
    print(json.dumps({**about, **row}), flush=True)
"""


def kernels(function, *args):
    """Yields (name, warps, stages, Triton IR) of every kernel in `function`, lowered for CUDA."""
    with hopper():
        module = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    context = lowering._new_ir_context()
    seen = set()
    for call in _custom_calls(module.operation):
        if "mhlo.backend_config" not in call.attributes:
            continue
        config = call.attributes["mhlo.backend_config"]
        if "ir" not in config:
            continue
        code = ir.StringAttr(config["ir"]).value_bytes
        if code not in seen:
            seen.add(code)
            with context:
                text = ir.Module.parse(code).operation.get_asm(enable_debug_info=False)
            number = {key: ir.IntegerAttr(config[key]).value for key in ("num_warps", "num_stages")}
            yield ir.StringAttr(config["name"]).value, number["num_warps"], number["num_stages"], text


def hopper():
    """Tells JAX what GPU to lower for, where there is none; versions before 0.11 take Hopper by themselves."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


def _custom_calls(operation):
    for region in operation.regions:
        for block in region:
            for child in block:
                if child.operation.name == "stablehlo.custom_call":
                    yield child.operation
                yield from _custom_calls(child.operation)


def compile_all(python: str, found) -> list[dict]:
    """Rows of what the compiler says about kernels given as (labels, name, warps, stages, Triton IR)."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, (labels, name, warps, stages, text) in enumerate(found):
            path = Path(folder) / f"{i}.ttir"
            path.write_text(text)
            about = {**labels, "kernel": name, "warps": warps, "stages": stages}
            path.with_suffix(".json").write_text(json.dumps(about))
            paths.append(str(path))
        run = subprocess.run([python, "-c", COMPILE, *paths], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def jobs(args):
    """Yields (labels, function, arguments) for every kernel and tile size asked for."""
    shapes = gpu_candidates.shapes(args.tokens)
    for name, tiles in gpu_candidates.CANDIDATES.items():
        if args.only not in name:
            continue
        for tile in tiles if args.candidates else [getattr(Tiles(), name)]:
            for training in (False, True) if name in gpu_candidates.BOTH else (False,):
                labels = {"job": name, "training": training, **dataclasses.asdict(tile)}
                function, inputs = gpu_candidates.kernel(name, gpu_candidates.replaced(name, tile), training)
                yield labels, function, [shapes[x] for x in inputs]


def main():
    """Prints a line for each kernel and writes them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", required=True, help="Python interpreter that has the triton package")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--candidates", action="store_true", help="all tile sizes worth trying, not just the default")
    args = parser.parse_args()

    found = []
    for labels, function, inputs in jobs(args):
        found += [(labels, *kernel) for kernel in kernels(function, *inputs)]
    rows = compile_all(args.triton, found)
    for row in rows:
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"jax": jax.__version__, "tokens": args.tokens, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
