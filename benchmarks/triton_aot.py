"""Compiles the GPU kernels of hybrid attention for Hopper without a GPU: registers, spills and shared memory of each.

    python -m venv /tmp/triton && /tmp/triton/bin/pip install triton==3.6.0
    python benchmarks/triton_aot.py --triton=/tmp/triton/bin/python --out=triton_aot.json

JAX lowers each kernel to Triton's language on any machine; the `triton` package (of the interpreter given, since few
machines without a GPU have it) compiles that for sm_90 and its cuobjdump reads the result. XLA brings a Triton of
its own, of about the same age: numbers are close to what runs, not equal.

Limits on Hopper: 255 registers a thread and 65,536 a multiprocessor (8 warps of 255 fill it), 227 KiB of shared memory
for a program. Spilled bytes are per thread.
"""

import argparse
import contextlib
import functools
import json
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.pallas.triton import lowering

from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.kernels import gpu_hybrid
from hybrid_dit.ops.kernels.gpu_tiles import Tile, Tiles
from hybrid_dit.ops.spec import AttentionSpec

COMPILE = r"""
import json, re, subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for path in sys.argv[1:]:
    about = json.loads(Path(path).with_suffix(".json").read_text())
    try:
        options = {"num_warps": about["warps"], "num_stages": about["stages"]}
        kernel = triton.compile(path, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
        row = {"registers": int(usage["REG"]), "spilled": int(usage["LOCAL"]) + int(usage["STACK"])}
        row |= {"shared_kib": kernel.metadata.shared / 1024, "wgmma": kernel.asm["ptx"].count("wgmma.mma_async")}
        row |= {"mma": kernel.asm["ptx"].count("mma.sync")}
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


def programs(sizes: Tiles, tokens: int, dtype):
    """Yields (labels, function, arguments) that together have all kernels in them."""
    x = jax.ShapeDtypeStruct((1, tokens, 12, 128), dtype)
    for spec in (AttentionSpec("hybrid", 8), AttentionSpec("hybrid", 8, stabiliser="lse")):
        phi = jax.eval_shape(lambda: feature_maps.init(jax.random.key(0), 12, 128, AttentionSpec().feature_map))
        how = {"sizes": sizes, "softmax": "triton", "interpret": False}
        run = functools.partial(gpu_hybrid.attention, spec=spec, grid=(1, 1, tokens), **how)

        def loss(*args, run=run):
            return run(*args).astype(jnp.float32).sum()

        yield {"stabiliser": spec.stabiliser}, jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), (x, x, x, phi)


def main():
    """Prints a line for each kernel and writes them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", required=True, help="Python interpreter that has the triton package")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=32760)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--tile", action="append", default=[], help="KERNEL=rows,chunk,warps,stages, not the default")
    args = parser.parse_args()

    replaced = {k: Tile(*map(int, v.split(","))) for k, v in (x.split("=") for x in args.tile)}
    found, seen = [], set()
    for labels, function, inputs in programs(Tiles(**replaced), args.tokens, jnp.bfloat16):
        for kernel in kernels(function, *inputs):
            if args.only in kernel[0] and kernel not in seen:
                seen.add(kernel)
                found.append((labels, *kernel))
    rows = compile_all(args.triton, found)
    for row in rows:
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"jax": jax.__version__, "tokens": args.tokens, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
