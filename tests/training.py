"""A trainer of a tiny random hybrid and noise to train it on, the same in every process."""

import jax
import numpy as np
from pipelines import random_like

from configs import common
from hybrid_dit import sharding
from hybrid_dit.command_line import override
from hybrid_dit.convert.abstract import abstract_dit
from hybrid_dit.data.rendered import RenderedSource
from hybrid_dit.data.source import Text
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.pairs import Pairs
from hybrid_dit.trainer import Trainer

WAN = WanConfig(dim=16, num_heads=2, ffn_dim=32, num_layers=2, in_channels=4, text_dim=8, freq_dim=8)
ATTENTION = (AttentionSpec("hybrid", 2), AttentionSpec())
BATCH = 8
TRAINED = r"feature_maps/|blocks/\w+_attn/"
FEATURES = {  # everything that a plain step leaves out
    "ema": 0.9,
    "teacher": 0.5,
    "timesteps": "logit_normal",
    "learning_rates": rf"feature_maps/.*=10,blocks/\w+_attn/.*=1,(?!{TRAINED}).*=0",
    "schedule": "cosine",
    "drop_text": 0.5,
    "clip": 0.0,
}


def noise_pairs() -> tuple[Pairs, Text]:
    """Sixteen pairs of noise, 18 tokens each, and an empty prompt that takes two of the five rows of text."""
    rng = np.random.default_rng(0)
    latents, text = (rng.standard_normal(shape, np.float32) for shape in ((16, 3, 4, 6, 4), (16, 5, 8)))
    empty = rng.standard_normal((1, 5, 8), np.float32), np.array([[1, 0, 0, 0, 511]], np.float32)
    return Pairs(latents, text, np.ones((16, 5), np.float32)), Text(*empty)


def make_trainer(mesh=None, **settings) -> tuple[Trainer, dict]:
    """Returns (trainer, untrained parameters); on one device if there is no mesh. Settings are those of finetune."""
    config = common.get_config("finetune", "tiny")
    config.model.compute_dtype = settings.pop("compute_dtype", "float32")
    for name, value in {"batch": BATCH, "warmup": 2, "learning_rate": 1e-3, "steps": 20, **settings}.items():
        override(config, f"finetune.{name}", str(value))
    mesh = mesh or sharding.train_mesh(devices=jax.devices()[:1])
    params = random_like(abstract_dit(WAN, ATTENTION), np.random.default_rng(1))
    return Trainer(config, WAN, ATTENTION, 3.0, noise_pairs()[1], mesh), params


def teacher_params() -> dict:
    """Parameters of a softmax model that is not the student's."""
    return random_like(abstract_dit(WAN), np.random.default_rng(2))


def source(trainer: Trainer) -> RenderedSource:
    """Returns this process's batches of noise."""
    process, processes = sharding.process_share(trainer.mesh)
    return RenderedSource(noise_pairs()[0], batch=BATCH, seed=0, process=process, processes=processes)


def train(trainer: Trainer, params: dict, steps: int, teacher: dict | None = None):
    """Returns (state, [metrics of each step]) after some steps on noise."""
    teacher = None if teacher is None else trainer.place_teacher(teacher)
    batches, state, rows = source(trainer), trainer.init(params), []
    batch = batches.next()
    step = trainer.compile(state, batch, teacher)
    for _ in range(steps):
        state, metrics = step(state, batch)
        rows.append(jax.device_get(metrics))
        batch = batches.next()
    return state, rows
