// The gradient of a layer's input on its way out of the router: the sum of a token's expert rows and the gate's part, dLogits gate, in one pass, so
// that the second does not go through memory. gate_terms.cuh comes before it. Other dtypes and widths take the plain kernels.

// out[n] = sum over k of y[slots[n, k]] + dLogits[n] gate, plus out[n] where `adds`, for at most S * 16 experts. A block owns 256 columns and
// goes through `per_block` tokens, CHUNK at a time: tensor cores make the gate's part (operands as two terms, 16 bits) in shared memory, a warp
// 32 columns of it; then a warp adds up rows of CHUNK / 8 tokens, P choices of TOKENS tokens at a time, whose next ones are loaded meanwhile.
template <int S, int CHUNK, int TOKENS>
DEVICE void gate_combine(const bf16* y, const int* slots, const float* d_logits, const float* gate, bf16* out,
                         int tokens, int choices, int experts, int width, int per_block, int adds) {
  constexpr int P = 8 / TOKENS, MINE = CHUNK / 8, PAIRS = S * 8, T_ROW = S * 16 + 8, ROW = 264, M = CHUNK / 16;
  constexpr int EACH = (CHUNK * PAIRS + 255) / 256;
  extern __shared__ __align__(16) u8 combine_shared[];
  uint4* weights = reinterpret_cast<uint4*>(combine_shared);  // [S][32 tiles of 8 columns][lanes]: two terms of a fragment
  float* results = reinterpret_cast<float*>(weights + S * 1024);  // [2][CHUNK][ROW]
  u32* terms = reinterpret_cast<u32*>(results + 2 * CHUNK * ROW);  // [2][2 terms][CHUNK][T_ROW / 2]
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_column = blockIdx.x * 256;
  int start = blockIdx.y * per_block, end = start + per_block < tokens ? start + per_block : tokens;

  // The rounds of a warp: tokens of its chunks one after another, P choices at a time. `held` are the rows of the next round, `numbers` the rows'
  // numbers of this warp's tokens in a chunk, one per lane, and those of the next chunk.
  int column = first_column + lane * 8;
  bool wide = column < width;
  auto numbers_of = [&](int n) {
    int token = n + warp * MINE + lane / choices;
    return lane < MINE * choices && token < end ? slots[(i64)token * choices + lane % choices] : -1;
  };
  uint4 held[TOKENS][P];
  auto load = [&](int numbers, int token, int k) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int p = 0; p < P; p++) {
        int from = (token + t) * choices + k + p, slot = __shfl_sync(0xffffffffu, numbers, from & 31);
        held[t][p] = make_uint4(0, 0, 0, 0);
        if (k + p < choices && slot >= 0 && wide) {
          held[t][p] = *reinterpret_cast<const uint4*>(y + (i64)slot * width + column);
        }
      }
    }
  };
  int numbers = numbers_of(start), next_numbers = numbers_of(start + CHUNK);
  float next[EACH][2];
  auto fetch = [&](int n) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      int i = threadIdx.x + j * 256, row = n + i / PAIRS, e = i % PAIRS * 2;
      next[j][0] = row < end && e < experts ? d_logits[(i64)row * experts + e] : 0.0f;
      next[j][1] = row < end && e + 1 < experts ? d_logits[(i64)row * experts + e + 1] : 0.0f;
    }
  };
  auto split = [&](int turn) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      int i = threadIdx.x + j * 256;
      if (CHUNK * PAIRS % 256 != 0 && i >= CHUNK * PAIRS) break;
      u32 pair[2];
      split2(next[j][0], next[j][1], pair);
#pragma unroll
      for (int term = 0; term < 2; term++) {
        terms[((turn * 2 + term) * CHUNK + i / PAIRS) * (T_ROW / 2) + i % PAIRS] = pair[term];
      }
    }
  };
  fetch(start);
  load(numbers, 0, 0);
#pragma unroll 4
  for (int j = 0; j < S * 4; j++) {
    int step = j / 4, tile = j % 4 * 8 + warp, c = first_column + tile * 8 + lane / 4;
    u32 fragment[2][2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int e = step * 16 + lane % 4 * 2 + r * 8;
      float low = e < experts && c < width ? gate[(i64)e * width + c] : 0.0f;
      float high = e + 1 < experts && c < width ? gate[(i64)(e + 1) * width + c] : 0.0f;
      split2(low, high, fragment[r]);
    }
    weights[(step * 32 + tile) * 32 + lane] = make_uint4(fragment[0][0], fragment[1][0], fragment[0][1], fragment[1][1]);
  }
  split(0);
  fetch(start + CHUNK);
  __syncthreads();
  for (int n = start, turn = 0; n < end; n += CHUNK, turn ^= 1) {
    float* result = results + turn * CHUNK * ROW;
    float sums[M][4][4];
#pragma unroll
    for (int i = 0; i < M * 16; i++) (&sums[0][0][0])[i] = 0;
#pragma unroll
    for (int step = 0; step < S; step++) {
      u32 a[M][2][4];
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int term = 0; term < 2; term++) {
          load_matrices(a[m][term], terms + ((turn * 2 + term) * CHUNK + m * 16 + lane % 16) * (T_ROW / 2) + step * 8 +
                                        lane / 16 * 4);
        }
      }
#pragma unroll
      for (int t = 0; t < 4; t++) {
        uint4 w = weights[(step * 32 + warp * 4 + t) * 32 + lane];
        u32 most[2] = {w.x, w.y}, least[2] = {w.z, w.w};
#pragma unroll
        for (int m = 0; m < M; m++) {
          mma_bf16(sums[m][t], a[m][1], most);
          mma_bf16(sums[m][t], a[m][0], least);
          mma_bf16(sums[m][t], a[m][0], most);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
      for (int t = 0; t < 4; t++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int row = m * 16 + lane / 4 + i * 8, c = (warp * 4 + t) * 8 + lane % 4 * 2;
          *reinterpret_cast<Pack<float, 2>*>(result + row * ROW + c) = {{sums[m][t][i * 2], sums[m][t][i * 2 + 1]}};
        }
      }
    }
    split(turn ^ 1);
    // What the next chunk writes was read before this barrier.
    __syncthreads();
    if (n + CHUNK < end) fetch(n + 2 * CHUNK);
#pragma unroll
    for (int token = 0; token < MINE; token += TOKENS) {
      float sums[TOKENS][8];
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        const Pack<float, 4>* from =
            reinterpret_cast<const Pack<float, 4>*>(result + (warp * MINE + token + t) * ROW + lane * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) sums[t][i] = from[i / 4].at[i % 4];
      }
      for (int k = 0; k < choices; k += P) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          uint4 bits = held[i / P][i % P];
          u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            sums[i / P][2 * j] += __uint_as_float(words[j] << 16);
            sums[i / P][2 * j + 1] += __uint_as_float(words[j] & 0xffff0000u);
          }
        }
        if (k + P < choices) load(numbers, token, k + P);
        else if (token + TOKENS < MINE) load(numbers, token + TOKENS, 0);
        else load(next_numbers, 0, 0);
      }
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        int row = n + warp * MINE + token + t;
        if (row >= end || !wide) continue;
        Pack<bf16, 8>* to = reinterpret_cast<Pack<bf16, 8>*>(out + (i64)row * width + column);
        Pack<bf16, 8> sum;
        if (adds) sum = *to;
#pragma unroll
        for (int i = 0; i < 8; i++) sum.at[i] = to_bf16(adds ? to_f32(sum.at[i]) + sums[t][i] : sums[t][i]);
        *to = sum;
      }
    }
    numbers = next_numbers;
    next_numbers = numbers_of(n + 2 * CHUNK);
  }
}
#define COMBINE(S, CHUNK, TOKENS)                                                                                       \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                  \
      gate_combine_##S##_##TOKENS(const bf16* y, const int* slots, const float* d_logits, const float* gate, bf16* out, \
                                  int tokens, int choices, int experts, int width, int per_block, int adds) {           \
    after_previous();                                                                                                   \
    gate_combine<S, CHUNK, TOKENS>(y, slots, d_logits, gate, out, tokens, choices, experts, width, per_block, adds);    \
  }
COMBINE(1, 32, 4)
COMBINE(1, 32, 2)
COMBINE(1, 16, 1)
COMBINE(2, 16, 2)
COMBINE(2, 16, 1)
COMBINE(4, 16, 2)
COMBINE(4, 16, 1)

// dX += dLogits gate for the K * 16 experts from `first_expert` on: those that gate_combine has no room for. A warp owns 32 columns and keeps their weights in
// registers while tokens go by, 32 at a time, whose gradients the block has split into two terms in shared memory. Which column an accumulator
// stands for is chosen so that a lane has 8 neighbours: one access of 16 bytes per token. Blocks of 128 threads (128 columns, `per_block` tokens).
template <int K>
DEVICE void gate_dx(const float* d_logits, const float* gate, bf16* d_x, int tokens, int experts, int first_expert,
                    int width, int per_block) {
  constexpr int ROW = K * 16 + 8, PAIRS = K * 8, EACH = 32 * PAIRS / 128;
  __shared__ __align__(16) u32 terms[2][2][32][ROW / 2];  // [buffer][term][token][experts, two by two]
  int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  int base = blockIdx.x * 128 + threadIdx.x / 32 * 32;
  int start = blockIdx.y * per_block, end = start + per_block < tokens ? start + per_block : tokens;
  float next[EACH][2];
  auto fetch = [&](int n) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      int i = threadIdx.x + j * 128, row = n + i / PAIRS, e = first_expert + i % PAIRS * 2;
      next[j][0] = row < end && e < experts ? d_logits[(i64)row * experts + e] : 0.0f;
      next[j][1] = row < end && e + 1 < experts ? d_logits[(i64)row * experts + e + 1] : 0.0f;
    }
  };
  fetch(start);
  u32 weights[K][4][2][2];  // [step][tile][term][register]
#pragma unroll
  for (int k = 0; k < K; k++) {
#pragma unroll
    for (int t = 0; t < 4; t++) {
      int column = base + g / 2 * 8 + t * 2 + g % 2;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        int e = first_expert + k * 16 + c * 2 + r * 8;
        float low = e < experts && column < width ? gate[(i64)e * width + column] : 0.0f;
        float high = e + 1 < experts && column < width ? gate[(i64)(e + 1) * width + column] : 0.0f;
        u32 split[2];
        split2(low, high, split);
        weights[k][t][0][r] = split[0];
        weights[k][t][1][r] = split[1];
      }
    }
  }
  int column = base + c * 8;
  for (int n = start, turn = 0; n < end; n += 32, turn ^= 1) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      int i = threadIdx.x + j * 128;
      u32 split[2];
      split2(next[j][0], next[j][1], split);
      terms[turn][0][i / PAIRS][i % PAIRS] = split[0];
      terms[turn][1][i / PAIRS][i % PAIRS] = split[1];
    }
    // The buffer that the next turn writes was read before the barrier of this one.
    __syncthreads();
    if (n + 32 < end) fetch(n + 32);
    Pack<bf16, 8> held[2][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int row = n + i / 2 * 16 + i % 2 * 8 + g;
      if (row < end && column < width) {
        held[i / 2][i % 2] = *reinterpret_cast<const Pack<bf16, 8>*>(d_x + (i64)row * width + column);
      }
    }
    float sums[2][4][4];
#pragma unroll
    for (int i = 0; i < 32; i++) (&sums[0][0][0])[i] = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
      for (int m = 0; m < 2; m++) {
        u32 a[2][4];  // [term][register]
        int row = m * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
        for (int i = 0; i < 2; i++) load_matrices(a[i], &terms[turn][i][row][k * 8 + lane / 16 * 4]);
#pragma unroll
        for (int t = 0; t < 4; t++) {
          mma_bf16(sums[m][t], a[1], weights[k][t][0]);
          mma_bf16(sums[m][t], a[0], weights[k][t][1]);
          mma_bf16(sums[m][t], a[0], weights[k][t][0]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int row = n + i / 2 * 16 + i % 2 * 8 + g;
      if (row >= end || column >= width) continue;
      Pack<bf16, 8> out;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        out.at[j] = to_bf16(to_f32(held[i / 2][i % 2].at[j]) + sums[i / 2][j / 2][i % 2 * 2 + j % 2]);
      }
      *reinterpret_cast<Pack<bf16, 8>*>(d_x + (i64)row * width + column) = out;
    }
  }
}
#define GATE_DX(K)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(128)                                                                    \
      gate_dx_##K(const float* d_logits, const float* gate, bf16* d_x, int tokens, int experts, int first_expert,     \
                  int width, int per_block) {                                                                \
    after_previous();                                                                                                  \
    gate_dx<K>(d_logits, gate, d_x, tokens, experts, first_expert, width, per_block);                            \
  }
GATE_DX(1)
GATE_DX(2)
GATE_DX(4)

// All experts for 4 tokens and one column per thread; blocks of 128 threads (4 tokens, 128 columns).
template <typename X>
DEVICE void combine_plain(const X* y, const int* slots, const float* d_logits, const float* gate, X* out, i64 tokens,
                          int choices, int experts, int width, int adds) {
  int d = blockIdx.y * 128 + threadIdx.x;
  i64 first = (i64)blockIdx.x * 4;
  if (d >= width) return;
  float sums[4] = {0, 0, 0, 0};
  for (int e = 0; e < experts; e++) {
    float w = gate[(i64)e * width + d];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (first + i < tokens) sums[i] += d_logits[(first + i) * experts + e] * w;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (first + i >= tokens) continue;
    for (int k = 0; k < choices; k++) {
      int slot = slots[(first + i) * choices + k];
      if (slot >= 0) sums[i] += to_f32(y[(i64)slot * width + d]);
    }
    X* at = out + (first + i) * width + d;
    *at = from_f32<X>((adds ? to_f32(*at) : 0.0f) + sums[i]);
  }
}
#define COMBINE_PLAIN(NAME, X)                                                                                        \
  extern "C" __global__ void gate_combine_plain_##NAME(const X* y, const int* slots, const float* d_logits,           \
                                                       const float* gate, X* out, i64 tokens, int choices,           \
                                                       int experts, int width, int adds) {                            \
    after_previous();                                                                                                 \
    combine_plain<X>(y, slots, d_logits, gate, out, tokens, choices, experts, width, adds);                           \
  }
COMBINE_PLAIN(f32, float)
COMBINE_PLAIN(bf16, bf16)
