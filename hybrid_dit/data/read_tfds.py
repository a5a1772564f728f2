"""Latent sets built by `configs/build_data.py`: TensorFlow Datasets in array_record files, without TensorFlow."""

from pathlib import Path

import numpy as np

from hybrid_dit.convert.json_file import read_json, shown
from hybrid_dit.data.library import BadSample, Entry, Library
from hybrid_dit.errors import UserError

MANIFEST, SPLIT = "manifest.json", "train"


class TfdsLibrary(Library):
    """A folder with `manifest.json` and shards."""

    kind = "tfds"
    channels_last = True
    keep_index = False  # the manifest is one already, and its shards are to be checked every time

    def __init__(self, *args, **kwargs):
        """See `Library`."""
        super().__init__(*args, **kwargs)
        if self.index.bad:
            raise UserError(next(iter(self.index.bad.values())))
        import tensorflow_datasets as tfds  # half a second, which other formats needn't spend

        try:
            self._source = tfds.builder_from_directory(self.folder).as_data_source(split=SPLIT)
        except Exception as error:  # as in `load`
            raise UserError(
                f"dataset_info.json or features.json in {self.folder} is missing or not what build_data writes "
                f"({shown(error)}); build the set or copy it again"
            ) from error
        if len(self._source) != len(self.index.entries):
            raise UserError(
                f"{self.folder}: {MANIFEST} has {len(self.index.entries)} samples, the shards {len(self._source)}; "
                "build it or copy it again"
            )

    def find(self) -> tuple[list[Path], dict[str, str]]:
        """Returns the manifest, which knows all samples."""
        manifest = self.folder / MANIFEST
        return ([manifest] if manifest.is_file() else []), {}

    def expected(self) -> str:
        """Says what the folder should have held."""
        return f"expected {MANIFEST}, which configs/build_data.py writes when all shards are complete"

    def scan(self, file: Path) -> tuple[list[Entry], dict[str, str]]:
        """Returns all samples, and checks that their shards are there as they were written.

        Raises:
            UserError: a shard is missing or has another size, or the manifest is of another kind.
        """
        manifest = read_json(file)
        try:
            entries, number = [], 0
            for shard in manifest["shards"]:
                path = self.folder / shard["file"]
                if not path.is_file() or path.stat().st_size != shard["bytes"]:
                    there = f"has {path.stat().st_size:,} bytes" if path.is_file() else "is missing"
                    raise UserError(f"{path} {there}, expected {shard['bytes']:,} bytes; copy or build it again")
                for key, shape, length in shard["samples"]:
                    # With the shard's digest, a set that was built anew with other settings counts as other data.
                    entries.append(Entry(tuple(shape), length, (key, number, shard["sha256"])))
                    number += 1
            return entries, {}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is not what build_data writes: {shown(error)}") from error

    def key(self, i: int) -> str:
        """Returns the name that the sample was built with."""
        return self.index.entries[i].address[0]

    def load(self, file: Path, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        """Returns latents and text of one sample."""
        try:
            found = self._source[entry.address[1]]
        except Exception as error:  # TFDS, protobuf and array_record have no common base for theirs
            raise BadSample(f"can't be read: {shown(error)}") from error
        return found["latents"], found["text"]
