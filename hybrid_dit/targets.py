"""Accelerators that programs are compiled for, whether they are here or not: TPU topologies, or fake CPU devices."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from hybrid_dit.errors import UserError

# What the compiler lets a program use on one device, GiB (libtpu 0.0.42; `tests/test_targets.py` asks it).
HBM = {"v4": 15.25, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
# Dense 16-bit matrix products, FLOP/s, as the makers state them, by the start of a device's `device_kind`.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,  # half a chip: it is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
}
# What comes in through the links between the chips of a pod, bytes/s: half of the bidirectional bandwidth per chip that
# Google's pages on each generation state (docs.cloud.google.com/tpu/docs/v5e and so on).
LINKS = {
    "TPU v5 lite": 200e9,
    "TPU v5e": 200e9,
    "TPU v5p": 600e9,
    "TPU v5": 600e9,
    "TPU v6": 400e9,
}
_LIBTPU = {  # libtpu where there is no TPU
    "TPU_SKIP_MDS_QUERY": "1",  # or it asks the metadata server of a TPU VM
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process is refused, as if there were a TPU to share
    "TPU_WORKER_HOSTNAMES": "localhost",  # these two, of any TPU, or it complains at length
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}
GIB = 2**30
EXAMPLES = "v5e:4x4, v5p:2x2x2, v6e:16x16, v4:2x2x1, tpu7x:2x2x1, v5e:1x1 (one chip), or cpu:8 (fake devices)"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: as the user wrote it.
        devices: of the topology; they can be put in a `Mesh` and compiled for, not run on.
        memory: bytes that a program may use on one device; None for CPU.
    """

    name: str
    devices: Sequence[jax.Device]
    memory: int | None

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return self.memory is not None


def parse(name: str, slices: int = 1) -> Target:
    """Returns the devices of "GENERATION:TOPOLOGY".

    Args:
        name: as in `EXAMPLES`; Google Cloud's names of the topologies.
        slices: this many pods of the same topology, connected by the data-centre network.

    Raises:
        UserError: an unknown name, or no libtpu.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in {"cpu", *HBM}:
        raise UserError(f"target={name!r} is unknown; write one like {EXAMPLES}")
    generation, topology = match.groups()
    jax.config.update("jax_platforms", "cpu")  # nothing will run, and looking for accelerators takes long
    if generation == "cpu":
        return Target(name, _cpu(int(topology) if topology.isdigit() else 0, name), None)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"target={name} needs the TPU compiler, which runs without a TPU: pip install 'hybrid_dit[tpu]'"
        )
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    sizes = [int(n) for n in topology.split("x")]
    options = {"num_slices": slices} if slices > 1 else {}
    if all(n == 1 for n in sizes):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # JaxRuntimeError or ValueError, by version
        raise UserError(f"target={name}: {str(error).splitlines()[0]}; names that work look like {EXAMPLES}") from error
    return Target(name, tuple(found.devices), int(HBM[generation] * GIB))


def _cpu(count: int, name: str) -> tuple[jax.Device, ...]:
    if count < 1:
        raise UserError(f"target={name!r} is unknown; a number of fake CPU devices looks like cpu:8")
    with contextlib.suppress(RuntimeError):  # JAX has started already: what it has must do
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"target={name}: this process has {len(devices)} CPU devices; start one with that target alone")
    return tuple(devices[:count])


def peak(device_kind: str) -> float | None:
    """Returns the peak of one device in FLOP/s (16 bits, dense); None if it is not known, as for CPUs."""
    return _of_kind(PEAK, device_kind)


def links(device_kind: str) -> float | None:
    """Returns how fast a device receives from others of its pod, in bytes/s; None if it is not known."""
    return _of_kind(LINKS, device_kind)


def _of_kind(table: dict[str, float], device_kind: str) -> float | None:
    names = [name for name in table if device_kind.startswith(name)]
    return table[max(names, key=len)] if names else None


def needed_bytes(message: str) -> tuple[int, int] | None:
    """Returns (bytes needed, bytes there are) from the TPU compiler's message that a program doesn't fit, else None."""
    size = r"([\d.]+)([KMGTP]?)"
    total = re.search(rf"total memory required.*?\({size}\) exceeds available HBM \({size}\)", message)
    used = re.search(rf"Used {size} of {size} hbm", message, re.IGNORECASE)
    match = total or used
    if not match:
        return None
    units = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
    values = match.groups()
    return tuple(int(float(n) * 1024 ** units[u]) for n, u in zip(values[::2], values[1::2]))


class DoesNotFit(Exception):
    """The compiler found no way to fit a program into a device.

    Attributes:
        needed: bytes that it would take.
        available: bytes that there are.
    """

    def __init__(self, needed: int, available: int):
        super().__init__(f"{needed / GIB:.2f} GiB needed, {available / GIB:.2f} available")
        self.needed, self.available = needed, available


def compile_anew(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles without the compilation cache: programs from there would have no compile time.

    Raises:
        DoesNotFit: the devices have too little memory.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = needed_bytes(str(error))
        if sizes is None:
            raise
        raise DoesNotFit(*sizes) from error
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
