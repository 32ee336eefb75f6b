// Causal attention on tensor cores, bf16: a block has a tile of queries of one head and goes through the keys from the diagonal down with a
// running maximum and sum, so that nothing of the size of the score matrix exists. Not here: other types and widths (attention_general.cu).

// M: tiles of 16 rows per warp. Scores are kept times log2(e) / sqrt(C), so that probabilities are powers of two.
template <int C, int WARPS, int M, int KEYS>
DEVICE void attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const Tile* tiles, int H, int G,
                              int width, float scale) {
  constexpr int CHUNKS = C / 8, ROWS = WARPS * 16 * M, THREADS = WARPS * 32;
  constexpr bool RESIDENT = C * M <= 128;  // queries stay in registers
  extern __shared__ uint4 shared[];
  uint4 *q_tile = shared, *stages = shared + ROWS * CHUNKS;
  Tile tile = tiles[blockIdx.x / H];
  int h = blockIdx.x % H, g = h / (H / G), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int row = warp * 16 * M;  // of the warp, in the tile
  i64 q_stride = (i64)H * width, k_stride = (i64)G * width;
  const bf16* keys = k + tile.start * k_stride + g * width;
  const bf16* values = v + tile.start * k_stride + g * width;
  int rows = min(ROWS, tile.length - tile.first), block = (tile.first + rows - 1) / KEYS;

  auto copy = [&](int block, int stage) {
    uint4* to = stages + stage * 2 * KEYS * CHUNKS;
    int first = block * KEYS;
    copy_tile<KEYS, CHUNKS, THREADS>(to, keys + first * k_stride, k_stride, tile.length - first, width);
    copy_tile<KEYS, CHUNKS, THREADS>(to + KEYS * CHUNKS, values + first * k_stride, k_stride, tile.length - first, width);
    copy_async_commit();
  };
  i64 offset = (tile.start + tile.first) * q_stride + h * width;
  copy_tile<ROWS, CHUNKS, THREADS>(q_tile, q + offset, q_stride, rows, width);
  copy(block, 0);

  float sums[M][CHUNKS][4], most[2 * M], total[2 * M];
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0;
    most[2 * m] = most[2 * m + 1] = MASKED;
    total[2 * m] = total[2 * m + 1] = 0;
  }
  u32 queries[RESIDENT ? C / 16 : 1][M][4];
  if (RESIDENT) {
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int c = 0; c < C / 16; c++) {
#pragma unroll
      for (int m = 0; m < M; m++) load_left<CHUNKS>(queries[RESIDENT ? c : 0][m], q_tile, row + m * 16, c);
    }
  }

  for (int stage = 0; block >= 0; block--, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this stage has come, and the other has been read by all
    if (block > 0) copy(block - 1, stage ^ 1);
    int ahead = block * KEYS - (tile.first + row);  // of the first key, of the warp's first query
    if (ahead >= 16 * M) continue;                  // nothing below the diagonal
    const uint4 *k_tile = stages + stage * 2 * KEYS * CHUNKS, *v_tile = k_tile + KEYS * CHUNKS;

    float scores[M][KEYS / 8][4];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) scores[m][n][0] = scores[m][n][1] = scores[m][n][2] = scores[m][n][3] = 0;
    }
#pragma unroll
    for (int c = 0; c < C / 16; c++) {
      u32 left[M][4];
#pragma unroll
      for (int m = 0; m < M && !RESIDENT; m++) load_left<CHUNKS>(left[m], q_tile, row + m * 16, c);
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) {
        u32 right[4];
        load_right_rows<CHUNKS>(right, k_tile, n * 16, c);
#pragma unroll
        for (int m = 0; m < M; m++) {
          const u32* a = RESIDENT ? queries[RESIDENT ? c : 0][m] : left[m];
          mma_bf16(scores[m][2 * n], a, right);
          mma_bf16(scores[m][2 * n + 1], a, right + 2);
        }
      }
    }
    if (ahead + KEYS > 1) {  // the diagonal runs through
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            if (ahead + n * 8 + lane % 4 * 2 + i % 2 > m * 16 + lane / 4 + i / 2 * 8) scores[m][n][i] = MASKED;
          }
        }
      }
    }

    bool grown = false;
    float factor[2 * M];
#pragma unroll
    for (int r = 0; r < 2 * M; r++) {
      float high = most[r];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) high = fmaxf(high, fmaxf(scores[r / 2][n][r % 2 * 2], scores[r / 2][n][r % 2 * 2 + 1]));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
      grown = grown || high > most[r];
      factor[r] = exp2_fast((most[r] - high) * scale);
      most[r] = high;
      float shift = high * scale, sum = 0;
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& score = scores[r / 2][n][r % 2 * 2 + i];
          score = exp2_fast(fmaf(score, scale, -shift));
          sum += score;
        }
      }
      total[r] = total[r] * factor[r] + sum;
    }
    if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < CHUNKS; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) sums[m][n][i] *= factor[2 * m + i / 2];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) {
      u32 left[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) as_left(left[m], scores[m][2 * n], scores[m][2 * n + 1]);
#pragma unroll
      for (int c = 0; c < C / 16; c++) {
        u32 right[4];
        load_right_columns<CHUNKS>(right, v_tile, n * 16, c);
#pragma unroll
        for (int m = 0; m < M; m++) {
          mma_bf16(sums[m][2 * c], left[m], right);
          mma_bf16(sums[m][2 * c + 1], left[m], right + 2);
        }
      }
    }
  }

  float inverse[2 * M];
#pragma unroll
  for (int r = 0; r < 2 * M; r++) {
    float sum = total[r] + __shfl_xor_sync(0xffffffffu, total[r], 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    inverse[r] = 1.0f / sum;
    int at = row + r * 8 + lane / 4;
    if (lane % 4 == 0 && at < rows) {
      lse[(i64)(tile.start + tile.first + at) * H + h] = (most[r] * scale + log2f(sum)) / LOG2_E;
    }
  }
  store_rows<M, C>(q_tile, row, sums, inverse, out + offset, q_stride, rows, width);
}

#define ATTENTION(NAME, C, WARPS, M, KEYS, BLOCKS)                                                                                        \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) attention_forward_##NAME(                                              \
      const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const Tile* tiles, int H, int G, int width, float scale) {      \
    after_previous();                                                                                                                     \
    attention_forward<C, WARPS, M, KEYS>(q, k, v, out, lse, tiles, H, G, width, scale);                                                   \
  }
ATTENTION(32, 32, 4, 2, 64, 2)
ATTENTION(64, 64, 4, 2, 64, 2)
ATTENTION(96, 96, 4, 2, 64, 2)
ATTENTION(128, 128, 4, 2, 64, 2)
