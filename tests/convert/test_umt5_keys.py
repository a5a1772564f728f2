import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import UMT5Config as HFConfig
from transformers import UMT5EncoderModel

from hybrid_dit.convert import tables
from hybrid_dit.convert.umt5_keys import EMBEDDING_NAMES, hf_rules, is_optional, wan_rules
from hybrid_dit.errors import UserError
from hybrid_dit.models.umt5 import UMT5Config, UMT5Encoder

torch.set_num_threads(1)

CONFIG = UMT5Config(vocab_size=30, d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=2)
ABSTRACT = jax.eval_shape(UMT5Encoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 4), int), jnp.ones((1, 4), int))
SHARED, ALIAS = EMBEDDING_NAMES


@pytest.fixture
def saved(tmp_path):
    """What transformers writes for a small encoder with random norms."""
    model = UMT5EncoderModel(HFConfig(**CONFIG.to_hf()))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    model.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


def import_checked(weights):
    entries = tables.expand(hf_rules(weights), ABSTRACT["params"])
    tables.check(entries, {k: v.shape for k, v in weights.items()}, "file", optional=is_optional)
    return tables.import_tree(entries, weights.__getitem__)


def test_round_trip_through_transformers_is_bit_exact(saved, tmp_path):
    entries = tables.expand(hf_rules(), ABSTRACT["params"])
    exported = dict(tables.export_tree(entries, import_checked(saved)))
    assert exported.keys() == saved.keys()
    save_file(exported, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = UMT5EncoderModel.from_pretrained(tmp_path)
    for name in saved:
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), saved[name])
    np.testing.assert_array_equal(model.encoder.embed_tokens.weight.detach().numpy(), saved[SHARED])


@pytest.mark.parametrize("names", [[SHARED], [ALIAS], [SHARED, ALIAS]])
def test_embedding_is_found_under_either_name(saved, names):
    embedding = saved.pop(SHARED)
    params = import_checked(saved | {name: embedding for name in names})
    np.testing.assert_array_equal(params["embed"]["embedding"], embedding)


def test_missing_embedding_is_an_error(saved):
    del saved[SHARED]
    with pytest.raises(UserError, match="missing shared.weight"):
        import_checked(saved)


def test_wan_layout_names_and_shapes():
    """The names of `T5Encoder` in wan/modules/t5.py: 10 tensors a block and 2 more (242 for the 24 blocks of Wan's)."""
    shapes = {name: entry.torch_shape for name, entry in tables.expand(wan_rules(), ABSTRACT["params"]).items()}
    block = {
        **{f"attn.{name}.weight": (8, 12) for name in "qkv"},
        **{"attn.o.weight": (12, 8), "pos_embedding.embedding.weight": (32, 2)},
        **{"ffn.gate.0.weight": (20, 12), "ffn.fc1.weight": (20, 12), "ffn.fc2.weight": (12, 20)},
        **{"norm1.weight": (12,), "norm2.weight": (12,)},
    }
    blocks = {f"blocks.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()}
    assert shapes == {"token_embedding.weight": (30, 12), "norm.weight": (12,)} | blocks
