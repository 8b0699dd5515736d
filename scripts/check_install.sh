#!/usr/bin/env bash
# The ways in which people install the package and use it from CMake, each for real, in a throw-away clone and environment
# whose path holds a space: twice in one clone, moved, editable, by make, build, uv, from a read-only tree, in another project.
#
#   scripts/check_install.sh [environment with torch and requirements/build.txt, default .venv/torch-2.11]
#
# All builds here are for the CPU only: there is no nvcc on their PATH. With ccache they take little (.ci/run).
set -euo pipefail
cd "$(dirname "$0")/.."
ENVIRONMENT=$(realpath "${1:-.venv/torch-2.11}")
WORK="$PWD/build/check install"
rm -rf "$WORK"
mkdir -p "$WORK"

step() { printf -- '-- %3d s  %s\n' "$SECONDS" "$*"; }
run() { "$@" > "$WORK/log" 2>&1 || { tail -n 60 "$WORK/log"; echo "failed: $*"; exit 1; }; }
refused() { # TEXT COMMAND...: the command fails and says TEXT
  local text="$1"; shift
  if "$@" > "$WORK/log" 2>&1; then echo "not refused: $*"; exit 1; fi
  grep -q -e "$text" "$WORK/log" || { tail -n 60 "$WORK/log"; echo "no '$text' from: $*"; exit 1; }
}

# A PATH without nvcc; /usr/local/cuda may well be there, and must not be found.
unset CUDA_HOME CUDACXX TORCHMARGIN_CUDA TORCHMARGIN_BUILD_DIR TORCHMARGIN_LOCAL_VERSION TORCHMARGIN_LIBRARY PYTHONPATH VIRTUAL_ENV
without_nvcc=""
IFS=: read -ra places <<< "$PATH"
for place in "${places[@]}"; do [ -x "$place/nvcc" ] || without_nvcc="$without_nvcc:$place"; done
export PATH="${without_nvcc#:}" PIP_DISABLE_PIP_VERSION_CHECK=1
# Nothing includes by chance what only the precompiled header does. NB: ccache does not know a precompiled header again that
# is made anew where one is, as in the build folders that are kept here.
export TORCHMARGIN_CMAKE_ARGS="${TORCHMARGIN_CMAKE_ARGS:-} -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON"
command -v nvcc && { echo "there still is an nvcc"; exit 1; }

# The clone has its environment where `make` has it: hard links, so that gigabytes take seconds.
CLONE="$WORK/clone"
mkdir "$CLONE"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$CLONE"
git -C "$CLONE" init -q && git -C "$CLONE" add -A
git -C "$CLONE" -c user.name=check -c user.email=check@localhost commit -q -m check
mkdir "$CLONE/.venv"
cp -al "$ENVIRONMENT" "$CLONE/.venv/torch-2.11"
touch "$CLONE/.venv/torch-2.11/.installed"
rm -rf "$CLONE"/.venv/torch-2.11/lib/python3*/site-packages/{torchmargin,_torchmargin_editable,torchmargin-*}
python() { "$CLONE/.venv/torch-2.11/bin/python" "$@"; }
MINOR=$(python -c 'import torch; print("".join(torch.__version__.split(".")[:2]))')

clean() { # the tree holds nothing of ours but what its .gitignore names, and python/ not even that
  [ -z "$(git -C "$CLONE" status --porcelain)" ] || { git -C "$CLONE" status; exit 1; }
  local left
  left=$(git -C "$CLONE" status --porcelain --ignored python | grep -v __pycache__ || true)
  [ -z "$left" ] || { echo "left in the tree: $left"; exit 1; }
}
works() { # [python]: it loads and computes, says what it is, and C++ finds it
  (cd / && "${1:-$CLONE/.venv/torch-2.11/bin/python}" - "+pt${MINOR}cpu") << 'PY' || exit 1
import sys, importlib.metadata, torch, torchmargin
assert importlib.metadata.version("torchmargin").endswith(sys.argv[1]), importlib.metadata.version("torchmargin")
assert torchmargin.config.cuda_architectures() == ()
assert torch.isfinite(torchmargin.ArcFaceLoss(8, 30)(torch.randn(4, 8), torch.arange(4)))
folder = torchmargin.utils.cmake_prefix_path.split(";")[0]
open(folder + "/TorchMargin/TorchMarginConfig.cmake")
PY
  clean
}

cd "$CLONE"
step "pip install ., twice"
run python -m pip install --no-deps .
works
run python -m pip install --no-deps --force-reinstall .
works
step "without build isolation; what it built is said"
run python -m pip install -v --no-deps --force-reinstall --no-build-isolation .
grep -q "torchmargin .* for torch .*: CPU only" "$WORK/log" || { echo "the log does not say what was built"; exit 1; }
works
step "make, in a build folder that is kept"
run make install
grep -q "torchmargin .* for torch .*: CPU only" "$WORK/log" || { echo "make does not say what was built"; exit 1; }
works

step "the clone moves: pip install, make"
cd ..
mv clone "moved clone"
CLONE="$WORK/moved clone"
cd "$CLONE"
run python -m pip install --no-deps --force-reinstall .
works
run make install
works

step "editable, and a wheel beside it"
run python -m pip install --no-deps -e .
works
run python -m pip wheel --no-deps --no-build-isolation -w "$WORK/wheels" .
works
run python -m pip uninstall -y torchmargin
clean
left=$(ls -d .venv/torch-2.11/lib/python3*/site-packages/*torchmargin* 2> /dev/null || true)
[ -z "$left" ] || { echo "left behind: $left"; exit 1; }
PYTHONPATH=python refused "there is no library at" python -c 'import torchmargin'
find python -name __pycache__ -prune -exec rm -r {} +
run python -m pip install --no-deps "$WORK"/wheels/*.whl
works

step "python -m build and uv, which do not see torch in isolation and say so"
run python -m pip install build uv
refused "no-isolation" python -m build --wheel --outdir "$WORK/built"
run python -m build --wheel --no-isolation --outdir "$WORK/built"
ls "$WORK"/built/torchmargin-*+pt"${MINOR}"cpu-*.whl > /dev/null
uv() { python -m uv pip "$@" --python "$CLONE/.venv/torch-2.11/bin/python" --no-deps; }
refused "no-build-isolation" uv install --reinstall .
run uv install --reinstall --no-build-isolation .
works

step "torch of the user's site-packages, seen by an environment with --system-site-packages"
run python -m pip uninstall -y torchmargin
python -c 'import sys, venv; venv.create(sys.argv[1], system_site_packages=True, with_pip=True)' "$WORK/plain"
export PYTHONUSERBASE="$CLONE/.venv/torch-2.11"
run "$WORK/plain/bin/python" -m pip install --no-deps .
works "$WORK/plain/bin/python"
unset PYTHONUSERBASE

step "a tree that is read-only"
tree() { find . \( -path ./.venv -o -path ./build/torch-2.11 \) -prune -o ! -type l -exec chmod "$1" {} +; } # .venv is hard links
tree a-w
lesser=()
[ "$(id -u)" -ne 0 ] || lesser=(setpriv --bounding-set=-dac_override --inh-caps=-dac_override)
if "${lesser[@]}" touch probe 2> /dev/null; then
  rm probe
  echo "not run: this user may write everywhere"
else
  run env TORCHMARGIN_BUILD_DIR=build/torch-2.11 "${lesser[@]}" .venv/torch-2.11/bin/python -m pip install --no-deps --no-build-isolation .
  works
fi
tree u+w

step "a compiler that is named and is not there; a torch that make does not know"
CUDACXX=/none/nvcc refused "CUDACXX names the CUDA compiler '/none/nvcc'" python -m pip wheel --no-deps --no-build-isolation -w "$WORK/wheels" .
CUDA_HOME=/none refused "CUDA_HOME names the CUDA compiler '/none/bin/nvcc'" python -m pip wheel --no-deps --no-build-isolation -w "$WORK/wheels" .
refused "TORCH may be one of: 2.11" make TORCH=1.13

export PATH="$CLONE/.venv/torch-2.11/bin:$PATH" # ninja
TORCH_DIR=$(python -c 'import os, torch; print(os.path.dirname(torch.__file__))')
for way in OFF ON; do
  [ $way = ON ] && step "in a C++17 project by FetchContent" || step "in a C++17 project by add_subdirectory"
  run cmake -G Ninja -S tests/consumer/in_project -B build/in-project-$way -DBY_FETCH_CONTENT=$way -DCMAKE_PREFIX_PATH="$TORCH_DIR" \
    -DCMAKE_BUILD_TYPE=Release ${TORCHMARGIN_CMAKE_ARGS:-}
  run cmake --build build/in-project-$way -j "${MAX_JOBS:-$(nproc)}"
  build/in-project-$way/dispatcher_only
  build/in-project-$way/uses_modules
  run cmake --install build/in-project-$way --prefix "$WORK/prefix-$way"
  [ "$(cd "$WORK/prefix-$way" && find . -type f)" = ./bin/uses_modules ] || { find "$WORK/prefix-$way" -type f; exit 1; }
done
clean

cd "$WORK/.."
rm -rf "$WORK"
step "done"
