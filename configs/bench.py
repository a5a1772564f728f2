"""Times attention, blocks and models on one device: seconds, FLOP/s, memory, and the share of the device's floor.

Run:    python -m hybrid_dit.main --config=configs/bench.py                    # two CPU cores, half a minute
        python -m hybrid_dit.main --config=configs/bench.py:wan_1_3b           # one accelerator; no weights needed
Takes:  for wan_1_3b as long as compiling its 200 programs takes, for the most part; the same command continues.
Gives:  in runs/bench (or --workdir) bench/bench.csv with a row per measurement; bench/timings.csv for
        --config.select.costs=timings; bench/duration.png: what attention costs as videos get longer.

Random weights and inputs, batch 1. Seconds are the median of the repeats after a warm-up; a call is over when a number
that depends on all of its outputs has arrived on the host. Kinds of cases: op (attention alone, all videos), and for
the model's own video attention (self-attention with q, k, v and o), block, and model. A program that does not fit is a
row with the error, which the next run tries again. At the end, models are compared with what the op's times let expect.

Pick a part with --config.bench.what=op --config.bench.rates=R8 and so on; parts add up in one workdir. With
--config.bench.what= nothing is measured, and the picture shows FLOPs alone. On a pod, the first process measures.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    c = common.get_config("bench", model)
    c.default_workdir = "runs/bench"
    return c
