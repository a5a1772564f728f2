"""All of Attention Surgery: distill, select rates, fine-tune, export, evaluate; each stage once.

Run:    python -m hybrid_dit.main --config=configs/surgery.py --workdir=runs/tiny
Takes:  8 to 11 minutes on 2 CPU cores (tiny).
Gives:  one folder per stage in the workdir; the result is export/pipeline, the verdict report.html.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("surgery", model)
