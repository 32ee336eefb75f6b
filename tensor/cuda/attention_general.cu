// Causal attention and its gradient for what attention.cu leaves: f32, and bf16 whose heads are wider than 128 columns, not whole pieces of 16
// bytes, or not aligned. Plain multiply-adds in f32, 4 threads to a row, tiles in shared memory, no more memory than there; made to be
// right, not fast.

struct alignas(16) Tile {
  int start, length, first, slot;  // as in attention_tile.cuh
};
struct alignas(8) RowStatistics {
  float lse, delta;
};
constexpr int ROWS = 32, THREADS = 4 * ROWS, KEYS = 16, QUERIES = 8;

// Copies `count` rows (zeros from row `rows` on) of a head to shared rows of `pitch` floats.
template <typename T>
DEVICE void copy_rows(float* to, const T* from, i64 stride, int count, int rows, int width, int pitch) {
  for (int i = threadIdx.x; i < count * width; i += THREADS) {
    int r = i / width, c = i % width;
    to[r * pitch + c] = r < rows ? to_f32(from[r * stride + c]) : 0.0f;
  }
}
DEVICE float dot_rows(const float* a, const float* b, int width) {
  float sum = 0;
  for (int c = 0; c < width; c++) sum += a[c] * b[c];
  return sum;
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// COLUMNS: those of a thread, at least width / 4.
template <typename T, int COLUMNS>
DEVICE void forward(const T* q, const T* k, const T* v, T* out, float* lse, const Tile* tiles, int H, int G, int width, float scale) {
  extern __shared__ float shared[];
  int pitch = width | 1, h = blockIdx.x % H, g = h / (H / G), r = threadIdx.x / 4, l = threadIdx.x % 4;
  float *q_rows = shared, *k_rows = q_rows + ROWS * pitch, *v_rows = k_rows + KEYS * pitch, *p = v_rows + KEYS * pitch + r * (KEYS + 1);
  Tile tile = tiles[blockIdx.x / H];
  i64 q_stride = (i64)H * width, k_stride = (i64)G * width, row = tile.start + tile.first;
  int rows = min(ROWS, tile.length - tile.first);
  copy_rows(q_rows, q + row * q_stride + h * width, q_stride, ROWS, rows, width, pitch);
  float most = -1e30f, total = 0, sums[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) sums[i] = 0;
  for (int key = 0; key < tile.first + rows; key += KEYS) {
    __syncthreads();
    i64 offset = (i64)(tile.start + key) * k_stride + g * width;
    copy_rows(k_rows, k + offset, k_stride, KEYS, tile.length - key, width, pitch);
    copy_rows(v_rows, v + offset, k_stride, KEYS, tile.length - key, width, pitch);
    __syncthreads();
    float scores[KEYS / 4], high = most, sum = 0;
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
      int j = l + 4 * i;
      scores[i] = key + j > tile.first + r ? -1e30f : dot_rows(q_rows + r * pitch, k_rows + j * pitch, width) * scale;
      high = fmaxf(high, scores[i]);
    }
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
    float factor = expf(most - high);
    most = high;
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
      float probability = expf(scores[i] - high);
      p[l + 4 * i] = probability;
      sum += probability;
    }
    total = total * factor + sum;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) sums[i] *= factor;
#pragma unroll 1  // unrolled twice over, the kernels of this file took 45 s to compile
    for (int j = 0; j < KEYS; j++) {
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) {
        int c = l + 4 * i;
        if (c < width) sums[i] += p[j] * v_rows[j * pitch + c];
      }
    }
  }
  total = quad_sum(total);
  if (r >= rows) return;
  if (l == 0) lse[(row + r) * H + h] = most + logf(total);
  T* to = out + (row + r) * q_stride + h * width;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    if (l + 4 * i < width) to[l + 4 * i] = from_f32<T>(sums[i] / total);
  }
}

// dQ, and (lse, delta) of every row at [H, slots] for the other kernel.
template <typename T, int COLUMNS>
DEVICE void queries(const T* d_out, const T* q, const T* k, const T* v, const T* out, const float* lse, T* dq, RowStatistics* statistics,
                    const Tile* tiles, int slots, int H, int G, int width, float scale) {
  extern __shared__ float shared[];
  int pitch = width | 1, h = blockIdx.x % H, g = h / (H / G), r = threadIdx.x / 4, l = threadIdx.x % 4;
  float *q_rows = shared, *d_rows = q_rows + ROWS * pitch, *k_rows = d_rows + ROWS * pitch, *v_rows = k_rows + QUERIES * pitch;
  float* ds = v_rows + QUERIES * pitch + r * (QUERIES + 1);
  Tile tile = tiles[blockIdx.x / H];
  i64 q_stride = (i64)H * width, k_stride = (i64)G * width, row = tile.start + tile.first, offset = row * q_stride + h * width;
  int rows = min(ROWS, tile.length - tile.first);
  copy_rows(q_rows, q + offset, q_stride, ROWS, rows, width, pitch);
  copy_rows(d_rows, d_out + offset, q_stride, ROWS, rows, width, pitch);
  __syncthreads();
  float base = 0, delta = 0, sums[COLUMNS];
  if (r < rows) {
    for (int c = l; c < width; c += 4) delta += to_f32(out[offset + r * q_stride + c]) * d_rows[r * pitch + c];
    base = lse[(row + r) * H + h];
  }
  delta = quad_sum(delta);
  if (l == 0 && r < rows) statistics[(i64)h * slots + tile.slot + r] = RowStatistics{base, delta};
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) sums[i] = 0;
  for (int key = 0; key < tile.first + rows; key += QUERIES) {
    __syncthreads();
    i64 from = (i64)(tile.start + key) * k_stride + g * width;
    copy_rows(k_rows, k + from, k_stride, QUERIES, tile.length - key, width, pitch);
    copy_rows(v_rows, v + from, k_stride, QUERIES, tile.length - key, width, pitch);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < QUERIES / 4; i++) {
      int j = l + 4 * i;
      float p = 0;
      if (r < rows && key + j <= tile.first + r) p = expf(dot_rows(q_rows + r * pitch, k_rows + j * pitch, width) * scale - base);
      ds[j] = p * (dot_rows(d_rows + r * pitch, v_rows + j * pitch, width) - delta);
    }
    __syncwarp();
#pragma unroll 1
    for (int j = 0; j < QUERIES; j++) {
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) {
        int c = l + 4 * i;
        if (c < width) sums[i] += ds[j] * k_rows[j * pitch + c];
      }
    }
  }
  if (r >= rows) return;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    if (l + 4 * i < width) dq[offset + r * q_stride + l + 4 * i] = from_f32<T>(sums[i] * scale);
  }
}

// dK and dV of a tile of keys, summed over the query heads of its group.
template <typename T, int COLUMNS>
DEVICE void keys(const T* d_out, const T* q, const T* k, const T* v, T* dk, T* dv, const RowStatistics* statistics, const Tile* tiles,
                 int slots, int H, int G, int width, float scale) {
  extern __shared__ float shared[];
  int pitch = width | 1, g = blockIdx.x % G, r = threadIdx.x / 4, l = threadIdx.x % 4, heads = H / G;
  float *k_rows = shared, *v_rows = k_rows + ROWS * pitch, *q_rows = v_rows + ROWS * pitch, *d_rows = q_rows + QUERIES * pitch;
  float *p = d_rows + QUERIES * pitch + r * (QUERIES + 1), *ds = p + ROWS * (QUERIES + 1);
  Tile tile = tiles[blockIdx.x / G];
  i64 q_stride = (i64)H * width, k_stride = (i64)G * width, offset = (i64)(tile.start + tile.first) * k_stride + g * width;
  int rows = min(ROWS, tile.length - tile.first);
  copy_rows(k_rows, k + offset, k_stride, ROWS, rows, width, pitch);
  copy_rows(v_rows, v + offset, k_stride, ROWS, rows, width, pitch);
  float dk_sums[COLUMNS], dv_sums[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) dk_sums[i] = dv_sums[i] = 0;
  for (int h = g * heads; h < (g + 1) * heads; h++) {
    const RowStatistics* of_rows = statistics + (i64)h * slots + tile.slot - tile.first;
    for (int query = tile.first; query < tile.length; query += QUERIES) {
      __syncthreads();
      i64 from = (i64)(tile.start + query) * q_stride + h * width;
      copy_rows(q_rows, q + from, q_stride, QUERIES, tile.length - query, width, pitch);
      copy_rows(d_rows, d_out + from, q_stride, QUERIES, tile.length - query, width, pitch);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < QUERIES / 4; i++) {
        int j = l + 4 * i;
        p[j] = ds[j] = 0;
        if (query + j < tile.length && tile.first + r <= query + j) {
          RowStatistics of_row = of_rows[query + j];
          p[j] = expf(dot_rows(k_rows + r * pitch, q_rows + j * pitch, width) * scale - of_row.lse);
          ds[j] = p[j] * (dot_rows(v_rows + r * pitch, d_rows + j * pitch, width) - of_row.delta);
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int j = 0; j < QUERIES; j++) {
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
          int c = l + 4 * i;
          if (c < width) {
            dk_sums[i] += ds[j] * q_rows[j * pitch + c];
            dv_sums[i] += p[j] * d_rows[j * pitch + c];
          }
        }
      }
    }
  }
  if (r >= rows) return;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    if (l + 4 * i < width) {
      dk[offset + r * k_stride + l + 4 * i] = from_f32<T>(dk_sums[i] * scale);
      dv[offset + r * k_stride + l + 4 * i] = from_f32<T>(dv_sums[i]);
    }
  }
}

#define GENERAL(T, DTYPE, WIDTH)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS) general_forward_##DTYPE##_##WIDTH(                                                \
      const T* q, const T* k, const T* v, T* out, float* lse, const Tile* tiles, int H, int G, int width, float scale) {                  \
    after_previous();                                                                                                                     \
    forward<T, WIDTH / 4>(q, k, v, out, lse, tiles, H, G, width, scale);                                                                  \
  }                                                                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS) general_queries_##DTYPE##_##WIDTH(                                                \
      const T* d_out, const T* q, const T* k, const T* v, const T* out, const float* lse, T* dq, RowStatistics* rows, const Tile* tiles,  \
      int slots, int H, int G, int width, float scale) {                                                                                  \
    after_previous();                                                                                                                     \
    queries<T, WIDTH / 4>(d_out, q, k, v, out, lse, dq, rows, tiles, slots, H, G, width, scale);                                          \
  }                                                                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS) general_keys_##DTYPE##_##WIDTH(                                                   \
      const T* d_out, const T* q, const T* k, const T* v, T* dk, T* dv, const RowStatistics* rows, const Tile* tiles, int slots, int H,   \
      int G, int width, float scale) {                                                                                                    \
    after_previous();                                                                                                                     \
    keys<T, WIDTH / 4>(d_out, q, k, v, dk, dv, rows, tiles, slots, H, G, width, scale);                                                   \
  }
GENERAL(float, f32, 64)
GENERAL(float, f32, 128)
GENERAL(float, f32, 256)
GENERAL(bf16, bf16, 64)
GENERAL(bf16, bf16, 128)
GENERAL(bf16, bf16, 256)
