"""What a block's attention is, as data: frozen, hashable, and therefore static under jit."""

import dataclasses

from hybrid_dit.errors import UserError

KINDS = ("softmax", "linear", "hybrid")
PATTERNS = ("stride", "lattice")
STABILISERS = ("max", "lse")
ACTIVATIONS = ("softplus", "relu", "exp", "elu", "square")


@dataclasses.dataclass(frozen=True)
class FeatureMapSpec:
    """A feature map: its kind and the sizes that `poly` needs (paper: degree P = 2, two layers).

    Attributes:
        kind: a key of `hybrid_dit.ops.feature_maps.FEATURE_MAPS`.
        degree: P, the highest power (`poly` only).
        layers: number of layers of the per-head MLP (`poly` only).
        hidden: width of a head's hidden layers (`poly` only); 0 is the paper's, P·D.
        activation: of the last layer, what makes features non-negative (`poly` only): softplus, relu, exp, elu
            (elu(x) + 1) or square.
        shared: whether keys go through the map of the queries, φ_k = φ_q.
    """

    kind: str = "poly"
    degree: int = 2
    layers: int = 2
    hidden: int = 0
    activation: str = "softplus"
    shared: bool = False

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"feature map activation {self.activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}"
            )
        if self.hidden < 0:
            raise UserError(f"feature map needs a hidden width of at least 1, or 0 for P·D; got {self.hidden}")
        if self.degree < 1 or self.layers < 1:
            raise UserError(f"feature map needs degree >= 1 and layers >= 1, got {self.degree} and {self.layers}")


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The self-attention of one block.

    Attributes:
        kind: "softmax" (the teacher's), "hybrid" (paper Eq. 5), or "linear" (Eq. 5 without softmax tokens).
        rate: R; one token in R is a softmax token (`hybrid` only).
        pattern: which tokens: "stride" takes every R-th of the flattened order (the paper), "lattice" shifts the
            stride from row to row and frame to frame, `(col + 3 row + 5 frame) % R == 0`.
        feature_map: φ of the linear part.
        stabiliser: what c_i is: "max" over the softmax tokens (the paper) or their log-sum-exp ("lse").
    """

    kind: str = "softmax"
    rate: int = 1
    pattern: str = "stride"
    feature_map: FeatureMapSpec = FeatureMapSpec()
    stabiliser: str = "max"

    def __post_init__(self):
        for name, allowed in (("kind", KINDS), ("pattern", PATTERNS), ("stabiliser", STABILISERS)):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"attention {name} {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}"
                )
        if self.rate < 1:
            raise UserError(f"hybrid rate must be at least 1, got {self.rate}")

    @property
    def converted(self) -> bool:
        """Whether this attention has a feature map."""
        return self.kind != "softmax"

    @property
    def is_eq5(self) -> bool:
        """Whether it is the paper's Eq. 5, with or without softmax tokens: what fused kernels know beside softmax."""
        return self.kind in ("linear", "hybrid")

    @property
    def label(self) -> str:
        """Short name used in file names and tables: softmax, R2, R4, ..., linear."""
        return f"R{self.rate}" if self.kind == "hybrid" else self.kind


def from_label(label: str, **fields) -> AttentionSpec:
    """Inverse of `AttentionSpec.label`: "softmax", "linear", or "R" and a number; `fields` set the rest."""
    if label in ("softmax", "linear"):
        return AttentionSpec(kind=label, **fields)
    if label.startswith("R") and label[1:].isdigit():
        return AttentionSpec(kind="hybrid", rate=int(label[1:]), **fields)
    raise UserError(f"unknown attention {label!r}; expected softmax, linear, or R2, R4, R8, ...")
