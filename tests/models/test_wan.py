"""The DiT against diffusers' WanTransformer3DModel on the same random weights, values and parameter gradients."""

import contextlib
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import embeddings as diffusers_embeddings
from pipelines import random_like

from hybrid_dit.convert import tables, wan_keys
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.errors import UserError
from hybrid_dit.models import wan
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

# Float32 against float32: each side rounds at 6e-8 per operation; 1e-5 is the project's bound for whole modules.
TOLERANCE = 1e-5


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@contextlib.contextmanager
def float64_timesteps(monkeypatch):
    """Makes diffusers take the timestep embedding in float64, as the original Wan code does."""

    def embedding(timesteps, dim, flip_sin_to_cos=True, downscale_freq_shift=0, **_):
        assert flip_sin_to_cos and downscale_freq_shift == 0
        w = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
        angle = timesteps.double()[:, None] * w
        return torch.cat([angle.cos(), angle.sin()], dim=-1).float()

    with monkeypatch.context() as patch:
        patch.setattr(diffusers_embeddings, "get_timestep_embedding", embedding)
        yield


PAIRS = {"d12": (2, 12, 3), "d16": (3, 16, 2)}  # heads, head width, layers


@pytest.fixture(scope="module", params=list(PAIRS.values()), ids=list(PAIRS))
def pair(request):
    """A small random diffusers model and the same weights in Flax: (torch model, WanConfig, params, entries)."""
    heads, head_dim, layers = request.param
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=32,
        ffn_dim=56,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    with torch.no_grad():  # norms, biases and the zero-initialised head must matter
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    config = wan_keys.config_from_diffusers(dict(model.config))
    abstract = jax.eval_shape(lambda: init(config))
    entries = tables.expand(wan_keys.rules(config, "diffusers"), abstract)
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    tables.check(entries, {k: v.shape for k, v in state.items()}, "the test model")
    return model, config, tables.import_tree(entries, state.__getitem__), entries


def init(config, attention=()):
    model = wan.WanDiT(config, attention)
    latents = jnp.zeros((1, 1, *config.patch[1:], config.in_channels))
    return model.init(jax.random.key(0), latents, jnp.zeros(1), jnp.zeros((1, 1, config.text_dim)))["params"]


def inputs(config, seed=0, frames=3, rows=6, columns=10):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((2, frames, rows, columns, config.in_channels), np.float32)
    text = rng.standard_normal((2, 7, config.text_dim), np.float32)
    return latents, text


def run_torch(model, latents, t, text):
    to = torch.from_numpy
    out = model(to(latents).movedim(-1, 1), to(np.float32(t)), to(text), return_dict=False)[0]
    return out.movedim(1, -1)


@pytest.mark.parametrize("t", [(0.0, 31.5), (998.39, 640.0), (1000.0, 3.25)])
def test_forward_matches_diffusers_with_a_float64_timestep_embedding(pair, t, monkeypatch):
    model, config, params, _ = pair
    latents, text = inputs(config)
    with float64_timesteps(monkeypatch), torch.no_grad():
        expected = run_torch(model, latents, t, text).numpy()
    got = jax.jit(wan.WanDiT(config).apply)({"params": params}, latents, np.float32(t), text)
    assert relative(got, expected) <= TOLERANCE


def test_forward_matches_unmodified_diffusers_where_its_float32_embedding_is_accurate(pair):
    # diffusers takes the angle t * w in float32, an absolute error of t * 6e-8: harmless up to about t = 50.
    model, config, params, _ = pair
    latents, text = inputs(config, seed=1, rows=4, columns=2)
    t = (0.0, 47.0)
    with torch.no_grad():
        expected = run_torch(model, latents, t, text).numpy()
    got = wan.WanDiT(config).apply({"params": params}, latents, np.float32(t), text)
    assert relative(got, expected) <= TOLERANCE


# What is recomputed does not depend on the sizes.
@pytest.mark.parametrize(
    "pair, remat",
    [(PAIRS["d16"], "none"), *((PAIRS["d12"], remat) for remat in wan.REMAT)],
    ids=["d16-none", *(f"d12-{remat}" for remat in wan.REMAT)],
    indirect=["pair"],
)
def test_parameter_gradients_match_diffusers(pair, remat, monkeypatch):
    model, config, params, entries = pair
    latents, text = inputs(config, seed=2)
    t = (812.5, 77.0)
    target = np.random.default_rng(3).standard_normal(latents.shape).astype(np.float32)
    model.zero_grad()
    with float64_timesteps(monkeypatch):
        (run_torch(model, latents, t, text) * torch.from_numpy(target)).sum().backward()

    def loss(p):
        return (wan.WanDiT(config, remat=remat).apply({"params": p}, latents, np.float32(t), text) * target).sum()

    got = dict(tables.export_tree(entries, jax.jit(jax.grad(loss))(params)))
    assert set(got) == {name for name, _ in model.named_parameters()}
    # The softmax is blind to a bias that all keys share: its gradient is rounding noise on both sides, so errors are
    # measured against the largest gradient of the same layer group, which is what an optimiser step sees.
    scale = {}
    for name, p in model.named_parameters():
        group = name.rsplit(".", 1)[0]
        scale[group] = max(scale.get(group, 0.0), np.linalg.norm(p.grad.numpy()))
    for name, p in model.named_parameters():
        error = np.linalg.norm(got[name] - p.grad.numpy()) / scale[name.rsplit(".", 1)[0]]
        assert error <= TOLERANCE, name


def test_timestep_embedding_equals_float64():
    t = np.concatenate([np.linspace(0, 1000, 777), [999.99, 0.001]]).astype(np.float32)
    w = 10000.0 ** (-np.arange(128) / 128)
    angle = t.astype(np.float64)[:, None] * w
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    # Five additions of fractions of turns, whose partial sums stay below 4 (half an ulp: 2**-23), then one cosine.
    # A plain float32 angle t * w would be off by up to 1000 * 2**-24 = 6e-5, well outside.
    error = np.abs(np.asarray(wan.timestep_embedding(t, 256)) - expected).max()
    assert error <= 2 * np.pi * 5 * 2**-23 + 2**-24


def test_packed_text_gives_the_same_velocity_as_512_padded_tokens(pair):
    _, config, params, _ = pair
    latents, text = inputs(config)
    lengths = np.array([7, 3])
    text[1, 3:] = 0
    padded = np.zeros((2, 512, config.text_dim), np.float32)
    padded[:, :7] = text
    apply = jax.jit(wan.WanDiT(config).apply)
    t = np.float32([500.0, 20.0])
    expected = apply({"params": params}, latents, t, padded)
    got = apply({"params": params}, latents, t, *wan.pack_text(text, lengths, 512))
    assert relative(got, expected) <= TOLERANCE
    assert relative(apply({"params": params}, latents, t, text), expected) > 100 * TOLERANCE  # padding does matter


@pytest.mark.parametrize("pair", [PAIRS["d12"]], ids=["d12"], indirect=True)
def test_every_block_runs_its_own_attention(pair):
    _, config, params, _ = pair
    latents, text = inputs(config)
    t = np.float32([500.0, 20.0])
    specs = (AttentionSpec("hybrid", 2), AttentionSpec(), AttentionSpec("linear"))[: config.num_layers]
    maps = init(config, specs)["feature_maps"]
    apply = jax.jit(wan.WanDiT(config, specs).apply)
    hybrid = apply({"params": {**params, "feature_maps": maps}}, latents, t, text)
    for block, spec in enumerate(specs):
        # Perturbing a block's feature map changes the output exactly if the block is converted.
        moved = jax.tree.map(lambda a, b=block: a.at[b].add(0.3), maps)
        out = apply({"params": {**params, "feature_maps": moved}}, latents, t, text)
        assert (relative(out, hybrid) > 1e-4) == spec.converted
    # R = 1 has no linear tokens: plain softmax, whatever the feature map.
    rate1 = (AttentionSpec("hybrid", 1),) * config.num_layers
    own = {"params": {**params, "feature_maps": maps}}
    same = jax.jit(wan.WanDiT(config, rate1).apply)(own, latents, t, text)
    teacher = jax.jit(wan.WanDiT(config).apply)({"params": params}, latents, t, text)
    assert relative(same, teacher) <= TOLERANCE
    # Specs by index instead: every block its own, then softmax in all of them.
    by_index = jax.jit(lambda choice: apply(own, latents, t, text, None, choice))
    assert relative(by_index(np.arange(len(specs), dtype=np.int32)), hybrid) <= TOLERANCE
    assert relative(by_index(np.full(len(specs), 1, np.int32)), teacher) <= TOLERANCE


def test_bad_shapes_and_specs_are_named():
    config = wan.WanConfig(dim=24, num_heads=2, ffn_dim=8, num_layers=2, in_channels=4, text_dim=8)
    with pytest.raises(UserError, match="patch"):
        config.grid((1, 3, 5, 4, 4))
    with pytest.raises(UserError, match="3 attention specs for 2 blocks"):
        init(config, (AttentionSpec(),) * 3)
    with pytest.raises(UserError, match="remat 'all' is unknown; choose one of none, block, attention, dots"):
        latents, text = inputs(config)
        wan.WanDiT(config, remat="all").init(jax.random.key(0), latents, np.zeros(2, np.float32), text)
    with pytest.raises(UserError, match="share one feature map"):
        init(config, (AttentionSpec("linear"), AttentionSpec("linear", feature_map=FeatureMapSpec("elu"))))


def test_modulation_is_what_the_blocks_get():
    config = wan.WanConfig(dim=8, num_heads=2, ffn_dim=8, num_layers=1, in_channels=2, text_dim=4, freq_dim=6)
    params = random_like(abstract_dit(config), np.random.default_rng(0))
    t, x, text = np.float32([900, 31.5]), np.zeros((2, 1, 2, 2, 2), np.float32), np.zeros((2, 1, 4), np.float32)
    _, _, (time6, *_) = wan.WanEmbedding(config, jnp.float32).apply({"params": params}, x, t, text)
    np.testing.assert_allclose(wan.modulation(config, params, t), time6.reshape(2, -1), rtol=0, atol=1e-6)
