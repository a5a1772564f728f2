"""Reading `.pth`, `.pt` and `.bin` files of PyTorch as data, never as code; needs torch, which is imported on use."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_dit.convert.json_file import shown
from hybrid_dit.convert.safetensors_file import DTYPES
from hybrid_dit.errors import UserError

SUFFIXES = (".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "model", "module")  # names under which training scripts nest the weights
MAX_PICKLE = 100_000_000
_TORCH_NAMES = {  # torch's dtype -> safetensors'
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}


class TorchFile:
    """One file that `torch.save` wrote: a dict of tensors, or one nested in a dict under a usual name.

    Attributes:
        path: the file.
        shapes: name -> shape.
        dtypes: name -> dtype as safetensors writes it.
        metadata: nothing, as far as this format goes.
        notes: what was unwrapped, for the person.
    """

    def __init__(self, path: Path):
        """Opens a file. The tensors of today's zip format stay on disk until they are read; older ones are read now.

        Raises:
            UserError: torch is missing, the file is broken, would run code, or holds something else than tensors.
        """
        self.path = path
        self.metadata: dict[str, str] = {}
        value, self.notes = self._unwrapped(self._load())
        if not isinstance(value, dict) or not value:
            raise UserError(f"{path} holds a {type(value).__name__} instead of named tensors; is it a file of weights?")
        wrong = [name for name, tensor in value.items() if not (isinstance(name, str) and _is_plain(tensor))]
        if wrong:
            some = ", ".join(f"{shown(name)} ({type(value[name]).__name__})" for name in wrong[:10])
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise UserError(f"{path} holds what is no plain tensor: {some}{more}; is it a file of weights?")
        self._tensors = value
        self.shapes = {name: tuple(tensor.shape) for name, tensor in value.items()}
        self.dtypes = {name: _TORCH_NAMES[_dtype_name(tensor)] for name, tensor in value.items()}

    def read(self, name: str, ranges: tuple[range, ...]) -> np.ndarray:
        """Returns a copy of the part of one tensor that `ranges` (one per axis, step 1) select."""
        import torch

        part = self._tensors[name][tuple(slice(r.start, r.stop) for r in ranges)]
        content = part.contiguous().reshape(-1).view(torch.uint8).numpy()  # NumPy has no bfloat16 that torch knows
        return np.array(content).view(DTYPES[self.dtypes[name]]).reshape([len(r) for r in ranges])

    def _load(self) -> object:
        try:
            import torch
        except ImportError as error:
            raise UserError(f"{self.path} needs PyTorch to be read: pip install 'hybrid_dit[torch]'") from error
        if not self.path.is_file():
            raise UserError(f"{self.path} is not a file")
        try:
            with open(self.path, "rb") as file:
                zipped = file.read(4) == b"PK\3\4"  # by which torch, too, tells the formats apart
            if zipped:
                self._check_zip()
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            if named:
                raise UserError(
                    f"{self.path} is refused: it holds more than tensors, and reading it would run code of its own "
                    f"({shown(named[1])}). Nothing was run; get the weights as .safetensors"
                ) from error
            raise self._broken(error) from error
        except UserError:
            raise
        except Exception as error:  # torch raises whatever the broken bytes lead it to
            raise self._broken(error) from error

    def _check_zip(self) -> None:
        """Refuses archives that torch did not write: packed (bombs) or with entries beyond the file."""
        size = self.path.stat().st_size
        with zipfile.ZipFile(self.path) as archive:
            entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise self._broken(f"{shown(entry.filename)} in it is compressed, which torch never does")
            if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE:
                raise self._broken(f"{shown(entry.filename)} in it has {entry.file_size:,} bytes")
        total = sum(entry.file_size for entry in entries)
        if total > size:
            raise self._broken(f"its entries claim {total:,} bytes, but the whole file has {size:,}")

    def _unwrapped(self, value: object) -> tuple[Any, tuple[str, ...]]:
        notes: list[str] = []
        for _ in WRAPPERS:  # {"module": {"state_dict": ...}} occurs; more levels than names don't
            inner = [key for key in WRAPPERS if isinstance(value, dict) and isinstance(value.get(key), dict)]
            if not inner:
                break
            others = [shown(str(key), 40) for key in value if key != inner[0]]
            beside = f"; left out: {', '.join(others[:10])}{', ...' if len(others) > 10 else ''}" if others else ""
            notes.append(f"{self.path.name}: weights are those under {inner[0]!r}{beside}")
            value = value[inner[0]]
        return value, tuple(notes)

    def _broken(self, why: object) -> UserError:
        lines = str(why).strip().splitlines() or [type(why).__name__]
        return UserError(f"{self.path} is damaged or not a file of torch.save ({shown(lines[0])}); fetch it again")


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_plain(tensor: object) -> bool:
    """Whether a value is an ordinary tensor whose elements all exist in the file (an expanded one has fewer)."""
    import torch

    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and _dtype_name(tensor) in _TORCH_NAMES
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )
