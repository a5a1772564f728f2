"""Samples per second that one process feeds to training, at the latents of 480 x 832 x 81 and 512 tokens of text.

    python benchmarks/input_pipeline.py [--kinds=tfds,tar,csv,parquet] [--folder=DIR] [--out=FILE.json]

Writes random samples in every format (bfloat16, 8.4 MB each; parquet float32 as FastVideo has it, 16.8 MB), reads them
through `LatentSource` with grain's threads, and prints samples per second beside a floor: reading the same files in
pieces of 64 MiB with nothing done to them. Files come from the page cache, so this is what the CPU allows, not a disk.
On a machine that has other work, CPU time per sample tells more; two cores over it is what an idle one would allow.
Needs 2 GB in DIR and 3 GB of memory.
"""

import argparse
import io
import json
import os
import platform
import resource
import shutil
import tarfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hybrid_dit.data.feed import Form, LatentSource
from hybrid_dit.data.open_source import LIBRARIES
from hybrid_dit.data.shards import Record, ShardFolder
from hybrid_dit.models.vae import VAEConfig

SHAPE, CHANNELS, TOKENS, WIDTH = (21, 60, 104), 16, 512, 4096
SAMPLES, BATCH, WARM_UP, BATCHES = 24, 4, 3, 15
THREADS = 2


def samples():
    """Yields latents [t, y, x, c] and text [l, e] of normal numbers, bfloat16."""
    rng = np.random.default_rng(0)
    for _ in range(SAMPLES):
        latents = rng.standard_normal((*SHAPE, CHANNELS), np.float32).astype(ml_dtypes.bfloat16)
        yield latents, rng.standard_normal((TOKENS, WIDTH), np.float32).astype(ml_dtypes.bfloat16)


def write(kind: str, folder: Path) -> None:
    """Writes the samples as one kind of set."""
    folder.mkdir(parents=True)
    {"tfds": write_tfds, "parquet": write_parquet, "tar": write_tar, "csv": write_csv}[kind](folder)


def write_tfds(folder: Path) -> None:
    """Writes three shards."""
    keys, made_samples = [f"{i}" for i in range(SAMPLES)], samples()
    made = ShardFolder(folder, keys, 8, CHANNELS, WIDTH, "bfloat16")
    for number in range(made.shards):
        made.write(number, [Record(keys[i], "", *next(made_samples)) for i in made.items(number)], {})
    made.finish({})


def write_parquet(folder: Path) -> None:
    """Writes files with one row group of four samples each."""
    rows = []
    for i, (latents, text) in enumerate(samples()):
        row = {"id": str(i)}
        for name, array in (("vae_latent", np.moveaxis(latents, -1, 0)), ("text_embedding", text)):
            content = np.ascontiguousarray(array.astype(np.float32))
            row |= {f"{name}_bytes": content.tobytes(), f"{name}_shape": list(content.shape)}
            row[f"{name}_dtype"] = "float32"
        rows.append(row)
        if len(rows) == 4:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{i:03d}.parquet")
            rows = []


def write_tar(folder: Path) -> None:
    """Writes one archive."""
    with tarfile.open(folder / "000.tar", "w") as archive:
        for i, (latents, text) in enumerate(samples()):
            for name, value in (("latent.pt", _tensor(np.moveaxis(latents, -1, 0))), ("embed.pt", _tensor(text))):
                stream = io.BytesIO()
                torch.save(value, stream)
                info = tarfile.TarInfo(f"{i:09d}.{name}")
                info.size = stream.tell()
                stream.seek(0)
                archive.addfile(info, stream)


def write_csv(folder: Path) -> None:
    """Writes a table and a file per sample."""
    for i, (latents, text) in enumerate(samples()):
        value = {"latents": _tensor(np.moveaxis(latents, -1, 0)), "prompt_emb": {"context": _tensor(text)[None]}}
        torch.save(value, folder / f"{i}.mp4.tensors.pth")
    (folder / "metadata.csv").write_text("\n".join(["file_name", *(f"{i}.mp4" for i in range(SAMPLES))]))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint16)).view(torch.bfloat16)


def measure(kind: str, folder: Path) -> dict:
    """Returns samples per second, CPU seconds per sample, and the floor."""
    library = LIBRARIES[kind](folder, VAEConfig())
    form = Form(CHANNELS, WIDTH, text_tokens=TOKENS, rows=TOKENS, dtype="bfloat16")
    buckets = {"81x480x832": list(range(SAMPLES))}
    source = LatentSource(library, buckets, form, batch=BATCH, seed=0, max_bad=0, threads=THREADS, ahead=2)
    for _ in range(WARM_UP):
        source.next()
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(BATCHES):
        batch = source.next()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert batch.latents.shape == (BATCH, *SHAPE, CHANNELS) and batch.text.shape == (BATCH, TOKENS + 1, WIDTH)
    count = BATCHES * BATCH
    return {
        "kind": kind,
        "samples_per_second": round(count / seconds, 1),
        "cpu_ms_per_sample": round(1000 * cpu / count, 1),
        "two_free_cores_would_allow": round(2 * count / cpu, 1),
        "floor_samples_per_second": round(SAMPLES / read_seconds(folder), 1),
        "bytes_per_sample": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) // SAMPLES,
        "load_average": round(os.getloadavg()[0], 1),
    }


def read_seconds(folder: Path) -> float:
    """Returns the time of reading all files with nothing done to them."""
    buffer = bytearray(2**26)
    began = time.perf_counter()
    for path in sorted(f for f in folder.rglob("*") if f.is_file()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def main() -> None:
    """Runs everything and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="tfds,tar,csv,parquet")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/input_pipeline_benchmark"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.folder.exists():
        raise SystemExit(f"{args.folder} exists; remove it or give another --folder")
    rows = []
    try:
        for kind in args.kinds.split(","):
            write(kind, args.folder / kind)
            rows.append(measure(kind, args.folder / kind))
            print(rows[-1], flush=True)
            shutil.rmtree(args.folder / kind)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    machine = f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"machine": machine, "batch": BATCH, "threads": THREADS, "peak_gib": round(peak, 2), "runs": rows}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
