// What Hopper's kernels of grouped products share: barriers, the tensor copy engine, wgmma, and how operands lie in shared memory. It comes
// behind grouped_walk.cuh and before grouped_hopper.cu and grouped_fused.cu.
//
// An operand lies in shared memory as blocks of 64 x 64 elements (8 KiB in the tensor maps' 128-byte swizzle): 64 rows or columns of the
// product by 64 of the reduction; whichever of the two is contiguous in memory is contiguous here.

struct alignas(64) TensorMap {
  u64 words[16];
};

constexpr int TILE_M = 128, TILE_N = 256;
constexpr int DEPTH = 64;  // of a stage, elements of the reduction
constexpr int BLOCK_BYTES = 8192;  // 64 x 64 elements
constexpr int A_BLOCKS = TILE_M / 64, B_BLOCKS = TILE_N / 64, STAGE_BYTES = (A_BLOCKS + B_BLOCKS) * BLOCK_BYTES;
constexpr int DRAWS = 2;    // tiles that are drawn and not yet begun

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
// Writes what of the box lies inside the matrix; with `add`, it is added to what is there.
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
// c = a b + (keep ? c : 0): a 64 x 16, b 16 x 256, 192 or 128. Of c, thread t of warp w has in rows 16 w + t / 4 and 8 further the columns
// 8 j + 2 (t % 4) and the next: c[4 j], c[4 j + 1] and c[4 j + 2], c[4 j + 3].
#define SUMS_8(I) "+f"(c[I]), "+f"(c[I + 1]), "+f"(c[I + 2]), "+f"(c[I + 3]), "+f"(c[I + 4]), "+f"(c[I + 5]), "+f"(c[I + 6]), "+f"(c[I + 7])
#define SUMS_32(I) SUMS_8(I), SUMS_8(I + 8), SUMS_8(I + 16), SUMS_8(I + 24)
#define SUMS_64 SUMS_32(0), SUMS_32(32)
#define SUMS_96 SUMS_64, SUMS_32(64)
#define SUMS_128 SUMS_96, SUMS_32(96)
#define NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_96 NAMES_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_128 NAMES_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// The operands behind the sums: a, b, keep, and how a and b lie.
#define MULTIPLY(SUMS, COLUMNS, A, B, KEEP, A_LIES, B_LIES)                                                              \
  template <int A_MAJOR, int B_MAJOR>                                                                                    \
  DEVICE void multiply(float (&c)[SUMS], u64 a, u64 b, int keep) {                                                       \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " KEEP ", 0; "                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32.bf16.bf16 {" NAMES_##SUMS "}, " A ", " B           \
                 ", p, 1, 1, " A_LIES ", " B_LIES "; }"                                                                  \
                 : SUMS_##SUMS                                                                                           \
                 : "l"(a), "l"(b), "r"(keep), "n"(A_MAJOR), "n"(B_MAJOR));                                               \
  }
MULTIPLY(128, "256", "%128", "%129", "%130", "%131", "%132")
MULTIPLY(96, "192", "%96", "%97", "%98", "%99", "%100")
MULTIPLY(64, "128", "%64", "%65", "%66", "%67", "%68")
