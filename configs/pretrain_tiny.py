"""Trains the bundled teacher `assets/wan-tiny` from nothing on the moving-shapes world.

Run:    python -m hybrid_dit.main --config=configs/pretrain_tiny.py --workdir=runs/pretrain_tiny
Takes:  about 13 minutes on one H200 (an accelerator is needed in practice).
Gives:  a pipeline folder runs/pretrain_tiny/wan-tiny in diffusers' layout with its training record.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.job = "pretrain"
    c.seed = 0
    c.frames = 33  # 4n + 1; 9 latent frames
    c.size = 128  # height = width in pixels; 16 x 16 latent cells
    c.two_objects = 0.5  # share of prompts with two things
    c.chunk = 50  # training steps per call of a compiled program
    c.compute_dtype = "bfloat16"  # of activations; parameters are float32

    c.vae = ConfigDict()
    c.vae.base_dim = 12
    c.vae.num_res_blocks = 1
    c.vae.steps = 4000  # on windows around a thing
    c.vae.batch = 16
    c.vae.frames = 17
    c.vae.size = 64
    c.vae.whole_steps = 500  # on whole videos
    c.vae.whole_batch = 8
    c.vae.learning_rate = 2e-3
    c.vae.thing_weight = 4.0  # of a thing's pixels against the background's
    c.vae.kl = 3e-4  # weight of the KL term per latent element

    c.text = ConfigDict()
    c.text.d_model = 64
    c.text.d_ff = 128
    c.text.num_layers = 2
    c.text.num_heads = 4

    c.dit = ConfigDict()
    c.dit.dim = 192
    c.dit.num_heads = 8
    c.dit.ffn_dim = 768
    c.dit.num_layers = 8
    c.dit.videos = 16_000  # rendered and encoded once
    c.dit.steps = 6_150
    c.dit.batch = 128
    c.dit.optimizer = "muon"  # muon or adamw
    c.dit.learning_rate = 2e-3  # peak; cosine to 0
    c.dit.warmup = 300
    c.dit.weight_decay = 0.01
    c.dit.clip = 1.0  # global gradient norm
    c.dit.ema = 0.999
    c.dit.drop_text = 0.1  # share of samples trained on the empty prompt, for guidance
    c.dit.shift = 3.0  # timestep shift

    c.eval = ConfigDict()
    c.eval.videos = 256  # of held-out prompts
    c.eval.steps = 50
    c.eval.guidance = (3.0,)
    return c
