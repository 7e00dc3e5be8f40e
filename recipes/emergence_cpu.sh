#!/usr/bin/env bash
# Watch low-rank weights emerge. A Llama with 2M parameters is pre-trained with a trace. Then its weights are compressed
# at ERR 30 and 50 %, by one threshold and uniformly at equal parameters, and fine-tuned (all parameters, the LRCs only,
# the N-LRCs only). The same matrices of the uncompressed model are the control.
#
#   recipes/emergence_cpu.sh [OUT]
#
# SEEDS="0 1 2" runs three seeds; each takes a quarter of an hour on two cores. DATASET is wikitext2 from the hub by
# default, or a file of 10 MB. Repeat the command to continue.
set -euo pipefail
out=${1:-runs/emergence}
data=${DATASET:-wikitext2}
length=${MAX_LENGTH:-128}

evaluated() { # checkpoint, name
    [ -f "$directory/$2.ppl.json" ] ||
        welore evaluate "$1" --dataset "$data" --max-length "$length" --num-windows "${NUM_WINDOWS:-64}" --label "$2" \
            -o "$directory/$2.ppl.json"
}

tuned() { # name, method, checkpoint, further arguments
    local name=$1 method=$2 checkpoint=$3
    shift 3
    [ -f "$directory/$name/finetune.json" ] ||
        welore finetune "$checkpoint" "$directory/$name" --method "$method" --dataset "$data" --max-length "$length" \
            --batch-size "${BATCH_SIZE:-16}" --max-steps "${TUNING_MAX_STEPS:-60}" \
            --learning-rate "${TUNING_LEARNING_RATE:-3e-4}" --seed "$seed" --eval-steps "${TUNING_MAX_STEPS:-60}" \
            --max-eval-samples 64 --save-steps 0 --label "$name" --overwrite "$@"
}

branch() { # rank reduction: compress both ways at equal parameters, then fine-tune
    local cut=$directory/welore-$1 uniform=$directory/uniform-$1 ratio
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
    directory=$out/seed-$seed
    run=$directory/pretrain
    model=$run/training/model
    [ -f "$run/pretrain.json" ] ||
        welore pretrain "$run" --dataset "$data" --size "${SIZE:-2m}" --vocab-size "${VOCAB_SIZE:-4096}" \
            --max-steps "${MAX_STEPS:-1465}" --batch-size "${BATCH_SIZE:-16}" --max-length "$length" \
            --learning-rate "${LEARNING_RATE:-2e-3}" --seed "$seed" --probes "${PROBES:-30}" \
            --probe-items "${PROBE_ITEMS:-32}" --max-eval-samples "${MAX_EVAL_SAMPLES:-64}" \
            $([ -f "$run/run.json" ] && echo --resume)
    evaluated "$model" dense
    OMP_NUM_THREADS=1 branch 0.3 & # one core each
    OMP_NUM_THREADS=1 branch 0.5
    wait $!
    for method in full lrc nlrc; do
        tuned "dense-$method" "$method" "$model" --plan "$directory/welore-0.5/plan.json"
    done
    rm -rf "$directory"/*/model # only the records are compared
done
welore report "$out" -o "$out/report"
