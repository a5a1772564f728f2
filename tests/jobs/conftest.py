"""JAX programs of these tests run a few times on tiny arrays."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def quickly(compile_quickly):
    """Every test here compiles quickly."""
