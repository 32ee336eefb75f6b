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
#define NAME(name) name##_f32
#define LANES 4
#define MAX(a, b) (vec)wasm_f32x4_pmax((v128_t)(a), (v128_t)(b))
#else
typedef double real;
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
// exp(x) = 2^n exp(r), exp(r) by a polynomial. ln2 is split in two so that n ln2 loses no bits. Results below the
// smallest normal number are 0, results too large are infinity, NaN stays NaN.
INLINE real exp_(real x) {
#ifdef REAL_F32
  const real lowest = -87.33654f, highest = 88.72283f;
  const real ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  real clamped = x < lowest ? lowest : x > highest ? highest : x;
  real n = __builtin_rintf(clamped * 1.44269504f);
  real r = (clamped - n * ln2_high) - n * ln2_low;
  real p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: 2^128 is not a float, but 2^127 * 2 is. NaN becomes a harmless integer.
  int whole = (int)(n == n ? n : 0.0f), half = whole >> 1;
  union { int i; float f; } a = { (half + 127) << 23 }, b = { (whole - half + 127) << 23 };
#else
  const real lowest = -708.39641853226408, highest = 709.78271289338397;
  const real ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  real clamped = x < lowest ? lowest : x > highest ? highest : x;
  real n = __builtin_rint(clamped * 1.4426950408889634);
  real r = (clamped - n * ln2_high) - n * ln2_low;
  real p = 1.0 / 6227020800.0; // Taylor's series; |r| <= 0.35, so the first term left out is below 2^-56
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
  p = p * r * r + r + 1.0;
  int whole = (int)(n == n ? n : 0.0), half = whole >> 1;
  union { long long i; double f; } a = { (half + 1023LL) << 52 }, b = { (whole - half + 1023LL) << 52 };
#endif
  real y = p * a.f * b.f;
  y = x < lowest ? (real)0 : y;
  y = x > highest ? (real)__builtin_inf() : y;
  return y;
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
