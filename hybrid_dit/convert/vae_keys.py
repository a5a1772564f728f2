"""Key tables of the Wan2.1 VAE: diffusers' `AutoencoderKLWan` and Wan's own `Wan2.1_VAE.pth`.

Both hold the same tensors; they name them differently, and Wan numbers the decoder's blocks in one flat list. So one
walk over the architecture serves both, and each row gives the three names of a module.
"""

from collections.abc import Iterator
from typing import NamedTuple

from hybrid_dit.convert.tables import Rule
from hybrid_dit.models.vae import VAEConfig


class _Block(NamedTuple):
    """A block's kind (a key of `_leaves`) and its three names."""

    kind: str
    flax: str
    diffusers: str
    wan: str


class _Leaf(NamedTuple):
    """A parameter of a block: its three names within the block, and `Rule`'s kind and shape."""

    flax: str
    diffusers: str
    wan: str
    kind: str = "same"
    shape: tuple[int, ...] | None = None


def diffusers_rules(config: VAEConfig) -> list[Rule]:
    """Returns the table of diffusers' `AutoencoderKLWan`."""
    return [
        Rule(f"{block.diffusers}.{leaf.diffusers}", f"{block.flax}/{leaf.flax}", leaf.kind, leaf.shape)
        for block in _blocks(config)
        for leaf in _leaves(block.kind, config)
    ]


def wan_rules(config: VAEConfig) -> list[Rule]:
    """Returns the table of Wan's `Wan2.1_VAE.pth` (`WanVAE_` of `wan/modules/vae.py`)."""
    return [
        Rule(f"{block.wan}.{leaf.wan}", f"{block.flax}/{leaf.flax}", leaf.kind, leaf.shape)
        for block in _blocks(config)
        for leaf in _leaves(block.kind, config)
    ]


def _blocks(config: VAEConfig) -> Iterator[_Block]:
    levels = len(config.dim_mult)
    yield _Block("conv", "quant_conv", "quant_conv", "conv1")
    yield _Block("conv", "post_quant_conv", "post_quant_conv", "conv2")
    for part in ("encoder", "decoder"):
        yield _Block("conv", f"{part}/conv_in", f"{part}.conv_in", f"{part}.conv1")
        for i in range(2):
            mid = f"{part}/mid_block/resnets_{i}", f"{part}.mid_block.resnets.{i}", f"{part}.middle.{2 * i}"
            yield _Block("residual", *mid)
        mid = f"{part}/mid_block/attentions_0", f"{part}.mid_block.attentions.0", f"{part}.middle.1"
        yield _Block("attention", *mid)
        yield _Block("norm", f"{part}/norm_out", f"{part}.norm_out", f"{part}.head.0")
        yield _Block("conv", f"{part}/conv_out", f"{part}.conv_out", f"{part}.head.2")
    down = levels * [*(config.num_res_blocks * ["residual"]), "resample"]
    for i, kind in enumerate(down[:-1]):  # the last level isn't followed by a resampling
        yield _Block(kind, f"encoder/down_blocks_{i}", f"encoder.down_blocks.{i}", f"encoder.downsamples.{i}")
    flat = 0
    for level in range(levels):
        flax, diffusers = f"decoder/up_blocks_{level}", f"decoder.up_blocks.{level}"
        for i in range(config.num_res_blocks + 1):
            yield _Block("residual", f"{flax}/resnets_{i}", f"{diffusers}.resnets.{i}", f"decoder.upsamples.{flat}")
            flat += 1
        if level < levels - 1:
            yield _Block("resample", f"{flax}/upsamplers_0", f"{diffusers}.upsamplers.0", f"decoder.upsamples.{flat}")
            flat += 1


def _leaves(kind: str, config: VAEConfig) -> list[_Leaf]:
    """Returns the parameters that a block of this kind may have (shortcuts and time_conv are not always there)."""
    if kind == "conv":
        return [_Leaf("kernel", "weight", "weight", "conv3d"), _Leaf("bias", "bias", "bias")]
    if kind == "norm":
        return [_Leaf("gamma", "gamma", "gamma", shape=(-1, 1, 1, 1))]
    if kind == "residual":
        return [
            _Leaf("norm1/gamma", "norm1.gamma", "residual.0.gamma", shape=(-1, 1, 1, 1)),
            *_conv("conv1", "conv1", "residual.2", "conv3d"),
            _Leaf("norm2/gamma", "norm2.gamma", "residual.3.gamma", shape=(-1, 1, 1, 1)),
            *_conv("conv2", "conv2", "residual.6", "conv3d"),
            *_conv("conv_shortcut", "conv_shortcut", "shortcut", "conv3d"),
        ]
    if kind == "resample":
        return [
            *_conv("resample_1", "resample.1", "resample.1", "conv2d"),
            *_conv("time_conv", "time_conv", "time_conv", "conv3d"),
        ]
    c = config.base_dim * config.dim_mult[-1]  # attention: 1x1 convolutions in torch, matrices in Flax
    return [
        _Leaf("norm/gamma", "norm.gamma", "norm.gamma", shape=(-1, 1, 1)),
        *_conv("to_qkv", "to_qkv", "to_qkv", "conv2d", (3 * c, c, 1, 1)),
        *_conv("proj", "proj", "proj", "conv2d", (c, c, 1, 1)),
    ]


def _conv(flax: str, diffusers: str, wan: str, kind: str, shape: tuple[int, ...] | None = None) -> list[_Leaf]:
    return [
        _Leaf(f"{flax}/kernel", f"{diffusers}.weight", f"{wan}.weight", kind, shape),
        _Leaf(f"{flax}/bias", f"{diffusers}.bias", f"{wan}.bias"),
    ]
