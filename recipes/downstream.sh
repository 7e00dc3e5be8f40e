#!/usr/bin/env bash
# Fine-tune on the six tasks as in section 4 of the paper: LLaMA-2-7B at ERR 50 %, 1,000 steps of 8 x 512 tokens, AdamW
# with 5e-5. The loss is on the answer only, the accuracy on the evaluation part.
#
#   recipes/downstream.sh [MODEL] [OUT]
#
# METHODS="full lora galore lrc" makes the whole table. To give each method its own learning rate, run the recipe once
# for each (METHODS=lora LEARNING_RATE=3e-3) into the same OUT. For several GPUs: BATCH_SIZE=2
# LAUNCH="torchrun --nproc_per_node 4 --no-python". TASK_DATASET is a directory with the original files, or "generated"
# (coin_flip, object_tracking); by default the data come from the hub. Repeat the command to continue.
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
                ${TASK_DATASET:+--task-dataset "$TASK_DATASET"} --max-steps "${MAX_STEPS:-1000}" \
                --batch-size "${BATCH_SIZE:-8}" --max-length "${MAX_LENGTH:-512}" \
                --learning-rate "${LEARNING_RATE:-5e-5}" --dtype "${DTYPE:-auto}" --label "$method" \
                $([ -f "$run/run.json" ] && echo --resume)
        welore score "$run/model" --task "$task" ${TASK_DATASET:+--dataset "$TASK_DATASET"} \
            ${LIMIT:+--limit "$LIMIT"} --label "$method" -o "$out/$task-$method.score.json"
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
