"""Samples videos of prompts: the teacher, or with --config.sample.variant=finetuned what surgery made of it.

Run:    python -m hybrid_dit.main --config=configs/sample.py --workdir=runs/tiny
Takes:  about half a minute on 2 CPU cores (tiny, 6 prompts).
Gives:  sample_<variant>/videos/{prompt}-{i}.mp4 and a strip of frames of each in sheets/.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("sample", model)
