"""Samples videos of prompts: the teacher, or with --config.sample.variant=finetuned what surgery made of it.

Run:    python -m hybrid_dit.main --config=configs/sample.py --workdir=runs/tiny
        (one prompt: --config.sample.prompt="a large red circle moving left on a white background")
Takes:  about half a minute on 2 CPU cores (tiny, 6 prompts).
Gives:  sample_<variant>/videos/{prompt}-{i}.mp4 and a strip of frames of each in sheets/.

All devices are used: the videos of a batch are split over them, and where there are more devices than videos, those
left over share the tokens of a video. A video depends on the seed, its prompt and its number alone: whatever the
devices, the batch and the order, it is the same up to rounding. Interrupt it when you like; the same command continues.

With --config.suite.name=vbench (or vbench2) and --config.suite.prompts it makes the videos of that benchmark, named and
counted as it expects, in sample_<variant>/vbench/: docs/evaluation.md.

The text encoder runs first and is freed before the DiT is loaded. A DiT of more than 4 GiB is split over all devices.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("sample", model)
