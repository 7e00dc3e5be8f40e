#!/usr/bin/env bash
# Compare five fine-tuning methods on SmolLM2-135M at ERR 50 %, on a CPU. All read the same tokens. The learning rate is
# tuned over a few values for each method, and the held-out loss decides. Two controls separate repair from fine-tuning:
# the same matrices of the uncompressed model (dense-lrc, dense-nlrc), and the uncompressed model (dense-full).
#
#   recipes/compare_methods_cpu.sh [OUT]
#
# It takes about an hour of an idle core. For a trial: MAX_STEPS=2 MAX_LENGTH=16 MAX_EVAL_SAMPLES=2.
# Repeat the command to continue; finished runs are kept.
set -euo pipefail
out=${1:-runs/compare}
model=${MODEL:-$(python -c "from welore.models.embedded import embedded_model; print(embedded_model())")}
steps=${MAX_STEPS:-40}
mkdir -p "$out"

[ -f "$out/compressed/config.json" ] || welore compress "$model" "$out/compressed" --rank-reduction 0.5

run() { # name, method, learning rate, checkpoint, further arguments
    local name=$1 method=$2 rate=$3 checkpoint=$4
    shift 4
    [ -f "$out/$name-$rate/finetune.json" ] && return
    welore finetune "$checkpoint" "$out/$name-$rate" --method "$method" --learning-rate "$rate" --label "$name" \
        --dataset "${DATASET:-pydoc}" --max-steps "$steps" --batch-size "${BATCH_SIZE:-2}" \
        --max-length "${MAX_LENGTH:-96}" --dtype "${DTYPE:-bfloat16}" --eval-steps "$(((steps + 1) / 2))" \
        --max-eval-samples "${MAX_EVAL_SAMPLES:-16}" --save-steps 0 --overwrite "$@"
    rm -r "$out/$name-$rate/model" # 0.4 GB each; only the records are compared
}

for rate in ${RATES:-3e-4 1e-3 1e-4 3e-3}; do
    for method in lrc full nlrc galore; do
        run "$method" "$method" "$rate" "$out/compressed"
    done
done
for rate in ${LORA_RATES:-3e-3 1e-3 1e-2}; do
    run lora lora "$rate" "$out/compressed"
done
for rate in ${DENSE_RATES:-${RATES:-1e-4 3e-5 3e-4}}; do # a model without damage needs smaller rates
    for method in lrc full nlrc; do
        run "dense-$method" "$method" "$rate" "$model" --plan "$out/compressed/plan.json"
    done
done

python - "$out" <<'PYTHON'
import sys
from pathlib import Path
from welore import Record
from welore.reporting.training_figures import FIGURE_1, FIGURE_5, fine_tuning

out = Path(sys.argv[1])
best = {}
print("| run | learning rate | trained | held-out loss before | after | tokens/s | GB |\n|---|---|---|---|---|---|---|")
for record in sorted(map(Record.load, out.glob("*/finetune.json")), key=lambda r: r.numbers["eval_loss"]):
    n, label = record.numbers, record.inputs["label"]
    chosen = label not in best
    best.setdefault(label, record)
    rate = record.settings["learning_rate"]
    print(f"| {label}{' (best)' if chosen else ''} | {rate:g} | {n['trainable_parameters']:,} | "
          f"{n['evaluation'][0][1]:.4f} | {n['eval_loss']:.4f} | {n.get('tokens_per_second', 0):.1f} | "
          f"{n['peak_memory_bytes'] / 1e9:.2f} |")
compressed = [record for label, record in best.items() if not label.startswith("dense")]
for name, methods in (("figure1", FIGURE_1), ("figure5", FIGURE_5), ("all", None)):
    fine_tuning(compressed, methods, title="SmolLM2-135M, ERR 50 %, best learning rate of each").savefig(
        out / f"{name}.png", dpi=150
    )
PYTHON
