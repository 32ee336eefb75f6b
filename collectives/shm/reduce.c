// The hot loops of the shm transport, compiled to WebAssembly (build.sh) and run on the rank's linear memory: elementwise
// reduction in rank order with SIMD, and the one-round exchange of small messages without a step through JavaScript. No function
// uses the C stack or static data: that memory belongs to tensors. The build refuses a frame, a test refuses data.

#include <stdint.h>
#include <wasm_simd128.h>

#define EXPORT(name) __attribute__((export_name(#name)))

enum { F32, F64, F16, BF16, I32, U8, I64 };    // order of DTYPES in tensor/dtype.ts
enum { SUM, MIN, MAX, PROD, AVG };             // order of REDUCE_OPS in types.ts

typedef const uint8_t *Source;

// ---- bfloat16 and half precision, four at a time, as f32 ----

static inline v128_t load_bf16(Source p) { return wasm_i32x4_shl(wasm_u32x4_load16x4(p), 16); }

static inline v128_t round_bf16(v128_t x) {
  v128_t odd = wasm_v128_and(wasm_u32x4_shr(x, 16), wasm_i32x4_splat(1));
  v128_t rounded = wasm_u32x4_shr(
      wasm_i32x4_add(wasm_i32x4_add(x, wasm_i32x4_splat(0x7fff)), odd), 16);
  v128_t quiet = wasm_v128_or(wasm_u32x4_shr(x, 16), wasm_i32x4_splat(0x40));
  return wasm_v128_bitselect(quiet, rounded, wasm_f32x4_ne(x, x));
}

static inline v128_t widen_f16(v128_t h) {
  v128_t magnitude = wasm_i32x4_shl(wasm_v128_and(h, wasm_i32x4_splat(0x7fff)), 13);
  // The exponent is moved by a multiplication, which also makes subnormal halves normal.
  v128_t x = wasm_f32x4_mul(magnitude, wasm_f32x4_splat(0x1p112f));
  v128_t special = wasm_i32x4_ge(magnitude, wasm_i32x4_splat(0x7c00 << 13));
  x = wasm_v128_or(x, wasm_v128_and(special, wasm_i32x4_splat(0x7f800000)));
  return wasm_v128_or(x, wasm_i32x4_shl(wasm_v128_and(h, wasm_i32x4_splat(0x8000)), 16));
}

static inline v128_t load_f16(Source p) { return widen_f16(wasm_u32x4_load16x4(p)); }

static inline v128_t round_f16(v128_t x) {
  v128_t sign = wasm_v128_and(x, wasm_i32x4_splat((int32_t)0x80000000));
  v128_t a = wasm_v128_xor(x, sign);
  v128_t odd = wasm_v128_and(wasm_u32x4_shr(a, 13), wasm_i32x4_splat(1));
  v128_t normal = wasm_u32x4_shr(
      wasm_i32x4_add(wasm_i32x4_add(a, wasm_i32x4_splat(-(112 << 23) + 0xfff)), odd), 13);
  v128_t magic = wasm_i32x4_splat(126 << 23);  // 0.5: its last bit is a subnormal half's last bit
  v128_t subnormal = wasm_i32x4_sub(wasm_f32x4_add(a, magic), magic);
  v128_t large = wasm_v128_bitselect(wasm_i32x4_splat(0x7e00), wasm_i32x4_splat(0x7c00),
                                     wasm_i32x4_gt(a, wasm_i32x4_splat(0x7f800000)));
  v128_t h = wasm_v128_bitselect(subnormal, normal, wasm_i32x4_lt(a, wasm_i32x4_splat(113 << 23)));
  h = wasm_v128_bitselect(large, h, wasm_i32x4_ge(a, wasm_i32x4_splat(143 << 23)));
  return wasm_v128_or(h, wasm_u32x4_shr(sign, 16));
}

static inline v128_t halves(v128_t a, v128_t b) { return wasm_u16x8_narrow_i32x4(a, b); }

// ---- reduction ----

static inline Source source(const uint32_t *sources, int s) { return (Source)sources[s]; }

// Four vectors of 16 bytes at a time, one at a time, then single elements. All loads of a vector come before its store, so the
// result may replace a source.
#define REDUCE(T, COMBINE, combine, FINISH, finish)                                                  \
  {                                                                                                  \
    uint32_t bytes = n * sizeof(T), i = 0;                                                           \
    for (; i + 64 <= bytes; i += 64) {                                                               \
      Source p = source(sources, 0) + i;                                                             \
      v128_t a = wasm_v128_load(p), b = wasm_v128_load(p + 16);                                      \
      v128_t c = wasm_v128_load(p + 32), d = wasm_v128_load(p + 48);                                 \
      for (int s = 1; s < ranks; s++) {                                                              \
        p = source(sources, s) + i;                                                                  \
        a = COMBINE(a, wasm_v128_load(p)), b = COMBINE(b, wasm_v128_load(p + 16));                   \
        c = COMBINE(c, wasm_v128_load(p + 32)), d = COMBINE(d, wasm_v128_load(p + 48));              \
      }                                                                                              \
      a = FINISH(a), b = FINISH(b), c = FINISH(c), d = FINISH(d);                                    \
      wasm_v128_store(out + i, a), wasm_v128_store(out + i + 16, b);                                 \
      wasm_v128_store(out + i + 32, c), wasm_v128_store(out + i + 48, d);                            \
      if (copy) {                                                                                    \
        wasm_v128_store(copy + i, a), wasm_v128_store(copy + i + 16, b);                             \
        wasm_v128_store(copy + i + 32, c), wasm_v128_store(copy + i + 48, d);                        \
      }                                                                                              \
    }                                                                                                \
    for (; i < bytes; i += sizeof(T)) {                                                              \
      T x = *(const T *)(source(sources, 0) + i);                                                    \
      for (int s = 1; s < ranks; s++) {                                                              \
        T y = *(const T *)(source(sources, s) + i);                                                  \
        x = combine(x, y);                                                                           \
      }                                                                                              \
      x = finish(x);                                                                                 \
      *(T *)(out + i) = x;                                                                           \
      if (copy) *(T *)(copy + i) = x;                                                                \
    }                                                                                                \
    return;                                                                                          \
  }

// Integers without a vector instruction; W is a type that holds the result before it wraps.
#define REDUCE_SCALAR(T, W, combine, finish)                                                         \
  {                                                                                                  \
    for (uint32_t i = 0; i < n; i++) {                                                               \
      W x = ((const T *)source(sources, 0))[i];                                                      \
      for (int s = 1; s < ranks; s++) {                                                              \
        W y = ((const T *)source(sources, s))[i];                                                    \
        x = combine(x, y);                                                                           \
      }                                                                                              \
      T z = (T)(finish(x));                                                                          \
      ((T *)out)[i] = z;                                                                             \
      if (copy) ((T *)copy)[i] = z;                                                                  \
    }                                                                                                \
    return;                                                                                          \
  }

// Two-byte floats: eight elements at a time; the last few through the lanes of one vector.
#define REDUCE_HALF(LOAD, ROUND, COMBINE, FINISH)                                                    \
  {                                                                                                  \
    uint32_t i = 0;                                                                                  \
    for (; i + 8 <= n; i += 8) {                                                                     \
      Source p = source(sources, 0) + 2 * i;                                                         \
      v128_t a = LOAD(p), b = LOAD(p + 8);                                                           \
      for (int s = 1; s < ranks; s++) {                                                              \
        p = source(sources, s) + 2 * i;                                                              \
        a = COMBINE(a, LOAD(p)), b = COMBINE(b, LOAD(p + 8));                                        \
      }                                                                                              \
      a = halves(ROUND(FINISH(a)), ROUND(FINISH(b)));                                                \
      wasm_v128_store(out + 2 * i, a);                                                               \
      if (copy) wasm_v128_store(copy + 2 * i, a);                                                    \
    }                                                                                                \
    for (; i < n; i++) {                                                                             \
      uint64_t one = ((const uint16_t *)source(sources, 0))[i];                                      \
      v128_t lane = wasm_i64x2_make(one, 0);                                                         \
      v128_t a = LANE_##LOAD(lane);                                                                  \
      for (int s = 1; s < ranks; s++) {                                                              \
        one = ((const uint16_t *)source(sources, s))[i];                                             \
        lane = wasm_i64x2_make(one, 0);                                                              \
        a = COMBINE(a, LANE_##LOAD(lane));                                                           \
      }                                                                                              \
      uint16_t z = (uint16_t)wasm_i32x4_extract_lane(ROUND(FINISH(a)), 0);                           \
      ((uint16_t *)out)[i] = z;                                                                      \
      if (copy) ((uint16_t *)copy)[i] = z;                                                           \
    }                                                                                                \
    return;                                                                                          \
  }

#define LANE_load_bf16(lane) wasm_i32x4_shl(lane, 16)
#define LANE_load_f16(lane) widen_f16(lane)

#define KEEP(x) (x)
#define ADD(x, y) ((x) + (y))
#define TIMES(x, y) ((x) * (y))
#define LESS(x, y) ((y) < (x) ? (y) : (x))
#define MORE(x, y) ((y) > (x) ? (y) : (x))
#define OVER(x) ((x) / ranks)
#define F32_OVER(x) wasm_f32x4_div(x, wasm_f32x4_splat((float)ranks))
#define F64_OVER(x) wasm_f64x2_div(x, wasm_f64x2_splat((double)ranks))
#define F32_OVER_1(x) ((x) / (float)ranks)
#define F64_OVER_1(x) ((x) / (double)ranks)
// WebAssembly's own minimum and maximum: NaN wins, and -0 < 0, as in Math.min.
#define F32_LESS(x, y) wasm_f32x4_extract_lane(wasm_f32x4_min(wasm_f32x4_splat(x), wasm_f32x4_splat(y)), 0)
#define F32_MORE(x, y) wasm_f32x4_extract_lane(wasm_f32x4_max(wasm_f32x4_splat(x), wasm_f32x4_splat(y)), 0)
#define F64_LESS(x, y) wasm_f64x2_extract_lane(wasm_f64x2_min(wasm_f64x2_splat(x), wasm_f64x2_splat(y)), 0)
#define F64_MORE(x, y) wasm_f64x2_extract_lane(wasm_f64x2_max(wasm_f64x2_splat(x), wasm_f64x2_splat(y)), 0)

// sources: one address per rank, in rank order. copy: a second place for the result, or null.
EXPORT(reduce)
void reduce(int dtype, int op, const uint32_t *sources, int ranks, uint8_t *out, uint8_t *copy, uint32_t n) {
  switch (dtype) {
  case F32:
    if (op == SUM) REDUCE(float, wasm_f32x4_add, ADD, KEEP, KEEP)
    if (op == AVG) REDUCE(float, wasm_f32x4_add, ADD, F32_OVER, F32_OVER_1)
    if (op == MIN) REDUCE(float, wasm_f32x4_min, F32_LESS, KEEP, KEEP)
    if (op == MAX) REDUCE(float, wasm_f32x4_max, F32_MORE, KEEP, KEEP)
    REDUCE(float, wasm_f32x4_mul, TIMES, KEEP, KEEP)
  case F64:
    if (op == SUM) REDUCE(double, wasm_f64x2_add, ADD, KEEP, KEEP)
    if (op == AVG) REDUCE(double, wasm_f64x2_add, ADD, F64_OVER, F64_OVER_1)
    if (op == MIN) REDUCE(double, wasm_f64x2_min, F64_LESS, KEEP, KEEP)
    if (op == MAX) REDUCE(double, wasm_f64x2_max, F64_MORE, KEEP, KEEP)
    REDUCE(double, wasm_f64x2_mul, TIMES, KEEP, KEEP)
  case F16:
    if (op == SUM) REDUCE_HALF(load_f16, round_f16, wasm_f32x4_add, KEEP)
    if (op == AVG) REDUCE_HALF(load_f16, round_f16, wasm_f32x4_add, F32_OVER)
    if (op == MIN) REDUCE_HALF(load_f16, round_f16, wasm_f32x4_min, KEEP)
    if (op == MAX) REDUCE_HALF(load_f16, round_f16, wasm_f32x4_max, KEEP)
    REDUCE_HALF(load_f16, round_f16, wasm_f32x4_mul, KEEP)
  case BF16:
    if (op == SUM) REDUCE_HALF(load_bf16, round_bf16, wasm_f32x4_add, KEEP)
    if (op == AVG) REDUCE_HALF(load_bf16, round_bf16, wasm_f32x4_add, F32_OVER)
    if (op == MIN) REDUCE_HALF(load_bf16, round_bf16, wasm_f32x4_min, KEEP)
    if (op == MAX) REDUCE_HALF(load_bf16, round_bf16, wasm_f32x4_max, KEEP)
    REDUCE_HALF(load_bf16, round_bf16, wasm_f32x4_mul, KEEP)
  case I32:
    if (op == SUM) REDUCE(uint32_t, wasm_i32x4_add, ADD, KEEP, KEEP)
    if (op == MIN) REDUCE(int32_t, wasm_i32x4_min, LESS, KEEP, KEEP)
    if (op == MAX) REDUCE(int32_t, wasm_i32x4_max, MORE, KEEP, KEEP)
    if (op == PROD) REDUCE(uint32_t, wasm_i32x4_mul, TIMES, KEEP, KEEP)
    REDUCE_SCALAR(int32_t, int64_t, ADD, OVER)
  case U8:
    if (op == SUM) REDUCE(uint8_t, wasm_i8x16_add, ADD, KEEP, KEEP)
    if (op == MIN) REDUCE(uint8_t, wasm_u8x16_min, LESS, KEEP, KEEP)
    if (op == MAX) REDUCE(uint8_t, wasm_u8x16_max, MORE, KEEP, KEEP)
    if (op == PROD) REDUCE_SCALAR(uint8_t, uint32_t, TIMES, KEEP)
    REDUCE_SCALAR(uint8_t, uint32_t, ADD, OVER)
  default:
    if (op == SUM) REDUCE(uint64_t, wasm_i64x2_add, ADD, KEEP, KEEP)
    if (op == PROD) REDUCE(uint64_t, wasm_i64x2_mul, TIMES, KEEP, KEEP)
    if (op == MIN) REDUCE_SCALAR(int64_t, int64_t, LESS, KEEP)
    if (op == MAX) REDUCE_SCALAR(int64_t, int64_t, MORE, KEEP)
    // The sum wraps as it does everywhere; only the division needs a sign.
    for (uint32_t i = 0; i < n; i++) {
      uint64_t x = 0;
      for (int s = 0; s < ranks; s++) x += ((const uint64_t *)source(sources, s))[i];
      int64_t z = (int64_t)x / ranks;
      ((int64_t *)out)[i] = z;
      if (copy) ((int64_t *)copy)[i] = z;
    }
  }
}

// ---- one-round exchanges of small messages ----
//
// The slots of a round lie `stride` bytes apart, one per rank; rounds.ts says what they mean. These functions fill this rank's
// slot, raise its flag, look for the others' flags `spins` times, and finish the operation if all are up. They return 1 if it is
// complete. Else rounds.ts goes on from the raised flag: 0 if ranks have not arrived or call something else, 2 if a rank sleeps.

enum { HEADER = 16, AREA_HEADER = 16 };  // SLOT_HEADER_BYTES and AREA_HEADER_BYTES in segment.ts
typedef struct {
  uint32_t slots;     // first rank's slot of this round
  uint32_t stride;
  int32_t rank, ranks;
  uint32_t sleepers;  // one word per process of the job
  int32_t processes;
  int32_t flag;       // what the flag becomes
  int32_t signature;
  int32_t spins;
  uint32_t table;     // room for a word per rank
  int32_t ordered_stores;  // whether this processor makes stores visible in program order
  int32_t published;  // the flag is up already: only look again
} Round;

static inline uint8_t *slot(const Round *r, int rank) {
  return (uint8_t *)(r->slots + (uint32_t)rank * r->stride);
}

static inline void move(uint8_t *to, Source from, uint32_t bytes) {
  if (bytes > 512) {
    __builtin_memcpy(to, from, bytes);
    return;
  }
  uint32_t i = 0;
  for (; i + 16 <= bytes; i += 16) wasm_v128_store(to + i, wasm_v128_load(from + i));
  for (; i + 4 <= bytes; i += 4) *(uint32_t *)(to + i) = *(const uint32_t *)(from + i);
  for (; i < bytes; i++) to[i] = from[i];
}

static inline int raise(const Round *r) {
  int32_t *header = (int32_t *)slot(r, r->rank);
  header[1] = r->signature;
  header[2] = 1;  // round
  // An atomic store waits until the line is this core's before anything after it may be read, which doubles the time of a small
  // exchange. x86 keeps the order of stores without it; that a sleeper's note may then be missed costs that sleeper a millisecond.
  __atomic_signal_fence(__ATOMIC_RELEASE);  // nor may the compiler move them
  if (r->ordered_stores) *(volatile int32_t *)header = r->flag;
  else __atomic_store_n(header, r->flag, __ATOMIC_SEQ_CST);
  for (int q = 0; q < r->processes; q++) {
    if (__atomic_load_n((int32_t *)r->sleepers + q, __ATOMIC_SEQ_CST)) return 2;
  }
  return 0;
}

static inline int publish(const Round *r) {
  if (!r->published && raise(r)) return 2;
  for (int spins = r->spins, q = 0;;) {
    int32_t *other = (int32_t *)slot(r, q);
    // Flags wrap around, which only unsigned numbers may do in C.
    if ((int32_t)((uint32_t)__atomic_load_n(other, __ATOMIC_SEQ_CST) - (uint32_t)r->flag) < 0) {
      if (--spins <= 0) return 0;
      continue;
    }
    if (other[1] != r->signature || other[2] != 1) return 0;
    if (++q == r->ranks) return 1;
  }
}

EXPORT(small_barrier)
int small_barrier(const Round *r) { return publish(r); }

EXPORT(small_all_reduce)
int small_all_reduce(const Round *r, int dtype, int op, Source x, uint8_t *out, uint32_t n, uint32_t bytes) {
  if (!r->published) move(slot(r, r->rank) + HEADER, x, bytes);
  int state = publish(r);
  if (state != 1) return state;
  uint32_t *sources = (uint32_t *)r->table;
  for (int q = 0; q < r->ranks; q++) sources[q] = (uint32_t)slot(r, q) + HEADER;
  reduce(dtype, op, sources, r->ranks, out, 0, n);
  return 1;
}

EXPORT(small_all_gather)
int small_all_gather(const Round *r, Source x, uint8_t *out, uint32_t bytes) {
  if (!r->published) {
    move(slot(r, r->rank) + HEADER, x, bytes);
    move(out + r->rank * bytes, x, bytes);
  }
  int state = publish(r);
  if (state != 1) return state;
  for (int q = 0; q < r->ranks; q++) {
    if (q != r->rank) move(out + q * bytes, slot(r, q) + HEADER, bytes);
  }
  return 1;
}

// bytes: for each rank what goes to it, then for each rank what comes from it. area: bytes of a slot per destination, which begin with
// their number, so that a receiver who expects another one notices.
EXPORT(small_all_to_all)
int small_all_to_all(const Round *r, Source x, uint8_t *out, const uint32_t *bytes, uint32_t area) {
  const uint32_t *received = bytes + r->ranks;
  uint8_t *own = out;
  for (int q = 0; q < r->rank; q++) own += received[q];
  for (int q = 0; q < r->ranks && !r->published; q++) {
    uint8_t *to = slot(r, r->rank) + HEADER + q * area;
    *(uint64_t *)to = bytes[q];
    move(q == r->rank ? own : to + AREA_HEADER, x, bytes[q]);
    x += bytes[q];
  }
  int state = publish(r);
  if (state != 1) return state;
  for (int q = 0; q < r->ranks; q++) {
    Source from = slot(r, q) + HEADER + r->rank * area;
    if (*(const uint64_t *)from != received[q]) return 0;  // rounds.ts says so
    if (q != r->rank) move(out, from + AREA_HEADER, received[q]);
    out += received[q];
  }
  return 1;
}
