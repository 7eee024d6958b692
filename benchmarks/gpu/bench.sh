#!/usr/bin/env bash
# Every benchmark on the GPU, what matters most first; records go to OUT/<device>/<op>.jsonl as they
# are measured. What does not fit into the time is measured by the next call with the same OUT.
#
#   PYTHON=python3 benchmarks/gpu/bench.sh OUT
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
cd "$root"
export PYTHONPATH="$root"
"$python" benchmarks/gpu/prerequisites.py

measure() {
    local seconds=$1
    shift
    "$python" benchmarks/run.py "$@" --device cuda --out "$out" --resume --seconds "$seconds" \
        2>&1 | tee -a "$out/bench.log"
}

# Together meant to end within 8 minutes on one H100; not yet timed on one. A case that has started
# is finished, so that each passes its time by up to one case. One that fails does not keep the
# others from being measured.
failed=0
measure 170 kernels || failed=1
measure 90 score --random-model qwen2-7b --examples 128 --dtype bf16 --vmap --profile || failed=1
measure 80 sweep --random-model qwen2-7b || failed=1
exit "$failed"
