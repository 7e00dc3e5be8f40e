#!/usr/bin/env bash
# The six tasks as in the paper (section 4): LLaMA-2-7B at ERR 50 %, 1,000 steps of 8 x 512 tokens, AdamW 5e-5;
# loss on the answer only, accuracy on the evaluation part.
#
#   recipes/downstream.sh [MODEL] [OUT]       METHODS="full lora galore lrc" for the whole table
#
# A learning rate for each method: METHODS=lora LR=3e-3, and so on, into the same OUT. Several GPUs: BATCH=2
# LAUNCH="torchrun --nproc_per_node 4 --no-python". TASK_DATA: a directory with the original files, or "generated"
# (coin_flip, object_tracking); without it the hub.
set -euo pipefail
model=${1:-meta-llama/Llama-2-7b-hf}
out=${2:-runs/downstream}
mkdir -p "$out"

[ -f "$out/compressed/config.json" ] || welore compress "$model" "$out/compressed" --rank-reduction 0.5

for method in ${METHODS:-lrc}; do
    for task in ${TASKS:-commonsense_qa svamp boolq coin_flip object_tracking strategy_qa}; do
        run="$out/$task-$method"
        [ -f "$run/finetune.json" ] ||
            ${LAUNCH:-} welore finetune "$out/compressed" "$run" --method "$method" --task "$task" \
                ${TASK_DATA:+--task-dataset "$TASK_DATA"} --max-steps "${STEPS:-1000}" --batch-size "${BATCH:-8}" \
                --max-length "${LENGTH:-512}" --learning-rate "${LR:-5e-5}" --dtype "${DTYPE:-auto}" --label "$method" \
                $([ -f "$run/run.json" ] && echo --resume)
        welore score "$run/model" --task "$task" ${TASK_DATA:+--dataset "$TASK_DATA"} ${LIMIT:+--limit "$LIMIT"} \
            --label "$method" -o "$out/$task-$method.score.json"
    done
done

python - "$out" <<'PYTHON'
import sys
from pathlib import Path
from welore import Record
from welore.reporting.tables import task_table

headings, rows = task_table([Record.load(path) for path in sorted(Path(sys.argv[1]).glob("*.score.json"))])
for row in (headings, ["---"] * len(headings), *rows):
    print("|", " | ".join(row), "|")
PYTHON
