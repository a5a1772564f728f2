"""Fused kernels of `ops`: what a backend other than plain XLA runs."""
