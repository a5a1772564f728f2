"""The parameters that a hybrid adds to a Wan block, and the attention that uses them; for both Wan code bases."""

import torch
from torch import Tensor, nn

from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid
from hybrid_dit.torch import feature_maps
from hybrid_dit.torch.hybrid import attention


class FeatureMap(nn.Module):
    """Parameters of one map, φ_q or φ_k."""

    def __init__(self, shapes: feature_maps.Shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self) -> dict[str, Tensor]:
        """Returns the parameters by name: called, not read, so that hooks that fetch weights to a device run."""
        return dict(self.named_parameters(recurse=False))


class FeatureMaps(nn.Module):
    """φ_q and φ_k of one block, and its attention; stored as `blocks.{i}.feature_map.{q,k}.{w,b}{layer}`.

    A shared map is stored as q; k has no parameters then.
    """

    def __init__(self, heads: int, head_dim: int, spec: AttentionSpec):
        super().__init__()
        self.spec = spec
        shapes = feature_maps.parameter_shapes(heads, head_dim, spec.feature_map)
        self.q, self.k = FeatureMap(shapes["q"]), FeatureMap(shapes["k"])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """q, k (after qk-norm and RoPE) and v, each [b, n, h, d] -> [b, n, h, d]."""
        return attention(q, k, v, {"q": self.q(), "k": self.k()}, spec=self.spec, grid=grid)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.spec.label}, {self.spec.pattern}, {self.spec.stabiliser}, {self.spec.feature_map}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[..., 2i], x[..., 2i+1]) by angle i: x [b, n, h, d], cos and sin [..., n, 1, d/2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
