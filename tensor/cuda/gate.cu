// The gate's products, between tokens x [N, D] (bf16, or f32) and f32 weights [E, D] of few experts: logits, and the weights' gradient (the tokens' is gate_combine.cu). With bf16
// tokens they are bound by reading them, so tensor cores do the arithmetic: an f32 number is the sum of three bf16 numbers (8 bits of its
// 24 each), the product of two bf16 numbers is exact in f32, and sums are f32. Other dtypes and widths take the plain kernels.

// Four floats as three terms of 8 bytes, `stride` bytes apart.
DEVICE void store_terms(u8* at, int stride, const Pack<float, 4>& from) {
  u32 low[3], high[3];
  split3(from.at[0], from.at[1], low);
  split3(from.at[2], from.at[3], high);
#pragma unroll
  for (int i = 0; i < 3; i++) *reinterpret_cast<uint2*>(at + i * stride) = make_uint2(low[i], high[i]);
}
// Waits until at most `groups` copies are in flight, 0 to 3.
DEVICE void copies_wait(int groups) {
  if (groups == 0) copy_async_wait<0>();
  else if (groups == 1) copy_async_wait<1>();
  else if (groups == 2) copy_async_wait<2>();
  else copy_async_wait<3>();
}

// Logits of the tokens of a block and T * 8 experts, over a share of the columns: blocks (tokens, experts, shares). Tokens and weights come in
// slices of C columns, `stages` of them in flight. While a slice is multiplied, the weights of the next one are split, by the thread that copied
// them. Of the 8 warps, WN share the experts, the others the tokens, M * 16 each. The block that finishes last adds the shares in their order;
// `counters` are zero before and after.
template <int T, int WN, int M, int C>
DEVICE void gate_tokens(const bf16* x, const float* gate, float* logits, float* shares, u32* counters, int tokens,
                        int experts, int width, int per_share, int stages) {
  constexpr int E = T * 8, N = T / WN, ROWS = 8 / WN * M * 16;
  constexpr int X_BYTES = ROWS * C * 2, W_BYTES = E * C * 4, TERM_BYTES = E * C * 2;
  constexpr int SETS = M * N < 8 ? 3 : 1;  // of sums, for enough products that do not wait for each other
  extern __shared__ __align__(128) u8 gate_shared[];
  u8 *weights = gate_shared + stages * X_BYTES, *terms = weights + stages * W_BYTES;  // [2][3][E][C] bf16
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int first = blockIdx.x * ROWS, first_expert = blockIdx.y * E;
  int start = blockIdx.z * per_share, end = start + per_share < width ? start + per_share : width;
  int slices = (end - start + C - 1) / C;
  // 16 bytes of eight rows that are read at once lie in different banks.
  auto fetch_weights = [&](int slice) {
    u8* to = weights + slice % stages * W_BYTES;
#pragma unroll
    for (int j = 0; j < E * C / 4 / 256; j++) {
      int i = threadIdx.x + j * 256, e = first_expert + i / (C / 4), column = start + slice * C + i % (C / 4) * 4;
      bool valid = e < experts && column < end;
      copy_async_16(to + i * 16, valid ? gate + (i64)e * width + column : gate, valid);
    }
  };
  auto split = [&](int slice) {
    const Pack<float, 4>* from = reinterpret_cast<const Pack<float, 4>*>(weights + slice % stages * W_BYTES);
    u8* to = terms + slice % 2 * 3 * TERM_BYTES;
#pragma unroll
    for (int j = 0; j < E * C / 4 / 256; j++) {
      int i = threadIdx.x + j * 256, e = i / (C / 4), piece = i % (C / 4);
      store_terms(to + e * C * 2 + ((piece / 2 ^ (e & 7)) << 4) + piece % 2 * 8, TERM_BYTES, from[i]);
    }
  };
  // A slice of tokens, and the weights of the next one.
  auto fetch = [&](int slice) {
    if (slice < slices) {
      u8* to = gate_shared + slice % stages * X_BYTES;
#pragma unroll
      for (int j = 0; j < ROWS * C / 8 / 256; j++) {
        int i = threadIdx.x + j * 256, row = i / (C / 8), piece = i % (C / 8), column = start + slice * C + piece * 8;
        bool valid = first + row < tokens && column < end;
        copy_async_16(to + row * C * 2 + ((piece ^ (row & 7)) << 4),
                      valid ? x + (i64)(first + row) * width + column : x, valid);
      }
      if (slice + 1 < slices) fetch_weights(slice + 1);
    }
    copy_async_commit();
  };
  float sums[M][N][4];
#pragma unroll
  for (int i = 0; i < M * N * 4; i++) (&sums[0][0][0])[i] = 0;
  fetch_weights(0);
  for (int s = 0; s < stages - 1; s++) fetch(s);
  copies_wait(stages - 2);
  split(0);
  int row = warp / WN * M * 16 + lane % 16, expert = warp % WN * N * 8 + lane % 8;
  for (int slice = 0; slice < slices; slice++) {
    copies_wait(stages - 2);
    __syncthreads();
    fetch(slice + stages - 1);
    if (slice + 1 < slices) split(slice + 1);
    const u8* xs = gate_shared + slice % stages * X_BYTES + row * C * 2;
    const u8* ws = terms + slice % 2 * 3 * TERM_BYTES + expert * C * 2;
    // Tensor cores cut sums off: they only see 64 columns, and f32 additions round to nearest.
#pragma unroll
    for (int part = 0; part < C / 64; part++) {
      float c[SETS][M][N][4];
#pragma unroll
      for (int i = 0; i < SETS * M * N * 4; i++) (&c[0][0][0][0])[i] = 0;
#pragma unroll
      for (int k = part * 8; k < part * 8 + 8; k += 4) {  // in pieces of 8 columns
        u32 a[2][M][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
          for (int m = 0; m < M; m++) {
            load_matrices(a[i][m], xs + m * 16 * C * 2 + ((k + i * 2 + lane / 16 ^ (row & 7)) << 4));
          }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
          for (int term = 2; term >= 0; term--) {
            u32 b[4];
            load_matrices(b, ws + term * TERM_BYTES + n * 8 * C * 2 + ((k + lane / 8 ^ (lane & 7)) << 4));
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
              for (int m = 0; m < M; m++) mma_bf16(c[term % SETS][m][n], a[i][m], b + i * 2);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < M * N * 4; i++) {
        float sum = (&c[0][0][0][0])[i];
        if (SETS == 3) sum += (&c[1 % SETS][0][0][0])[i] + (&c[2 % SETS][0][0][0])[i];
        (&sums[0][0][0])[i] += sum;
      }
    }
  }
  copy_async_wait<0>();
  int count = gridDim.z;
  if (count > 1) {
    constexpr int SIZE = M * N * 4;
    int tile = blockIdx.y * gridDim.x + blockIdx.x;
    float* all = shares + (i64)tile * count * SIZE * 256 + threadIdx.x;
    float* mine = all + (i64)blockIdx.z * SIZE * 256;
#pragma unroll
    for (int i = 0; i < SIZE; i++) __stcg(mine + i * 256, (&sums[0][0][0])[i]);
    __threadfence();
    __syncthreads();
    u32* finished = reinterpret_cast<u32*>(gate_shared);
    if (threadIdx.x == 0) {
      *finished = atomicAdd(&counters[tile], 1u);
      if (*finished == count - 1u) counters[tile] = 0;
    }
    __syncthreads();
    if (*finished != count - 1u) return;
    __threadfence();
    float own[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; i++) {
      own[i] = (&sums[0][0][0])[i];
      (&sums[0][0][0])[i] = 0;
    }
    for (int share = 0; share < count; share++) {
      const float* other = all + (i64)share * SIZE * 256;
      bool is_own = share == (int)blockIdx.z;
#pragma unroll
      for (int i = 0; i < SIZE; i++) (&sums[0][0][0])[i] += is_own ? own[i] : __ldcg(other + i * 256);
    }
  }
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = first + warp / WN * M * 16 + m * 16 + lane / 4 + i / 2 * 8;
        int e = first_expert + (warp % WN * N + n) * 8 + lane % 4 * 2 + i % 2;
        if (token < tokens && e < experts) logits[(i64)token * experts + e] = sums[m][n][i];
      }
    }
  }
}
#define GATE(T, WN, M, C)                                                                                             \
  extern "C" __global__ void __launch_bounds__(256, 1) \
      gate_##T(const bf16* x, const float* gate, float* logits, float* shares, u32* counters, int tokens,            \
               int experts, int width, int per_share, int stages) {                                                   \
    after_previous();                                                                                                 \
    gate_tokens<T, WN, M, C>(x, gate, logits, shares, counters, tokens, experts, width, per_share, stages);           \
  }
GATE(1, 1, 1, 128)
GATE(2, 1, 1, 128)
GATE(4, 2, 2, 64)
GATE(8, 2, 4, 64)

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
  after_previous();
  gate_plain<float>(x, gate, logits, tokens, experts, width);
}
extern "C" __global__ void gate_plain_bf16(const bf16* x, const float* gate, float* logits, i64 tokens, int experts,
                                           int width) {
  after_previous();
  gate_plain<bf16>(x, gate, logits, tokens, experts, width);
}

// parts[split][experts][width] = dLogitsᵀ x over the tokens of a split, for 256 columns and M * 16 experts per block: blocks (columns,
// experts, splits). Slices of 64 tokens pass through shared memory, `stages` of them in flight; while one is multiplied, the gradients of the
// next one are split, by the thread that copied them. Of the 8 warps, WE share the experts, the others the columns.
template <int M, int WE>
DEVICE void gate_dw(const float* d_logits, const bf16* x, float* parts, int tokens, int experts, int width,
                    int per_split, int stages) {
  constexpr int E = M * 16, T_ROW = (E + 8) * 2, TERM_BYTES = 64 * T_ROW;
  constexpr int X_BYTES = 64 * 512, L_BYTES = 64 * E * 4, MINE = M / WE, N = WE * 4;  // tiles of a warp: experts, 8 columns
  extern __shared__ __align__(128) u8 gate_shared[];
  u8 *gradients = gate_shared + stages * X_BYTES, *terms = gradients + stages * L_BYTES;  // [2][3][64][E + 8] bf16
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int first_column = blockIdx.x * 256, first_expert = blockIdx.y * E;
  int start = blockIdx.z * per_split, end = start + per_split < tokens ? start + per_split : tokens;
  int slices = (end - start + 63) / 64;
  auto fetch_gradients = [&](int slice) {
    u8* to = gradients + slice % stages * L_BYTES;
#pragma unroll
    for (int j = 0; j < M; j++) {
      int i = threadIdx.x + j * 256, token = start + slice * 64 + i / (4 * M), e = first_expert + i % (4 * M) * 4;
      bool valid = token < end && e < experts;
      copy_async_16(to + i * 16, valid ? d_logits + (i64)token * experts + e : d_logits, valid);
    }
  };
  auto split = [&](int slice) {
    const Pack<float, 4>* from = reinterpret_cast<const Pack<float, 4>*>(gradients + slice % stages * L_BYTES);
    u8* to = terms + slice % 2 * 3 * TERM_BYTES;
#pragma unroll
    for (int j = 0; j < M; j++) {
      int i = threadIdx.x + j * 256;
      store_terms(to + i / (4 * M) * T_ROW + i % (4 * M) * 8, TERM_BYTES, from[i]);
    }
  };
  // A slice of tokens, and the gradients of the next one.
  auto fetch = [&](int slice) {
    if (slice < slices) {
      u8* to = gate_shared + slice % stages * X_BYTES;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        int row = threadIdx.x / 32 + j * 8, piece = lane, token = start + slice * 64 + row;
        bool valid = token < end && first_column + piece * 8 < width;
        copy_async_16(to + row * 512 + ((piece ^ (row & 7)) << 4),
                      valid ? x + (i64)token * width + first_column + piece * 8 : x, valid);
      }
      if (slice + 1 < slices) fetch_gradients(slice + 1);
    }
    copy_async_commit();
  };
  float sums[MINE][N][4];
#pragma unroll
  for (int i = 0; i < MINE * N * 4; i++) (&sums[0][0][0])[i] = 0;
  fetch_gradients(0);
  for (int s = 0; s < stages - 1; s++) fetch(s);
  copies_wait(stages - 2);
  split(0);
  int base = warp / WE * N * 8;  // first column of the warp
  for (int slice = 0; slice < slices; slice++) {
    copies_wait(stages - 2);
    __syncthreads();
    fetch(slice + stages - 1);
    if (slice + 1 < slices) split(slice + 1);
    const u8* xs = gate_shared + slice % stages * X_BYTES;
    const u8* ls = terms + slice % 2 * 3 * TERM_BYTES + warp % WE * MINE * 32;
    float c[MINE][N][4];
#pragma unroll
    for (int i = 0; i < MINE * N * 4; i++) (&c[0][0][0])[i] = 0;
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      u32 b[N / 2][4];
#pragma unroll
      for (int n = 0; n < N / 2; n++) {
        int row = k + lane % 16, piece = base / 8 + n * 2 + lane / 16;
        load_matrices_transposed(b[n], xs + row * 512 + ((piece ^ (row & 7)) << 4));
      }
#pragma unroll
      for (int m = 0; m < MINE; m++) {
#pragma unroll
        for (int term = 2; term >= 0; term--) {
          // Stored by token: transposed, its registers are (experts, tokens) low-low, high-low, low-high, high-high.
          u32 a[4];
          int row = k + lane / 16 * 8 + lane % 8;
          load_matrices_transposed(a, ls + term * TERM_BYTES + row * T_ROW + m * 32 + lane / 8 % 2 * 16);
#pragma unroll
          for (int n = 0; n < N; n++) mma_bf16(c[m][n], a, b[n / 2] + n % 2 * 2);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < MINE * N * 4; i++) (&sums[0][0][0])[i] += (&c[0][0][0])[i];
  }
  copy_async_wait<0>();
#pragma unroll
  for (int m = 0; m < MINE; m++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int e = first_expert + (warp % WE * MINE + m) * 16 + lane / 4 + i * 8;
        int column = first_column + base + n * 8 + lane % 4 * 2;
        if (e >= experts || column >= width) continue;
        float* to = parts + ((i64)blockIdx.z * experts + e) * width + column;
        *reinterpret_cast<Pack<float, 2>*>(to) = {{sums[m][n][i * 2], sums[m][n][i * 2 + 1]}};
      }
    }
  }
}
#define GATE_DW(M, WE)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 1) gate_dw_##M(const float* d_logits, const bf16* x,           \
                                                                float* parts, int tokens, int experts,          \
                                                                int width, int per_split, int stages) {         \
    after_previous();                                                                                           \
    gate_dw<M, WE>(d_logits, x, parts, tokens, experts, width, per_split, stages);                               \
  }
GATE_DW(1, 1)
GATE_DW(2, 1)
GATE_DW(4, 2)

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
  after_previous();
  gate_dw_plain<float>(d_logits, x, parts, tokens, experts, width, per_split);
}
extern "C" __global__ void gate_dw_plain_bf16(const float* d_logits, const bf16* x, float* parts, int tokens,
                                              int experts, int width, int per_split) {
  after_previous();
  gate_dw_plain<bf16>(d_logits, x, parts, tokens, experts, width, per_split);
}

// dGate += the parts of all splits, in order.
extern "C" __global__ void gate_dw_sum(const float* parts, float* d_gate, i64 size, int splits) {
  after_previous();
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < splits; s++) sum += parts[s * size + i];
  d_gate[i] += sum;
}
