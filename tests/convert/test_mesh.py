"""Loading straight to a mesh: the right values on every device, and nothing read that no device needs."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from pipelines import random_like
from several import Several

from hybrid_dit import convert
from hybrid_dit.convert import mesh, sources, tables
from hybrid_dit.convert.files import write_safetensors
from hybrid_dit.convert.params import to_tree
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.sharding import DIT_RULES, data_mesh

DIT = WanConfig(dim=256, num_heads=2, ffn_dim=512, num_layers=2, text_dim=64)
PROGRAM = """
import json, pathlib, sys
from hybrid_dit import processes
options, (file, folder) = processes.parse(sys.argv[1:])
with processes.joined(options):
    import jax
    import numpy as np
    from hybrid_dit import convert
    from hybrid_dit.convert import sources, tables
    from hybrid_dit.convert.params import to_tree
    from hybrid_dit.sharding import data_mesh
    opened, Weights = [], sources.Weights
    sources.Weights = lambda path: opened.append(Weights(path)) or opened[-1]
    arrays = tables.flatten(convert.load_sharded(file, data_mesh()))
    read = opened[0].bytes_read
    expected = tables.flatten(to_tree(sources.open_part(file).params))
    assert arrays.keys() == expected.keys() and len(jax.devices()) == 8
    for path, array in arrays.items():
        assert len(array.addressable_shards) == 4
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[path][shard.index], err_msg=path)
    told = {"read": read, "kernel": str(arrays["blocks/ffn_0/kernel"].sharding.spec)}
    pathlib.Path(folder, f"told{jax.process_index()}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("mesh") / "dit.safetensors"
    tree = random_like(sources.abstract(DIT), np.random.default_rng(0))
    table = sources.entries(DIT, (), "wan", tree)
    named = {name: array.astype(ml_dtypes.bfloat16) for name, array in tables.export_tree(table, tree)}
    write_safetensors(file, named, {})
    return file


def test_two_processes_read_their_own_part(file, tmp_path):
    for index, (code, _, error) in enumerate(Several(tmp_path, PROGRAM, str(file), str(tmp_path)).finish()):
        assert code == 0, error
        told = json.loads((tmp_path / f"told{index}.json").read_text())
        assert "data" in told["kernel"]
        # Half of the matrices, all of the vectors, and the patch embedding whole.
        assert told["read"] <= 0.6 * file.stat().st_size


def replicated_but(pattern, spec):
    return ((pattern, spec), (rf"(?!{pattern}$).*", PartitionSpec()))


@pytest.mark.parametrize(
    "rules",
    [
        DIT_RULES,
        replicated_but(r"blocks/ffn_0/kernel", PartitionSpec(None, None, "data")),
        replicated_but(r"blocks/ffn_2/kernel", PartitionSpec("data")),  # 2 blocks over 2 devices
        replicated_but(r"patch_embedding/kernel", PartitionSpec(None, "data")),
    ],
)
def test_values_on_the_mesh_are_those_of_the_file(file, rules):
    devices = jax.devices()[:2]
    arrays = convert.load_sharded(file, Mesh(np.array(devices), ("data",)), rules)
    expected = tables.flatten(to_tree(sources.open_part(file).params))
    for path, array in tables.flatten(arrays).items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(np.asarray(array), expected[path], err_msg=path)


def test_devices_in_scattered_places_read_no_more_than_they_hold(file, monkeypatch):
    """A process that has the first and the last of 8 devices doesn't read what lies between them."""
    opened = []
    monkeypatch.setattr(sources, "Weights", lambda path, make=sources.Weights: opened.append(make(path)) or opened[-1])
    param = sources.open_part(file).params["blocks/ffn_0/kernel"]
    everything = (slice(None), slice(None), slice(None))
    first, last = (everything[0], slice(0, 32), everything[2]), (everything[0], slice(224, None), everything[2])
    parts = mesh.read_parts(param, [first, last, first])
    assert opened[0].bytes_read == 2 * (2 * 32 * 512) * 2
    whole = param.read(everything)
    assert set(parts) == {((0, 2), (0, 32), (0, 512)), ((0, 2), (224, 256), (0, 512))}
    np.testing.assert_array_equal(parts[(0, 2), (0, 32), (0, 512)], whole[:, :32])
    np.testing.assert_array_equal(parts[(0, 2), (224, 256), (0, 512)], whole[:, 224:])


def test_the_dtype_can_be_chosen(file):
    arrays = convert.load_sharded(file, data_mesh(), dtype=np.float32)
    assert {str(array.dtype) for array in jax.tree.leaves(arrays)} == {"float32"}
