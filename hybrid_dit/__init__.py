"""Attention Surgery in JAX: pretrained video diffusion transformers with hybrid softmax/linear attention."""
