"""Flax modules of the Wan2.1 pipeline: the DiT, the UMT5 text encoder and the causal video VAE."""

from hybrid_dit.models.umt5 import UMT5Config, UMT5Encoder
from hybrid_dit.models.vae import VAEConfig, WanVAE
from hybrid_dit.models.wan import WanConfig, WanDiT

__all__ = ["UMT5Config", "UMT5Encoder", "VAEConfig", "WanConfig", "WanDiT", "WanVAE"]
