// Grouped matrix products on Hopper's tensor cores (sm_90a): the experts' feed-forward layers over uneven row groups, without padding.
// A persistent kernel. One producer thread lets the tensor copy engine fill a ring of shared-memory stages; two consumer warpgroups multiply
// 64 x 256 each with wgmma; results leave through the copy engine while the next tile is multiplied. Blocks draw their tiles from a counter and
// find them by the offsets on the device, so the host need not know the groups, and blocks that share the GPU with other kernels draw fewer.
// The same products for other GPUs and sizes are in grouped.cu; modes are explained in grouped_walk.cuh, which comes before this file.
//
// An operand lies in shared memory as blocks of 64 x 64 elements (8 KiB in the tensor maps' 128-byte swizzle): 64 rows or columns of the
// product by 64 of the reduction; whichever of the two is contiguous in memory is contiguous here.

struct alignas(64) TensorMap {
  u64 words[16];
};

constexpr int TILE_M = 128, TILE_N = 256;
constexpr int DEPTH = 64;  // of a stage, elements of the reduction
constexpr int STAGES = 4;
constexpr int BLOCK_BYTES = 8192;  // 64 x 64 elements
constexpr int A_BLOCKS = TILE_M / 64, B_BLOCKS = TILE_N / 64, STAGE_BYTES = (A_BLOCKS + B_BLOCKS) * BLOCK_BYTES;
constexpr int BUFFERS = 2;  // blocks in which a consumer puts results for the copy engine
constexpr int DRAWS = 2;    // tiles that are drawn and not yet begun
constexpr int SORTED_GROUPS = 256;  // groups that are put in order of their sizes

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// --- mbarriers: a phase ends with `pending` arrivals and the bytes that were announced.
DEVICE void barrier_init(u64* barrier, int pending) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(pending) : "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void barrier_arrive_bytes(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity. (Scopes beyond the block would empty the L1 cache each time.)
DEVICE void barrier_wait(u64* barrier, int parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra through; bra again; "
      "through: }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// A barrier of one consumer's 128 threads, and of both.
DEVICE void consumer_barrier(int consumer) { asm volatile("bar.sync %0, 128;" ::"r"(2 + consumer) : "memory"); }
DEVICE void consumers_barrier() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
// What this thread wrote to shared memory is for the copy engine or wgmma; before a barrier.
DEVICE void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- The copy engine.
DEVICE void load_box(u32 to, const TensorMap* map, int x, int y, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}
// Writes what of the box lies inside the matrix; with `add`, f32 is added to what is there.
DEVICE void store_box(const TensorMap* map, int x, int y, u32 from, bool add) {
  if (add)
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
                 "r"(x), "r"(y), "r"(from)
                 : "memory");
  else
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x), "r"(y),
                 "r"(from)
                 : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until at most N of this thread's boxes are still being read from shared memory.
template <int N>
DEVICE void store_box_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// A tensor map in global memory was written there by a copy: the thread that uses it says so first.
DEVICE void acquire_map(const TensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}

// --- wgmma. A descriptor names an operand in shared memory; addresses and offsets count 16 bytes. With the reduction contiguous
// (MAJOR 0), groups of 8 rows lie 1024 bytes apart. Else groups of 8 of the reduction do, and blocks of 64 rows lie a block apart.
template <int MAJOR>
DEVICE u64 descriptor(u32 address) {
  u64 leading = MAJOR ? BLOCK_BYTES >> 4 : 1, stride = 1024 >> 4;
  return (u64)((address & 0x3ffff) >> 4) | leading << 16 | stride << 32 | 1ull << 62;
}
// Steps of 16 along the reduction, in descriptors.
template <int MAJOR>
constexpr int STEP = (MAJOR ? 16 * 128 : 16 * 2) >> 4;
DEVICE void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// c = a b + (keep ? c : 0): a 64 x 16, b 16 x 256. Of c, thread t of warp w has in rows 16 w + t / 4 and 8 further the columns 8 j + 2 (t % 4)
// and the next: c[4 j], c[4 j + 1] and c[4 j + 2], c[4 j + 3].
template <int A_MAJOR, int B_MAJOR>
DEVICE void multiply(float (&c)[128], u64 a, u64 b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %130, 0; "
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, p, 1, 1, %131, %132; }"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
        "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
        "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
        "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
        "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
        "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
        "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
        "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]),
        "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]),
        "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]),
        "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]),
        "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]),
        "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]),
        "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]),
        "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]),
        "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])
      : "l"(a), "l"(b), "r"(keep), "n"(A_MAJOR), "n"(B_MAJOR));
}

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
  DEVICE void store(Buffers& buffers, int n_size) {
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
    buffers.store(buffer, map, column + 64 * CHUNK, row, false);
  }
  // Registers have no index at run time.
  DEVICE void store_next(Buffers& buffers, int n_size) {
    switch (next) {
      case 0: store<0>(buffers, n_size); break;
      case 1: store<1>(buffers, n_size); break;
      case 2: store<2>(buffers, n_size); break;
      default: store<3>(buffers, n_size);
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
      if (waiting.next < 4) waiting.store_next(buffers, p.n_size);  // while this step is multiplied
      previous = stage;
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    multiply_wait<0>();
    if (steps > 0 && thread == 0) barrier_arrive(&shared.empty[previous]);
    while (waiting.next < 4) waiting.store_next(buffers, p.n_size);
    // The sums may be read from here on.
#pragma unroll
    for (int i = 0; i < 128; i++) asm volatile("" : "+f"(sums[i])::"memory");

    int row = tile.m * TILE_M + 64 * consumer, row_end = MODE == 2 ? p.m_size : tile.rows, column = tile.n * TILE_N;
    int first = MODE == 2 ? 0 : tile.first_row;
    bool boxes = sizeof(OUT) == 4 ? p.beta == 0 || p.beta == 1 : p.beta == 0 && (MODE == 2 || row + 64 <= row_end);
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
  while (waiting.next < 4) waiting.store_next(buffers, p.n_size);
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
    Problem p = {&a_map, MODE == 2 ? &b_map : maps, MODE == 2 ? maps : &out_map, counter, offsets, groups, out, outs,      \
                 m_size, n_size, k_size, beta};                                                                            \
    grouped<MODE, OUT>(p);                                                                                                 \
  }
KERNEL(grouped_0, 0, bf16)
KERNEL(grouped_1, 1, bf16)
KERNEL(grouped_2, 2, bf16)
KERNEL(grouped_2_f32, 2, float)
