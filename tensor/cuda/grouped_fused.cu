// Grouped products with the experts' activation on Hopper: the product into the hidden width writes what it made and its activation, the product
// back through the second layer leaves as the gradient before the activation. The same persistent kernel as in grouped_hopper.cu, with more
// work per result: a finished tile waits as bf16 pairs in registers, and the steps of the next tile treat a part of it each (a phase) while the
// tensor cores multiply. activations.cuh, grouped_walk.cuh and grouped_hopper.cuh come before this file.
// The activation's rows may be scaled (by a router's weights); backward the scales' gradients are sums over a row, made tile by tile and added up
// by a kernel of their own, always in the same order.
// There is no gradient of SwiGLU: with two matrices to fetch and two to write it was no faster than two kernels.
//
// Letters: F hidden width, `up` the matrix before the activation, [R, F], or [R, 2F] with the gates first for SwiGLU. A chunk is 64 of a
// consumer's columns of the tile.

constexpr int RELU = 0, GELU = 1, SWIGLU = 2;
constexpr int STAGES = 4;
constexpr int BLOCKS = 2;  // blocks in shared memory that a consumer has for results

// Shape of a kernel: backward or forward, of which activation, with scales or not.
template <bool BACK, int OF, bool SCALE>
struct Fused {
  static constexpr bool BACKWARD = BACK, SCALED = SCALE;
  static constexpr int KIND = OF;
  // Columns of the hidden width in a tile. SwiGLU forward: 128 gates beside the 128 columns that they gate.
  static constexpr int COLUMNS = !BACK && OF == SWIGLU ? 128 : 256;
  // A chunk's activation or gradient is made in so many phases, measured: SwiGLU gains by more of them, GELU loses.
  static constexpr int PARTS = SCALE && OF == SWIGLU ? 4 : 2;
  static constexpr int BEFORE = OF == SWIGLU ? 2 : 1;  // forward: phases of a chunk in which the product leaves
  static constexpr int PHASES = BACK ? 11 : COLUMNS / 64 * (BEFORE + PARTS);
};

struct FusedProblem {
  const TensorMap *a_map, *b_maps, *up_map, *out_map;
  u32* counter;
  const int* offsets;
  int groups;
  bf16 *up, *out;  // forward: up and the activation; backward: none and the gradient
  int f_size, k_size;
  // Of each row, or null for 1; backward also partial sums of its gradient [tiles in F, R], or null.
  const float* scales;
  float* d_scales;
  int r_size;
};

// A tile as consumers know it: its first row, the end of its group's rows, its first hidden column. Without a tile the row is -1.
struct Drawn {
  int row, row_end, column;
};

struct FusedShared {
  u64 full[STAGES], empty[STAGES], drawn_full[DRAWS], drawn_empty[DRAWS];
  u64 loaded[2][2];  // of consumers: pieces of `up`
  Drawn drawn[DRAWS];
};

DEVICE float low_half(u32 x) { return __uint_as_float(x << 16); }
DEVICE float high_half(u32 x) { return __uint_as_float(x & 0xffff0000u); }

// --- Pieces of 16 rows by 16 columns that a warp has as two columns a register, in the order of wgmma's sums.
DEVICE void put_piece(u32 to, const u32 (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(from[0]), "r"(from[1]),
               "r"(from[2]), "r"(from[3])
               : "memory");
}
DEVICE void get_piece(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// A consumer's finished tile and what is left to do with it.
template <typename S>
struct Later {
  u32 pairs[64];  // as the sums, two columns in one
  const FusedProblem* problem;
  u64* loaded;    // [2]
  u32 blocks;     // the consumer's, in shared memory
  u32 first_place;  // see place()
  int consumer, turn, next;
  int row, row_end, column;       // of the tile; rows from row_end on belong to others
  int coming_row, coming_column;  // of the tile that is being multiplied
  float sums[2];                  // parts of the gradients of the scales of this thread's rows

  // The rows of this thread's sums: i is 0 or 1.
  DEVICE int row_of(int i) const { return row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i; }
  // The scales of these rows. Phases read them anew: registers are rare.
  DEVICE void get_scales(float (&scales)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      scales[i] = 1;
      if (S::SCALED && problem->scales)
        asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(scales[i]) : "l"(problem->scales + min(row_of(i), row_end - 1)));
    }
  }
  DEVICE void put(float (&c)[128], int end) {
    row = coming_row, column = coming_column, row_end = end, next = 0;
    sums[0] = sums[1] = 0;
#pragma unroll
    for (int i = 0; i < 64; i++) pairs[i] = pack_bf16(c[2 * i], c[2 * i + 1]);
  }
  DEVICE u32 block(int i) const { return blocks + i * BLOCK_BYTES; }
  // A block that the copy engine has read.
  DEVICE void take() {
    turn ^= 1;
    if (threadIdx.x % 128 == 0) store_box_wait<1>();
    consumer_barrier(consumer);
  }
  // Where this thread's row of a piece lies: columns 8 j to 8 j + 15 of the warp's 16 rows.
  DEVICE u32 place(u32 block, int j) const { return (block + first_place) ^ (j << 4); }
  // Lets a block leave, after publish() and a barrier: hidden columns from `f` on, which are those from `at` on of a matrix of `width`.
  DEVICE void leave(u32 block, const TensorMap* map, bf16* out, int f, int at, int width) {
    if (f >= problem->f_size) return;
    int thread = threadIdx.x % 128;
    if (row + 64 <= row_end) {
      if (thread == 0) store_box(map, at, row, block, false);
      return;
    }
    // The group ends within the 64 rows.
#pragma unroll 1
    for (int i = thread; i < 512; i += 128) {
      int r = i / 8, q = i % 8;
      if (row + r < row_end && f + 8 * q < problem->f_size) {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(block + r * 128 + ((q ^ (r % 8)) << 4)));
        *(uint4*)(out + (i64)(row + r) * width + at + 8 * q) = v;
      }
    }
    if (thread == 0) asm volatile("cp.async.bulk.commit_group;" ::: "memory");  // blocks are counted by groups
    consumer_barrier(consumer);
  }
  DEVICE void ready() {
    publish();
    consumer_barrier(consumer);
  }

  // --- Forward: the product leaves as it is, then what the activation makes of it as stored.
  template <int FROM>
  DEVICE void raw(int f, int at, int width) {
    if (f >= problem->f_size) return;
    take();
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      u32 piece[4] = {pairs[FROM + 2 * j], pairs[FROM + 2 * j + 1], pairs[FROM + 2 * j + 2], pairs[FROM + 2 * j + 3]};
      put_piece(place(block(turn), j), piece);
    }
    ready();
    leave(block(turn), problem->up_map, problem->up, f, at, width);
  }
  static DEVICE float value(float x, float y) {
    return S::KIND == SWIGLU ? Swiglu::value(x, y) : S::KIND == GELU ? Gelu::value(x) : Relu::value(x);
  }
  template <int FROM, int PART>
  DEVICE void activated(int f) {
    if (f >= problem->f_size) return;
    float scales[2];
    get_scales(scales);
    if (PART == 0) take();
#pragma unroll
    for (int j = 8 / S::PARTS * PART; j < 8 / S::PARTS * (PART + 1); j += 2) {
      u32 piece[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 x = pairs[FROM + 2 * j + i], y = pairs[(FROM + 2 * j + i + 32) % 64];  // SwiGLU: the gate and what it gates
        if (S::SCALED) asm volatile("" : "+r"(x), "+r"(y));  // unpacked here, not before the steps
        float low = value(low_half(x), low_half(y)), high = value(high_half(x), high_half(y));
        if (S::SCALED) low *= scales[i % 2], high *= scales[i % 2];
        piece[i] = pack_bf16(low, high);
      }
      put_piece(place(block(turn), j), piece);
    }
    if (PART < S::PARTS - 1) return;
    ready();
    leave(block(turn), problem->out_map, problem->out, f, f, problem->f_size);
  }
  template <int PHASE>
  DEVICE void forward() {
    constexpr int PER_CHUNK = S::BEFORE + S::PARTS, CHUNK = PHASE / PER_CHUNK % (S::COLUMNS / 64), PART = PHASE % PER_CHUNK, FROM = 16 * CHUNK;
    int f = column + 64 * CHUNK, F = problem->f_size;
    if (PART == 0) raw<FROM>(f, f, S::KIND == SWIGLU ? 2 * F : F);
    if (S::KIND == SWIGLU && PART == 1) raw<FROM + 32>(f, F + f, 2 * F);
    if (PART >= S::BEFORE) activated<FROM, PART - S::BEFORE>(f);
  }

  // --- Backward: a chunk of `up` comes into a block, becomes the gradient there and leaves. Chunks take the two blocks in turn.
  // Once the block's last contents have left:
  template <int CHUNK>
  DEVICE void fetch(int at_row, int at_column) {
    if (threadIdx.x % 128 != 0) return;
    u64* barrier = loaded + CHUNK % 2;
    store_box_wait<0>();
    barrier_arrive_bytes(barrier, BLOCK_BYTES);
    load_box(block(CHUNK % 2), problem->up_map, at_column + 64 * CHUNK, at_row, barrier);
  }
  static DEVICE float gradient(float d, float x, float scale, float& sum) {
    float active, out = S::KIND == GELU ? Gelu::gradient(d, x, active) : Relu::gradient(d, x, active);
    if (S::SCALED) sum = fmaf(d, active, sum), out *= scale;
    return out;
  }
  // The tile's parts of the scales' gradients, once it is treated.
  DEVICE void put_sums() {
    if (!problem->d_scales) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float sum = sums[i];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      int r = row_of(i);
      if (threadIdx.x % 4 == 0 && r < row_end) problem->d_scales[(i64)(column / S::COLUMNS) * problem->r_size + r] = sum;
    }
  }
  template <int CHUNK, int PART>
  DEVICE void treat() {
    u32 at = block(CHUNK % 2);
    asm volatile("" : "+r"(at));  // addresses are computed here, not kept in registers
    float scales[2];
    get_scales(scales);
    if (PART == 0) barrier_wait(loaded + CHUNK % 2, CHUNK / 2);
#pragma unroll
    for (int j = 8 / S::PARTS * PART; j < 8 / S::PARTS * (PART + 1); j += 2) {
      u32 x[4];
      get_piece(x, place(at, j));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 d = pairs[16 * CHUNK + 2 * j + i];
        if (S::SCALED) asm volatile("" : "+r"(d));
        x[i] = pack_bf16(gradient(low_half(d), low_half(x[i]), scales[i % 2], sums[i % 2]),
                         gradient(high_half(d), high_half(x[i]), scales[i % 2], sums[i % 2]));
      }
      put_piece(place(at, j), x);
    }
    if (PART < S::PARTS - 1) return;
    if (S::SCALED && CHUNK == 3) put_sums();
    int f = column + 64 * CHUNK;
    ready();
    leave(at, problem->out_map, problem->out, f, f, problem->f_size);
  }
  template <int PHASE>
  DEVICE void backward() {
    if (PHASE == 0) treat<0, 0>();
    if (PHASE == 1) treat<0, 1>();
    if (PHASE == 2) fetch<2>(row, column), treat<1, 0>();
    if (PHASE == 3) treat<1, 1>();
    if (PHASE == 4) fetch<3>(row, column);
    // Phase 5 leaves the loads some time.
    if (PHASE == 6) treat<2, 0>();
    if (PHASE == 7) treat<2, 1>();
    if (PHASE == 8) treat<3, 0>();
    if (PHASE == 9) treat<3, 1>();
    if (PHASE == 10) fetch<0>(coming_row, coming_column), fetch<1>(coming_row, coming_column);
  }

  template <int PHASE>
  DEVICE void run() {
    if (PHASE >= S::PHASES) return;
    if (S::BACKWARD) backward<PHASE>();
    else forward<PHASE>();
  }
  // The next phase. Registers have no index at run time.
  DEVICE void advance() {
    switch (next) {
      case 0: run<0>(); break;
      case 1: run<1>(); break;
      case 2: run<2>(); break;
      case 3: run<3>(); break;
      case 4: run<4>(); break;
      case 5: run<5>(); break;
      case 6: run<6>(); break;
      case 7: run<7>(); break;
      case 8: run<8>(); break;
      case 9: run<9>(); break;
      case 10: run<10>(); break;
      default: run<11>();
    }
    next++;
  }
};

// --- The kernel.
// One thread: loads the stages of tile after tile, and draws the tiles.
template <typename S>
DEVICE void produce_fused(const FusedProblem& p, FusedShared& shared, u32 ring) {
  Walk<S::BACKWARD, TILE_M, S::COLUMNS> walk(p.offsets, nullptr, p.groups, 0, p.f_size);
  Tile tile;
  int unit = blockIdx.x, stage = 0, phase = 0, draw = 0, draw_phase = 0, acquired = -1;
  while (true) {
    bool found = walk.find(unit, tile);
    int m = tile.first_row + tile.m * TILE_M, n = tile.n * S::COLUMNS;
    barrier_wait(&shared.drawn_empty[draw], draw_phase ^ 1);
    shared.drawn[draw] = {found ? m : -1, tile.first_row + tile.rows, n};
    barrier_arrive(&shared.drawn_full[draw]);
    if (++draw == DRAWS) draw = 0, draw_phase ^= 1;
    if (!found) break;
    unit = gridDim.x + (int)atomicAdd(p.counter, 1u);
    const TensorMap* b_map = p.b_maps + tile.group;
    if (acquired != tile.group) acquire_map(b_map), acquired = tile.group;
    for (int k = 0; k < p.k_size; k += DEPTH) {
      u64* full = &shared.full[stage];
      barrier_wait(&shared.empty[stage], phase ^ 1);
      barrier_arrive_bytes(full, STAGE_BYTES);
      u32 a = ring + stage * STAGE_BYTES, b = a + A_BLOCKS * BLOCK_BYTES;
      load_box(a, p.a_map, k, m, full);
      if (S::BACKWARD) {
#pragma unroll
        for (int i = 0; i < B_BLOCKS; i++) load_box(b + i * BLOCK_BYTES, b_map, n + 64 * i, k, full);
      } else {
        load_box(b, b_map, k, n, full);
        load_box(b + 2 * BLOCK_BYTES, b_map, k, (S::KIND == SWIGLU ? p.f_size : 128) + n, full);
      }
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }
  // The last block leaves the counter as it was found.
  if (atomicAdd(p.counter + 1, 1u) == gridDim.x - 1) p.counter[0] = 0, p.counter[1] = 0;
}

// 128 threads: multiplies 64 rows of each tile, also where a group has ended before them (see grouped_hopper.cu).
template <typename S>
DEVICE void consume_fused(const FusedProblem& p, FusedShared& shared, u32 ring, int consumer) {
  constexpr int B_MAJOR = S::BACKWARD;
  Later<S> later;
  later.problem = &p, later.consumer = consumer, later.loaded = shared.loaded[consumer], later.turn = 0;
  later.blocks = ring + STAGES * STAGE_BYTES + consumer * BLOCKS * BLOCK_BYTES;
  later.next = S::BACKWARD ? 10 : S::PHASES;  // the first tile's `up` is fetched, nothing else is to do
  int thread = threadIdx.x % 128, stage = 0, phase = 0, draw = 0, draw_phase = 0;
  later.first_place = (thread / 32 * 16 + thread % 16) * 128 + (((thread / 16 % 2) ^ (thread % 8)) << 4);
  int steps = (p.k_size + DEPTH - 1) / DEPTH, phases_per_step = (S::PHASES + steps - 1) / steps;
  while (true) {
    barrier_wait(&shared.drawn_full[draw], draw_phase);
    Drawn tile = shared.drawn[draw];
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(&shared.drawn_empty[draw]);
    if (++draw == DRAWS) draw = 0, draw_phase ^= 1;
    if (tile.row < 0) break;
    later.coming_row = tile.row + 64 * consumer, later.coming_column = tile.column;
    int previous = 0;
    float sums[128];
    for (int step = 0; step < steps; step++) {
      barrier_wait(&shared.full[stage], phase);
      u32 a = ring + stage * STAGE_BYTES + consumer * BLOCK_BYTES, b = ring + stage * STAGE_BYTES + A_BLOCKS * BLOCK_BYTES;
      multiply_begin();
#pragma unroll
      for (int k = 0; k < DEPTH / 16; k++)
        multiply<0, B_MAJOR>(sums, descriptor<0>(a) + k * STEP<0>, descriptor<B_MAJOR>(b) + k * STEP<B_MAJOR>, step + k > 0);
      multiply_commit();
      multiply_wait<1>();
      if (step > 0 && thread == 0) barrier_arrive(&shared.empty[previous]);
      // While this step is multiplied. All phases are over with the last step.
#pragma unroll 1
      for (int i = 0; i < phases_per_step && later.next < S::PHASES; i++) later.advance();
      previous = stage;
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    multiply_wait<0>();
    if (thread == 0) barrier_arrive(&shared.empty[previous]);
    // The sums may be read from here on.
#pragma unroll
    for (int i = 0; i < 128; i++) asm volatile("" : "+f"(sums[i])::"memory");
    later.put(sums, tile.row_end);
  }
  // No tile is coming.
  while (later.next < (S::BACKWARD ? 10 : S::PHASES)) later.advance();
  if (thread == 0) store_box_wait<0>();
}

template <bool BACKWARD, int KIND, bool SCALED>
DEVICE void grouped_fused(const FusedProblem& p) {
  typedef Fused<BACKWARD, KIND, SCALED> S;
  extern __shared__ __align__(1024) u8 memory[];
  __shared__ FusedShared shared;
  u32 ring = (shared_address(memory) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) barrier_init(&shared.full[s], 1), barrier_init(&shared.empty[s], 2);
    for (int s = 0; s < DRAWS; s++) barrier_init(&shared.drawn_full[s], 1), barrier_init(&shared.drawn_empty[s], 8);
    for (int s = 0; s < 4; s++) barrier_init(&shared.loaded[s / 2][s % 2], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce_fused<S>(p, shared, ring);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    int group = threadIdx.x / 128;
    // Known to be the same in a warp, it takes no registers of these kernels, which have none to spare.
    if (SCALED) group = __shfl_sync(0xffffffffu, group, 0);
    consume_fused<S>(p, shared, ring, group - 1);
  }
}

// The scales' gradients from those of the tiles, [tiles, rows], in a fixed order; 0 outside the groups.
extern "C" __global__ void grouped_scale_gradients(const float* parts, float* d_scales, const int* offsets, int groups,
                                                   int tiles, int rows) {
  after_previous();
  int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  float sum = 0;
  if (row >= offsets[0] && row < offsets[groups]) {
#pragma unroll 8
    for (int tile = 0; tile < tiles; tile++) sum += parts[(i64)tile * rows + row];
  }
  d_scales[row] = sum;
}

#define FUSED(NAME, BACKWARD, KIND)                                                                                         \
  extern "C" __global__ void __launch_bounds__(384, 1)                                                                      \
      NAME(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap up_map,                               \
           const __grid_constant__ TensorMap out_map, const TensorMap* maps, u32* counter, const int* offsets, int groups,  \
           bf16* up, bf16* out, int f_size, int k_size) {                                                                   \
    after_previous();                                                                                                       \
    FusedProblem p = {&a_map, maps, &up_map, &out_map, counter, offsets, groups, up, out, f_size, k_size};                  \
    grouped_fused<BACKWARD, KIND, false>(p);                                                                                \
  }
FUSED(grouped_relu_back, true, RELU)
FUSED(grouped_gelu_back, true, GELU)

// With scales, or a null pointer: forward that is faster than without, too, as registers are unpacked later.
#define FUSED_SCALED(NAME, BACKWARD, KIND)                                                                                  \
  extern "C" __global__ void __launch_bounds__(384, 1)                                                                      \
      NAME(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap up_map,                               \
           const __grid_constant__ TensorMap out_map, const TensorMap* maps, u32* counter, const int* offsets, int groups,  \
           bf16* up, bf16* out, int f_size, int k_size, const float* scales, float* d_scales, int r_size) {                 \
    after_previous();                                                                                                       \
    FusedProblem p = {&a_map, maps, &up_map, &out_map, counter, offsets, groups, up, out, f_size, k_size, scales, d_scales, \
                      r_size};                                                                                              \
    grouped_fused<BACKWARD, KIND, true>(p);                                                                                 \
  }
FUSED_SCALED(grouped_relu, false, RELU)
FUSED_SCALED(grouped_gelu, false, GELU)
FUSED_SCALED(grouped_swiglu, false, SWIGLU)
FUSED_SCALED(grouped_relu_back_scaled, true, RELU)
FUSED_SCALED(grouped_gelu_back_scaled, true, GELU)
