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
    welore compress "$model" "$out/small" --params "${PARAMS:-0.8}" --heal none ${TOKENS:+--tokens "$TOKENS"}

run="$out/healed"
[ -f "$run/finetune.json" ] ||
    welore finetune "$out/small" "$run" --method lrc --distill "$model" --data "${DATA:-self}" --lr "${LR:-3e-5}" \
        --steps "${STEPS:-256}" --batch-size "${BATCH:-2}" --length "${LENGTH:-512}" --eval-every 50 --save-every 50 \
        --label healed $([ -f "$run/run.json" ] && echo --resume)

for name in dense small healed; do
    case $name in dense) checkpoint=$model ;; small) checkpoint=$out/small ;; healed) checkpoint=$run/model ;; esac
    welore evaluate "$checkpoint" --data "${TEXT:-pydoc}" --length "${WINDOW:-512}" --windows "${WINDOWS:-16}" \
        --label "$name" -o "$out/$name.ppl.json"
done
