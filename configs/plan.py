"""Compiles a job's real step for a TPU pod on this machine and says whether it fits; no TPU and no weights needed.

Run:    python -m hybrid_dit.main --config=configs/plan.py:wan_1_3b --config.target=v5e:4x4 --config.job=distill
Needs:  the TPU compiler, pip install -e '.[tpu]'; not for --config.target=cpu:8 (fake devices).
Takes:  minutes, and a few GiB of memory.
Gives:  a table of memory, collectives and FLOPs per device, and the same as JSON in runs/plan (or --workdir). The exit
        code is 1 if the step does not fit.

For finetune, it also says how many videos a device can train on at once, and recommends a mesh.

The jobs sample and decode are one denoising step of configs/sample.py and the VAE's part of it, beside the DiT;
--config.sample.variant=finetuned plans the hybrid that --config.select.budget names.

With --config.job=select it asks the TPU compiler what one block's self-attention costs at every rate, for
`--config.select.costs=compiled --config.select.estimate=FILE`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    c = common.get_config(
        "distill", model
    )  # job: what is compiled: a step of distill, finetune or sample, decode, or select
    c.run = "plan"
    c.default_workdir = "runs/plan"
    c.target = "v5e:4x4"  # a TPU generation and topology, v5e:1x1 for one chip, or cpu:N
    c.slices = 1  # pods of this topology
    c.layouts = True  # of finetune: compile it for more or fewer videos per device too, until the largest fit is known
    c.memory_gib = 0.0  # what a device may use; 0: what the TPU compiler allows
    c.preset = "" if model == "tiny" else model  # sizes of the model if model.weights is empty
    return c
