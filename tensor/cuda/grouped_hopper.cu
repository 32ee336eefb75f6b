// Grouped matrix products on Hopper's tensor cores (sm_90a): the experts' feed-forward layers over uneven row groups, without padding.
// A persistent kernel. One producer thread lets the tensor copy engine fill a ring of shared-memory stages; two consumer warpgroups multiply
// 64 x 256 each with wgmma; results leave through the copy engine while the next tile is multiplied. Blocks draw their tiles from a counter and
// find them by the offsets on the device, so the host need not know the groups, and blocks that share the GPU with other kernels draw fewer.
// The same products for other GPUs and sizes are in grouped.cu; modes are explained in grouped_walk.cuh, which comes before this file with
// grouped_hopper.cuh.

constexpr int STAGES = 4;
constexpr int BUFFERS = 2;  // blocks in which a consumer puts results for the copy engine
constexpr int SORTED_GROUPS = 256;  // groups that are put in order of their sizes

// --- Results.
// The four threads of a quad have v[b] of four 16-byte pieces b, each thread a quarter; afterwards thread q has piece q whole.
DEVICE void transpose_quad(u32 (&v)[4]) {
  int lane = threadIdx.x % 4;
  bool odd = lane & 1, high = lane & 2;
  u32 a = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);
  if (odd) v[0] = a, v[2] = b; else v[1] = a, v[3] = b;
  a = __shfl_xor_sync(0xffffffffu, high ? v[0] : v[2], 2), b = __shfl_xor_sync(0xffffffffu, high ? v[1] : v[3], 2);
  if (high) v[0] = a, v[1] = b; else v[2] = a, v[3] = b;
}

// Writes a consumer's sums to rows from `row` to `row_end` by plain stores: groups that end inside the 64 rows, and beta.
DEVICE void store_sums(float (&c)[128], bf16* out, int row, int row_end, int column, int n_size, float beta) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  row += warp * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    bool inside = row + 8 * half < row_end;
    bf16* to = out + (i64)(row + 8 * half) * n_size;
    if (beta != 0 && inside) {
#pragma unroll
      for (int j = 0; j < 32; j++) {
        if (column + 8 * j >= n_size) continue;
        u32 two = *(const u32*)(to + column + 8 * j + lane % 4 * 2);
        c[4 * j + 2 * half] += beta * __uint_as_float(two << 16);
        c[4 * j + 2 * half + 1] += beta * __uint_as_float(two & 0xffff0000u);
      }
    }
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
      u32 v[4];
#pragma unroll
      for (int b = 0; b < 4; b++) v[b] = pack_bf16(c[4 * (j + b) + 2 * half], c[4 * (j + b) + 2 * half + 1]);
      transpose_quad(v);
      int at = column + 8 * (j + lane % 4);
      if (inside && at < n_size) *(uint4*)(to + at) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
}
DEVICE void store_sums(float (&c)[128], float* out, int row, int row_end, int column, int n_size, float beta) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  row += warp * 16 + lane / 4, column += lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (row + 8 * half >= row_end) continue;
    float* to = out + (i64)(row + 8 * half) * n_size + column;
#pragma unroll
    for (int j = 0; j < 32; j++) {
      if (column + 8 * j >= n_size) continue;
      float2 sum = make_float2(c[4 * j + 2 * half], c[4 * j + 2 * half + 1]);
      if (beta != 0) {
        float2 old = *(const float2*)(to + 8 * j);
        sum.x += beta * old.x, sum.y += beta * old.y;
      }
      *(float2*)(to + 8 * j) = sum;
    }
  }
}

// A consumer's buffers of results, used in turn.
struct Buffers {
  u32 first;
  int consumer, turn;

  // A buffer that the copy engine has read.
  DEVICE u32 take() {
    u32 buffer = first + turn * BLOCK_BYTES;
    if (++turn == BUFFERS) turn = 0;
    if (threadIdx.x % 128 == 0) store_box_wait<BUFFERS - 1>();
    consumer_barrier(consumer);
    return buffer;
  }
  DEVICE void store(u32 buffer, const TensorMap* map, int x, int y, bool add) {
    publish();
    consumer_barrier(consumer);
    if (threadIdx.x % 128 == 0) store_box(map, x, y, buffer, add);
  }
};

// Writes f32 sums by the copy engine, 32 columns at a time.
DEVICE void store_boxes(float (&c)[128], const TensorMap* map, Buffers& buffers, int row, int column, int n_size, bool add) {
  int lane = threadIdx.x % 32, in_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int chunk = 0; chunk < TILE_N / 32; chunk++) {
    if (column + 32 * chunk >= n_size) break;
    u32 buffer = buffers.take();
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float* from = c + 16 * chunk + 4 * j + 2 * half;
        int r = in_row + 8 * half;
        u32 to = buffer + r * 128 + (((2 * j + lane % 4 / 2) ^ (r % 8)) << 4) + lane % 2 * 8;
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(from[0]), "f"(from[1]) : "memory");
      }
    buffers.store(buffer, map, column + 32 * chunk, row, add);
  }
}

// bf16 results of a consumer's tile, in registers, that leave 64 columns at a time while it multiplies the next tile.
struct Waiting {
  u32 pairs[64];  // as the sums, two columns in one
  int next;       // 64 columns to store; 4 when there are none
  const TensorMap* map;
  int row, column;

  DEVICE void put(float (&c)[128], const TensorMap* to, int at_row, int at_column) {
    map = to, row = at_row, column = at_column, next = 0;
#pragma unroll
    for (int i = 0; i < 64; i++) pairs[i] = pack_bf16(c[2 * i], c[2 * i + 1]);
  }
  template <int CHUNK>
  DEVICE void store(Buffers& buffers, int n_size, bool add) {
    if (column + 64 * CHUNK >= n_size) return;
    int lane = threadIdx.x % 32, in_row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    u32 buffer = buffers.take();
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const u32* from = pairs + 2 * (8 * CHUNK + j);
      u32 to = buffer + in_row * 128 + (((j + lane / 16) ^ (lane % 8)) << 4);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(from[0]), "r"(from[1]),
                   "r"(from[2]), "r"(from[3])
                   : "memory");
    }
    buffers.store(buffer, map, column + 64 * CHUNK, row, add);
  }
  // Registers have no index at run time.
  DEVICE void store_next(Buffers& buffers, int n_size, bool add) {
    switch (next) {
      case 0: store<0>(buffers, n_size, add); break;
      case 1: store<1>(buffers, n_size, add); break;
      case 2: store<2>(buffers, n_size, add); break;
      default: store<3>(buffers, n_size, add);
    }
    next++;
  }
};

// --- The kernel.
struct Problem {
  const TensorMap *a_map, *b_maps, *out_maps;  // b_maps: of the groups, or one in mode 2; out_maps: of the groups in mode 2
  u32* counter;                                // tiles drawn and blocks done; zeros before and after
  const int* offsets;
  int groups;
  void* out;         // modes 0 and 1
  const u64* outs;   // mode 2: of the groups
  int m_size, n_size, k_size;
  float beta;
};

struct Shared {
  u64 full[STAGES], empty[STAGES], drawn_full[DRAWS], drawn_empty[DRAWS];
  int drawn[DRAWS];
  u16 order[SORTED_GROUPS];
};

template <int MODE>
DEVICE Walk<MODE, TILE_M, TILE_N> walk_of(const Problem& p, const Shared& shared) {
  return Walk<MODE, TILE_M, TILE_N>(p.offsets, MODE == 2 && p.groups <= SORTED_GROUPS ? shared.order : nullptr, p.groups,
                                    p.m_size, p.n_size);
}

// One thread: loads the stages of tile after tile, and draws the tiles.
template <int MODE>
DEVICE void produce(const Problem& p, Shared& shared, u32 ring) {
  Walk<MODE, TILE_M, TILE_N> walk = walk_of<MODE>(p, shared);
  Tile tile;
  int unit = blockIdx.x, stage = 0, phase = 0, draw = 0, draw_phase = 0, acquired = -1;
  while (walk.find(unit, tile)) {
    const TensorMap* b_map = MODE == 2 ? p.b_maps : p.b_maps + tile.group;
    if (MODE != 2 && acquired != tile.group) acquire_map(b_map), acquired = tile.group;
    int m = tile.m * TILE_M, n = tile.n * TILE_N, reduced = MODE == 2 ? tile.rows : p.k_size;
    for (int k = 0; k < reduced; k += DEPTH) {
      u64* full = &shared.full[stage];
      barrier_wait(&shared.empty[stage], phase ^ 1);
      barrier_arrive_bytes(full, STAGE_BYTES);
      u32 a = ring + stage * STAGE_BYTES, b = a + A_BLOCKS * BLOCK_BYTES;
      if (MODE != 2) load_box(a, p.a_map, k, tile.first_row + m, full);
#pragma unroll
      for (int i = 0; i < A_BLOCKS && MODE == 2; i++)
        load_box(a + i * BLOCK_BYTES, p.a_map, m + 64 * i, tile.first_row + k, full);
      if (MODE == 0) load_box(b, b_map, k, n, full);
#pragma unroll
      for (int i = 0; i < B_BLOCKS && MODE != 0; i++)
        load_box(b + i * BLOCK_BYTES, b_map, n + 64 * i, MODE == 2 ? tile.first_row + k : k, full);
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    barrier_wait(&shared.drawn_empty[draw], draw_phase ^ 1);
    unit = gridDim.x + (int)atomicAdd(p.counter, 1u);
    shared.drawn[draw] = unit;
    barrier_arrive(&shared.drawn_full[draw]);
    if (++draw == DRAWS) draw = 0, draw_phase ^= 1;
  }
  // The last block leaves the counter as it was found.
  if (atomicAdd(p.counter + 1, 1u) == gridDim.x - 1) p.counter[0] = 0, p.counter[1] = 0;
}

// 128 threads: multiplies 64 rows of each tile, also where a group has ended before them: one thread frees the stages for all, which is safe
// because wgmma holds the four warps together; a warp that fell two phases behind would wait for ever.
template <int MODE, typename OUT>
DEVICE void consume(const Problem& p, Shared& shared, u32 ring, u8* ring_pointer, int consumer) {
  constexpr int A_MAJOR = MODE == 2, B_MAJOR = MODE != 0;
  Walk<MODE, TILE_M, TILE_N> walk = walk_of<MODE>(p, shared);
  Tile tile;
  Waiting waiting;
  // bf16 gradients are added to by the copy engine, too: sums are rounded before they are added.
  const bool adds = MODE == 2 && p.beta == 1;
  waiting.next = 4;
  Buffers buffers = {ring + STAGES * STAGE_BYTES + consumer * BUFFERS * BLOCK_BYTES, consumer, 0};
  int thread = threadIdx.x % 128, stage = 0, phase = 0, draw = 0, draw_phase = 0, acquired = -1, unit = blockIdx.x;
  while (walk.find(unit, tile)) {
    int reduced = MODE == 2 ? tile.rows : p.k_size, steps = (reduced + DEPTH - 1) / DEPTH, previous = 0;
    float sums[128];
    if (steps == 0) {
#pragma unroll
      for (int i = 0; i < 128; i++) sums[i] = 0;
    }
    for (int step = 0; step < steps; step++) {
      barrier_wait(&shared.full[stage], phase);
      if (MODE == 2 && step == steps - 1 && reduced % DEPTH != 0) {
        // The next group's rows must not take part: zeros in both operands, lest an infinity of theirs meets a zero.
        int valid = reduced % DEPTH, pieces = (DEPTH - valid) * 8;
        u8* first = ring_pointer + stage * STAGE_BYTES + valid * 128;
        for (int i = threadIdx.x - 128; i < pieces * (A_BLOCKS + B_BLOCKS); i += 256)
          *(uint4*)(first + i / pieces * BLOCK_BYTES + i % pieces * 16) = make_uint4(0, 0, 0, 0);
        publish();
        consumers_barrier();
      }
      u32 a = ring + stage * STAGE_BYTES + consumer * BLOCK_BYTES, b = ring + stage * STAGE_BYTES + A_BLOCKS * BLOCK_BYTES;
      multiply_begin();
#pragma unroll
      for (int k = 0; k < DEPTH / 16; k++)
        multiply<A_MAJOR, B_MAJOR>(sums, descriptor<A_MAJOR>(a) + k * STEP<A_MAJOR>, descriptor<B_MAJOR>(b) + k * STEP<B_MAJOR>,
                                   step + k > 0);
      multiply_commit();
      multiply_wait<1>();
      if (step > 0 && thread == 0) barrier_arrive(&shared.empty[previous]);
      if (waiting.next < 4) waiting.store_next(buffers, p.n_size, adds);  // while this step is multiplied
      previous = stage;
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    multiply_wait<0>();
    if (steps > 0 && thread == 0) barrier_arrive(&shared.empty[previous]);
    while (waiting.next < 4) waiting.store_next(buffers, p.n_size, adds);
    // The sums may be read from here on.
#pragma unroll
    for (int i = 0; i < 128; i++) asm volatile("" : "+f"(sums[i])::"memory");

    int row = tile.m * TILE_M + 64 * consumer, row_end = MODE == 2 ? p.m_size : tile.rows, column = tile.n * TILE_N;
    int first = MODE == 2 ? 0 : tile.first_row;
    bool boxes = MODE == 2 ? p.beta == 0 || p.beta == 1 : p.beta == 0 && row + 64 <= row_end;
    if (row < row_end && (steps > 0 || p.beta != 1)) {
      if (boxes) {
        const TensorMap* map = MODE == 2 ? p.out_maps + tile.group : p.out_maps;
        if (MODE == 2 && acquired != tile.group && thread == 0) acquire_map(map);
        acquired = tile.group;
        if (sizeof(OUT) == 4) store_boxes(sums, map, buffers, row, column, p.n_size, p.beta == 1);
        else waiting.put(sums, map, first + row, column);
      } else {
        OUT* out = (OUT*)(MODE == 2 ? (void*)p.outs[tile.group] : p.out);
        store_sums(sums, out, first + row, first + row_end, column, p.n_size, p.beta);
      }
    }
    barrier_wait(&shared.drawn_full[draw], draw_phase);
    unit = shared.drawn[draw];
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(&shared.drawn_empty[draw]);
    if (++draw == DRAWS) draw = 0, draw_phase ^= 1;
  }
  while (waiting.next < 4) waiting.store_next(buffers, p.n_size, adds);
  if (thread == 0) store_box_wait<0>();
}

template <int MODE, typename OUT>
DEVICE void grouped(const Problem& p) {
  extern __shared__ __align__(1024) u8 memory[];
  __shared__ Shared shared;
  u32 ring = (shared_address(memory) + 1023) & ~1023u;
  u8* ring_pointer = memory + (ring - shared_address(memory));
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) barrier_init(&shared.full[s], 1), barrier_init(&shared.empty[s], 2);
    for (int s = 0; s < DRAWS; s++) barrier_init(&shared.drawn_full[s], 1), barrier_init(&shared.drawn_empty[s], 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish();
  }
  if (MODE == 2 && p.groups <= SORTED_GROUPS) {
    // Longest reductions first, so that the last tiles are short.
    for (int g = threadIdx.x; g < p.groups; g += blockDim.x) {
      int rows = p.offsets[g + 1] - p.offsets[g], before = 0;
      for (int i = 0; i < p.groups; i++) {
        int other = p.offsets[i + 1] - p.offsets[i];
        before += other > rows || (other == rows && i < g);
      }
      shared.order[before] = g;
    }
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce<MODE>(p, shared, ring);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<MODE, OUT>(p, shared, ring, ring_pointer, threadIdx.x / 128 - 1);
  }
}

#define KERNEL(NAME, MODE, OUT)                                                                                            \
  extern "C" __global__ void __launch_bounds__(384, 1)                                                                     \
      NAME(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,                               \
           const __grid_constant__ TensorMap out_map, const TensorMap* maps, u32* counter, const int* offsets, int groups, \
           void* out, const u64* outs, int m_size, int n_size, int k_size, float beta) {                                   \
    after_previous();                                                                                                      \
    Problem p = {&a_map, MODE == 2 ? &b_map : maps, MODE == 2 ? maps : &out_map, counter, offsets, groups, out, outs,      \
                 m_size, n_size, k_size, beta};                                                                            \
    grouped<MODE, OUT>(p);                                                                                                 \
  }
KERNEL(grouped_0, 0, bf16)
KERNEL(grouped_1, 1, bf16)
KERNEL(grouped_2, 2, bf16)
KERNEL(grouped_2_f32, 2, float)
