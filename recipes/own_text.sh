#!/usr/bin/env bash
# Make a small model for a text of your own. The dense model learns the text. It is then compressed with statistics on
# the text, and teaches the factors on the same text. The recipe evaluates the original, the tuned and the small model.
#
#   DATASET=FILE recipes/own_text.sh [MODEL] [OUT]
#
# DATASET is a .txt, .jsonl or .parquet file, wikitext2, c4 or pydoc, with at least NUM_TOKENS tokens. Its first tenth
# is left for the evaluation, unless EVAL_DATASET names another text. Defaults: the embedded 135M model, KEEP=0.8,
# NUM_TOKENS=245760. Repeat the command to continue.
set -euo pipefail
text=${DATASET:?name the text: DATASET=my.txt}
model=${1:-$(python -c "from welore.models.embedded import embedded_model; print(embedded_model())")}
out=${2:-runs/own_text}
tokens=${NUM_TOKENS:-245760} batch=${BATCH_SIZE:-2} length=${MAX_LENGTH:-512}
mkdir -p "$out"

run="$out/tuned"
[ -f "$run/finetune.json" ] ||
    welore finetune "$model" "$run" --method full --dataset "$text" --learning-rate "${LEARNING_RATE:-1e-4}" \
        --max-steps "${MAX_STEPS:-$((tokens * 9 / 10 / batch / length))}" --batch-size "$batch" --max-length "$length" \
        --eval-steps 50 --save-steps 50 --label tuned $([ -f "$run/run.json" ] && echo --resume)

[ -f "$out/statistics.safetensors" ] ||
    welore calibrate "$run/model" --dataset "$text" --num-tokens "${STATISTICS_TOKENS:-65536}" --measure-losses 0 \
        -o "$out/statistics.safetensors"

[ -f "$out/small/config.json" ] ||
    welore compress "$run/model" "$out/small" --keep "${KEEP:-0.8}" --statistics "$out/statistics.safetensors" \
        --recovery "$text" --num-tokens "$tokens"

for name in dense tuned small; do
    case $name in dense) checkpoint=$model ;; tuned) checkpoint=$run/model ;; small) checkpoint=$out/small ;; esac
    welore evaluate "$checkpoint" --dataset "${EVAL_DATASET:-$text}" --max-length "${EVAL_LENGTH:-512}" \
        --num-windows "${NUM_WINDOWS:-16}" --label "$name" -o "$out/$name.ppl.json"
done
