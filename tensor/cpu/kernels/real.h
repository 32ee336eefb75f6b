// What every kernel file shares: the element type, names, and the exponential. Each .c file is compiled twice, with
// REAL_F32 and with REAL_F64; NAME(add) becomes add_f32 or add_f64. There is no C library underneath.
//
// Loops are written plainly and left to the compiler to vectorise (four floats or two doubles at a time). Sums say
// SUMS_MAY_REORDER, or the compiler would have to add one element after the other. Whatever it chooses is fixed in the
// compiled file, so equal inputs give equal bits.

#pragma once

#include <wasm_simd128.h>

#ifdef REAL_F32
typedef float real;
typedef unsigned integer; // as wide as a real; unsigned, because shifting its top bits out is meant
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#define NAME(name) name##_f32
#define LANES 4
#define MAX(a, b) (vec)wasm_f32x4_pmax((v128_t)(a), (v128_t)(b))
#else
typedef double real;
typedef unsigned long long integer;
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023
#define NAME(name) name##_f64
#define LANES 2
#define MAX(a, b) (vec)wasm_f64x2_pmax((v128_t)(a), (v128_t)(b))
#endif

typedef unsigned long size_t;
typedef real vec __attribute__((vector_size(16), aligned(sizeof(real)))); // may lie anywhere

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define SUMS_MAY_REORDER _Pragma("clang fp reassociate(on)")
#define UNROLL4 _Pragma("clang loop vectorize(enable) interleave_count(4)")

// The host's Math.log: kernels need one logarithm per row.
__attribute__((import_module("env"), import_name("log"))) double host_log(double x);

INLINE real sqrt_(real x) {
  return sizeof(real) == 4 ? __builtin_sqrtf(x) : __builtin_sqrt(x);
}

// exp(x) to about 1 ulp, without branches so that loops around it vectorise: x = n ln2 + r with |r| <= ln2 / 2,
// exp(x) = 2^n exp(r), exp(r) by a polynomial. ln2 is split in two so that n ln2 loses no bits. Adding 1.5 times the
// power of two at which a real's unit is 1 rounds to a whole number n and leaves it in the low bits. x is held where n
// has a place in an exponent: at the lower end, about ln of the smallest normal number, exp(x) becomes 0, at the upper
// infinity. NaN stays NaN.
INLINE real exp_(real x) {
  union { real r; integer i; } shifted, power;
#ifdef REAL_F32
  const real lowest = -87.4f, highest = 89.0f, shift = 12582912.0f, log2e = 1.44269504f;
  const real ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
#else
  const real lowest = -708.5, highest = 710.0, shift = 6755399441055744.0, log2e = 1.4426950408889634;
  const real ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
#endif
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  shifted.r = x * log2e + shift;
  real n = shifted.r - shift;
  real r = (x - n * ln2_high) - n * ln2_low;
#ifdef REAL_F32
  real p = 1.9875691500e-4f; // minimax, from Cephes
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
#else
  real p = 1.0 / 6227020800.0; // Taylor's series to r^13 / 13!: what is left out is below 2^-57
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
#endif
  p = p * r * r + r + 1;
  // 2^n as 2 * 2^(n - 1), because the highest 2^n is no real itself; at the lowest n, the bits of 2^(n - 1) are those of 0
  power.i = (shifted.i + EXPONENT_BIAS - 1) << MANTISSA_BITS;
  return p * power.r * 2;
}

INLINE real sigmoid_(real x) {
  return 1 / (1 + exp_(-x));
}

// max_i x[i], or -infinity if there is none.
INLINE real row_max(const real *x, size_t n) {
  real max = -(real)__builtin_inf();
  size_t i = 0;
  if (n >= 2 * LANES) {
    vec a = *(const vec *)x, b = *(const vec *)(x + LANES);
    for (i = 2 * LANES; i + 2 * LANES <= n; i += 2 * LANES) {
      vec c = *(const vec *)(x + i), d = *(const vec *)(x + i + LANES);
      a = MAX(a, c);
      b = MAX(b, d);
    }
    a = MAX(a, b);
    for (int lane = 0; lane < LANES; lane++) max = a[lane] > max ? a[lane] : max;
  }
  for (; i < n; i++) max = x[i] > max ? x[i] : max;
  return max;
}

// sum_i x[i] y[i]
INLINE real dot(const real *x, const real *y, size_t n) {
  SUMS_MAY_REORDER
  real sum = 0;
  UNROLL4
  for (size_t i = 0; i < n; i++) sum += x[i] * y[i];
  return sum;
}
