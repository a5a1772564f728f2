"""Writes a part of a model, never whole in memory: as PyTorch weights in either layout, or as an Orbax folder."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hybrid_dit.atomic import write_json
from hybrid_dit.convert import hybrid, orbax_folder, sources, tables, wan_keys
from hybrid_dit.convert.files import write_sharded
from hybrid_dit.convert.params import Params
from hybrid_dit.models.umt5 import UMT5Config
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec

STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
_AHEAD = 2  # tensors read while one is written


def write_torch(
    folder: Path,
    kind: str,
    config: sources.Config,
    attention: tuple[AttentionSpec, ...],
    params: Params,
    layout: str = "diffusers",
    look: Callable[[str, np.ndarray], None] | None = None,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes safetensors (in shards of 5 GB) and config.json; a hybrid's maps and description are added to a DiT.

    Args:
        folder: where; not atomic.
        kind: one of `sources.KINDS`.
        config: of the part.
        attention: of a DiT, one spec per block; empty or all softmax for a teacher.
        params: what to write, each in its dtype.
        layout: "wan" or "diffusers"; transformers' for the text encoder in the latter.
        look: is shown every tensor with its name.
        on_bytes: is told how many bytes have been written since the last time.
    """
    table = sources.entries(config, attention, layout, params)
    plan = {name: (params[entry.flax].dtype, entry.torch_shape) for name, entry in table.items()}
    tensors = _tensors(table, params, look, on_bytes)
    write_sharded(folder, STEMS[kind], plan, tensors, {"format": "pt"})
    write_config(folder, config, attention, layout)


def write_orbax(
    folder: Path,
    config: sources.Config,
    attention: tuple[AttentionSpec, ...],
    params: Params,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes an Orbax folder, see `orbax_folder`; arguments as in `write_torch`."""
    write_config(folder, config, attention, "diffusers")
    orbax_folder.write_params(folder, params, on_bytes)


def write_config(folder: Path, config: sources.Config, attention: tuple[AttentionSpec, ...], layout: str) -> None:
    """Writes config.json (a DiT's in "wan" layout is the original one) and a hybrid's hybrid_config.json."""
    if isinstance(config, WanConfig):
        write = wan_keys.config_to_wan if layout == "wan" else wan_keys.config_to_diffusers
        write_json(folder / "config.json", write(config))
        hybrid.write_description(folder, attention)
    else:
        write_json(folder / "config.json", config.to_hf() if isinstance(config, UMT5Config) else config.to_diffusers())


def _tensors(table: Mapping[str, tables.Entry], params: Params, look, on_bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor in the table's order, the next few being read meanwhile."""

    def read(entry: tables.Entry) -> np.ndarray:
        whole = tuple(slice(0, n) for n in entry.flax_shape)
        index = whole if entry.index is None else (slice(entry.index, entry.index + 1), *whole)
        return entry.export(params[entry.flax].read(index).reshape(entry.flax_shape))

    with ThreadPoolExecutor(_AHEAD) as pool:
        todo = iter(table.items())
        waiting = [(name, pool.submit(read, entry)) for name, entry in itertools.islice(todo, _AHEAD)]
        try:
            while waiting:
                name, future = waiting.pop(0)
                tensor = future.result()
                waiting += [(n, pool.submit(read, entry)) for n, entry in itertools.islice(todo, 1)]
                if look:
                    look(name, tensor)
                yield name, tensor
                on_bytes(tensor.nbytes)
        finally:
            pool.shutdown(cancel_futures=True)
