// Kernels over the columns of each row: normalisation, rotary positions, softmax, the loss.

#include "real.h"

// out = x / rms(x) gain, rms(x) = sqrt(mean(x^2) + eps); inv_rms (N) is kept for the gradient
EXPORT void NAME(rms_norm)(
  const real *restrict x, const real *restrict gain, real *restrict out, real *restrict inv_rms,
  size_t N, size_t D, real eps
) {
  for (size_t n = 0; n < N; n++) {
    const real *xn = x + n * D;
    real *o = out + n * D;
    real inverse = 1 / sqrt_(dot(xn, xn, D) / D + eps);
    for (size_t d = 0; d < D; d++) o[d] = xn[d] * inverse * gain[d];
    inv_rms[n] = inverse;
  }
}

// With y = x inv_rms: dx = inv_rms (g - y mean(g y)) for g = d_out gain, or with `add` dx += that; d_gain += d_out y
EXPORT void NAME(rms_norm_backward)(
  const real *restrict d_out, const real *restrict x, const real *restrict gain, const real *restrict inv_rms,
  real *restrict dx, real *restrict d_gain, size_t N, size_t D, int add
) {
  for (size_t n = 0; n < N; n++) {
    const real *d = d_out + n * D, *xn = x + n * D;
    real *o = dx + n * D;
    real sum = 0;
    {
      SUMS_MAY_REORDER
      UNROLL4
      for (size_t i = 0; i < D; i++) sum += d[i] * gain[i] * xn[i];
    }
    real inverse = inv_rms[n], pull = sum * inverse * inverse * inverse / D;
    for (size_t i = 0; i < D; i++) d_gain[i] += d[i] * xn[i] * inverse;
    if (add) for (size_t i = 0; i < D; i++) o[i] += d[i] * gain[i] * inverse - xn[i] * pull;
    else for (size_t i = 0; i < D; i++) o[i] = d[i] * gain[i] * inverse - xn[i] * pull;
  }
}

// Turns the pair (i, i + C/2) of every head by the angles of a row: cosines and sines, times direction, of C/2 angles. to may be from.
INLINE void turn_heads(
  const real *from, real *to, const real *cosine, const real *sine, size_t heads, size_t half, real direction
) {
  for (size_t h = 0; h < heads; h++) {
    for (size_t i = 0; i < half; i += LANES) {
      const real *a = from + 2 * h * half + i, *b = a + half;
      real *turned = to + 2 * h * half + i;
      vec u = load(a, half - i, 0), v = load(b, half - i, 0);
      vec c = load(cosine + i, half - i, 0), s = direction * load(sine + i, half - i, 0);
      store(turned, half - i, u * c - v * s);
      store(turned + half, half - i, v * c + u * s);
    }
  }
}

// Turns every head of x (N, heads C) by the angle of its row's position. `turns` holds, for each position, C/2 cosines and then C/2
// sines; direction is 1, or -1 to turn back.
EXPORT void NAME(rope)(
  real *x, const int *positions, const real *turns, size_t N, size_t heads, size_t C, real direction
) {
  for (size_t n = 0; n < N; n++) {
    const real *cosine = turns + (size_t)positions[n] * C;
    turn_heads(x + n * heads * C, x + n * heads * C, cosine, cosine + C / 2, heads, C / 2, direction);
  }
}

// qkv (N, (H + 2G) C) to q (N, H C), k and v (N, G C), queries and keys turned
EXPORT void NAME(split_qkv)(
  const real *restrict qkv, const int *restrict positions, const real *restrict turns, real *restrict q, real *restrict k,
  real *restrict v, size_t N, size_t H, size_t G, size_t C
) {
  for (size_t n = 0; n < N; n++) {
    const real *cosine = turns + (size_t)positions[n] * C, *row = qkv + n * (H + 2 * G) * C;
    turn_heads(row, q + n * H * C, cosine, cosine + C / 2, H, C / 2, 1);
    turn_heads(row + H * C, k + n * G * C, cosine, cosine + C / 2, G, C / 2, 1);
    for (size_t i = 0; i < G * C; i++) v[n * G * C + i] = row[(H + G) * C + i];
  }
}

// The gradient of split_qkv: turned back and joined
EXPORT void NAME(join_qkv)(
  const real *restrict q, const real *restrict k, const real *restrict v, const int *restrict positions, const real *restrict turns,
  real *restrict qkv, size_t N, size_t H, size_t G, size_t C
) {
  for (size_t n = 0; n < N; n++) {
    const real *cosine = turns + (size_t)positions[n] * C;
    real *row = qkv + n * (H + 2 * G) * C;
    turn_heads(q + n * H * C, row, cosine, cosine + C / 2, H, C / 2, -1);
    turn_heads(k + n * G * C, row + H * C, cosine, cosine + C / 2, G, C / 2, -1);
    for (size_t i = 0; i < G * C; i++) row[(H + G) * C + i] = v[n * G * C + i];
  }
}

EXPORT void NAME(softmax)(const real *x, real *out, size_t N, size_t V) {
  for (size_t n = 0; n < N; n++) {
    const real *row = x + n * V;
    real *o = out + n * V;
    real inverse = 1 / exponentials(row, o, V, row_max(row, V));
    for (size_t v = 0; v < V; v++) o[v] *= inverse;
  }
}

// dx = y (dy - y . dy); dx may be dy
EXPORT void NAME(softmax_backward)(const real *dy, const real *y, real *dx, size_t N, size_t V) {
  for (size_t n = 0; n < N; n++) {
    const real *d = dy + n * V, *p = y + n * V;
    real *o = dx + n * V, sum = dot(d, p, V);
    for (size_t v = 0; v < V; v++) o[v] = p[v] * (d[v] - sum);
  }
}

// loss = log(sum_v exp(x[v])) - x[target]; logits become scale (softmax - onehot). A negative target is ignored.
EXPORT int NAME(cross_entropy)(
  real *restrict logits, const int *restrict targets, real *restrict losses, size_t N, size_t V, real scale
) {
  for (size_t n = 0; n < N; n++) {
    real *row = logits + n * V;
    int target = targets[n];
    if (target < 0) {
      losses[n] = 0;
      for (size_t v = 0; v < V; v++) row[v] = 0;
      continue;
    }
    if ((size_t)target >= V) return (int)n;
    real max = row_max(row, V), chosen = row[target];
    real sum = exponentials(row, row, V, max);
    losses[n] = (max - chosen) + (real)host_log(sum);
    real factor = scale / sum;
    for (size_t v = 0; v < V; v++) row[v] *= factor;
    row[target] -= scale;
  }
  return -1;
}
