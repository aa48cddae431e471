#!/usr/bin/env bash
# Check and time everything that needs a GPU, in 7 minutes at most; tables come with date, card and versions.
#   bash bench/gpu.sh               results go to bench/results/gpu, or to $OUT
#   DEVICE=cpu bash bench/gpu.sh    the same commands, small, to see that no argument is wrong
# Each step is a process with a limit of its own, also of what is left of the 7 minutes; none stops the others.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} out=${OUT:-bench/results/gpu} total=${SECONDS_AT_MOST:-420}
work=$(mktemp -d) failed=0
mkdir -p "$out"
rm -f "$out"/{log,summary}.txt "$out"/{sampler,head,update,machine}.md
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=passive

step() {  # name, most seconds, command: its end and exit status go to summary.txt, all it says to log.txt
    local name=$1 most=$2 began=$SECONDS status=skipped
    shift 2
    [ $((total - SECONDS)) -lt "$most" ] && most=$((total - SECONDS))
    if [ "$most" -gt 0 ]; then
        timeout -k 5 "$most" "$@" > "$work/output" 2>&1
        status=$?
    else
        : > "$work/output"
    fi
    [ "$status" = 0 ] || failed=1
    { echo "##### $name: $*"; tail -c 300000 "$work/output"; } >> "$out/log.txt"
    { printf '%-10s exit %s, %s s: %s\n' "$name" "$status" "$((SECONDS - began))" "$*"
      tail -n 6 "$work/output" | cut -c 1-300 | sed 's/^/    /'; } | tee -a "$out/summary.txt"
}

shape=qwen2.5-0.5b vocab=None layers=4 check=(--layers 4) sampler=(--case gpu --repeats 2 --minutes 1.2) head=(--repeats 3) update=(--repeats 2)
if [ "$device" = cpu ]; then
    shape=tiny vocab=401 layers=1 check=(--quick) sampler=(--case branches --quick --repeats 1) head=(--rows 16 --hidden 64 --repeats 1)
    update=(--case tiny --quick --repeats 1)
fi
on=(--device "$device")
step machine 30 python3 bench/timing.py "${on[@]}" --write "$out/machine.md"
step tests 110 python3 -m pytest -m gpu -q -p no:cacheprovider --tb=short
step rollouts 60 python3 bench/sampler.py "${on[@]}" --check "${check[@]}"
step model 30 python3 -c "import sys; sys.path.insert(0, 'bench'); import timing
timing.random_model('$shape', $layers, vocab=$vocab).save_pretrained('$work/model')"
cp examples/chain/model/tokenizer*.json "$work/model"
step run 50 python3 bread.py --model "$work/model" --data examples/chain/train.jsonl --output "$work/run" "${on[@]}" \
    --steps 3 --problems-per-step 4 --group-size 4 --max-new-tokens 64 --on-fail expert
step metrics 5 tail -n 1 "$work/run/metrics.jsonl"
step example 40 python3 bread.py --steps 2 --output "$work/example" "${on[@]}"
step sampler 90 python3 bench/sampler.py "${on[@]}" "${sampler[@]}" --write "$out/sampler.md"
step head 40 python3 bench/head.py "${on[@]}" "${head[@]}" --rival torch --write "$out/head.md"
step update 60 python3 bench/update.py "${on[@]}" "${update[@]}" --write "$out/update.md"
[ "$device" = cpu ] || nvidia-smi >> "$out/log.txt" 2>&1
echo "all steps took $SECONDS s" | tee -a "$out/summary.txt"
cat "$out/summary.txt"
exit $failed
