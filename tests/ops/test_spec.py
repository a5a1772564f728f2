"""Specs: static, labelled, and refusing what they don't know."""

import jax
import pytest

from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec, from_label


@pytest.mark.parametrize("label", ["softmax", "linear", "R1", "R8", "R16"])
def test_labels_round_trip_and_keep_the_other_fields(label):
    fields = {"pattern": "lattice", "feature_map": FeatureMapSpec("elu"), "stabiliser": "lse"}
    spec = from_label(label, **fields)
    assert spec.label == label
    assert {name: getattr(spec, name) for name in fields} == fields
    assert spec.converted == (label != "softmax")


@pytest.mark.parametrize("label", ["", "R", "Rx", "R-2", "r2", "hybrid", "R0"])
def test_labels_that_are_none_are_refused(label):
    with pytest.raises(UserError):
        from_label(label)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"kind": "sofmax"}, "attention kind 'sofmax' is unknown; choose one of softmax, linear, hybrid"),
        ({"pattern": "grid"}, "attention pattern 'grid' is unknown; choose one of stride, lattice"),
        ({"stabiliser": "min"}, "attention stabiliser 'min' is unknown; choose one of max, lse"),
        ({"rate": 0}, "rate must be at least 1, got 0"),
    ],
)
def test_a_wrong_field_is_named(fields, says):
    with pytest.raises(UserError, match=says):
        AttentionSpec(**fields)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"activation": "gelu"}, "activation 'gelu' is unknown; choose one of softplus, relu, exp, elu, square"),
        ({"hidden": -1}, "hidden width of at least 1, or 0"),
    ],
)
def test_a_wrong_field_of_a_feature_map_is_named(fields, says):
    with pytest.raises(UserError, match=says):
        FeatureMapSpec(**fields)


@pytest.mark.parametrize("fields", [{"degree": 0}, {"layers": 0}])
def test_feature_maps_need_a_degree_and_a_layer(fields):
    with pytest.raises(UserError, match="at least|>= 1"):
        FeatureMapSpec(**fields)


def test_equal_specs_share_one_compilation():
    count = 0

    def f(x, spec):
        nonlocal count
        count += 1
        return x

    jitted = jax.jit(f, static_argnames="spec")
    for _ in range(2):
        jitted(1.0, spec=from_label("R2"))
    assert count == 1
