#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of less than 8 minutes. Writes a JSON and a one-page
# Markdown report to the folder given (default: gpu-report), goes on after a failing step and ends non-zero then.
#
#   scripts/gpu_check.sh [report folder]
#
# The library is taken from TORCHMARGIN_LIBRARY if that is set (one that was built elsewhere for this torch); the
# Python package from the environment of $PYTHON (default python3), or else from this tree's python/ with a `_C` that
# is built here. GTEST_BINARY names the C++ tests of that build, COMPUTE_SANITIZER the tool if it is not on PATH.
set -uo pipefail
cd "$(dirname "$0")/.."
REPORT="${1:-gpu-report}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$REPORT"
STEPS="$REPORT/steps.tsv"
: > "$STEPS"
failed=0

# step NAME SECONDS COMMAND...: runs, keeps the log, records the result.
step() {
  local name="$1" limit="$2"; shift 2
  local began ended status
  began=$(date +%s)
  timeout "$limit" "$@" > "$REPORT/$name.log" 2>&1
  status=$?
  ended=$(date +%s)
  local word="passed"
  [ "$status" -ne 0 ] && { word="FAILED ($status)"; failed=1; }
  printf '%s\t%s\t%s\n' "$name" "$word" "$((ended - began))" >> "$STEPS"
  printf '== %s: %s, %s s\n' "$name" "$word" "$((ended - began))"
  [ "$status" -ne 0 ] && tail -n 25 "$REPORT/$name.log"
  return 0
}
skip() {
  printf '%s\tnot run: %s\t0\n' "$1" "$2" >> "$STEPS"
  printf '== %s: not run: %s\n' "$1" "$2"
}

# The package: installed, or this tree's with _C built for this Python.
prepare_package() {
  "$PYTHON" -c 'import torchmargin' 2> /dev/null && return 0
  [ -n "${TORCHMARGIN_LIBRARY:-}" ] || { echo "torchmargin is not installed and TORCHMARGIN_LIBRARY is not set"; return 1; }
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
if [ -x "${GTEST_BINARY:-}" ]; then
  step gtest 120 "$GTEST_BINARY"
else
  skip gtest "GTEST_BINARY names no program"
fi
step pytest 240 "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider tests/python
SANITIZER="${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}"
for tool in memcheck racecheck synccheck initcheck; do
  if [ -x "$SANITIZER" ]; then
    step "$tool" 60 "$SANITIZER" --tool "$tool" --error-exitcode 9 "$PYTHON" tests/python/small_cuda_cases.py
  else
    skip "$tool" "there is no compute-sanitizer"
  fi
done
step accuracy 60 "$PYTHON" benchmarks/accuracy.py --device cuda --json "$REPORT/accuracy.json"
step benchmark 240 "$PYTHON" benchmarks/gpu.py --rows 1024 --classes 93431 360232 --runs 5 --json "$REPORT/benchmark.json"

"$PYTHON" scripts/gpu_report.py "$REPORT"
exit "$failed"
