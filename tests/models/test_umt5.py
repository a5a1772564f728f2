import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import UMT5Config as HFConfig
from transformers import UMT5EncoderModel

from hybrid_dit.convert import tables, umt5_keys
from hybrid_dit.errors import UserError
from hybrid_dit.models.umt5 import UMT5Config, UMT5Encoder, encode_prompts, relative_position_buckets

torch.set_num_threads(1)

# d_kv * num_heads != d_model, and all sizes distinct, so that a transposed or swapped axis can't pass
CONFIG = UMT5Config(vocab_size=40, d_model=20, d_kv=4, d_ff=28, num_layers=3, num_heads=3)
LENGTHS = np.array([23, 5], np.int32)


@pytest.fixture(scope="module")
def teacher():
    model = UMT5EncoderModel(HFConfig(**CONFIG.to_hf())).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # also the norms, whose ones would hide a missing scale
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + 0.1)
    return model


@pytest.fixture(scope="module")
def inputs():
    ids = np.random.default_rng(0).integers(2, 40, (2, 23)).astype(np.int32)
    mask = (np.arange(23) < LENGTHS[:, None]).astype(np.int32)
    return jnp.asarray(ids * mask), jnp.asarray(mask)


def params_of(model, encoder):
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    abstract = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 4), int), jnp.ones((1, 4), int))["params"]
    return tables.import_tree(tables.expand(umt5_keys.hf_rules(weights), abstract), weights.__getitem__)


def reference(model, ids, mask):
    with torch.no_grad():
        return model(torch.tensor(np.array(ids)), torch.tensor(np.array(mask))).last_hidden_state.numpy()


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def test_matches_transformers(teacher, inputs):
    ids, mask = inputs
    expected = reference(teacher, ids, mask)
    encoder = UMT5Encoder(CONFIG)
    actual = encoder.apply({"params": params_of(teacher, encoder)}, ids, mask)
    # float32 epsilon is 1.2e-7 and either side is 1.6e-7 off a float64 evaluation; a few times that for other CPUs
    assert relative_error(actual, expected) <= 1e-6


def test_bfloat16_is_close_and_stays_bfloat16(teacher, inputs):
    ids, mask = inputs
    encoder = UMT5Encoder(CONFIG, dtype=jnp.bfloat16)
    actual = encoder.apply({"params": params_of(teacher, encoder)}, ids, mask)
    assert actual.dtype == jnp.bfloat16
    # epsilon 2^-8, a few dozen roundings in sequence that add up like a random walk
    assert relative_error(actual, reference(teacher, ids, mask)) <= 2**-8 * 36**0.5


def test_prompt_embeddings_are_zero_past_the_prompt(teacher, inputs):
    ids, mask = inputs
    encoder = UMT5Encoder(CONFIG)
    actual = np.asarray(encode_prompts(encoder, params_of(teacher, encoder), ids, jnp.asarray(LENGTHS)))
    assert not actual[mask == 0].any()
    assert relative_error(actual[mask == 1], reference(teacher, ids, mask)[mask == 1]) <= 1e-6


def test_padding_does_not_change_a_prompt(teacher, inputs):
    ids, _ = inputs
    encoder = UMT5Encoder(CONFIG)
    params = params_of(teacher, encoder)
    padded = encode_prompts(encoder, params, ids[1:], jnp.asarray(LENGTHS[1:]))
    alone = encode_prompts(encoder, params, ids[1:, :5], jnp.asarray(LENGTHS[1:]))
    assert relative_error(padded[:, :5], np.asarray(alone)) <= 1e-6


@pytest.mark.parametrize("buckets,distance", [(32, 128), (16, 40)])
def test_buckets_equal_transformers_at_every_distance(buckets, distance):
    config = HFConfig(
        **CONFIG.to_hf() | {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance}
    )
    attention = UMT5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
    position = torch.arange(300)
    expected = attention._relative_position_bucket(position[None, :] - position[:, None]).numpy()
    np.testing.assert_array_equal(relative_position_buckets(300, buckets, distance), expected)


def test_initialised_encoder_keeps_unit_scale():
    encoder = UMT5Encoder(CONFIG)
    ids = jnp.arange(40)[None]
    features = encoder.init_with_output(jax.random.key(0), ids, jnp.ones_like(ids))[0]
    np.testing.assert_allclose(jnp.mean(features**2, -1), 1, rtol=1e-4)  # the last norm's scale starts at 1


def test_config_round_trip(teacher):
    assert UMT5Config.from_hf(CONFIG.to_hf()) == CONFIG
    assert UMT5Config.from_hf(teacher.config.to_dict()) == CONFIG


@pytest.mark.parametrize("change", [{"model_type": "t5"}, {"feed_forward_proj": "relu"}])
def test_other_architectures_are_refused(change):
    with pytest.raises(UserError, match="Wan uses UMT5"):
        UMT5Config.from_hf(CONFIG.to_hf() | change)


def test_incomplete_config_names_what_is_missing():
    config = CONFIG.to_hf()
    del config["d_kv"]
    with pytest.raises(UserError, match="missing d_kv"):
        UMT5Config.from_hf(config)
