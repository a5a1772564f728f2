"""Small latent sets in every format, written as their own programs write them."""

import csv
import io
import tarfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hybrid_dit.data.shards import Record, ShardFolder
from hybrid_dit.models.vae import VAEConfig

CHANNELS, WIDTH = 4, 8
VAE = VAEConfig(z_dim=4, latents_mean=(0.5, -1.0, 0.25, 2.0), latents_std=(2.0, 0.5, 3.0, 1.5))


def samples(count: int, shapes=((3, 4, 6),), seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Latents [t, y, x, c] and own text rows [l, e], bfloat16; sample i has the shape i mod len(shapes)."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        latents = rng.standard_normal((*shapes[i % len(shapes)], CHANNELS)).astype(ml_dtypes.bfloat16)
        found.append((latents, rng.standard_normal((2 + i % 4, WIDTH)).astype(ml_dtypes.bfloat16)))
    return found


def tensor(array: np.ndarray) -> torch.Tensor:
    """The same numbers for PyTorch."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def channels_first(latents: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(latents, -1, 0))


def padded(text: np.ndarray, rows: int = 16) -> np.ndarray:
    return np.pad(text, ((0, rows - len(text)), (0, 0)))


def saved(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_tar(path: Path, pairs, first: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i, (latents, text) in enumerate(pairs, first):
            add(archive, f"{i:09d}.latent.pt", saved(tensor(channels_first(latents))))
            add(archive, f"{i:09d}.embed.pt", saved(tensor(padded(text))))
            add(archive, f"{i:09d}.prompt.txt", f"prompt {i}".encode())


def parquet_row(latents: np.ndarray, text: np.ndarray, i: int = 0) -> dict:
    """A row whose latents are given as the DiT wants them and stored as the VAE gives them, float32."""
    raw = channels_first(latents.astype(np.float32) * np.float32(VAE.latents_std) + np.float32(VAE.latents_mean))
    row = {"id": f"video{i}", "file_name": f"video{i}", "caption": f"prompt {i}", "media_type": "video"}
    for name, array in (("vae_latent", raw), ("text_embedding", text.astype(np.float32))):
        row |= {f"{name}_bytes": array.tobytes(), f"{name}_shape": list(array.shape), f"{name}_dtype": "float32"}
    return row


def write_parquet(path: Path, rows: list[dict], group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def write_csv(folder: Path, pairs) -> None:
    (folder / "train").mkdir(parents=True)
    with open(folder / "metadata.csv", "w", newline="") as lines:
        table = csv.writer(lines)
        table.writerow(["file_name", "text"])
        for i, (latents, text) in enumerate(pairs):
            table.writerow([f"video_{i:06d}.mp4", f"prompt, {i}"])
            value = {
                "latents": tensor(channels_first(latents)),
                "prompt_emb": {"context": tensor(padded(text))[None]},
                "image_emb": {},
            }
            torch.save(value, folder / "train" / f"video_{i:06d}.mp4.tensors.pth")


def write_tfds(folder: Path, pairs, per_shard: int = 3) -> None:
    keys = [f"video{i}.mp4" for i in range(len(pairs))]
    made = ShardFolder(folder, keys, per_shard, CHANNELS, WIDTH, "bfloat16")
    for number in range(made.shards):
        records = [Record(keys[i], f"prompt {i}", *pairs[i]) for i in made.items(number)]
        made.write(number, records, {})
    made.finish({})


def write_set(kind: str, folder: Path, pairs) -> None:
    """Writes a set of any kind, in several files where the kind has them."""
    if kind == "tar":
        half = len(pairs) // 2
        write_tar(folder / "a" / "shard_000000.tar", pairs[:half])
        write_tar(folder / "shard_000001.tar", pairs[half:], half)
    elif kind == "parquet":
        rows = [parquet_row(*pair, i) for i, pair in enumerate(pairs)]
        half = len(rows) // 2
        write_parquet(folder / "part0" / "data_chunk_0.parquet", rows[:half])
        write_parquet(folder / "part1" / "data_chunk_0.parquet", rows[half:])
    else:
        {"csv": write_csv, "tfds": write_tfds}[kind](folder, pairs)
