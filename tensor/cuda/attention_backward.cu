// Gradient of causal attention on tensor cores, bf16. Probabilities are made again from the saved log-sum-exp, in two kernels: one with a
// tile of queries that goes through the keys (dQ), one with a tile of keys that goes through the queries (dK, dV). So every sum stays in
// the registers of one warp, in a fixed order, and no gradient passes through memory in parts. The first also leaves what the second
// needs of each row: (log-sum-exp times log2(e), delta = dOut . out), [H, slots], NO_ROW and 0 in the places past a sequence's end.

struct alignas(8) RowStatistics {
  float lse, delta;
};

// dQ = scale dS K for dS = P (dOut Vᵀ - delta), P = 2^(scale log2(e) Q Kᵀ - lse). M: tiles of 16 rows per warp; SUB: keys at a time.
template <int C, int WARPS, int M, int SUB>
DEVICE void attention_queries(const bf16* d_out, const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* lse, bf16* dq,
                              RowStatistics* statistics, const Tile* tiles, int slots, int H, int G, int width, float scale) {
  constexpr int CHUNKS = C / 8, ROWS = WARPS * 16 * M, KEYS = 64, THREADS = WARPS * 32;
  extern __shared__ uint4 shared[];
  uint4 *q_tile = shared, *d_tile = shared + ROWS * CHUNKS, *stages = shared + 2 * ROWS * CHUNKS;
  Tile tile = tiles[blockIdx.x / H];
  int h = blockIdx.x % H, g = h / (H / G), lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  i64 q_stride = (i64)H * width, k_stride = (i64)G * width;
  const bf16* keys = k + tile.start * k_stride + g * width;
  const bf16* values = v + tile.start * k_stride + g * width;
  int rows = min(ROWS, tile.length - tile.first), block = (tile.first + rows - 1) / KEYS;
  float power = scale * LOG2_E;

  auto copy = [&](int block, int stage) {
    uint4* to = stages + stage * 2 * KEYS * CHUNKS;
    int first = block * KEYS;
    copy_tile<KEYS, CHUNKS, THREADS>(to, keys + first * k_stride, k_stride, tile.length - first, width);
    copy_tile<KEYS, CHUNKS, THREADS>(to + KEYS * CHUNKS, values + first * k_stride, k_stride, tile.length - first, width);
    copy_async_commit();
  };
  i64 offset = (tile.start + tile.first) * q_stride + h * width;
  uint4* o_tile = stages + 2 * KEYS * CHUNKS;  // the second stage, as yet unused
  static_assert(ROWS <= 2 * KEYS, "the output must fit in a stage");
  copy_tile<ROWS, CHUNKS, THREADS>(q_tile, q + offset, q_stride, rows, width);
  copy_tile<ROWS, CHUNKS, THREADS>(d_tile, d_out + offset, q_stride, rows, width);
  copy_tile<ROWS, CHUNKS, THREADS>(o_tile, out + offset, q_stride, rows, width);
  copy(block, 0);
  copy_async_wait<0>();
  __syncthreads();

  u32 queries[C / 16][M][4], downs[C / 16][M][4];
  float sums[M][CHUNKS][4], base[2 * M], delta[2 * M];
#pragma unroll
  for (int r = 0; r < 2 * M; r++) delta[r] = 0;
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int c = 0; c < C / 16; c++) {
      u32 outs[4];
      load_left<CHUNKS>(queries[c][m], q_tile, row + m * 16, c);
      load_left<CHUNKS>(downs[c][m], d_tile, row + m * 16, c);
      load_left<CHUNKS>(outs, o_tile, row + m * 16, c);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        delta[2 * m + i % 2] += to_f32(bf16{(u16)outs[i]}) * to_f32(bf16{(u16)downs[c][m][i]}) +
                                to_f32(bf16{(u16)(outs[i] >> 16)}) * to_f32(bf16{(u16)(downs[c][m][i] >> 16)});
      }
    }
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0;
  }
#pragma unroll
  for (int r = 0; r < 2 * M; r++) {
    delta[r] += __shfl_xor_sync(0xffffffffu, delta[r], 1);
    delta[r] += __shfl_xor_sync(0xffffffffu, delta[r], 2);
    int at = row + r * 8 + lane / 4;
    base[r] = at < rows ? lse[(i64)(tile.start + tile.first + at) * H + h] * LOG2_E : NO_ROW;
    if (lane % 4 == 0) statistics[(i64)h * slots + tile.slot + at] = RowStatistics{base[r], delta[r]};
  }

  for (int stage = 0; block >= 0; block--, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();
    if (block > 0) copy(block - 1, stage ^ 1);
    const uint4 *k_tile = stages + stage * 2 * KEYS * CHUNKS, *v_tile = k_tile + KEYS * CHUNKS;
#pragma unroll
    for (int sub = 0; sub < KEYS; sub += SUB) {
      int ahead = block * KEYS + sub - (tile.first + row);  // of the first key, of the warp's first query
      if (ahead >= 16 * M) break;
      float p[M][SUB / 8][4], ds[M][SUB / 8][4];
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < SUB / 8; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) p[m][n][i] = ds[m][n][i] = 0;
        }
      }
#pragma unroll
      for (int c = 0; c < C / 16; c++) {
#pragma unroll
        for (int n = 0; n < SUB / 16; n++) {
          u32 right[4];
          load_right_rows<CHUNKS>(right, k_tile, sub + n * 16, c);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma_bf16(p[m][2 * n], queries[c][m], right);
            mma_bf16(p[m][2 * n + 1], queries[c][m], right + 2);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < C / 16; c++) {
#pragma unroll
        for (int n = 0; n < SUB / 16; n++) {
          u32 right[4];
          load_right_rows<CHUNKS>(right, v_tile, sub + n * 16, c);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma_bf16(ds[m][2 * n], downs[c][m], right);
            mma_bf16(ds[m][2 * n + 1], downs[c][m], right + 2);
          }
        }
      }
      bool diagonal = ahead + SUB > 1;
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < SUB / 8; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float score = fmaf(p[m][n][i], power, -base[2 * m + i / 2]);
            if (diagonal && ahead + n * 8 + lane % 4 * 2 + i % 2 > m * 16 + lane / 4 + i / 2 * 8) score = MASKED;
            ds[m][n][i] = exp2_fast(score) * (ds[m][n][i] - delta[2 * m + i / 2]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < SUB / 16; n++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) as_left(left[m], ds[m][2 * n], ds[m][2 * n + 1]);
#pragma unroll
        for (int c = 0; c < C / 16; c++) {
          u32 right[4];
          load_right_columns<CHUNKS>(right, k_tile, sub + n * 16, c);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma_bf16(sums[m][2 * c], left[m], right);
            mma_bf16(sums[m][2 * c + 1], left[m], right + 2);
          }
        }
      }
    }
  }
  float factors[2 * M];
#pragma unroll
  for (int r = 0; r < 2 * M; r++) factors[r] = scale;
  store_rows<M, C>(q_tile, row, sums, factors, dq + offset, q_stride, rows, width);
}

// dV = Pᵀ dOut, dK = scale dSᵀ Q for a tile of keys, summed over the query heads of its group. Products are taken transposed, keys as rows,
// so that Pᵀ and dSᵀ become left operands without leaving their registers.
template <int C, int WARPS, int M, int SUB>
DEVICE void attention_keys(const bf16* d_out, const bf16* q, const bf16* k, const bf16* v, bf16* dk, bf16* dv,
                           const RowStatistics* statistics, const Tile* tiles, int slots, int H, int G, int width, float scale) {
  constexpr int CHUNKS = C / 8, ROWS = WARPS * 16 * M, QUERIES = 64, THREADS = WARPS * 32, STAGE = 2 * QUERIES * CHUNKS + QUERIES / 2;
  extern __shared__ uint4 shared[];
  uint4 *k_tile = shared, *v_tile = shared + ROWS * CHUNKS, *stages = shared + 2 * ROWS * CHUNKS;
  Tile tile = tiles[blockIdx.x / G];
  int g = blockIdx.x % G, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  i64 q_stride = (i64)H * width, k_stride = (i64)G * width;
  int rows = min(ROWS, tile.length - tile.first);
  int first = tile.first / QUERIES, last = (tile.length - 1) / QUERIES, heads = H / G;
  float power = scale * LOG2_E;

  auto copy = [&](int head, int block, int stage) {
    int h = g * heads + head, from = block * QUERIES;
    uint4* to = stages + stage * STAGE;
    i64 offset = (tile.start + from) * q_stride + h * width;
    copy_tile<QUERIES, CHUNKS, THREADS>(to, q + offset, q_stride, tile.length - from, width);
    copy_tile<QUERIES, CHUNKS, THREADS>(to + QUERIES * CHUNKS, d_out + offset, q_stride, tile.length - from, width);
    if (threadIdx.x < QUERIES / 2) {
      const RowStatistics* row = statistics + (i64)h * slots + tile.slot - tile.first + from + 2 * threadIdx.x;
      copy_async_16(to + 2 * QUERIES * CHUNKS + threadIdx.x, row, true);
    }
    copy_async_commit();
  };
  i64 offset = (tile.start + tile.first) * k_stride + g * width;
  copy_tile<ROWS, CHUNKS, THREADS>(k_tile, k + offset, k_stride, rows, width);
  copy_tile<ROWS, CHUNKS, THREADS>(v_tile, v + offset, k_stride, rows, width);
  copy(0, first, 0);

  float dk_sums[M][CHUNKS][4], dv_sums[M][CHUNKS][4];
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) dk_sums[m][n][i] = dv_sums[m][n][i] = 0;
    }
  }
  int stage = 0, block = first;
  for (int head = 0; head < heads;) {
    copy_async_wait<0>();
    __syncthreads();
    const uint4 *q_tile = stages + stage * STAGE, *d_tile = q_tile + QUERIES * CHUNKS;
    const float4* of_rows = (const float4*)(d_tile + QUERIES * CHUNKS);
    int from = block * QUERIES;
    if (++block > last) block = first, head++;
    stage ^= 1;
    if (head < heads) copy(head, block, stage);
#pragma unroll
    for (int sub = 0; sub < QUERIES; sub += SUB) {
      int behind = from + sub - (tile.first + row);  // of the first query, of the warp's first key
      if (behind + SUB <= 0) continue;
      float p[M][SUB / 8][4], ds[M][SUB / 8][4];
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < SUB / 8; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) p[m][n][i] = ds[m][n][i] = 0;
        }
      }
#pragma unroll
      for (int c = 0; c < C / 16; c++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) load_left<CHUNKS>(left[m], k_tile, row + m * 16, c);
#pragma unroll
        for (int n = 0; n < SUB / 16; n++) {
          u32 right[4];
          load_right_rows<CHUNKS>(right, q_tile, sub + n * 16, c);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma_bf16(p[m][2 * n], left[m], right);
            mma_bf16(p[m][2 * n + 1], left[m], right + 2);
          }
        }
      }
      bool diagonal = behind < 16 * M - 1;
#pragma unroll
      for (int n = 0; n < SUB / 8; n++) {
        float4 pair = of_rows[sub / 2 + n * 4 + lane % 4];  // of two queries
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float score = fmaf(p[m][n][i], power, -(i % 2 ? pair.z : pair.x));
            if (diagonal && m * 16 + lane / 4 + i / 2 * 8 > behind + n * 8 + lane % 4 * 2 + i % 2) score = MASKED;
            p[m][n][i] = exp2_fast(score);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < SUB / 16; n++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) as_left(left[m], p[m][2 * n], p[m][2 * n + 1]);
#pragma unroll
        for (int c = 0; c < C / 16; c++) {
          u32 right[4];
          load_right_columns<CHUNKS>(right, d_tile, sub + n * 16, c);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma_bf16(dv_sums[m][2 * c], left[m], right);
            mma_bf16(dv_sums[m][2 * c + 1], left[m], right + 2);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < C / 16; c++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) load_left<CHUNKS>(left[m], v_tile, row + m * 16, c);
#pragma unroll
        for (int n = 0; n < SUB / 16; n++) {
          u32 right[4];
          load_right_rows<CHUNKS>(right, d_tile, sub + n * 16, c);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma_bf16(ds[m][2 * n], left[m], right);
            mma_bf16(ds[m][2 * n + 1], left[m], right + 2);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < SUB / 8; n++) {
        float4 pair = of_rows[sub / 2 + n * 4 + lane % 4];
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
          for (int i = 0; i < 4; i++) ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - (i % 2 ? pair.w : pair.y));
        }
      }
#pragma unroll
      for (int n = 0; n < SUB / 16; n++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) as_left(left[m], ds[m][2 * n], ds[m][2 * n + 1]);
#pragma unroll
        for (int c = 0; c < C / 16; c++) {
          u32 right[4];
          load_right_columns<CHUNKS>(right, q_tile, sub + n * 16, c);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma_bf16(dk_sums[m][2 * c], left[m], right);
            mma_bf16(dk_sums[m][2 * c + 1], left[m], right + 2);
          }
        }
      }
    }
  }
  float one[2 * M], factors[2 * M];
#pragma unroll
  for (int r = 0; r < 2 * M; r++) one[r] = 1, factors[r] = scale;
  store_rows<M, C>(k_tile, row, dk_sums, factors, dk + offset, k_stride, rows, width);
  store_rows<M, C>(v_tile, row, dv_sums, one, dv + offset, k_stride, rows, width);
}

// `small` has the tiles that fit where a block may have 99 KiB of shared memory.
#define BACKWARD(NAME, C, BLOCKS, QW, QM, QSUB, KW, KM, KSUB)                                                                              \
  extern "C" __global__ void __launch_bounds__(QW * 32, BLOCKS) attention_queries_##NAME(                                                  \
      const bf16* d_out, const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* lse, bf16* dq, RowStatistics* rows,    \
      const Tile* tiles, int slots, int H, int G, int width, float scale) {                                                                \
    after_previous();                                                                                                                      \
    attention_queries<C, QW, QM, QSUB>(d_out, q, k, v, out, lse, dq, rows, tiles, slots, H, G, width, scale);                              \
  }                                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(KW * 32, BLOCKS) attention_keys_##NAME(                                                     \
      const bf16* d_out, const bf16* q, const bf16* k, const bf16* v, bf16* dk, bf16* dv, const RowStatistics* rows, const Tile* tiles,    \
      int slots, int H, int G, int width, float scale) {                                                                                   \
    after_previous();                                                                                                                      \
    attention_keys<C, KW, KM, KSUB>(d_out, q, k, v, dk, dv, rows, tiles, slots, H, G, width, scale);                                       \
  }
BACKWARD(32, 32, 2, 4, 2, 32, 4, 2, 32)
BACKWARD(64, 64, 2, 4, 2, 32, 4, 2, 32)
BACKWARD(96, 96, 1, 8, 1, 32, 8, 1, 32)
BACKWARD(128, 128, 1, 8, 1, 64, 8, 1, 64)
BACKWARD(96_small, 96, 2, 4, 1, 32, 4, 1, 32)
BACKWARD(128_small, 128, 2, 4, 1, 32, 4, 1, 32)
