"""Parquet files as FastVideo writes them (`pyarrow_schema_t2v`): one row per video, tensors as bytes, shape and dtype.

Facts from FastVideo's schema, loader and trainer: latents are [c, t, y, x] and on the scale of the VAE (its trainer
normalises them with the VAE's statistics at every step); embeddings have the prompt's own rows, or zeros after them.
Rows of one row group are read together, which is all that Parquet can do.
"""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hybrid_dit.convert.json_file import shown
from hybrid_dit.data.library import BadSample, Cache, Entry, Library, latent_shape, reason
from hybrid_dit.data.order import WINDOW

LATENT, TEXT = "vae_latent", "text_embedding"
MAX_GROUP = 2**32  # bytes; 2 * WINDOW of them are kept in memory
PARTS = ("bytes", "shape", "dtype")
STRANGE = AttributeError, TypeError, ValueError  # from values of other types than expected
DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}


class ParquetLibrary(Library):
    """A folder of parquet files, subfolders included."""

    kind = "parquet"
    raw = True

    def __init__(self, *args, **kwargs):
        """See `Library`."""
        self._groups = Cache(2 * WINDOW)
        super().__init__(*args, **kwargs)

    def find(self) -> tuple[list[Path], dict[str, str]]:
        """Returns all parquet files."""
        return sorted(self.folder.rglob("*.parquet")), {}

    def expected(self) -> str:
        """Says what the folder should have held."""
        return f"expected .parquet files with columns {LATENT}_bytes, {TEXT}_bytes and their _shape and _dtype"

    def scan(self, file: Path) -> tuple[list[Entry], dict[str, str]]:
        """Returns the rows of one file, from its footer and the columns of shapes."""
        entries, bad, row = [], {}, 0
        try:
            with pq.ParquetFile(file) as parquet:
                wanted = [f"{name}_{part}" for name in (LATENT, TEXT) for part in PARTS]
                missing = [name for name in wanted if name not in parquet.schema_arrow.names]
                if missing:
                    raise BadSample(f"has no column {', '.join(missing)}")
                for group in range(parquet.num_row_groups):
                    told = parquet.metadata.row_group(group)
                    size, rows = told.total_byte_size, told.num_rows
                    if size > MAX_GROUP:
                        bad[f"{file.relative_to(self.folder)}, row group {group}"] = (
                            f"has {rows} rows and {size:,} bytes, which are read at once; write smaller row groups"
                        )
                        row += rows
                        continue
                    shapes = parquet.read_row_group(group, columns=[f"{LATENT}_shape", f"{TEXT}_shape"]).to_pylist()
                    for within, shape in enumerate(shapes):
                        try:
                            length = _text_length(shape[f"{TEXT}_shape"])
                            place = (row, group, within)
                            entries.append(Entry(latent_shape(shape[f"{LATENT}_shape"] or ()), length, place, group))
                        except BadSample as error:
                            bad[f"{file.relative_to(self.folder)}/{row}"] = reason(error)
                        row += 1
        except (pa.ArrowException, OSError) as error:
            raise BadSample(f"not a readable parquet file: {shown(error)}") from error
        except STRANGE as error:
            raise BadSample(f"has a column of a type that FastVideo does not write: {shown(error)}") from error
        return entries, bad

    def load(self, file: Path, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        """Returns latents and text of one row."""
        _, group, within = entry.address
        try:
            table = self._groups.get((file, group), lambda: _read_group(file, group))
            return _tensor(table, LATENT, within), _tensor(table, TEXT, within)
        except (pa.ArrowException, OSError, IndexError, UnicodeDecodeError) as error:
            raise BadSample(f"can't be read: {shown(error)}") from error
        except STRANGE as error:
            raise BadSample(f"has a column of a type that FastVideo does not write: {shown(error)}") from error


def _read_group(file: Path, group: int) -> pa.Table:
    with pq.ParquetFile(file) as parquet:
        return parquet.read_row_group(group, columns=[f"{name}_{part}" for name in (LATENT, TEXT) for part in PARTS])


def _tensor(table: pa.Table, name: str, row: int) -> np.ndarray:
    content, shape, dtype = (table.column(f"{name}_{part}")[row] for part in PARTS)
    told = (dtype.as_py() or "").removeprefix("torch.")
    if told not in DTYPES:
        raise BadSample(f"{name} has dtype {shown(told)}; known are {', '.join(DTYPES)}")
    shape, kind = shape.as_py() or [], np.dtype(DTYPES[told])
    buffer = content.as_buffer()
    if buffer is None or buffer.size != math.prod(shape) * kind.itemsize or min(shape, default=0) < 1:
        size = "no" if buffer is None else f"{buffer.size:,}"
        raise BadSample(f"{name} has {size} bytes, which is not what {shown(shape)} of {told} takes")
    return np.frombuffer(buffer, kind).reshape(shape)


def _text_length(shape: list[int | None] | None) -> int:
    if not shape or len(shape) not in (2, 3) or not isinstance(shape[-2], int):
        raise BadSample(f"text embedding {shape} is not [tokens, width]")
    return int(shape[-2])
