"""Layers of the Wan2.1 video VAE: causal 3-D convolutions that can stream, and the blocks built of them.

A layer sees a video as [b, t, y, x, c]. Time is causal: an output frame depends on its own and earlier input frames
alone. That allows streaming, i.e. feeding a video in pieces: with the collection "cache" mutable, every convolution
over time leaves its last input frames there and continues from them in the next call. A call without a cache starts a
video. So the whole video at once is the first piece of a stream nobody continues, and there is one code path.

The model matched is diffusers' `AutoencoderKLWan` (Wan2.1 variant). Its odd treatment of frame 0, which is never
resampled in time (see `Resample`), is what makes 4k + 1 frames into k + 1 latent ones.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.ops.softmax import softmax_attention


def conv_over_time(
    x: Float[Array, "b t y x c"], kernel: Float[Array, "kt ky kx c o"], *, stride: int
) -> Float[Array, "b u y x o"]:
    """3-D convolution, unpadded and strided in time, zero-padded ("same", odd kernel) in space.

    The frames that one output frame needs are laid side by side as channels; the rest is a 2-D convolution with the
    frames as batch. This computes the same sums as XLA's own 3-D convolution, which is 3 to 6 times slower on CPU.
    """
    b, t, y, x_, c = x.shape
    kt, ky, kx, _, o = kernel.shape
    frames = (t - kt) // stride + 1
    if frames <= 0:  # the first piece of a stream may be too short to be resampled in time
        return jnp.zeros((b, 0, y, x_, o), x.dtype)
    taps = [x[:, k : k + (frames - 1) * stride + 1 : stride] for k in range(kt)]
    folded = jnp.concatenate(taps, axis=-1).reshape(b * frames, y, x_, kt * c)
    flat_kernel = jnp.moveaxis(kernel, 0, 2).reshape(ky, kx, kt * c, o)
    out = lax.conv_general_dilated(
        folded,
        flat_kernel,
        window_strides=(1, 1),
        padding=[(ky // 2, ky // 2), (kx // 2, kx // 2)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out.reshape(b, frames, y, x_, o)


class CausalConv(nn.Module):
    """Causal 3-D convolution, "same" in space (diffusers' `WanCausalConv3d`).

    Attributes:
        features: output channels.
        kernel_size: (time, rows, columns).
        stride: in time.
        dtype: of the computation.
    """

    features: int
    kernel_size: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t y x c"], before: Float[Array, "b p y x c"] | None = None
    ) -> Float[Array, "b u y x o"]:
        """Returns t / stride output frames.

        Args:
            x: the next frames of the video, a multiple of `stride`.
            before: what precedes the video's first frame, kernel_size[0] - stride frames (default: zeros). Used only
                at the start of a video, i.e. when there is no cache.
        """
        fan_in_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        kernel = self.param("kernel", fan_in_init, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        past = self.kernel_size[0] - self.stride
        if past > 0:
            x = jnp.concatenate([self._past(x, past, before), x], axis=1)
            if self.is_mutable_collection("cache") and not self.is_initializing():
                self.put_variable("cache", "past", x[:, -past:])
        # Under remat the backward pass keeps x instead of its three copies side by side; nothing else is recomputed.
        conv = jax.checkpoint(functools.partial(conv_over_time, stride=self.stride))
        return conv(x, kernel) + bias

    def continues(self) -> bool:
        """Says whether there is a cache, i.e. whether this call continues a video rather than starting one."""
        return self.has_variable("cache", "past")

    def _past(self, x: Array, past: int, before: Array | None) -> Array:
        if self.continues():
            return self.get_variable("cache", "past")
        return jnp.zeros_like(x, shape=(x.shape[0], past, *x.shape[2:])) if before is None else before.astype(x.dtype)


class RMSNorm(nn.Module):
    """x / ||x||_2 * sqrt(c) * gamma over channels, in float32 (diffusers' `WanRMS_norm`)."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Returns x, normalised, in `dtype`."""
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        # The clamp is the 1e-12 below which torch's `normalize` clamps the norm, squared.
        inverse = lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
        return (x * inverse * (x.shape[-1] ** 0.5 * gamma)).astype(self.dtype)


class ResidualBlock(nn.Module):
    """Two times (norm, silu, causal 3x3x3 convolution) plus a shortcut (diffusers' `WanResidualBlock`)."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t y x c"]) -> Float[Array, "b t y x o"]:
        """Returns `features` channels."""
        h = CausalConv(self.features, dtype=self.dtype, name="conv1")(nn.silu(RMSNorm(self.dtype, name="norm1")(x)))
        h = CausalConv(self.features, dtype=self.dtype, name="conv2")(nn.silu(RMSNorm(self.dtype, name="norm2")(h)))
        if x.shape[-1] != self.features:
            x = CausalConv(self.features, (1, 1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class FrameAttention(nn.Module):
    """Softmax attention of one head within each frame (diffusers' `WanAttentionBlock`)."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t y x c"]) -> Float[Array, "b t y x c"]:
        """Returns x plus the attention's output."""
        b, t, y, x_, c = x.shape
        h = RMSNorm(self.dtype, name="norm")(x).reshape(b * t, y * x_, c)
        q, k, v = jnp.split(nn.Dense(3 * c, dtype=self.dtype, name="to_qkv")(h)[:, :, None], 3, axis=-1)
        h = softmax_attention(q, k, v)  # in tiles: 720p has 14,400 positions, whose scores are 829 MB a frame
        return x + nn.Dense(c, dtype=self.dtype, name="proj")(h).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block (diffusers' `WanMidBlock`)."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t y x c"]) -> Float[Array, "b t y x c"]:
        """Returns the three blocks' output."""
        x = ResidualBlock(x.shape[-1], self.dtype, name="resnets_0")(x)
        x = FrameAttention(self.dtype, name="attentions_0")(x)
        return ResidualBlock(x.shape[-1], self.dtype, name="resnets_1")(x)


class Downsample(nn.Module):
    """Halves rows and columns and, if `temporal`, frames (diffusers' `WanResample`, modes downsample2d/3d).

    Frame 0 is not resampled in time; every later output frame is a convolution over three input frames:
    out[0] = x[0], out[i] = conv(x[2i-2], x[2i-1], x[2i]).
    """

    temporal: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t y x c"]) -> Float[Array, "b u v w c"]:
        """Returns 1 + (t - 1) / 2 frames if `temporal` (t / 2 when continuing a stream), else t."""
        c = x.shape[-1]
        x = nn.Conv(c, (3, 3), strides=2, padding=[(0, 1), (0, 1)], dtype=self.dtype, name="resample_1")(x)
        if not self.temporal:
            return x
        time_conv = CausalConv(c, (3, 1, 1), stride=2, dtype=self.dtype, name="time_conv")
        if time_conv.continues():
            return time_conv(x)
        first, rest = x[:, :1], x[:, 1:]
        return jnp.concatenate([first, time_conv(rest, before=first)], axis=1)


class Upsample(nn.Module):
    """Doubles rows and columns and, if `temporal`, frames; halves channels (diffusers' `WanResample`, upsample2d/3d).

    In time, frame 0 stays one frame, and it is invisible to the convolution (diffusers' cache value "Rep"): every later
    frame becomes the two that the halves of the convolution's channels hold.
    """

    temporal: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t y x c"]) -> Float[Array, "b u v w o"]:
        """Returns 1 + 2 (t - 1) frames if `temporal` (2 t when continuing a stream), else t."""
        c = x.shape[-1]
        if self.temporal:
            time_conv = CausalConv(2 * c, (3, 1, 1), dtype=self.dtype, name="time_conv")
            if time_conv.continues():
                x = _interleave(time_conv(x))
            else:
                first, rest = x[:, :1], x[:, 1:]
                x = jnp.concatenate([first, _interleave(time_conv(rest))], axis=1)
        b, t, y, x_, _ = x.shape
        x = jnp.broadcast_to(x[:, :, :, None, :, None], (b, t, y, 2, x_, 2, c)).reshape(b, t, 2 * y, 2 * x_, c)
        return nn.Conv(c // 2, (3, 3), padding=1, dtype=self.dtype, name="resample_1")(x)


def _interleave(x: Array) -> Array:
    """[b, t, y, x, 2c] -> [b, 2t, y, x, c]."""
    b, t, y, x_, c = x.shape
    return jnp.moveaxis(x.reshape(b, t, y, x_, 2, c // 2), 4, 2).reshape(b, 2 * t, y, x_, c // 2)
