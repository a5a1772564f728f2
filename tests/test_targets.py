"""Names of targets, what the compiler says when memory runs out; with libtpu (slow) every name of the documentation."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_dit import targets
from hybrid_dit.errors import UserError


def test_fake_cpu_devices():
    target = targets.parse("cpu:4")
    assert list(target.devices) == jax.devices("cpu")[:4] and target.memory is None and not target.is_tpu


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v9:2x2", "4x4", "v5e:4x", "gpu:8", "cpu:2x2", "cpu:0", ""])
def test_unknown_names_show_some_that_work(name):
    with pytest.raises(UserError, match="unknown; .*cpu:8"):
        targets.parse(name)


def test_more_fake_devices_than_this_process_has():
    with pytest.raises(UserError, match="cpu:64: this process has 8 CPU devices"):
        targets.parse("cpu:64")


def test_without_the_tpu_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"v5e:4x4 needs the TPU compiler.*pip install 'hybrid_dit\[tpu\]'"):
        targets.parse("v5e:4x4")


@pytest.mark.parametrize(
    "message, sizes",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (129.00G) "
            "exceeds available HBM (15.75G).",
            (129.0, 15.75),
        ),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 1.50T of 15.75G hbm.",
            (1536, 15.75),
        ),
    ],
)
def test_needed_bytes_of_the_compilers_messages(message, sizes):
    assert targets.needed_bytes(message) == tuple(int(s * 2**30) for s in sizes)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("Quadro", None),
    ],
)
def test_peaks_by_the_names_that_devices_have(kind, peak):
    assert targets.peak(kind) == peak


def test_needed_bytes_of_another_error():
    assert targets.needed_bytes("INVALID_ARGUMENT: something else (3.00G)") is None


TOPOLOGIES = {  # devices: chips, or cores where a chip is two devices (v4 without megacore, tpu7x)
    "v4:2x2x1": 8,
    "v4:4x4x16": 512,
    "v5e:1x1": 1,
    "v5e:2x2": 4,
    "v5e:16x16": 256,
    "v5p:1x1x1": 1,
    "v5p:2x2x1": 4,
    "v5p:8x8x16": 1024,
    "v6e:2x2": 4,
    "v6e:16x16": 256,
    "tpu7x:2x2x1": 8,
    "tpu7x:4x4x8": 256,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_topologies_and_their_memory(name):
    target = targets.parse(name)
    assert len(target.devices) == TOPOLOGIES[name] and target.is_tpu
    assert len(targets.parse(name, slices=2).devices) == 2 * TOPOLOGIES[name]
    one = NamedSharding(Mesh(np.array(target.devices[:1]), ("one",)), PartitionSpec())
    huge = jax.ShapeDtypeStruct((2**39,), jnp.float32, sharding=one)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: x * 2).lower(huge).compile()
    needed, available = targets.needed_bytes(str(caught.value))
    assert needed == 2 * 4 * 2**39  # input and output
    assert available == target.memory


@pytest.mark.slow
def test_a_topology_that_does_not_exist():
    with pytest.raises(UserError, match="v5e:3x5: .*names that work look like"):
        targets.parse("v5e:3x5")
