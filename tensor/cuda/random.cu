// Normal numbers by index; the steps are those of tensor/random.ts.

DEVICE u32 mix(u32 counter, u32 a, u32 b) {
  u32 x = counter ^ a;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  x = (x ^ (x >> 16)) + b;
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// One thread makes one pair.
template <typename T>
DEVICE void fill_normal(T* out, i64 size, u32 a, u32 b, float std) {
  i64 pair = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  i64 i = 2 * pair;
  if (i >= size) return;
  float u = ((float)(mix((u32)pair, a, b) >> 9) + 0.5f) * 1.1920928955078125e-7f;
  float v = ((float)(mix((u32)pair, b ^ 0x9e3779b9u, a) >> 9) + 0.5f) * 1.1920928955078125e-7f;
  float radius = std * sqrtf(-2.0f * logf(u));
  out[i] = from_f32<T>(radius * cosf(6.283185307179586f * v));
  if (i + 1 < size) out[i + 1] = from_f32<T>(radius * sinf(6.283185307179586f * v));
}

#define NORMAL(T, name) \
  extern "C" __global__ void name(T* out, i64 size, int a, int b, float std) { \
    after_previous();                                                          \
    fill_normal<T>(out, size, (u32)a, (u32)b, std); \
  }
NORMAL(float, normal_f32)
NORMAL(bf16, normal_bf16)
