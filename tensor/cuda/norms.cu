// Kernels over the columns of each row: RMS norm alone, behind a residual connection, and its gradient; rotary positions alone and at the
// fused projection. A row of up to 4 packs of 16 bytes per thread stays in registers, so that memory is read and written once; the `general`
// kernels take what is left: any width, any alignment.

constexpr int PACKS = 4;  // per thread, at most

// 16 bytes of a row. bf16 stay two to a register, which an array of them would not.
template <typename T>
struct Vector;
template <>
struct alignas(16) Vector<float> {
  static constexpr int elements = 4;
  float at[4];
  DEVICE float get(int e) const { return at[e]; }
  DEVICE void set(int e, float low, float high) { at[e] = low, at[e + 1] = high; }
};
template <>
struct alignas(16) Vector<bf16> {
  static constexpr int elements = 8;
  u32 at[4];
  DEVICE float get(int e) const { return to_f32(bf16{(u16)(at[e / 2] >> (e % 2 * 16))}); }
  DEVICE void set(int e, float low, float high) { at[e / 2] = pack_bf16(low, high); }
};

// inv_rms = 1 / sqrt(mean(sum^2) + eps), out = sum inv_rms gain, for sum = x + y with ADD, else x. A warp has a row (WARP), or a block.
template <typename T, bool ADD, bool WARP>
DEVICE void rms_norm_packed(const T* x, const T* y, const T* gain, T* sum, T* out, float* inv_rms, i64 N, int D, float eps) {
  constexpr int E = Vector<T>::elements;
  __shared__ float scratch[32];
  int lane = WARP ? threadIdx.x % 32 : threadIdx.x, lanes = WARP ? 32 : blockDim.x, packs = D / E;
  i64 row = WARP ? (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32 : (i64)blockIdx.x;
  if (row >= N) return;
  const Vector<T>* from = (const Vector<T>*)(x + row * D);
  const Vector<T>* more = (const Vector<T>*)(y + row * D);
  Vector<T> v[PACKS], w[PACKS];
#pragma unroll
  for (int i = 0; i < PACKS; i++) {
    if (lane + i * lanes < packs) {
      v[i] = from[lane + i * lanes];
      if (ADD) w[i] = more[lane + i * lanes];
    }
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < PACKS; i++) {
    if (lane + i * lanes < packs) {
      if (ADD) {
#pragma unroll
        for (int e = 0; e < E; e += 2) v[i].set(e, v[i].get(e) + w[i].get(e), v[i].get(e + 1) + w[i].get(e + 1));
        ((Vector<T>*)(sum + row * D))[lane + i * lanes] = v[i];
      }
      w[i] = ((const Vector<T>*)gain)[lane + i * lanes];
#pragma unroll
      for (int e = 0; e < E; e++) squares += v[i].get(e) * v[i].get(e);
    }
  }
  squares = WARP ? warp_sum(squares) : block_sum(squares, scratch);
  float inverse = 1.0f / sqrtf(squares / D + eps);
#pragma unroll
  for (int i = 0; i < PACKS; i++) {
    if (lane + i * lanes < packs) {
#pragma unroll
      for (int e = 0; e < E; e += 2) {
        v[i].set(e, v[i].get(e) * inverse * w[i].get(e), v[i].get(e + 1) * inverse * w[i].get(e + 1));
      }
      ((Vector<T>*)(out + row * D))[lane + i * lanes] = v[i];
    }
  }
  if (lane == 0) inv_rms[row] = inverse;
}

// The same for any row, a block each; reads the sum a second time. `out` must not be an input.
template <typename T, bool ADD>
DEVICE void rms_norm_general(const T* x, const T* y, const T* gain, T* sum, T* out, float* inv_rms, int D, float eps) {
  __shared__ float scratch[32];
  i64 row = blockIdx.x, first = row * D;
  float squares = 0;
  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    float value = to_f32(x[first + d]);
    if (ADD) {
      T both = from_f32<T>(value + to_f32(y[first + d]));
      sum[first + d] = both;
      value = to_f32(both);
    }
    squares += value * value;
  }
  squares = block_sum(squares, scratch);
  float inverse = 1.0f / sqrtf(squares / D + eps);
  const T* from = ADD ? sum : x;
  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    out[first + d] = from_f32<T>(to_f32(from[first + d]) * inverse * to_f32(gain[d]));
  }
  if (threadIdx.x == 0) inv_rms[row] = inverse;
}

#define RMS_NORM(T, DTYPE)                                                                                                            \
  extern "C" __global__ void rms_norm_warp_##DTYPE(const T* x, const T* gain, T* out, float* inv_rms, i64 N, int D, float eps) {      \
    after_previous();                                                                                                                 \
    rms_norm_packed<T, false, true>(x, x, gain, out, out, inv_rms, N, D, eps);                                                        \
  }                                                                                                                                   \
  extern "C" __global__ void rms_norm_block_##DTYPE(const T* x, const T* gain, T* out, float* inv_rms, i64 N, int D, float eps) {     \
    after_previous();                                                                                                                 \
    rms_norm_packed<T, false, false>(x, x, gain, out, out, inv_rms, N, D, eps);                                                       \
  }                                                                                                                                   \
  extern "C" __global__ void rms_norm_general_##DTYPE(const T* x, const T* gain, T* out, float* inv_rms, i64 N, int D, float eps) {   \
    after_previous();                                                                                                                 \
    rms_norm_general<T, false>(x, x, gain, out, out, inv_rms, D, eps);                                                                \
  }                                                                                                                                   \
  extern "C" __global__ void add_rms_norm_warp_##DTYPE(const T* x, const T* y, const T* gain, T* sum, T* out, float* inv_rms, i64 N,  \
                                                       int D, float eps) {                                                           \
    after_previous();                                                                                                                \
    rms_norm_packed<T, true, true>(x, y, gain, sum, out, inv_rms, N, D, eps);                                                         \
  }                                                                                                                                   \
  extern "C" __global__ void add_rms_norm_block_##DTYPE(const T* x, const T* y, const T* gain, T* sum, T* out, float* inv_rms, i64 N, \
                                                        int D, float eps) {                                                          \
    after_previous();                                                                                                                \
    rms_norm_packed<T, true, false>(x, y, gain, sum, out, inv_rms, N, D, eps);                                                        \
  }                                                                                                                                   \
  extern "C" __global__ void add_rms_norm_general_##DTYPE(const T* x, const T* y, const T* gain, T* sum, T* out, float* inv_rms,      \
                                                          i64 N, int D, float eps) {                                                 \
    after_previous();                                                                                                                \
    rms_norm_general<T, true>(x, y, gain, sum, out, inv_rms, D, eps);                                                                 \
  }
RMS_NORM(float, f32)
RMS_NORM(bf16, bf16)

// dx = inv_rms (g - x inv_rms^2 mean(g x)) + residual for g = d_out gain. Each block goes through rows block, block + blocks, ... and
// keeps its sum of d_out x inv_rms, which it writes to partial [blocks, D]: two runs on one GPU add in one order.
template <typename T, bool WARP>
DEVICE void rms_norm_backward_packed(const T* d_out, const T* x, const T* gain, const float* inv_rms, const T* residual, T* dx,
                                     float* partial, i64 N, int D) {
  constexpr int E = Vector<T>::elements;
  __shared__ float scratch[32];
  __shared__ float together[WARP ? 32 * PACKS * E : 1];
  int lane = WARP ? threadIdx.x % 32 : threadIdx.x, lanes = WARP ? 32 : blockDim.x, packs = D / E;
  int group = WARP ? threadIdx.x / 32 : 0, groups = WARP ? blockDim.x / 32 : 1;
  Vector<T> g[PACKS];
  float sums[PACKS][E];
#pragma unroll
  for (int i = 0; i < PACKS; i++) {
    if (lane + i * lanes < packs) g[i] = ((const Vector<T>*)gain)[lane + i * lanes];
#pragma unroll
    for (int e = 0; e < E; e++) sums[i][e] = 0;
  }
  for (i64 row = (i64)blockIdx.x * groups + group; row < N; row += (i64)gridDim.x * groups) {
    const Vector<T>*from = (const Vector<T>*)(x + row * D), *down = (const Vector<T>*)(d_out + row * D);
    const Vector<T>* beside = (const Vector<T>*)(residual + row * D);
    Vector<T> v[PACKS], d[PACKS], r[PACKS];
    float inverse = inv_rms[row], dot = 0;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
      if (lane + i * lanes < packs) {
        v[i] = from[lane + i * lanes];
        d[i] = down[lane + i * lanes];
        if (residual) r[i] = beside[lane + i * lanes];
      }
    }
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
      if (lane + i * lanes < packs) {
#pragma unroll
        for (int e = 0; e < E; e++) {
          float product = v[i].get(e) * d[i].get(e);
          sums[i][e] += product * inverse;
          dot += product * g[i].get(e);
        }
      }
    }
    dot = WARP ? warp_sum(dot) : block_sum(dot, scratch);
    float pull = dot * inverse * inverse * inverse / D;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
      if (lane + i * lanes < packs) {
#pragma unroll
        for (int e = 0; e < E; e += 2) {
          float low = d[i].get(e) * g[i].get(e) * inverse - v[i].get(e) * pull;
          float high = d[i].get(e + 1) * g[i].get(e + 1) * inverse - v[i].get(e + 1) * pull;
          if (residual) low += r[i].get(e), high += r[i].get(e + 1);
          v[i].set(e, low, high);
        }
        ((Vector<T>*)(dx + row * D))[lane + i * lanes] = v[i];
      }
    }
  }
  partial += (i64)blockIdx.x * D;
  for (int turn = 0; turn < groups; turn++) {  // one group's sums after another's
    if (group == turn) {
#pragma unroll
      for (int i = 0; i < PACKS; i++) {
        if (lane + i * lanes < packs) {
#pragma unroll
          for (int e = 0; e < E; e++) {
            int column = (lane + i * lanes) * E + e;
            float sum = sums[i][e] + (WARP && turn > 0 ? together[column] : 0.0f);
            if (turn == groups - 1) partial[column] = sum;
            else if (WARP) together[column] = sum;
          }
        }
      }
    }
    __syncthreads();
  }
}

// The same for any row. A thread always has the same columns, so the block's sum can live in memory.
template <typename T>
DEVICE void rms_norm_backward_general(const T* d_out, const T* x, const T* gain, const float* inv_rms, const T* residual, T* dx,
                                      float* partial, i64 N, int D) {
  __shared__ float scratch[32];
  partial += (i64)blockIdx.x * D;
  for (i64 row = blockIdx.x; row < N; row += gridDim.x) {
    i64 first = row * D;
    float inverse = inv_rms[row], dot = 0;
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
      dot += to_f32(d_out[first + d]) * to_f32(gain[d]) * to_f32(x[first + d]);
    }
    dot = block_sum(dot, scratch);
    float pull = dot * inverse * inverse * inverse / D;
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
      float down = to_f32(d_out[first + d]), value = to_f32(x[first + d]);
      float gradient = down * to_f32(gain[d]) * inverse - value * pull;
      if (residual) gradient += to_f32(residual[first + d]);
      dx[first + d] = from_f32<T>(gradient);
      partial[d] = down * value * inverse + (row == blockIdx.x ? 0.0f : partial[d]);
    }
  }
}

#define RMS_NORM_BACKWARD(T, DTYPE)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256, 2) rms_norm_backward_warp_##DTYPE(                                                   \
      const T* d_out, const T* x, const T* gain, const float* inv_rms, const T* residual, T* dx, float* partial, i64 N, int D) {         \
    after_previous();                                                                                                                    \
    rms_norm_backward_packed<T, true>(d_out, x, gain, inv_rms, residual, dx, partial, N, D);                                             \
  }                                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(512, 1) rms_norm_backward_block_##DTYPE(                                                  \
      const T* d_out, const T* x, const T* gain, const float* inv_rms, const T* residual, T* dx, float* partial, i64 N, int D) {         \
    after_previous();                                                                                                                    \
    rms_norm_backward_packed<T, false>(d_out, x, gain, inv_rms, residual, dx, partial, N, D);                                            \
  }                                                                                                                                      \
  extern "C" __global__ void rms_norm_backward_general_##DTYPE(                                                                          \
      const T* d_out, const T* x, const T* gain, const float* inv_rms, const T* residual, T* dx, float* partial, i64 N, int D) {         \
    after_previous();                                                                                                                    \
    rms_norm_backward_general<T>(d_out, x, gain, inv_rms, residual, dx, partial, N, D);                                                  \
  }
RMS_NORM_BACKWARD(float, f32)
RMS_NORM_BACKWARD(bf16, bf16)

// d_gain += the column sums of partial [rows, D]. A block of 1024 has 32 columns; each of its warps adds every 32nd row, four at a time so
// that loads overlap, and then one warp the others' sums.
template <typename T>
DEVICE void add_columns(const float* partial, T* d_gain, int rows, int D) {
  __shared__ float sums[32][32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  float sum[4] = {0, 0, 0, 0};
  if (column < D) {
    for (int row = warp; row < rows; row += 128) {
      float part[4];
#pragma unroll
      for (int i = 0; i < 4; i++) part[i] = row + 32 * i < rows ? __ldg(partial + (i64)(row + 32 * i) * D + column) : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; i++) sum[i] += part[i];
    }
  }
  sums[warp][lane] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  __syncthreads();
  if (warp > 0 || column >= D) return;
  float all = 0;
  for (int i = 0; i < 32; i++) all += sums[i][lane];
  d_gain[column] = from_f32<T>(to_f32(d_gain[column]) + all);
}
extern "C" __global__ void add_columns_f32(const float* partial, float* d_gain, int rows, int D) { after_previous(); add_columns(partial, d_gain, rows, D); }
extern "C" __global__ void add_columns_bf16(const float* partial, bf16* d_gain, int rows, int D) { after_previous(); add_columns(partial, d_gain, rows, D); }

struct alignas(8) Angle {
  float cosine, sine;
};
// Turns the pair (i, i + C/2) of a head by positions[row] turns[i] whole turns (times direction), for heads between a fused matrix
// [N, (H + 2 G) C] and q, k, v: SPLIT reads the fused one, else it is written. Heads of v are copied. With G = 0 and fused = q this is rope
// in place. A block has `rows` rows; their cosines and sines are made once, in shared memory. Angles are reduced in f64, so a position far
// out costs no accuracy.
template <typename T, int E, bool SPLIT>
DEVICE void rotate(T* fused, T* q, T* k, T* v, const int* positions, const double* turns, i64 N, int H, int G, int C, int rows,
                   float direction) {
  extern __shared__ Angle angles[];
  int half = C / 2, heads = H + 2 * G, packs = half / E;
  i64 first = (i64)blockIdx.x * rows;
  if (rows > N - first) rows = (int)(N - first);
  for (int i = threadIdx.x; i < rows * half; i += blockDim.x) {
    double turn = positions[first + i / half] * turns[i % half];
    float angle = (float)(turn - rint(turn)) * 6.283185307f;
    angles[i].cosine = cosf(angle);
    angles[i].sine = direction * sinf(angle);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * heads * packs; i += blockDim.x) {
    int pack = i % packs, head = i / packs % heads, r = i / packs / heads;
    i64 row = first + r;
    T* one = fused + (row * heads + head) * C + pack * E;
    T* apart = head < H ? q + (row * H + head) * C : head < H + G ? k + (row * G + head - H) * C : v + (row * G + head - H - G) * C;
    apart += pack * E;
    T *from = SPLIT ? one : apart, *to = SPLIT ? apart : one;
    Pack<T, E> a = *(Pack<T, E>*)from, b = *(Pack<T, E>*)(from + half);
    if (head < H + G) {
      const Angle* angle = angles + r * half + pack * E;
#pragma unroll
      for (int e = 0; e < E; e++) {
        float low = to_f32(a.at[e]), high = to_f32(b.at[e]), cosine = angle[e].cosine, sine = angle[e].sine;
        a.at[e] = from_f32<T>(low * cosine - high * sine);
        b.at[e] = from_f32<T>(high * cosine + low * sine);
      }
    }
    *(Pack<T, E>*)to = a;
    *(Pack<T, E>*)(to + half) = b;
  }
}

#define ROTATE(NAME, T, E, SPLIT)                                                                                                   \
  extern "C" __global__ void NAME(T* fused, T* q, T* k, T* v, const int* positions, const double* turns, i64 N, int H, int G, int C, \
                                  int rows, float direction) {                                                                      \
    after_previous();                                                                                                               \
    rotate<T, E, SPLIT>(fused, q, k, v, positions, turns, N, H, G, C, rows, direction);                                             \
  }
ROTATE(split_packed_f32, float, 4, true)
ROTATE(split_packed_bf16, bf16, 8, true)
ROTATE(split_general_f32, float, 1, true)
ROTATE(split_general_bf16, bf16, 1, true)
ROTATE(join_packed_f32, float, 4, false)
ROTATE(join_packed_bf16, bf16, 8, false)
ROTATE(join_general_f32, float, 1, false)
ROTATE(join_general_bf16, bf16, 1, false)
