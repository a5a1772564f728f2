"""Random hybrids in float32 as folders, small and with a block of every kind."""

import dataclasses

import jax
import numpy as np
import safetensors.numpy
import torch
from pipelines import random_like

from hybrid_dit.convert import description, hybrid, tables
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.convert.pipeline import load_transformer, save_transformer
from hybrid_dit.models.wan import WanConfig, WanDiT
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec, from_label

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

CONFIG = WanConfig(dim=48, num_heads=2, num_layers=4, ffn_dim=64, in_channels=4, text_dim=8, freq_dim=16)
LABELS = ("softmax", "R2", "R4", "linear")
PAPER = FeatureMapSpec()
GRID = (3, 5, 3)  # 45 tokens: odd, divisible by no rate


def every_kind(feature_map: FeatureMapSpec = PAPER) -> tuple[AttentionSpec, ...]:
    """One block of every kind, both patterns and both stabilisers among them."""
    fields = {"R2": {"pattern": "stride", "stabiliser": "max"}, "R4": {"pattern": "lattice", "stabiliser": "lse"}}
    return tuple(from_label(x, feature_map=feature_map, **fields.get(x, {})) for x in LABELS)


def random_hybrid(folder, specs=None, dtype="float32"):
    """Writes a random transformer folder in diffusers' layout; returns its specs and parameters as read back."""
    specs = every_kind() if specs is None else specs
    config = dataclasses.replace(CONFIG, num_layers=len(specs))
    params = random_like(abstract_dit(config, specs), np.random.default_rng(0))
    save_transformer(folder, config, specs, params, dtype)
    return load_transformer(folder)[1:]


def write_original_layout(folder, specs, params):
    """Writes the same in the layout of the original code."""
    folder.mkdir()
    entries = hybrid.stored_entries(CONFIG, specs, "wan", params)
    stored = {name: np.ascontiguousarray(t, np.float32) for name, t in tables.export_tree(entries, params)}
    safetensors.numpy.save_file(stored, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    description.write_description(folder, specs)


def random_inputs(batch=2, grid=GRID):
    """latents [b, t, y, x, c], timesteps [b] and text [b, l, e]."""
    rng = np.random.default_rng(1)
    shape = [size * p for size, p in zip(grid, CONFIG.patch)]
    latents = rng.standard_normal((batch, *shape, CONFIG.in_channels)).astype(np.float32)
    text = rng.standard_normal((batch, 7, CONFIG.text_dim)).astype(np.float32)
    return latents, np.linspace(100, 900, batch).astype(np.float32), text


def velocity_of_jax(specs, params, latents, timesteps, text):
    """What the Flax model says to these inputs."""
    return np.asarray(jax.jit(WanDiT(CONFIG, specs).apply)({"params": params}, latents, timesteps, text))


def channels_first(latents):
    """[b, t, y, x, c] -> torch [b, c, t, y, x]."""
    return torch.tensor(np.moveaxis(latents, -1, 1).copy())


def relative_error(got, want) -> float:
    """In the Frobenius norm."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)
