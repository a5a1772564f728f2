"""Says which videos of VBench (or VBench-2.0) are still missing, and makes one table of what it found. Samples nothing.

Run:    python -m hybrid_dit.main --config=configs/vbench.py --workdir=runs/wan --config.suite.prompts=FULL_INFO.json
Takes:  seconds. Exits with 1 while videos are missing, cut off, or others lie among them.
Needs:  videos of configs/sample.py with --config.suite.name=vbench and the same prompts; see docs/evaluation.md.
Gives:  with results in sample_<variant>/vbench_results: vbench/scores.csv, scores.md and scores.png.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    c = common.get_config("vbench", model)
    c.suite.name = "vbench"
    return c
