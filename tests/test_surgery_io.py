import jax
import numpy as np
import pytest

from configs import common
from hybrid_dit import surgery, surgery_io
from hybrid_dit.convert.files import write_safetensors
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.feature_maps import FEATURE_MAPS
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

WAN = WanConfig(dim=12, num_heads=2, ffn_dim=8, num_layers=3)


def distill(**changes):
    section = common.get_config("distill", "tiny").distill
    section.update(changes)
    return section


def test_specs_follow_the_config():
    section = distill(rates=("linear", "R8"), pattern="lattice", stabiliser="lse", degree=3, layers=1)
    common_fields = {"pattern": "lattice", "feature_map": FeatureMapSpec("poly", 3, 1), "stabiliser": "lse"}
    assert surgery_io.specs_from_config(section) == {
        "linear": AttentionSpec("linear", **common_fields),
        "R8": AttentionSpec("hybrid", 8, **common_fields),
    }
    assert list(surgery_io.specs_from_config(section)) == ["linear", "R8"]


@pytest.mark.parametrize("rates", [("R2", "R2"), ("R0",), ("fast",)])
def test_bad_rates(rates):
    with pytest.raises(UserError):
        surgery_io.specs_from_config(distill(rates=rates))


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_maps_come_back_bit_for_bit_and_in_order(tmp_path, kind):
    specs = surgery_io.specs_from_config(distill(feature_map=kind, rates=("R8", "linear", "R2")))
    maps = {s: surgery.init_maps(jax.random.key(i), WAN, spec) for i, (s, spec) in enumerate(specs.items())}
    path = tmp_path / surgery_io.MAPS_FILE
    surgery_io.save_maps(path, maps)
    back = surgery_io.load_maps(path)
    assert list(back) == ["R8", "linear", "R2"]  # not the alphabet's order
    assert jax.tree.structure(back) == jax.tree.structure(maps)
    jax.tree.map(np.testing.assert_array_equal, back, maps)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        surgery_io.load_maps(tmp_path / "maps.safetensors")
    write_safetensors(tmp_path / "maps.safetensors", {"R2/q/w0": np.zeros(3, np.float32)}, {})
    with pytest.raises(UserError, match="no feature maps of a distillation"):
        surgery_io.load_maps(tmp_path / "maps.safetensors")


def test_the_choice_comes_back(tmp_path):
    path = tmp_path / surgery_io.CHOICE_FILE
    numbers = {"cost": 3, "softmax_cost": 4.5, "predicted_error": np.float64(0.1), "attention_flops_saved": 1 / 3}
    surgery_io.save_choice(path, ("R4", "softmax"), budget="1R4", **numbers)
    assert surgery_io.load_choice(path) == ["R4", "softmax"]


@pytest.mark.parametrize("text", ["{}", '{"blocks": "R4"}', '{"blocks": [4]}'])
def test_a_choice_without_labels_is_refused(tmp_path, text):
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(UserError, match="one label per block"):
        surgery_io.load_choice(tmp_path / "rates.json")
