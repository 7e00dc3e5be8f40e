#!/usr/bin/env bash
# A small model for a text of your own: the dense model learns the text, what it has become is cut by its statistics on
# that text, and the factors learn from it, on the same text. Compares the model as it came, as it was tuned, and cut.
#
#   DATA=TEXT recipes/own_text.sh [MODEL] [OUT]
#
# PARAMS=0.8 TOKENS=245760 by default; the embedded 135M model if none is named. TEXT is a .txt, .jsonl or .parquet
# file, wikitext2, c4 or pydoc, with TOKENS tokens or more; its first tenth is left for the comparison, unless TEST
# names another text. Below three quarters of the parameters VIA=0.8 is worth its time: the model is first cut to that
# size and healed, made dense, calibrated again and cut to PARAMS, with the same teacher. What is stopped goes on when the same command is given again.
set -euo pipefail
text=${DATA:?name the text: DATA=my.txt}
model=${1:-$(python -c "from welore.embedded import embedded_model; print(embedded_model())")}
out=${2:-runs/own_text}
tokens=${TOKENS:-245760} batch=${BATCH:-2} length=${LENGTH:-512}
mkdir -p "$out"

run="$out/tuned"
[ -f "$run/finetune.json" ] ||
    welore finetune "$model" "$run" --method full --data "$text" --lr "${LR:-1e-4}" \
        --steps "${STEPS:-$((tokens * 9 / 10 / batch / length))}" --batch-size "$batch" --length "$length" \
        --eval-every 50 --save-every 50 --label tuned $([ -f "$run/run.json" ] && echo --resume)

calibrated() {
    [ -f "$2" ] || welore calibrate "$1" --data "$text" --tokens "${STATISTICS:-65536}" --measure 0 -o "$2"
}
cut() {
    [ -f "$2/config.json" ] ||
        welore compress "$1" "$2" --params "$3" --calibration "$4" --heal "$text" --tokens "$tokens" \
            --teacher "$run/model"
}

whole="$run/model" statistics="$out/calibration.safetensors"
calibrated "$whole" "$statistics"
if [ -n "${VIA:-}" ]; then
    cut "$whole" "$out/via" "$VIA" "$statistics"
    whole="$out/dense" statistics="$out/calibration-2.safetensors"
    [ -f "$whole/config.json" ] || welore merge "$out/via" "$whole"
    calibrated "$whole" "$statistics"
fi
cut "$whole" "$out/small" "${PARAMS:-0.8}" "$statistics"

for name in dense tuned small; do
    case $name in dense) checkpoint=$model ;; tuned) checkpoint=$run/model ;; small) checkpoint=$out/small ;; esac
    welore evaluate "$checkpoint" --data "${TEST:-$text}" --length "${WINDOW:-512}" --windows "${WINDOWS:-16}" \
        --label "$name" -o "$out/$name.ppl.json"
done
