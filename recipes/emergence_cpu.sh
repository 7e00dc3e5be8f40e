#!/usr/bin/env bash
# Watch low-rank weights emerge: a 2M-parameter Llama is pre-trained with a trace, then the loop closes: its weights are
# cut at ERR 30 and 50 %, by one threshold and uniformly at equal parameters, and what was cut is fine-tuned (all of it,
# the LRCs only, the N-LRCs only), with the same matrices of the uncut model as the control.
#
#   recipes/emergence_cpu.sh [OUT]      SEEDS="0 1 2" DATA=FILE; a quarter of an hour a seed on two cores
#
# DATA: wikitext2 from the hub, or a file of 10 MB. What is stopped goes on when the same command is given again.
set -euo pipefail
out=${1:-runs/emergence}
data=${DATA:-wikitext2}
length=${LENGTH:-128}

evaluated() { # checkpoint, name
    [ -f "$place/$2.ppl.json" ] ||
        welore evaluate "$1" --dataset "$data" --max-length "$length" --num-windows "${WINDOWS:-64}" --label "$2" \
            -o "$place/$2.ppl.json"
}

tuned() { # name, method, checkpoint, further arguments
    local name=$1 method=$2 checkpoint=$3
    shift 3
    [ -f "$place/$name/finetune.json" ] ||
        welore finetune "$checkpoint" "$place/$name" --method "$method" --dataset "$data" --max-length "$length" \
            --batch-size "${BATCH:-16}" --max-steps "${TUNING_STEPS:-60}" --learning-rate "${TUNING_LR:-3e-4}" --seed "$seed" \
            --eval-steps "${TUNING_STEPS:-60}" --max-eval-samples 64 --save-steps 0 --label "$name" --overwrite "$@"
}

branch() { # rank reduction: cut both ways at equal parameters, then fine-tune
    local cut=$place/welore-$1 uniform=$place/uniform-$1 ratio
    [ -f "$cut/config.json" ] || welore compress "$model" "$cut" --rank-reduction "$1"
    if [ ! -f "$uniform/config.json" ]; then
        ratio=$(sed -n 's/.*"parameter_ratio": \([0-9.]*\).*/\1/p' "$cut/compression.json" | head -n 1)
        welore compress "$model" "$uniform" --strategy uniform --keep "$ratio"
    fi
    evaluated "$cut" "welore-$1"
    evaluated "$uniform" "uniform-$1"
    for method in full lrc nlrc; do
        tuned "$method-$1" "$method" "$cut"
    done
}

for seed in ${SEEDS:-0}; do
    place=$out/seed-$seed
    run=$place/pretrain
    model=$run/training/model
    [ -f "$run/pretrain.json" ] ||
        welore pretrain "$run" --dataset "$data" --size "${SIZE:-2m}" --vocab-size "${VOCABULARY:-4096}" \
            --max-steps "${STEPS:-1465}" --batch-size "${BATCH:-16}" --max-length "$length" --learning-rate "${LR:-2e-3}" --seed "$seed" \
            --probes "${PROBES:-30}" --probe-items "${PROBE_ITEMS:-32}" --max-eval-samples "${EVAL_ITEMS:-64}" \
            $([ -f "$run/run.json" ] && echo --resume)
    evaluated "$model" dense
    OMP_NUM_THREADS=1 branch 0.3 & # one core each
    OMP_NUM_THREADS=1 branch 0.5
    wait $!
    for method in full lrc nlrc; do
        tuned "dense-$method" "$method" "$model" --plan "$place/welore-0.5/plan.json"
    done
    rm -rf "$place"/*/model # the records are what is compared
done
welore report "$out" -o "$out/report"
