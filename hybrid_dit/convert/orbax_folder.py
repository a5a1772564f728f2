"""A part of a model (DiT, text encoder or VAE) as one folder with an Orbax checkpoint.

It holds `params/`, `config.json` and for a hybrid `hybrid_config.json`. The configs are those of the part's folder in a
diffusers pipeline, so that one reader serves both. `params/` is an ordinary Orbax checkpoint, but its arrays are
written and read through TensorStore a piece at a time: Orbax takes whole arrays only, and one stacked matrix of Wan 14B
has 5.7 GB.
"""

import functools
import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from hybrid_dit.convert import tables
from hybrid_dit.convert.params import Index, Param, Params
from hybrid_dit.errors import UserError

PARAMS = "params"
_THREADS = 2  # one reads while another writes; each holds a few copies of a piece


def is_orbax_folder(folder: Path) -> bool:
    """Whether this is a folder with parameters as `write_params` leaves them."""
    return (folder / PARAMS).is_dir() and (folder / "config.json").is_file()


def write_params(folder: Path, params: Params, on_bytes=lambda n: None) -> None:
    """Writes `params/` in `folder`, which should be a temporary one: interrupted, this leaves half a checkpoint.

    Args:
        folder: parent of `params/`.
        params: what to write, each in its dtype.
        on_bytes: is told how many bytes have been written since the last time.
    """
    where = (folder / PARAMS).resolve()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file it touches
    # Orbax writes the tree's structure and its own files with one number per array; the arrays are then put in place.
    tree = tables.unflatten({path: np.zeros(1, param.dtype) for path, param in params.items()})
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(where, tree)
    stores = {path: _create(where / path.replace("/", "."), param) for path, param in params.items()}

    def copy(work: tuple[str, Index]) -> None:
        path, index = work
        piece = params[path].read(index)
        stores[path][index].write(piece).result()
        on_bytes(piece.nbytes)

    with ThreadPoolExecutor(_THREADS) as pool:
        work = [(path, index) for path, param in params.items() for index in param.pieces()]
        try:
            for _ in pool.map(copy, work):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def open_params(folder: Path) -> dict[str, Param]:
    """Returns the parameters, read when asked for.

    Raises:
        UserError: `params/` is no Orbax checkpoint, or (when read) incomplete.
    """
    where = (folder / PARAMS).resolve()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = tables.flatten(checkpointer.metadata(where).item_metadata.tree)
        flags = json.loads((where / "_METADATA").read_text())
        return {path: _lazy(where, path, meta, flags) for path, meta in found.items()}
    except (ValueError, OSError, AttributeError, KeyError) as error:
        raise UserError(f"{folder / PARAMS} is not a readable Orbax checkpoint: {error}") from error


def _create(place: Path, param: Param) -> ts.TensorStore:
    shutil.rmtree(place)
    metadata = {
        "shape": list(param.shape),
        "chunks": [max(n, 1) for n in param.piece_shape],
        "dtype": _zarr_dtype(param.dtype),
        "compressor": None,  # weights don't compress
        "fill_value": None,
        "dimension_separator": ".",
    }
    kvstore = {"driver": "file", "path": str(place)}
    spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "store_data_equal_to_fill_value": True}
    return ts.open(spec, create=True, delete_existing=True).result()


def _lazy(where: Path, path: str, meta, flags: Mapping) -> Param:
    name, driver = path.replace("/", "."), "zarr3" if flags.get("use_zarr3") else "zarr"
    if flags.get("use_ocdbt", True):
        kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{where}/"}, "path": f"{name}/"}
    else:
        kvstore = {"driver": "file", "path": f"{where / name}/"}

    @functools.cache
    def store() -> ts.TensorStore:
        # A file that is gone must not be read as zeros.
        spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
        return ts.open(spec, open=True, read=True).result()

    def read(index: Index) -> np.ndarray:
        try:
            return np.asarray(store()[index].read().result())
        except (ValueError, OSError) as error:
            raise UserError(f"{where}: {path} can't be read: {str(error).splitlines()[0]}") from error

    return Param(tuple(meta.shape), np.dtype(meta.dtype), read)


def _zarr_dtype(dtype: np.dtype) -> str:
    return dtype.name if dtype.kind == "V" or dtype.name == "bfloat16" else dtype.str
