// The gradient of a router's input (gate_combine.cu) on Hopper: the products run by themselves while rows are added up, so that only memory takes
// time. grouped_hopper.cuh and gate_terms.cuh come before this file.

// c = a b + (keep ? c : 0) as in grouped_hopper.cuh, for 64 columns.
template <int A_MAJOR, int B_MAJOR>
DEVICE void multiply(float (&c)[32], u64 a, u64 b, int keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, p, 1, 1, %35, %36; }"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
        "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
        "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
        "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
      : "l"(a), "l"(b), "r"(keep), "n"(A_MAJOR), "n"(B_MAJOR));
}

constexpr int COMBINE_TOKENS = 64;  // of a chunk
constexpr int COMBINE_ROW = 264;  // floats of a row of results
constexpr int COMBINE_WEIGHTS = 2 * 4 * 8192, COMBINE_TERMS = 2 * 2 * 8192;

DEVICE void store_pair(u32 to, u32 value) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory"); }

// out[n] = sum over k of y[slots[n, k]] + dLogits[n] gate, plus out[n] where `adds`, for at most S * 16 experts and 8 / TOKENS choices. A block of 16
// warps owns 256 columns and goes through `per_block` tokens, 64 at a time. While a warp adds up rows of its 4 tokens of a chunk, TOKENS at a time, whose
// next rows are loaded meanwhile, its warpgroup multiplies the next chunk with 64 columns of the gate's weights: both as two bf16 terms.
template <int S, int TOKENS>
DEVICE void combine_hopper(const bf16* y, const int* slots, const float* d_logits, const float* gate, bf16* out, int tokens,
                           int choices, int experts, int width, int per_block, int adds) {
  constexpr int P = 8 / TOKENS, MINE = 4;
  extern __shared__ __align__(1024) u8 combine_shared[];
  u32 weights = (shared_address(combine_shared) + 1023) & ~1023u, terms = weights + COMBINE_WEIGHTS;
  float* results = reinterpret_cast<float*>(combine_shared + (terms + COMBINE_TERMS - shared_address(combine_shared)));
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4, first_column = blockIdx.x * 256;
  int start = blockIdx.y * per_block, end = start + per_block < tokens ? start + per_block : tokens;
  int column = first_column + lane * 8;
  bool wide = column < width;

  // Numbers of the rows of this warp's tokens in a chunk, one per lane; rows of the next TOKENS tokens.
  auto numbers_of = [&](int n) {
    int token = n + warp * MINE + lane / choices;
    return lane < MINE * choices && token < end ? slots[(i64)token * choices + lane % choices] : -1;
  };
  uint4 held[TOKENS][P];
  auto load = [&](uint4 (&held)[P], int numbers, int token) {
#pragma unroll
    for (int p = 0; p < P; p++) {
      int slot = __shfl_sync(0xffffffffu, numbers, token * choices + p & 31);
      held[p] = make_uint4(0, 0, 0, 0);
      if (p < choices && slot >= 0 && wide) held[p] = *reinterpret_cast<const uint4*>(y + (i64)slot * width + column);
    }
  };
  // Two experts of S * 8 pairs, for S tokens of a chunk.
  float next[S][2];
  auto fetch = [&](int n) {
#pragma unroll
    for (int j = 0; j < S; j++) {
      int i = threadIdx.x + j * 512, row = n + i / (S * 8), e = i % (S * 8) * 2;
      next[j][0] = row < end && e < experts ? d_logits[(i64)row * experts + e] : 0.0f;
      next[j][1] = row < end && e + 1 < experts ? d_logits[(i64)row * experts + e + 1] : 0.0f;
    }
  };
  auto split = [&](int turn) {
#pragma unroll
    for (int j = 0; j < S; j++) {
      int i = threadIdx.x + j * 512, row = i / (S * 8), pair = i % (S * 8);
      u32 both[2], to = terms + turn * 2 * 8192 + row * 128 + ((pair / 4 ^ (row & 7)) << 4) + pair % 4 * 4;
      split2(next[j][0], next[j][1], both);
      store_pair(to, both[0]);
      store_pair(to + 8192, both[1]);
    }
  };
  float c[32];
  auto multiply_chunk = [&](int turn) {
    multiply_begin();
#pragma unroll
    for (int k = 0; k < S; k++) {
      u64 a = descriptor<0>(terms + turn * 2 * 8192) + k * STEP<0>, b = descriptor<1>(weights + group * 8192) + k * STEP<1>;
      multiply<0, 1>(c, a + (8192 >> 4), b, k > 0);
      multiply<0, 1>(c, a, b + (4 * 8192 >> 4), 1);
      multiply<0, 1>(c, a, b, 1);
    }
    multiply_commit();
  };
  auto store_results = [&]() {
    multiply_wait<0>();
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      int row = warp % 4 * 16 + lane / 4 + i % 4 / 2 * 8;
      *reinterpret_cast<float2*>(results + row * COMBINE_ROW + group * 64 + i / 4 * 8 + lane % 4 * 2) = make_float2(c[i], c[i + 1]);
    }
  };

  after_previous();
  int numbers = numbers_of(start), next_numbers = numbers_of(start + COMBINE_TOKENS);
  fetch(start);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) load(held[t], numbers, t);
#pragma unroll 2
  for (int j = 0; j < S * 2; j++) {
    int i = threadIdx.x + j * 512, e = i / 64, piece = i % 64, at = first_column + piece * 4;
    float4 from = make_float4(0, 0, 0, 0);
    if (e < experts && at < width) from = *reinterpret_cast<const float4*>(gate + (i64)e * width + at);
    u32 low[2], high[2], to = weights + piece / 16 * 8192 + e * 128 + ((piece % 16 / 2 ^ (e & 7)) << 4) + piece % 2 * 8;
    split2(from.x, from.y, low);
    split2(from.z, from.w, high);
#pragma unroll
    for (int term = 0; term < 2; term++) {
      store_pair(to + term * 4 * 8192, low[term]);
      store_pair(to + term * 4 * 8192 + 4, high[term]);
    }
  }
  split(0);
  fetch(start + COMBINE_TOKENS);
  split(1);
  publish();
  __syncthreads();
  multiply_chunk(0);
  store_results();
  __syncthreads();
  for (int n = start, turn = 0; n < end; n += COMBINE_TOKENS, turn ^= 1) {
    multiply_chunk(turn ^ 1);  // the next chunk; behind the last one of no use
    __syncthreads();  // only that the assembler does not put the products off until they are waited for
#pragma unroll
    for (int token = 0; token < MINE; token += TOKENS) {
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        float sums[8];
        const float4* from = reinterpret_cast<const float4*>(results + (warp * MINE + token + t) * COMBINE_ROW + lane * 8);
        float4 one = from[0], two = from[1];
        sums[0] = one.x, sums[1] = one.y, sums[2] = one.z, sums[3] = one.w;
        sums[4] = two.x, sums[5] = two.y, sums[6] = two.z, sums[7] = two.w;
#pragma unroll
        for (int p = 0; p < P; p++) {
          u32 words[4] = {held[t][p].x, held[t][p].y, held[t][p].z, held[t][p].w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            sums[2 * j] += __uint_as_float(words[j] << 16);
            sums[2 * j + 1] += __uint_as_float(words[j] & 0xffff0000u);
          }
        }
        int row = n + warp * MINE + token + t;
        if (adds && row < end && wide) {
          uint4 old = *reinterpret_cast<const uint4*>(out + (i64)row * width + column);
          u32 words[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            sums[2 * j] += __uint_as_float(words[j] << 16);
            sums[2 * j + 1] += __uint_as_float(words[j] & 0xffff0000u);
          }
        }
        if (token + TOKENS < MINE) load(held[t], numbers, token + TOKENS + t);
        else load(held[t], next_numbers, t);
        if (row < end && wide) {
          *reinterpret_cast<uint4*>(out + (i64)row * width + column) = make_uint4(
              pack_bf16(sums[0], sums[1]), pack_bf16(sums[2], sums[3]), pack_bf16(sums[4], sums[5]), pack_bf16(sums[6], sums[7]));
        }
      }
    }
    numbers = next_numbers;
    next_numbers = numbers_of(n + 2 * COMBINE_TOKENS);
    fetch(n + 2 * COMBINE_TOKENS);
    __syncthreads();
    store_results();
    split(turn);
    publish();
    __syncthreads();
  }
}
#define COMBINE(S, TOKENS)                                                                                               \
  extern "C" __global__ void __launch_bounds__(512, 1)                                                                   \
      gate_combine_hopper_##S##_##TOKENS(const bf16* y, const int* slots, const float* d_logits, const float* gate,      \
                                         bf16* out, int tokens, int choices, int experts, int width, int per_block,      \
                                         int adds) {                                                                     \
    combine_hopper<S, TOKENS>(y, slots, d_logits, gate, out, tokens, choices, experts, width, per_block, adds);          \
  }
COMBINE(1, 4)
COMBINE(1, 2)
COMBINE(1, 1)
COMBINE(4, 4)
COMBINE(4, 2)
COMBINE(4, 1)
