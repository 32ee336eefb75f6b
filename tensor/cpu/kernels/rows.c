// Kernels that move and combine rows. Row numbers come from the caller's data: a kernel that meets one at or above its limit
// stops and returns the place where it stood, else -1.

#include "real.h"

// out[rows[i]] += x[i], in the order of i
EXPORT int NAME(scatter_add_rows)(
  const real *restrict x, const int *restrict rows, real *restrict out, size_t n, size_t D, int limit
) {
  for (size_t i = 0; i < n; i++) {
    int row = rows[i];
    if (row < 0) continue;
    if (row >= limit) return (int)i;
    const real *from = x + i * D;
    real *to = out + (size_t)row * D;
    for (size_t d = 0; d < D; d++) to[d] += from[d];
  }
  return -1;
}

// out[n] = sum_k weights[n,k] y[slots[n,k]], or without weights sum_k y[slots[n,k]]; with `add`, out[n] += that sum
EXPORT int NAME(combine_rows)(
  const real *restrict y, const int *restrict slots, const real *restrict weights, real *restrict out,
  size_t N, size_t K, size_t D, int limit, int add
) {
  for (size_t n = 0; n < N; n++) {
    real *o = out + n * D;
    const int *places = slots + n * K;
    for (size_t k = 0; k < K; k++) if (places[k] >= limit) return (int)(n * K + k);
    if (add) {
      for (size_t d = 0; d < D; d += LANES) {
        vec sum = { 0 };
        for (size_t k = 0; k < K; k++) {
          if (places[k] < 0) continue;
          sum += (weights ? weights[n * K + k] : 1) * load(y + (size_t)places[k] * D + d, D - d, 0);
        }
        store(o + d, D - d, load(o + d, D - d, 0) + sum);
      }
      continue;
    }
    int first = 1; // the first slot writes, the others add: no pass of zeros
    for (size_t k = 0; k < K; k++) {
      if (places[k] < 0) continue;
      const real *from = y + (size_t)places[k] * D;
      real w = weights ? weights[n * K + k] : 1;
      if (first) for (size_t d = 0; d < D; d++) o[d] = w * from[d];
      else for (size_t d = 0; d < D; d++) o[d] += w * from[d];
      first = 0;
    }
    if (first) for (size_t d = 0; d < D; d++) o[d] = 0;
  }
  return -1;
}

// dy[slots[n,k]] = weights[n,k] d_out[n] and d_weights[n,k] = d_out[n] . y[slots[n,k]]. Rows of dy that no slot names
// become 0; that pass is left out when as many slots as rows are named.
EXPORT int NAME(combine_rows_backward)(
  const real *restrict d_out, const real *restrict y, const int *restrict slots, const real *restrict weights,
  real *restrict dy, real *restrict d_weights, size_t N, size_t K, size_t D, int limit
) {
  size_t named = 0;
  for (size_t i = 0; i < N * K; i++) {
    if (slots[i] >= limit) return (int)i;
    named += slots[i] >= 0;
  }
  if (named < (size_t)limit) for (size_t i = 0; i < limit * D; i++) dy[i] = 0;
  for (size_t n = 0; n < N; n++) {
    const real *d = d_out + n * D;
    for (size_t k = 0; k < K; k++) {
      int slot = slots[n * K + k];
      if (slot < 0) {
        d_weights[n * K + k] = 0;
        continue;
      }
      real w = weights[n * K + k];
      real *to = dy + (size_t)slot * D;
      for (size_t i = 0; i < D; i++) to[i] = w * d[i];
      d_weights[n * K + k] = dot(d, y + (size_t)slot * D, D);
    }
  }
  return -1;
}
