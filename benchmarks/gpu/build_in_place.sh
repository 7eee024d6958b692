#!/usr/bin/env bash
# Compile the extension into this source tree, where PYTHONPATH finds it, with what is installed:
# no network, no build environment of pip's own, nothing installed.
#
#   PYTHON=python3 benchmarks/gpu/build_in_place.sh BUILD_FOLDER
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=$(mkdir -p "$1" && cd "$1" && pwd)
python=$(command -v "${PYTHON:-python3}")
# A virtual environment's own CMake and ninja before the system's.
PATH="$(dirname "$python"):$PATH"

generator=()
if command -v ninja > /dev/null; then
    generator=(-G Ninja)
fi
cmake -S "$root" -B "$build" "${generator[@]}" \
    -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$root/fastdean" \
    -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    -DFASTDEAN_CUDA="${FASTDEAN_CUDA:-AUTO}"
cmake --build "$build" --parallel
PYTHONPATH="$root" "$python" -c '
from fastdean import native

found = native.status()
print(f"extension: {found.state}, {found}")
raise SystemExit(found.state != "available")
'
