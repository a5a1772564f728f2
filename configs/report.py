"""One self-contained page about a surgery: scores, videos playing in step, rates, errors, curves, settings.

Run:    python -m hybrid_dit.main --config=configs/report.py --workdir=runs/tiny
Takes:  seconds; a minute or more where large videos have to be compressed.
Gives:  report.html in the workdir, which opens anywhere without a network; stages that are missing are named in it.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("report", model)
