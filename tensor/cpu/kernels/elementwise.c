// Element-wise kernels and sums.

#include "real.h"

EXPORT void NAME(fill)(real *x, real value, size_t n) {
  for (size_t i = 0; i < n; i++) x[i] = value;
}

// out may be x or y
EXPORT void NAME(add)(const real *x, const real *y, real *out, size_t n) {
  for (size_t i = 0; i < n; i++) out[i] = x[i] + y[i];
}

// y += alpha x
EXPORT void NAME(axpy)(real alpha, const real *x, real *y, size_t n) {
  for (size_t i = 0; i < n; i++) y[i] += alpha * x[i];
}

EXPORT void NAME(scale)(real *x, real alpha, size_t n) {
  for (size_t i = 0; i < n; i++) x[i] *= alpha;
}

// Sums are taken in double, whatever the elements are.
EXPORT void NAME(sum)(const real *x, double *out, size_t n) {
  SUMS_MAY_REORDER
  double sum = 0;
  UNROLL4
  for (size_t i = 0; i < n; i++) sum += x[i];
  *out += sum;
}

EXPORT void NAME(sum_squares)(const real *x, double *out, size_t n) {
  SUMS_MAY_REORDER
  double sum = 0;
  UNROLL4
  for (size_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
  *out += sum;
}

EXPORT void NAME(relu)(const real *restrict x, real *restrict out, size_t n) {
  for (size_t i = 0; i < n; i++) out[i] = x[i] < 0 ? 0 : x[i];
}

EXPORT void NAME(relu_backward)(
  const real *restrict d_out, const real *restrict x, real *restrict dx, size_t n
) {
  for (size_t i = 0; i < n; i++) dx[i] = x[i] > 0 ? d_out[i] : 0;
}

// gelu(x) = x (1 + tanh(u)) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3); and (1 + tanh(u)) / 2 is sigmoid(2u).
#define GELU_SCALE constant(1.5957691216057308) // 2 sqrt(2/pi)
#define GELU_CUBE constant(0.044715)

EXPORT void NAME(gelu)(const real *restrict x, real *restrict out, size_t n) {
  for (size_t i = 0; i < n; i += LANES) {
    vec v = load(x + i, n - i, 0);
    store(out + i, n - i, v * sigmoid_(GELU_SCALE * (v + GELU_CUBE * v * v * v)));
  }
}

EXPORT void NAME(gelu_backward)(
  const real *restrict d_out, const real *restrict x, real *restrict dx, size_t n
) {
  for (size_t i = 0; i < n; i += LANES) {
    vec d = load(d_out + i, n - i, 0), v = load(x + i, n - i, 0);
    vec s = sigmoid_(GELU_SCALE * (v + GELU_CUBE * v * v * v));
    vec one = constant(1), slope = GELU_SCALE * (one + constant(3 * 0.044715) * v * v); // d 2u / d x
    store(dx + i, n - i, d * (s + v * s * (one - s) * slope));
  }
}

// x (rows, 2F) holds gate and up side by side; out (rows, F) = silu(gate) up, silu(g) = g sigmoid(g)
EXPORT void NAME(swiglu)(const real *restrict x, real *restrict out, size_t rows, size_t F) {
  for (size_t r = 0; r < rows; r++) {
    const real *gate = x + r * 2 * F, *up = gate + F;
    real *o = out + r * F;
    for (size_t f = 0; f < F; f += LANES) {
      vec g = load(gate + f, F - f, 0), u = load(up + f, F - f, 0);
      store(o + f, F - f, g * sigmoid_(g) * u);
    }
  }
}

EXPORT void NAME(swiglu_backward)(
  const real *restrict d_out, const real *restrict x, real *restrict dx, size_t rows, size_t F
) {
  for (size_t r = 0; r < rows; r++) {
    const real *gate = x + r * 2 * F, *up = gate + F;
    real *d_gate = dx + r * 2 * F, *d_up = d_gate + F;
    for (size_t f = 0; f < F; f += LANES) {
      vec d = load(d_out + r * F + f, F - f, 0);
      vec g = load(gate + f, F - f, 0), u = load(up + f, F - f, 0), s = sigmoid_(g);
      vec silu = g * s;
      store(d_gate + f, F - f, d * u * (s + silu * (constant(1) - s)));
      store(d_up + f, F - f, d * silu);
    }
  }
}

// One step of AdamW. `size` is lr / (1 - beta1^t) and `root` 1 / sqrt(1 - beta2^t): the corrections of the moments, which
// the host computes in double.
EXPORT void NAME(adamw)(
  real *restrict p, const real *restrict g, real *restrict m, real *restrict v, size_t n,
  real beta1, real beta2, real size, real root, real eps, real decay, real grad_scale
) {
  for (size_t i = 0; i < n; i++) {
    real grad = g[i] * grad_scale;
    real m1 = beta1 * m[i] + (1 - beta1) * grad;
    real m2 = beta2 * v[i] + (1 - beta2) * grad * grad;
    m[i] = m1;
    v[i] = m2;
    p[i] -= size * m1 / (sqrt_(m2) * root + eps) + decay * p[i];
  }
}
