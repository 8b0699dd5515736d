#!/usr/bin/env bash
# What set-up and build need of the machine, said before anything is downloaded.
#
#   scripts/check_tools.sh <python>
set -uo pipefail
PYTHON="$1"
missing=0
need() { printf 'torchmargin needs %s\n' "$*" >&2; missing=1; }

if ! command -v "$PYTHON" > /dev/null; then
  need "Python 3.10 or newer; there is no $PYTHON"
elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  need "Python 3.10 or newer; $PYTHON is $("$PYTHON" -V 2>&1)"
elif ! "$PYTHON" -c 'import ensurepip, venv' 2> /dev/null; then
  need "Python's venv and ensurepip (Debian: apt install python3-venv)"
fi

if ! command -v cmake > /dev/null; then
  need "CMake 3.18 or newer (Debian: apt install cmake)"
elif [ "$(printf '3.18\n%s\n' "$(cmake --version | sed -n '1s/[^0-9]*//p')" | sort -V | head -n 1)" != 3.18 ]; then
  need "CMake 3.18 or newer; there is $(cmake --version | head -n 1)"
fi

# The compiler that CMake takes: $CXX, else the first of these.
compiler="${CXX:-}"
for name in c++ g++ clang++; do
  [ -n "$compiler" ] || ! command -v "$name" > /dev/null || compiler="$name"
done
if [ -z "$compiler" ]; then
  need "a C++20 compiler: g++ 11 or clang 14, or newer (Debian: apt install g++)"
elif ! printf '#include <concepts>\n#if __cplusplus < 202002L\n#error C++20\n#endif\n' |
  $compiler -std=c++20 -x c++ -fsyntax-only - 2> /dev/null; then
  need "a C++20 compiler: g++ 11 or clang 14, or newer; $compiler is $($compiler --version 2>&1 | head -n 1)"
fi

free=$(df -Pm . | awk 'NR == 2 { print $4 }')
[ "${free:-99999}" -ge 7400 ] || printf 'torchmargin: only %s MB are free here; the environment takes 5.7 GB and the build 1.2 GB\n' "$free" >&2
exit "$missing"
