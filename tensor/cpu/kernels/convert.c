// Kernels without arithmetic: gathering rows of any element type and converting between types. Compiled once.

#define REAL_F32
#include "real.h"

typedef unsigned char byte;
typedef unsigned short half;
typedef unsigned int chunk __attribute__((vector_size(16), aligned(1)));

// out[i] = x[rows[i]] for rows of `bytes` bytes; a negative index writes zeros. Returns the first i whose row is not below
// the limit, or -1.
EXPORT int gather_rows(
  const byte *restrict x, const int *restrict rows, byte *restrict out, size_t n, size_t bytes, int limit
) {
  const chunk zero = { 0 };
  for (size_t i = 0; i < n; i++) {
    int row = rows[i];
    if (row >= limit) return (int)i;
    const byte *from = x + (size_t)(row < 0 ? 0 : row) * bytes;
    byte *to = out + i * bytes;
    size_t b = 0;
    if (row < 0) {
      for (; b + 16 <= bytes; b += 16) *(chunk *)(to + b) = zero;
      for (; b < bytes; b++) to[b] = 0;
    } else {
      for (; b + 16 <= bytes; b += 16) *(chunk *)(to + b) = *(const chunk *)(from + b);
      for (; b < bytes; b++) to[b] = from[b];
    }
  }
  return -1;
}

EXPORT void f32_to_f64(const float *restrict x, double *restrict out, size_t n) {
  for (size_t i = 0; i < n; i++) out[i] = x[i];
}

EXPORT void f64_to_f32(const double *restrict x, float *restrict out, size_t n) {
  for (size_t i = 0; i < n; i++) out[i] = (float)x[i];
}

// A bfloat16 is the upper half of a float.
EXPORT void bf16_to_f32(const half *restrict x, unsigned *restrict out, size_t n) {
  for (size_t i = 0; i < n; i++) out[i] = (unsigned)x[i] << 16;
}

// To nearest, ties to even; a NaN stays one.
EXPORT void f32_to_bf16(const unsigned *restrict x, half *restrict out, size_t n) {
  for (size_t i = 0; i < n; i++) {
    unsigned b = x[i];
    unsigned rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    out[i] = (half)((b & 0x7fffffff) > 0x7f800000 ? (b >> 16) | 0x40 : rounded);
  }
}
