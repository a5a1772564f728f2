"""Attention functions: pure, no parameters of their own, no mesh, no configuration object."""

from hybrid_dit.ops.hybrid import attention
from hybrid_dit.ops.softmax import softmax_attention
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec

__all__ = ["AttentionSpec", "FeatureMapSpec", "attention", "softmax_attention"]
