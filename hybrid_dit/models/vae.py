"""The Wan2.1 video VAE: videos [b, t, y, x, 3] in [-1, 1] <-> latents [b, 1 + (t - 1) / 4, y / 8, x / 8, 16].

Matches diffusers' `AutoencoderKLWan` (float32, relative error about 1e-6) in values and, parameter by parameter, in
names. `encode` and `decode` take whole videos; `encode_chunked` and `decode_chunked` stream them, with equal results
and memory that doesn't grow with the video's length (the layers' docstring says how).
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from hybrid_dit.array_typing import Array, Float, Shaped
from hybrid_dit.errors import UserError
from hybrid_dit.models.vae_layers import CausalConv, Downsample, MidBlock, ResidualBlock, RMSNorm, Upsample

# Statistics of the published Wan2.1 VAE's latents, per channel.
WAN_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
# diffusers' config.json entries that select another architecture than Wan2.1's, and the only values accepted.
_FIXED = {
    "attn_scales": [[], ()],
    "dropout": [0.0],
    "is_residual": [False],
    "in_channels": [3],
    "out_channels": [3],
    "patch_size": [None],
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Architecture of the VAE; the defaults are the published Wan2.1 VAE's.

    Attributes:
        base_dim: channels at full resolution.
        z_dim: channels of the latents.
        dim_mult: channels of each level of resolution, as multiples of `base_dim`.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        temporal_downsample: for each step to the next level, whether it halves the frames too (at most two do).
        latents_mean: per channel; what `normalize` subtracts.
        latents_std: per channel; what `normalize` divides by.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1 or sum(self.temporal_downsample) > 2:
            raise UserError(
                f"VAE config: temporal_downsample={self.temporal_downsample} must have one entry per step between the "
                f"{len(self.dim_mult)} levels of dim_mult={self.dim_mult}, at most two of them True"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise UserError(f"VAE config: {name} has {len(getattr(self, name))} entries; give z_dim={self.z_dim}")

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame (the first latent frame holds one frame)."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        """Rows (columns) per latent row (column)."""
        return 2 ** len(self.temporal_downsample)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Reads the config.json of diffusers' `AutoencoderKLWan`; absent entries have Wan2.1's values.

        Raises:
            UserError: an entry is unknown, or asks for something that Wan2.1's VAE doesn't have.
        """
        fields = {"temperal_downsample" if f.name == "temporal_downsample" else f.name for f in dataclasses.fields(cls)}
        # The two scale factors follow from the architecture; diffusers' pipelines alone read them.
        known = [*fields, *_FIXED, "decoder_base_dim", "scale_factor_temporal", "scale_factor_spatial"]
        values = {}
        for key, value in config.items():
            if key.startswith("_"):  # diffusers' _class_name, _diffusers_version, _name_or_path
                continue
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise UserError(f"VAE config: unknown entry {key!r}{hint}")
            if key in _FIXED and value not in _FIXED[key]:
                raise UserError(f"VAE config: {key}={value!r} is not supported; a Wan2.1 VAE has {_FIXED[key][0]!r}")
            if key in fields:
                values[key] = tuple(value) if isinstance(value, list | tuple) else value
        if config.get("decoder_base_dim") not in (None, config.get("base_dim", cls.base_dim)):
            raise UserError("VAE config: decoder_base_dim differs from base_dim, as in Wan2.2; supported is Wan2.1")
        if "temperal_downsample" in values:
            values["temporal_downsample"] = values.pop("temperal_downsample")
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """Returns the config.json that diffusers' `AutoencoderKLWan.from_pretrained` reads."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        values["temperal_downsample"] = values.pop("temporal_downsample")  # diffusers' spelling
        return {
            "_class_name": "AutoencoderKLWan",
            **values,
            "attn_scales": [],
            "dropout": 0.0,
            "scale_factor_temporal": self.temporal_stride,
            "scale_factor_spatial": self.spatial_stride,
        }

    def normalize(self, latents: Float[Array, "*n z"]) -> Float[Array, "*n z"]:
        """(latents - mean) / std per channel: from the VAE's scale to the one that the DiT works in."""
        mean, std = (jnp.asarray(v, latents.dtype) for v in (self.latents_mean, self.latents_std))
        return (latents - mean) / std

    def denormalize(self, latents: Float[Array, "*n z"]) -> Float[Array, "*n z"]:
        """Inverse of `normalize`: latents * std + mean, what `decode` takes."""
        mean, std = (jnp.asarray(v, latents.dtype) for v in (self.latents_mean, self.latents_std))
        return latents * std + mean


class Encoder(nn.Module):
    """Video -> 2 z_dim channels, before `quant_conv` (diffusers' `WanEncoder3d`)."""

    config: VAEConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t y x 3"]) -> Float[Array, "b u v w z"]:
        """Returns the latent frames of a video's frames."""
        cfg = self.config
        x = CausalConv(cfg.base_dim, dtype=self.dtype, name="conv_in")(x)
        index = 0  # diffusers numbers residual and downsampling blocks in one list
        for level, mult in enumerate(cfg.dim_mult):
            for _ in range(cfg.num_res_blocks):
                x = ResidualBlock(cfg.base_dim * mult, self.dtype, name=f"down_blocks_{index}")(x)
                index += 1
            if level < len(cfg.temporal_downsample):
                x = Downsample(cfg.temporal_downsample[level], self.dtype, name=f"down_blocks_{index}")(x)
                index += 1
        x = MidBlock(self.dtype, name="mid_block")(x)
        x = nn.silu(RMSNorm(self.dtype, name="norm_out")(x))
        return CausalConv(2 * cfg.z_dim, dtype=self.dtype, name="conv_out")(x)


class UpBlock(nn.Module):
    """One level of the decoder: residual blocks, then upsampling unless last (diffusers' `WanUpBlock`).

    Attributes:
        features: channels of the residual blocks; upsampling halves them.
        num_blocks: of residual blocks.
        temporal: whether upsampling doubles the frames too; None: no upsampling.
        dtype: of the computation.
    """

    features: int
    num_blocks: int
    temporal: bool | None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t y x c"]) -> Float[Array, "b u v w o"]:
        """Returns the level's output, upsampled unless last."""
        for i in range(self.num_blocks):
            x = ResidualBlock(self.features, self.dtype, name=f"resnets_{i}")(x)
        return x if self.temporal is None else Upsample(self.temporal, self.dtype, name="upsamplers_0")(x)


class Decoder(nn.Module):
    """Latents after `post_quant_conv` -> video (diffusers' `WanDecoder3d`)."""

    config: VAEConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Names the layers as diffusers does."""
        cfg = self.config
        mults, temporal = cfg.dim_mult[::-1], (*cfg.temporal_downsample[::-1], None)
        self.conv_in = CausalConv(cfg.base_dim * mults[0], dtype=self.dtype)
        self.mid_block = MidBlock(self.dtype)
        self.up_blocks = [
            UpBlock(cfg.base_dim * mult, cfg.num_res_blocks + 1, t, self.dtype) for mult, t in zip(mults, temporal)
        ]
        self.norm_out = RMSNorm(self.dtype)
        self.conv_out = CausalConv(3, dtype=self.dtype)

    def __call__(self, x: Float[Array, "b t y x z"]) -> Float[Array, "b u v w 3"]:
        """Returns the frames of a video's latent frames, not clipped."""
        return self.rest(self.middle(x))

    def middle(self, x: Float[Array, "b t y x z"]) -> Float[Array, "b t y x c"]:
        """The part at the latents' resolution, in which every position of a frame sees every other."""
        return self.mid_block(self.conv_in(x))

    def rest(self, x: Float[Array, "b t y x c"]) -> Float[Array, "b u v w 3"]:
        """The part that is local, see `vae_windows.halo`."""
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.norm_out(x)))


class WanVAE(nn.Module):
    """The Wan2.1 VAE (diffusers' `AutoencoderKLWan`).

    Attributes:
        config: architecture.
        dtype: of the computation (float32 or bfloat16); parameters are float32 either way.
    """

    config: VAEConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Names the four parts as diffusers does."""
        self.encoder = Encoder(self.config, self.dtype)
        self.quant_conv = CausalConv(2 * self.config.z_dim, (1, 1, 1), dtype=self.dtype)
        self.post_quant_conv = CausalConv(self.config.z_dim, (1, 1, 1), dtype=self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def __call__(self, video: Float[Array, "b t y x 3"]) -> Float[Array, "b t y x 3"]:
        """Decodes the latents' mean. Its `init` is what creates all parameters."""
        return self.decode(self.encode(video)[0])

    def encode(self, video: Float[Array, "b t y x 3"]) -> tuple[Float[Array, "b u v w z"], Float[Array, "b u v w z"]]:
        """Returns mean and log-variance of the latents' Gaussian, unnormalised (see `VAEConfig.normalize`).

        Args:
            video: t = 4k + 1 frames in [-1, 1]; rows and columns are multiples of 8. (Continuing a stream: 4k frames.)
        """
        h = self.quant_conv(self.encoder(video))
        mean, logvar = jnp.split(h, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)  # diffusers' `DiagonalGaussianDistribution` clips too

    def decode(self, latents: Float[Array, "b t y x z"], clip: bool = True) -> Float[Array, "b u v w 3"]:
        """Returns 1 + 4 (t - 1) frames (continuing a stream: 4 t frames).

        Args:
            latents: unnormalised (see `VAEConfig.denormalize`).
            clip: to [-1, 1], as diffusers does; switch off to train, where it would stop gradients.
        """
        video = self.decoder(self.post_quant_conv(latents))
        return jnp.clip(video, -1.0, 1.0) if clip else video

    def decode_middle(self, latents: Float[Array, "b t y x z"]) -> Float[Array, "b t y x c"]:
        """The first half of `decode`, on whole frames; for `vae_windows`."""
        return self.decoder.middle(self.post_quant_conv(latents))

    def decode_rest(self, middle: Float[Array, "b t y x c"]) -> Float[Array, "b u v w 3"]:
        """The second half of `decode`, on frames or windows of them."""
        return jnp.clip(self.decoder.rest(middle), -1.0, 1.0)


def init(config: VAEConfig, key: Array) -> dict[str, Any]:
    """Returns random parameters; under `jax.eval_shape` their shapes, which key tables are expanded with."""
    side = config.spatial_stride
    return jax.jit(WanVAE(config).init)(key, jnp.zeros((1, 1, side, side, 3)))["params"]  # one program, not hundreds


def check_video(config: VAEConfig, shape: tuple[int, ...]) -> None:
    """Raises UserError unless a video [..., t, y, x, 3] of this shape can be encoded without loss of frames or rows."""
    t, y, x, c = shape[-4:]
    if (t - 1) % config.temporal_stride or y % config.spatial_stride or x % config.spatial_stride or c != 3:
        raise UserError(
            f"the VAE can't encode a video of {t} frames, {y} x {x} pixels, {c} channels; give 3 channels, "
            f"{config.temporal_stride}k + 1 frames, and multiples of {config.spatial_stride} for rows and columns"
        )


def encode(vae: WanVAE, params: Mapping, video: Float[Array, "b t y x 3"]):
    """Returns (mean, logvar), each [b, t', y', x', z], of the whole video at once. See `WanVAE.encode`."""
    check_video(vae.config, video.shape)
    return vae.apply({"params": params}, video, method="encode")


def decode(vae: WanVAE, params: Mapping, latents: Float[Array, "b t y x z"]) -> Float[Array, "b u v w 3"]:
    """Returns the video, decoded whole. See `WanVAE.decode`."""
    return vae.apply({"params": params}, latents, method="decode")


def encode_chunk(vae: WanVAE, params: Mapping, video: Float[Array, "b t y x 3"], cache: Mapping | None = None):
    """Encodes the next frames of a video. See `decode_chunk`.

    Returns:
        ((mean, logvar), cache)
    """
    return _chunk(vae, "encode", params, cache, video)


def decode_chunk(vae: WanVAE, params: Mapping, latents: Float[Array, "b t y x z"], cache: Mapping | None = None):
    """Decodes the next latent frames of a video.

    Args:
        vae: the model.
        params: its parameters.
        latents: the first frames of a video if there is no cache, else those after the cache's.
        cache: what the call before returned; None starts a video.

    Returns:
        (frames, cache): 4 t frames (3 fewer at the start), and the last frames that entered each convolution over time.
    """
    return _chunk(vae, "decode", params, cache, latents)


def encode_chunked(vae: WanVAE, params: Mapping, video: Float[Array, "b t y x 3"], chunk: int = 1):
    """`encode` in pieces of `chunk` latent frames, with memory for one piece (beside input and output)."""
    check_video(vae.config, video.shape)
    return scan_chunks(vae, "encode", params, video, chunk * vae.config.temporal_stride)


def decode_chunked(
    vae: WanVAE, params: Mapping, latents: Float[Array, "b t y x z"], chunk: int = 1
) -> Float[Array, "b u v w 3"]:
    """`decode` in pieces of `chunk` latent frames, with memory for one piece (beside input and output)."""
    return scan_chunks(vae, "decode", params, latents, chunk)


def _chunk(vae: WanVAE, method: str, params: Mapping, cache: Mapping | None, x: Array):
    variables = {"params": params} if cache is None else {"params": params, "cache": cache}
    out, state = vae.apply(variables, x, method=method, mutable=["cache"])
    return out, state["cache"]


def scan_chunks(
    vae: WanVAE, method: str, params: Mapping, x: Array, chunk: int, finish: Callable[[Array], Array] = lambda out: out
):
    """Runs a method of `WanVAE` on frame 0 and what the pieces leave over, then in a scan over pieces of frames.

    Args:
        vae: the model.
        method: its name.
        params: the model's.
        x: [b, t, y, x, c].
        chunk: frames of a piece.
        finish: applied to every piece of the result.
    """
    start = 1 + (x.shape[1] - 1) % chunk
    first, cache = _chunk(vae, method, params, None, x[:, :start])
    first = finish(first)
    if start == x.shape[1]:
        return first

    def step(cache, position):
        piece = lax.dynamic_slice_in_dim(x, position, chunk, axis=1)  # rather than scan over x, which would copy it
        out, cache = _chunk(vae, method, params, cache, piece)
        return cache, finish(out)

    _, outs = lax.scan(step, cache, jnp.arange(start, x.shape[1], chunk))
    return jax.tree.map(_join, first, outs)


def _join(first: Shaped[Array, "b s y x c"], outs: Shaped[Array, "n b t y x c"]) -> Shaped[Array, "b u y x c"]:
    b, _, *frame = first.shape
    return jnp.concatenate([first, jnp.moveaxis(outs, 0, 1).reshape(b, -1, *frame)], axis=1)
