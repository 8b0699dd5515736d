#!/usr/bin/env bash
# Plants each bug of tests/mutants in a copy of the tree and expects the tests of the CUDA kernels on the CPU to fail.
# Ends non-zero if a bug survives or a patch no longer applies.
#
#   scripts/mutants.sh <configured build folder>       (make mutants)
set -uo pipefail
cd "$(dirname "$0")/.."
CACHE="$1/CMakeCache.txt"
TORCH_DIR=$(sed -n 's/^TORCHMARGIN_TORCH_DIR:[A-Z]*=//p' "$CACHE")
WORK=build/mutants
mkdir -p "$WORK/tree"
survived=0

copy_tree() { # only what differs is written, so that little is compiled again
  find CMakeLists.txt cmake csrc cuda tests/cpp -type f | while read -r file; do
    cmp -s "$file" "$WORK/tree/$file" || install -D -m 644 "$file" "$WORK/tree/$file"
  done
}
build_and_test() {
  cmake --build "$WORK/build" --target torchmargin_device_on_host_tests > "$WORK/build.log" 2>&1 || return 2
  timeout 300 "$WORK/build/tests/cpp/torchmargin_device_on_host_tests" --gtest_brief=1 --gtest_fail_fast \
    --gtest_filter="$1" > "$WORK/test.log" 2>&1
}

copy_tree
cmake -G Ninja -S "$WORK/tree" -B "$WORK/build" -DTORCHMARGIN_TORCH_DIR="$TORCH_DIR" -DTORCHMARGIN_BUILD_TESTS=ON \
  -DTORCHMARGIN_CUDA=OFF > "$WORK/cmake.log" 2>&1 || { cat "$WORK/cmake.log"; exit 1; }
build_and_test '*' || { echo "the unchanged tree fails"; tail "$WORK/build.log" "$WORK/test.log"; exit 1; }
for patch in tests/mutants/*.patch; do
  name=$(basename "$patch" .patch)
  copy_tree
  patch -s -p1 -d "$WORK/tree" < "$patch" || { echo "$name: does not apply"; survived=1; continue; }
  build_and_test '*'
  case $? in
    0) echo "$name: SURVIVED"; survived=1 ;;
    2) echo "$name: does not compile"; tail -5 "$WORK/build.log"; survived=1 ;;
    *) echo "$name: found" ;;
  esac
done
exit "$survived"
