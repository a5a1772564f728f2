"""Reading exports into PyTorch models: every form of files; what the model doesn't want is named."""

import json

import pytest
import safetensors.torch
import torch
from hybrids import every_kind
from torch import nn

from hybrid_dit.convert import description
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


def test_files_that_are_broken_or_hold_other_tensors(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
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
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load(tmp_path)


def test_long_lists_are_cut(tmp_path):
    names = {f"extra{i:02}": torch.zeros(1) for i in range(15)}
    safetensors.torch.save_file({**layer().state_dict(), **names}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="unexpected extra00, .*extra09 and 5 more$"):
        load(tmp_path)


def test_bfloat16_is_kept(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in layer().state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in load(tmp_path).state_dict().items())


def test_a_hybrid_is_found_in_its_pipeline(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        export.find_transformer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="so it is no hybrid"):
        export.find_transformer(tmp_path)
    (tmp_path / "transformer").mkdir()
    description.write_description(tmp_path / "transformer", every_kind())
    for folder in (tmp_path, tmp_path / "transformer"):
        assert export.find_transformer(folder) == tmp_path / "transformer"
    assert export.read_attention(tmp_path / "transformer", 4) == every_kind()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b.update(kind="softmax"), "converts no block"),
        (lambda b: b["feature_map"].update(kind="relu"), "block 0: feature map 'relu' is unknown in PyTorch"),
    ],
)
def test_what_this_side_cannot_compute_is_refused(change, message, tmp_path):
    description.write_description(tmp_path, every_kind())
    path = tmp_path / description.FILE
    value = json.loads(path.read_text())
    for block in value["blocks"]:
        change(block)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        export.read_attention(tmp_path, 4)
