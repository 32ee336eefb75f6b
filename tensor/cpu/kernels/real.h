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
#define MIN(a, b) (vec)wasm_f32x4_pmin((v128_t)(a), (v128_t)(b))
#define MADD(a, b, c) (vec)wasm_f32x4_relaxed_madd((v128_t)(a), (v128_t)(b), (v128_t)(c)) // a b + c
#else
typedef double real;
typedef unsigned long long integer;
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023
#define NAME(name) name##_f64
#define LANES 2
#define MAX(a, b) (vec)wasm_f64x2_pmax((v128_t)(a), (v128_t)(b))
#define MIN(a, b) (vec)wasm_f64x2_pmin((v128_t)(a), (v128_t)(b))
#define MADD(a, b, c) (vec)wasm_f64x2_relaxed_madd((v128_t)(a), (v128_t)(b), (v128_t)(c))
#endif

typedef unsigned long size_t;
typedef real vec __attribute__((vector_size(16), aligned(sizeof(real)))); // may lie anywhere
typedef integer integers __attribute__((vector_size(16)));

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define SUMS_MAY_REORDER _Pragma("clang fp reassociate(on)")
#define UNROLL4 _Pragma("clang loop vectorize(enable) interleave_count(4)")

// The host's Math.log: kernels need one logarithm per row.
__attribute__((import_module("env"), import_name("log"))) double host_log(double x);

INLINE real sqrt_(real x) {
  return sizeof(real) == 4 ? __builtin_sqrtf(x) : __builtin_sqrt(x);
}

// Vectors of LANES reals at the end of a row that is no multiple of LANES: lanes beyond `left` are read as `missing` and
// not written.
INLINE vec load(const real *x, size_t left, real missing) {
  if (left >= LANES) return *(const vec *)x;
  vec v;
  for (size_t lane = 0; lane < LANES; lane++) v[lane] = lane < left ? x[lane] : missing;
  return v;
}

INLINE void store(real *x, size_t left, vec v) {
  if (left >= LANES) *(vec *)x = v;
  else for (size_t lane = 0; lane < left; lane++) x[lane] = v[lane];
}

// A constant that the compiler must keep in a register: V8 builds a vector constant anew, in three instructions, wherever
// one is used.
INLINE vec constant(real value) {
  __asm__("" : "+r"(value));
  return value - (vec){ 0 };
}

// exp(x) to about 1 ulp: x = n ln2 + r with |r| <= ln2 / 2, exp(x) = 2^n exp(r), exp(r) by a polynomial. ln2 is split in two
// so that n ln2 loses no bits. Adding 1.5 times the power of two at which a real's unit is 1 rounds to a whole number n and
// leaves it in the low bits. x is held where n has a place in an exponent: at the lower end, about ln of the smallest normal
// number, exp(x) becomes 0, at the upper infinity. NaN stays NaN.
INLINE vec exp_(vec x) {
#ifdef REAL_F32
  x = MAX(x, constant(-87.4f));
  x = MIN(x, constant(89.0f));
  vec shift = constant(12582912.0f);
  vec shifted = MADD(x, constant(1.44269504f), shift);
  vec n = shifted - shift;
  vec r = MADD(n, constant(-0.693359375f), x);
  r = MADD(n, constant(2.12194440e-4f), r);
  vec p = MADD(constant(1.9875691500e-4f), r, constant(1.3981999507e-3f)); // minimax, from Cephes
  p = MADD(p, r, constant(8.3334519073e-3f));
  p = MADD(p, r, constant(4.1665795894e-2f));
  p = MADD(p, r, constant(1.6666665459e-1f));
  p = MADD(p, r, constant(5.0000001201e-1f));
#else
  x = MAX(x, constant(-708.5));
  x = MIN(x, constant(710.0));
  vec shift = constant(6755399441055744.0);
  vec shifted = MADD(x, constant(1.4426950408889634), shift);
  vec n = shifted - shift;
  vec r = MADD(n, constant(-6.93145751953125e-1), x);
  r = MADD(n, constant(-1.42860682030941723212e-6), r);
  vec p = MADD(constant(1.0 / 6227020800.0), r, constant(1.0 / 479001600.0)); // Taylor's series to r^13 / 13!:
  p = MADD(p, r, constant(1.0 / 39916800.0)); // what is left out is below 2^-57
  p = MADD(p, r, constant(1.0 / 3628800.0));
  p = MADD(p, r, constant(1.0 / 362880.0));
  p = MADD(p, r, constant(1.0 / 40320.0));
  p = MADD(p, r, constant(1.0 / 5040.0));
  p = MADD(p, r, constant(1.0 / 720.0));
  p = MADD(p, r, constant(1.0 / 120.0));
  p = MADD(p, r, constant(1.0 / 24.0));
  p = MADD(p, r, constant(1.0 / 6.0));
  p = MADD(p, r, constant(0.5));
#endif
  vec one = constant(1);
  p = MADD(p, r, one);
  p = MADD(p, r, one);
  // 2^n as 2 * 2^(n - 1), because the highest 2^n is no real itself; at the lowest n, the bits of 2^(n - 1) are those of 0
  vec power = (vec)(((integers)shifted + (EXPONENT_BIAS - 1)) << MANTISSA_BITS);
  return (p + p) * power;
}

INLINE vec sigmoid_(vec x) {
  vec one = constant(1);
  return one / (one + exp_(-x));
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

// out[i] = exp(x[i] - max); returns their sum. out may be x.
INLINE real exponentials(const real *x, real *out, size_t n, real max) {
  vec sum = { 0 };
  for (size_t i = 0; i < n; i += LANES) {
    vec e = exp_(load(x + i, n - i, -(real)__builtin_inf()) - max);
    store(out + i, n - i, e);
    sum += e;
  }
  real total = 0;
  for (int lane = 0; lane < LANES; lane++) total += sum[lane];
  return total;
}
