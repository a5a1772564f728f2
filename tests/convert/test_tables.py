"""Key tables: what a row means, that they are invertible, and that nothing slips through."""

import numpy as np
import pytest

from hybrid_dit.convert import tables
from hybrid_dit.convert.tables import Rule
from hybrid_dit.errors import UserError

RULES = [
    Rule("layers.{i}.q.weight", "blocks/q/kernel", "linear"),
    Rule("layers.{i}.table", "blocks/table", "same", (1, 2, -1)),
    Rule("patch.weight", "patch/kernel", "patch", (-1, 3, 1, 2, 2)),
    Rule("conv.weight", "conv/kernel", "conv3d"),
    Rule("out.{j}.bias", "out_{j}/bias"),
]


def params(seed=0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "blocks": {"q": {"kernel": array(3, 4, 5)}, "table": array(3, 2, 6)},
        "patch": {"kernel": array(12, 7)},
        "conv": {"kernel": array(3, 2, 2, 4, 5)},
        "out_0": {"bias": array(8)},
        "out_1": {"bias": array(9)},
    }


def test_names_and_shapes_of_the_pytorch_side():
    entries = tables.expand(RULES, params())
    assert {name: entry.torch_shape for name, entry in entries.items()} == {
        **{f"layers.{i}.q.weight": (5, 4) for i in range(3)},
        **{f"layers.{i}.table": (1, 2, 6) for i in range(3)},
        "patch.weight": (7, 3, 1, 2, 2),
        "conv.weight": (5, 4, 3, 2, 2),
        "out.0.bias": (8,),
        "out.1.bias": (9,),
    }


def test_import_undoes_export_bit_for_bit():
    tree = params()
    entries = tables.expand(RULES, tree)
    stored = dict(tables.export_tree(entries, tree))
    assert all(array.flags.c_contiguous for array in stored.values())
    assert {name: array.shape for name, array in stored.items()} == {n: e.torch_shape for n, e in entries.items()}
    again = tables.import_tree(entries, stored.__getitem__)
    for path, array in tables.flatten(tree).items():
        np.testing.assert_array_equal(tables.flatten(again)[path], array)


def test_a_matrix_and_a_convolution_compute_the_same_on_both_sides():
    tree = params()
    stored = dict(tables.export_tree(tables.expand(RULES, tree), tree))
    x = np.arange(4.0)
    np.testing.assert_allclose(stored["layers.1.q.weight"] @ x, x @ tree["blocks"]["q"]["kernel"][1], rtol=1e-6)
    # Flax's patch kernel takes (time, row, column, channel) patches flattened, PyTorch's a Conv3d of channel first.
    patch = np.random.default_rng(1).standard_normal((1, 2, 2, 3))
    expected = np.einsum("octyx,tyxc->o", stored["patch.weight"], patch)
    np.testing.assert_allclose(patch.reshape(-1) @ tree["patch"]["kernel"], expected, rtol=1e-5)
    window = np.random.default_rng(2).standard_normal((3, 2, 2, 4))
    expected = np.einsum("oityx,tyxi->o", stored["conv.weight"], window)
    np.testing.assert_allclose(np.einsum("tyxi,tyxio->o", window, tree["conv"]["kernel"]), expected, rtol=1e-5)


def test_dtype_on_import():
    tree = params()
    entries = tables.expand(RULES, tree)
    stored = {name: array.astype(np.float16) for name, array in tables.export_tree(entries, tree)}
    kept = tables.flatten(tables.import_tree(entries, stored.__getitem__))
    wide = tables.flatten(tables.import_tree(entries, stored.__getitem__, np.float32))
    for path in kept:
        assert kept[path].dtype == np.float16 and wide[path].dtype == np.float32
        np.testing.assert_array_equal(kept[path], wide[path])


@pytest.mark.parametrize(
    "rules",
    [
        RULES[1:],  # a parameter without a rule
        [*RULES, Rule("other", "conv/kernel")],  # two rules for one
        [*RULES[:-1], Rule("out.bias", "out_0/bias"), Rule("out.bias", "out_1/bias")],  # two parameters, one name
    ],
)
def test_tables_must_cover_every_parameter_once(rules):
    with pytest.raises(ValueError):
        tables.expand(rules, params())


def found():
    return {name: entry.torch_shape for name, entry in tables.expand(RULES, params()).items()}


def test_check_accepts_what_fits_and_optional_surplus():
    entries = tables.expand(RULES, params())
    tables.check(entries, found(), "file")
    tables.check(entries, found() | {"extra": (1,)}, "file", optional=lambda key: key == "extra")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conv.weight": (5, 4, 3, 2, 1)}, r"conv.weight has shape \[5, 4, 3, 2, 1\], expected \[5, 4, 3, 2, 2\]"),
        ({"conv.weight": None}, r"missing conv.weight \[5, 4, 3, 2, 2\]"),
        ({"conv.wieght": (1,)}, r"unexpected conv.wieght \(nearest expected name: conv.weight\)"),
        ({"zzz": (1,)}, r"unexpected zzz$"),
    ],
)
def test_check_tells_key_expected_and_found(change, message):
    names = {name: shape for name, shape in (found() | change).items() if shape is not None}
    with pytest.raises(UserError, match=message) as error:
        tables.check(tables.expand(RULES, params()), names, "some/file")
    assert str(error.value).startswith("some/file does not fit the model (1 problems)")


def test_check_shows_ten_problems_and_counts_the_rest():
    with pytest.raises(UserError, match="and 2 more") as error:
        tables.check(tables.expand(RULES, params()), {f"zzz{i}": (1,) for i in range(2)}, "file")
    assert str(error.value).count("\n") == 11
