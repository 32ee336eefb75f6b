// Routing on the device: from logits to each token's experts, weights and what the rank adds to the global batch, and the gradient back to the
// logits; and the orders of rows between ranks and experts. The gate's products are in gate.cu, the sort of choices by expert in sort.cu.
// A token has a group of L = 2^s lanes (L <= 32, no less than its choices); lane l of it holds experts l, l + L, ...
// Sums go over lanes, warps and blocks in a fixed order; only whole numbers are counted by atomics.

struct Route {
  i64 tokens;
  int experts, choices;
  int sigmoid, renormalise;
  float scale;
  int groups, group_limit, first_only;
  // log2 of the lanes of a token.
  int shift;
  // Coefficients of the losses in the gradient.
  float aux_loss, z_loss;
  // Records, and numbers from one to the next.
  int ranks, record;
};

// The largest value of a group of lanes and its index, of equal ones the lowest index; known to all lanes of the group.
DEVICE void group_best(float& value, int& index, int lanes) {
  for (int offset = lanes >> 1; offset > 0; offset >>= 1) {
    float other = __shfl_xor_sync(0xffffffffu, value, offset);
    int at = __shfl_xor_sync(0xffffffffu, index, offset);
    if (other > value || (other == value && at < index)) {
      value = other;
      index = at;
    }
  }
}
DEVICE float group_sum(float x, int lanes) {
  for (int offset = lanes >> 1; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
DEVICE float group_max(float x, int lanes) {
  for (int offset = lanes >> 1; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
#define LEAST (-__int_as_float(0x7f800000))
#define NO_INDEX 0x7fffffff

// Takes the experts of groups out of the running that the token may not reach: those but the `limit` whose two best values have the
// largest sums. `staged` [experts] and `sums` [groups] are shared memory of this token.
template <int P>
DEVICE void limit_groups(float value[P], const Route& route, int lane, int lanes, float* staged, float* sums) {
  int per = route.experts / route.groups;
#pragma unroll
  for (int j = 0; j < P; j++) {
    int e = lane + j * lanes;
    if (e < route.experts) staged[e] = value[j];
  }
  __syncwarp();
  for (int g = lane; g < route.groups; g += lanes) {
    float first = LEAST, second = LEAST;
    for (int i = g * per; i < (g + 1) * per; i++) {
      float v = staged[i];
      if (v > first) {
        second = first;
        first = v;
      } else if (v > second) second = v;
    }
    sums[g] = per > 1 ? first + second : first;
  }
  __syncwarp();
  // A group is reached if fewer than `limit` groups come before it.
  u32 open = 0;  // of this lane's experts
#pragma unroll
  for (int j = 0; j < P; j++) {
    int e = lane + j * lanes;
    if (e >= route.experts) continue;
    int group = e / per, before = 0;
    float mine = sums[group];
    for (int g = 0; g < route.groups; g++) before += sums[g] > mine || (sums[g] == mine && g < group);
    if (before < route.group_limit) open |= 1u << j;
  }
#pragma unroll
  for (int j = 0; j < P; j++) {
    if (!(open >> j & 1)) value[j] = LEAST;
  }
  __syncwarp();
}

// P experts per lane. Partial sums of block b: counts_part [2][experts][blocks] and sums_part [experts + 1][blocks] f64.
// Shared: per warp experts + 1 doubles and 2 experts ints, then per token experts + groups floats where groups are limited.
template <int P>
DEVICE void route_tokens(const float* logits, const float* bias, Route route, int* experts_out, float* weights,
                         float* lse_out, int* counts_part, double* sums_part) {
  extern __shared__ __align__(16) double route_shared[];
  int experts = route.experts, choices = route.choices, lanes = 1 << route.shift, per_warp = 32 >> route.shift;
  int warp = threadIdx.x / 32, lane = threadIdx.x & (lanes - 1), sub = (threadIdx.x % 32) >> route.shift;
  double* warp_sums = route_shared;                                  // [8][experts + 1]
  int* histogram = reinterpret_cast<int*>(warp_sums + 8 * (experts + 1));  // [2][experts]
  float* limits = reinterpret_cast<float*>(histogram + 2 * experts) + (warp * per_warp + sub) * (experts + route.groups);
  for (int i = threadIdx.x; i < 2 * experts; i += blockDim.x) histogram[i] = 0;
  __syncthreads();
  i64 per_block = (route.tokens + gridDim.x - 1) / gridDim.x;
  i64 start = blockIdx.x * per_block, end = start + per_block < route.tokens ? start + per_block : route.tokens;
  double score_sums[P], squares = 0;
#pragma unroll
  for (int j = 0; j < P; j++) score_sums[j] = 0;
  for (i64 base = start; base < end; base += 8 * per_warp) {
    i64 n = base + warp * per_warp + sub;
    bool inside = n < end;  // lanes of a warp stay together for the shuffles
    float value[P], score[P];
    float most = LEAST;
#pragma unroll
    for (int j = 0; j < P; j++) {
      int e = lane + j * lanes;
      value[j] = inside && e < experts ? logits[n * experts + e] : LEAST;
      most = fmaxf(most, value[j]);
    }
    most = group_max(most, lanes);
    float sum = 0, scores = 0;
#pragma unroll
    for (int j = 0; j < P; j++) {
      bool real = inside && lane + j * lanes < experts;
      score[j] = real ? expf(value[j] - most) : 0.0f;
      sum += score[j];
    }
    sum = group_sum(sum, lanes);
    float lse = most + logf(sum), normaliser = 1.0f / sum;
    if (route.sigmoid) {
#pragma unroll
      for (int j = 0; j < P; j++) {
        bool real = inside && lane + j * lanes < experts;
        score[j] = real ? 1.0f / (1.0f + expf(-value[j])) : 0.0f;
        scores += score[j];
        if (real) value[j] = score[j] + (bias ? bias[lane + j * lanes] : 0.0f);
      }
      normaliser = 1.0f / (group_sum(scores, lanes) + 1e-20f);
    }
    if (inside) {
#pragma unroll
      for (int j = 0; j < P; j++) score_sums[j] += (double)(score[j] * normaliser);
      if (lane == 0) {
        lse_out[n] = lse;
        squares += (double)lse * (double)lse;
      }
    }
    // A value that is no number comes last, so that every choice is an expert; the record's sum of squares shows it.
#pragma unroll
    for (int j = 0; j < P; j++) {
      if (!(value[j] == value[j])) value[j] = LEAST;
    }
    if (route.group_limit < route.groups) limit_groups<P>(value, route, lane, lanes, limits, limits + experts);
    u32 taken = 0;
    int chosen = -1;  // of lane k: the k-th choice
    for (int k = 0; k < choices; k++) {
      float best = LEAST;
      int index = NO_INDEX;
#pragma unroll
      for (int j = 0; j < P; j++) {
        int e = lane + j * lanes;
        bool free = e < experts && !(taken >> j & 1);
        if (free && (index == NO_INDEX || value[j] > best)) {
          best = value[j];
          index = e;
        }
      }
      group_best(best, index, lanes);
      if (lane == (index & (lanes - 1))) taken |= 1u << (index >> route.shift);
      if (lane == k) chosen = index;
    }
    bool mine = inside && lane < choices;
    float logit = mine ? logits[n * experts + chosen] : LEAST, weight = 0;
    if (route.sigmoid) {
      float s = mine ? 1.0f / (1.0f + expf(-logit)) : 0.0f;
      float total = group_sum(s, lanes) + 1e-20f;
      weight = route.scale * (route.renormalise ? s / total : s);
    } else if (route.renormalise) {
      float top = group_max(logit, lanes);
      float e = mine ? expf(logit - top) : 0.0f;
      weight = e / group_sum(e, lanes);
    } else if (mine) {
      weight = expf(logit - most) * normaliser;
    }
    if (mine) {
      experts_out[n * choices + lane] = chosen;
      weights[n * choices + lane] = weight;
      atomicAdd(&histogram[chosen], 1);
      if (lane == 0 || !route.first_only) atomicAdd(&histogram[experts + chosen], 1);
    }
  }
  // The groups of a warp, then the warps, in order.
#pragma unroll
  for (int j = 0; j < P; j++) {
    for (int offset = lanes; offset < 32; offset <<= 1) {
      score_sums[j] += __shfl_xor_sync(0xffffffffu, score_sums[j], offset);
    }
    int e = lane + j * lanes;
    if (sub == 0 && e < experts) warp_sums[warp * (experts + 1) + e] = score_sums[j];
  }
  for (int offset = lanes; offset < 32; offset <<= 1) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  if (threadIdx.x % 32 == 0) warp_sums[warp * (experts + 1) + experts] = squares;
  __syncthreads();
  for (int i = threadIdx.x; i <= experts; i += blockDim.x) {
    double sum = 0;
    for (int w = 0; w < 8; w++) sum += warp_sums[w * (experts + 1) + i];
    sums_part[(i64)i * gridDim.x + blockIdx.x] = sum;
  }
  for (int i = threadIdx.x; i < 2 * experts; i += blockDim.x) counts_part[(i64)i * gridDim.x + blockIdx.x] = histogram[i];
}
#define ROUTE(P)                                                                                                     \
  extern "C" __global__ void route_##P(const float* logits, const float* bias, Route route, int* experts,           \
                                       float* weights, float* lse, int* counts_part, double* sums_part) {            \
    after_previous();                                                                                                \
    route_tokens<P>(logits, bias, route, experts, weights, lse, counts_part, sums_part);                             \
  }
ROUTE(1)
ROUTE(2)
ROUTE(4)
ROUTE(8)
ROUTE(32)

// The record [3 experts + 2] from the blocks' parts: a warp per number.
extern "C" __global__ void route_record(const int* counts_part, const double* sums_part, int experts, int blocks,
                                        i64 tokens, double* record) {
  after_previous();
  int i = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (i > 3 * experts + 1) return;
  double sum = 0;
  if (i < 2 * experts) {
    for (int b = lane; b < blocks; b += 32) sum += counts_part[(i64)i * blocks + b];
  } else if (i <= 3 * experts) {
    for (int b = lane; b < blocks; b += 32) sum += sums_part[(i64)(i - 2 * experts) * blocks + b];
  }
  for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) record[i] = i == 3 * experts + 1 ? (double)tokens : sum;
}

// Gradient of the weights and the losses with respect to the logits. With `slots`, the weights' gradients are those of rows. Shared: experts floats.
template <int P>
DEVICE void route_backward(const float* d_weights, const int* slots, const float* logits, const float* lse_in, const int* chosen_in,
                           const double* records, Route route, float* d_logits) {
  extern __shared__ __align__(16) float slope[];
  __shared__ double totals[8];
  __shared__ float z_factor;
  int experts = route.experts, choices = route.choices, length = route.record;
  int lanes = 1 << route.shift, per_warp = 32 >> route.shift;
  int warp = threadIdx.x / 32, lane = threadIdx.x & (lanes - 1), sub = (threadIdx.x % 32) >> route.shift;
  i64 stride = (i64)gridDim.x * 8 * per_warp, n = ((i64)blockIdx.x * 8 + warp) * per_warp + sub;
  // What a token needs is loaded before it is waited for: the first one's beside the records.
  float l[P], lse = 0, d_weight = 0;
  int chosen = -1;  // of lane k: the k-th choice
  auto load = [&]() {
    bool inside = n < route.tokens;
#pragma unroll
    for (int j = 0; j < P; j++) {
      int e = lane + j * lanes;
      l[j] = inside && e < experts ? logits[n * experts + e] : LEAST;
    }
    bool mine = inside && lane < choices;
    lse = inside ? lse_in[n] : 0.0f;
    chosen = mine ? chosen_in[n * choices + lane] : -1;
    i64 at = mine ? n * choices + lane : -1;
    if (mine && slots) at = slots[at];
    d_weight = at >= 0 ? d_weights[at] : 0.0f;
  };
  load();
  // The balance loss's slope of each expert: aux E f_e / tokens.
  double all = 0;
  for (int e = threadIdx.x; e < experts; e += 256) {
    double count = 0;
    for (int r = 0; r < route.ranks; r++) count += records[(i64)r * length + experts + e];
    slope[e] = (float)count;
    all += count;
  }
  for (int offset = 16; offset > 0; offset >>= 1) all += __shfl_xor_sync(0xffffffffu, all, offset);
  if (threadIdx.x % 32 == 0) totals[warp] = all;
  __syncthreads();
  all = 0;
  for (int w = 0; w < 8; w++) all += totals[w];
  double tokens = 0;
  for (int r = 0; r < route.ranks; r++) tokens += records[(i64)r * length + 3 * experts + 1];
  double factor = all > 0 && tokens > 0 ? (double)route.aux_loss * experts / (all * tokens) : 0.0;
  if (threadIdx.x == 0) z_factor = tokens > 0 ? (float)(2.0 * route.z_loss / tokens) : 0.0f;
  for (int e = threadIdx.x; e < experts; e += 256) slope[e] = (float)(factor * slope[e]);
  __syncthreads();

  for (i64 base = (i64)blockIdx.x * 8 * per_warp; base < route.tokens; base += stride) {
    bool inside = n < route.tokens, mine = chosen >= 0;
    float logit = mine ? logits[n * experts + chosen] : LEAST;
    if (!mine) d_weight = 0;
    float given = 0, all_scores = 0;  // gradient of this choice's logit; what every softmax score loses
    if (route.sigmoid) {
      float s = mine ? 1.0f / (1.0f + expf(-logit)) : 0.0f;
      float total = route.renormalise ? group_sum(s, lanes) + 1e-20f : 1.0f;
      float dot = route.renormalise ? group_sum(d_weight * s, lanes) : 0.0f;
      given = route.scale / total * (d_weight - dot / total) * s * (1.0f - s);
    } else if (route.renormalise) {
      float top = group_max(logit, lanes);
      float e = mine ? expf(logit - top) : 0.0f, total = group_sum(e, lanes);
      float w = mine ? e / total : 0.0f;
      given = w * (d_weight - group_sum(d_weight * w, lanes));
    } else {
      float p = mine ? expf(logit - lse) : 0.0f;
      given = p * d_weight;
      all_scores = group_sum(given, lanes);
    }
    float p[P], score[P];
    float sum = 0, mean = 0;
#pragma unroll
    for (int j = 0; j < P; j++) {
      int e = lane + j * lanes;
      p[j] = inside && e < experts ? expf(l[j] - lse) : 0.0f;
      score[j] = route.sigmoid && inside && e < experts ? 1.0f / (1.0f + expf(-l[j])) : p[j];
      sum += score[j];
      if (e < experts) mean += slope[e] * score[j];
    }
    mean = group_sum(mean, lanes);
    float inverse = 1.0f;
    if (route.sigmoid) {
      inverse = 1.0f / (group_sum(sum, lanes) + 1e-20f);
      mean *= inverse;
    }
    float gradient[P];
#pragma unroll
    for (int j = 0; j < P; j++) {
      int e = lane + j * lanes;
      float by_score = route.sigmoid ? score[j] * (1.0f - score[j]) : score[j];
      gradient[j] = z_factor * lse * p[j] - all_scores * p[j];
      if (e < experts) gradient[j] += inverse * by_score * (slope[e] - mean);
    }
    for (int k = 0; k < choices; k++) {
      int from = (sub << route.shift) + k;
      int e = __shfl_sync(0xffffffffu, chosen, from);
      float g = __shfl_sync(0xffffffffu, given, from);
#pragma unroll
      for (int j = 0; j < P; j++) {
        if (lane + j * lanes == e) gradient[j] += g;
      }
    }
#pragma unroll
    for (int j = 0; j < P; j++) {
      int e = lane + j * lanes;
      if (inside && e < experts) d_logits[n * experts + e] = gradient[j];
    }
    n += stride;
    load();
  }
}
#define ROUTE_BACKWARD(P)                                                                                            \
  extern "C" __global__ void route_backward_##P(const float* d_weights, const int* slots, const float* logits,      \
                                                const float* lse,                                                    \
                                                const int* experts, const double* records, Route route,             \
                                                float* d_logits) {                                                   \
    after_previous();                                                                                                \
    route_backward<P>(d_weights, slots, logits, lse, experts, records, route, d_logits);                                    \
  }
ROUTE_BACKWARD(1)
ROUTE_BACKWARD(2)
ROUTE_BACKWARD(4)
ROUTE_BACKWARD(8)
ROUTE_BACKWARD(32)

// Choices of each expert in slices of the tokens: counts[c][e] grows by those of slice blockIdx.y = c, tokens [c n / slices, (c + 1) n / slices).
// Whole numbers, so the order in which blocks add them does not matter. Shared: experts ints.
extern "C" __global__ void count_slices(const int* chosen, i64 tokens, int choices, int slices, int experts, double* counts) {
  after_previous();
  extern __shared__ __align__(16) int slice_counts[];
  for (int e = threadIdx.x; e < experts; e += blockDim.x) slice_counts[e] = 0;
  __syncthreads();
  i64 slice = blockIdx.y, start = slice * tokens / slices * choices, end = (slice + 1) * tokens / slices * choices;
  i64 stride = (i64)gridDim.x * blockDim.x;
  for (i64 i = start + (i64)blockIdx.x * blockDim.x + threadIdx.x; i < end; i += stride) {
    int e = chosen[i];
    if (e >= 0 && e < experts) atomicAdd(&slice_counts[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    if (slice_counts[e] > 0) atomicAdd(&counts[slice * experts + e], (double)slice_counts[e]);
  }
}

// out[slots[n, k]] = x[n]; 1 << shift threads per token, `units` units per row. A row is read once, however often it is written.
template <typename U>
DEVICE void spread_rows(const U* x, const int* slots, U* out, i64 tokens, int choices, i64 units, int shift) {
  i64 n = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> shift;
  if (n >= tokens) return;
  i64 stride = (i64)1 << shift;
  for (i64 u = threadIdx.x & (stride - 1); u < units; u += 4 * stride) {
    U held[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (u + j * stride < units) held[j] = x[n * units + u + j * stride];
    }
    for (int k = 0; k < choices; k++) {
      i64 slot = slots[n * choices + k];
      if (slot < 0) continue;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (u + j * stride < units) out[slot * units + u + j * stride] = held[j];
      }
    }
  }
}
#define SPREAD(NAME, U)                                                                                          \
  extern "C" __global__ void __launch_bounds__(256, 6)                                                           \
      NAME(const U* x, const int* slots, U* out, i64 tokens, int choices, i64 units, int shift) {                \
    after_previous();                                                                                            \
    spread_rows<U>(x, slots, out, tokens, choices, units, shift);                                                \
  }
SPREAD(spread_rows_16, uint4)
SPREAD(spread_rows_4, u32)
SPREAD(spread_rows_2, u16)

// Index arrays between rank-major and expert-major rows, counts [ranks, seats]. Blocks (seat, rank): each adds up the counts before its own
// in both orders, and writes its run of rows.
extern "C" __global__ void major_orders(const int* counts, int ranks, int seats, i64 rows, int* to_expert_major,
                                        int* to_rank_major) {
  after_previous();
  __shared__ int before[2];
  int seat = blockIdx.x, rank = blockIdx.y;
  if (threadIdx.x < 2) before[threadIdx.x] = 0;
  __syncthreads();
  int by_rank = 0, by_expert = 0;
  for (int i = threadIdx.x; i < ranks * seats; i += blockDim.x) {
    int r = i / seats, s = i % seats, count = counts[i];
    if (r < rank || (r == rank && s < seat)) by_rank += count;
    if (s < seat || (s == seat && r < rank)) by_expert += count;
  }
  atomicAdd(&before[0], by_rank);
  atomicAdd(&before[1], by_expert);
  __syncthreads();
  by_rank = before[0];
  by_expert = before[1];
  int count = counts[rank * seats + seat];
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    if (by_expert + i < rows) to_expert_major[by_expert + i] = by_rank + i;
    if (by_rank + i < rows) to_rank_major[by_rank + i] = by_expert + i;
  }
}
