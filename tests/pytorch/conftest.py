"""JAX programs of these tests run once or twice on tiny arrays: optimising them costs more than it saves."""

import jax
import pytest


@pytest.fixture(autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
