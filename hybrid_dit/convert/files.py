"""Safetensors files: what is in them, one tensor at a time, with errors a person can act on."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from hybrid_dit.atomic import atomic_path
from hybrid_dit.errors import UserError


class Weights:
    """The tensors of one or several safetensors files, read lazily.

    Attributes:
        source: file or folder, for messages.
        shapes: name -> shape.
        dtypes: name -> dtype as safetensors writes it (BF16, F32, ...).
    """

    def __init__(self, source: str | Path):
        """Opens a `.safetensors` file, or every one directly inside a folder.

        Raises:
            UserError: nothing there, a file is truncated or no safetensors, or two files hold the same name.
        """
        self.source = Path(source)
        files = sorted(self.source.glob("*.safetensors")) if self.source.is_dir() else [self.source]
        if not files or not files[0].is_file():
            raise UserError(f"no weights at {self.source}: expected a .safetensors file or a folder that holds some")
        self._file: dict[str, safetensors.safe_open] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in files:
            try:
                handle = safetensors.safe_open(file, framework="numpy")
                slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(f"{file} is truncated or not a safetensors file ({error}); fetch it again") from error
            for key, part in slices.items():
                if key in self._file:
                    raise UserError(f"{self.source}: tensor {key} is in two files, one of them {file.name}")
                self._file[key], self.shapes[key], self.dtypes[key] = handle, tuple(part.get_shape()), part.get_dtype()

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor in its stored dtype (bfloat16 as ml_dtypes.bfloat16)."""
        return self._file[name].get_tensor(name)


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a file atomically; `metadata` should say {"format": "pt"}, without which transformers refuses it."""
    # safetensors writes the memory of a strided view in the wrong order without a word.
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.numpy.save_file(contiguous, temporary, metadata=dict(metadata))
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read


def read_json(path: str | Path) -> dict:
    """Returns the content of a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
