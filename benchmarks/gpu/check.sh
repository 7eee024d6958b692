#!/usr/bin/env bash
# The extension built in place, then every test that has to hold on a GPU, on the GPU. A group that
# fails keeps no other from running; the status is 1 then. A group that has passed with these
# sources, versions and GPU is not run again: a call that was cut off is resumed.
#
#   PYTHON=python3 benchmarks/gpu/check.sh OUT
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
cd "$root"
export PYTHONPATH="$root" FASTDEAN_REQUIRE_GPU=1
found=$("$python" benchmarks/gpu/prerequisites.py accelerate pybind11 cmake)
echo "$found"
source benchmarks/gpu/stamp.sh

failed=0
built=1
echo "build: $out/build.log"
if PYTHON="$python" benchmarks/gpu/build_in_place.sh "$out/build" > "$out/build.log" 2>&1; then
    tail -n 1 "$out/build.log"
else
    tail -n 20 "$out/build.log" >&2
    echo "error: the extension did not build" >&2
    built=0
    failed=1
fi

run_group() {
    local name=$1
    shift
    if [[ -e $out/$name.$stamp.passed ]]; then
        echo "$name: passed in an earlier call"
        return
    fi
    echo "$name: $out/$name.log"
    if ! "$python" -m pytest -q --durations=10 "$@" 2>&1 | tee "$out/$name.log"; then
        echo "error: $name failed" >&2
        failed=1
    elif ((built)); then
        # Without the extension, or with that of another build, a group has not seen everything.
        touch "$out/$name.$stamp.passed"
    fi
}

run_group ops tests/test_importance_op.py tests/test_expert_importance_op.py \
    tests/test_selection_op.py tests/test_selection_kernel.py tests/test_mask_op.py \
    tests/test_edits.py tests/test_toggling.py tests/test_token_blocks.py tests/test_collapse_op.py
run_group repeatable tests/test_repeatable.py
run_group score tests/test_score.py tests/test_score_kernels.py tests/test_score_losses.py \
    tests/test_score_state.py tests/test_no_host_in_the_loop.py tests/test_coupling.py \
    tests/test_distributed.py
exit "$failed"
