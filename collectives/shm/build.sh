#!/bin/sh
# Compiles reduce.c to WebAssembly: sh build.sh [output]. Needs clang-19 and lld-19 (Debian: apt-get install clang-19 lld-19).
# The result is committed, and a test compares it with a fresh build.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/reduce.wasm}
# A frame on the C stack is an error: that memory belongs to tensors.
clang-19 --target=wasm32 -std=c17 -O2 -fno-unroll-loops -fno-vectorize -fno-slp-vectorize -msimd128 -mbulk-memory -matomics \
  -ffp-contract=off -fno-builtin -nostdlib -Wall -Werror -Wframe-larger-than=0 \
  -Wl,--no-entry -Wl,--import-memory -Wl,--strip-all -o "$out" "$here/reduce.c"
