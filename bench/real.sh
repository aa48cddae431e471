#!/usr/bin/env bash
# A real model on a card, in 8 minutes: SmolLM2-135M-Instruct learns GSM8K's form, then BREAD against GRPO.
#   bash bench/real.sh MODEL GSM8K_TRAIN.jsonl GSM8K_TEST.jsonl      results go to bench/results/real, or to $OUT
#   DEVICE=cpu STEPS=2 PROBLEMS=2 bash bench/real.sh ...             the same commands, small
# Three runs by bread.py as a user types them; GRPO gets as many sampled tokens as BREAD took. See examples/gsm8k.md.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$(realpath "$1") train=$(realpath "$2") test=$(realpath "$3")
device=${DEVICE:-cuda} out=${OUT:-bench/results/real} steps=${STEPS:-60} problems=${PROBLEMS:-32} seconds=${SECONDS_AT_MOST:-480}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
head -n "${EVALS:-200}" "$test" > "$work/heldout.jsonl"

run() {  # per cent of the time that is left, method, model, more flags: a run of its own; cut off, it saves
    local left=$(((seconds - SECONDS) * $1 / 100))
    shift
    timeout -s INT "$((left > 20 ? left : 20))" python3 bread.py --method "$1" --model "$2" --data "$train" \
        --eval-data "$work/heldout.jsonl" --output "$work/$1" --device "$device" @examples/gsm8k.args \
        --problems-per-step "$problems" "${@:3}" 2>&1 | tee "$out/$1.txt" || true
}

run 40 sft "$model" --steps "$((steps * 2))" --lr 3e-5 --eval-every 100000
warm=$(ls -d "$work"/sft/checkpoint-* | tail -n 1)
run 55 bread "$warm" --steps "$steps" --eval-every "$((steps / 4 + 1))"
tokens=$(tail -n 1 "$work/bread/metrics.jsonl" | python3 -c "import json; print(json.loads(input())['tokens/sampled'])")
run 100 grpo "$warm" --steps 100000 --token-budget "$tokens" --eval-every "$((steps / 4 + 1))"
for name in bread grpo; do cp "$work/$name/metrics.jsonl" "$out/$name-metrics.jsonl"; done
python3 report.py "$work/bread" > "$out/search.txt" || true
python3 report.py "$work/bread" "$work/grpo" --plot "$out/curves.png" || echo "no curves: pip install matplotlib"
echo "all of it took $SECONDS s on $device; results in $out"
