#!/usr/bin/env bash
# Check and time everything on a GPU, in about 25 minutes: tables go to bench/results/, with date, card and versions.
# The rivals are optional: leave their names out of RIVALS and STEP_RIVAL where transformers or TRL are not installed.
set -uo pipefail
cd "$(dirname "$0")/.."
rivals=${RIVALS-transformers,static,continuous} step_rival=${STEP_RIVAL-trl} failed=0
python -m pytest -m gpu || failed=1
python -m pytest || failed=1
python bench/sampler.py --case gpu ${rivals:+--rival "$rivals"} --minutes 8 --write bench/results/sampler-gpu.md || failed=1
for hidden in 1536 3584; do
    python bench/head.py --rows 16384 --hidden $hidden | tee "bench/results/head-gpu-$hidden.md" || failed=1
done
python bench/update.py --case 1.5b 7b --write bench/results/update-gpu.md || failed=1
python bench/step.py ${step_rival:+--rival "$step_rival"} --write bench/results/step-gpu.md || failed=1
exit $failed
