import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hybrid_dit import sharding
from hybrid_dit.convert import tables
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.feature_maps import FEATURE_MAPS
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

WAN = WanConfig(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30)


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_every_parameter_of_a_hybrid_has_one_rule(kind):
    hybrid = (AttentionSpec("hybrid", 4, feature_map=FeatureMapSpec(kind)),) * WAN.num_layers
    params = abstract_dit(WAN, hybrid)
    places = sharding.param_shardings(sharding.data_mesh(), params)
    assert jax.tree.structure(places) == jax.tree.structure(params)


def test_wan_1_3b_is_spread_over_eight_devices():
    flat = tables.flatten(abstract_dit(WAN))
    places = tables.flatten(sharding.param_shardings(sharding.data_mesh(), abstract_dit(WAN)))
    per_device = sum(np.prod(places[path].shard_shape(x.shape)) for path, x in flat.items())
    # What is not split are vectors: 30 blocks x (10 biases + 4 norm scales + modulation) are 0.08% of the parameters.
    assert per_device <= 1.01 * sum(x.size for x in flat.values()) / 8


def test_rules_that_miss_or_overlap_are_errors():
    mesh = sharding.data_mesh()
    params = {"a": {"kernel": jnp.zeros((8, 8))}}
    with pytest.raises(ValueError, match="a/kernel matches 0"):
        sharding.param_shardings(mesh, params, [("a/kern", P())])  # the whole path must match
    with pytest.raises(ValueError, match="a/kernel matches 2"):
        sharding.param_shardings(mesh, params, [("a/.*", P()), (".*kernel", P("data"))])


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = sharding.data_mesh()
    params = {"even": jnp.zeros((16, 3)), "odd": jnp.zeros((12, 3)), "empty": {}}
    places = sharding.param_shardings(mesh, params, [(".*", P("data"))])
    assert places["even"].spec == P("data") and places["odd"].spec == P() and places["empty"] == {}


@pytest.mark.parametrize("devices, blocks", [(1, 30), (4, 32), (8, 32), (16, 32), (32, 32), (7, 35)])
def test_thirty_blocks_are_padded_to_what_divides(devices, blocks):
    assert sharding.padded(30, devices) == blocks


def test_a_mesh_of_blocks_videos_and_tokens():
    assert dict(sharding.distill_mesh(2, 2).shape) == {"block": 2, "data": 2, "seq": 2}
    assert dict(sharding.distill_mesh().shape) == {"block": 8, "data": 1, "seq": 1}
    for ways in ((3, 1), (0, 1), (4, 4)):
        with pytest.raises(UserError, match="8 devices .*mesh.data and mesh.seq"):
            sharding.distill_mesh(*ways)


def test_a_training_mesh_has_a_copy_of_the_weights_per_slice():
    assert dict(sharding.train_mesh().shape) == {"replica": 1, "data": 8, "seq": 1}
    assert dict(sharding.train_mesh(2, 2).shape) == {"replica": 2, "data": 2, "seq": 2}
    assert sharding.train_mesh(devices=jax.devices()[:1]).size == 1
    of_two_slices_in_turn = [0, 1] * 4
    assert sharding._arranged(of_two_slices_in_turn, 0, 1).tolist() == [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]
    assert sharding._arranged(of_two_slices_in_turn, 1, 4).tolist() == [[[0, 2, 4, 6], [1, 3, 5, 7]]]
    for ways in ((3, 1), (1, 3), (4, 4), (1, 0)):
        with pytest.raises(UserError, match="8 devices .*mesh.replicas and mesh.seq"):
            sharding.train_mesh(*ways)


@pytest.mark.parametrize(
    "processes, shares",
    [
        ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),  # a half each
        ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),  # tokens split within a process
        ([[0, 0, 1, 1]], [(0, 1), (0, 1)]),  # over both: each needs the whole batch
        ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_read_the_parts_that_their_devices_need(processes, shares):
    assert [sharding._share(np.array(processes), process) for process in range(len(shares))] == shares
    assert sharding.process_share(sharding.train_mesh()) == (0, 1)


@pytest.mark.parametrize("processes", [[[0], [1], [0], [1]], [[1], [0], [0], [1]], [[0], [0], [1]]])
def test_a_process_whose_devices_are_scattered_is_told(processes):
    with pytest.raises(UserError, match="not next to each other"):
        sharding._share(np.array(processes), 0)


def test_rules_over_all_axes_split_a_matrix_over_every_device():
    mesh = sharding.distill_mesh(2, 2)
    rules = sharding.over_all_axes(mesh, sharding.DIT_RULES)
    flat = tables.flatten(abstract_dit(WAN))
    places = tables.flatten(sharding.param_shardings(mesh, abstract_dit(WAN), rules))
    per_device = sum(np.prod(places[path].shard_shape(x.shape)) for path, x in flat.items())
    assert per_device <= 1.01 * sum(x.size for x in flat.values()) / 8  # as for one axis


def test_batches_split_where_they_divide():
    mesh = sharding.data_mesh()
    assert sharding.batch_sharding(mesh, 16).spec == P("data")
    assert sharding.batch_sharding(mesh, 4).is_fully_replicated
    mesh = sharding.train_mesh(2, 2)  # four ways for videos
    assert sharding.batch_sharding(mesh, 4).spec == P(("replica", "data"))
    assert sharding.batch_sharding(mesh, 2).is_fully_replicated


def test_to_device_and_back():
    mesh = sharding.data_mesh()
    tree = {"w": np.arange(48.0, dtype=np.float32).reshape(16, 3), "n": np.int32(7)}
    places = {"w": sharding.batch_sharding(mesh, 16), "n": sharding.replicated(mesh)}
    placed = sharding.put(tree, places)
    assert placed["w"].addressable_shards[3].data.shape == (2, 3) and placed["w"].sharding == places["w"]
    back = sharding.to_host(placed)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert isinstance(back["w"], np.ndarray) and back["w"].flags.writeable
