"""Runs exported hybrids in PyTorch: needs torch and nothing of JAX; diffusers only where a function says so."""

from hybrid_dit.torch.hybrid import attention
from hybrid_dit.torch.options import options

__all__ = ["attention", "options"]
