#!/usr/bin/env bash
# Check and time everything that needs a GPU, in 8 minutes at most; tables come with date, card and versions.
#   bash bench/gpu.sh               results go to bench/results/gpu, or to $OUT
#   DEVICE=cpu bash bench/gpu.sh    the same commands, small, to see that no argument is wrong
# Each step is a process with a limit of its own, also of what is left of the 8 minutes; none stops the others.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} out=${OUT:-bench/results/gpu} total=${SECONDS_AT_MOST:-480}
work=$(mktemp -d) failed=0
mkdir -p "$out"
rm -f "$out"/{log,summary}.txt "$out/tables.md"
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=passive TORCH_CUDNN_SDPA_DEPRIORITIZED=1

step() {  # name, most seconds, command: its end and exit status go to summary.txt, all it says to log.txt
    local name=$1 most=$2 began=$SECONDS status=skipped
    shift 2
    [ $((total - SECONDS)) -lt "$most" ] && most=$((total - SECONDS))
    if [ "$most" -gt 0 ]; then
        timeout -s INT -k 10 "$most" "$@" > "$work/output" 2>&1
        status=$?
    else
        : > "$work/output"
    fi
    [ "$status" = 0 ] || failed=1
    { echo "##### $name: $*"; tail -c 300000 "$work/output"; } >> "$out/log.txt"
    [ ! -f "$work/$name.md" ] || cat "$work/$name.md" >> "$out/tables.md"
    { printf '%-10s exit %s, %s s: %s\n' "$name" "$status" "$((SECONDS - began))" "$*"
      tail -n 6 "$work/output" | cut -c 1-300 | sed 's/^/    /'; } | tee -a "$out/summary.txt"
}

shape=qwen2.5-0.5b vocab=None layers=4
real=(--rival transformers --repeats 1 --minutes 0.8)  # prompts of a data set's lengths, against generate
sampler=(--repeats 2 --minutes 1.4) profile=() head=(--repeats 3) update=(--case 135m-ragged 1.5b-ragged 1.5b --repeats 2) whole=()
memory=(--shape qwen2.5-1.5b --problems 8 --new 256)
if [ "$device" = cpu ]; then
    shape=tiny vocab=401 layers=1
    real=(--quick --layers 1 --repeats 1 --minutes 0.1)
    sampler=(--quick --layers 1 --repeats 1 --minutes 0.4) profile=(--layers 1)
    memory=(--shape tiny --problems 2 --new 16)
    head=(--rows 16 --hidden 64 --repeats 1) update=(--case tiny --quick --repeats 1)
    whole=(--case tiny)
fi
on=(--device "$device")
step machine 30 python3 bench/timing.py "${on[@]}" --write "$work/machine.md"
step tests 170 python3 -m pytest -m gpu -q -p no:cacheprovider --tb=short
step model 30 python3 -c "import sys; sys.path.insert(0, 'bench'); import timing
timing.random_model('$shape', $layers, vocab=$vocab).save_pretrained('$work/model')"
cp examples/chain/model/tokenizer*.json "$work/model"
step run 50 python3 bread.py --model "$work/model" --data examples/chain/train.jsonl --output "$work/run" "${on[@]}" \
    --steps 3 --problems-per-step 4 --group-size 4 --max-new-tokens 64 --on-fail expert
step metrics 5 tail -n 1 "$work/run/metrics.jsonl"
step example 40 python3 bread.py --steps 2 --output "$work/example" "${on[@]}"
step profile 50 python3 bench/sampler.py "${on[@]}" --profile "${profile[@]}" --write "$work/profile.md"
step update 60 python3 bench/update.py "${on[@]}" "${update[@]}" --write "$work/update.md"
step head 40 python3 bench/head.py "${on[@]}" "${head[@]}" --rival products torch --write "$work/head.md"
step memory 40 python3 bench/memory.py "${on[@]}" "${memory[@]}" --write "$work/memory.md"
step offload 40 python3 bench/memory.py "${on[@]}" "${memory[@]}" --offload --recompute --write "$work/offload.md"
step whole 40 python3 bench/step.py "${on[@]}" "${whole[@]}" --repeats 2 --write "$work/whole.md"
# Without torch's own cache of memory, which hides where tensors end.
if command -v compute-sanitizer > /dev/null; then
    step memcheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python3 -m pytest -q -p no:cacheprovider tests/test_kernels.py -k "rows_of_all_kinds and dtype1"
fi
# Last, as what is left of the time is theirs.
step real 80 python3 bench/sampler.py "${on[@]}" --case real "${real[@]}" --write "$work/real.md"
step sampler 120 python3 bench/sampler.py "${on[@]}" --case gpu "${sampler[@]}" --write "$work/sampler.md"
[ "$device" = cpu ] || nvidia-smi >> "$out/log.txt" 2>&1
echo "all steps took $SECONDS s" | tee -a "$out/summary.txt"
cat "$out/summary.txt"
exit $failed
