"""Weights on disk: what is in them, any part of any tensor, with errors a person can act on."""

from pathlib import Path

import numpy as np

from hybrid_dit.convert import folder_files
from hybrid_dit.convert.json_file import read_json, shown
from hybrid_dit.convert.safetensors_file import SafetensorsFile
from hybrid_dit.convert.safetensors_writer import write_safetensors, write_sharded
from hybrid_dit.convert.torch_file import SUFFIXES, TorchFile
from hybrid_dit.errors import UserError

__all__ = ["Weights", "read_json", "write_safetensors", "write_sharded"]


class Weights:
    """The tensors of one or several files, read lazily.

    Attributes:
        source: file or folder, for messages.
        shapes: name -> shape.
        dtypes: name -> dtype as safetensors writes it (BF16, F32, ...).
        metadata: texts that the writer left in the files; of several files, the first one's where they differ.
        notes: what was chosen or left out, for the person.
    """

    def __init__(self, source: str | Path):
        """Opens a file (.safetensors; .pth, .pt, .bin of PyTorch) or a folder of safetensors, with or without index.

        Raises:
            UserError: nothing there, a file is broken or contradicts itself, the index leads out of the folder or
                doesn't agree with the files, or two files hold the same name.
        """
        self.source = Path(source)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._file: dict[str, SafetensorsFile | TorchFile] = {}
        self._files: list[SafetensorsFile | TorchFile] = []
        paths, index, notes = [self.source], None, []
        if self.source.is_dir():
            paths, index, notes = folder_files.find(self.source)
        elif not self.source.exists():
            raise UserError(f"no weights at {self.source}: expected a .safetensors file or a folder that holds some")
        for path in paths:
            file = TorchFile(path) if path.suffix in SUFFIXES else SafetensorsFile(path)
            self._files.append(file)
            for name in file.shapes:
                if name in self._file:
                    there = self._file[name].path.name
                    raise UserError(f"{self.source}: tensor {shown(name)} is in two files, {there} and {path.name}")
                self._file[name] = file
            self.shapes |= file.shapes
            self.dtypes |= file.dtypes
            self.metadata = file.metadata | self.metadata
            notes += file.notes
        if index is not None:
            folder_files.check_index(index, {name: file.path.name for name, file in self._file.items()}, self.source)
        self.notes = tuple(notes)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from the disk so far, by all threads."""
        return sum(file.bytes_read for file in self._files)

    def file_of(self, name: str) -> Path:
        """Returns the file that holds a tensor."""
        return self._file[name].path

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor in its stored dtype (bfloat16 as ml_dtypes.bfloat16).

        Raises:
            UserError: the file has changed since it was opened, or the disk fails.
        """
        return self.read_part(name, ())

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns `read(name)[index]`, reading only the bytes it needs; threads may call this at the same time.

        Args:
            name: of the tensor.
            index: one slice of step 1 per axis; missing ones at the end take the whole axis.

        Raises:
            ValueError: more slices than axes, or another step.
            UserError: as `read`.
        """
        shape = self.shapes[name]
        if len(index) > len(shape) or any(part.step not in (None, 1) for part in index):
            raise ValueError(f"tensor {name} of shape {list(shape)} can't be read at {index}: slices of step 1 only")
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        return self._file[name].read(name, tuple(range(*part.indices(n)) for part, n in zip(index, shape)))
