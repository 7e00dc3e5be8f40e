#!/usr/bin/env bash
# The same at the paper's size: LLaMA-130M on C4, 25,000 steps; a GPU. Less: STEPS=2000.
#
#   recipes/emergence_gpu.sh [OUT]
set -euo pipefail
export SIZE=${SIZE:-130m} DATA=${DATA:-c4} VOCABULARY=${VOCABULARY:-32000} STEPS=${STEPS:-25000} LENGTH=${LENGTH:-256}
export BATCH=${BATCH:-64} LR=${LR:-1e-3} EVAL_ITEMS=${EVAL_ITEMS:-128} TUNING_STEPS=${TUNING_STEPS:-500}
exec bash "$(dirname "$0")/emergence_cpu.sh" "${1:-runs/emergence-$SIZE}"
