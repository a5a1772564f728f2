"""`patch_wan`: an exported hybrid in the `WanModel` of the original Wan2.1 code (wan/modules/model.py)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from hybrid_dit.errors import UserError
from hybrid_dit.ops.tokens import Grid
from hybrid_dit.torch.export import find_transformer, load_into, read_attention
from hybrid_dit.torch.modules import FeatureMaps, rotate


def patch_wan(model: nn.Module, folder: str | Path) -> nn.Module:
    """Turns the original code's `WanModel` into the exported hybrid, in place, and returns it.

    All weights are loaded from `folder`, into the dtypes and the device that the model has; the feature maps become
    `model.blocks[i].feature_map`. The original's sequence parallelism, which replaces the same method, cannot be used.

    Args:
        model: a `WanModel`, sizes as the export's; its weights don't matter.
        folder: an export in the original's layout with `hybrid_config.json`.

    Raises:
        UserError: the folder is no hybrid, or doesn't fit the model.
    """
    folder = find_transformer(folder)
    specs = read_attention(folder, len(model.blocks))
    projection = model.blocks[0].self_attn.q.weight
    converted = [(block, spec) for block, spec in zip(model.blocks, specs) if spec.converted]
    for block, _ in converted:
        if tuple(block.self_attn.window_size) != (-1, -1):
            raise UserError(f"the model has windowed attention {block.self_attn.window_size}; hybrids are global")
    for block, spec in converted:
        maps = FeatureMaps(block.self_attn.num_heads, block.self_attn.head_dim, spec)
        block.feature_map = maps.to(projection.device, projection.dtype)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    try:
        load_into(model, folder, lambda name, stored: dtypes[name], str(projection.device))
    except UserError:
        for block, _ in converted:  # leave the model as it was
            del block.feature_map
        raise
    for block, _ in converted:
        block.self_attn.forward = HybridForward(block.self_attn, block.feature_map)
    return model


class HybridForward:
    """Replaces the `forward` of the original's `WanSelfAttention`."""

    def __init__(self, module: nn.Module, feature_map: FeatureMaps):
        """Takes the self-attention module and the block's feature maps; both stay registered where they are."""
        self.module, self.feature_map = module, feature_map

    def __call__(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        """x [b, n, c], padded behind each video's tokens -> [b, n, c].

        Args:
            x: input, normalised and modulated.
            seq_lens: number of tokens of each video [b]; the product of its grid, and not needed beside it.
            grid_sizes: (frames, rows, columns) of each video [b, 3].
            freqs: table of rotations e^(iθ), complex [1024, d/2].
        """
        own = self.module
        b, n, heads = x.shape[0], x.shape[1], own.num_heads
        q, k, v = (y.view(b, n, heads, -1) for y in (own.norm_q(own.q(x)), own.norm_k(own.k(x)), own.v(x)))
        out = torch.zeros_like(v)
        for i, grid in enumerate(tuple(sizes) for sizes in grid_sizes.tolist()):
            m = grid[0] * grid[1] * grid[2]
            table = rotations(freqs, grid)
            # In float32, then in the precision of v, as the original's flash_attention does.
            rotated = (rotate(y[i : i + 1, :m].float(), *table).to(v.dtype) for y in (q, k))
            out[i : i + 1, :m] = self.feature_map(*rotated, v[i : i + 1, :m], grid)
        return own.o(out.flatten(2))


def rotations(freqs: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, float32 [n, 1, d/2], from the original's table of e^(iθ) (`rope_apply`)."""
    half = freqs.shape[1]
    space = half // 3
    parts = []
    for axis, table in enumerate(freqs.split([half - 2 * space, space, space], dim=1)):
        shape = [1, 1, 1, -1]
        shape[axis] = grid[axis]
        parts.append(table[: grid[axis]].view(shape).expand(*grid, -1))
    table = torch.cat(parts, dim=-1).reshape(-1, 1, half)
    return table.real.float(), table.imag.float()
