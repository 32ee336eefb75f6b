#!/bin/sh
# Compiles the kernels to WebAssembly: sh build.sh [output]. Needs clang-19 and lld-19 (Debian: apt-get install clang-19 lld-19).
# The result is committed, and a test compares it with a fresh build.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../kernels.wasm}
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
cd "$here"
compile() { # file, object, flags
  clang-19 --target=wasm32 -std=c17 -O3 -msimd128 -mrelaxed-simd -mnontrapping-fptoint -ffreestanding -fno-math-errno \
    -fvisibility=hidden -Wall -Wextra -Werror -Wno-pass-failed $3 -c "$1" -o "$objects/$2.o"
}
for file in elementwise rows norms attention gemm; do
  compile $file.c ${file}_f32 -DREAL_F32
  compile $file.c ${file}_f64 -DREAL_F64
done
compile convert.c convert ""
# The stack and constants take the first 64 KiB of the linear memory, which memory.ts leaves free.
wasm-ld-19 --no-entry --import-memory --export-dynamic --stack-first -z stack-size=32768 --strip-all --gc-sections \
  "$objects"/*.o -o "$out"
