"""Feature maps φ in PyTorch, the twins of `hybrid_dit.ops.feature_maps`: same parameters, same names, same numbers."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import FeatureMapSpec

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(heads: int, head_dim: int, spec: FeatureMapSpec) -> dict[str, Shapes]:
    """Returns the shapes of a pair's parameters, {"q": ..., "k": ...}; "k" is empty if keys share the queries' map."""
    if spec.kind == "poly":
        width = spec.degree * head_dim
        widths = [head_dim, *(spec.hidden or width,) * (spec.layers - 1), width]
    elif spec.kind == "hedgehog":
        widths = [head_dim, head_dim]
    elif spec.kind == "elu":
        widths = []
    else:
        raise UserError(f"unknown feature map {spec.kind!r}; choose one of {', '.join(FEATURE_MAPS)}")
    pairs = list(enumerate(zip(widths, widths[1:])))
    shapes = {f"w{i}": (heads, *pair) for i, pair in pairs} | {f"b{i}": (heads, out) for i, (_, out) in pairs}
    return {"q": shapes, "k": {} if spec.shared else shapes}


def apply(params: Mapping[str, Tensor], x: Tensor, spec: FeatureMapSpec) -> Tensor:
    """φ(x) >= 0: x [h, m, d] -> [h, m, f] in `work_dtype` of that of `x`, m being tokens of any sequence."""
    return FEATURE_MAPS[spec.kind](params, x, spec).to(work_dtype(x.dtype))


def of_keys(phi: Mapping[str, Mapping[str, Tensor]], spec: FeatureMapSpec) -> Mapping[str, Tensor]:
    """Returns the parameters of φ_k: those of φ_q where keys go through the queries' map."""
    return phi["q" if spec.shared else "k"]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of features and of sums over them: float16 ends at 65,504, which both exceed; bfloat16 then."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _dense(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """x [h, m, i] times a kernel [h, i, o] per head, float32 out."""
    return torch.bmm(x, kernel.to(x.dtype)).float() + bias.float()[:, None]


def _poly(params, x, spec):
    y = x
    for i in range(spec.layers):
        if i > 0:
            y = F.gelu(y, approximate="tanh").to(x.dtype)
        y = _dense(y, params[f"w{i}"], params[f"b{i}"])
    psi = ACTIVATIONS[spec.activation](y)
    # Powers by selection, as in JAX: one element-wise pass that a compiler fuses.
    slice_of = torch.arange(psi.shape[-1], device=x.device) // (psi.shape[-1] // spec.degree)
    features = psi
    for p in range(1, spec.degree):
        features = torch.where(slice_of >= p, features * psi, features)
    return features


def _elu_plus_one(x):
    return F.elu(x) + 1.0


def _elu(params, x, spec):
    return _elu_plus_one(x.float())


def _hedgehog(params, x, spec):
    y = _dense(x, params["w0"], params["b0"])
    return torch.softmax(torch.cat([y, -y], dim=-1), dim=-1)


FEATURE_MAPS: dict[str, Callable] = {"poly": _poly, "elu": _elu, "hedgehog": _hedgehog}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "relu": F.relu,
    "exp": lambda y: torch.exp(y.clamp_max(12.0)),  # bounded as in JAX, so that powers stay finite
    "elu": _elu_plus_one,
    "square": torch.square,
}
