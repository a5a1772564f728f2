"""Writing safetensors: one file, or shards with an index in Hugging Face's form, one tensor in memory at a time."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from hybrid_dit.atomic import atomic_path
from hybrid_dit.convert.safetensors_file import DTYPES, MAX_HEADER, METADATA

Plan = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # name -> dtype, shape
SHARD_BYTES = 5 * 10**9  # where diffusers and transformers have split so far
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a file atomically; `metadata` should say {"format": "pt"}, without which transformers refuses it.

    Raises:
        ValueError: a dtype that safetensors has no name for.
    """
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    plan = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        _write(temporary, plan, iter(arrays.items()), metadata)


def write_sharded(
    folder: str | Path,
    stem: str,
    plan: Plan,
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
    max_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes `stem.safetensors`, or `stem-00001-of-0000N.safetensors` and `stem.safetensors.index.json`.

    Args:
        folder: where; not atomic, so give a temporary folder that is renamed afterwards.
        stem: beginning of the files' names.
        plan: every tensor in the order in which it will come.
        tensors: (name, array) in that order; each is written before the next is asked for.
        metadata: of every file.
        max_bytes: of the tensors in one file; a larger tensor has a file of its own.

    Returns:
        The files written, the index last.

    Raises:
        ValueError: the tensors are not those of the plan, or a dtype that safetensors has no name for.
    """
    folder, shards = Path(folder), _split(plan, max_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    count = len(shards)
    names = [f"{stem}-{i:05d}-of-{count:05d}" for i in range(1, count + 1)] if count > 1 else [stem]
    files = [folder / f"{name}.safetensors" for name in names]
    stream = iter(tensors)
    for file, shard in zip(files, shards):
        _write(file, shard, stream, metadata)
    extra = next(stream, None)
    if extra is not None:
        raise ValueError(f"tensor {extra[0]} comes after the last one of the plan")
    if count > 1:
        index = {
            "metadata": {"total_size": sum(map(_bytes, plan.values()))},
            "weight_map": {name: file.name for file, shard in zip(files, shards) for name in shard},
        }
        files.append(folder / f"{stem}.safetensors.index.json")
        files[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _split(plan: Plan, max_bytes: int) -> list[dict]:
    """Cuts the plan, in its order, into parts of at most `max_bytes`."""
    shards, filled = [{}], 0
    for name, entry in plan.items():
        size = _bytes(entry)
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += size
    return shards


def _write(path: Path, plan: Plan, tensors: Iterator[tuple[str, np.ndarray]], metadata: Mapping[str, str]) -> None:
    header, offsets = _header(plan, metadata)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, (dtype, shape) in plan.items():
            came, array = next(tensors, ("nothing", None))
            if came != name or (array.dtype, array.shape) != (dtype, tuple(shape)):
                found = came if array is None else f"{came} ({array.dtype}, {list(array.shape)})"
                raise ValueError(f"{path.name}: expected tensor {name} ({dtype}, {list(shape)}) next, got {found}")
            file.seek(8 + len(header) + offsets[name])
            # Not np.ascontiguousarray: it makes a vector of a scalar.
            file.write(memoryview(np.asarray(array, order="C").reshape(-1).view(np.uint8)))
        file.truncate(8 + len(header) + sum(map(_bytes, plan.values())))
    path.chmod(0o644)


def _header(plan: Plan, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Returns the header and where each tensor's data begins.

    Wide dtypes come first, then names count, as in the library's files: so every tensor is aligned to its dtype,
    without which PyTorch can't make a view of it, and files don't depend on the order in which a model lists its parts.
    """
    for name, (dtype, _) in plan.items():
        if dtype not in _NAMES or name == METADATA:
            raise ValueError(f"safetensors can't store a tensor {name} of dtype {dtype}")
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name in sorted(plan, key=lambda n: (-plan[n][0].itemsize, n)):
        dtype, shape = plan[name]
        offsets[name], end = end, end + _bytes(plan[name])
        header[name] = {"dtype": _NAMES[dtype], "shape": [int(n) for n in shape], "data_offsets": [offsets[name], end]}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    if len(content) > MAX_HEADER:
        raise ValueError(f"a header of {len(content):,} bytes is more than is read back ({MAX_HEADER:,})")
    return content + b" " * (-len(content) % 8), offsets


def _bytes(entry: tuple[np.dtype, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return dtype.itemsize * math.prod(shape)
