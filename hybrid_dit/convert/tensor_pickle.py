"""Pickles of PyTorch as a description of tensors: no name in them is ever looked up, nothing is ever called.

`torch.load(weights_only=True)` runs no foreign code either, but it does call what it allows, so that a file of 100
bytes can make it allocate or compute without bound (`bytearray(10**10)`, a hash of nested tuples). A state dict needs
far less: dicts, numbers, texts, and tensors rebuilt from storages. This interpreter refuses everything else.
Opcodes: Python's `pickletools`. What PyTorch writes: `torch/_utils.py` and `torch/serialization.py`.
"""

import dataclasses
import io
import pickletools
from typing import Any

from hybrid_dit.convert.json_file import shown

MAX_BYTES = 10_000_000  # of a pickle; that of UMT5-XXL has 30 kB
MAX_STEPS = 150_000  # opcodes, 5 us each; one tensor takes some 32
_STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}
_DTYPES = {  # of tensors over an UntypedStorage: those for which PyTorch has no other
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
_ORDERED_DICT = "collections.OrderedDict"
_REBUILD = tuple(f"torch._utils._rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter"))


class ForeignCode(Exception):
    """A pickle names something that is no part of a tensor: loading it the usual way could run code."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of elements in the file: its key there, their dtype as safetensors writes it, and their number."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    """module.name of something that the pickle would have imported."""

    name: str


def read(stream: io.BytesIO) -> Any:
    """Returns the next pickle's value: dicts, lists, tuples, numbers, texts, `Tensor` and `Storage`.

    Containers may hold each other many times over, or themselves: don't print, compare or hash them.

    Raises:
        ForeignCode: it names anything beyond dicts and tensors.
        ValueError: it is broken, or uses what PyTorch doesn't for weights.
    """
    machine = _Machine()
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if step > MAX_STEPS:
                raise ValueError(f"the pickle has more than {MAX_STEPS:,} steps")
            machine.do(opcode.name, argument)
        (value,) = machine.stack
        return value
    except (IndexError, KeyError, TypeError, AttributeError) as error:  # too little on the stack, or the wrong things
        raise ValueError("the pickle is inconsistent") from error


class _Machine:
    """The stack machine of pickle, for the opcodes that state dicts are written with."""

    def __init__(self):
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}

    def do(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                if len(stack) < count:
                    raise IndexError
                stack[-count:] = [tuple(stack[-count:])]
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "TUPLE":
                self._back().append(tuple(stack))
            case "APPEND":
                item = stack.pop()
                _list(stack[-1]).append(item)
            case "APPENDS":
                _list(self._back()[-1]).extend(stack)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                _set(self._back()[-1], stack)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(module, name))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_made(function, arguments))
            case "BUILD":  # attributes of an OrderedDict: versions of the modules, which nobody needs here
                attributes = stack.pop()
                if not isinstance(stack[-1], dict) or not isinstance(attributes, dict):
                    raise ValueError("the pickle gives attributes to something that is no dict")
            case _:
                raise ValueError(f"the pickle uses {opcode}, which no state dict needs")

    def _back(self) -> list:
        """Returns to the stack below the last mark."""
        self.stack = self.marks.pop()
        return self.stack


def _list(value: Any) -> list:
    if not isinstance(value, list):
        raise ValueError("the pickle appends to something that is no list")
    return value


def _set(target: Any, pairs: list) -> None:
    if not isinstance(target, dict) or len(pairs) % 2:
        raise ValueError("the pickle sets items of something that is no dict")
    for key, value in zip(pairs[::2], pairs[1::2]):
        if not isinstance(key, str | int):  # hashing a tuple of tuples of ... can take for ever
            raise ValueError(f"the pickle has a {type(key).__name__} for a name")
        target[key] = value


def _name(module: Any, name: Any) -> _Name:
    full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "something without a name"
    short = full.removeprefix("torch.storage.").removeprefix("torch.")
    if full in (_ORDERED_DICT, *_REBUILD) or (full.startswith("torch.") and (short in _STORAGES or short in _DTYPES)):
        return _Name(full)
    raise ForeignCode(shown(full))


def _storage(identity: Any) -> Storage:
    """Returns what ("storage", type, key, device, number of elements[, view]) describes."""
    kind, storage_type, key, _, count = identity[:5]
    if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0 or any(identity[5:]):
        raise ValueError("the pickle has a storage that is described in an unknown way")
    return Storage(key, _STORAGES[storage_type.name.rpartition(".")[2]], count)


def _made(function: Any, arguments: tuple) -> Any:
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise ValueError("the pickle calls what is no function")
    if function.name == _ORDERED_DICT and not arguments:
        return {}
    if function.name.endswith("_parameter") and isinstance(arguments[0], Tensor):
        return arguments[0]
    if function.name not in _REBUILD:
        raise ForeignCode(f"a call of {function.name}")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage):
        raise ValueError("the pickle makes a tensor without a storage")
    dtype = _DTYPES[arguments[6].name.removeprefix("torch.")] if function.name.endswith("_v3") else storage.dtype
    return Tensor(storage, dtype, offset, shape, strides)
