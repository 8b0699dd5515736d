#!/usr/bin/env bash
# The library as a C++ project has it, without Python: built from source against LibTorch's files alone, installed with cmake,
# moved, found by a program outside the tree; trained with under AddressSanitizer.
#
#   scripts/check_cpp_package.sh <folder of LibTorch> [work folder]
set -euo pipefail
cd "$(dirname "$0")/.."
LIBTORCH=$(realpath "$1")
WORK="${2:-build/cpp package}" # with a space, which paths may have
mkdir -p "$WORK"
WORK=$(realpath "$WORK")
BUILD="$WORK build" # beside the other builds of this tree: ccache then knows its files
rm -rf "$BUILD" "$WORK/libtorch" "$WORK/prefix" "$WORK/moved" "$WORK/programs" "$WORK/examples" "$WORK/wrong"

# LibTorch's own files, and a PATH without any Python.
mkdir -p "$WORK/libtorch/torch"
BIN=$(mktemp -d) # without a space: make cannot be run from a path with one
trap 'rm -rf "$BIN"' EXIT
for part in lib include share; do ln -s "$LIBTORCH/$part" "$WORK/libtorch/torch/$part"; done
[ -d "$LIBTORCH/../nvidia" ] && ln -s "$(realpath "$LIBTORCH/../nvidia")" "$WORK/libtorch/nvidia"
for folder in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
  for program in "$folder"/*; do
    case "$(basename "$program")" in
      python* | pip* | ninja) ;;
      *) ln -sf "$program" "$BIN/" ;;
    esac
  done
done
export PATH="$BIN"
unset PYTHONPATH VIRTUAL_ENV
command -v python3 && { echo "there still is a Python"; exit 1; }

step() { printf -- '-- %s\n' "$*"; }
build() { # FOLDER [--target NAME]
  cmake --build "$1" -j "${MAX_JOBS:-$(nproc)}" "${@:2}" > "$1/build.log" 2>&1 || { tail -n 40 "$1/build.log"; exit 1; }
}

step "source build and cmake --install"
cmake -S . -B "$BUILD" -DCMAKE_PREFIX_PATH="$WORK/libtorch/torch" -DTORCHMARGIN_CUDA="${TORCHMARGIN_CUDA:-OFF}" \
  ${TORCHMARGIN_CMAKE_ARGS:-} > "$WORK/configure.log" || { cat "$WORK/configure.log"; exit 1; }
build "$BUILD"
cmake --install "$BUILD" --prefix "$WORK/prefix" > /dev/null
mv "$WORK/prefix" "$WORK/moved" # a relocated installation is found just as well
ldd "$WORK/moved/lib/libtorchmargin.so" | grep -i python && { echo "the library links Python"; exit 1; }

PACKAGES="$WORK/moved;$WORK/libtorch/torch"
step "a program outside the tree"
cmake -S tests/consumer -B "$WORK/programs" -DCMAKE_PREFIX_PATH="$PACKAGES" -DCMAKE_BUILD_TYPE=Debug > "$WORK/programs.log" ||
  { cat "$WORK/programs.log"; exit 1; }
build "$WORK/programs" --target dispatcher_only # the others are tests/python/test_cpp_package.py's
"$WORK/programs/dispatcher_only"

step "an example"
cmake -S examples/cpp -B "$WORK/examples" -DCMAKE_PREFIX_PATH="$PACKAGES" -DCMAKE_BUILD_TYPE=Debug \
  -DCMAKE_CXX_FLAGS="-fsanitize=address -fno-omit-frame-pointer" > "$WORK/examples.log" || { cat "$WORK/examples.log"; exit 1; }
build "$WORK/examples" --target train_digits
# Under AddressSanitizer, leaks included.
"$WORK/examples/train_digits" --data examples/data/digits.csv --loss arcface --epochs 2 --output "$WORK/digits.pt" 2> "$WORK/train.log" ||
  { tail -c 4000 "$WORK/train.log"; exit 1; }

step "a request that does not fit is refused"
if cmake -S tests/consumer -B "$WORK/wrong" -DCMAKE_PREFIX_PATH="$WORK/moved" > "$WORK/wrong.log" 2>&1; then
  echo "a missing LibTorch went unnoticed"; exit 1
fi
tr -s '\n ' ' ' < "$WORK/wrong.log" | grep -q "TorchMargin needs LibTorch" || { cat "$WORK/wrong.log"; exit 1; }
step "done"
