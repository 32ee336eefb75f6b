// The gate's products, between tokens x [N, D] (bf16, or f32) and f32 weights [E, D] of few experts: logits, and both gradients. With bf16
// tokens they are bound by reading them, so tensor cores do the arithmetic: an f32 number is the sum of three bf16 numbers (8 bits of its
// 24 each), the product of two bf16 numbers is exact in f32, and sums are f32. Other dtypes and widths take the plain kernels.

// Two floats as three pairs of bf16, whose sums they are.
DEVICE void split3(float low, float high, u32 out[3]) {
#pragma unroll
  for (int i = 0; i < 3; i++) {
    out[i] = pack_bf16(low, high);
    low -= __uint_as_float(out[i] << 16);
    high -= __uint_as_float(out[i] & 0xffff0000u);
  }
}
// The first two of them: 16 bits.
DEVICE void split2(float low, float high, u32 out[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    out[i] = pack_bf16(low, high);
    low -= __uint_as_float(out[i] << 16);
    high -= __uint_as_float(out[i] & 0xffff0000u);
  }
}

// The gate's weights as the tensor cores take them, for every 16 columns and 8 experts (step, tile): of each lane the first two terms, 16 bytes,
// then of each lane the third, 8 bytes. `tiles` tiles per step; zeros beyond experts and width. One thread per lane.
#define GATE_TILE_BYTES 768
extern "C" __global__ void gate_split(const float* gate, u8* out, int experts, int width, int tiles, int steps) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (i64)steps * tiles * 32) return;
  int lane = i % 32, tile = i / 32 % tiles, step = i / 32 / tiles;
  int expert = tile * 8 + lane / 4, column = step * 16 + lane % 4 * 2;
  float value[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int c = column + j % 2 + j / 2 * 8;
    value[j] = expert < experts && c < width ? gate[(i64)expert * width + c] : 0.0f;
  }
  u32 low[3], high[3];
  split3(value[0], value[1], low);
  split3(value[2], value[3], high);
  u8* at = out + ((i64)step * tiles + tile) * GATE_TILE_BYTES;
  reinterpret_cast<uint4*>(at)[lane] = make_uint4(low[0], high[0], low[1], high[1]);
  reinterpret_cast<uint2*>(at + 512)[lane] = make_uint2(low[2], high[2]);
}

// Logits of 64 tokens and T * 8 experts per block: tokens and split weights pass through shared memory in slices of 64 columns, S of them in
// flight. Of the 8 warps, two share the tokens and four the columns of a slice; their sums are added in order at the end.
template <int T, int S>
DEVICE void gate_tokens(const bf16* x, const u8* split, float* logits, int tokens, int experts, int width, int tiles) {
  constexpr int X_ROW = 72, E = T * 8;
  constexpr int X_BYTES = 64 * X_ROW * 2, STAGE = X_BYTES + 4 * T * GATE_TILE_BYTES;
  extern __shared__ __align__(16) u8 gate_shared[];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % 4, half = warp / 4;
  int first = blockIdx.x * 64, first_expert = blockIdx.y * E;
  int slices = (width + 63) / 64;
  auto fetch = [&](int slice) {
    u8* stage = gate_shared + (slice % S) * STAGE;
    if (slice < slices) {
      int column = slice * 64;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int i = threadIdx.x + j * 256, row = i / 8, c = i % 8 * 8;
        bool valid = first + row < tokens && column + c < width;
        copy_async_16(stage + (row * X_ROW + c) * 2, valid ? x + (i64)(first + row) * width + column + c : x, valid);
      }
      constexpr int UNITS = T * GATE_TILE_BYTES / 16;  // of 16 columns
      const u8* from = split + ((i64)slice * 4 * tiles + blockIdx.y * T) * GATE_TILE_BYTES;
      for (int i = threadIdx.x; i < 4 * UNITS; i += 256) {
        copy_async_16(stage + X_BYTES + i * 16, from + (i64)(i / UNITS) * tiles * GATE_TILE_BYTES + i % UNITS * 16, true);
      }
    }
    copy_async_commit();
  };
  float sums[2][T][4];
#pragma unroll
  for (int i = 0; i < 2 * T * 4; i++) (&sums[0][0][0])[i] = 0;
  for (int s = 0; s < S - 1; s++) fetch(s);
  for (int slice = 0; slice < slices; slice++) {
    copy_async_wait<S - 2>();
    __syncthreads();
    fetch(slice + S - 1);
    const u8* stage = gate_shared + (slice % S) * STAGE;
    const bf16* xs = reinterpret_cast<const bf16*>(stage);
    const u8* weights = stage + X_BYTES + part * T * GATE_TILE_BYTES;
    u32 a[2][4];
#pragma unroll
    for (int m = 0; m < 2; m++) {
      int row = half * 32 + m * 16 + lane / 8 % 2 * 8 + lane % 8, column = part * 16 + lane / 16 * 8;
      load_matrices(a[m], xs + row * X_ROW + column);
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
      uint4 most = reinterpret_cast<const uint4*>(weights + t * GATE_TILE_BYTES)[lane];
      uint2 least = reinterpret_cast<const uint2*>(weights + t * GATE_TILE_BYTES + 512)[lane];
      u32 b[3][2] = {{least.x, least.y}, {most.z, most.w}, {most.x, most.y}};
      // Tensor cores cut sums off: they only see one slice, and f32 additions round to nearest.
      float c[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
      for (int term = 0; term < 3; term++) {
#pragma unroll
        for (int m = 0; m < 2; m++) mma_bf16(c[m], a[m], b[term]);
      }
#pragma unroll
      for (int i = 0; i < 8; i++) sums[i / 4][t][i % 4] += c[i / 4][i % 4];
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  float* parts = reinterpret_cast<float*>(gate_shared);  // [4][64][E]
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int t = 0; t < T; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = half * 32 + m * 16 + lane / 4 + i / 2 * 8, column = t * 8 + lane % 4 * 2 + i % 2;
        parts[(part * 64 + row) * E + column] = sums[m][t][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * E; i += 256) {
    int row = i / E, expert = first_expert + i % E;
    if (first + row >= tokens || expert >= experts) continue;
    float sum = 0;
#pragma unroll
    for (int p = 0; p < 4; p++) sum += parts[p * 64 * E + i];
    logits[(i64)(first + row) * experts + expert] = sum;
  }
}
#define GATE(T, S)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256)                                                                   \
      gate_##T(const bf16* x, const u8* split, float* logits, int tokens, int experts, int width, int tiles) {        \
    gate_tokens<T, S>(x, split, logits, tokens, experts, width, tiles);                                               \
  }
GATE(1, 5)
GATE(2, 5)
GATE(4, 4)
GATE(8, 4)

// Logits of 4 tokens and 4 experts per warp. Blocks (32 tokens, 4 experts).
template <typename X>
DEVICE void gate_plain(const X* x, const float* gate, float* logits, i64 tokens, int experts, int width) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_expert = blockIdx.y * 4;
  i64 first = (i64)blockIdx.x * 32 + warp * 4;
  if (first >= tokens) return;
  float sums[4][4];
#pragma unroll
  for (int i = 0; i < 16; i++) sums[i / 4][i % 4] = 0;
  for (int d = lane; d < width; d += 32) {
    float from[4], to[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      from[i] = first + i < tokens ? to_f32(x[(first + i) * width + d]) : 0.0f;
      to[i] = first_expert + i < experts ? gate[(i64)(first_expert + i) * width + d] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) sums[i / 4][i % 4] += from[i / 4] * to[i % 4];
  }
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float sum = warp_sum(sums[i / 4][i % 4]);
    if (lane == 0 && first + i / 4 < tokens && first_expert + i % 4 < experts) {
      logits[(first + i / 4) * experts + first_expert + i % 4] = sum;
    }
  }
}
extern "C" __global__ void gate_plain_f32(const float* x, const float* gate, float* logits, i64 tokens, int experts,
                                          int width) {
  gate_plain<float>(x, gate, logits, tokens, experts, width);
}
extern "C" __global__ void gate_plain_bf16(const bf16* x, const float* gate, float* logits, i64 tokens, int experts,
                                           int width) {
  gate_plain<bf16>(x, gate, logits, tokens, experts, width);
}

// dX = dLogits gate, plus dX where `adds`, for the K * 16 experts from `first_expert` on. A warp owns 32 columns and keeps their weights in
// registers while tokens go by, 32 at a time, whose gradients the block has split into two terms in shared memory. Which column an accumulator
// stands for is chosen so that a lane has 8 neighbours: one access of 16 bytes per token. Blocks of 128 threads (128 columns, `per_block` tokens).
template <int K>
DEVICE void gate_dx(const float* d_logits, const float* gate, bf16* d_x, int tokens, int experts, int first_expert,
                    int width, int per_block, int adds) {
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
      if (adds && row < end && column < width) {
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
        float old = adds ? to_f32(held[i / 2][i % 2].at[j]) : 0.0f;
        out.at[j] = to_bf16(old + sums[i / 2][j / 2][i % 2 * 2 + j % 2]);
      }
      *reinterpret_cast<Pack<bf16, 8>*>(d_x + (i64)row * width + column) = out;
    }
  }
}
#define GATE_DX(K)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(128)                                                                    \
      gate_dx_##K(const float* d_logits, const float* gate, bf16* d_x, int tokens, int experts, int first_expert,     \
                  int width, int per_block, int adds) {                                                                \
    gate_dx<K>(d_logits, gate, d_x, tokens, experts, first_expert, width, per_block, adds);                            \
  }
GATE_DX(1)
GATE_DX(2)
GATE_DX(4)

// The same for 4 tokens and one column per thread; blocks of 128 threads (4 tokens, 128 columns).
template <typename X>
DEVICE void gate_dx_plain(const float* d_logits, const float* gate, X* d_x, i64 tokens, int experts, int width,
                          int adds) {
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
    X* at = d_x + (first + i) * width + d;
    *at = from_f32<X>((adds ? to_f32(*at) : 0.0f) + sums[i]);
  }
}
extern "C" __global__ void gate_dx_plain_f32(const float* d_logits, const float* gate, float* d_x, i64 tokens,
                                             int experts, int width, int adds) {
  gate_dx_plain<float>(d_logits, gate, d_x, tokens, experts, width, adds);
}
extern "C" __global__ void gate_dx_plain_bf16(const float* d_logits, const float* gate, bf16* d_x, i64 tokens,
                                              int experts, int width, int adds) {
  gate_dx_plain<bf16>(d_logits, gate, d_x, tokens, experts, width, adds);
}

// parts[split][experts][width] = dLogitsᵀ x over the tokens of a split, for 128 columns and M * 16 experts per block: blocks (columns,
// experts, splits). Slices of 64 tokens pass through shared memory, 3 in flight; four warps share the columns, two the tokens of a slice. The
// block splits a slice's gradients into three terms first.
template <int M>
DEVICE void gate_dw(const float* d_logits, const bf16* x, float* parts, int tokens, int experts, int width,
                    int per_split) {
  constexpr int X_ROW = 136, E = M * 16, S = 3, T_ROW = E + 8;
  constexpr int X_BYTES = 64 * X_ROW * 2, STAGE = X_BYTES + 64 * E * 4;
  extern __shared__ __align__(16) u8 gate_shared[];
  u8* terms = gate_shared + S * STAGE;  // [3][64][T_ROW] bf16
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % 4, half = warp / 4, g = lane / 4, c = lane % 4;
  int first_column = blockIdx.x * 128, first_expert = blockIdx.y * E;
  int start = blockIdx.z * per_split, end = start + per_split < tokens ? start + per_split : tokens;
  int slices = (end - start + 63) / 64;
  auto fetch = [&](int slice) {
    u8* stage = gate_shared + (slice % S) * STAGE;
    int first = start + slice * 64;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int i = threadIdx.x + j * 256, row = i / 16, column = i % 16 * 8;
      bool valid = slice < slices && first + row < end && first_column + column < width;
      copy_async_16(stage + (row * X_ROW + column) * 2,
                    valid ? x + (i64)(first + row) * width + first_column + column : x, valid);
    }
#pragma unroll
    for (int j = 0; j < M; j++) {
      int i = threadIdx.x + j * 256, row = i / (4 * M), e = i % (4 * M) * 4;
      bool valid = slice < slices && first + row < end && first_expert + e < experts;
      copy_async_16(stage + X_BYTES + (row * E + e) * 4,
                    valid ? d_logits + (i64)(first + row) * experts + first_expert + e : d_logits, valid);
    }
    copy_async_commit();
  };
  float sums[M][4][4];
#pragma unroll
  for (int i = 0; i < M * 16; i++) (&sums[0][0][0])[i] = 0;
  for (int s = 0; s < S - 1; s++) fetch(s);
  for (int slice = 0; slice < slices; slice++) {
    copy_async_wait<S - 2>();
    __syncthreads();
    fetch(slice + S - 1);
    const u8* stage = gate_shared + (slice % S) * STAGE;
    const bf16* xs = reinterpret_cast<const bf16*>(stage);
    const Pack<float, 4>* ls = reinterpret_cast<const Pack<float, 4>*>(stage + X_BYTES);
#pragma unroll
    for (int j = 0; j < M; j++) {
      int i = threadIdx.x + j * 256, row = i / (4 * M), e = i % (4 * M) * 4;
      Pack<float, 4> l = ls[i];
      u32 low[3], high[3];
      split3(l.at[0], l.at[1], low);
      split3(l.at[2], l.at[3], high);
#pragma unroll
      for (int k = 0; k < 3; k++) {
        *reinterpret_cast<uint2*>(terms + ((k * 64 + row) * T_ROW + e) * 2) = make_uint2(low[k], high[k]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int step = 0; step < 2; step++) {
      int first = half * 32 + step * 16;
      u32 b[2][4];
#pragma unroll
      for (int t = 0; t < 2; t++) {
        int row = first + lane / 8 % 2 * 8 + lane % 8, column = part * 32 + t * 16 + lane / 16 * 8;
        load_matrices_transposed(b[t], xs + row * X_ROW + column);
      }
#pragma unroll
      for (int m = 0; m < M; m++) {
        u32 a[3][4];
#pragma unroll
        for (int k = 0; k < 3; k++) {
          // Stored by token: transposed, its registers are (experts, tokens) low-low, high-low, low-high, high-high.
          int row = first + lane / 16 * 8 + lane % 8, e = m * 16 + lane / 8 % 2 * 8;
          load_matrices_transposed(a[k], terms + ((k * 64 + row) * T_ROW + e) * 2);
        }
#pragma unroll
        for (int k = 2; k >= 0; k--) {
#pragma unroll
          for (int t = 0; t < 4; t++) mma_bf16(sums[m][t], a[k], b[t / 2] + t % 2 * 2);
        }
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  float* other = reinterpret_cast<float*>(gate_shared);  // [E][128]: the sums of the second half of the tokens
#pragma unroll
  for (int turn = 1; turn >= 0; turn--) {
    if (half == turn) {
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
          int e = m * 16 + g + i % 4 / 2 * 8, column = part * 32 + i / 4 * 8 + c * 2 + i % 2;
          float sum = sums[m][i / 4][i % 4];
          if (turn == 1) {
            other[e * 128 + column] = sum;
          } else if (first_expert + e < experts && first_column + column < width) {
            parts[((i64)blockIdx.z * experts + first_expert + e) * width + first_column + column] =
                sum + other[e * 128 + column];
          }
        }
      }
    }
    __syncthreads();
  }
}
#define GATE_DW(M)                                                                                               \
  extern "C" __global__ void __launch_bounds__(256) gate_dw_##M(const float* d_logits, const bf16* x,           \
                                                                float* parts, int tokens, int experts,          \
                                                                int width, int per_split) {                     \
    gate_dw<M>(d_logits, x, parts, tokens, experts, width, per_split);                                           \
  }
GATE_DW(1)
GATE_DW(2)
GATE_DW(4)

// The same for one column and 8 experts per thread; blocks of 128 threads (128 columns, 8 experts, splits).
template <typename X>
DEVICE void gate_dw_plain(const float* d_logits, const X* x, float* parts, int tokens, int experts, int width,
                          int per_split) {
  int d = blockIdx.x * 128 + threadIdx.x, first_expert = blockIdx.y * 8;
  if (d >= width) return;
  int start = blockIdx.z * per_split, end = start + per_split < tokens ? start + per_split : tokens;
  float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int n = start; n < end; n++) {
    float value = to_f32(x[(i64)n * width + d]);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (first_expert + j < experts) sums[j] += value * d_logits[(i64)n * experts + first_expert + j];
    }
  }
#pragma unroll
  for (int j = 0; j < 8; j++) {
    int e = first_expert + j;
    if (e < experts) parts[((i64)blockIdx.z * experts + e) * width + d] = sums[j];
  }
}
extern "C" __global__ void gate_dw_plain_f32(const float* d_logits, const float* x, float* parts, int tokens,
                                             int experts, int width, int per_split) {
  gate_dw_plain<float>(d_logits, x, parts, tokens, experts, width, per_split);
}
extern "C" __global__ void gate_dw_plain_bf16(const float* d_logits, const bf16* x, float* parts, int tokens,
                                              int experts, int width, int per_split) {
  gate_dw_plain<bf16>(d_logits, x, parts, tokens, experts, width, per_split);
}

// dGate += the parts of all splits, in order.
extern "C" __global__ void gate_dw_sum(const float* parts, float* d_gate, i64 size, int splits) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < splits; s++) sum += parts[s * size + i];
  d_gate[i] += sum;
}
