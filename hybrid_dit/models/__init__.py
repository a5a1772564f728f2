"""Flax modules of the Wan2.1 pipeline: the DiT, the UMT5 text encoder and the causal video VAE."""
