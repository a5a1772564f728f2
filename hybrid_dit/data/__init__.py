"""Data: the moving-shapes world and readers of latent sets."""
