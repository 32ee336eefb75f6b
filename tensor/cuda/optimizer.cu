// The end of a step: sums of squares over a list of tensors, the factor that clips their norm, and AdamW over a list of parameters. A list is
// one launch whatever its length: a table on the device tells where the tensors lie, the grid has a block per chunk of equally many elements,
// and a block finds its tensor by bisection. Sums are made of one partial per chunk, added in the order of chunks: equal inputs give equal
// bits on every GPU. Not here: which tensors, and when (moe/).

constexpr int THREADS = 256;

// A tensor of a list to be summed; `first` is its first chunk.
struct Summand {
  const void* x;
  i64 size;
  int first;
  int wide;  // 1 for f32, 0 for bf16
};

// A parameter of a list. `kind` is a KIND_ below; `first` is its first chunk.
struct Parameter {
  void* value;
  short* residual;
  void* gradient;
  float* moment1;
  float* moment2;
  i64 size;
  int first;
  int kind;
  float decay;
  float padding;
};
constexpr int KIND_BF16_F32 = 0;   // bf16 parameter with residual, f32 gradient
constexpr int KIND_BF16_BF16 = 1;  // bf16 parameter with residual, bf16 gradient
// 2: f32 parameter and gradient

// The last entry of a table whose first chunk is not after `chunk`. Entries without elements share their first chunk with the next one,
// so it is never one of those.
template <typename Entry>
DEVICE int find_entry(const Entry* table, int entries, int chunk) {
  int low = 0, high = entries;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (table[middle].first <= chunk) low = middle;
    else high = middle;
  }
  return low;
}

template <int BYTES>
DEVICE bool aligned(const void* address) { return ((u64)address & (BYTES - 1)) == 0; }

// The sum over a block, in a fixed order, known to thread 0; for any power of two of threads.
DEVICE double block_sum_f64(double x, double* scratch) {
  scratch[threadIdx.x] = x;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
  }
  return scratch[0];
}

// Σ f(x[i]) over the elements `begin` to `end` by a thread of a block: SUM_UNROLL packs at a time, each with a sum of its own. `begin` is a
// multiple of the pack.
constexpr int SUM_UNROLL = 4;
template <typename T, typename F>
DEVICE double thread_sum(const T* x, i64 begin, i64 end, F f) {
  constexpr int N = 16 / sizeof(T);
  double sums[SUM_UNROLL] = {};
  i64 i = begin + threadIdx.x;
  if (aligned<16>(x)) {
    i64 step = (i64)blockDim.x * N, at = begin + threadIdx.x * N;
    for (; at + (SUM_UNROLL - 1) * step + N <= end; at += SUM_UNROLL * step) {
      Pack<T, N> packs[SUM_UNROLL];
#pragma unroll
      for (int u = 0; u < SUM_UNROLL; u++) packs[u] = *(const Pack<T, N>*)(x + at + u * step);
#pragma unroll
      for (int u = 0; u < SUM_UNROLL; u++) {
#pragma unroll
        for (int j = 0; j < N; j++) sums[u] += f((double)to_f32(packs[u].at[j]));
      }
    }
    for (; at + N <= end; at += step) {
      Pack<T, N> pack = *(const Pack<T, N>*)(x + at);
      for (int j = 0; j < N; j++) sums[0] += f((double)to_f32(pack.at[j]));
    }
    i = begin + (end - begin) / N * N + threadIdx.x;
  }
  for (; i < end; i += blockDim.x) sums[1] += f((double)to_f32(x[i]));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
square_partials(const Summand* table, int entries, int chunk, double* partials) {
  after_previous();
  __shared__ double scratch[THREADS];
  Summand x = table[find_entry(table, entries, blockIdx.x)];
  auto square = [](double a) { return a * a; };
  i64 begin = (i64)(blockIdx.x - x.first) * chunk, end = begin + chunk < x.size ? begin + chunk : x.size;
  double sum = x.wide ? thread_sum((const float*)x.x, begin, end, square) : thread_sum((const bf16*)x.x, begin, end, square);
  sum = block_sum_f64(sum, scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

#define SUM_PARTIALS(NAME, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                   \
  sum_partials_##NAME(const T* x, i64 size, int chunk, double* partials) {                                \
    after_previous();                                                                                     \
    __shared__ double scratch[THREADS];                                                                   \
    i64 begin = (i64)blockIdx.x * chunk, end = begin + chunk < size ? begin + chunk : size;               \
    double sum = block_sum_f64(thread_sum(x, begin, end, [](double a) { return a; }), scratch);           \
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;                                                     \
  }
SUM_PARTIALS(f32, float)
SUM_PARTIALS(bf16, bf16)

// out[0] += Σ partials; one block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) add_partials(const double* partials, int count, double* out) {
  after_previous();
  __shared__ double scratch[1024];
  double sum = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < count; i += 1024) sum += partials[i];
  sum = block_sum_f64(sum, scratch);
  if (threadIdx.x == 0) out[0] += sum;
}

// One thread. NaN if the sum of squares is not finite, whatever the limit.
extern "C" __global__ void clip_scale(const double* squares, double limit, float* out) {
  after_previous();
  double norm = sqrt(squares[0]);
  double factor = limit > 0 && norm > limit ? limit / norm : 1;
  out[0] = norm * 0 == 0 ? (float)factor : (float)(norm * 0);
}

// Constants of an update: what is the same for all parameters. `rest` is 1 − beta and `correction` 1 / (1 − beta^step), which the host
// computes in double.
struct AdamW {
  float lr, beta1, beta2, rest1, rest2, eps, correction1, correction2, scale;
};

// One element: m = beta1 m + (1 − beta1) g, v = beta2 v + (1 − beta2) g²,
// w −= lr (m̂ / (√v̂ + eps) + decay w), with m̂ and v̂ the moments times their corrections.
DEVICE float adamw_element(float w, float g, float& m, float& v, float decay, const AdamW& a) {
  g *= a.scale;
  m = fmaf(a.beta1, m, a.rest1 * g);
  v = fmaf(a.beta2, v, a.rest2 * g * g);
  float update = m * a.correction1 / (sqrtf(v * a.correction2) + a.eps);
  return fmaf(-a.lr, fmaf(decay, w, update), w);
}

// The master weight of a bf16 parameter is an f32 whose bits are (parameter bits << 16) + residual, residual being a signed 16-bit number. The
// split rounds half up *in bits*: parameter bits = (master bits + 0x8000) >> 16. Then master bits − (parameter bits << 16) lies in
// −0x8000 … 0x7fff and fits, so that splitting and joining give back every finite master exactly. It is rounding to nearest, and a tie
// goes away from zero: to nearest even would need +0x8000 for half of the ties. Masters within half a step of the largest f32 become an
// infinite parameter, as they do in any rounding to bf16. A NaN is not split: it would carry over into the sign.
DEVICE float join(bf16 value, short residual) { return __uint_as_float(((u32)value.bits << 16) + (u32)(int)residual); }
DEVICE void split(float master, bf16& value, short& residual) {
  u32 bits = __float_as_uint(master);
  u32 high = (bits + 0x8000u) >> 16;
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  value.bits = (u16)(nan ? 0x7fc0u : high);
  residual = nan ? (short)0 : (short)(bits - (high << 16));
}

// A weight of a pack or alone, with its residual, as the master weight; an f32 weight is its own.
DEVICE float master_of(bf16 value, short residual) { return join(value, residual); }
DEVICE float master_of(float value, short) { return value; }
DEVICE void put_master(float master, bf16& value, short& residual) { split(master, value, residual); }
DEVICE void put_master(float master, float& value, short&) { value = master; }

// The elements `begin` to `end` of a parameter of type P with a gradient of type G: four elements of a thread at a time, so that the accesses
// of a warp to each f32 array lie one behind another. If the scale is not finite, gradients may become 0 and all else stays.
template <typename P, typename G>
DEVICE void adamw_range(const Parameter& p, i64 begin, i64 end, const AdamW& a, bool update, bool zero) {
  constexpr bool SPLIT = sizeof(P) == 2;
  P* values = (P*)p.value;
  G* gradients = (G*)p.gradient;
  i64 i = begin + threadIdx.x, step = blockDim.x;
  if (aligned<4 * sizeof(P)>(values) && aligned<8>(p.residual) && aligned<4 * sizeof(G)>(gradients) && aligned<16>(p.moment1) &&
      aligned<16>(p.moment2)) {
    for (i64 at = begin + threadIdx.x * 4; at + 4 <= end; at += step * 4) {
      if (update) {
        Pack<P, 4> value = *(const Pack<P, 4>*)(values + at);
        Pack<short, 4> residual = {};
        if (SPLIT) residual = *(const Pack<short, 4>*)(p.residual + at);
        Pack<G, 4> g = *(const Pack<G, 4>*)(gradients + at);
        Pack<float, 4> m = *(const Pack<float, 4>*)(p.moment1 + at), v = *(const Pack<float, 4>*)(p.moment2 + at);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float w = master_of(value.at[j], residual.at[j]);
          w = adamw_element(w, to_f32(g.at[j]), m.at[j], v.at[j], p.decay, a);
          put_master(w, value.at[j], residual.at[j]);
        }
        *(Pack<P, 4>*)(values + at) = value;
        if (SPLIT) *(Pack<short, 4>*)(p.residual + at) = residual;
        *(Pack<float, 4>*)(p.moment1 + at) = m;
        *(Pack<float, 4>*)(p.moment2 + at) = v;
      }
      if (zero) *(Pack<G, 4>*)(gradients + at) = Pack<G, 4>{};
    }
    i = begin + (end - begin) / 4 * 4 + threadIdx.x;
  }
  for (; i < end; i += step) {
    if (update) {
      short residual = 0;
      if (SPLIT) residual = p.residual[i];
      float w = master_of(values[i], residual), m = p.moment1[i], v = p.moment2[i];
      w = adamw_element(w, to_f32(gradients[i]), m, v, p.decay, a);
      put_master(w, values[i], residual);
      if (SPLIT) p.residual[i] = residual;
      p.moment1[i] = m;
      p.moment2[i] = v;
    }
    if (zero) gradients[i] = G{};
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
adamw(const Parameter* table, int entries, int chunk, const float* scale, int zero, float lr, float beta1, float beta2, float rest1,
      float rest2, float eps, float correction1, float correction2) {
  after_previous();
  Parameter p = table[find_entry(table, entries, blockIdx.x)];
  AdamW a = {lr, beta1, beta2, rest1, rest2, eps, correction1, correction2, scale[0]};
  bool update = a.scale * 0.0f == 0.0f;
  i64 begin = (i64)(blockIdx.x - p.first) * chunk, end = begin + chunk < p.size ? begin + chunk : p.size;
  if (p.kind == KIND_BF16_F32) adamw_range<bf16, float>(p, begin, end, a, update, zero != 0);
  else if (p.kind == KIND_BF16_BF16) adamw_range<bf16, bf16>(p, begin, end, a, update, zero != 0);
  else adamw_range<float, float>(p, begin, end, a, update, zero != 0);
}
