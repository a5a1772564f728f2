"""Shared set-up: 8 fake devices, compilation that is quick and cached, and shape checks of every annotated function."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile

# Most of what tests cost is the compilation of programs that run a few times on tiny arrays, so that optimising them
# costs more than it saves, in child processes too. Beside what JAX can turn off: XLA's older way of writing the loops
# of a fusion takes half of the time, and one LLVM module per program is cheaper than 32.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def known(flags: str) -> bool:
    """Whether this version of XLA has these flags: it aborts the process at one that it does not know."""
    check = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(check, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode == 0


os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:  # workers of xdist have it from the process that starts them
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if known(QUICK):
        flags.append(QUICK)
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # jobs that run twice (resume, child processes) compile once
    cache = tempfile.mkdtemp(prefix="hybrid_dit_tests_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("hybrid_dit", "beartype.beartype")

# What takes longest starts first, so that no process is left with a long file when the others are done.
FIRST = "test_trainer", "jobs/", "test_wan_tiny", "test_distiller", "pytorch/", "models/", "ops/"


def pytest_collection_modifyitems(items):
    folder = os.path.dirname(__file__)

    def rank(item):
        path = os.path.relpath(item.path, folder)
        return next((i for i, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))

    items.sort(key=rank)


@pytest.fixture
def optimised(monkeypatch):
    """What this test gives to `jax.jit` is compiled as users compile it: for bits and roundings that depend on that."""
    import jax

    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    if QUICK in os.environ["XLA_FLAGS"]:
        options["xla_cpu_use_fusion_emitters"] = True
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))
