#!/usr/bin/env bash
# Continual fine-tuning as in the paper (section 4): LLaMA-2-7B at ERR 50 %, C4, 10,000 steps of 4 x 1024 tokens,
# AdamW 5e-5, cosine to a tenth, warm-up 500, evaluated every 500 steps; the factors only.
#
#   recipes/continual.sh [MODEL] [OUT]        several GPUs: BATCH=1 LAUNCH="torchrun --nproc_per_node 4 --no-python"
#
# One GPU with 80 GB; a step reads BATCH sequences in every process. What is stopped goes on when the same command is
# given again.
set -euo pipefail
model=${1:-meta-llama/Llama-2-7b-hf}
out=${2:-runs/continual}
mkdir -p "$out"

[ -f "$out/compressed/config.json" ] || welore compress "$model" "$out/compressed" --rank-reduction 0.5

for method in ${METHODS:-lrc}; do # METHODS="lrc nlrc full lora galore" for figures 1 and 5
    run="$out/$method"
    [ -f "$run/finetune.json" ] ||
        ${LAUNCH:-} welore finetune "$out/compressed" "$run" --method "$method" --dataset "${DATA:-c4}" \
            --max-steps "${STEPS:-10000}" --batch-size "${BATCH:-4}" --max-length "${LENGTH:-1024}" --learning-rate 5e-5 --eval-steps 500 \
            --save-steps 500 --gradient-checkpointing --label "$method" $([ -f "$run/run.json" ] && echo --resume)
    welore evaluate "$run/model" --dataset "${DATA:-c4}" --max-length "${LENGTH:-2048}" --label "$method" \
        -o "$out/$method.ppl.json"
done
