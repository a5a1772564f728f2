"""Stage 1: trains feature maps of every block and rate to copy the teacher's attention.

Run:    python -m hybrid_dit.main --config=configs/distill.py --workdir=runs/tiny
Takes:  about 4 minutes on 2 CPU cores (tiny).
Gives:  distill/maps.safetensors, errors.csv (held-out errors with intervals), errors_by_timestep.csv, curves.npz (loss
        and error of every step, block and rate), loss.csv, pictures of all of it, text/ (embeddings of the prompts).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("distill", model)
