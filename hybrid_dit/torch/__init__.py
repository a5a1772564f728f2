"""Runs exported hybrids in PyTorch: needs torch and nothing of JAX; `load_hybrid` alone needs diffusers."""

from hybrid_dit.torch.diffusers_model import load_hybrid
from hybrid_dit.torch.hybrid import attention
from hybrid_dit.torch.options import options
from hybrid_dit.torch.original_model import patch_wan

__all__ = ["attention", "load_hybrid", "options", "patch_wan"]
