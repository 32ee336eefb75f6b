// Softmax, its gradient, and softmax cross-entropy: one block per row. A row is a head up to the first boundary of 16 bytes, packs of 16 bytes,
// and a tail, so rows of any width and alignment are read in whole packs but for at most 2 · 7 elements. Largest and sum are found in one
// pass. Exponentials are powers of two of x · log2 e.

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

#ifndef LINA_EMULATE
#define INFINITE __uint_as_float(0x7f800000u)
#else
#define INFINITE __builtin_inff()
#endif

template <typename T>
struct Row {
  static constexpr int N = 16 / sizeof(T);
  T* at;
  int head;   // elements before the packs
  int packs;  // whole packs
  int edge;   // the element of head or tail that this thread has, or −1; a block has at least 32 threads

  DEVICE Row(T* base, i64 row, int width) {
    at = base + row * width;
    head = (int)(((16 - ((u64)at & 15)) & 15) / sizeof(T));
    if (head > width) head = width;
    packs = (width - head) / N;
    int tail = head + packs * N, t = threadIdx.x;
    edge = t < head ? t : t >= 16 && t - 16 < width - tail ? tail + t - 16 : -1;
  }
  DEVICE Pack<T, N>* pack(int i) const { return (Pack<T, N>*)(at + head) + i; }
};

template <typename T, int N>
DEVICE void put(Pack<T, N>* to, const float (&from)[N]) {
  Pack<T, N> pack;
  for (int i = 0; i < N; i++) pack.at[i] = from[i];
  *to = pack;
}
template <int N>
DEVICE void put(Pack<bf16, N>* to, const float (&from)[N]) {
  Pack<u32, N / 2> pack;
  for (int i = 0; i < N / 2; i++) pack.at[i] = pack_bf16(from[2 * i], from[2 * i + 1]);
  *(Pack<u32, N / 2>*)to = pack;
}

// The largest of the elements that a thread has seen, and their Σ 2^(x · log2 e − shift) with shift = most · log2 e (0 while most is −∞).
struct Tally {
  float most, sum;
};
DEVICE float shift_of(float most) { return most == -INFINITE ? 0.0f : most * LOG2E; }

// The tally of a row; BATCH packs are under way at a time. The first `staged` packs are also kept in shared memory, each by its thread.
constexpr int BATCH = 4;
template <typename T>
DEVICE Tally tally_row(const Row<T>& row, Pack<T, Row<T>::N>* stage, int staged) {
  constexpr int N = Row<T>::N;
  Tally tally = {row.edge >= 0 ? to_f32(row.at[row.edge]) : -INFINITE, 0.0f};
  // Nothing is summed while `most` is −∞, which an element may be, too; a NaN is, and makes the sum one.
  if (tally.most != -INFINITE) tally.sum = 1.0f;
  for (int i = threadIdx.x; i < row.packs; i += BATCH * blockDim.x) {
    Pack<T, N> packs[BATCH];
    float most = tally.most;
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      int place = i + b * blockDim.x;
      if (place < row.packs) packs[b] = *row.pack(place);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      int place = i + b * blockDim.x;
      if (place < staged) stage[place] = packs[b];
      if (place < row.packs) {
#pragma unroll
        for (int j = 0; j < N; j++) most = fmaxf(most, to_f32(packs[b].at[j]));
      }
    }
    float shift = shift_of(most);
    tally.sum *= exp2_fast(fmaf(tally.most, LOG2E, -shift));
    tally.most = most;
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      if (i + b * (int)blockDim.x < row.packs) {
#pragma unroll
        for (int j = 0; j < N; j++) tally.sum += exp2_fast(fmaf(to_f32(packs[b].at[j]), LOG2E, -shift));
      }
    }
  }
  return tally;
}

// The tally of the whole row, known to every thread.
DEVICE Tally join_tallies(Tally tally, float* scratch) {
  float most = block_max(tally.most, scratch);
  return {most, block_sum(tally.sum * exp2_fast(shift_of(tally.most) - shift_of(most)), scratch)};
}

// ln Σ e^x − chosen, where the shift's rounding, which is in the sum, is taken out of it again.
DEVICE float loss_of(Tally tally, float shift, float chosen) {
  return (tally.most - chosen) + (logf(tally.sum) - LN2 * fmaf(tally.most, LOG2E, -shift));
}

template <typename T>
DEVICE void softmax(const T* x, T* out, int width) {
  constexpr int N = Row<T>::N;
  __shared__ float scratch[32];
  i64 n = blockIdx.x;
  Row<T> from((T*)x, n, width), to(out, n, width);
  Tally tally = join_tallies(tally_row(from, (Pack<T, N>*)nullptr, 0), scratch);
  float shift = shift_of(tally.most), factor = 1.0f / tally.sum;
  if (to.head == from.head) {
    if (to.edge >= 0) to.at[to.edge] = from_f32<T>(exp2_fast(fmaf(to_f32(from.at[to.edge]), LOG2E, -shift)) * factor);
    for (int i = threadIdx.x; i < to.packs; i += blockDim.x) {
      Pack<T, N> pack = *from.pack(i);
      float results[N];
#pragma unroll
      for (int j = 0; j < N; j++) results[j] = exp2_fast(fmaf(to_f32(pack.at[j]), LOG2E, -shift)) * factor;
      put(to.pack(i), results);
    }
  } else {
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      to.at[i] = from_f32<T>(exp2_fast(fmaf(to_f32(from.at[i]), LOG2E, -shift)) * factor);
    }
  }
}

template <typename T>
DEVICE void softmax_backward(const T* d_y, const T* y, T* d_x, int width) {
  constexpr int N = Row<T>::N;
  __shared__ float scratch[32];
  i64 n = blockIdx.x;
  Row<T> gradient((T*)d_y, n, width), output((T*)y, n, width), to(d_x, n, width);
  bool alike = gradient.head == output.head && output.head == to.head;
  float dot = 0;
  if (alike) {
    if (to.edge >= 0) dot = to_f32(gradient.at[to.edge]) * to_f32(output.at[to.edge]);
#pragma unroll 4
    for (int i = threadIdx.x; i < to.packs; i += blockDim.x) {
      Pack<T, N> d = *gradient.pack(i), p = *output.pack(i);
#pragma unroll
      for (int j = 0; j < N; j++) dot = fmaf(to_f32(d.at[j]), to_f32(p.at[j]), dot);
    }
  } else {
    for (int i = threadIdx.x; i < width; i += blockDim.x) dot = fmaf(to_f32(gradient.at[i]), to_f32(output.at[i]), dot);
  }
  dot = block_sum(dot, scratch);
  if (alike) {
    if (to.edge >= 0) to.at[to.edge] = from_f32<T>(to_f32(output.at[to.edge]) * (to_f32(gradient.at[to.edge]) - dot));
    for (int i = threadIdx.x; i < to.packs; i += blockDim.x) {
      Pack<T, N> d = *gradient.pack(i), p = *output.pack(i);
      float results[N];
#pragma unroll
      for (int j = 0; j < N; j++) results[j] = to_f32(p.at[j]) * (to_f32(d.at[j]) - dot);
      put(to.pack(i), results);
    }
  } else {
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      to.at[i] = from_f32<T>(to_f32(output.at[i]) * (to_f32(gradient.at[i]) - dot));
    }
  }
}

// An ignored row: loss 0, gradient 0.
template <typename T>
DEVICE void ignore_row(const Row<T>& row, float* loss) {
  if (threadIdx.x == 0) *loss = 0.0f;
  if (row.edge >= 0) row.at[row.edge] = from_f32<T>(0.0f);
  Pack<u32, 4> zeros = {};
  for (int i = threadIdx.x; i < row.packs; i += blockDim.x) *(Pack<u32, 4>*)row.pack(i) = zeros;
}

// The gradient of one pack: factor · 2^(x log2 e − shift), less `scale` at `target`, its place in the pack where it is in it.
template <typename T, int N>
DEVICE void put_gradient(Pack<T, N>* to, const Pack<T, N>& x, float shift, float factor, int target, float scale) {
  float results[N];
#pragma unroll
  for (int j = 0; j < N; j++) results[j] = exp2_fast(fmaf(to_f32(x.at[j]), LOG2E, -shift)) * factor;
  if ((u32)target < (u32)N) {
#pragma unroll
    for (int j = 0; j < N; j++) results[j] -= j == target ? scale : 0.0f;
  }
  put(to, results);
}

// Rows of any width: a pass that tallies, and one that writes. The first `staged` packs are kept in shared memory between the two; those
// behind are read again, from the end of the row, which the L2 cache has seen last.
// A target that is no column cannot stop the host here: it makes loss and gradient of its row NaN.
template <typename T>
DEVICE void cross_entropy(T* logits, const int* targets, float* losses, int width, float scale, int staged) {
  constexpr int N = Row<T>::N;
  extern __shared__ __align__(16) u8 shared[];
  __shared__ float scratch[32];
  Pack<T, N>* stage = (Pack<T, N>*)shared;
  i64 n = blockIdx.x;
  int target = targets[n];
  Row<T> row(logits, n, width);
  if (target < 0) return ignore_row(row, losses + n);
  if (staged > row.packs) staged = row.packs;
  Tally tally = tally_row(row, stage, staged);
  float chosen = INFINITE - INFINITE;
  if (target >= width) scale = chosen;
  else if (threadIdx.x == 0) chosen = to_f32(row.at[target]);  // before any thread has come to the second pass
  tally = join_tallies(tally, scratch);
  float shift = shift_of(tally.most), factor = scale / tally.sum;
  if (threadIdx.x == 0) losses[n] = loss_of(tally, shift, chosen);
  target -= row.head;
  for (int i = row.packs - 1 - (int)threadIdx.x; i >= staged; i -= BATCH * (int)blockDim.x) {
    Pack<T, N> packs[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      int place = i - b * (int)blockDim.x;
      if (place >= staged) packs[b] = *row.pack(place);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      int place = i - b * (int)blockDim.x;
      if (place >= staged) put_gradient(row.pack(place), packs[b], shift, factor, target - place * N, scale);
    }
  }
  for (int i = threadIdx.x; i < staged; i += blockDim.x) {
    put_gradient(row.pack(i), stage[i], shift, factor, target - i * N, scale);
  }
  if (row.edge >= 0) {
    float p = exp2_fast(fmaf(to_f32(row.at[row.edge]), LOG2E, -shift)) * factor;
    row.at[row.edge] = from_f32<T>(row.edge - row.head == target ? p - scale : p);
  }
}

#define ROWS(NAME, T)                                                                                                 \
  extern "C" __global__ void __launch_bounds__(1024) softmax_##NAME(const T* x, T* out, int width) {                  \
    after_previous();                                                                                                 \
    softmax(x, out, width);                                                                                           \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(1024)                                                                  \
  softmax_backward_##NAME(const T* d_y, const T* y, T* d_x, int width) {                                              \
    after_previous();                                                                                                 \
    softmax_backward(d_y, y, d_x, width);                                                                             \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(512, 3)                                                                \
  cross_entropy_##NAME(T* logits, const int* targets, float* losses, int width, float scale, int staged) {            \
    after_previous();                                                                                                 \
    cross_entropy(logits, targets, losses, width, scale, staged);                                                     \
  }
ROWS(f32, float)
ROWS(bf16, bf16)
