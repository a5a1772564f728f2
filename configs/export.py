"""Writes the fine-tuned hybrid as a pipeline folder and checks that it reads back bit-equal. Needs stage 3.

Run:    python -m hybrid_dit.main --config=configs/export.py --workdir=runs/tiny
Takes:  seconds.
Gives:  export/pipeline in diffusers' layout (float32), export/summary.json.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("export", model)
