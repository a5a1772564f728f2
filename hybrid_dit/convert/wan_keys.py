"""Key tables of the Wan2.1 DiT: the original layout (`wan`) and diffusers' (`diffusers`).

The feature maps of a hybrid are ours in both layouts: `blocks.{i}.feature_map.{q,k}.{w,b}{layer}`.
"""

from hybrid_dit.convert.tables import Rule
from hybrid_dit.models.wan import WanConfig

# Flax name of a linear layer -> (original name, diffusers name). `{i}` is the stacked block axis.
_LINEAR = {
    "text_embedding_0": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "text_embedding_2": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "time_embedding_0": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "time_embedding_2": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "time_projection": ("time_projection.1", "condition_embedder.time_proj"),
    "head": ("head.head", "proj_out"),
    "blocks/ffn_0": ("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj"),
    "blocks/ffn_2": ("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2"),
    **{
        f"blocks/{name}/{x}": (f"blocks.{{i}}.{name}.{x}", f"blocks.{{i}}.{attn}.{to}")
        for name, attn in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for x, to in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
}
_NORMS = {
    f"blocks/{name}/norm_{x}/scale": (f"blocks.{{i}}.{name}.norm_{x}.weight", f"blocks.{{i}}.{attn}.norm_{x}.weight")
    for name, attn in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for x in "qk"
} | {
    # The original's norm3 is diffusers' norm2: both are the affine norm before cross-attention.
    "blocks/norm3/scale": ("blocks.{i}.norm3.weight", "blocks.{i}.norm2.weight"),
    "blocks/norm3/bias": ("blocks.{i}.norm3.bias", "blocks.{i}.norm2.bias"),
}
_MODULATION = {
    "blocks/modulation": ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table", 6),
    "head_modulation": ("head.modulation", "scale_shift_table", 2),
}

LAYOUTS = ("wan", "diffusers")


def rules(config: WanConfig, layout: str) -> list[Rule]:
    """Returns the key table of a Wan DiT (teacher or hybrid) in `layout` "wan" or "diffusers"."""
    side = LAYOUTS.index(layout)
    table = [
        Rule("patch_embedding.weight", "patch_embedding/kernel", "patch", (-1, config.in_channels, *config.patch)),
        Rule("patch_embedding.bias", "patch_embedding/bias"),
    ]
    for flax, names in _LINEAR.items():
        table.append(Rule(f"{names[side]}.weight", f"{flax}/kernel", "linear"))
        table.append(Rule(f"{names[side]}.bias", f"{flax}/bias"))
    table += [Rule(names[side], flax) for flax, names in _NORMS.items()]
    table += [Rule(names[side], flax, "same", (1, names[2], -1)) for flax, names in _MODULATION.items()]
    for x in "qk":
        table.append(Rule(f"blocks.{{i}}.feature_map.{x}.w{{j}}", f"feature_maps/{x}/w{{j}}"))
        table.append(Rule(f"blocks.{{i}}.feature_map.{x}.b{{j}}", f"feature_maps/{x}/b{{j}}"))
    return table


def config_from_diffusers(config: dict) -> WanConfig:
    """Returns the sizes from diffusers' transformer/config.json."""
    heads = config["num_attention_heads"]
    return WanConfig(
        dim=heads * config["attention_head_dim"],
        num_heads=heads,
        ffn_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
        in_channels=config["in_channels"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        patch=tuple(config["patch_size"]),
        eps=config.get("eps", 1e-6),
    )


def config_to_diffusers(config: WanConfig) -> dict:
    """Inverse of `config_from_diffusers`, with every key that `WanTransformer3DModel` expects."""
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.in_channels,
        "patch_size": list(config.patch),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def config_from_wan(config: dict) -> WanConfig:
    """Returns the sizes from the original repository's config.json (`WanModel`)."""
    return WanConfig(
        dim=config["dim"],
        num_heads=config["num_heads"],
        ffn_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
        in_channels=config["in_dim"],
        text_dim=config.get("text_dim", 4096),  # not in the published file; WanModel's default
        freq_dim=config["freq_dim"],
        patch=tuple(config.get("patch_size", (1, 2, 2))),
        eps=config["eps"],
    )


def config_to_wan(config: WanConfig) -> dict:
    """Inverse of `config_from_wan`, with every key that `WanModel` expects."""
    return {
        "_class_name": "WanModel",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "t2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.in_channels,
        "patch_size": list(config.patch),
        "text_dim": config.text_dim,
        "text_len": 512,
    }
