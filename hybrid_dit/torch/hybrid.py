"""Hybrid softmax/linear attention (paper Eq. 5) in PyTorch; twin of `hybrid_dit.ops.hybrid`, same arguments."""

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid, linear_mask, softmax_tokens
from hybrid_dit.torch import feature_maps
from hybrid_dit.torch.options import compiled, compiles
from hybrid_dit.torch.softmax import softmax_part

TINY = 1e-18  # as in `hybrid_dit.ops.hybrid`
SPLITS = 16  # most pieces that the sum over tokens is cut into: 12 heads alone would leave a GPU idle


def attention(
    q: Tensor, k: Tensor, v: Tensor, phi: Mapping[str, Mapping[str, Tensor]], *, spec: AttentionSpec, grid: Grid
) -> Tensor:
    """Self-attention over one video's tokens as `spec` says, in the dtype of `q`; no N×N or N×N/R matrix in memory.

    Args:
        q: queries after qk-norm and RoPE, [b, n, h, d].
        k: keys, likewise.
        v: values, likewise.
        phi: parameters of the feature maps, {"q": ..., "k": ...}; ignored by softmax attention, "k" by a shared map.
        spec: what to compute.
        grid: frames, rows, columns of the token grid; their product is n.
    """
    if spec.kind == "softmax":
        return softmax_part(*(x.transpose(1, 2) for x in (q, k, v)), "lse")[0].transpose(1, 2).contiguous()
    out, weight, keep = None, None, None
    if spec.kind == "hybrid":
        index = _softmax_index(grid, spec.rate, spec.pattern, q.device)
        k_s, v_s = k.index_select(1, index), v.index_select(1, index)
        out, weight = softmax_part(*(x.transpose(1, 2) for x in (q, k_s, v_s)), spec.stabiliser)
        keep = _linear_mask(grid, spec.rate, spec.pattern, q.device)
    state_of, finish_with = _state, _finish
    if compiles(q):
        state_of, finish_with = compiled(_state), compiled(_finish)
    state, normaliser = state_of(k, v, feature_maps.of_keys(phi, spec.feature_map), keep, spec.feature_map)
    return finish_with(q, out, weight, phi["q"], state, normaliser, spec.feature_map)


# Operators, so that a compiler knows their shape and calls them; int (not SymInt) makes it specialise on every number.
_SCHEMA = "(int[] grid, int rate, str pattern, Device device) -> Tensor"


@torch.library.custom_op("hybrid_dit::softmax_index", mutates_args=(), schema=_SCHEMA)
def _softmax_index(grid, rate, pattern, device):
    return _on_device(softmax_tokens, tuple(grid), rate, pattern, device)


@torch.library.custom_op("hybrid_dit::linear_mask", mutates_args=(), schema=_SCHEMA)
def _linear_mask(grid, rate, pattern, device):
    return _on_device(linear_mask, tuple(grid), rate, pattern, device)


@_softmax_index.register_fake
def _(grid, rate, pattern, device):
    return torch.empty(len(softmax_tokens(tuple(grid), rate, pattern)), dtype=torch.int32, device=device)


@_linear_mask.register_fake
def _(grid, rate, pattern, device):
    return torch.empty(math.prod(grid), device=device)


# Kept: making them again in every block would cost a copy to the device each time.
@functools.lru_cache(maxsize=64)
def _on_device(function, grid, rate, pattern, device):
    with torch.inference_mode(False):  # else a tensor made while sampling could not be used in training
        return torch.from_numpy(function(grid, rate, pattern)).to(device)


def _state(k, v, params, keep, spec) -> tuple[Tensor, Tensor]:
    """The sums over L of φ_k(k_j)ᵀ v_j [h, b, f, d] and of φ_k(k_j) [h, b, f], float32.

    One product gives both: v gets `keep` as a further column. The sum over tokens is cut into pieces, each accumulated
    in float32 by the product, added up in float32.
    """
    b, n, h, d = k.shape
    phi = feature_maps.apply(params, k.permute(2, 0, 1, 3).reshape(h, b * n, d), spec)
    work = phi.dtype
    ones = torch.ones(n, dtype=work, device=v.device) if keep is None else keep.to(work)
    column = ones[:, None, None].expand(b, n, h, 1)
    padding = torch.zeros((), dtype=work, device=v.device).expand(b, n, h, 7)  # rows of 16 bytes' multiples
    masked = torch.cat([v.to(work) * ones[:, None, None], column, padding], dim=-1)
    pieces = next(s for s in range(SPLITS, 0, -1) if n % s == 0)
    masked = masked.permute(2, 0, 1, 3).reshape(h * b * pieces, n // pieces, d + 8)
    phi = phi.reshape(h * b * pieces, n // pieces, -1)
    sums = torch.bmm(phi.transpose(1, 2), masked).float().unflatten(0, (h, b, pieces)).sum(dim=2)
    return sums[..., :d], sums[..., d]


def _finish(q, out, weight, params, state, normaliser, spec) -> Tensor:
    """The linear sums of every query, and Eq. 5 from all sums: [b, n, h, d] in the dtype of `q`."""
    b, n, h, d = q.shape
    phi = feature_maps.apply(params, q.permute(2, 0, 1, 3).reshape(h, b * n, d), spec).unflatten(1, (b, n))
    denominator = (phi.float() * normaliser[:, :, None]).sum(dim=-1).permute(1, 2, 0)
    numerator = torch.matmul(phi, state.to(phi.dtype)).float().permute(1, 2, 0, 3)
    if out is not None:
        weight = torch.ones((), device=q.device) if weight is None else weight.transpose(1, 2)
        numerator = numerator + out.transpose(1, 2).float() * weight[..., None]
        denominator = denominator + weight
    return (numerator / denominator.clamp_min(TINY)[..., None]).to(q.dtype).contiguous()
