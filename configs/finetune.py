"""Stage 3 of Attention Surgery: fine-tunes the whole hybrid, feature maps included, with flow matching.

Needs:  stages 1 and 2 in the same workdir (configs/distill.py, configs/select.py).
Run:    python -m hybrid_dit.main --config=configs/finetune.py --workdir=runs/tiny
Takes:  about 2 minutes on two CPU cores for the bundled model.
Gives:  in runs/tiny/finetune: transformer/ (the hybrid, read by later stages), metrics.jsonl (a line per step),
        loss.png, tensorboard/ (for `tensorboard --logdir`), and checkpoints/, from which the same command continues
        after an interruption, on as many devices and processes as there are then.

Other settings: --config.finetune.steps=100 and so on; see configs/common.py. Real models (`finetune.py:wan_1_3b`) need
pairs of prompts and videos, see docs/data.md.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("finetune", model)
