#!/usr/bin/env bash
# The extension built in place, then every test that has to hold on a GPU, on the GPU. A group of
# tests that has passed with these sources is not run again: a call that was cut off is resumed.
#
#   PYTHON=python3 benchmarks/gpu/check.sh OUT
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
source "$root/benchmarks/gpu/stamp.sh"
cd "$root"
export PYTHONPATH="$root" FASTDEAN_REQUIRE_GPU=1

echo "build: $out/build.log"
PYTHON="$python" "$root/benchmarks/gpu/build_in_place.sh" "$out/build" > "$out/build.log" 2>&1 || {
    tail -n 20 "$out/build.log" >&2
    echo "error: the extension did not build" >&2
    exit 1
}
tail -n 1 "$out/build.log"

run_group() {
    local name=$1
    shift
    if [[ -e $out/$name.$stamp.passed ]]; then
        echo "$name: passed in an earlier call"
        return
    fi
    echo "$name: $out/$name.log"
    "$python" -m pytest -q --durations=10 "$@" 2>&1 | tee "$out/$name.log"
    touch "$out/$name.$stamp.passed"
}

run_group ops tests/test_importance_op.py tests/test_expert_importance_op.py \
    tests/test_selection_op.py tests/test_selection_kernel.py tests/test_mask_op.py \
    tests/test_token_blocks.py tests/test_collapse_op.py
run_group repeatable tests/test_repeatable.py
run_group score tests/test_score.py tests/test_score_kernels.py tests/test_score_losses.py \
    tests/test_score_state.py tests/test_no_host_in_the_loop.py
