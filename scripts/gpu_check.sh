#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of less than 8 minutes. Writes a JSON and a one-page
# Markdown report to the folder given (default: gpu-report), goes on after a failing step and ends non-zero then.
#
#   scripts/gpu_check.sh [report folder]
#
# The library is taken from TORCHMARGIN_LIBRARY if that is set (one that was built elsewhere for this torch); the
# Python package from the environment of $PYTHON (default python3), or else from this tree's python/ with a `_C` that
# is built here. GTEST_BINARY names the C++ tests of that build (GoogleTest is inside), COMPUTE_SANITIZER the tool if it is
# not on PATH. Without TORCHMARGIN_LIBRARY and without an installed package both are built (cmake, nvcc).
set -uo pipefail
cd "$(dirname "$0")/.."
REPORT="${1:-gpu-report}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$REPORT"
STEPS="$REPORT/steps.tsv"
: > "$STEPS"
failed=0

began_all=$(date +%s)
TOTAL=470 # seconds

# step NAME SECONDS COMMAND...: runs, keeps the log, records the result. Nothing runs past the total. A step whose log
# matches $REFUSED is one that this machine does not allow: it says nothing about the library.
step() {
  local name="$1" limit="$2"; shift 2
  local began left status word
  began=$(date +%s)
  left=$((TOTAL - (began - began_all)))
  if [ "$left" -lt 5 ]; then
    skip "$name" "no time left"
    failed=1
    return 0
  fi
  timeout "$((limit < left ? limit : left))" "$@" > "$REPORT/$name.log" 2>&1
  status=$?
  word="passed"
  if [ "$status" -ne 0 ] && [ -n "${REFUSED:-}" ] && grep -qiE "$REFUSED" "$REPORT/$name.log"; then
    word="not run: refused by this machine"
  elif [ "$status" -ne 0 ]; then
    word="FAILED ($status)"
    failed=1
  fi
  printf '%s\t%s\t%s\n' "$name" "$word" "$(($(date +%s) - began))" >> "$STEPS"
  printf '== %s: %s, %s s\n' "$name" "$word" "$(($(date +%s) - began))"
  [ "$status" -ne 0 ] && tail -n 25 "$REPORT/$name.log"
  return 0
}
skip() {
  printf '%s\tnot run: %s\t0\n' "$1" "$2" >> "$STEPS"
  printf '== %s: not run: %s\n' "$1" "$2"
}

TORCH_DIR=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))') || exit 1

# The package: installed, or this tree's with _C built for this Python.
prepare_package() {
  "$PYTHON" -c 'import torchmargin' 2> /dev/null && return 0
  if [ -z "${TORCHMARGIN_LIBRARY:-}" ]; then
    local architecture
    architecture=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || return 1
    cmake -S . -B build/gpu-check -DTORCHMARGIN_BUILD_TESTS=ON -DTORCHMARGIN_CUDA=ON -DTORCH_CUDA_ARCH_LIST="$architecture" \
      -DTORCHMARGIN_TORCH_DIR="$TORCH_DIR" && cmake --build build/gpu-check -j "$(nproc)" \
      --target torchmargin torchmargin_tests || return 1
    export TORCHMARGIN_LIBRARY="$PWD/build/gpu-check/libtorchmargin.so"
    GTEST_BINARY="${GTEST_BINARY:-$PWD/build/gpu-check/tests/cpp/torchmargin_tests}"
  fi
  export PYTHONPATH="$PWD/python:${PYTHONPATH:-}"
  if ! "$PYTHON" -c 'import torchmargin' 2> /dev/null; then
    local include suffix pybind
    pybind=$("$PYTHON" -c 'import pybind11; print(pybind11.get_include())' 2> /dev/null) ||
      pybind=$("$PYTHON" -c 'import torch, os; print(os.path.join(os.path.dirname(torch.__file__), "include"))')
    include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    g++ -std=c++20 -O1 -shared -fPIC -fvisibility=hidden -Icsrc -Icsrc/include -I"$include" -I"$pybind" \
      csrc/bindings/module.cpp -o "python/torchmargin/_C$suffix" "$TORCHMARGIN_LIBRARY" -Wl,--allow-shlib-undefined || return 1
  fi
  "$PYTHON" -c 'import torchmargin'
}
prepare_package > "$REPORT/package.log" 2>&1 || { cat "$REPORT/package.log"; exit 1; }

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "there is no GPU here"; exit 1; }

step versions 60 "$PYTHON" - <<'PY'
import json, torch, torchmargin
print(json.dumps({
    "gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
    "torch": torch.__version__, "cuda": torch.version.cuda, "torchmargin": torchmargin.__version__,
    "architectures": torchmargin.config.cuda_architectures(),
}))
PY
step smoke 120 "$PYTHON" - <<'PY'
import torch, torchmargin
x = torch.randn(64, 128, device="cuda", requires_grad=True)
loss = torchmargin.ArcFaceLoss(128, 5000, device="cuda")
value = loss(x, torch.randint(0, 5000, (64,), device="cuda"))
value.backward()
torch.cuda.synchronize()
assert value.isfinite() and x.grad.isfinite().all() and loss.weight.grad.isfinite().all()
print(value.item())
PY
# The C++ tests, which look for torch and for the library where they were built: here they are elsewhere.
LIBRARY="${TORCHMARGIN_LIBRARY:-$("$PYTHON" -c 'import torchmargin; print(torchmargin.__path__[0] + "/lib/libtorchmargin.so")')}"
run_gtest() {
  env LD_LIBRARY_PATH="$(dirname "$LIBRARY"):$TORCH_DIR/lib:${LD_LIBRARY_PATH:-}" "$@"
}
export -f run_gtest
export LIBRARY TORCH_DIR
if [ -x "${GTEST_BINARY:-}" ]; then
  step gtest 120 bash -c 'run_gtest "$@"' - "$GTEST_BINARY"
else
  skip gtest "GTEST_BINARY names no program"
fi
if "$PYTHON" -c 'import pytest' 2> /dev/null; then
  step pytest 180 "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider tests/python
else
  skip pytest "there is no pytest"
fi
SANITIZER="${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}"
for tool in memcheck racecheck synccheck initcheck; do
  if [ ! -x "$SANITIZER" ]; then
    skip "$tool" "there is no compute-sanitizer"
  elif [ ! -x "${GTEST_BINARY:-}" ]; then
    skip "$tool" "GTEST_BINARY names no program"
  else
    REFUSED="unable to attach|not permitted|not supported|debugger" step "$tool" 40 bash -c 'run_gtest "$@"' - \
      "$SANITIZER" --tool "$tool" --error-exitcode 9 "$GTEST_BINARY" --gtest_filter='Cuda.*'
  fi
done
step accuracy 40 "$PYTHON" benchmarks/accuracy.py --device cuda --json "$REPORT/accuracy.json"
step benchmark 150 "$PYTHON" benchmarks/gpu.py --rows 1024 --classes 93431 360232 --runs 5 --json "$REPORT/benchmark.json"

"$PYTHON" scripts/gpu_report.py "$REPORT"
exit "$failed"
