// Grouped matrix products for any GPU from sm_80 on and any size: bf16 on tensor cores by mma.sync with a ring of stages that
// cp.async fills, f32 by plain multiply-adds. A persistent kernel; blocks find their tiles from the offsets on the device. Hopper's own
// instructions are in grouped_hopper.cu.

// --- bf16: tiles of 128 x 128 by 8 warps of 64 x 32.
constexpr int SIDE = 128;   // of a tile
constexpr int DEPTH = 32;   // of a stage, elements of the reduction
constexpr int STAGES = 4;
constexpr int OPERAND_BYTES = SIDE * DEPTH * 2;

// Offset of 16-byte piece (side / 8 or depth / 8) of an operand in a stage. With the reduction contiguous, 128 lines of 4 pieces, else 32 lines of
// 16; the exclusive or keeps eight lines that are read at once on different banks.
template <bool ALONG>
DEVICE int piece_offset(int line, int piece) {
  return ALONG ? (line * 4 + (piece ^ (line >> 1 & 3))) * 16 : (line * 16 + (piece ^ (line & 7))) * 16;
}

// Fills an operand's part of a stage from `first` = its element (0, 0) at a row stride of `stride`; side and depth beyond the ends become 0.
template <bool ALONG, bool ALIGNED>
DEVICE void load_operand(u8* to, const bf16* first, i64 stride, int sides, int depths) {
  for (int i = threadIdx.x; i < SIDE * DEPTH / 8; i += 256) {
    int line = ALONG ? i / 4 : i / 16, piece = ALONG ? i % 4 : i % 16;
    int lines = ALONG ? sides : depths, width = ALONG ? depths : sides;
    u8* at = to + piece_offset<ALONG>(line, piece);
    const bf16* from = first + line * stride + piece * 8;
    if (ALIGNED) {
      bool valid = line < lines && piece * 8 < width;
      copy_async_16(at, valid ? from : first, valid);
    } else {
      Pack<bf16, 8> eight;
      for (int j = 0; j < 8; j++) {
        bool valid = line < lines && piece * 8 + j < width;
        eight.at[j].bits = valid ? from[j].bits : 0;
      }
      *(Pack<bf16, 8>*)at = eight;
    }
  }
}

template <typename OUT>
DEVICE void store_pair(OUT* out, float a, float b, int left, float beta, bool aligned) {
  if (beta != 0) {
    a += beta * to_f32(out[0]);
    if (left > 1) b += beta * to_f32(out[1]);
  }
  if (aligned && left > 1) {
    Pack<OUT, 2> two = {{from_f32<OUT>(a), from_f32<OUT>(b)}};
    *(Pack<OUT, 2>*)out = two;
  } else {
    out[0] = from_f32<OUT>(a);
    if (left > 1) out[1] = from_f32<OUT>(b);
  }
}

template <int MODE, bool ALIGNED, typename OUT>
DEVICE void grouped_mma(const bf16* a, const bf16* b, const u64* weights, const int* offsets, int groups, OUT* out,
                        const u64* outs, int m_size, int n_size, int k_size, float beta) {
  constexpr bool A_ALONG = MODE != 2, B_ALONG = MODE == 0;
  extern __shared__ __align__(128) u8 ring[];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp / 4 * 64, warp_n = warp % 4 * 32;
  Walk<MODE, SIDE, SIDE> walk(offsets, nullptr, groups, m_size, n_size);
  Tile tile;
  for (int unit = blockIdx.x; walk.find(unit, tile); unit += gridDim.x) {
    int m = tile.m * SIDE, n = tile.n * SIDE, m_left = (MODE == 2 ? m_size : tile.rows) - m, n_left = n_size - n;
    int reduced = MODE == 2 ? tile.rows : k_size, steps = (reduced + DEPTH - 1) / DEPTH;
    const bf16* w = MODE == 2 ? b : (const bf16*)weights[tile.group];
    auto load = [&](int step) {
      if (step < steps) {
        int k = step * DEPTH;
        u8* to = ring + step % STAGES * 2 * OPERAND_BYTES;
        const bf16* a_first = MODE == 2 ? a + (i64)(tile.first_row + k) * m_size + m : a + (i64)(tile.first_row + m) * k_size + k;
        const bf16* b_first = MODE == 0 ? w + (i64)n * k_size + k
                              : MODE == 1 ? w + (i64)k * n_size + n
                                          : w + (i64)(tile.first_row + k) * n_size + n;
        load_operand<A_ALONG, ALIGNED>(to, a_first, MODE == 2 ? m_size : k_size, m_left, reduced - k);
        load_operand<B_ALONG, ALIGNED>(to + OPERAND_BYTES, b_first, MODE == 0 ? k_size : n_size, n_left, reduced - k);
      }
      copy_async_commit();
    };
    float sums[4][4][4];
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[i][j][e] = 0;
    __syncthreads();  // the last tile's stages have been read
    for (int step = 0; step < STAGES - 1; step++) load(step);
    for (int step = 0; step < steps; step++) {
      copy_async_wait<STAGES - 2>();
      __syncthreads();
      load(step + STAGES - 1);
      const u8* a_stage = ring + step % STAGES * 2 * OPERAND_BYTES;
      const u8* b_stage = a_stage + OPERAND_BYTES;
#pragma unroll
      for (int k = 0; k < DEPTH / 8; k += 2) {  // in pieces: 16 elements
        u32 a_part[4][4], b_part[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int at = warp_m + 16 * i;
          if (A_ALONG) load_matrices(a_part[i], a_stage + piece_offset<true>(at + lane % 16, k + lane / 16));
          else
            load_matrices_transposed(a_part[i],
                                     a_stage + piece_offset<false>(k * 8 + lane / 16 * 8 + lane % 8, at / 8 + lane / 8 % 2));
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
          int at = warp_n + 16 * j;
          if (B_ALONG) load_matrices(b_part[j], b_stage + piece_offset<true>(at + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
          else
            load_matrices_transposed(b_part[j],
                                     b_stage + piece_offset<false>(k * 8 + lane / 8 % 2 * 8 + lane % 8, at / 8 + lane / 16));
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) mma_bf16(sums[i][j], a_part[i], b_part[j / 2] + j % 2 * 2);
      }
    }
    OUT* to = MODE == 2 ? (OUT*)outs[tile.group] + (i64)m * n_size + n : out + (i64)(tile.first_row + m) * n_size + n;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int row = warp_m + 16 * i + 8 * half + lane / 4;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          int column = warp_n + 8 * j + lane % 4 * 2;
          if (row < m_left && column < n_left)
            store_pair(to + (i64)row * n_size + column, sums[i][j][2 * half], sums[i][j][2 * half + 1], n_left - column, beta,
                       ALIGNED);
        }
      }
  }
}

// --- f32: tiles of 64 x 64, 4 x 4 sums a thread.
template <int MODE>
DEVICE void grouped_f32(const float* a, const float* b, const u64* weights, const int* offsets, int groups, float* out,
                        const u64* outs, int m_size, int n_size, int k_size, float beta) {
  __shared__ float a_part[16][65], b_part[16][65];
  Walk<MODE, 64, 64> walk(offsets, nullptr, groups, m_size, n_size);
  Tile tile;
  int row = threadIdx.x / 16, column = threadIdx.x % 16;
  for (int unit = blockIdx.x; walk.find(unit, tile); unit += gridDim.x) {
    int m = tile.m * 64, n = tile.n * 64, m_left = (MODE == 2 ? m_size : tile.rows) - m, n_left = n_size - n;
    int reduced = MODE == 2 ? tile.rows : k_size;
    const float* w = MODE == 2 ? b : (const float*)weights[tile.group];
    float sums[4][4] = {};
    for (int k = 0; k < reduced; k += 16) {
      __syncthreads();
      for (int i = threadIdx.x; i < 16 * 64; i += 256) {
        // Neighbouring threads read neighbouring elements.
        int side = MODE == 2 ? i % 64 : i / 16, depth = MODE == 2 ? i / 64 : i % 16;
        bool valid = side < m_left && k + depth < reduced;
        i64 at = MODE == 2 ? (i64)(tile.first_row + k + depth) * m_size + m + side
                           : (i64)(tile.first_row + m + side) * k_size + k + depth;
        a_part[depth][side] = valid ? a[at] : 0;
        side = MODE == 0 ? i / 16 : i % 64, depth = MODE == 0 ? i % 16 : i / 64;
        valid = side < n_left && k + depth < reduced;
        at = MODE == 0   ? (i64)(n + side) * k_size + k + depth
             : MODE == 1 ? (i64)(k + depth) * n_size + n + side
                         : (i64)(tile.first_row + k + depth) * n_size + n + side;
        b_part[depth][side] = valid ? w[at] : 0;
      }
      __syncthreads();
      for (int depth = 0; depth < 16; depth++) {
        float x[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = a_part[depth][row + 16 * i], y[i] = b_part[depth][column + 16 * i];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) sums[i][j] += x[i] * y[j];
      }
    }
    float* to = MODE == 2 ? (float*)outs[tile.group] + (i64)m * n_size + n : out + (i64)(tile.first_row + m) * n_size + n;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int r = row + 16 * i, c = column + 16 * j;
        if (r < m_left && c < n_left) {
          float* at = to + (i64)r * n_size + c;
          *at = sums[i][j] + (beta != 0 ? beta * *at : 0);
        }
      }
  }
}

#define PARAMETERS(T)                                                                                                      \
  const T *a, const T *b, const u64 *weights, const int *offsets, int groups, void *out, const u64 *outs, int m_size,      \
      int n_size, int k_size, float beta
#define MMA(NAME, MODE, ALIGNED, OUT)                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) NAME(PARAMETERS(bf16)) {                                               \
    after_previous();                                                                                                      \
    grouped_mma<MODE, ALIGNED, OUT>(a, b, weights, offsets, groups, (OUT*)out, outs, m_size, n_size, k_size, beta);        \
  }
#define F32(NAME, MODE)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) NAME(PARAMETERS(float)) {                                              \
    after_previous();                                                                                                      \
    grouped_f32<MODE>(a, b, weights, offsets, groups, (float*)out, outs, m_size, n_size, k_size, beta);                    \
  }
MMA(grouped_0_bf16, 0, true, bf16)
MMA(grouped_1_bf16, 1, true, bf16)
MMA(grouped_2_bf16, 2, true, bf16)
MMA(grouped_2_bf16_f32, 2, true, float)
MMA(grouped_0_bf16_any, 0, false, bf16)
MMA(grouped_1_bf16_any, 1, false, bf16)
MMA(grouped_2_bf16_any, 2, false, bf16)
MMA(grouped_2_bf16_f32_any, 2, false, float)
F32(grouped_0_f32, 0)
F32(grouped_1_f32, 1)
F32(grouped_2_f32, 2)
