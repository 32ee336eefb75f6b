// What clang includes before a .cu file to compile it for the CPU emulator: CUDA C++'s keywords, built-in variables, vector types,
// intrinsics, and the names that common.cuh defines for GPUs only. It includes no header, as NVRTC does not. Not a model of time, of caches
// or of warps in lockstep: threads are fibers that run one at a time until they wait (engine.cpp).
#pragma once

#define __CUDA_ARCH__ 800
// The marker by which nvrtc.cpp finds kernels in the preprocessed source.
#define __global__ __attribute__((annotate("lina_kernel")))
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Static shared memory lies in one section, which is poisoned before each block; `used` keeps clang from believing that it holds zeros at
// first. (nvrtc.cpp rewrites `extern __shared__ T name[];`.)
#define __shared__ __attribute__((section("lina_static"), used)) static
#define DEVICE inline

typedef __SIZE_TYPE__ size_t;

// ---- What the engine offers (engine.cpp, warps.cpp) ----

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum LinaShuffle { LINA_INDEX, LINA_UP, LINA_DOWN, LINA_XOR };
enum LinaVote { LINA_BALLOT, LINA_ANY, LINA_ALL, LINA_SYNC, LINA_ADD, LINA_MIN, LINA_MAX, LINA_UMIN, LINA_UMAX, LINA_AND, LINA_OR, LINA_EXOR, LINA_MATCH };

extern "C" {
extern uint3 lina_threadIdx, lina_blockIdx;
extern dim3 lina_blockDim, lina_gridDim;
extern unsigned char lina_shared[];
int lina_barrier(int predicate, int kind);  // kind: 0 none, 1 count, 2 and, 3 or
void lina_barrier_named(int id, int threads);
unsigned long long lina_shuffle(unsigned mask, unsigned long long bits, int kind, int argument, int width);
unsigned long long lina_vote(unsigned mask, unsigned long long value, int kind);
unsigned lina_active();
void lina_yield();
[[noreturn]] void lina_trap();
void lina_mma(float* c, const unsigned* a, const unsigned* b);
void lina_load_matrices(unsigned* out, const void* row, int transposed);
void lina_copy_async(void* to, const void* from, int bytes, bool valid);
void lina_copy_commit();
void lina_copy_wait(int groups);
void lina_after_previous();
int printf(const char*, ...);
}

#define threadIdx lina_threadIdx
#define blockIdx lina_blockIdx
#define blockDim lina_blockDim
#define gridDim lina_gridDim
#define warpSize 32

// ---- Kernels by name: nvrtc.cpp appends a table of these ----

struct LinaKernel {
  const char* name;
  void (*run)(void** parameters);
  int count;
  const unsigned* sizes;
  const char* kinds;
};
// A parameter's kind: p address, i integer, f floating point, s struct.
template <typename A>
constexpr char lina_kind() {
  return __is_pointer(A) ? 'p' : __is_floating_point(A) ? 'f' : __is_integral(A) || __is_enum(A) ? 'i' : 's';
}
template <class T, T... I>
struct LinaIndices {};
// A copy, because the caller aligns parameters to 8 bytes only.
template <typename A>
inline A lina_parameter(void* from) {
  A x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
template <auto K>
struct LinaLauncher;
template <typename... A, void (*K)(A...)>
struct LinaLauncher<K> {
  static constexpr int count = sizeof...(A);
  static constexpr unsigned sizes[sizeof...(A) + 1] = {sizeof(A)..., 0};
  static constexpr char kinds[sizeof...(A) + 1] = {lina_kind<A>()..., 0};
  template <int... I>
  static void spread(void** parameters, LinaIndices<int, I...>) {
    K(lina_parameter<A>(parameters[I])...);
  }
  static void run(void** parameters) { spread(parameters, __make_integer_seq<LinaIndices, int, sizeof...(A)>{}); }
};

// ---- Vector types ----

#define LINA_VECTORS(T, name, a2, a4)                                                                     \
  struct alignas(a2) name##2 { T x, y; };                                                                \
  struct name##3 { T x, y, z; };                                                                         \
  struct alignas(a4) name##4 { T x, y, z, w; };                                                          \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                              \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                      \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
LINA_VECTORS(float, float, 8, 16)
LINA_VECTORS(int, int, 8, 16)
LINA_VECTORS(short, short, 4, 8)
LINA_VECTORS(unsigned short, ushort, 4, 8)
LINA_VECTORS(signed char, char, 2, 4)
LINA_VECTORS(unsigned char, uchar, 2, 4)
LINA_VECTORS(double, double, 16, 16)
LINA_VECTORS(long long, longlong, 16, 16)
LINA_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef LINA_VECTORS
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- Barriers, votes, shuffles ----

inline void __syncthreads() { lina_barrier(0, 0); }
inline int __syncthreads_count(int predicate) { return lina_barrier(predicate, 1); }
inline int __syncthreads_and(int predicate) { return lina_barrier(predicate, 2); }
inline int __syncthreads_or(int predicate) { return lina_barrier(predicate, 3); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { lina_vote(mask, 0, LINA_SYNC); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return (unsigned)lina_vote(mask, predicate != 0, LINA_BALLOT); }
inline int __any_sync(unsigned mask, int predicate) { return (int)lina_vote(mask, predicate != 0, LINA_ANY); }
inline int __all_sync(unsigned mask, int predicate) { return (int)lina_vote(mask, predicate != 0, LINA_ALL); }
inline unsigned __activemask() { return lina_active(); }
inline unsigned __reduce_add_sync(unsigned mask, unsigned x) { return (unsigned)lina_vote(mask, x, LINA_ADD); }
inline int __reduce_add_sync(unsigned mask, int x) { return (int)lina_vote(mask, (unsigned)x, LINA_ADD); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned x) { return (unsigned)lina_vote(mask, x, LINA_UMIN); }
inline int __reduce_min_sync(unsigned mask, int x) { return (int)lina_vote(mask, (unsigned)x, LINA_MIN); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) { return (unsigned)lina_vote(mask, x, LINA_UMAX); }
inline int __reduce_max_sync(unsigned mask, int x) { return (int)lina_vote(mask, (unsigned)x, LINA_MAX); }
inline unsigned __reduce_and_sync(unsigned mask, unsigned x) { return (unsigned)lina_vote(mask, x, LINA_AND); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned x) { return (unsigned)lina_vote(mask, x, LINA_OR); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned x) { return (unsigned)lina_vote(mask, x, LINA_EXOR); }
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T x) {
  unsigned long long bits = 0;
  __builtin_memcpy(&bits, &x, sizeof x);
  return (unsigned)lina_vote(mask, bits, LINA_MATCH);
}
template <typename T>
inline T lina_shuffled(unsigned mask, T x, int kind, int argument, int width) {
  unsigned long long bits = 0;
  __builtin_memcpy(&bits, &x, sizeof x);
  bits = lina_shuffle(mask, bits, kind, argument, width);
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
#define LINA_SHUFFLES(T)                                                                                                           \
  inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32) { return lina_shuffled(mask, x, LINA_INDEX, lane, width); }      \
  inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) { return lina_shuffled(mask, x, LINA_UP, (int)by, width); } \
  inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) { return lina_shuffled(mask, x, LINA_DOWN, (int)by, width); } \
  inline T __shfl_xor_sync(unsigned mask, T x, int by, int width = 32) { return lina_shuffled(mask, x, LINA_XOR, by, width); }
LINA_SHUFFLES(int)
LINA_SHUFFLES(unsigned)
LINA_SHUFFLES(long)
LINA_SHUFFLES(unsigned long)
LINA_SHUFFLES(long long)
LINA_SHUFFLES(unsigned long long)
LINA_SHUFFLES(float)
LINA_SHUFFLES(double)
#undef LINA_SHUFFLES

inline void __threadfence() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { lina_yield(); }
[[noreturn]] inline void __trap() { lina_trap(); }
inline long long clock64() { return (long long)__builtin_readcyclecounter(); }
inline int clock() { return (int)__builtin_readcyclecounter(); }

// ---- Atomic operations: one fiber runs at a time, so plain loads and stores are atomic ----

#define LINA_ATOMIC(name, T, expression)        \
  inline T name(T* address, T x) {              \
    volatile T* at = address;                   \
    T old = *at;                                \
    *at = (expression);                         \
    return old;                                 \
  }
#define LINA_INTEGER_ATOMICS(T)                          \
  LINA_ATOMIC(atomicMin, T, x < old ? x : old)           \
  LINA_ATOMIC(atomicMax, T, x > old ? x : old)           \
  LINA_ATOMIC(atomicAnd, T, old& x)                      \
  LINA_ATOMIC(atomicOr, T, old | x)                      \
  LINA_ATOMIC(atomicXor, T, old ^ x)
LINA_INTEGER_ATOMICS(int)
LINA_INTEGER_ATOMICS(unsigned)
LINA_INTEGER_ATOMICS(long long)
LINA_INTEGER_ATOMICS(unsigned long long)
LINA_ATOMIC(atomicAdd, int, (int)((unsigned)old + (unsigned)x))
LINA_ATOMIC(atomicAdd, unsigned, old + x)
LINA_ATOMIC(atomicAdd, unsigned long long, old + x)
LINA_ATOMIC(atomicAdd, float, old + x)
LINA_ATOMIC(atomicAdd, double, old + x)
LINA_ATOMIC(atomicSub, int, (int)((unsigned)old - (unsigned)x))
LINA_ATOMIC(atomicSub, unsigned, old - x)
LINA_ATOMIC(atomicExch, int, x)
LINA_ATOMIC(atomicExch, unsigned, x)
LINA_ATOMIC(atomicExch, unsigned long long, x)
LINA_ATOMIC(atomicExch, float, x)
LINA_ATOMIC(atomicInc, unsigned, old >= x ? 0 : old + 1)
LINA_ATOMIC(atomicDec, unsigned, old == 0 || old > x ? x : old - 1)
#undef LINA_INTEGER_ATOMICS
#undef LINA_ATOMIC
#define LINA_CAS(T)                                        \
  inline T atomicCAS(T* address, T expected, T x) {        \
    volatile T* at = address;                              \
    T old = *at;                                           \
    if (old == expected) *at = x;                          \
    else lina_yield();                                     \
    return old;                                            \
  }
LINA_CAS(int)
LINA_CAS(unsigned)
LINA_CAS(unsigned short)
LINA_CAS(unsigned long long)
#undef LINA_CAS

// ---- Loads and stores with cache hints ----

template <typename T>
inline T __ldg(const T* at) { return *at; }
template <typename T>
inline T __ldca(const T* at) { return *at; }
template <typename T>
inline T __ldcg(const T* at) { return *at; }
template <typename T>
inline T __ldcs(const T* at) { return *at; }
template <typename T>
inline T __ldlu(const T* at) { return *at; }
template <typename T>
inline T __ldcv(const T* at) { return *at; }
template <typename T>
inline void __stwb(T* at, T x) { *at = x; }
template <typename T>
inline void __stcg(T* at, T x) { *at = x; }
template <typename T>
inline void __stcs(T* at, T x) { *at = x; }
template <typename T>
inline void __stwt(T* at, T x) { *at = x; }

// ---- Bits ----

template <typename To, typename From>
inline To lina_bits(From x) {
  To out;
  static_assert(sizeof(To) == sizeof(From), "");
  __builtin_memcpy(&out, &x, sizeof out);
  return out;
}
inline unsigned __float_as_uint(float x) { return lina_bits<unsigned>(x); }
inline int __float_as_int(float x) { return lina_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return lina_bits<float>(x); }
inline float __int_as_float(int x) { return lina_bits<float>(x); }
inline long long __double_as_longlong(double x) { return lina_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return lina_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) { return __builtin_bitreverse32(x); }
inline unsigned long long __brevll(unsigned long long x) { return __builtin_bitreverse64(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((unsigned long long)a * b) >> 32); }
inline int __mulhi(int a, int b) { return (int)(((long long)a * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)(((unsigned __int128)a * b) >> 64); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned long long both = ((unsigned long long)b << 32) | a;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) {
    unsigned s = (selector >> (4 * i)) & 15, byte = (unsigned)(both >> (8 * (s & 7))) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) { return (unsigned)(((((unsigned long long)high << 32) | low) << (by & 31)) >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) { return (unsigned)((((unsigned long long)high << 32) | low) >> (by & 31)); }

// ---- Mathematics: the C library's functions under CUDA's names and overloads ----

#define LINA_MATH_1(name)                                                 \
  extern "C" double name(double) noexcept;                               \
  extern "C" float name##f(float) noexcept;                              \
  inline float name(float x) { return name##f(x); }
LINA_MATH_1(exp) LINA_MATH_1(exp2) LINA_MATH_1(exp10) LINA_MATH_1(expm1) LINA_MATH_1(log) LINA_MATH_1(log2) LINA_MATH_1(log10) LINA_MATH_1(log1p)
LINA_MATH_1(sqrt) LINA_MATH_1(cbrt) LINA_MATH_1(sin) LINA_MATH_1(cos) LINA_MATH_1(tan) LINA_MATH_1(asin) LINA_MATH_1(acos) LINA_MATH_1(atan)
LINA_MATH_1(sinh) LINA_MATH_1(cosh) LINA_MATH_1(tanh) LINA_MATH_1(erf) LINA_MATH_1(erfc) LINA_MATH_1(lgamma) LINA_MATH_1(tgamma)
LINA_MATH_1(floor) LINA_MATH_1(ceil) LINA_MATH_1(trunc) LINA_MATH_1(round) LINA_MATH_1(rint) LINA_MATH_1(nearbyint) LINA_MATH_1(fabs)
#undef LINA_MATH_1
#define LINA_MATH_2(name)                                                 \
  extern "C" double name(double, double) noexcept;                       \
  extern "C" float name##f(float, float) noexcept;                       \
  inline float name(float x, float y) { return name##f(x, y); }
LINA_MATH_2(pow) LINA_MATH_2(atan2) LINA_MATH_2(fmod) LINA_MATH_2(remainder) LINA_MATH_2(fmin) LINA_MATH_2(fmax) LINA_MATH_2(copysign) LINA_MATH_2(hypot)
#undef LINA_MATH_2
extern "C" double fma(double, double, double) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
extern "C" double ldexp(double, int) noexcept;
extern "C" float ldexpf(float, int) noexcept;
extern "C" double frexp(double, int*) noexcept;
extern "C" float frexpf(float, int*) noexcept;
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline float ldexp(float x, int by) { return ldexpf(x, by); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline void sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline void sincos(double x, double* s, double* c) { *s = sin(x), *c = cos(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }
inline bool signbit(double x) { return __builtin_signbit(x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline long long llabs(long long x) { return x < 0 ? -x : x; }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
#define LINA_MIN_MAX(T, A, B)                                              \
  inline T min(A a, B b) { return (T)a < (T)b ? (T)a : (T)b; }              \
  inline T max(A a, B b) { return (T)a > (T)b ? (T)a : (T)b; }
LINA_MIN_MAX(int, int, int)
LINA_MIN_MAX(unsigned, unsigned, unsigned)
LINA_MIN_MAX(unsigned, int, unsigned)
LINA_MIN_MAX(unsigned, unsigned, int)
LINA_MIN_MAX(long, long, long)
LINA_MIN_MAX(unsigned long, unsigned long, unsigned long)
LINA_MIN_MAX(long long, long long, long long)
LINA_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
LINA_MIN_MAX(unsigned long long, long long, unsigned long long)
LINA_MIN_MAX(unsigned long long, unsigned long long, long long)
#undef LINA_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline void __sincosf(float x, float* s, float* c) { sincosf(x, s, c); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
// Never contracted with another operation, which is what these names are for.
#define LINA_EXACT(name, T, expression)            \
  inline T name(T x, T y) {                        \
    _Pragma("clang fp contract(off)") return expression; \
  }
LINA_EXACT(__fadd_rn, float, x + y)
LINA_EXACT(__fsub_rn, float, x - y)
LINA_EXACT(__fmul_rn, float, x* y)
LINA_EXACT(__fdiv_rn, float, x / y)
LINA_EXACT(__dadd_rn, double, x + y)
LINA_EXACT(__dsub_rn, double, x - y)
LINA_EXACT(__dmul_rn, double, x* y)
LINA_EXACT(__ddiv_rn, double, x / y)
#undef LINA_EXACT
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline int __float2int_ru(float x) { return (int)ceilf(x); }
inline unsigned __float2uint_rn(float x) { return (unsigned)rintf(x); }
inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
inline long long __float2ll_rn(float x) { return (long long)rintf(x); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __ll2float_rn(long long x) { return (float)x; }
inline float __ull2float_rn(unsigned long long x) { return (float)x; }
inline double __int2double_rn(int x) { return (double)x; }
inline float __double2float_rn(double x) { return (float)x; }
inline int __double2int_rn(double x) { return (int)rint(x); }

// ---- What common.cuh defines for GPUs only ----

struct bf16;
float to_f32(bf16 x);
bf16 to_bf16(float x);
inline unsigned lina_round_bf16(float x) {
  unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // cvt.rn.bf16.f32 makes every NaN this one
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}
inline unsigned pack_bf16(float low, float high) { return lina_round_bf16(high) << 16 | lina_round_bf16(low); }
inline float exp2_fast(float x) {
  float out = exp2f(x);
  return out < 1.17549435e-38f ? 0.0f : out;  // .ftz
}
inline void mma_bf16(float c[4], const unsigned a[4], const unsigned b[2]) { lina_mma(c, a, b); }
inline void load_matrices(unsigned out[4], const void* row) { lina_load_matrices(out, row, 0); }
inline void load_matrices_transposed(unsigned out[4], const void* row) { lina_load_matrices(out, row, 1); }
inline void copy_async_16(void* to, const void* from, bool valid) { lina_copy_async(to, from, 16, valid); }
inline void copy_async_commit() { lina_copy_commit(); }
inline void after_previous() { lina_after_previous(); }
template <int N>
inline void copy_async_wait() { lina_copy_wait(N); }
