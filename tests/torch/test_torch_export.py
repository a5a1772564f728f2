"""Reading exports: single file, shards with and without index; whatever is wrong is said with its place."""

import json
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from hybrids import every_kind
from torch import nn

from hybrid_dit.convert import hybrid
from hybrid_dit.errors import UserError
from hybrid_dit.torch import export

NAMES = ("weight", "bias")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def layer():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def write(folder, how):
    """Stores `layer()` in one file, or in two shards with or without an index."""
    folder.mkdir(exist_ok=True)
    state = layer().state_dict()
    if how == "single":
        safetensors.torch.save_file(state, folder / "diffusion_pytorch_model.safetensors")
        return
    for name, file in zip(NAMES, SHARDS):
        safetensors.torch.save_file({name: state[name]}, folder / file)
    if how == "index":
        write_index(folder, dict(zip(NAMES, SHARDS)))


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder):
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    export.load_into(model, folder, lambda name, stored: stored, "cpu")
    return model


@pytest.mark.parametrize("how", ["single", "index", "shards"])
def test_reads_every_form_of_files(how, tmp_path):
    write(tmp_path, how)
    for name, tensor in load(tmp_path).state_dict().items():
        assert torch.equal(tensor, layer().state_dict()[name])


def test_an_index_decides_which_files_are_read(tmp_path):
    write(tmp_path, "index")
    safetensors.torch.save_file(layer().state_dict(), tmp_path / "other.safetensors")
    assert torch.equal(load(tmp_path).weight, layer().weight)


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "..", "a.bin", ""]
)
def test_an_index_must_not_lead_out_of_its_folder(file, tmp_path):
    write(tmp_path, "index")
    write_index(tmp_path, {"weight": file, "bias": SHARDS[1]})
    with pytest.raises(UserError, match="not a .safetensors file of its own folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"weight": SHARDS[0]}, "doesn't fit its files at"),  # a shard that it doesn't name is not read
        ({"weight": SHARDS[1], "bias": SHARDS[1]}, "doesn't fit its files at weight"),
        ({"weight": SHARDS[0], "bias": "gone.safetensors"}, "gone.safetensors is missing, truncated or no"),
        ({"weight": 3}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit(weight_map, message, tmp_path):
    write(tmp_path, "index")
    write_index(tmp_path, weight_map)
    if weight_map == {"weight": SHARDS[0]}:
        message = "missing bias"
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_files_that_are_broken_or_hold_other_tensors(tmp_path):
    with pytest.raises(UserError, match="no weights in"):
        load(tmp_path)
    write(tmp_path, "single")
    state = layer().state_dict()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file({"weight": state["weight"], "scale": state["bias"]}, path)
    with pytest.raises(UserError, match="missing bias; unexpected scale"):
        load(tmp_path)
    safetensors.torch.save_file({**state, "bias": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"bias in .* another shape than the model: \(3,\) in .*, \(2,\) in the model"):
        load(tmp_path)
    write(tmp_path, "shards")
    with pytest.raises(UserError, match="is in two files"):
        load(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="missing, truncated or no safetensors"):
        load(tmp_path)


def test_long_lists_are_cut(tmp_path):
    names = {f"extra{i:02}": torch.zeros(1) for i in range(15)}
    safetensors.torch.save_file({**layer().state_dict(), **names}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="unexpected extra00, .*extra09 and 5 more$"):
        load(tmp_path)


def test_description_is_that_of_the_jax_side(tmp_path):
    specs = every_kind("hedgehog")
    hybrid.write_description(tmp_path, specs)
    assert export.read_description(tmp_path, len(specs)) == specs
    (tmp_path / "again").mkdir()
    export.write_description(tmp_path / "again", specs)
    assert hybrid.read_description(tmp_path / "again", len(specs)) == specs
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "again").rename(tmp_path / "pipeline/transformer")
    assert export.find_transformer(tmp_path / "pipeline") == tmp_path / "pipeline/transformer"


CHANGES: list[tuple[Callable[[dict], object], str]] = [
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
    (lambda d: d["blocks"][2]["feature_map"].update(kind="relu"), "feature map 'relu' is unknown"),
    (lambda d: [b.update(kind="softmax") for b in d["blocks"]], "converts no block"),
]


@pytest.mark.parametrize("change, message", CHANGES, ids=[message for _, message in CHANGES])
def test_a_description_that_is_wrong(change, message, tmp_path):
    hybrid.write_description(tmp_path, every_kind())
    path = tmp_path / export.DESCRIPTION
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        export.read_description(tmp_path, 5)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\udcff"])
def test_a_description_that_is_no_json(text, tmp_path):
    (tmp_path / export.DESCRIPTION).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=export.DESCRIPTION):
        export.read_description(tmp_path, 5)
