"""The Wan2.1 text-to-video diffusion transformer with an attention of its own in every block.

Matches `WanModel` (wan/modules/model.py of the original) and diffusers' `WanTransformer3DModel`. Parameters of the
blocks are stacked over the block axis and the blocks run under one `lax.scan`, so that compile time does not grow with
depth; the few distinct attentions of a hybrid are branches of a `lax.switch` inside it.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from hybrid_dit.array_typing import Array, DTypeLike, Float, Int
from hybrid_dit.errors import UserError
from hybrid_dit.ops import context_parallel, feature_maps, residuals
from hybrid_dit.ops.hybrid import attention
from hybrid_dit.ops.rope import apply_rope, rope_table
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan2.1 T2V DiT.

    Attributes:
        dim: model width d = heads * head_dim.
        num_heads: H.
        ffn_dim: width of the feed-forward's hidden layer.
        num_layers: B, number of blocks.
        in_channels: latent channels.
        text_dim: width of the text encoder's output.
        freq_dim: width of the sinusoidal timestep embedding.
        patch: latent frames, rows and columns per token.
        eps: of every normalisation.
    """

    dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    in_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self):
        if self.dim % self.num_heads or self.head_dim % 2:
            raise UserError(f"dim {self.dim} over {self.num_heads} heads must give an even head width")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.dim // self.num_heads

    def grid(self, latent_shape: tuple[int, ...]) -> Grid:
        """Token grid (frames, rows, columns) of latents [..., t, y, x, c]."""
        sizes = latent_shape[-4:-1]
        if any(s % p for s, p in zip(sizes, self.patch)):
            raise UserError(f"latents of {sizes} frames, rows, columns are not divisible by the patch {self.patch}")
        return tuple(s // p for s, p in zip(sizes, self.patch))


# The published Wan2.1 T2V models; their names are those of the configs.
PRESETS = {
    "wan_1_3b": WanConfig(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30),
    "wan_14b": WanConfig(dim=5120, num_heads=40, ffn_dim=13824, num_layers=40),
}


# What a block keeps for the backward pass, if not everything: its input alone, or what attention, or every dense layer,
# returns too.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "block": None,
    "attention": residuals.kept,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class WanDiT(nn.Module):
    """Predicts the velocity of a noisy latent video.

    Attributes:
        config: sizes.
        attention: one `AttentionSpec` per block; empty means softmax everywhere (the teacher).
        dtype: of activations and matrix products; parameters, norms and modulation stay float32.
        remat: what the backward pass recomputes instead of keeping it, a name of `REMAT`.
        backend: of self-attention, see `ops.backends`.
        split: how self-attention splits the tokens of a video over devices (`ops.context_parallel`); None: it doesn't.
    """

    config: WanConfig
    attention: tuple[AttentionSpec, ...] = ()
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    backend: str = "auto"
    split: context_parallel.Split | None = None

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b t y x c"],
        timestep: Float[Array, "b"],
        text: Float[Array, "b l e"],
        text_count: Float[Array, "b l"] | None = None,
        choice: Int[Array, "layers"] | None = None,
    ) -> Float[Array, "b t y x c"]:
        """Returns the velocity, float32.

        Args:
            latents: noisy latents, normalised.
            timestep: in [0, 1000], float32 (16-bit timesteps ruin samples: 998.39 becomes 1000).
            text: text embeddings; zero past the prompt's length.
            text_count: how many equal text tokens each row stands for (see `pack_text`); None means one each.
            choice: for every block an index into the distinct specs of `attention`, in order of appearance, instead of
                its own: one compiled program then serves every assignment of these specs to blocks.
        """
        cfg = self.config
        grid = cfg.grid(latents.shape)
        specs = self.attention or (AttentionSpec(),) * cfg.num_layers
        if len(specs) != cfg.num_layers:
            raise UserError(f"{len(specs)} attention specs for {cfg.num_layers} blocks; give one per block")
        distinct = tuple(dict.fromkeys(specs))

        # Parts of their own, so that a job can run the blocks in another way; parameters lie in this module's scope.
        embed, head = WanEmbedding(cfg, self.dtype), WanHead(cfg, self.dtype)
        nn.share_scope(self, embed)
        nn.share_scope(self, head)

        x, time, (*conditions, rope) = embed(latents, timestep, text, text_count)
        n = x.shape[1]
        if self.split is not None:
            more = self.split.rows(n) - n
            x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
            rope = jax.tree.map(lambda a: jnp.pad(a, ((0, more), *((0, 0),) * (a.ndim - 1))), rope)
        conditions = *conditions, rope
        phi = self._feature_maps(distinct)
        if self.remat not in REMAT:
            raise UserError(f"remat {self.remat!r} is unknown; choose one of {', '.join(REMAT)}")
        policy = REMAT[self.remat]
        block = WanBlock if self.remat == "none" else nn.remat(WanBlock, prevent_cse=False, policy=policy)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, *(nn.broadcast,) * len(conditions)),
            length=cfg.num_layers,
        )(cfg, distinct, grid, self.dtype, backend=self.backend, split=self.split, name="blocks")
        which = jnp.asarray([distinct.index(s) for s in specs], jnp.int32) if choice is None else choice
        x, _ = blocks(x, which, phi, *conditions)
        return head(x[:, :n], time, grid)

    def _feature_maps(self, distinct: tuple[AttentionSpec, ...]):
        """Declares `params["feature_maps"]`, stacked over ALL blocks; absent if nothing is converted.

        Blocks that keep softmax have an unused slice: it costs 5% of a block's memory and keeps the tree regular.
        """
        maps = {s.feature_map for s in distinct if s.converted}
        if not maps:
            return {}
        if len(maps) > 1:
            raise UserError(f"all converted blocks of a model share one feature map; got {sorted(map(str, maps))}")
        cfg, (spec,) = self.config, maps

        def init(key):
            keys = jax.random.split(key, cfg.num_layers)
            return jax.vmap(lambda k: feature_maps.init(k, cfg.num_heads, cfg.head_dim, spec))(keys)

        if not jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))):
            return {"q": {}, "k": {}}  # a fixed map such as elu
        return self.param("feature_maps", init)


class WanEmbedding(nn.Module):
    """What comes before the blocks. Parameters: those of `WanDiT` of the same names."""

    config: WanConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, latents, timestep, text, text_count=None):
        """Arguments as for `WanDiT`.

        Returns:
            (tokens [b, n, c], time embedding [b, c] for the head, what every block gets beside its tokens: time6
            [b, 6, c], text [b, l, c], text_bias [b, l] or None, RoPE table).
        """
        cfg = self.config
        dense = partial(nn.Dense, dtype=self.dtype)
        patches = rearrange(
            latents, "b (t p) (y q) (x r) c -> b (t y x) (p q r c)", p=cfg.patch[0], q=cfg.patch[1], r=cfg.patch[2]
        )
        x = dense(cfg.dim, name="patch_embedding")(patches)

        # The original computes time embedding and modulation in float32 whatever the model's dtype.
        time = timestep_embedding(timestep, cfg.freq_dim)
        time = nn.Dense(cfg.dim, name="time_embedding_0")(time)
        time = nn.Dense(cfg.dim, name="time_embedding_2")(nn.silu(time))
        time6 = nn.Dense(6 * cfg.dim, name="time_projection")(nn.silu(time)).reshape(-1, 6, cfg.dim)

        text = dense(cfg.dim, name="text_embedding_0")(text)
        text = dense(cfg.dim, name="text_embedding_2")(nn.gelu(text, approximate=True))
        text_bias = None if text_count is None else jnp.log(text_count.astype(jnp.float32))
        return x, time, (time6, text, text_bias, rope_table(cfg.grid(latents.shape), cfg.head_dim))


class WanHead(nn.Module):
    """What comes after the blocks: tokens [b, n, c] and time embedding [b, c] to velocity [b, t, y, x, c], float32."""

    config: WanConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, time, grid):
        """`grid` is that of the tokens."""
        cfg = self.config
        modulation = self.param("head_modulation", nn.initializers.normal(cfg.dim**-0.5), (2, cfg.dim))
        shift, scale = jnp.split(modulation + time[:, None], 2, axis=1)
        x = (layer_norm(x, cfg.eps) * (1 + scale) + shift).astype(self.dtype)
        out_dim = math.prod(cfg.patch) * cfg.in_channels
        x = nn.Dense(out_dim, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="head")(x)  # as in the original
        return rearrange(
            x.astype(jnp.float32),
            "b (t y x) (p q r c) -> b (t p) (y q) (x r) c",
            **dict(zip("tyx", grid)),
            **dict(zip("pqr", cfg.patch)),
        )


class WanBlock(nn.Module):
    """One transformer block: modulated self-attention, cross-attention to the text, modulated feed-forward.

    `attend`, if given, is run in place of `specs`; see `SelfAttention`.
    """

    config: WanConfig
    specs: tuple[AttentionSpec, ...]
    grid: Grid
    dtype: DTypeLike
    attend: Callable | None = None
    backend: str = "auto"
    split: context_parallel.Split | None = None

    @nn.compact
    def __call__(self, x, which, phi, time6, text, text_bias, rope):
        """Scan body: x [b, n, c] is the carry; `which` (index into specs) and `phi` are this block's own."""
        cfg = self.config
        modulation = self.param("modulation", nn.initializers.normal(cfg.dim**-0.5), (6, cfg.dim))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation + time6, 6, axis=1)

        y = (layer_norm(x, cfg.eps) * (1 + scale1) + shift1).astype(self.dtype)
        how = self.specs, self.grid, self.dtype, self.attend, self.backend, self.split
        y = SelfAttention(cfg, *how, name="self_attn")(y, which, phi, rope)
        x = (x.astype(jnp.float32) + y * gate1).astype(self.dtype)

        y = nn.LayerNorm(epsilon=cfg.eps, name="norm3", dtype=jnp.float32)(x).astype(self.dtype)
        x = x + CrossAttention(cfg, self.dtype, name="cross_attn")(y, text, text_bias)

        y = (layer_norm(x, cfg.eps) * (1 + scale2) + shift2).astype(self.dtype)
        y = nn.gelu(nn.Dense(cfg.ffn_dim, dtype=self.dtype, name="ffn_0")(y), approximate=True)
        y = nn.Dense(cfg.dim, dtype=self.dtype, name="ffn_2")(y)
        return (x.astype(jnp.float32) + y * gate2).astype(self.dtype), None


class SelfAttention(nn.Module):
    """Self-attention with qk-norm and RoPE; the attention itself is `specs[which]`.

    Sows q, k, v (after norm and RoPE, what every attention kind sees) and the attention's output, each [b, n, h, d], as
    the intermediate "attention"; free unless asked for. With `attend`, (q, k, v) -> (output, anything), what it returns
    beside the output is sown instead.
    """

    config: WanConfig
    specs: tuple[AttentionSpec, ...]
    grid: Grid
    dtype: DTypeLike
    attend: Callable | None = None
    backend: str = "auto"
    split: context_parallel.Split | None = None

    @nn.compact
    def __call__(self, x, which, phi, rope):
        """x [b, n, c] -> [b, n, c]."""
        cfg = self.config
        q, k, v = _qkv(self, cfg, self.dtype, x, x)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if self.attend is not None:
            y, kept = self.attend(q, k, v)
        else:
            y = self._by_spec(q, k, v, which, phi)
            kept = q, k, v, y
        self.sow("intermediates", "attention", kept, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return nn.Dense(cfg.dim, dtype=self.dtype, name="o")(rearrange(y, "b n h d -> b n (h d)"))

    def _by_spec(self, q, k, v, which, phi):
        attend = partial(attention, grid=self.grid, backend=self.backend)
        if self.split is not None:
            attend = partial(context_parallel.attention, grid=self.grid, backend=self.backend, split=self.split)
        branches = [partial(attend, spec=spec) for spec in self.specs]
        return branches[0](q, k, v, phi) if len(branches) == 1 else jax.lax.switch(which, branches, q, k, v, phi)


class CrossAttention(nn.Module):
    """Attention of video tokens to text tokens; a row of text may stand for several equal tokens."""

    config: WanConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, text, text_bias):
        """x [b, n, c], text [b, l, c], text_bias [b, l] = log of each row's count, or None -> [b, n, c]."""
        cfg = self.config
        # Scores, n x l per head, cost less to compute again for the backward pass than to keep.
        y = jax.checkpoint(_attend_to_text)(*_qkv(self, cfg, self.dtype, x, text), text_bias)
        return nn.Dense(cfg.dim, dtype=self.dtype, name="o")(rearrange(y, "b n h d -> b n (h d)"))


def _attend_to_text(q, k, v, text_bias):
    scores = jnp.einsum("bnhd,blhd->bhnl", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if text_bias is not None:
        scores = scores + text_bias[:, None, None]
    return jnp.einsum("bhnl,blhd->bnhd", nn.softmax(scores).astype(v.dtype), v)


def _qkv(module: nn.Module, cfg: WanConfig, dtype, x, context):
    """Projects to q, k, v [b, n, h, d]; q and k are RMS-normalised over the whole model width, not per head."""
    dense = partial(nn.Dense, cfg.dim, dtype=dtype)
    rms = partial(nn.RMSNorm, epsilon=cfg.eps, dtype=jnp.float32)
    q = rms(name="norm_q")(dense(name="q")(x)).astype(dtype)
    k = rms(name="norm_k")(dense(name="k")(context)).astype(dtype)
    v = dense(name="v")(context)
    return (rearrange(y, "b n (h d) -> b n h d", h=cfg.num_heads) for y in (q, k, v))


def captured_attention(variables) -> tuple[Array, Array, Array, Array]:
    """Returns q, k, v and the attention's output of every block, each [B, b, n, h, d].

    Args:
        variables: second result of `WanDiT(...).apply(..., mutable=["intermediates"])`.
    """
    return variables["intermediates"]["blocks"]["self_attn"]["attention"]


def modulation(config: WanConfig, params, timestep: Float[Array, "b"]) -> Float[Array, "b p"]:
    """Returns what all blocks' modulation is shifted by at these timesteps: `WanEmbedding`'s time6, flat."""
    x = timestep_embedding(timestep, config.freq_dim)
    for i, name in enumerate(("time_embedding_0", "time_embedding_2", "time_projection")):
        x = (nn.silu(x) if i else x) @ params[name]["kernel"] + params[name]["bias"]
    return x


def layer_norm(x: Array, eps: float) -> Array:
    """Layer norm over the last axis without parameters, float32 in and out."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(axis=-1, keepdims=True) + eps)


def timestep_embedding(timestep: Float[Array, "b"], dim: int) -> Float[Array, "b e"]:
    """[cos(t w), sin(t w)] with w_i = 10000^(-i / (dim/2)), as `sinusoidal_embedding_1d` of the original.

    The original takes the angle in float64; in float32 its rounding alone costs 3e-5 at t = 1000. Here t and w / 2π are
    split into pieces of 12 bits, whose products float32 holds exactly, and only the fractions of turns are added up.
    """
    turns = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2)) / (2 * np.pi)
    pieces = []
    for _ in range(3):
        mantissa, exponent = np.frexp(turns)
        piece = np.ldexp(np.trunc(mantissa * 2**12), exponent - 12)
        pieces.append(jnp.asarray(piece, jnp.float32))
        turns = turns - piece
    t = timestep.astype(jnp.float32)[:, None]
    # 1000 has 10 bits: keep 2 fractional bits in the upper piece, the rest (exact in float32) in the lower.
    upper = jnp.floor(t * 4) / 4
    fraction = sum((part * piece) % 1.0 for piece in pieces for part in (upper, t - upper))
    angle = (fraction % 1.0) * (2 * np.pi)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def pack_text(
    embeddings: Float[Array, "b l e"], lengths: Int[Array, "b"], text_tokens: int
) -> tuple[Float[Array, "b m e"], Float[Array, "b m"]]:
    """Replaces the zero rows that pad every prompt to `text_tokens` by one row and its multiplicity; exact.

    Wan attends to its padding: 512 text tokens, of which a prompt fills perhaps 60. The others are equal, so one row
    with weight 512 − length gives the same cross-attention at a fraction of the work.

    Args:
        embeddings: zero past each prompt's length.
        lengths: int [b], number of real tokens of each prompt, at most `l`.
        text_tokens: the padded length the model was trained with (Wan: 512).

    Returns:
        Text with one zero row appended ([b, l + 1, e]), and each row's count, float32 (0 for unused rows).
    """
    b, rows, width = embeddings.shape
    text = jnp.concatenate([embeddings, jnp.zeros((b, 1, width), embeddings.dtype)], axis=1)
    lengths = jnp.asarray(lengths)[:, None]
    count = (jnp.arange(rows + 1)[None] < lengths).astype(jnp.float32)
    return text, count.at[:, -1].set((text_tokens - lengths[:, 0]).astype(jnp.float32))
