"""What a stage ran on: versions and devices, for whoever wants to get the same result again."""

import importlib.metadata
import os
import platform
import sys

from hybrid_dit import processes

PACKAGES = ("hybrid_dit", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "av")


def describe() -> dict[str, str]:
    """Returns {what: text}: versions of Python and packages, the system, and JAX's devices.

    Devices are left out where JAX has not started: asking for them would take hold of an accelerator, or wait for the
    other hosts of a pod.
    """
    about = {"python": platform.python_version(), "system": platform.platform(), "CPU cores": str(os.cpu_count())}
    bridge = sys.modules.get("jax._src.xla_bridge")  # nothing public tells whether JAX has started
    if getattr(bridge, "backends_are_initialized", bool)():
        jax = sys.modules["jax"]
        kinds = [device.device_kind for device in jax.devices()]
        counts = {kind: kinds.count(kind) for kind in kinds}
        about["devices"] = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
        about["processes"] = str(processes.count())
    return about | {name: version for name in PACKAGES if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that isn't installed
        return None
