"""Samples held-out prompts before and after every stage: score, likeness to the teacher, time, FLOPs. Needs stages 1-3.

Run:    python -m hybrid_dit.main --config=configs/evaluate.py --workdir=runs/tiny
Takes:  about 3 minutes on 2 CPU cores (tiny).
Gives:  evaluate/results.csv and results.json, velocity.csv and velocity.png, videos and contact sheets.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("evaluate", model)
