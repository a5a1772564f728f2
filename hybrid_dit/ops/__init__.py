"""Attention functions: pure, no parameters of their own, no mesh, no configuration object."""

import importlib

# Resolved on first use, so that the PyTorch side can import `ops.spec` and `ops.tokens` without importing JAX.
_HOME = {
    "AttentionSpec": "hybrid_dit.ops.spec",
    "FeatureMapSpec": "hybrid_dit.ops.spec",
    "attention": "hybrid_dit.ops.hybrid",
    "softmax_attention": "hybrid_dit.ops.softmax",
}
__all__ = ["AttentionSpec", "FeatureMapSpec", "attention", "softmax_attention"]  # noqa: F822


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
