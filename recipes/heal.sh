#!/usr/bin/env bash
# The whole road without any data: cut a model to a share of its parameters by its own statistics, heal the factors
# with the uncut model as the teacher on text that the teacher writes, and compare all three.
#
#   recipes/heal.sh [MODEL] [OUT]      PARAMS=0.8 STEPS=256 by default; the embedded 135M model if none is named
#
# DATA=TEXT heals on a text instead. A million tokens: STEPS=976. What is stopped goes on when the same
# command is given again.
set -euo pipefail
model=${1:-$(python -c "from welore.models.embedded import embedded_model; print(embedded_model())")}
out=${2:-runs/heal}
mkdir -p "$out"

[ -f "$out/small/config.json" ] ||
    welore compress "$model" "$out/small" --keep "${PARAMS:-0.8}" --recovery none ${TOKENS:+--num-tokens "$TOKENS"}

run="$out/healed"
[ -f "$run/finetune.json" ] ||
    welore finetune "$out/small" "$run" --method lrc --distill "$model" --dataset "${DATA:-self}" --learning-rate "${LR:-3e-5}" \
        --max-steps "${STEPS:-256}" --batch-size "${BATCH:-2}" --max-length "${LENGTH:-512}" --eval-steps 50 --save-steps 50 \
        --label healed $([ -f "$run/run.json" ] && echo --resume)

for name in dense small healed; do
    case $name in dense) checkpoint=$model ;; small) checkpoint=$out/small ;; healed) checkpoint=$run/model ;; esac
    welore evaluate "$checkpoint" --dataset "${TEXT:-pydoc}" --max-length "${WINDOW:-512}" --num-windows "${WINDOWS:-16}" \
        --label "$name" -o "$out/$name.ppl.json"
done
