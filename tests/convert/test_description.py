"""hybrid_config.json: what is written is read; whatever is wrong is said with its place."""

import dataclasses
import json

import pytest

from hybrid_dit.convert import description
from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

PHI = FeatureMapSpec("poly", 3, 1)
SPECS = (
    AttentionSpec("hybrid", 2, "lattice", PHI, "lse"),
    AttentionSpec(),
    AttentionSpec("hybrid", 4, feature_map=PHI),
    AttentionSpec("linear", feature_map=PHI),
    AttentionSpec("hybrid", 8, feature_map=PHI),
)


def test_what_is_written_is_read(tmp_path):
    description.write_description(tmp_path, SPECS)
    assert description.read_description(tmp_path, 5) == SPECS


def test_a_teacher_has_no_description(tmp_path):
    description.write_description(tmp_path, (AttentionSpec(),) * 5)
    assert not list(tmp_path.iterdir()) and description.read_description(tmp_path, 5) == ()


def test_fields_of_later_releases_are_optional_and_left_out_at_their_default(tmp_path):
    """So that files of this release are read by earlier ones where those can compute what they say."""
    later = {f.name for f in dataclasses.fields(FeatureMapSpec)} - {"kind", "degree", "layers"}
    description.write_description(tmp_path, SPECS)
    blocks = json.loads((tmp_path / description.FILE).read_text())["blocks"]
    assert all(not later & block["feature_map"].keys() for block in blocks)


CHANGES = [
    (lambda d: d.update(version=2), "version 2; this release reads version 1"),
    (lambda d: d.update(format="other"), "not a description of a hybrid"),
    (lambda d: d.update(extra=1), "unknown fields: extra"),
    (lambda d: d["blocks"].pop(), "describes 4 blocks, but the model has 5"),
    (lambda d: d.update(blocks=7), "describes no list of blocks"),
    (lambda d: d["blocks"][1].update(window=3), "block 1 has unknown fields: window"),
    (lambda d: d["blocks"][1].pop("rate"), "block 1 has missing fields: rate"),
    (lambda d: d["blocks"][2].update(rate="4"), "block 2: rate is '4', not a whole number"),
    (lambda d: d["blocks"][2].update(rate=0), "block 2: hybrid rate must be at least 1"),
    (lambda d: d["blocks"][2].update(kind="sparse"), "block 2: attention kind 'sparse' is unknown"),
    (lambda d: d["blocks"][2].update(feature_map="poly"), "block 2, feature_map is not an object"),
    (lambda d: d["blocks"][2]["feature_map"].update(width=3), "block 2, feature_map has unknown fields: width"),
    (lambda d: d["blocks"][2]["feature_map"].update(degree=2.5), "feature_map: degree is 2.5, not a whole number"),
    (lambda d: d["blocks"][2]["feature_map"].update(degree=True), "feature_map: degree is True, not a whole number"),
]




@pytest.mark.parametrize("change, message", CHANGES, ids=[message for _, message in CHANGES])
def test_a_description_that_is_wrong(change, message, tmp_path):
    description.write_description(tmp_path, SPECS)
    path = tmp_path / description.FILE
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        description.read_description(tmp_path, 5)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\udcff"])
def test_a_description_that_is_no_json(text, tmp_path):
    (tmp_path / description.FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=description.FILE):
        description.read_description(tmp_path, 5)
