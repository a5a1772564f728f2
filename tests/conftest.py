"""Shared set-up: 8 fake devices, one compilation cache per run, and shape checks of every annotated function."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
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


@pytest.fixture(scope="module")
def compile_quickly():
    """For programs that run a few times on tiny arrays: optimising them costs more than it saves.

    From the first test that asks for it to the end of its module, in child processes too. Programs in memory are
    forgotten at both ends: JAX looks them up without regard to this option, and a later test of the same process that
    compares bits with another process would run the unoptimised ones.
    """
    import jax

    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
