// The parts of causal attention between its matrix products, on one tile: `rows` queries from position `first_query` of their
// sequence against `columns` keys from `first_key`. S (rows, columns) holds scaled scores q . k / sqrt(C). The online
// softmax (Milakov and Gimelshein; FlashAttention) sees the keys tile by tile, so a row of scores is never whole in memory.

#include "real.h"

// How many keys of the tile the query of this row may see.
INLINE size_t visible(size_t row, size_t columns, int first_query, int first_key) {
  int n = first_query + (int)row - first_key + 1;
  return n < 0 ? 0 : (size_t)n < columns ? (size_t)n : columns;
}

// S becomes exp(S - max), hidden keys 0. max and sum (rows) carry on from earlier tiles, and the rows of out (rows, C; stride
// `ldo`) that were summed under a smaller maximum are scaled down. At the first tile of keys nothing has come before.
EXPORT void NAME(attention_tile)(
  real *restrict S, size_t rows, size_t columns, int first_query, int first_key,
  real *restrict max, real *restrict sum, real *restrict out, size_t ldo, size_t C
) {
  for (size_t r = 0; r < rows; r++) {
    real *s = S + r * columns;
    size_t n = visible(r, columns, first_query, first_key);
    real before = first_key == 0 ? -(real)__builtin_inf() : max[r];
    real top = row_max(s, n);
    top = before > top ? before : top;
    real total = exponentials(s, s, n, top);
    for (size_t c = n; c < columns; c++) s[c] = 0;
    if (first_key > 0) {
      real shrink = exp_(before - top - (vec){ 0 })[0];
      total += sum[r] * shrink;
      if (shrink != 1) for (size_t c = 0; c < C; c++) out[r * ldo + c] *= shrink;
    }
    max[r] = top;
    sum[r] = total;
  }
}

// After the last tile: out /= sum, lse = max + log(sum); lse has stride `heads`.
EXPORT void NAME(attention_finish)(
  real *restrict out, size_t ldo, size_t rows, size_t C,
  const real *restrict max, const real *restrict sum, real *restrict lse, size_t heads
) {
  for (size_t r = 0; r < rows; r++) {
    real inverse = 1 / sum[r];
    for (size_t c = 0; c < C; c++) out[r * ldo + c] *= inverse;
    lse[r * heads] = max[r] + (real)host_log(sum[r]);
  }
}

// delta[r] = d_out[r] . out[r], which is sum_j p_j dp_j
EXPORT void NAME(attention_delta)(
  const real *restrict d_out, const real *restrict out, size_t ldo, size_t rows, size_t C, real *restrict delta
) {
  for (size_t r = 0; r < rows; r++) delta[r] = dot(d_out + r * ldo, out + r * ldo, C);
}

// S becomes p = exp(S - lse), dP becomes dS = p (dP - delta) scale; hidden keys 0.
EXPORT void NAME(attention_tile_backward)(
  real *restrict S, real *restrict dP, size_t rows, size_t columns, int first_query, int first_key,
  const real *restrict lse, size_t heads, const real *restrict delta, real scale
) {
  for (size_t r = 0; r < rows; r++) {
    real *restrict s = S + r * columns, *restrict d = dP + r * columns;
    size_t n = visible(r, columns, first_query, first_key);
    real shift = lse[r * heads], pull = delta[r];
    for (size_t c = 0; c < n; c += LANES) {
      vec p = exp_(load(s + c, n - c, 0) - shift);
      vec dp = load(d + c, n - c, 0);
      store(s + c, n - c, p);
      store(d + c, n - c, p * (dp - pull) * scale);
    }
    for (size_t c = n; c < columns; c++) s[c] = d[c] = 0;
  }
}
