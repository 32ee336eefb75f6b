// What the tensor-core kernels of attention share: tiles of rows in shared memory and the fragments of mma.m16n8k16 that are taken from
// them. A tile has rows of CHUNKS pieces of 16 bytes, shuffled so that neither copies nor load_matrices meet a bank twice.

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float MASKED = -1e30f;   // a score that counts nothing: 2^MASKED = 0, and differences of it stay finite
constexpr float NO_ROW = 1e30f;    // log-sum-exp of a row past the sequence's end: every probability is 2^-1e30 = 0

// One tile of a sequence: the sequence's first row and length, the tile's first row within it, and its first place among the statistics.
struct alignas(16) Tile {
  int start, length, first, slot;
};

// Where piece `chunk` of row `row` lies in a tile.
template <int CHUNKS>
DEVICE int place(int row, int chunk) {
  return row * CHUNKS + (CHUNKS % 8 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3));
}

// Starts copying ROWS rows of a head of `width` columns, `stride` elements apart, into a tile; zeros from row `rows` and column `width` on.
template <int ROWS, int CHUNKS, int THREADS>
DEVICE void copy_tile(uint4* tile, const bf16* from, i64 stride, int rows, int width) {
#pragma unroll
  for (int i = 0; i < (ROWS * CHUNKS + THREADS - 1) / THREADS; i++) {
    int index = threadIdx.x + i * THREADS, row = index / CHUNKS, chunk = index % CHUNKS;
    if (ROWS * CHUNKS % THREADS != 0 && index >= ROWS * CHUNKS) break;
    bool valid = row < rows && chunk * 8 < width;
    copy_async_16(tile + place<CHUNKS>(row, chunk), valid ? from + row * stride + chunk * 8 : from, valid);
  }
}

// Fragment of the left operand: rows row..row + 15, columns 16 k..16 k + 15.
template <int CHUNKS>
DEVICE void load_left(u32 out[4], const uint4* tile, int row, int k) {
  int lane = threadIdx.x % 32;
  load_matrices(out, tile + place<CHUNKS>(row + lane % 16, 2 * k + lane / 16));
}
// Fragments of the right operand for two products with rows row..row + 15 of the tile as columns (x yᵀ); the sum is over columns 16 k...
template <int CHUNKS>
DEVICE void load_right_rows(u32 out[4], const uint4* tile, int row, int k) {
  int lane = threadIdx.x % 32;
  load_matrices(out, tile + place<CHUNKS>(row + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}
// The same with columns 16 n.. of the tile as columns (x y); the sum is over rows row..row + 15.
template <int CHUNKS>
DEVICE void load_right_columns(u32 out[4], const uint4* tile, int row, int n) {
  int lane = threadIdx.x % 32;
  load_matrices_transposed(out, tile + place<CHUNKS>(row + lane % 16, 2 * n + lane / 16));
}

// Two neighbouring accumulators, 16 columns, as a fragment of the left operand.
DEVICE void as_left(u32 out[4], const float low[4], const float high[4]) {
  out[0] = pack_bf16(low[0], low[1]);
  out[1] = pack_bf16(low[2], low[3]);
  out[2] = pack_bf16(high[0], high[1]);
  out[3] = pack_bf16(high[2], high[3]);
}

// Writes a warp's accumulators (M times 16 rows, C columns) times factors[i] (rows lane / 4 + 8 i) as bf16 to rows row.. of a tile that no
// other warp uses there, and from it to memory, in whole pieces.
template <int M, int C>
DEVICE void store_rows(uint4* tile, int row, const float sums[M][C / 8][4], const float factors[2 * M], bf16* to, i64 stride, int rows,
                       int width) {
  constexpr int CHUNKS = C / 8;
  int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float factor = factors[2 * m + half];
        u32* piece = (u32*)(tile + place<CHUNKS>(row + m * 16 + half * 8 + lane / 4, n));
        piece[lane % 4] = pack_bf16(sums[m][n][2 * half] * factor, sums[m][n][2 * half + 1] * factor);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < M * 16 * CHUNKS; i += 32) {
    int r = row + i / CHUNKS, chunk = i % CHUNKS;
    if (r < rows && chunk * 8 < width) *(uint4*)(to + r * stride + chunk * 8) = tile[place<CHUNKS>(r, chunk)];
  }
}
