// The gate's products on Hopper's tensor cores (sm_90a), for bf16 tokens and many experts (see gate.ts): with mma.sync (gate.cu) these are bound by
// arithmetic, three products for each number, by issuing them and by fetching operands from shared memory. Operands as there: f32 numbers are
// sums of three bf16 numbers. grouped_hopper.cuh and gate_terms.cuh come before this file.

constexpr int GATE_E = 64;  // experts of a block
constexpr int TERM_BYTES = 8192;  // 64 x 64 of one term

// Four floats as three terms, a block of 64 x 64 each: row r, columns 4 piece to 4 piece + 3.
DEVICE void store_terms(u32 to, int r, int piece, float4 from) {
  u32 low[3], high[3];
  split3(from.x, from.y, low);
  split3(from.z, from.w, high);
  to += r * 128 + ((piece / 2 ^ (r & 7)) << 4) + piece % 2 * 8;
#pragma unroll
  for (int i = 0; i < 3; i++) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to + i * TERM_BYTES), "r"(low[i]), "r"(high[i]) : "memory");
  }
}

// Producers, two warpgroups, split a matrix of f32, 64 rows by 64 columns a slice, a row's columns contiguous. `from(row, column)` is the address of 4
// of them, or null for zeros. A thread has so many fours of a slice.
constexpr int FOURS = 4;
template <typename From>
DEVICE void load_fours(float4 (&held)[FOURS], const From& from) {
#pragma unroll
  for (int j = 0; j < FOURS; j++) {
    const float* at = from(j * 16 + threadIdx.x / 16, threadIdx.x % 16 * 4);
    held[j] = at ? *reinterpret_cast<const float4*>(at) : make_float4(0, 0, 0, 0);
  }
}
DEVICE void store_fours(u32 to, const float4 (&held)[FOURS]) {
#pragma unroll
  for (int j = 0; j < FOURS; j++) store_terms(to, j * 16 + threadIdx.x / 16, threadIdx.x % 16, held[j]);
}
// All slices: `load(slice, held)` begins to load one, `fill(slice, held)` puts it where it belongs. Two are on their way.
template <typename Load, typename Fill>
DEVICE void produce_slices(int slices, const Load& load, const Fill& fill) {
  float4 even[FOURS], odd[FOURS];
  load(0, even);
  load(1, odd);
  for (int slice = 0; slice < slices; slice += 2) {
    fill(slice, even);
    load(slice + 2, even);
    if (slice + 1 >= slices) break;
    fill(slice + 1, odd);
    load(slice + 3, odd);
  }
}
constexpr int PRODUCERS = 256;
// Registers are shared out again: consumers keep sums.
DEVICE void be_producer() { asm volatile("setmaxnreg.dec.sync.aligned.u32 88;"); }
DEVICE void be_consumer() { asm volatile("setmaxnreg.inc.sync.aligned.u32 160;"); }

// The stages' barriers. A stage is full with the bytes of the copy engine, their announcement and the producers' arrivals, empty when 8 warps have read it.
template <int STAGES>
struct Ring {
  u64 full[STAGES], empty[STAGES];

  DEVICE void init() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < STAGES; s++) {
        barrier_init(&full[s], PRODUCERS + 1);
        barrier_init(&empty[s], 8);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }
};

// Logits of 128 tokens and up to 64 experts, over a share of the columns: blocks (tokens, experts, shares). Two warpgroups load and split, two
// multiply 64 tokens each by the three terms side by side. Slices of 64 columns. The block that finishes last adds the shares in their order.
constexpr int GATE_STAGES = 5, GATE_STAGE = 2 * 8192 + 3 * TERM_BYTES;
extern "C" __global__ void __launch_bounds__(512, 1)
    gate_hopper(const __grid_constant__ TensorMap x, const float* gate, float* logits, float* shares, u32* counters, int tokens,
                int experts, int width, int per_share) {
  after_previous();
  extern __shared__ __align__(1024) u8 gate_shared[];
  __shared__ Ring<GATE_STAGES> ring;
  __shared__ u32 finished;
  u32 stages = (shared_address(gate_shared) + 1023) & ~1023u;
  int first = blockIdx.x * 128, first_expert = blockIdx.y * GATE_E;
  int start = blockIdx.z * per_share, end = start + per_share < width ? start + per_share : width;
  int slices = (end - start + 63) / 64;
  ring.init();
  if (threadIdx.x < PRODUCERS) {
    be_producer();
    auto load = [&](int slice, float4(&held)[FOURS]) {
      load_fours(held, [&](int row, int column) -> const float* {
        int e = first_expert + row, c = start + slice * 64 + column;
        return e < experts && c < end ? gate + (i64)e * width + c : nullptr;
      });
    };
    produce_slices(slices, load, [&](int slice, const float4(&held)[FOURS]) {
      int stage = slice % GATE_STAGES;
      u32 to = stages + stage * GATE_STAGE;
      barrier_wait(&ring.empty[stage], (slice / GATE_STAGES & 1) ^ 1);
      if (threadIdx.x == 0) {
        barrier_arrive_bytes(&ring.full[stage], 2 * 8192);
        load_box(to, &x, start + slice * 64, first, &ring.full[stage]);
      }
      store_fours(to + 2 * 8192, held);
      publish();
      barrier_arrive(&ring.full[stage]);
    });
    return;
  }
  be_consumer();
  int consumer = threadIdx.x / 128 - 2, lane = threadIdx.x % 32, t = threadIdx.x - PRODUCERS;
  float c[96], sums[32];
#pragma unroll
  for (int i = 0; i < 32; i++) sums[i] = 0;
  for (int slice = 0; slice < slices; slice++) {
    int stage = slice % GATE_STAGES;
    u32 from = stages + stage * GATE_STAGE;
    u64 a = descriptor<0>(from + consumer * 8192), b = descriptor<0>(from + 2 * 8192);
    barrier_wait(&ring.full[stage], slice / GATE_STAGES & 1);
    multiply_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) multiply<0, 0>(c, a + k * STEP<0>, b + k * STEP<0>, k > 0);
    multiply_commit();
    multiply_wait<0>();
    if (lane == 0) barrier_arrive(&ring.empty[stage]);
    // Tensor cores cut sums off: they only see 64 columns, and f32 additions round to nearest.
#pragma unroll
    for (int i = 0; i < 32; i++) sums[i] += c[64 + i] + c[32 + i] + c[i];
  }
  int count = gridDim.z;
  if (count > 1) {
    int tile = blockIdx.y * gridDim.x + blockIdx.x;
    float* all = shares + (i64)tile * count * 32 * 256 + t;
    float* mine = all + (i64)blockIdx.z * 32 * 256;
#pragma unroll
    for (int i = 0; i < 32; i++) __stcg(mine + i * 256, sums[i]);
    __threadfence();
    consumers_barrier();
    if (t == 0) {
      finished = atomicAdd(&counters[tile], 1u);
      if (finished == count - 1u) counters[tile] = 0;
    }
    consumers_barrier();
    if (finished != count - 1u) return;
    __threadfence();
#pragma unroll
    for (int i = 0; i < 32; i++) {
      c[i] = sums[i];
      sums[i] = 0;
    }
    for (int share = 0; share < count; share++) {
      const float* other = all + (i64)share * 32 * 256;
      bool own = share == (int)blockIdx.z;
#pragma unroll
      for (int i = 0; i < 32; i++) sums[i] += own ? c[i] : __ldcg(other + i * 256);
    }
  }
#pragma unroll
  for (int i = 0; i < 32; i++) {
    int token = first + consumer * 64 + t % 128 / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
    int e = first_expert + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (token < tokens && e < experts) logits[(i64)token * experts + e] = sums[i];
  }
}

// parts[split][experts][width] = dLogitsᵀ x over the tokens of a split, for up to 64 experts and 256 columns: blocks (columns, experts, splits).
// Two warpgroups load and split, two multiply 128 columns each. Slices of 64 tokens; per_split is a multiple.
constexpr int GRADIENT_STAGES = 4, GRADIENT_STAGE = 4 * 8192 + 3 * TERM_BYTES;
extern "C" __global__ void __launch_bounds__(512, 1)
    gate_dw_hopper(const __grid_constant__ TensorMap x, const float* d_logits, float* parts, int tokens, int experts, int width,
                   int per_split) {
  after_previous();
  extern __shared__ __align__(1024) u8 gate_shared[];
  __shared__ Ring<GRADIENT_STAGES> ring;
  u32 stages = (shared_address(gate_shared) + 1023) & ~1023u;
  int first_column = blockIdx.x * 256, first_expert = blockIdx.y * GATE_E;
  int start = blockIdx.z * per_split, end = start + per_split < tokens ? start + per_split : tokens;
  int slices = (end - start + 63) / 64;
  ring.init();
  if (threadIdx.x < PRODUCERS) {
    be_producer();
    auto load = [&](int slice, float4(&held)[FOURS]) {
      load_fours(held, [&](int row, int column) -> const float* {
        int token = start + slice * 64 + row, e = first_expert + column;
        return token < end && e < experts ? d_logits + (i64)token * experts + e : nullptr;
      });
    };
    produce_slices(slices, load, [&](int slice, const float4(&held)[FOURS]) {
      int stage = slice % GRADIENT_STAGES;
      u32 to = stages + stage * GRADIENT_STAGE;
      barrier_wait(&ring.empty[stage], (slice / GRADIENT_STAGES & 1) ^ 1);
      if (threadIdx.x == 0) {
        barrier_arrive_bytes(&ring.full[stage], 4 * 8192);
        for (int i = 0; i < 4; i++) load_box(to + i * 8192, &x, first_column + i * 64, start + slice * 64, &ring.full[stage]);
      }
      store_fours(to + 4 * 8192, held);
      publish();
      barrier_arrive(&ring.full[stage]);
    });
    return;
  }
  be_consumer();
  int consumer = threadIdx.x / 128 - 2, lane = threadIdx.x % 32;
  float c[64], sums[64];
#pragma unroll
  for (int i = 0; i < 64; i++) sums[i] = 0;
  for (int slice = 0; slice < slices; slice++) {
    int stage = slice % GRADIENT_STAGES;
    u32 from = stages + stage * GRADIENT_STAGE;
    u64 a = descriptor<1>(from + 4 * 8192), b = descriptor<1>(from + consumer * 2 * 8192);
    barrier_wait(&ring.full[stage], slice / GRADIENT_STAGES & 1);
    multiply_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
      for (int term = 2; term >= 0; term--) {
        multiply<1, 1>(c, a + (term * TERM_BYTES >> 4) + k * STEP<1>, b + k * STEP<1>, k > 0 || term < 2);
      }
    }
    multiply_commit();
    multiply_wait<0>();
    if (lane == 0) barrier_arrive(&ring.empty[stage]);
#pragma unroll
    for (int i = 0; i < 64; i++) sums[i] += c[i];
  }
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    int e = first_expert + threadIdx.x % 128 / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
    int column = first_column + consumer * 128 + i / 4 * 8 + lane % 4 * 2;
    if (e >= experts || column >= width) continue;
    *reinterpret_cast<float2*>(parts + ((i64)blockIdx.z * experts + e) * width + column) = make_float2(sums[i], sums[i + 1]);
  }
}
