#!/usr/bin/env bash
# The study at the paper's size: LLaMA-130M on C4, 25,000 steps, on a GPU. MAX_STEPS=2000 makes it shorter.
#
#   recipes/emergence_gpu.sh [OUT]
set -euo pipefail
export SIZE=${SIZE:-130m} DATASET=${DATASET:-c4} VOCAB_SIZE=${VOCAB_SIZE:-32000} MAX_LENGTH=${MAX_LENGTH:-256}
export MAX_STEPS=${MAX_STEPS:-25000} BATCH_SIZE=${BATCH_SIZE:-64} LEARNING_RATE=${LEARNING_RATE:-1e-3}
export MAX_EVAL_SAMPLES=${MAX_EVAL_SAMPLES:-128} TUNING_MAX_STEPS=${TUNING_MAX_STEPS:-500}
exec bash "$(dirname "$0")/emergence_cpu.sh" "${1:-runs/emergence-$SIZE}"
