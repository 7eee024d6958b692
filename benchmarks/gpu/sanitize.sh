#!/usr/bin/env bash
# The extension built in place, then a small selection of op tests, of the Triton kernels and of the
# extension's, under compute-sanitizer: memcheck finds reads and writes out of bounds, racecheck
# programs that race for shared memory. Ends with an error where the tool is missing or cannot run
# on the device, or the extension does not build: silence must not look like a clean run.
#
#   PYTHON=python3 benchmarks/gpu/sanitize.sh OUT
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
cd "$root"
export PYTHONPATH="$root" FASTDEAN_REQUIRE_GPU=1
# Every tensor an allocation of its own: inside torch's pool a stray access hits another tensor.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
found=$("$python" benchmarks/gpu/prerequisites.py pybind11 cmake)
echo "$found"
source benchmarks/gpu/stamp.sh

# Awkward strides and lengths, and sizes that no tile divides.
tests=(
    "tests/test_importance_op.py::test_strides_do_not_matter"
    "tests/test_importance_op.py::test_numbers_and_lengths_of_examples"
    "tests/test_importance_op.py::test_a_long_example_beside_a_short_one"
    "tests/test_expert_importance_op.py::test_every_expert_gets_its_own_examples"
    "tests/test_repeatable.py::test_an_op_repeats_its_bits[unit_sums-torch.bfloat16-triton]"
    "tests/test_repeatable.py::test_an_op_repeats_its_bits[selection-torch.bfloat16-triton]"
    "tests/test_mask_op.py::test_cuda_clears_what_the_cpu_clears"
    "tests/test_mask_op.py::test_cuda_gathers_writes_and_replaces_what_the_cpu_does"
    "tests/test_collapse_op.py::test_cuda_is_within_the_budget_and_repeats_bit_for_bit"
    "tests/test_collapse_op.py::test_on_cuda_labels_out_of_range_show_as_a_loss_of_nan"
)
pytest=(-m pytest -q -x -p no:cacheprovider -k "not reference" "${tests[@]}")

tool=$(command -v compute-sanitizer || true)
if [[ -z $tool && -x /usr/local/cuda/bin/compute-sanitizer ]]; then
    tool=/usr/local/cuda/bin/compute-sanitizer
fi
if [[ -z $tool ]]; then
    echo "error: compute-sanitizer is not installed; nothing was checked" >&2
    exit 2
fi

# A kernel of torch's own, so that a refusal of the device is told from a finding.
probe='import torch; print(torch.arange(3, device="cuda").sum().item())'
if ! "$tool" --error-exitcode 9 "$python" -c "$probe" > "$out/sanitizer-probe.log" 2>&1; then
    tail -n 5 "$out/sanitizer-probe.log" >&2
    echo "error: compute-sanitizer cannot run on this device; nothing was checked" >&2
    exit 3
fi

echo "build: $out/build.log"
if ! PYTHON="$python" benchmarks/gpu/build_in_place.sh "$out/build" > "$out/build.log" 2>&1; then
    tail -n 20 "$out/build.log" >&2
    echo "error: the extension did not build; nothing was checked" >&2
    exit 1
fi
tail -n 1 "$out/build.log"

# Without the sanitizer first: it would slow the compiling of the kernels down too.
if ! "$python" "${pytest[@]}" > "$out/unsanitized.log" 2>&1; then
    tail -n 30 "$out/unsanitized.log" >&2
    echo "error: the tests fail without the sanitizer already" >&2
    exit 1
fi

failed=0
for check in memcheck racecheck; do
    log=$out/$check.log
    passed=$out/$check.$stamp.passed
    if [[ -e $passed ]]; then
        echo "$check: clean in an earlier call"
        continue
    fi
    if timeout 200 "$tool" --tool "$check" --error-exitcode 9 "$python" "${pytest[@]}" \
        > "$log" 2>&1; then
        touch "$passed"
        echo "$check: clean"
    else
        status=$?
        grep -m 5 '^=========' "$log" >&2 || tail -n 20 "$log" >&2
        echo "error: $check ended with $status (9: found something, 124: ran out of time); $log" >&2
        failed=1
    fi
done
exit "$failed"
