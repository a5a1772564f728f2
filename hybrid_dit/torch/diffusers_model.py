"""`load_hybrid`: an exported hybrid as diffusers' `WanTransformer3DModel`."""

import types
from pathlib import Path

import torch
from torch import Tensor, nn

from hybrid_dit.convert.description import write_description
from hybrid_dit.convert.json_file import read_json
from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid
from hybrid_dit.torch.export import find_transformer, load_into, read_attention
from hybrid_dit.torch.modules import FeatureMaps, rotate


def load_hybrid(folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Returns a diffusers `WanTransformer3DModel` whose converted blocks compute hybrid attention.

    It goes wherever the original goes: `WanPipeline(transformer=...)`, offloading, `torch.compile`, `save_pretrained`
    (which writes the description too, so that `load_hybrid` reads the result).

    Args:
        folder: a transformer folder in diffusers' layout with `hybrid_config.json`, or a pipeline folder around one.
        dtype: of the parameters; None keeps what is stored. As in diffusers, norms, time embedding and modulation stay
            float32 where the stored model has them so or `dtype` would make them 16-bit.
        device: where the model is put.

    Raises:
        UserError: diffusers is missing, or the folder is no hybrid or doesn't fit its config.json.
    """
    try:
        from accelerate import init_empty_weights
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise UserError(f"load_hybrid needs diffusers ({error}): pip install diffusers accelerate") from error
    folder = find_transformer(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config.get("num_attention_heads"), int):
        raise UserError(
            f"{folder}/config.json is not of diffusers' WanTransformer3DModel; for the original's layout use patch_wan"
        )
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel.from_config(config)
        specs = read_attention(folder, len(model.blocks))
        for block, spec in zip(model.blocks, specs):
            if spec.converted:
                heads = model.config.num_attention_heads
                block.feature_map = FeatureMaps(heads, model.config.attention_head_dim, spec)

    precise = WanTransformer3DModel._keep_in_fp32_modules or []

    def dtype_of(name: str, stored: torch.dtype) -> torch.dtype:
        if dtype is None or not stored.is_floating_point:
            return stored
        return torch.float32 if set(precise) & set(name.split(".")) else dtype

    load_into(model, folder, dtype_of, str(device))
    model.to(device)  # what is not in the files: tables of RoPE
    tokens = _Tokens(tuple(model.config.patch_size))
    model.register_forward_pre_hook(tokens.on_forward, with_kwargs=True)
    for block, spec in zip(model.blocks, specs):
        if spec.converted:
            block.attn1.set_processor(HybridProcessor(block.feature_map, tokens))
    model.register_to_config(_name_or_path=str(folder))
    model.save_pretrained = types.MethodType(_save_pretrained, model)
    return model.eval()


class _Tokens:
    """The token grid of the video that is being denoised: set when the model is called, read by its blocks."""

    def __init__(self, patch: tuple[int, int, int]):
        self.patch = patch
        self.grid: Grid = (0, 0, 0)

    def on_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        self.grid = tuple(size // p for size, p in zip(latents.shape[2:], self.patch))


class HybridProcessor:
    """Attention of a converted block: projections and RoPE as in diffusers' `WanAttnProcessor`, then Eq. 5."""

    def __init__(self, feature_map: FeatureMaps, tokens: _Tokens):
        """Takes the block's feature maps (registered with the block, not here) and the model's token grid."""
        self.feature_map, self.tokens = feature_map, tokens

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [b, n, c] -> [b, n, c]; self-attention over whole videos, therefore no mask."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise UserError("hybrid attention is self-attention without a mask")
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = self.feature_map(q, k, v, self.tokens.grid).flatten(2)
        for layer in attn.to_out:
            y = layer(y)
        return y


def _save_pretrained(self: nn.Module, save_directory: str | Path, *args, **kwargs) -> None:
    """`save_pretrained` of the model, and `hybrid_config.json` beside it."""
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    specs = [block.feature_map.spec if hasattr(block, "feature_map") else AttentionSpec() for block in self.blocks]
    write_description(Path(save_directory), specs)
