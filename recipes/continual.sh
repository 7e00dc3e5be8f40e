#!/usr/bin/env bash
# Continual fine-tuning as in section 4 of the paper: LLaMA-2-7B at ERR 50 %, C4, 10,000 steps of 4 x 1024 tokens,
# AdamW with 5e-5, a cosine to a tenth, warm-up of 500 steps, evaluation every 500 steps. Only the factors are trained.
#
#   recipes/continual.sh [MODEL] [OUT]
#
# It needs one GPU with 80 GB. For several GPUs: BATCH_SIZE=1 LAUNCH="torchrun --nproc_per_node 4 --no-python"; a step
# reads BATCH_SIZE sequences in every process. Repeat the command to continue.
set -euo pipefail
model=${1:-meta-llama/Llama-2-7b-hf}
out=${2:-runs/continual}
mkdir -p "$out"

[ -f "$out/compressed/config.json" ] || welore compress "$model" "$out/compressed" --rank-reduction 0.5

for method in ${METHODS:-lrc}; do # METHODS="lrc nlrc full lora galore" for figures 1 and 5
    run="$out/$method"
    [ -f "$run/finetune.json" ] ||
        ${LAUNCH:-} welore finetune "$out/compressed" "$run" --method "$method" --dataset "${DATASET:-c4}" \
            --max-steps "${MAX_STEPS:-10000}" --batch-size "${BATCH_SIZE:-4}" --max-length "${MAX_LENGTH:-1024}" \
            --learning-rate 5e-5 --eval-steps 500 --save-steps 500 --gradient-checkpointing --label "$method" \
            $([ -f "$run/run.json" ] && echo --resume)
    welore evaluate "$run/model" --dataset "${DATASET:-c4}" --max-length "${MAX_LENGTH:-2048}" --label "$method" \
        -o "$out/$method.ppl.json"
done
