"""Sizes of the three models told from the shapes of their tensors, for files that come without a config.json."""

import re
from collections.abc import Mapping
from pathlib import Path

from hybrid_dit.errors import UserError
from hybrid_dit.models.umt5 import UMT5Config
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.wan import WanConfig

HEAD_DIM = 128  # of every published Wan
Shapes = Mapping[str, tuple[int, ...]]
_WAN_SIZES = {  # feed-forward, text and time embedding
    "wan": ("blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight"),
    "diffusers": (
        "blocks.0.ffn.net.0.proj.weight",
        "condition_embedder.text_embedder.linear_1.weight",
        "condition_embedder.time_embedder.linear_1.weight",
    ),
}
_UMT5_SIZES = {  # embedding, query, feed-forward, position bias of the first block
    "wan": (
        "token_embedding.weight",
        "blocks.0.attn.q.weight",
        "blocks.0.ffn.gate.0.weight",
        "blocks.0.pos_embedding.embedding.weight",
    ),
    "diffusers": (
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
}


def infer_wan(path: Path, layout: str, shapes: Shapes) -> tuple[WanConfig, tuple[str, ...]]:
    """Returns a DiT's sizes and a note on how they were told.

    Raises:
        UserError: a tensor that is needed is missing, or the width is no multiple of 128.
    """
    _require(path, shapes, "patch_embedding.weight", *_WAN_SIZES[layout], ndim={"patch_embedding.weight": 5})
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    if dim % HEAD_DIM or not dim:
        raise UserError(
            f"{path} has no config.json, and its width {dim} is no multiple of {HEAD_DIM}, the head width of published "
            "models; put its config.json beside the weights in a folder and give the folder"
        )
    ffn, text, time = (shapes[name] for name in _WAN_SIZES[layout])
    config = WanConfig(
        dim=dim,
        num_heads=dim // HEAD_DIM,
        ffn_dim=ffn[0],
        num_layers=_blocks(path, shapes, r"blocks\.(\d+)\."),
        in_channels=in_channels,
        text_dim=text[1],
        freq_dim=time[1],
        patch=tuple(patch),
    )
    return config, (f"no config.json; sizes are from the shapes, {dim // HEAD_DIM} heads = {dim} / {HEAD_DIM}",)


def infer_umt5(path: Path, layout: str, shapes: Shapes) -> tuple[UMT5Config, tuple[str, ...]]:
    """Returns a text encoder's sizes and a note on how they were told.

    Raises:
        UserError: a tensor that is needed is missing.
    """
    embedding, query, ffn, bias = _UMT5_SIZES[layout]
    if layout == "diffusers" and embedding not in shapes:
        embedding = "encoder.embed_tokens.weight"
    _require(path, shapes, embedding, query, ffn, bias)
    vocabulary, width = shapes[embedding]
    buckets, heads = shapes[bias]
    if not heads or shapes[query][0] % heads:
        raise UserError(f"{path}: {query} has {shapes[query][0]} rows, which {heads} heads ({bias}) don't divide")
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes[query][0] // heads,
        d_ff=shapes[ffn][0],
        num_layers=_blocks(path, shapes, r"blocks\.(\d+)\." if layout == "wan" else r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    return config, (f"no config.json; sizes are from the shapes, {config.num_layers} blocks of width {width}",)


def infer_vae(path: Path, layout: str, shapes: Shapes) -> tuple[VAEConfig, tuple[str, ...]]:
    """Returns a VAE's architecture and a note on how it was told; latent statistics are the published ones.

    Raises:
        UserError: it is no Wan2.1 VAE, or has another number of latent channels than the published one.
    """
    first, last, down, resample, residual = {
        "wan": ("encoder.conv1.weight", "conv2.weight", "encoder.downsamples", "resample.1", "residual.6"),
        "diffusers": ("encoder.conv_in.weight", "post_quant_conv.weight", "encoder.down_blocks", "resample.1", "conv2"),
    }[layout]
    _require(path, shapes, first, last, ndim={first: 5, last: 5})
    base, widths, blocks, temporal = shapes[first][0], [], [0], []
    for i in range(sum(1 for name in shapes if re.fullmatch(rf"{re.escape(down)}\.\d+\.\w+(\.\d+)?\.weight", name))):
        if f"{down}.{i}.{residual}.weight" in shapes:
            widths[len(blocks) - 1 :] = [shapes[f"{down}.{i}.{residual}.weight"][0]]
            blocks[-1] += 1
        elif f"{down}.{i}.{resample}.weight" in shapes:
            temporal.append(f"{down}.{i}.time_conv.weight" in shapes)
            blocks.append(0)
    z_dim = shapes[last][0]
    if not base or not widths or len(widths) != len(blocks) or len(set(blocks)) > 1 or any(w % base for w in widths):
        raise UserError(f"{path} is no Wan2.1 VAE that can be told from its shapes; put its config.json beside it")
    if z_dim != len(VAEConfig.latents_mean):
        raise UserError(
            f"{path} has {z_dim} latent channels; without a config.json their mean and deviation are known for the "
            f"published {len(VAEConfig.latents_mean)} only. Put its config.json beside the weights and give the folder"
        )
    config = VAEConfig(
        base_dim=base,
        dim_mult=tuple(w // base for w in widths),
        num_res_blocks=blocks[0],
        temporal_downsample=tuple(temporal),
    )
    return config, ("no config.json; architecture is from the shapes, statistics of latents are Wan2.1's",)


INFER = {"transformer": infer_wan, "text_encoder": infer_umt5, "vae": infer_vae}


def _require(path: Path, shapes: Shapes, *names: str, ndim: Mapping[str, int] | None = None) -> None:
    for name in names:
        if len(shapes.get(name, ())) != (ndim or {}).get(name, 2):
            raise UserError(f"{path} lacks {name}, so its sizes can't be told, and has no config.json")


def _blocks(path: Path, shapes: Shapes, pattern: str) -> int:
    """Returns one more than the highest block number; a lying one may not make a model of a million blocks."""
    count = 1 + max(int(m[1]) for name in shapes if (m := re.match(pattern, name)))
    if count > len(shapes):
        raise UserError(f"{path} numbers its blocks up to {count - 1} but holds {len(shapes)} tensors")
    return count
