"""UMT5, the text encoder of Wan: a T5 encoder with one relative position bias per block (arXiv:2304.09151).

Matches `transformers.UMT5EncoderModel` and Wan's own `wan/modules/t5.py`: pre-norm blocks without biases, RMS norms,
attention without the 1/sqrt(d) factor, and a gated feed-forward with the tanh form of GELU.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from hybrid_dit.array_typing import Array, Bool, Float, Int
from hybrid_dit.errors import UserError


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder, named as in the config.json of transformers."""

    vocab_size: int
    d_model: int
    d_kv: int  # width of one head; heads * d_kv need not equal d_model
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "UMT5Config":
        """Reads the content of a `text_encoder/config.json`.

        Raises:
            UserError: it describes another model (T5 shares its position bias between blocks) or lacks a size.
        """
        if config.get("model_type") != "umt5" or config.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
            raise UserError(
                "text encoder config: expected model_type 'umt5' with feed_forward_proj 'gated-gelu', found "
                f"{config.get('model_type')!r} with {config.get('feed_forward_proj')!r}; Wan uses UMT5"
            )
        fields = dataclasses.fields(cls)
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in config]
        if missing:
            raise UserError(f"text encoder config: missing {', '.join(missing)}; is this a complete config.json?")
        return cls(**{f.name: config[f.name] for f in fields if f.name in config})

    def to_hf(self) -> dict[str, Any]:
        """Returns a config.json with which `transformers.UMT5EncoderModel.from_pretrained` builds the same encoder."""
        return {
            "architectures": ["UMT5EncoderModel"],
            "model_type": "umt5",
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "tie_word_embeddings": True,
            **dataclasses.asdict(self),
        }


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of every (query, key) pair, int32 [l, l] (T5, arXiv:1910.10683, section 2.1).

    Half of the buckets serve keys after the query. In each half, small distances have a bucket of their own and larger
    ones share buckets that grow logarithmically up to `max_distance`.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # float32 as in the reference; the test checks that it rounds alike at bucket borders
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        np.log(max_distance / exact)
    )
    coarse = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, coarse) + half * (offset > 0)).astype(np.int32)


class UMT5Encoder(nn.Module):
    """Token ids to features; blocks are stacked along axis 0 of their parameters and run by one `lax.scan`.

    Attributes:
        config: sizes.
        dtype: of activations and matrix products; norms, softmax and the residual stream are float32 whatever it is.
            (With a 16-bit stream, as transformers has it, the error of a small random encoder was 1.4 times as large.)
    """

    config: UMT5Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Int[Array, "b l"] | Bool[Array, "b l"]) -> Float[Array, "b l c"]:
        """Returns the features of every position in `dtype`; those where `mask` is 0 are never attended to."""
        c = self.config
        embed = nn.Embed(c.vocab_size, c.d_model, dtype=self.dtype, embedding_init=_normal(1.0), name="embed")
        x = embed(ids).astype(jnp.float32)
        buckets = relative_position_buckets(
            ids.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        blocks = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )
        x, _ = blocks(c, self.dtype, name="blocks")(x, mask.astype(bool), jnp.asarray(buckets))
        return nn.RMSNorm(c.layer_norm_epsilon, dtype=self.dtype, name="final_norm")(x)


def encode_prompts(
    encoder: UMT5Encoder, params: Mapping, ids: Int[Array, "b l"], lengths: Int[Array, "b"]
) -> Float[Array, "b l c"]:
    """Returns the text embeddings as the DiT of Wan wants them: ZERO past each prompt's length.

    Wan cuts the encoder's output to the prompt and pads it with zeros; the DiT attends to the zeros too, so passing the
    encoder's output at padded positions instead gives other videos.

    Args:
        encoder: the model.
        params: its parameters (without the "params" level).
        ids: padded token ids, from `hybrid_dit.data.tokenizer`.
        lengths: number of real tokens of each prompt, `</s>` included.
    """
    mask = jnp.arange(ids.shape[1])[None, :] < lengths[:, None]
    features = encoder.apply({"params": params}, ids, mask)
    return jnp.where(mask[..., None], features, 0)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the second result is what `nn.scan` wants."""

    config: UMT5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, mask, buckets):
        c = self.config
        norm = {"epsilon": c.layer_norm_epsilon, "dtype": self.dtype}
        x = x + _Attention(c, self.dtype, name="attention")(nn.RMSNorm(**norm, name="attention_norm")(x), mask, buckets)
        x = x + _FeedForward(c, self.dtype, name="ffn")(nn.RMSNorm(**norm, name="ffn_norm")(x))
        return x, None


class _Attention(nn.Module):
    """softmax(q k^T + bias) v, unscaled: T5 folds 1/sqrt(d) into the initialisation of q."""

    config: UMT5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, mask, buckets):
        c = self.config
        width = c.num_heads * c.d_kv

        def project(name, std):
            y = _dense(width, std, self.dtype, name)(x)
            return y.reshape(*x.shape[:2], c.num_heads, c.d_kv)

        q = project("q", (c.d_model * c.d_kv) ** -0.5)
        k = project("k", c.d_model**-0.5)
        v = project("v", c.d_model**-0.5)
        table = self.param(
            "relative_bias", _normal(c.d_model**-0.5), (c.relative_attention_num_buckets, c.num_heads), jnp.float32
        )
        bias = jnp.moveaxis(table.astype(jnp.float32)[buckets], -1, 0)  # [h, l, l]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) + bias
        # a finite number: a prompt whose mask is all 0 gives a uniform softmax, not NaN
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(scores).astype(self.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], width)
        return _dense(c.d_model, width**-0.5, self.dtype, "o")(out)


class _FeedForward(nn.Module):
    """(gelu(x W_gate) * (x W_up)) W_down."""

    config: UMT5Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = _dense(c.d_ff, c.d_model**-0.5, self.dtype, "gate")(x)
        up = _dense(c.d_ff, c.d_model**-0.5, self.dtype, "up")(x)
        return _dense(c.d_model, c.d_ff**-0.5, self.dtype, "down")(nn.gelu(gate, approximate=True) * up)


def _normal(std: float):
    return nn.initializers.normal(std)


def _dense(features: int, std: float, dtype: DTypeLike, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=_normal(std), name=name)
