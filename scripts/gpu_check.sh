#!/usr/bin/env bash
# What only a GPU can show, in two calls of less than ten minutes each.
#
#   scripts/gpu_check.sh correctness [report folder]     tests, sanitizer, accuracy
#   scripts/gpu_check.sh speed [report folder]           benchmarks, and where the time goes
#   scripts/gpu_check.sh rehearse [report folder]        both on the CPU, as far as there is no GPU in it
#
# Needs torch and nothing else. Each step keeps its log in the folder (default: gpu-report), a failing one does not stop
# the others, and the call ends non-zero then; report.json and report.md say what came of each. A step that had no time
# says so, and is no failure.
#
# The library is TORCHMARGIN_LIBRARY (one that was built elsewhere for this torch), or the installed package's, or is
# built here (cmake, nvcc). The Python package is the installed one, or this tree's with a `_C` that lies in it or can be
# built (g++, Python.h); without one the library's ops are tried alone. GTEST_BINARY names the C++ tests of that build
# (GoogleTest is inside); PYTEST_WHEELS a folder of pytest's wheels where it is not installed: `pip download -d FOLDER
# pytest`; COMPUTE_SANITIZER the tool if it is not on PATH.
set -uo pipefail
cd "$(dirname "$0")/.."
MODE="${1:-}"
REPORT="${2:-gpu-report}"
case "$MODE" in
  correctness | speed | rehearse) ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
PYTHON="${PYTHON:-python3}"
DEVICE=cuda
[ "$MODE" != rehearse ] || DEVICE=cpu
mkdir -p "$REPORT"
STEPS="$REPORT/steps.tsv"
: > "$STEPS"
failed=0

began_all=$(date +%s)
TOTAL="${TOTAL:-560}" # seconds

# step NAME SECONDS COMMAND...: runs, keeps the log, records the result. Nothing runs past the total. A step whose log
# matches $REFUSED is one that this machine does not allow: it says nothing about the library.
step() {
  local name="$1" limit="$2"; shift 2
  local began left status word
  began=$(date +%s)
  left=$((TOTAL - (began - began_all)))
  if [ "$left" -lt 5 ]; then
    skip "$name" "no time left"
    return 0
  fi
  timeout -k 5 "$((limit < left ? limit : left))" "$@" > "$REPORT/$name.log" 2>&1
  status=$?
  word="passed"
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    word="no time: stopped"
  elif [ "$status" -ne 0 ] && [ -n "${REFUSED:-}" ] && grep -qiE "$REFUSED" "$REPORT/$name.log"; then
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
finish() {
  "$PYTHON" scripts/gpu_report.py "$REPORT"
  exit "$failed"
}

# CUDA that came with pip lies beside torch, where only torch looks for it.
TORCH_DIR=$("$PYTHON" -W ignore -c 'import os, torch; print(os.path.dirname(torch.__file__))') || exit 1
CUDA_LIBRARIES=$(find "$(dirname "$TORCH_DIR")/nvidia" -type d -name lib 2> /dev/null | paste -sd:)
export LD_LIBRARY_PATH="$TORCH_DIR/lib${CUDA_LIBRARIES:+:$CUDA_LIBRARIES}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

if [ "$DEVICE" = cuda ]; then
  "$PYTHON" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "there is no GPU here"; exit 1; }
fi

# The package: installed, or this tree's with a _C for this Python.
build_library() {
  local architecture
  architecture=$("$PYTHON" -W ignore -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || return 1
  cmake -S . -B build/gpu-check -DTORCHMARGIN_BUILD_TESTS=ON -DTORCHMARGIN_CUDA=ON -DTORCH_CUDA_ARCH_LIST="$architecture" \
    -DTORCHMARGIN_TORCH_DIR="$TORCH_DIR" && cmake --build build/gpu-check -j "$(nproc)" \
    --target torchmargin torchmargin_tests
}
build_extension() {
  local include suffix pybind
  pybind=$("$PYTHON" -c 'import pybind11; print(pybind11.get_include())' 2> /dev/null) || pybind="$TORCH_DIR/include"
  include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  g++ -std=c++20 -O1 -shared -fPIC -fvisibility=hidden -Icsrc -Icsrc/include -I"$include" -I"$pybind" \
    csrc/bindings/module.cpp -o "python/torchmargin/_C$suffix" "$TORCHMARGIN_LIBRARY" -Wl,--allow-shlib-undefined
}
package=installed
prepare_package() {
  "$PYTHON" -W ignore -c 'import torchmargin' && return 0
  if [ -z "${TORCHMARGIN_LIBRARY:-}" ]; then
    [ "$DEVICE" = cuda ] && build_library || return 1
    export TORCHMARGIN_LIBRARY="$PWD/build/gpu-check/libtorchmargin.so"
    GTEST_BINARY="${GTEST_BINARY:-$PWD/build/gpu-check/tests/cpp/torchmargin_tests}"
  fi
  export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
  "$PYTHON" -W ignore -c 'import torchmargin' || { build_extension && "$PYTHON" -W ignore -c 'import torchmargin'; }
}
prepare_package > "$REPORT/package.log" 2>&1 || package=none
LIBRARY="${TORCHMARGIN_LIBRARY:-$("$PYTHON" -W ignore -c 'import torchmargin; print(torchmargin.__path__[0] + "/lib/libtorchmargin.so")' 2> /dev/null)}"
if [ ! -f "$LIBRARY" ]; then
  cat "$REPORT/package.log"
  echo "there is no library to check"
  exit 1
fi
export LD_LIBRARY_PATH="$(dirname "$LIBRARY"):$LD_LIBRARY_PATH"
if [ "$package" = none ]; then
  skip package "no torchmargin._C for this Python, see package.log: the ops are tried alone"
fi

step versions 60 "$PYTHON" -W ignore - "$LIBRARY" "$DEVICE" <<'PY'
import json, platform, sys, torch
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
if sys.argv[2] == "cuda":
    facts |= {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    facts |= {"processors": torch.cuda.get_device_properties(0).multi_processor_count}
try:
    import torchmargin
    facts |= {"torchmargin": torchmargin.__version__, "architectures": torchmargin.config.cuda_architectures()}
except ImportError:
    torch.ops.load_library(sys.argv[1])
print(json.dumps(facts))
PY

correctness() {
  step ops 90 "$PYTHON" -W ignore scripts/gpu_ops.py "$LIBRARY" --device "$DEVICE"
  if [ -x "${GTEST_BINARY:-}" ]; then
    step gtest 90 "$GTEST_BINARY" --gtest_filter='Cuda.*'
  else
    skip gtest "GTEST_BINARY names no program"
  fi
  if [ -d "${PYTEST_WHEELS:-}" ]; then
    PYTHONPATH="$(find "$PYTEST_WHEELS" -name '*.whl' | paste -sd:)${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
  fi
  if [ "$package" = none ]; then
    skip pytest "there is no package"
  elif ! "$PYTHON" -c 'import pytest' 2> /dev/null; then
    skip pytest "there is no pytest"
  else
    # Its plugins, where there are any, are not this check's.
    step pytest 200 env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 TORCHMARGIN_TEST_DEVICE="$DEVICE" \
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/python/test_cuda.py
    if "$PYTHON" -W ignore -c 'import matplotlib, PIL, sklearn, torchvision, tqdm' 2> /dev/null; then
      step recipe 150 env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
        "$PYTHON" -m pytest -q -p no:cacheprovider tests/python/recipes/test_face_gpu.py
    else
      skip recipe "its packages are not there (requirements/face.txt)"
    fi
  fi
  if [ "$package" = none ]; then
    skip accuracy "there is no package"
  else
    step accuracy 60 "$PYTHON" -W ignore benchmarks/accuracy.py --device "$DEVICE" \
      $([ "$DEVICE" = cuda ] || echo --classes 300 --rows 32) --json "$REPORT/accuracy.json"
  fi
  local sanitizer="${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}" tool
  for tool in memcheck racecheck synccheck initcheck; do
    if [ "$DEVICE" = cpu ]; then
      skip "$tool" "there is no GPU in a rehearsal"
    elif [ ! -x "$sanitizer" ]; then
      skip "$tool" "there is no compute-sanitizer"
    elif [ ! -x "${GTEST_BINARY:-}" ]; then
      skip "$tool" "GTEST_BINARY names no program"
    else # each tensor an allocation of its own: an overrun inside one of torch's blocks is legal to the tool
      REFUSED="unable to attach|not permitted|not supported|debugger" step "$tool" 35 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool "$tool" --error-exitcode 9 "$GTEST_BINARY" --gtest_filter='Cuda.*'
    fi
  done
}

speed() {
  if [ "$package" = none ]; then
    skip benchmark "there is no package"
    return 0
  fi
  local gpu=("$PYTHON" -W ignore benchmarks/gpu.py --device "$DEVICE")
  step benchmark 200 "${gpu[@]}" --rows 1024 --classes 360232 --runs 7 --json "$REPORT/benchmark.json"
  step details 150 "${gpu[@]}" --details --runs 5 --json "$REPORT/details.json"
  step benchmark_sizes 150 "${gpu[@]}" --rows 256 512 4096 --classes 93431 --cases float32:float16 --runs 5 \
    --json "$REPORT/benchmark_sizes.json"
}

[ "$MODE" = speed ] || correctness
[ "$MODE" = correctness ] || speed
finish
