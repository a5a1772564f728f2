"""Decoding a video in windows of its columns: exact at the seams, with the memory of one window.

The decoder looks at a whole frame only in its middle, the attention at the latents' own resolution. That part runs on
whole frames first. What follows is convolutions, so a pixel depends on a known number of latent columns around its own
(`halo`, 13 for Wan: 12.25 rounded up). A window is decoded with that many more columns on both sides and they are cut
off afterwards: no blending, equal to the whole up to rounding.

The halo is why there are few windows, and only of columns: 3 of a 720p video (160 latent columns) are 71 wide, 33% more
work for 44% of the memory; 8 would be 43 wide, 115% more work for 27%.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
from jax import lax

from hybrid_dit.array_typing import Array, Float
from hybrid_dit.models.vae import VAEConfig, WanVAE, scan_chunks


def halo(config: VAEConfig) -> int:
    """Returns how many latent columns beside its own a decoded pixel depends on, after the decoder's middle."""
    pixels = 0  # reach of the convolutions so far, in the columns of their level
    for level in range(len(config.dim_mult)):
        pixels += 2 * (config.num_res_blocks + 1)  # residual blocks of two 3 x 3 x 3 convolutions
        if level < len(config.temporal_downsample):
            pixels = 2 * pixels + 1  # upsampling and its convolution
    return math.ceil((pixels + 1) / config.spatial_stride)  # conv_out


def windows(columns: int, count: int, reach: int) -> tuple[int, list[int], list[int]]:
    """Returns equally wide windows that cover all columns, each with `reach` columns more at its inner edges.

    Args:
        columns: number of them.
        count: of windows; fewer if there are too few columns for so many.
        reach: see `halo`.

    Returns:
        (width of a window, its first column for each, borders: window i is kept from borders[i] to borders[i + 1])
    """
    count = max(min(count, columns - 2 * reach), 1)
    width = math.ceil((columns + 2 * reach * (count - 1)) / count)
    starts = [(columns - width) * i // max(count - 1, 1) for i in range(count)]
    return width, starts, [0, *(start + reach for start in starts[1:]), columns]


def decode_in_windows(
    vae: WanVAE,
    params: Mapping,
    latents: Float[Array, "b t y x z"],
    count: int,
    chunk: int = 1,
    finish: Callable[[Array], Array] = lambda video: video,
    spread: Callable[[Array], Array] | None = None,
) -> Array:
    """`vae.decode_chunked` in `count` windows of columns, one after the other.

    Args:
        vae: the model.
        params: its parameters.
        latents: unnormalised.
        count: of windows.
        chunk: latent frames decoded at once.
        finish: applied to every piece of the video, so that what it makes smaller (bytes for floats) never is whole.
        spread: puts windows [count b, ...] on devices by their leading axis; all windows are then decoded at once.

    Returns:
        finish(video), [b, u, v, w, 3].
    """
    b, _, _, columns, _ = latents.shape
    width, starts, borders = windows(columns, count, halo(vae.config))
    middle = scan_chunks(vae, "decode_middle", params, latents, chunk)

    def decode(window):
        return scan_chunks(vae, "decode_rest", params, window, chunk, finish)

    cut = partial(lax.dynamic_slice_in_dim, middle, slice_size=width, axis=3)
    if spread is not None:
        pieces = decode(spread(jnp.concatenate([cut(start) for start in starts])))
        pieces = pieces.reshape(len(starts), b, *pieces.shape[1:])
    else:
        pieces = lax.map(lambda start: decode(cut(start)), jnp.asarray(starts))
    side = vae.config.spatial_stride
    kept = [
        piece[..., side * (left - start) : side * (right - start), :]
        for piece, start, left, right in zip(pieces, starts, borders, borders[1:])
    ]
    return jnp.concatenate(kept, axis=3)
