"""Makes training data: videos with captions, or moving shapes, become latents and text embeddings (docs/data.md).

Run:    python -m hybrid_dit.main --config=configs/build_data.py --workdir=runs/shapes
        python -m hybrid_dit.main --config=configs/build_data.py:wan_1_3b --workdir=runs/clips \\
            --config.model.weights=PATH/Wan2.1-T2V-1.3B-Diffusers --config.build_data.videos=PATH/videos
Takes:  about a minute on two CPU cores for the 64 rendered scenes of the default.
Gives:  in WORKDIR/data: a set that TensorFlow Datasets reads, manifest.json, and skipped.csv with what was left out and
        why. The same command continues after an interruption.
Then:   --config.data.kind=tfds --config.data.path=WORKDIR/data for configs/finetune.py.

Several processes, each with devices of its own, can build one set in the same workdir: under jax.distributed they share
it out by themselves, otherwise say --config.build_data.processes=4 --config.build_data.process=0 ... 3.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(model: str = "tiny") -> ConfigDict:
    return common.get_config("build_data", model)
