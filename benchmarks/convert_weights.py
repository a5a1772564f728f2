"""Time and peak memory of `convert_weights.py` at full size, on random weights in the original layout.

    python benchmarks/convert_weights.py [--model=1_3b|14b] [--folder=DIR] [--out=FILE.json]

Writes the weights (2.84 or 28.6 GB, bfloat16), imports them, removes them, and exports both layouts from the result.
The floor beside each time is a plain copy of the same bytes on the same disk, in pieces of 64 MiB, measured right
before. Needs twice the size in DIR. Memory is the child process's peak resident set, everything included.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from hybrid_dit.convert import sources
from hybrid_dit.convert.files import write_sharded
from hybrid_dit.models.wan import WanConfig

MODELS = {
    "1_3b": WanConfig(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30),
    "14b": WanConfig(dim=5120, num_heads=40, ffn_dim=13824, num_layers=40),
}
ROOT = Path(__file__).parents[1]


def write_source(folder: Path, config: WanConfig) -> int:
    """Writes random weights and returns their bytes."""
    table = sources.entries(config, (), "wan", sources.abstract(config))
    dtype = np.dtype(ml_dtypes.bfloat16)
    noise = (np.random.default_rng(0).standard_normal(2**24, np.float32) * 0.02).astype(dtype)

    def tensors():
        for i, (name, entry) in enumerate(table.items()):
            yield name, np.resize(np.roll(noise[: 2**20 + 7 * i], i), entry.torch_shape)

    plan = {name: (dtype, entry.torch_shape) for name, entry in table.items()}
    write_sharded(folder, "diffusion_pytorch_model", plan, tensors(), {"format": "pt"})
    return sum(2 * int(np.prod(shape)) for _, shape in plan.values())


def copy_seconds(source: Path, target: Path) -> float:
    """Returns the time of a plain copy of all files below `source`."""
    began = time.perf_counter()
    buffer = bytearray(2**26)
    for file in sorted(f for f in source.rglob("*") if f.is_file()):
        with open(file, "rb") as read, open(target, "wb") as write:
            while count := read.readinto(buffer):
                write.write(memoryview(buffer)[:count])
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def convert(*arguments: str) -> tuple[float, float]:
    """Returns (seconds, peak bytes) of one run of the command."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, ROOT / "convert_weights.py", *arguments], cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"convert_weights.py {' '.join(arguments)} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def main() -> None:
    """Runs everything and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1_3b")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/convert_benchmark"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.folder.exists():
        raise SystemExit(f"{args.folder} exists; remove it or give another --folder")
    args.folder.mkdir(parents=True)
    rows = []
    try:
        source, orbax, exported = (args.folder / name for name in ("source", "orbax", "exported"))
        size = write_source(source, MODELS[args.model])
        for what, here, there, options in (
            ("import", source, orbax, []),
            ("export", orbax, exported, ["--format=wan"]),
            ("export", orbax, exported, ["--format=diffusers"]),
        ):
            floor = copy_seconds(here, args.folder / "copy")
            seconds, peak = convert(what, str(here), str(there), *options)
            rows.append(
                {
                    "what": " ".join([what, *options]),
                    "seconds": round(seconds, 1),
                    "copy_seconds": round(floor, 1),
                    "times_copy": round(seconds / floor, 2),
                    "peak_gib": round(peak / 2**30, 2),
                    "peak_over_file": round(peak / size, 2),
                }
            )
            print(rows[-1], flush=True)
            shutil.rmtree(exported if what == "export" else source)
    finally:
        shutil.rmtree(args.folder)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    machine = f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}"
    result = {"model": args.model, "bytes": size, "machine": machine, "runs": rows}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
