"""Feature maps φ in PyTorch, the twins of `hybrid_dit.ops.feature_maps`: same parameters, same names, same numbers."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import FeatureMapSpec


def parameter_shapes(heads: int, head_dim: int, spec: FeatureMapSpec) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter of one map (φ_q or φ_k)."""
    if spec.kind == "poly":
        width = spec.degree * head_dim
        fan_ins = [head_dim] + [width] * (spec.layers - 1)
    elif spec.kind == "hedgehog":
        width, fan_ins = head_dim, [head_dim]
    elif spec.kind == "elu":
        return {}
    else:
        raise UserError(f"unknown feature map {spec.kind!r}; choose one of {', '.join(FEATURE_MAPS)}")
    shapes = {f"w{i}": (heads, fan_in, width) for i, fan_in in enumerate(fan_ins)}
    return shapes | {f"b{i}": (heads, width) for i in range(len(fan_ins))}


def apply(params: Mapping[str, Tensor], x: Tensor, spec: FeatureMapSpec) -> Tensor:
    """φ(x) >= 0: x [h, m, d] -> [h, m, f] in the dtype of `x`, m being tokens of any sequence."""
    return FEATURE_MAPS[spec.kind](params, x, spec)


def _dense(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """x [h, m, i] times a kernel [h, i, o] per head, float32 out."""
    return torch.bmm(x, kernel.to(x.dtype)).float() + bias.float()[:, None]


def _poly(params, x, spec):
    y = x
    for i in range(spec.layers):
        if i > 0:
            y = F.gelu(y, approximate="tanh").to(x.dtype)
        y = _dense(y, params[f"w{i}"], params[f"b{i}"])
    psi = F.softplus(y)
    # Powers by selection, as in JAX: one element-wise pass that a compiler fuses.
    slice_of = torch.arange(psi.shape[-1], device=x.device) // (psi.shape[-1] // spec.degree)
    features = psi
    for p in range(1, spec.degree):
        features = torch.where(slice_of >= p, features * psi, features)
    return features.to(x.dtype)


def _elu(params, x, spec):
    return (F.elu(x.float()) + 1.0).to(x.dtype)


def _hedgehog(params, x, spec):
    y = _dense(x, params["w0"], params["b0"])
    return torch.softmax(torch.cat([y, -y], dim=-1), dim=-1).to(x.dtype)


FEATURE_MAPS: dict[str, Callable] = {"poly": _poly, "elu": _elu, "hedgehog": _hedgehog}
