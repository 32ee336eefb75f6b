// Element-wise kernels: fill, copy with conversion, sums of two arrays, activations and their gradients. All are bound by memory: a thread
// moves one pack of 16 bytes of each array and the grid covers them all (two or four packs per thread were slower). Addresses that are not
// aligned to their packs take a loop over single elements, and so do the last elements. Formulas are in
// activations.cuh, which comes before this file. Not here: rows (loss.cu) and optimizer (optimizer.cu).

template <int BYTES>
DEVICE bool aligned(const void* address) { return ((u64)address & (BYTES - 1)) == 0; }

// Stores results, which are in f32 where the elements are bf16.
template <typename T, int N>
DEVICE void put(T* to, const T (&from)[N]) {
  Pack<T, N> pack;
  for (int i = 0; i < N; i++) pack.at[i] = from[i];
  *(Pack<T, N>*)to = pack;
}
template <int N>
DEVICE void put(bf16* to, const float (&from)[N]) {
  Pack<u32, N / 2> pack;
  for (int i = 0; i < N / 2; i++) pack.at[i] = pack_bf16(from[2 * i], from[2 * i + 1]);
  *(Pack<u32, N / 2>*)to = pack;
}
template <typename T>
DEVICE void put_one(T* to, T from) { *to = from; }
DEVICE void put_one(bf16* to, float from) { *to = to_bf16(from); }

// What a kernel computes with for elements of a type that it stores.
template <typename T>
struct Wide { using type = T; };
template <>
struct Wide<bf16> { using type = float; };

// out[i] = f(x[i]), N elements at a time. A block has the elements from blockIdx.x · blockDim.x · N on.
template <int N, typename A, typename B, typename F>
DEVICE void map(const A* x, B* out, i64 size, F f) {
  i64 share = (i64)blockDim.x * N, first = blockIdx.x * share;
  i64 i = first + threadIdx.x, end = first + share < size ? first + share : size;
  if (aligned<sizeof(A) * N>(x) && aligned<sizeof(B) * N>(out)) {
    i64 at = first + threadIdx.x * N;
    if (at + N <= size) {
      Pack<A, N> in = *(const Pack<A, N>*)(x + at);
      typename Wide<B>::type results[N];
#pragma unroll
      for (int j = 0; j < N; j++) results[j] = f(in.at[j]);
      put(out + at, results);
    }
    i = end / N * N + threadIdx.x;
  }
  for (; i < end; i += blockDim.x) put_one(out + i, f(x[i]));
}

// out[i] = f(x[i], y[i]) in f32.
template <typename T, typename F>
DEVICE void map2(const T* x, const T* y, T* out, i64 size, F f) {
  constexpr int N = 16 / sizeof(T);
  i64 share = (i64)blockDim.x * N, first = blockIdx.x * share;
  i64 i = first + threadIdx.x, end = first + share < size ? first + share : size;
  if (aligned<16>(x) && aligned<16>(y) && aligned<16>(out)) {
    i64 at = first + threadIdx.x * N;
    if (at + N <= size) {
      Pack<T, N> left = *(const Pack<T, N>*)(x + at), right = *(const Pack<T, N>*)(y + at);
      float results[N];
#pragma unroll
      for (int j = 0; j < N; j++) results[j] = f(to_f32(left.at[j]), to_f32(right.at[j]));
      put(out + at, results);
    }
    i = end / N * N + threadIdx.x;
  }
  for (; i < end; i += blockDim.x) put_one(out + i, f(to_f32(x[i]), to_f32(y[i])));
}

// Bytes of a repeated pattern of 8; `low` and `high` are its halves. The pattern of an element of 2 or 4 bytes is that element repeated, so
// a byte's place in the pattern is its address modulo 8.
extern "C" __global__ void fill_pattern(u8* x, i64 bytes, u32 low, u32 high) {
  after_previous();
  i64 head = (i64)((16 - ((u64)x & 15)) & 15);
  if (head > bytes) head = bytes;
  i64 packs = (bytes - head) / 16, last = head + packs * 16;
  Pack<u32, 4> pack = {{low, high, low, high}};
  i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < packs) *(Pack<u32, 4>*)(x + head + at * 16) = pack;
  if (blockIdx.x == 0 && threadIdx.x < 32) {
    i64 edge = threadIdx.x < 16 ? threadIdx.x : last + threadIdx.x - 16;
    if (threadIdx.x < 16 ? edge < head : edge < bytes) {
      u32 place = (u32)((u64)(x + edge) & 7);
      x[edge] = (u8)((place < 4 ? low : high) >> (8 * (place & 3)));
    }
  }
}

// Copies as units of 16 bytes, or of the largest power of two that divides both addresses and the size.
extern "C" __global__ void copy_bytes(const u8* x, u8* out, i64 bytes) {
  after_previous();
  using Unit = Pack<u32, 4>;
  u64 both = (u64)x | (u64)out;
  if (both % 16 == 0) {
    // Not by map(): the NVRTC of CUDA 12 never ends compiling that.
    i64 whole = bytes / 16 * 16, at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < whole / 16) ((Unit*)out)[at] = ((const Unit*)x)[at];
    if (blockIdx.x == 0 && threadIdx.x < bytes - whole) out[whole + threadIdx.x] = x[whole + threadIdx.x];
    return;
  }
  i64 share = (i64)blockDim.x * 16, first = blockIdx.x * share;
  i64 end = first + share < bytes ? first + share : bytes;
  if ((both | (u64)bytes) % 4 == 0) {
    for (i64 i = first + threadIdx.x * 4; i < end; i += blockDim.x * 4) *(u32*)(out + i) = *(const u32*)(x + i);
  } else if ((both | (u64)bytes) % 2 == 0) {
    for (i64 i = first + threadIdx.x * 2; i < end; i += blockDim.x * 2) *(u16*)(out + i) = *(const u16*)(x + i);
  } else {
    for (i64 i = first + threadIdx.x; i < end; i += blockDim.x) out[i] = x[i];
  }
}

// Conversions: through f32 to bf16, to nearest, ties to even; to integers toward zero.
template <typename T>
DEVICE T plain(T x) { return x; }
DEVICE float plain(bf16 x) { return to_f32(x); }

#define CONVERT(FROM, TO)                                                                                     \
  extern "C" __global__ void copy_##FROM##_##TO(const FROM* x, TO* out, i64 size) {                           \
    after_previous();                                                                                         \
    constexpr int N = 16 / (sizeof(FROM) > sizeof(TO) ? sizeof(FROM) : sizeof(TO));                           \
    map<N>(x, out, size, [](FROM value) { return (typename Wide<TO>::type)plain(value); });                   \
  }
typedef float f32;
typedef double f64;
typedef int i32;
CONVERT(f32, bf16)
CONVERT(f32, f64)
CONVERT(f32, i32)
CONVERT(bf16, f32)
CONVERT(bf16, f64)
CONVERT(bf16, i32)
CONVERT(f64, f32)
CONVERT(f64, bf16)
CONVERT(f64, i32)
CONVERT(i32, f32)
CONVERT(i32, bf16)
CONVERT(i32, f64)

#define ARITHMETIC(T)                                                                          \
  extern "C" __global__ void add_##T(const T* x, const T* y, T* out, i64 size) {               \
    after_previous();                                                                          \
    map2(x, y, out, size, [](float a, float b) { return a + b; });                             \
  }                                                                                            \
  extern "C" __global__ void axpy_##T(float alpha, const T* x, T* y, i64 size) {               \
    after_previous();                                                                          \
    map2(x, y, y, size, [=](float a, float b) { return fmaf(alpha, a, b); });                  \
  }                                                                                            \
  extern "C" __global__ void scale_##T(T* x, float alpha, i64 size) {                          \
    after_previous();                                                                          \
    map<16 / sizeof(T)>(x, x, size, [=](T a) { return to_f32(a) * alpha; });                   \
  }
ARITHMETIC(f32)
ARITHMETIC(bf16)

// i / by in 32 bits where that is enough, which it nearly always is.
DEVICE i64 divide(i64 i, i64 by) {
  return ((u64)(i | by) >> 32) == 0 ? (i64)((u32)i / (u32)by) : i / by;
}

// One column of an activation's output: its inputs, gate and up for SwiGLU, and their gradients.
template <typename A>
struct Column {
  static constexpr int INPUTS = 1;
  static DEVICE float value(const float (&x)[1]) { return A::value(x[0]); }
  static DEVICE void gradient(float d, const float (&x)[1], float (&d_x)[1]) { d_x[0] = A::gradient(d, x[0]); }
};
template <>
struct Column<Swiglu> {
  static constexpr int INPUTS = 2;
  static DEVICE float value(const float (&x)[2]) { return Swiglu::value(x[0], x[1]); }
  static DEVICE void gradient(float d, const float (&x)[2], float (&d_x)[2]) {
    Swiglu::gradient(d, x[0], x[1], d_x[0], d_x[1]);
  }
};

// out[n, f] = scales[n] · activation(x[n])[f]; without scales they are 1. A thread has one pack of `out`.
template <typename A, typename T>
DEVICE void activate_rows(const T* x, T* out, const float* scales, i64 rows, i64 F) {
  constexpr int N = 16 / sizeof(T), I = Column<A>::INPUTS;
  i64 first = (i64)blockIdx.x * blockDim.x;
  if (F % N == 0 && aligned<16>(x) && aligned<16>(out)) {
    i64 width = F / N, i = first + threadIdx.x;
    if (i >= rows * width) return;
    i64 row = divide(i, width);
    const T* from = x + (i + row * (I - 1) * width) * N;
    Pack<T, N> packs[I];
#pragma unroll
    for (int k = 0; k < I; k++) packs[k] = *(const Pack<T, N>*)(from + k * F);
    float scale = scales ? scales[row] : 1.0f, results[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
      float column[I];
#pragma unroll
      for (int k = 0; k < I; k++) column[k] = to_f32(packs[k].at[j]);
      results[j] = scale * Column<A>::value(column);
    }
    put(out + i * N, results);
  } else {
    i64 end = (first + blockDim.x) * N < rows * F ? (first + blockDim.x) * N : rows * F;
    for (i64 i = first * N + threadIdx.x; i < end; i += blockDim.x) {
      i64 row = divide(i, F);
      float column[I];
#pragma unroll
      for (int k = 0; k < I; k++) column[k] = to_f32(x[i + row * (I - 1) * F + k * F]);
      put_one(out + i, (scales ? scales[row] : 1.0f) * Column<A>::value(column));
    }
  }
}

// dX[n] = scales[n] · activationBackward(dOut[n], x[n]), dScales[n] = dOut[n] · activation(x[n]); either may be null. A warp has a row, and its
// sum is in one order whatever the GPU.
template <typename A, typename T>
DEVICE void activate_rows_backward(const T* d_out, const T* x, T* d_x, const float* scales, float* d_scales, i64 rows,
                                   i64 F) {
  constexpr int N = 16 / sizeof(T), I = Column<A>::INPUTS, U = 4 / I;
  i64 row = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  int lane = threadIdx.x % 32;
  float scale = scales ? scales[row] : 1.0f, dot = 0;
  d_out += row * F;
  x += row * I * F;
  d_x += row * I * F;
  auto one = [&](float d, const float (&column)[I], float (&d_column)[I]) {
    Column<A>::gradient(d, column, d_column);
#pragma unroll
    for (int k = 0; k < I; k++) d_column[k] *= scale;
    if (d_scales) dot = fmaf(d, Column<A>::value(column), dot);
  };
  if (F % N == 0 && aligned<16>(x) && aligned<16>(d_out) && aligned<16>(d_x)) {
    for (i64 first = lane * N; first < F; first += 32 * N * U) {
      Pack<T, N> d[U], in[U][I];
#pragma unroll
      for (int u = 0; u < U; u++) {
        i64 at = first + u * 32 * N;
        if (at >= F) break;
        d[u] = *(const Pack<T, N>*)(d_out + at);
#pragma unroll
        for (int k = 0; k < I; k++) in[u][k] = *(const Pack<T, N>*)(x + k * F + at);
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        i64 at = first + u * 32 * N;
        if (at >= F) break;
        float results[I][N];
#pragma unroll
        for (int j = 0; j < N; j++) {
          float column[I], d_column[I];
#pragma unroll
          for (int k = 0; k < I; k++) column[k] = to_f32(in[u][k].at[j]);
          one(to_f32(d[u].at[j]), column, d_column);
#pragma unroll
          for (int k = 0; k < I; k++) results[k][j] = d_column[k];
        }
#pragma unroll
        for (int k = 0; k < I; k++) put(d_x + k * F + at, results[k]);
      }
    }
  } else {
    for (i64 f = lane; f < F; f += 32) {
      float column[I], d_column[I];
#pragma unroll
      for (int k = 0; k < I; k++) column[k] = to_f32(x[k * F + f]);
      one(to_f32(d_out[f]), column, d_column);
#pragma unroll
      for (int k = 0; k < I; k++) put_one(d_x + k * F + f, d_column[k]);
    }
  }
  if (d_scales) {
    dot = warp_sum(dot);
    if (lane == 0) d_scales[row] = dot;
  }
}

template <typename T>
DEVICE void swiglu_backward(const T* d_out, const T* x, T* d_x, i64 rows, i64 F) {
  constexpr int N = 16 / sizeof(T);
  i64 first = (i64)blockIdx.x * blockDim.x;
  if (F % N == 0 && aligned<16>(x) && aligned<16>(d_out) && aligned<16>(d_x)) {
    i64 width = F / N, i = first + threadIdx.x;
    if (i >= rows * width) return;
    i64 at = (i + divide(i, width) * width) * N;
    Pack<T, N> d = *(const Pack<T, N>*)(d_out + i * N);
    Pack<T, N> gate = *(const Pack<T, N>*)(x + at), up = *(const Pack<T, N>*)(x + at + F);
    float d_gate[N], d_up[N];
#pragma unroll
    for (int j = 0; j < N; j++) Swiglu::gradient(to_f32(d.at[j]), to_f32(gate.at[j]), to_f32(up.at[j]), d_gate[j], d_up[j]);
    put(d_x + at, d_gate);
    put(d_x + at + F, d_up);
  } else {
    i64 end = (first + blockDim.x) * N < rows * F ? (first + blockDim.x) * N : rows * F;
    for (i64 i = first * N + threadIdx.x; i < end; i += blockDim.x) {
      i64 at = i + divide(i, F) * F;
      float d_gate, d_up;
      Swiglu::gradient(to_f32(d_out[i]), to_f32(x[at]), to_f32(x[at + F]), d_gate, d_up);
      put_one(d_x + at, d_gate);
      put_one(d_x + at + F, d_up);
    }
  }
}

#define ACTIVATIONS(T)                                                                                           \
  extern "C" __global__ void relu_##T(const T* x, T* out, i64 size) {                                            \
    after_previous();                                                                                            \
    map<16 / sizeof(T)>(x, out, size, [](T a) { return Relu::value(to_f32(a)); });                               \
  }                                                                                                              \
  extern "C" __global__ void gelu_##T(const T* x, T* out, i64 size) {                                            \
    after_previous();                                                                                            \
    map<16 / sizeof(T)>(x, out, size, [](T a) { return Gelu::value(to_f32(a)); });                               \
  }                                                                                                              \
  extern "C" __global__ void relu_backward_##T(const T* d_out, const T* x, T* d_x, i64 size) {                   \
    after_previous();                                                                                            \
    map2(d_out, x, d_x, size, [](float d, float a) { return Relu::gradient(d, a); });                            \
  }                                                                                                              \
  extern "C" __global__ void gelu_backward_##T(const T* d_out, const T* x, T* d_x, i64 size) {                   \
    after_previous();                                                                                            \
    map2(d_out, x, d_x, size, [](float d, float a) { return Gelu::gradient(d, a); });                            \
  }                                                                                                              \
  extern "C" __global__ void swiglu_backward_##T(const T* d_out, const T* x, T* d_x, i64 rows, i64 F) {          \
    after_previous();                                                                                            \
    swiglu_backward(d_out, x, d_x, rows, F);                                                                     \
  }
ACTIVATIONS(f32)
ACTIVATIONS(bf16)

#define ROWS(NAME, A, T)                                                                                         \
  extern "C" __global__ void NAME##_rows_##T(const T* x, T* out, const float* scales, i64 rows, i64 F) {         \
    after_previous();                                                                                            \
    activate_rows<A>(x, out, scales, rows, F);                                                                   \
  }                                                                                                              \
  extern "C" __global__ void __launch_bounds__(256)                                                              \
      NAME##_backward_rows_##T(const T* d_out, const T* x, T* d_x, const float* scales, float* d_scales,         \
                               i64 rows, i64 F) {                                                                \
    after_previous();                                                                                            \
    activate_rows_backward<A>(d_out, x, d_x, scales, d_scales, rows, F);                                         \
  }
ROWS(relu, Relu, f32)
ROWS(relu, Relu, bf16)
ROWS(gelu, Gelu, f32)
ROWS(gelu, Gelu, bf16)
ROWS(swiglu, Swiglu, f32)
ROWS(swiglu, Swiglu, bf16)
