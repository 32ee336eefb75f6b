// Rows that move: gather, scatter-add, the weighted sum of a token's expert rows with its gradient. All of it is bound by memory: a group
// of threads owns a row, every access is of 16 bytes where addresses allow it, and several are in flight per thread.

// Loads N elements as floats, by accesses of up to 16 bytes.
template <typename T, int N>
DEVICE void load_floats(float out[N], const T* from) {
  constexpr int most = 16 / sizeof(T), width = N < most ? N : most;
#pragma unroll
  for (int i = 0; i < N / width; i++) {
    Pack<T, width> pack = reinterpret_cast<const Pack<T, width>*>(from)[i];
#pragma unroll
    for (int j = 0; j < width; j++) out[i * width + j] = to_f32(pack.at[j]);
  }
}
template <typename T, int N>
DEVICE void store_floats(T* to, const float in[N]) {
  constexpr int most = 16 / sizeof(T), width = N < most ? N : most;
#pragma unroll
  for (int i = 0; i < N / width; i++) {
    Pack<T, width> pack;
#pragma unroll
    for (int j = 0; j < width; j++) pack.at[j] = from_f32<T>(in[i * width + j]);
    reinterpret_cast<Pack<T, width>*>(to)[i] = pack;
  }
}

// N elements as they lie in memory: 16 bytes in four registers, or one element. As floats only where they are added, which saves registers.
template <typename T, int N>
struct Unit {
  T value;
  DEVICE void clear() { value = T(); }
  DEVICE void load(const T* from) { value = *from; }
  DEVICE void floats(float out[1]) const { out[0] = to_f32(value); }
};
template <>
struct Unit<float, 4> {
  uint4 bits;
  DEVICE void clear() { bits = make_uint4(0, 0, 0, 0); }
  DEVICE void load(const float* from) { bits = *reinterpret_cast<const uint4*>(from); }
  DEVICE void floats(float out[4]) const {
    out[0] = __uint_as_float(bits.x);
    out[1] = __uint_as_float(bits.y);
    out[2] = __uint_as_float(bits.z);
    out[3] = __uint_as_float(bits.w);
  }
};
template <>
struct Unit<bf16, 8> {
  uint4 bits;
  DEVICE void clear() { bits = make_uint4(0, 0, 0, 0); }
  DEVICE void load(const bf16* from) { bits = *reinterpret_cast<const uint4*>(from); }
  DEVICE void floats(float out[8]) const {
    u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
};

// Weights of choices: 1 without any (kind 0), f32 (1) or bf16 (2).
DEVICE float weight_at(const void* weights, int kind, i64 i) {
  if (kind == 0) return 1.0f;
  return kind == 1 ? static_cast<const float*>(weights)[i] : to_f32(static_cast<const bf16*>(weights)[i]);
}

// Stores a unit, past the caches where `streams`: what is read may then stay there, as rows that are read again.
template <typename U>
DEVICE void store_unit(U* to, U value, bool streams) {
  if (streams) __stcs(to, value);
  else *to = value;
}

// out[i] = x[rows[i]], zeros for a negative row; 1 << shift threads per row of `units` units.
template <typename U>
DEVICE void gather_rows(const U* x, const int* rows, U* out, i64 count, i64 units, int shift, bool streams) {
  i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> shift;
  if (i >= count) return;
  i64 stride = (i64)1 << shift, u = threadIdx.x & (stride - 1), row = rows[i];
  const U* from = x + (row < 0 ? 0 : row) * units;
  U* to = out + i * units;
  for (; u < units; u += 4 * stride) {
    U held[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      held[j] = U();
      if (row >= 0 && u + j * stride < units) held[j] = from[u + j * stride];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (u + j * stride < units) store_unit(to + u + j * stride, held[j], streams);
    }
  }
}
#define GATHER(NAME, U)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 6)                                                            \
      NAME(const U* x, const int* rows, U* out, i64 count, i64 units, int shift, int streams) {                   \
    after_previous();                                                                                             \
    gather_rows<U>(x, rows, out, count, units, shift, streams != 0);                                              \
  }
GATHER(gather_rows_16, uint4)
GATHER(gather_rows_4, u32)
GATHER(gather_rows_2, u16)
GATHER(gather_rows_1, u8)

// A run of equal keys is added up in pieces that end at multiples of this, so that a row that is named often does not take long.
#define PIECE 128

// out[key] += x[order[j]] for the items j of each key; keys [n] ascend, those from `last` on are skipped. A warp owns N columns per lane of the
// piece of a run that begins at its item; others leave at once. A run's first piece goes to the row, each other one to
// parts [n / PIECE, width], which scatter_rest adds.
template <typename T, typename O, int N>
DEVICE void scatter_add(const T* x, const int* keys, const int* order, O* out, float* parts, int n, int last,
                        int width) {
  int lane = threadIdx.x % 32, at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (at >= n) return;
  int key = keys[at];
  bool first = at == 0 || keys[at - 1] != key;
  if (key >= last || (!first && at % PIECE != 0)) return;
  int column = (blockIdx.y * 32 + lane) * N, end = at / PIECE * PIECE + PIECE;
  if (end > n) end = n;
  bool active = column < width;
  O* target = out + (i64)key * width + column;
  float* rest = parts + (i64)(at / PIECE) * width + column;
  float sums[N];
#pragma unroll
  for (int c = 0; c < N; c++) sums[c] = 0;
  if (active && first) load_floats<O, N>(sums, target);
  constexpr int most = 8;
  while (at < end) {
    int mine = at + lane < end ? keys[at + lane] : -1;
    int item = at + lane < end ? order[at + lane] : 0;
    int run = __popc(__ballot_sync(0xffffffffu, mine == key));
    for (int j = 0; j < run; j += most) {
      Unit<T, N> held[most];
#pragma unroll
      for (int i = 0; i < most; i++) {
        int from = __shfl_sync(0xffffffffu, item, (j + i) & 31);
        if (active && j + i < run) {
          held[i].load(x + (i64)from * width + column);
        }
      }
      if (active) {
#pragma unroll
        for (int i = 0; i < most; i++) {
          if (j + i >= run) break;
          float values[N];
          held[i].floats(values);
#pragma unroll
          for (int c = 0; c < N; c++) sums[c] += values[c];
        }
      }
    }
    at += 32;
    if (run < 32) break;
  }
  if (!active) return;
  if (first) store_floats<O, N>(target, sums);
  else store_floats<float, N>(rest, sums);
}

// Adds the parts of each run to its row, in order; one thread per column, blocks (pieces, columns). A run's parts are added by the block of
// the first of them.
template <typename O>
DEVICE void scatter_rest(const int* keys, O* out, const float* parts, int n, int last, int width) {
  int piece = blockIdx.x + 1, at = piece * PIECE, column = blockIdx.y * blockDim.x + threadIdx.x;
  int key = keys[at];
  if (key >= last || keys[at - 1] != key || column >= width) return;
  int before = at - PIECE;  // the piece before is a part of this run, too, if the run began before it
  if (before > 0 && keys[before] == key && keys[before - 1] == key) return;
  O* target = out + (i64)key * width + column;
  float sum = to_f32(*target);
  for (; at < n && keys[at] == key; at += PIECE, piece++) sum += parts[(i64)piece * width + column];
  *target = from_f32<O>(sum);
}
extern "C" __global__ void scatter_rest_f32(const int* keys, float* out, const float* parts, int n, int last,
                                            int width) {
  after_previous();
  scatter_rest<float>(keys, out, parts, n, last, width);
}
extern "C" __global__ void scatter_rest_bf16(const int* keys, bf16* out, const float* parts, int n, int last,
                                             int width) {
  after_previous();
  scatter_rest<bf16>(keys, out, parts, n, last, width);
}
#define SCATTER(NAME, T, O, N)                                                                                   \
  extern "C" __global__ void NAME(const T* x, const int* keys, const int* order, O* out, float* parts, int n,   \
                                  int last, int width) {                                                         \
    after_previous();                                                                                            \
    scatter_add<T, O, N>(x, keys, order, out, parts, n, last, width);                                            \
  }
SCATTER(scatter_add_f32_f32_wide, float, float, 4)
SCATTER(scatter_add_f32_f32, float, float, 1)
SCATTER(scatter_add_bf16_f32_wide, bf16, float, 8)
SCATTER(scatter_add_bf16_f32, bf16, float, 1)
SCATTER(scatter_add_bf16_bf16_wide, bf16, bf16, 8)
SCATTER(scatter_add_bf16_bf16, bf16, bf16, 1)

// out[n] = residual[n] + sum over k of weights[n, k] y[slots[n, k]]. N elements at a time, C choices and U such units in flight;
// 1 << shift threads per token.
template <typename T, int N, int C, int U>
DEVICE void combine(const T* y, const int* slots, const void* weights, int kind, const T* residual, T* out, i64 tokens,
                    int choices, i64 width, int shift) {
  i64 n = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> shift;
  if (n >= tokens) return;
  i64 stride = (i64)1 << shift, units = width / N;
  for (i64 u = threadIdx.x & (stride - 1); u < units; u += U * stride) {
    float sums[U][N];
#pragma unroll
    for (int j = 0; j < U; j++) {
#pragma unroll
      for (int i = 0; i < N; i++) sums[j][i] = 0;
      if (residual && u + j * stride < units) load_floats<T, N>(sums[j], residual + n * width + (u + j * stride) * N);
    }
    for (int first = 0; first < choices; first += C) {
      Unit<T, N> held[C][U];
      float weight[C];
#pragma unroll
      for (int c = 0; c < C; c++) {
        i64 choice = n * choices + first + c;
        int slot = first + c < choices ? slots[choice] : -1;
        weight[c] = slot < 0 ? 0.0f : weight_at(weights, kind, choice);
#pragma unroll
        for (int j = 0; j < U; j++) {
          held[c][j].clear();
          if (slot >= 0 && u + j * stride < units) held[c][j].load(y + slot * width + (u + j * stride) * N);
        }
      }
#pragma unroll
      for (int c = 0; c < C; c++) {
#pragma unroll
        for (int j = 0; j < U; j++) {
          float values[N];
          held[c][j].floats(values);
#pragma unroll
          for (int i = 0; i < N; i++) sums[j][i] += weight[c] * values[i];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < U; j++) {
      if (u + j * stride < units) store_floats<T, N>(out + n * width + (u + j * stride) * N, sums[j]);
    }
  }
}
#define COMBINE(NAME, T, N, C, U)                                                                                      \
  extern "C" __global__ void __launch_bounds__(256, 4)                                                                 \
      NAME(const T* y, const int* slots, const void* weights, int kind, const T* residual, T* out, i64 tokens,        \
           int choices, i64 width, int shift) {                                                                        \
    after_previous();                                                                                                  \
    combine<T, N, C, U>(y, slots, weights, kind, residual, out, tokens, choices, width, shift);                        \
  }
#define COMBINES(SUFFIX, T, N)                 \
  COMBINE(combine_##SUFFIX, T, 1, 1, 1)        \
  COMBINE(combine_##SUFFIX##_wide1, T, N, 1, 4) \
  COMBINE(combine_##SUFFIX##_wide2, T, N, 2, 2) \
  COMBINE(combine_##SUFFIX##_wide4, T, N, 4, 1) \
  COMBINE(combine_##SUFFIX##_wide8, T, N, 8, 1)
COMBINES(f32, float, 4)
COMBINES(bf16, bf16, 8)

// dY[slots[n, k]] = weights[n, k] dOut[n], dWeights[n, k] = dOut[n] · y[slots[n, k]]; a warp per token.
template <typename T, int N, int C, int U>
DEVICE void combine_backward(const T* d_out, const T* y, const int* slots, const void* weights, int kind, T* d_y,
                             void* d_weights, i64 tokens, int choices, i64 width) {
  int lane = threadIdx.x % 32;
  i64 n = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (n >= tokens) return;
  i64 units = width / N;
  for (int first = 0; first < choices; first += C) {
    i64 slot[C];
    float weight[C], dot[C];
#pragma unroll
    for (int c = 0; c < C; c++) {
      i64 choice = n * choices + first + c;
      slot[c] = first + c < choices ? slots[choice] : -1;
      weight[c] = slot[c] < 0 ? 0.0f : weight_at(weights, kind, choice);
      dot[c] = 0;
    }
    for (i64 u = lane; u < units; u += 32 * U) {
      Unit<T, N> gradient[U], held[C][U];
#pragma unroll
      for (int j = 0; j < U; j++) {
        bool inside = u + 32 * j < units;
        if (inside) gradient[j].load(d_out + n * width + (u + 32 * j) * N);
#pragma unroll
        for (int c = 0; c < C; c++) {
          if (inside && slot[c] >= 0) held[c][j].load(y + slot[c] * width + (u + 32 * j) * N);
        }
      }
#pragma unroll
      for (int j = 0; j < U; j++) {
        if (u + 32 * j >= units) break;
        float g[N];
        gradient[j].floats(g);
#pragma unroll
        for (int c = 0; c < C; c++) {
          if (slot[c] < 0) continue;
          float out[N], values[N];
          held[c][j].floats(values);
#pragma unroll
          for (int i = 0; i < N; i++) {
            dot[c] += g[i] * values[i];
            out[i] = weight[c] * g[i];
          }
          store_floats<T, N>(d_y + slot[c] * width + (u + 32 * j) * N, out);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < C; c++) {
      float sum = warp_sum(dot[c]);
      if (lane == 0 && first + c < choices) {
        i64 choice = n * choices + first + c;
        if (kind == 1) static_cast<float*>(d_weights)[choice] = sum;
        else static_cast<bf16*>(d_weights)[choice] = to_bf16(sum);
      }
    }
  }
}
#define COMBINE_BACKWARD(NAME, T, N, C, U)                                                                          \
  extern "C" __global__ void __launch_bounds__(256, 3)                                                              \
      NAME(const T* d_out, const T* y, const int* slots, const void* weights, int kind, T* d_y, void* d_weights,   \
           i64 tokens, int choices, i64 width) {                                                                    \
    after_previous();                                                                                               \
    combine_backward<T, N, C, U>(d_out, y, slots, weights, kind, d_y, d_weights, tokens, choices, width);           \
  }
#define COMBINES_BACKWARD(SUFFIX, T, N)                          \
  COMBINE_BACKWARD(combine_backward_##SUFFIX, T, 1, 1, 1)        \
  COMBINE_BACKWARD(combine_backward_##SUFFIX##_wide1, T, N, 1, 4) \
  COMBINE_BACKWARD(combine_backward_##SUFFIX##_wide2, T, N, 2, 2) \
  COMBINE_BACKWARD(combine_backward_##SUFFIX##_wide4, T, N, 4, 1)
COMBINES_BACKWARD(f32, float, 4)
COMBINES_BACKWARD(bf16, bf16, 8)
