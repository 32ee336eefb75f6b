// Causal attention and its gradient on Hopper's tensor cores (sm_90a), bf16, heads of 64 and 128 columns: what attention.cu and
// attention_backward.cu compute, in the same order, with wgmma, which multiplies 64 rows of a warpgroup by a tile of shared memory at once
// and asynchronously. So the forward pass has the scores of the next keys computed while the last ones meet their values.

// A tile for wgmma: panels of 64 columns, rows of 128 bytes, pieces of 16 bytes shuffled by row (the 128-byte swizzle).
template <int ROWS, int C, int THREADS>
DEVICE void copy_panels(uint4* tile, const bf16* from, i64 stride, int rows, int width) {
#pragma unroll
  for (int i = 0; i < ROWS * C / 8 / THREADS; i++) {
    int index = threadIdx.x + i * THREADS, row = index / (C / 8), chunk = index % (C / 8);
    bool valid = row < rows;
    copy_async_16(tile + chunk / 8 * ROWS * 8 + row * 8 + ((chunk ^ row) & 7), valid ? from + row * stride + chunk * 8 : from, valid);
  }
}
// Rows contiguous in the reduction (K-major): groups of 8 rows are 1024 bytes apart; 16 columns further is 32 bytes on.
DEVICE u64 rows_descriptor(const uint4* at) {
  u32 address = (u32)__cvta_generic_to_shared(at);
  return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
DEVICE void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Copies have come to shared memory; makes them visible to wgmma. A barrier follows.
DEVICE void publish_copies() {
  copy_async_wait<0>();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// c = a b + (keep ? c : 0) with a 64 x 16 from registers (fragments as mma.m16n8k16's, a warp has 16 rows) and b 16 x 64 from shared memory;
// COLUMNS: b's columns, not its reduction, are contiguous. c[j] is the j-th 8 columns' accumulator of mma.m16n8k16.
template <int COLUMNS>
DEVICE void multiply(float (&c)[8][4], const u32 (&a)[4], u64 b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, %38; }"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),
        "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(COLUMNS));
}

// c = a b + (keep ? c : 0) with both from shared memory, rows contiguous in the reduction.
DEVICE void multiply_shared(float (&c)[8][4], u64 a, u64 b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),
        "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "l"(a), "l"(b), "r"(keep));
}

// GROUPS: warpgroups of a block, with 64 queries each. Scores are kept times log2(e) / sqrt(C).
template <int C, int GROUPS, int KEYS>
DEVICE void attention_forward_hopper(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const Tile* tiles, int H, int G,
                                     float scale) {
  constexpr int CHUNKS = C / 8, ROWS = GROUPS * 64, THREADS = GROUPS * 128, TILE = KEYS * CHUNKS, P = KEYS / 64;
  extern __shared__ __align__(1024) u8 shared[];
  uint4 *k_tiles = (uint4*)shared, *v_tiles = k_tiles + 2 * TILE, *q_tile = k_tiles + 4 * TILE;
  Tile tile = tiles[blockIdx.x / H];
  int h = blockIdx.x % H, g = h / (H / G), lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  i64 q_stride = (i64)H * C, k_stride = (i64)G * C;
  const bf16* keys = k + tile.start * k_stride + g * C;
  const bf16* values = v + tile.start * k_stride + g * C;
  int rows = min(ROWS, tile.length - tile.first), block = (tile.first + rows - 1) / KEYS;
  i64 offset = (tile.start + tile.first) * q_stride + h * C;

  auto copy = [&](uint4* to, const bf16* from, int block) {
    copy_panels<KEYS, C, THREADS>(to, from + block * KEYS * k_stride, k_stride, tile.length - block * KEYS, C);
  };
  copy_tile<ROWS, CHUNKS, THREADS>(q_tile, q + offset, q_stride, rows, C);
  copy(k_tiles, keys, block);
  copy_async_commit();
  copy(v_tiles, values, block);
  if (block > 0) copy(k_tiles + TILE, keys, block - 1);
  copy_async_commit();
  copy_async_wait<1>();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  u32 queries[C / 16][4], p[KEYS / 16][4];
  float sums[C / 64][8][4], scores[P][8][4], most[2] = {MASKED, MASKED}, total[2] = {0, 0};
#pragma unroll
  for (int c = 0; c < C / 16; c++) load_left<CHUNKS>(queries[c], q_tile, row, c);
#pragma unroll
  for (int c = 0; c < C / 64; c++) {
#pragma unroll
    for (int n = 0; n < 8; n++) sums[c][n][0] = sums[c][n][1] = sums[c][n][2] = sums[c][n][3] = 0;
  }
  auto score = [&](int stage) {  // starts scores = Q Kᵀ
    const uint4* k_tile = k_tiles + stage * TILE;
#pragma unroll
    for (int n = 0; n < P; n++) {
#pragma unroll
      for (int c = 0; c < C / 16; c++) {
        multiply<0>(scores[n], queries[c], rows_descriptor(k_tile + c / 4 * KEYS * 8 + n * 512 + c % 4 * 2), c > 0);
      }
    }
    multiply_commit();
  };
  float factor[2];
  auto soften = [&](int block) {  // masks the scores, makes probabilities of them and says by what older sums shrink
    int ahead = block * KEYS - (tile.first + row);
    if (ahead + KEYS > 1) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (ahead + n * 8 + lane % 4 * 2 + i % 2 > lane / 4 + i / 2 * 8) scores[n / 8][n % 8][i] = MASKED;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float high = most[r];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) high = fmaxf(high, fmaxf(scores[n / 8][n % 8][r * 2], scores[n / 8][n % 8][r * 2 + 1]));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
      factor[r] = exp2_fast((most[r] - high) * scale);
      most[r] = high;
      float shift = high == MASKED ? 0 : high * scale, sum = 0;  // a warpgroup may be above the diagonal altogether
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& score = scores[n / 8][n % 8][r * 2 + i];
          score = exp2_fast(fmaf(score, scale, -shift));
          sum += score;
        }
      }
      total[r] = total[r] * factor[r] + sum;
    }
  };
  auto pack = [&]() {
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) as_left(p[n], scores[n / 4][n % 4 * 2], scores[n / 4][n % 4 * 2 + 1]);
  };
  auto add_values = [&](int stage) {  // starts sums += P V
    const uint4* v_tile = v_tiles + stage * TILE;
#pragma unroll
    for (int c = 0; c < C / 64; c++) {
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) multiply<1>(sums[c], p[n], rows_descriptor(v_tile + c * KEYS * 8 + n * 128), 1);
    }
    multiply_commit();
  };

  multiply_begin();
  score(0);
  multiply_wait<0>();
  soften(block);
  pack();
  int stage = 0;
  for (; block > 0; block--, stage ^= 1) {
    publish_copies();
    __syncthreads();  // this step's values and the next one's keys have come; what they replace has been read
    copy(v_tiles + (stage ^ 1) * TILE, values, block - 1);
    if (block > 1) copy(k_tiles + stage * TILE, keys, block - 2);
    copy_async_commit();
    multiply_begin();
    score(stage ^ 1);
    add_values(stage);
    multiply_wait<1>();
    soften(block - 1);
    multiply_wait<0>();
#pragma unroll
    for (int c = 0; c < C / 64; c++) {
#pragma unroll
      for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums[c][n][i] *= factor[i / 2];
      }
    }
    pack();
  }
  publish_copies();
  __syncthreads();
  multiply_begin();
  add_values(stage);
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float sum = total[r] + __shfl_xor_sync(0xffffffffu, total[r], 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    inverse[r] = 1.0f / sum;
    int at = row + r * 8 + lane / 4;
    if (lane % 4 == 0 && at < rows) {
      lse[(i64)(tile.start + tile.first + at) * H + h] = (most[r] * scale + log2f(sum)) / LOG2_E;
    }
  }
  multiply_wait<0>();
  store_rows<1, C>(q_tile, row, (const float(*)[CHUNKS][4])sums, inverse, out + offset, q_stride, rows, C);
}

#define ATTENTION_HOPPER(NAME, C, GROUPS, KEYS, BLOCKS)                                                                                   \
  extern "C" __global__ void __launch_bounds__(GROUPS * 128, BLOCKS) attention_hopper_##NAME(                                             \
      const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const Tile* tiles, int H, int G, int width, float scale) {      \
    after_previous();                                                                                                                     \
    attention_forward_hopper<C, GROUPS, KEYS>(q, k, v, out, lse, tiles, H, G, scale);                                                     \
  }

struct alignas(8) RowStatistics {
  float lse, delta;
};

// dQ and the rows' statistics, as attention_queries in attention_backward.cu.
template <int C, int GROUPS>
DEVICE void attention_queries_hopper(const bf16* d_out, const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* lse,
                                     bf16* dq, RowStatistics* statistics, const Tile* tiles, int slots, int H, int G, float scale) {
  constexpr int CHUNKS = C / 8, ROWS = GROUPS * 64, KEYS = 64, THREADS = GROUPS * 128, TILE = KEYS * CHUNKS;
  extern __shared__ __align__(1024) u8 shared[];
  uint4 *stages = (uint4*)shared, *q_tile = stages + 4 * TILE, *d_tile = q_tile + ROWS * CHUNKS, *o_tile = stages + 2 * TILE;
  static_assert(ROWS <= 2 * KEYS, "the output must fit in a stage");
  Tile tile = tiles[blockIdx.x / H];
  int h = blockIdx.x % H, g = h / (H / G), lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  i64 q_stride = (i64)H * C, k_stride = (i64)G * C;
  const bf16* keys = k + tile.start * k_stride + g * C;
  const bf16* values = v + tile.start * k_stride + g * C;
  int rows = min(ROWS, tile.length - tile.first), block = (tile.first + rows - 1) / KEYS;
  float power = scale * LOG2_E;
  i64 offset = (tile.start + tile.first) * q_stride + h * C;

  auto copy = [&](int block, int stage) {
    uint4* to = stages + stage * 2 * TILE;
    i64 first = block * KEYS * k_stride;
    copy_panels<KEYS, C, THREADS>(to, keys + first, k_stride, tile.length - block * KEYS, C);
    copy_panels<KEYS, C, THREADS>(to + TILE, values + first, k_stride, tile.length - block * KEYS, C);
    copy_async_commit();
  };
  copy_tile<ROWS, CHUNKS, THREADS>(q_tile, q + offset, q_stride, rows, C);
  copy_tile<ROWS, CHUNKS, THREADS>(d_tile, d_out + offset, q_stride, rows, C);
  copy_tile<ROWS, CHUNKS, THREADS>(o_tile, out + offset, q_stride, rows, C);
  copy(block, 0);
  copy_async_wait<0>();
  __syncthreads();

  u32 queries[C / 16][4], downs[C / 16][4], left[4][4];
  float sums[C / 64][8][4], p[8][4], ds[8][4], base[2], delta[2] = {0, 0};
#pragma unroll
  for (int c = 0; c < C / 16; c++) {
    u32 outs[4];
    load_left<CHUNKS>(queries[c], q_tile, row, c);
    load_left<CHUNKS>(downs[c], d_tile, row, c);
    load_left<CHUNKS>(outs, o_tile, row, c);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      delta[i % 2] += to_f32(bf16{(u16)outs[i]}) * to_f32(bf16{(u16)downs[c][i]}) +
                      to_f32(bf16{(u16)(outs[i] >> 16)}) * to_f32(bf16{(u16)(downs[c][i] >> 16)});
    }
  }
#pragma unroll
  for (int c = 0; c < C / 64; c++) {
#pragma unroll
    for (int n = 0; n < 8; n++) sums[c][n][0] = sums[c][n][1] = sums[c][n][2] = sums[c][n][3] = 0;
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    delta[r] += __shfl_xor_sync(0xffffffffu, delta[r], 1);
    delta[r] += __shfl_xor_sync(0xffffffffu, delta[r], 2);
    int at = row + r * 8 + lane / 4;
    base[r] = at < rows ? lse[(i64)(tile.start + tile.first + at) * H + h] * LOG2_E : NO_ROW;
    if (lane % 4 == 0) statistics[(i64)h * slots + tile.slot + at] = RowStatistics{base[r], delta[r]};
  }

  for (int stage = 0; block >= 0; block--, stage ^= 1) {
    publish_copies();
    multiply_wait<0>();
    __syncthreads();
    if (block > 0) copy(block - 1, stage ^ 1);
    if (block * KEYS > tile.first + row / 64 * 64 + 63) continue;  // for the whole warpgroup
    const uint4 *k_tile = stages + stage * 2 * TILE, *v_tile = k_tile + TILE;
    multiply_begin();
#pragma unroll
    for (int c = 0; c < C / 16; c++) multiply<0>(p, queries[c], rows_descriptor(k_tile + c / 4 * KEYS * 8 + c % 4 * 2), c > 0);
    multiply_commit();
#pragma unroll
    for (int c = 0; c < C / 16; c++) multiply<0>(ds, downs[c], rows_descriptor(v_tile + c / 4 * KEYS * 8 + c % 4 * 2), c > 0);
    multiply_commit();
    multiply_wait<1>();
    int ahead = block * KEYS - (tile.first + row);
    bool diagonal = ahead + KEYS > 1;
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float score = fmaf(p[n][i], power, -base[i / 2]);
        if (diagonal && ahead + n * 8 + lane % 4 * 2 + i % 2 > lane / 4 + i / 2 * 8) score = MASKED;
        p[n][i] = exp2_fast(score);
      }
    }
    multiply_wait<0>();
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) ds[n][i] = p[n][i] * (ds[n][i] - delta[i / 2]);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) as_left(left[n], ds[2 * n], ds[2 * n + 1]);
    multiply_begin();
#pragma unroll
    for (int c = 0; c < C / 64; c++) {
#pragma unroll
      for (int n = 0; n < 4; n++) multiply<1>(sums[c], left[n], rows_descriptor(k_tile + c * KEYS * 8 + n * 128), 1);
    }
    multiply_commit();
  }
  multiply_wait<0>();
  float factors[2] = {scale, scale};
  store_rows<1, C>(q_tile, row, (const float(*)[CHUNKS][4])sums, factors, dq + offset, q_stride, rows, C);
}

// dK and dV, as attention_keys in attention_backward.cu.
template <int C, int GROUPS>
DEVICE void attention_keys_hopper(const bf16* d_out, const bf16* q, const bf16* k, const bf16* v, bf16* dk, bf16* dv,
                                  const RowStatistics* statistics, const Tile* tiles, int slots, int H, int G, float scale) {
  constexpr int CHUNKS = C / 8, ROWS = GROUPS * 64, QUERIES = 64, THREADS = GROUPS * 128, TILE = QUERIES * CHUNKS;
  extern __shared__ __align__(1024) u8 shared[];
  uint4 *k_tile = (uint4*)shared, *v_tile = k_tile + ROWS * CHUNKS, *stages = v_tile + ROWS * CHUNKS, *rows_of = stages + 4 * TILE;
  Tile tile = tiles[blockIdx.x / G];
  int g = blockIdx.x % G, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  i64 q_stride = (i64)H * C, k_stride = (i64)G * C;
  int rows = min(ROWS, tile.length - tile.first);
  int first = tile.first / QUERIES, last = (tile.length - 1) / QUERIES, heads = H / G;
  float power = scale * LOG2_E;

  auto copy = [&](int head, int block, int stage) {
    int h = g * heads + head, from = block * QUERIES;
    uint4* to = stages + stage * 2 * TILE;
    i64 offset = (tile.start + from) * q_stride + h * C;
    copy_panels<QUERIES, C, THREADS>(to, q + offset, q_stride, tile.length - from, C);
    copy_panels<QUERIES, C, THREADS>(to + TILE, d_out + offset, q_stride, tile.length - from, C);
    if (threadIdx.x < QUERIES / 2) {
      const RowStatistics* at = statistics + (i64)h * slots + tile.slot - tile.first + from + 2 * threadIdx.x;
      copy_async_16(rows_of + stage * QUERIES / 2 + threadIdx.x, at, true);
    }
    copy_async_commit();
  };
  i64 offset = (tile.start + tile.first) * k_stride + g * C;
  copy_panels<ROWS, C, THREADS>(k_tile, k + offset, k_stride, rows, C);
  copy_panels<ROWS, C, THREADS>(v_tile, v + offset, k_stride, rows, C);
  copy(0, first, 0);

  float dk_sums[C / 64][8][4], dv_sums[C / 64][8][4], p[8][4], ds[8][4];
  u32 ps[4][4], dss[4][4];
#pragma unroll
  for (int c = 0; c < C / 64; c++) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) dk_sums[c][n][i] = dv_sums[c][n][i] = 0;
    }
  }
  int own = row / 64 * 64;  // first row of the warpgroup
  int stage = 0, block = first;
  for (int head = 0; head < heads;) {
    publish_copies();
    __syncthreads();
    const uint4 *q_tile = stages + stage * 2 * TILE, *d_tile = q_tile + TILE;
    const float4* of_rows = (const float4*)(rows_of + stage * QUERIES / 2);
    int from = block * QUERIES;
    if (++block > last) block = first, head++;
    stage ^= 1;
    if (head < heads) copy(head, block, stage);
    if (from + QUERIES <= tile.first + own) continue;  // for the whole warpgroup
    multiply_begin();
#pragma unroll
    for (int c = 0; c < C / 16; c++) {
      multiply_shared(p, rows_descriptor(k_tile + c / 4 * ROWS * 8 + own * 8 + c % 4 * 2),
                      rows_descriptor(q_tile + c / 4 * QUERIES * 8 + c % 4 * 2), c > 0);
    }
    multiply_commit();
#pragma unroll
    for (int c = 0; c < C / 16; c++) {
      multiply_shared(ds, rows_descriptor(v_tile + c / 4 * ROWS * 8 + own * 8 + c % 4 * 2),
                      rows_descriptor(d_tile + c / 4 * QUERIES * 8 + c % 4 * 2), c > 0);
    }
    multiply_commit();
    multiply_wait<1>();
    int behind = from - (tile.first + row);  // of the first query, of the warp's first key
    bool diagonal = behind < 15;
#pragma unroll
    for (int n = 0; n < 8; n++) {
      float4 pair = of_rows[n * 4 + lane % 4];  // of two queries
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float score = fmaf(p[n][i], power, -(i % 2 ? pair.z : pair.x));
        if (diagonal && lane / 4 + i / 2 * 8 > behind + n * 8 + lane % 4 * 2 + i % 2) score = MASKED;
        p[n][i] = exp2_fast(score);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; n++) as_left(ps[n], p[2 * n], p[2 * n + 1]);
    multiply_begin();
#pragma unroll
    for (int c = 0; c < C / 64; c++) {
#pragma unroll
      for (int n = 0; n < 4; n++) multiply<1>(dv_sums[c], ps[n], rows_descriptor(d_tile + c * QUERIES * 8 + n * 128), 1);
    }
    multiply_commit();
    multiply_wait<1>();
#pragma unroll
    for (int n = 0; n < 8; n++) {
      float4 pair = of_rows[n * 4 + lane % 4];
#pragma unroll
      for (int i = 0; i < 4; i++) ds[n][i] = p[n][i] * (ds[n][i] - (i % 2 ? pair.w : pair.y));
    }
#pragma unroll
    for (int n = 0; n < 4; n++) as_left(dss[n], ds[2 * n], ds[2 * n + 1]);
    multiply_begin();
#pragma unroll
    for (int c = 0; c < C / 64; c++) {
#pragma unroll
      for (int n = 0; n < 4; n++) multiply<1>(dk_sums[c], dss[n], rows_descriptor(q_tile + c * QUERIES * 8 + n * 128), 1);
    }
    multiply_commit();
    multiply_wait<0>();
  }
  __syncthreads();
  float one[2] = {1, 1}, factors[2] = {scale, scale};
  store_rows<1, C>(k_tile, row, (const float(*)[CHUNKS][4])dk_sums, factors, dk + offset, k_stride, rows, C);
  store_rows<1, C>(v_tile, row, (const float(*)[CHUNKS][4])dv_sums, one, dv + offset, k_stride, rows, C);
}

#define BACKWARD_HOPPER(NAME, C, QG, QB, KG, KB)                                                                                          \
  extern "C" __global__ void __launch_bounds__(QG * 128, QB) attention_queries_hopper_##NAME(                                             \
      const bf16* d_out, const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* lse, bf16* dq, RowStatistics* rows,   \
      const Tile* tiles, int slots, int H, int G, int width, float scale) {                                                               \
    after_previous();                                                                                                                     \
    attention_queries_hopper<C, QG>(d_out, q, k, v, out, lse, dq, rows, tiles, slots, H, G, scale);                                       \
  }                                                                                                                                       \
  extern "C" __global__ void __launch_bounds__(KG * 128, KB) attention_keys_hopper_##NAME(                                                \
      const bf16* d_out, const bf16* q, const bf16* k, const bf16* v, bf16* dk, bf16* dv, const RowStatistics* rows, const Tile* tiles,   \
      int slots, int H, int G, int width, float scale) {                                                                                  \
    after_previous();                                                                                                                     \
    attention_keys_hopper<C, KG>(d_out, q, k, v, dk, dv, rows, tiles, slots, H, G, scale);                                                \
  }

// what was fastest on an H200; the registers of three or four small blocks fill a multiprocessor as those of one large one do
ATTENTION_HOPPER(64, 64, 1, 64, 4)
ATTENTION_HOPPER(128, 128, 2, 128, 1)
BACKWARD_HOPPER(64, 64, 1, 3, 1, 3)
BACKWARD_HOPPER(128, 128, 2, 1, 2, 1)
