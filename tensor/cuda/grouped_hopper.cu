// Grouped matrix products on Hopper's tensor cores (sm_90a): the experts' feed-forward layers over uneven row groups, without padding.
// A persistent kernel: one producer warp lets the tensor copy engine fill a ring of shared-memory stages, two consumer warpgroups multiply
// with wgmma. Blocks find their tiles from the offsets on the device, so that the host need not know them. The same products for older GPUs and
// odd sizes are in grouped.cu.
//
// An operand lies in shared memory as blocks of 64 x 64 elements (8 KiB, the tensor map's 128-byte swizzle): 64 rows or columns of the
// product by 64 of the reduction, whichever of the two is contiguous in memory being contiguous here.

struct alignas(64) TensorMap {
  u64 words[16];
};

constexpr int DEPTH = 64;         // of a stage, elements of the reduction
constexpr int BLOCK_BYTES = 8192;  // 64 x 64 elements
constexpr int DRAWS = 2;           // tiles that a producer may be ahead
constexpr int SORTED_GROUPS = 256;  // groups that are put in order of size

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// --- mbarriers: `pending` arrivals and the bytes announced complete a phase.
DEVICE void barrier_init(u64* barrier, int pending) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(pending) : "memory");
}
DEVICE void barrier_arrive_bytes(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives at the same barrier of a block of the cluster. (With .release.cluster it would wait for all memory of the thread.)
DEVICE void barrier_arrive_at(u64* barrier, int block) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(
          shared_address(barrier)),
      "r"(block)
      : "memory");
}
DEVICE void barrier_wait(u64* barrier, int parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra through; "
      "bra again; through: }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Sends a number to a block of the cluster; its barrier counts the four bytes.
DEVICE void send(int* place, int value, u64* barrier, int block) {
  asm volatile(
      "{ .reg .b32 there, bell; mapa.shared::cluster.u32 there, %0, %3; mapa.shared::cluster.u32 bell, %2, %3; "
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [bell]; }" ::"r"(shared_address(place)),
      "r"(value), "r"(shared_address(barrier)), "r"(block)
      : "memory");
}

// --- The copy engine.
DEVICE void load_box(u32 to, const TensorMap* map, int x, int y, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}
// To the same place of all blocks of `mask`.
DEVICE void load_box_to(u32 to, const TensorMap* map, int x, int y, u64* barrier, u16 mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"(mask)
      : "memory");
}
// A tensor map in global memory was written by the host: needed once by the thread that uses it.
DEVICE void acquire_map(const TensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}

// --- wgmma. A descriptor names an operand in shared memory; offsets and addresses count 16 bytes.
// K-major (the reduction contiguous): groups of 8 rows lie 1024 bytes apart. Otherwise groups of 8 of the reduction do, and blocks of 64 rows
// lie a block apart.
template <int MAJOR>
DEVICE u64 descriptor(u32 address) {
  u64 leading = MAJOR ? BLOCK_BYTES >> 4 : 1, stride = 1024 >> 4;
#ifdef LINA_SWAP_OFFSETS
  if (MAJOR) { u64 t = leading; leading = stride; stride = t; }
#endif
  return (u64)((address & 0x3ffff) >> 4) | leading << 16 | stride << 32 | 1ull << 62;
}
DEVICE void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// c = a b + (keep ? c : 0): 64 rows, a 64 x 16, b 16 x N. Thread t of a warp w has, of rows 16 w + t / 4 and 8 more, columns 8 j + 2 (t % 4)
// and the next: c[4 j], c[4 j + 1] of the first row, c[4 j + 2], c[4 j + 3] of the second.
template <int A_MAJOR, int B_MAJOR>
DEVICE void multiply(float (&c)[64], u64 a, u64 b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, %67, %68; }"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
        "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
        "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
        "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
        "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
        "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
        "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
        "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
      : "l"(a), "l"(b), "r"(keep), "n"(A_MAJOR), "n"(B_MAJOR));
}
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

// The four threads of a quad have v[b] of four 16-byte pieces b, each thread a quarter; afterwards thread q has piece q whole.
DEVICE void transpose_quad(u32 (&v)[4]) {
  int lane = threadIdx.x % 4;
  bool odd = lane & 1, high = lane & 2;
  u32 a = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);
  if (odd) v[0] = a, v[2] = b; else v[1] = a, v[3] = b;
  a = __shfl_xor_sync(0xffffffffu, high ? v[0] : v[2], 2), b = __shfl_xor_sync(0xffffffffu, high ? v[1] : v[3], 2);
  if (high) v[0] = a, v[1] = b; else v[2] = a, v[3] = b;
}

// Writes 64 x TILE_N sums of a warpgroup to rows `row` and up to `row_end`, and columns from `column`.
template <int TILE_N>
DEVICE void store_sums(float (&c)[TILE_N / 2], bf16* out, int row, int row_end, int column, int n_size, float beta) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  row += warp * 16 + lane / 4;
  if (beta != 0) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const bf16* old = out + (i64)(row + 8 * half) * n_size + column + lane % 4 * 2;
      if (row + 8 * half < row_end) {
#pragma unroll
        for (int j = 0; j < TILE_N / 8; j++) {
          if (column + 8 * j < n_size) {
            u32 two = *(const u32*)(old + 8 * j);
            c[4 * j + 2 * half] += beta * __uint_as_float(two << 16);
            c[4 * j + 2 * half + 1] += beta * __uint_as_float(two & 0xffff0000u);
          }
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < TILE_N / 8; j += 4) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 v[4];
#pragma unroll
      for (int b = 0; b < 4; b++) v[b] = pack_bf16(c[4 * (j + b) + 2 * half], c[4 * (j + b) + 2 * half + 1]);
      transpose_quad(v);
      int at = column + 8 * (j + lane % 4);
      if (row + 8 * half < row_end && at < n_size)
        *(uint4*)(out + (i64)(row + 8 * half) * n_size + at) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
}
template <int TILE_N>
DEVICE void store_sums(float (&c)[TILE_N / 2], float* out, int row, int row_end, int column, int n_size, float beta) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  row += warp * 16 + lane / 4;
  column += lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (row + 8 * half >= row_end) continue;
    float* to = out + (i64)(row + 8 * half) * n_size + column;
#pragma unroll
    for (int j = 0; j < TILE_N / 8; j++) {
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

// Writes the same sums, whole 64 rows, by the copy engine, which goes on while the next tile is multiplied: 64 columns at a time through two
// buffers of a block each. Rows and columns beyond the map's matrix are left out.
template <int TILE_N>
DEVICE void store_boxes(float (&c)[TILE_N / 2], const TensorMap* map, u32 buffers, int row, int column, int n_size, int consumer, int& buffer_turn) {
  int thread = threadIdx.x % 128, lane = thread % 32, in_row = thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int chunk = 0; chunk < TILE_N / 64; chunk++) {
    if (column + 64 * chunk >= n_size) break;
    u32 buffer = buffers + buffer_turn * BLOCK_BYTES;
    buffer_turn ^= 1;
    if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(4 + consumer) : "memory");
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      float* from = c + 4 * (8 * chunk + j);
      u32 to = buffer + in_row * 128 + (((j + lane / 16) ^ (lane % 8)) << 4);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(pack_bf16(from[0], from[1])),
                   "r"(pack_bf16(from[2], from[3])), "r"(pack_bf16(from[4], from[5])), "r"(pack_bf16(from[6], from[7]))
                   : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(4 + consumer) : "memory");
    if (thread == 0) {
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column + 64 * chunk),
                   "r"(row), "r"(buffer)
                   : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
}

// A tile has 64 ROWS64 x TILE_N sums per warpgroup. With PING each warpgroup has tiles of its own and stores one while the other multiplies; else
// the two share a tile. A cluster of CLUSTER blocks has tiles next to each other in m and shares the loads of the second operand.
template <int MODE, int ROWS64, int TILE_N, bool PING, int CLUSTER, int STAGES, bool BOXES, bool DRAW, typename OUT>
DEVICE void grouped_tiles(const TensorMap* a_map, const TensorMap* b_maps, const TensorMap* out_maps, u32* counter, const int* offsets, int groups, OUT* out,
                          const u64* outs, int m_size, int n_size, int k_size, float beta) {
  constexpr int TILE_M = 64 * ROWS64 * (PING ? 1 : 2), A_BLOCKS = TILE_M / 64, B_BLOCKS = TILE_N / 64;
  constexpr int STAGE_BYTES = (A_BLOCKS + B_BLOCKS) * BLOCK_BYTES, SHARE = B_BLOCKS / CLUSTER;
  extern __shared__ __align__(1024) u8 memory[];
  __shared__ u64 full[STAGES], empty[STAGES], drawn_full[DRAWS], drawn_empty[DRAWS], multiplied[2];
  __shared__ int drawn[DRAWS];
  __shared__ u16 order[MODE == 2 ? SORTED_GROUPS : 1];
  u32 ring = (shared_address(memory) + 1023) & ~1023u;
  u8* ring_pointer = memory + (ring - shared_address(memory));
  int warpgroup = threadIdx.x / 128, rank = CLUSTER == 1 ? 0 : blockIdx.x % CLUSTER;
  int worker = blockIdx.x / CLUSTER, workers = gridDim.x / CLUSTER;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], (PING ? 1 : 2) * CLUSTER);
    }
    for (int c = 0; c < 2; c++) barrier_init(&multiplied[c], 1);
    for (int s = 0; s < DRAWS; s++) {
      barrier_init(&drawn_full[s], 1);
      barrier_init(&drawn_empty[s], 9 * CLUSTER - 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  if (MODE == 2 && DRAW && groups <= SORTED_GROUPS) {
    // Longest reductions first, so that the last tiles are short.
    for (int g = threadIdx.x; g < groups; g += blockDim.x) {
      int rows = offsets[g + 1] - offsets[g], before = 0;
      for (int i = 0; i < groups; i++) {
        int other = offsets[i + 1] - offsets[i];
        before += other > rows || (other == rows && i < g);
      }
      order[before] = g;
    }
  }
  if (CLUSTER == 1) {
    __syncthreads();
  } else {
    __syncthreads();
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  }

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      Walk<MODE, TILE_M * CLUSTER, TILE_N> walk(offsets, MODE == 2 && DRAW && groups <= SORTED_GROUPS ? order : nullptr, groups, m_size, n_size);
      Tile tile;
      int stage = 0, phase = 0, acquired = -1;
      int unit = worker, draw = 0, draw_phase = 0;
      while (true) {
        bool any = walk.find(unit, tile);
        if (!any) break;
        const TensorMap* b_map = MODE == 2 ? b_maps : b_maps + tile.group;
        if (MODE != 2 && acquired != tile.group) acquire_map(b_map), acquired = tile.group;
        int m = (tile.m * CLUSTER + rank) * TILE_M, n = tile.n * TILE_N;
        int steps = ((MODE == 2 ? tile.rows : k_size) + DEPTH - 1) / DEPTH;
        for (int step = 0; step < steps; step++) {
          barrier_wait(&empty[stage], phase ^ 1);
          barrier_arrive_bytes(&full[stage], STAGE_BYTES);
          u32 a = ring + stage * STAGE_BYTES, b = a + A_BLOCKS * BLOCK_BYTES;
          int k = step * DEPTH;
          if (MODE == 2) {
#pragma unroll
            for (int i = 0; i < A_BLOCKS; i++)
              load_box(a + i * BLOCK_BYTES, a_map, m + 64 * i, tile.first_row + k, &full[stage]);
          } else {
            load_box(a, a_map, k, tile.first_row + m, &full[stage]);
          }
          if (MODE == 0) {
            if (CLUSTER == 1) load_box(b, b_map, k, n, &full[stage]);
            else
              load_box_to(b + rank * SHARE * BLOCK_BYTES, b_map, k, n + rank * SHARE * 64, &full[stage], (1 << CLUSTER) - 1);
          } else {
#pragma unroll
            for (int j = 0; j < SHARE; j++) {
              int block = rank * SHARE + j, row = MODE == 2 ? tile.first_row + k : k;
              if (CLUSTER == 1) load_box(b + block * BLOCK_BYTES, b_map, n + 64 * block, row, &full[stage]);
              else load_box_to(b + block * BLOCK_BYTES, b_map, n + 64 * block, row, &full[stage], (1 << CLUSTER) - 1);
            }
          }
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        if (!DRAW) {
          unit += workers;
          continue;
        }
        if (rank == 0) {
          barrier_wait(&drawn_empty[draw], draw_phase ^ 1);
          unit = workers + (int)atomicAdd(counter, 1u);
        }
        if (CLUSTER == 1) {
          drawn[draw] = unit;
          barrier_arrive(&drawn_full[draw]);
        } else {
          if (rank == 0) {
#pragma unroll
            for (int block = 0; block < CLUSTER; block++) send(&drawn[draw], unit, &drawn_full[draw], block);
          }
          barrier_arrive_bytes(&drawn_full[draw], 4);
          if (rank != 0) {
            barrier_wait(&drawn_full[draw], draw_phase);
            unit = drawn[draw];
            barrier_arrive_at(&drawn_empty[draw], 0);
          }
        }
        if (++draw == DRAWS) draw = 0, draw_phase ^= 1;
      }
      // The last worker leaves the counter as it was found.
      if (DRAW && rank == 0 && atomicAdd(counter + 1, 1u) == (u32)workers - 1) counter[0] = 0, counter[1] = 0;
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Walk<MODE, TILE_M * CLUSTER, TILE_N> walk(offsets, MODE == 2 && DRAW && groups <= SORTED_GROUPS ? order : nullptr, groups, m_size, n_size);
    Tile tile;
    int stage = 0, phase = 0, turn = 0, acquired = -1, buffer_turn = 0;
    int consumer = warpgroup - 1, thread = threadIdx.x % 128;
    int draw = 0, draw_phase = 0;
    auto next = [&](int unit) {
      if (!DRAW) return unit + workers;
      barrier_wait(&drawn_full[draw], draw_phase);
      unit = drawn[draw];
      __syncwarp();
      if (thread % 32 == 0) {
        if (CLUSTER == 1) barrier_arrive(&drawn_empty[draw]);
        else barrier_arrive_at(&drawn_empty[draw], 0);
      }
      if (++draw == DRAWS) draw = 0, draw_phase ^= 1;
      return unit;
    };
    for (int unit = worker; walk.find(unit, tile); unit = next(unit)) {
      int reduced = MODE == 2 ? tile.rows : k_size, steps = (reduced + DEPTH - 1) / DEPTH;
      if (PING && (turn++ & 1) != consumer) {
        stage += steps;
        phase ^= (stage / STAGES) & 1;
        stage %= STAGES;
        continue;
      }
      if (PING && turn > 1) barrier_wait(&multiplied[consumer ^ 1], (((turn - 1) >> 1) - 1 + consumer) & 1);
      int m = (tile.m * CLUSTER + rank) * TILE_M;
      bool needed = CLUSTER == 1 || m < (MODE == 2 ? m_size : tile.rows);
      float sums[ROWS64][TILE_N / 2];
      int previous = 0;
      if (MODE == 2 && steps == 0) {
#pragma unroll
        for (int r = 0; r < ROWS64; r++)
#pragma unroll
          for (int i = 0; i < TILE_N / 2; i++) sums[r][i] = 0;
      }
      for (int step = 0; step < steps; step++) {
        barrier_wait(&full[stage], phase);
        u32 a = ring + stage * STAGE_BYTES, b = a + A_BLOCKS * BLOCK_BYTES;
        if (MODE == 2 && step == steps - 1 && reduced % DEPTH != 0) {
          // The rows of the next group must not take part: both operands, lest an infinity there meets a zero here.
          u8* at = ring_pointer + stage * STAGE_BYTES;
          int valid = reduced % DEPTH, pieces = (DEPTH - valid) * 8;
          for (int i = PING ? thread : threadIdx.x - 128; i < pieces * (A_BLOCKS + B_BLOCKS); i += PING ? 128 : 256)
            *(uint4*)(at + i / pieces * BLOCK_BYTES + valid * 128 + i % pieces * 16) = make_uint4(0, 0, 0, 0);
          asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
          asm volatile("bar.sync %0, %1;" ::"r"(PING ? 1 + consumer : 1), "n"(PING ? 128 : 256) : "memory");
        }
        if (needed) {
          if (!PING) a += consumer * ROWS64 * BLOCK_BYTES;
          multiply_begin();
#pragma unroll
          for (int k = 0; k < DEPTH / 16; k++) {
            u64 b_at = descriptor<MODE != 0>(b) + k * (MODE == 0 ? 32 >> 4 : 2048 >> 4);
#pragma unroll
            for (int r = 0; r < ROWS64; r++)
              multiply<MODE == 2, MODE != 0>(
                  sums[r], descriptor<MODE == 2>(a + r * BLOCK_BYTES) + k * (MODE == 2 ? 2048 >> 4 : 32 >> 4), b_at,
                  step + k > 0);
          }
          multiply_commit();
          multiply_wait<1>();
        }
        if (step > 0 && thread < CLUSTER) {
          if (CLUSTER == 1) barrier_arrive(&empty[previous]);
          else barrier_arrive_at(&empty[previous], thread);
        }
        previous = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      if (PING && thread == 0) barrier_arrive(&multiplied[consumer]);
      multiply_wait<0>();
      if (steps > 0 && thread < CLUSTER) {
        if (CLUSTER == 1) barrier_arrive(&empty[previous]);
        else barrier_arrive_at(&empty[previous], thread);
      }
      if (!needed || (MODE == 2 && steps == 0 && beta != 0)) continue;
#pragma unroll
      for (int r = 0; r < ROWS64; r++) {
#pragma unroll
        for (int i = 0; i < TILE_N / 2; i++) asm volatile("" : "+f"(sums[r][i])::"memory");
        int row = m + ((PING ? 0 : consumer * ROWS64) + r) * 64;
        int row_end = MODE == 2 ? m_size : tile.rows;
        if (BOXES && sizeof(OUT) == 2 && beta == 0 && (MODE == 2 || row + 64 <= row_end)) {
          const TensorMap* map = MODE == 2 ? out_maps + tile.group : out_maps;
          if (MODE == 2 && acquired != tile.group && thread == 0) acquire_map(map);
          acquired = tile.group;
          if (row < row_end)
            store_boxes<TILE_N>(sums[r], map, ring + STAGES * STAGE_BYTES + consumer * 2 * BLOCK_BYTES,
                                row + (MODE == 2 ? 0 : tile.first_row), tile.n * TILE_N, n_size, consumer, buffer_turn);
        } else if (MODE == 2) store_sums<TILE_N>(sums[r], (OUT*)outs[tile.group], row, m_size, tile.n * TILE_N, n_size, beta);
        else
          store_sums<TILE_N>(sums[r], out, tile.first_row + row, tile.first_row + tile.rows, tile.n * TILE_N, n_size, beta);
      }
    }
  }
  if (BOXES && warpgroup > 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  if (CLUSTER > 1) asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

#define CLUSTER_1
#define CLUSTER_2 __cluster_dims__(2, 1, 1)
#define KERNEL(NAME, MODE, ROWS64, TILE_N, PING, CLUSTER, STAGES, BOXES, DRAW, OUT)                                          \
  extern "C" __global__ void __launch_bounds__(384, 1) CLUSTER_##CLUSTER                                                   \
      NAME(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,                               \
           const __grid_constant__ TensorMap out_map, const TensorMap* maps, u32* counter, const int* offsets, int groups,  \
           void* out, const u64* outs, int m_size, int n_size, int k_size, float beta) {                                   \
    grouped_tiles<MODE, ROWS64, TILE_N, PING, CLUSTER, STAGES, BOXES, DRAW, OUT>(                                           \
        &a_map, MODE == 2 ? &b_map : maps, MODE == 2 ? maps : &out_map, counter, offsets, groups, (OUT*)out, outs, m_size,  \
        n_size, k_size, beta);                                                                                             \
  }

KERNEL(grouped_0, 0, 1, 256, false, 1, 4, true, true, bf16)
KERNEL(grouped_1, 1, 1, 256, false, 1, 4, true, true, bf16)
KERNEL(grouped_2, 2, 1, 256, false, 1, 4, true, true, bf16)
KERNEL(grouped_2_f32, 2, 1, 256, false, 1, 4, false, true, float)
