"""Stage 2: chooses a rate per block under a budget. Needs stage 1.

Run:    python -m hybrid_dit.main --config=configs/select.py --workdir=runs/tiny
Takes:  seconds.
Gives:  select/rates.json, pictures of the choice and of what other budgets would give.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("select_rates", model)
