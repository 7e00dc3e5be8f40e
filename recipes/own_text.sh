#!/usr/bin/env bash
# A small model for a text of your own: the dense model learns the text, what it has become is cut by its statistics on
# that text, and the factors learn from it, on the same text. Compares the model as it came, as it was tuned, and cut.
#
#   DATA=TEXT recipes/own_text.sh [MODEL] [OUT]
#
# PARAMS=0.8 TOKENS=245760 by default; the embedded 135M model if none is named. TEXT is a .txt, .jsonl or .parquet
# file, wikitext2, c4 or pydoc, with TOKENS tokens or more; its first tenth is left for the comparison, unless TEST
# names another text. What is stopped goes on when the same command is given again.
set -euo pipefail
text=${DATA:?name the text: DATA=my.txt}
model=${1:-$(python -c "from welore.models.embedded import embedded_model; print(embedded_model())")}
out=${2:-runs/own_text}
tokens=${TOKENS:-245760} batch=${BATCH:-2} length=${LENGTH:-512}
mkdir -p "$out"

run="$out/tuned"
[ -f "$run/finetune.json" ] ||
    welore finetune "$model" "$run" --method full --dataset "$text" --learning-rate "${LR:-1e-4}" \
        --max-steps "${STEPS:-$((tokens * 9 / 10 / batch / length))}" --batch-size "$batch" --max-length "$length" \
        --eval-steps 50 --save-steps 50 --label tuned $([ -f "$run/run.json" ] && echo --resume)

[ -f "$out/calibration.safetensors" ] ||
    welore calibrate "$run/model" --dataset "$text" --num-tokens "${STATISTICS:-65536}" --measure-losses 0 \
        -o "$out/calibration.safetensors"

[ -f "$out/small/config.json" ] ||
    welore compress "$run/model" "$out/small" --keep "${PARAMS:-0.8}" --statistics "$out/calibration.safetensors" \
        --recovery "$text" --num-tokens "$tokens"

for name in dense tuned small; do
    case $name in dense) checkpoint=$model ;; tuned) checkpoint=$run/model ;; small) checkpoint=$out/small ;; esac
    welore evaluate "$checkpoint" --dataset "${TEST:-$text}" --max-length "${WINDOW:-512}" --num-windows "${WINDOWS:-16}" \
        --label "$name" -o "$out/$name.ppl.json"
done
