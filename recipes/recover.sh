#!/usr/bin/env bash
# Compress a model without data, and recover it for longer than `compress` does. The uncompressed model is the teacher
# and writes the text. The recipe evaluates all three models.
#
#   recipes/recover.sh [MODEL] [OUT]
#
# Defaults: the embedded 135M model, KEEP=0.8, MAX_STEPS=256. DATASET=FILE recovers on a text instead. MAX_STEPS=976
# reads a million tokens. Repeat the command to continue.
set -euo pipefail
model=${1:-$(python -c "from welore.models.embedded import embedded_model; print(embedded_model())")}
out=${2:-runs/recover}
mkdir -p "$out"

[ -f "$out/small/config.json" ] ||
    welore compress "$model" "$out/small" --keep "${KEEP:-0.8}" --recovery none \
        ${NUM_TOKENS:+--num-tokens "$NUM_TOKENS"}

run="$out/recovered"
[ -f "$run/finetune.json" ] ||
    welore finetune "$out/small" "$run" --method lrc --distill "$model" --dataset "${DATASET:-self}" \
        --learning-rate "${LEARNING_RATE:-3e-5}" --max-steps "${MAX_STEPS:-256}" --batch-size "${BATCH_SIZE:-2}" \
        --max-length "${MAX_LENGTH:-512}" --eval-steps 50 --save-steps 50 --label recovered \
        $([ -f "$run/run.json" ] && echo --resume)

for name in dense small recovered; do
    case $name in dense) checkpoint=$model ;; small) checkpoint=$out/small ;; recovered) checkpoint=$run/model ;; esac
    welore evaluate "$checkpoint" --dataset "${EVAL_DATASET:-pydoc}" --max-length "${EVAL_LENGTH:-512}" \
        --num-windows "${NUM_WINDOWS:-16}" --label "$name" -o "$out/$name.ppl.json"
done
