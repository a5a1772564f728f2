"""Stage 2: chooses a rate per block under a budget. Needs stage 1.

Run:    python -m hybrid_dit.main --config=configs/select.py --workdir=runs/tiny
Takes:  seconds.
Gives:  select/rates.json; pareto.csv and pareto.json with the best rates under every budget; pictures of both.

Costs are FLOPs, or --config.select.costs=timings --config.select.timings=FILE.csv (seconds per label, measured), or
--config.select.costs=compiled --config.select.estimate=FILE.json (from configs/plan.py with --config.job=select).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("select_rates", model)
