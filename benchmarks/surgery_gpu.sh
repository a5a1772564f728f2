#!/usr/bin/env bash
# The longer surgery of docs/results, on one GPU, in about 8 minutes: half of the blocks at R = 2, then what becomes of
# the same teacher when every block is linear.
#
#   benchmarks/surgery_gpu.sh OUT      # results are left in OUT/half_R2 and OUT/all_linear
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 OUT" >&2; exit 2; }
out=$1
python=${PYTHON:-python3}
common=(
  --config=configs/surgery.py
  --config.distill.prompts=60 # 3,000 steps instead of 300
  --config.finetune.videos=2000
  --config.finetune.batch=32
  --config.evaluate.prompts=128
  --config.evaluate.sample_steps=50
  --config.evaluate.batch=32
)
"$python" -m hybrid_dit.main "${common[@]}" --workdir="$out/half_R2" \
  --config.select.rates=R2 --config.select.budget=4R2 --config.finetune.steps=2000

# Stage 1 depends on neither rates nor budget, and latents only on the videos: both are used again.
mkdir -p "$out/all_linear/finetune"
cp -r "$out/half_R2/distill" "$out/all_linear/"
cp "$out/half_R2/finetune/latents.safetensors" "$out/all_linear/finetune/"
"$python" -m hybrid_dit.main "${common[@]}" --workdir="$out/all_linear" \
  --config.select.rates=linear --config.select.budget=8linear --config.finetune.steps=300
