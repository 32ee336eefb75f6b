// What every kernel file begins with: element types, conversions, warp and block sums, and the instructions that kernels use by name, so
// that one source compiles with NVRTC for a GPU and, with LINA_EMULATE defined, for the CPU emulator of the tests. No header is included.
// Kernel files use these names and CUDA C++ itself (threadIdx, __shared__, __syncthreads, __shfl_xor_sync, atomicAdd, ...), no other intrinsic.
// Dynamic shared memory is `extern __shared__ __align__(16) u8 name[];`, of any type and alignment (NVRTC refuses alignas there).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// bfloat16 as its bits. Arithmetic is in f32 throughout.
struct bf16 {
  u16 bits;
};

#ifndef LINA_EMULATE
#define DEVICE __device__ __forceinline__

DEVICE float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE bf16 to_bf16(float x) {
  bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return out;
}
// Two floats to two bf16 in one register, `low` in the low half.
DEVICE u32 pack_bf16(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
DEVICE float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
// c += a b for a warp: a 16x16 row-major, b 16x8 column-major, bf16 with f32 sums (fragment layouts: PTX ISA, mma.m16n8k16).
DEVICE void mma_bf16(float c[4], const u32 a[4], const u32 b[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8x8 matrices of 16-bit elements from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void load_matrices(u32 out[4], const void* row) {
  u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}
// The same, each 8x8 matrix transposed.
DEVICE void load_matrices_transposed(u32 out[4], const void* row) {
  u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}
// 16 bytes from global to shared memory, asynchronously; zeros where `valid` is false.
DEVICE void copy_async_16(void* to, const void* from, bool valid) {
  u32 address = (u32)__cvta_generic_to_shared(to);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N committed groups are in flight.
template <int N>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Stands in every kernel of a module that `overlaps` (context.ts), before anything that touches memory: blocks begin as soon as those of the kernel
// before have ended, and go on here when what it wrote is there. Hides the time that a launch takes. No kernel lets the next one begin any
// earlier (griddepcontrol.launch_dependents): that gains little, and blocks that wait would take the place of another stream's, as NCCL's.
DEVICE void after_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#endif

DEVICE float to_f32(float x) { return x; }
template <typename T>
DEVICE T from_f32(float x);
template <>
DEVICE float from_f32<float>(float x) { return x; }
template <>
DEVICE bf16 from_f32<bf16>(float x) { return to_bf16(x); }

// N elements that are loaded and stored by one access of up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

DEVICE float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
DEVICE float warp_max(float x) {
  for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
// The sum over a block of whole warps, known to every thread; `scratch` holds 32 floats and may be used again after the next barrier.
DEVICE float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[warp] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < warps; i++) sum += scratch[i];
  return sum;
}
DEVICE float block_max(float x, float* scratch) {
  x = warp_max(x);
  int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[warp] = x;
  __syncthreads();
  float most = scratch[0];
  for (int i = 1; i < warps; i++) most = fmaxf(most, scratch[i]);
  return most;
}
