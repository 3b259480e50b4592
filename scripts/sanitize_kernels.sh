#!/bin/sh
# Build the CPU kernels with the address and undefined-behaviour sanitizers and run their tests on every instruction set.
#   scripts/sanitize_kernels.sh [pytest arguments]
# Needs cmake, a C++17 compiler, and the project's test dependencies and nanobind in the active Python.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD_DIR:-$(mktemp -d)}
python=$(command -v python)
mkdir -p "$build/tree"
cp -r "$root/src/kvloom" "$build/tree/"
rm -f "$build/tree/kvloom/kernels/cpu/"_ext*.so
cmake -S "$root" -B "$build/cmake" -DPython_EXECUTABLE="$python" -DKVLOOM_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/tree/kvloom/kernels/cpu"
cmake --build "$build/cmake" --parallel "${JOBS:-2}"
# Leaks at exit and mixed allocators are ignored, because Python and torch have them; errors of the kernels are reported.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
PYTHONPATH="$build/tree" "$python" -m pytest -q -p no:cacheprovider "$root/tests/kernels" "$@"
