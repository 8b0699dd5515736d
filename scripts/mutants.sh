#!/usr/bin/env bash
# Plants each bug of tests/mutants in a copy of the tree and expects tests to find it. A patch's first line says which:
#
#   # found by: device_on_host '*.FinishRows'                    the CUDA kernels on the CPU; alone: all their tests
#   # found by: cpp torchmargin_tests 'ChunkPlan.*'              a binary of tests/cpp and its --gtest_filter
#   # found by: pytest tests/python/test_ops.py -k lanes         with the copy's library and package
#
#   scripts/mutants.sh <configured build folder> [name ... | sample]       (make mutants)
#
# Ends non-zero if a bug survives, if a patch does not apply or compile, or if the unchanged tree fails.
set -uo pipefail
cd "$(dirname "$0")/.."
BUILT=$(cd "$1" && pwd)
shift
WORK=$PWD/build/mutants
TREE=$WORK/tree
BUILD=$TREE/build/mutants
# Cheap ones of every kind, for CI.
SAMPLE=(finish-rows-misses-the-last-row sweep-forgets-a-lane-has-begun autograd-swaps-bias-and-margin
  autograd-keeps-unused-rows loss-forgets-label-smoothing)

copy_tree() { # only what differs is written, so that little is compiled again
  find CMakeLists.txt cmake csrc cuda tests/cpp python -type f ! -name '*.pyc' ! -name '*.so*' | while read -r file; do
    cmp -s "$file" "$TREE/$file" || install -D -m 644 "$file" "$TREE/$file"
  done
}

# torch lies in the copy as it does in the tree, so that ccache knows what `make` has compiled.
configure() {
  local torch
  torch=$(sed -n 's/^TORCHMARGIN_TORCH_DIR:[A-Z]*=//p' "$BUILT/CMakeCache.txt")
  if [[ $torch == */.venv/* ]]; then
    local copy="$TREE/.venv/${torch##*/.venv/}"
    mkdir -p "$(dirname "$copy")"
    local part
    for part in torch nvidia; do # programs that link LibTorch want NVIDIA's libraries beside it
      local from="${torch%/*}/$part" to="${copy%/*}/$part"
      [ -e "$to" ] || [ ! -e "$from" ] || cp -al "$from" "$to" 2> /dev/null || { rm -rf "$to" && ln -s "$from" "$to"; }
    done
    torch=$copy
  fi
  CCACHE_BASEDIR=$TREE cmake -G Ninja -S "$TREE" -B "$BUILD" -DTORCHMARGIN_TORCH_DIR="$torch" -DTORCHMARGIN_WERROR=ON \
    -DTORCHMARGIN_BUILD_TESTS=ON -DTORCHMARGIN_CUDA=OFF > "$WORK/cmake.log" 2>&1 || { cat "$WORK/cmake.log"; exit 1; }
}
build() {
  CCACHE_BASEDIR=$TREE cmake --build "$BUILD" ${MAX_JOBS:+-j "$MAX_JOBS"} --target "$1" > "$WORK/build.log" 2>&1
}

# What is run with a library and the copy's package.
with_library() {
  OMP_NUM_THREADS=1 TORCHMARGIN_LIBRARY=$1 PYTHONPATH=$TREE/python PYTHONDONTWRITEBYTECODE=1 \
    timeout "$2" "${@:3}" > "$WORK/test.log" 2>&1
}
QUIETLY=(-q -x -p no:cacheprovider)

# The words of a patch's "found by", into the array `words`.
words_of() {
  eval "words=($(sed -n '1s/^# found by: //p' "tests/mutants/$1.patch"))"
  [ "${words[0]:-}" != device_on_host ] || words=(cpp torchmargin_device_on_host_tests "${words[1]:-*}")
}

# 0: the tests of `words` pass, 1: they fail, 2: there is nothing to run.
run_tests() {
  local status library=$BUILT/libtorchmargin.so
  case ${words[0]:-} in
    cpp)
      build "${words[1]}" || return 2
      timeout 300 "$BUILD/tests/cpp/${words[1]}" --gtest_brief=1 --gtest_fail_fast --gtest_filter="${words[2]}" \
        > "$WORK/test.log" 2>&1
      status=$?
      ;;
    pytest)
      if [ "$1" = library ]; then
        build torchmargin || return 2
        library=$BUILD/libtorchmargin.so
      fi
      with_library "$library" 300 python -m pytest "${QUIETLY[@]}" "${words[@]:1}"
      status=$?
      ((status < 2 || status > 5)) || return 2 # no test has run
      ;;
    *) return 2 ;;
  esac
  ((status == 0)) || return 1
}

# Every command passes on the unchanged tree; those of pytest in one process.
check_unchanged() {
  local name commands=()
  declare -A seen
  for name in "${names[@]}"; do
    words_of "$name"
    [ -z "${seen[${words[*]}]:-}" ] || continue
    seen[${words[*]}]=1
    if [ "${words[0]}" = pytest ]; then
      commands+=("$(printf '%s\n' "${QUIETLY[@]}" "${words[@]:1}")")
    else
      run_tests library || return 1
    fi
  done
  ((${#commands[@]} == 0)) || with_library "$BUILT/libtorchmargin.so" 1200 python -c '
import sys
import pytest
for command in sys.argv[1:]:
    if pytest.main(command.split("\n")):
        sys.exit(f"fails: {command.split()}")
' "${commands[@]}"
}

mkdir -p "$TREE"
copy_tree
mkdir -p "$TREE/python/torchmargin/lib"
ln -sf "$BUILT"/_C*.so "$TREE/python/torchmargin/"
ln -sf "$BUILT/libtorchmargin.so" "$BUILT/libtorchmargin.json" "$TREE/python/torchmargin/lib/"
configure

names=("$@")
[ "$*" = sample ] && names=("${SAMPLE[@]}")
((${#names[@]})) || mapfile -t names < <(basename -s .patch tests/mutants/*.patch)

for name in "${names[@]}"; do
  [ -f "tests/mutants/$name.patch" ] || { echo "there is no tests/mutants/$name.patch"; exit 1; }
done
check_unchanged || { echo "the unchanged tree fails"; tail -n 20 "$WORK"/*.log; exit 1; }

failed=0
for name in "${names[@]}"; do
  patch=tests/mutants/$name.patch
  built=package
  ! grep -q '^+++ b/\(csrc\|cuda\|cmake\)/' "$patch" || built=library
  copy_tree
  patch -s -p1 -F0 -d "$TREE" < "$patch" > /dev/null || { echo "$name: does not apply"; failed=1; continue; }
  words_of "$name"
  begin=$SECONDS
  run_tests $built
  case $? in
    0) echo "$name: SURVIVED (${words[*]})"; failed=1 ;;
    1) echo "$name: found, $((SECONDS - begin)) s" ;;
    *) echo "$name: does not build or run"; tail -n 5 "$WORK/build.log" "$WORK/test.log"; failed=1 ;;
  esac
done
copy_tree
exit "$failed"
