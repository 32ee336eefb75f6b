// Runs a kernel's blocks one after another on the calling thread, each CUDA thread as a fiber that runs until it waits: at a barrier of the
// block, or for the lanes of its warp (shuffles, votes, mma, ldmatrix). Detects barriers and warp operations that can never complete,
// faults, misaligned accesses, and writes behind the dynamic shared memory. Not parallel and not preemptive, so a missing barrier shows
// because one warp runs ahead of the others as far as it can: in blocks of even index the first one, in those of odd index the last.
// LINA_EMULATOR_SEED makes order and haste of the warps random.

#include "emulator.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

using lina::Dim;

// ---- Context switch ----

extern "C" void lina_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.type lina_switch,@function
lina_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lina_switch,.-lina_switch
)");
// A stack whose first switch enters `entry`.
static void* new_stack(uint8_t* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  *--sp = nullptr;  // as if `entry` had been called: 8 modulo 16
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.type lina_switch,%function
lina_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size lina_switch,.-lina_switch
)");
static void* new_stack(uint8_t* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 20;
  memset(sp, 0, 160);
  sp[11] = reinterpret_cast<void*>(entry);  // x30
  return sp;
}
#else
#error "The emulator knows x86-64 and aarch64"
#endif

namespace {

constexpr size_t STACK = 256 * 1024, PAGE = 4096;

enum State : uint8_t { UNBORN, READY, AT_BARRIER, AT_WARP, AT_NAMED, EXITED };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

struct Thread {
  void* sp = nullptr;
  uint8_t* stack = nullptr;
  Dim index{};
  State state = UNBORN;
  uint32_t mask = 0;            // of the warp operation that it waits at
  const char* where = nullptr;  // its name
  std::vector<Copy> copies;     // asynchronous copies in flight, oldest first
  std::vector<size_t> groups;   // number of copies at each commit
};

// A warp operation that some lanes have arrived at.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  int kind = 0;
  const char* name = nullptr;
};

struct Warp {
  uint32_t alive = 0;
  Meeting meetings[32];
  uint64_t in[32], out[32];
  const void* first[32];  // operands of mma and ldmatrix
  const void* second[32];
  void* third[32];
};

struct Named {
  int threads = 0;
  std::vector<unsigned> waiting;
};

std::mutex launching;
std::vector<Thread> threads(lina::MOST_THREADS);
Warp warps[32];
Named named[16];
uint32_t ready_lanes[32], ready_warps;  // bits of what can run
unsigned haste[32];                     // warps in the order in which they run, in random mode
std::vector<uint8_t*> stacks;
unsigned stacks_made;

unsigned total, begun, exited, current;
bool descending;
unsigned barrier_arrived;
int barrier_kind, barrier_value, barrier_result;
void* main_sp;
void** parameters;
const lina::Kernel* kernel;
const lina::Module* module_;
size_t shared_bytes;
volatile bool running;
pthread_t runner;
int status;
uint64_t random_state, seed;

uint64_t random_next() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

}  // namespace

// ---- What kernels see ----

EXPORT Dim lina_threadIdx, lina_blockIdx;
Dim lina_threadIdx, lina_blockIdx;
EXPORT Dim lina_blockDim, lina_gridDim;
Dim lina_blockDim, lina_gridDim;
// The dynamic shared memory, and pages behind it that are closed as far as a block did not ask for them.
constexpr size_t SHARED_SPACE = (lina::MOST_SHARED + 2 * PAGE - 1) / PAGE * PAGE + 16 * PAGE;
EXPORT uint8_t lina_shared[SHARED_SPACE];
alignas(65536) uint8_t lina_shared[SHARED_SPACE];

namespace {

[[noreturn]] void abandon(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Ends the kernel with an error; the fibers' stacks are simply left.
void abandon(int code, const char* format, ...) {
  char text[1024], all[1536];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  Dim t = lina_threadIdx, b = lina_blockIdx;
  snprintf(all, sizeof all, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s", kernel->name, b.x, b.y, b.z, t.x, t.y, t.z, text);
  status = code;
  lina::fail_sticky(code, all);
  void* unused;
  lina_switch(&unused, main_sp);
  __builtin_unreachable();
}

void push_ready(unsigned t) {
  threads[t].state = READY;
  ready_lanes[t / 32] |= 1u << t % 32;
  ready_warps |= 1u << t / 32;
}

// The next set bit behind `at`, around the end.
unsigned next_bit(uint32_t bits, unsigned at) {
  uint32_t behind = at == 31 ? 0 : bits & ~0u << (at + 1);
  return unsigned(__builtin_ctz(behind ? behind : bits));
}

// Takes a thread that can run: of the same warp if there is one, or, to let others go first, of the next.
unsigned pop_ready(bool away) {
  unsigned warp = current / 32, lane;
  if (seed) {
    // The hastiest warp runs; now and then two warps change places.
    if (random_next() % 16 == 0) std::swap(haste[random_next() % 32], haste[random_next() % 32]);
    unsigned i = 0;
    while (!(ready_warps >> haste[i] & 1)) i++;
    warp = away ? next_bit(ready_warps, warp) : haste[i];
    lane = next_bit(ready_lanes[warp], unsigned(random_next() % 32));
  } else {
    if (away) {
      warp = next_bit(ready_warps, warp);
    } else if (!(ready_warps >> warp & 1)) {
      warp = descending ? 31 - unsigned(__builtin_clz(ready_warps)) : unsigned(__builtin_ctz(ready_warps));
    }
    lane = next_bit(ready_lanes[warp], current % 32);
  }
  ready_lanes[warp] &= ~(1u << lane);
  if (!ready_lanes[warp]) ready_warps &= ~(1u << warp);
  return warp * 32 + lane;
}

uint8_t* take_stack() {
  if (stacks.empty()) {
    // One page below each stack is closed, so that a kernel with too large local arrays faults instead of writing into its neighbour.
    auto* memory = static_cast<uint8_t*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) abandon(lina::OUT_OF_MEMORY, "no memory for the stack of a thread");
    mprotect(memory, PAGE, PROT_NONE);
    // Tops of stacks are staggered, else the same frames of all threads would share a few cache sets.
    stacks.push_back(memory + STACK - 320 * (stacks_made++ % 64));
  }
  uint8_t* stack = stacks.back();
  stacks.pop_back();
  return stack;
}

void set_current(unsigned t) {
  current = t;
  lina_threadIdx = threads[t].index;
}

unsigned birth() {
  unsigned t = descending ? total - 1 - begun : begun;
  begun++;
  Thread& thread = threads[t];
  unsigned x = lina_blockDim.x, y = lina_blockDim.y;
  thread.index = {t % x, t / x % y, t / x / y};
  thread.state = READY;
  thread.copies.clear();
  thread.groups.clear();
  return t;
}

void thread_main();

bool may_begin() { return begun < total && (ready_warps == 0 || (seed && random_next() % 4 == 0)); }

[[noreturn]] void deadlock() {
  char text[700];
  size_t at = 0;
  int shown = 0;
  unsigned waiting = 0;
  for (unsigned t = 0; t < total; t++) waiting += threads[t].state != EXITED;
  at += snprintf(text + at, sizeof text - at, "deadlock: %u threads wait for ever, %u have exited;", waiting, exited);
  // Runs of threads that wait at the same thing.
  for (unsigned t = 0; t < total && shown < 8;) {
    unsigned end = t + 1;
    while (end < total && threads[end].state == threads[t].state && (threads[t].state == EXITED || threads[end].where == threads[t].where)) end++;
    if (threads[t].state == EXITED) {
      at += snprintf(text + at, sizeof text - at, " %u-%u exited;", t, end - 1);
    } else if (threads[t].state == AT_WARP) {
      at += snprintf(text + at, sizeof text - at, " %u-%u at %s with mask 0x%08x;", t, end - 1, threads[t].where, threads[t].mask);
    } else {
      at += snprintf(text + at, sizeof text - at, " %u-%u at %s;", t, end - 1, threads[t].where);
    }
    shown++;
    t = end;
  }
  text[at - 1] = 0;
  abandon(lina::LAUNCH_FAILED, "%s", text);
}

// Leaves the current thread, whose state says what it waits for, for another one.
void wait(bool away = false) {
  unsigned self = current;
  if (may_begin()) {
    unsigned t = birth();
    threads[t].stack = take_stack();
    threads[t].sp = new_stack(threads[t].stack, thread_main);
    set_current(t);
    lina_switch(&threads[self].sp, threads[t].sp);
  } else {
    if (ready_warps == 0) deadlock();
    unsigned t = pop_ready(away);
    if (t == self) return;
    set_current(t);
    lina_switch(&threads[self].sp, threads[t].sp);
  }
}

void complete(Warp& warp, unsigned base, Meeting& meeting);

// A lane that has exited counts as arrived at what others wait for.
void check_meetings(Warp& warp, unsigned base) {
  for (Meeting& meeting : warp.meetings) {
    if (meeting.arrived && !(meeting.mask & warp.alive & ~meeting.arrived)) complete(warp, base, meeting);
  }
}

void thread_main() {
  for (;;) {
    unsigned self = current;
    uint8_t* stack = threads[self].stack;
    kernel->run(parameters);
    threads[self].state = EXITED;
    exited++;
    Warp& warp = warps[self / 32];
    warp.alive &= ~(1u << self % 32);
    if (warp.alive) check_meetings(warp, self & ~31u);
    void* unused;
    if (may_begin()) {
      unsigned t = birth();
      threads[t].stack = stack;
      set_current(t);
      continue;
    }
    stacks.push_back(stack);
    if (ready_warps) {
      unsigned t = pop_ready(false);
      set_current(t);
      lina_switch(&unused, threads[t].sp);
    }
    if (exited < total) deadlock();
    lina_switch(&unused, main_sp);
  }
}

// In random mode a thread may be overtaken wherever it meets others.
void maybe_yield() {
  if (seed && random_next() % 2 == 0) {
    push_ready(current);
    wait();
  }
}

// ---- Warp operations ----

// Kinds of meeting: votes are 0 .. 31, then these.
enum { SHUFFLE = 32, MMA, MATRICES, MATRICES_TRANSPOSED };

float bf16_to_float(uint16_t bits) {
  uint32_t all = uint32_t(bits) << 16;
  float out;
  memcpy(&out, &all, 4);
  return out;
}

// PTX mma.m16n8k16: with g = lane / 4 and t = lane % 4, a[0] has row g and columns 2t, 2t+1; a[1] row g+8; a[2], a[3] the same at columns + 8;
// b[0] has rows 2t, 2t+1 of column g, b[1] rows + 8; c[0], c[1] have row g and columns 2t, 2t+1, c[2], c[3] row g + 8.
void run_mma(Warp& warp) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, t = lane % 4;
    auto* ra = static_cast<const uint32_t*>(warp.first[lane]);
    auto* rb = static_cast<const uint32_t*>(warp.second[lane]);
    auto* rc = static_cast<const float*>(warp.third[lane]);
    for (int i = 0; i < 4; i++) {
      int row = g + 8 * (i & 1), column = 2 * t + 8 * (i >> 1);
      a[row][column] = bf16_to_float(uint16_t(ra[i]));
      a[row][column + 1] = bf16_to_float(uint16_t(ra[i] >> 16));
      c[row][2 * t + (i >> 1)] = rc[2 * (i & 1) + (i >> 1)];
    }
    for (int i = 0; i < 2; i++) {
      b[2 * t + 8 * i][g] = bf16_to_float(uint16_t(rb[i]));
      b[2 * t + 8 * i + 1][g] = bf16_to_float(uint16_t(rb[i] >> 16));
    }
  }
  for (int i = 0; i < 16; i++) {
    float sum[8] = {};
    for (int k = 0; k < 16; k++) {
      for (int j = 0; j < 8; j++) sum[j] += a[i][k] * b[k][j];
    }
    for (int j = 0; j < 8; j++) c[i][j] += sum[j];
  }
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, t = lane % 4;
    auto* rc = static_cast<float*>(warp.third[lane]);
    rc[0] = c[g][2 * t];
    rc[1] = c[g][2 * t + 1];
    rc[2] = c[g + 8][2 * t];
    rc[3] = c[g + 8][2 * t + 1];
  }
}

// PTX ldmatrix.x4: out[j] of a lane has elements 2 (lane % 4) and the next of row lane / 4 of matrix j (transposed: of column lane / 4).
void run_matrices(Warp& warp, bool transposed) {
  for (int lane = 0; lane < 32; lane++) {
    auto* out = static_cast<uint32_t*>(warp.third[lane]);
    for (int j = 0; j < 4; j++) {
      int major = lane / 4, minor = 2 * (lane % 4);
      uint16_t low, high;
      if (transposed) {
        low = static_cast<const uint16_t*>(warp.first[8 * j + minor])[major];
        high = static_cast<const uint16_t*>(warp.first[8 * j + minor + 1])[major];
      } else {
        low = static_cast<const uint16_t*>(warp.first[8 * j + major])[minor];
        high = static_cast<const uint16_t*>(warp.first[8 * j + major])[minor + 1];
      }
      out[j] = low | uint32_t(high) << 16;
    }
  }
}

// LinaVote of kernel.h.
enum { BALLOT, ANY, ALL, SYNC, ADD, MIN, MAX, UMIN, UMAX, AND, OR, EXOR, MATCH };
const char* const VOTES[] = {
    "__ballot_sync", "__any_sync", "__all_sync", "__syncwarp", "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
    "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync", "__reduce_xor_sync", "__match_any_sync",
};

void run_vote(Warp& warp, uint32_t lanes, int kind) {
  if (kind == SYNC) return;
  if (kind == MATCH) {
    for (int i = 0; i < 32; i++) {
      if (!(lanes >> i & 1)) continue;
      uint32_t same = 0;
      for (int j = 0; j < 32; j++) same |= uint32_t((lanes >> j & 1) && warp.in[j] == warp.in[i]) << j;
      warp.out[i] = same;
    }
    return;
  }
  bool first = true;
  uint32_t all = 0;
  for (int i = 0; i < 32; i++) {
    if (!(lanes >> i & 1)) continue;
    uint32_t x = uint32_t(warp.in[i]);
    if (kind == BALLOT) {
      all |= x << i;
    } else if (first) {
      all = x;
    } else if (kind == ANY || kind == OR) {
      all |= x;
    } else if (kind == ALL || kind == AND) {
      all &= x;
    } else if (kind == ADD) {
      all += x;
    } else if (kind == MIN) {
      all = int32_t(x) < int32_t(all) ? x : all;
    } else if (kind == MAX) {
      all = int32_t(x) > int32_t(all) ? x : all;
    } else if (kind == UMIN) {
      all = x < all ? x : all;
    } else if (kind == UMAX) {
      all = x > all ? x : all;
    } else {
      all ^= x;
    }
    first = false;
  }
  for (int i = 0; i < 32; i++) {
    if (lanes >> i & 1) warp.out[i] = all; // the other lanes may not have read the result of a meeting of their own
  }
}

// All lanes have arrived: computes, and lets those that wait go on.
void complete(Warp& warp, unsigned base, Meeting& meeting) {
  uint32_t lanes = meeting.arrived;
  if (meeting.kind >= MMA && lanes != ~0u) abandon(lina::LAUNCH_FAILED, "%s needs all 32 lanes: only 0x%08x of the warp are there", meeting.name, lanes);
  if (meeting.kind == SHUFFLE) {
    // A lane that is not there has no value to give: all ones, a NaN, so that using it shows.
    for (int i = 0; i < 32; i++) {
      if (meeting.mask >> i & 1) warp.out[i] = lanes >> i & 1 ? warp.in[i] : ~0ull;
    }
  } else if (meeting.kind == MMA) {
    run_mma(warp);
  } else if (meeting.kind == MATRICES || meeting.kind == MATRICES_TRANSPOSED) {
    run_matrices(warp, meeting.kind == MATRICES_TRANSPOSED);
  } else {
    run_vote(warp, lanes, meeting.kind);
  }
  meeting.arrived = 0;
  for (int i = 0; i < 32; i++) {
    if ((lanes >> i & 1) && base + i != current) push_ready(base + i);
  }
}

void meet(uint32_t mask, int kind, const char* name) {
  unsigned lane = current % 32, base = current & ~31u;
  Warp& warp = warps[current / 32];
  if (!(mask >> lane & 1)) abandon(lina::LAUNCH_FAILED, "%s with mask 0x%08x, in which lane %u itself is missing", name, mask, lane);
  Meeting* meeting = nullptr;
  for (Meeting& each : warp.meetings) {
    if (each.arrived ? each.mask == mask : !meeting) {
      meeting = &each;
      if (each.arrived) break;
    }
  }
  if (meeting->arrived && meeting->kind != kind) {
    abandon(lina::LAUNCH_FAILED, "lanes of one warp meet at different operations: %s here, others (0x%08x) at %s", name, meeting->arrived, meeting->name);
  }
  meeting->mask = mask;
  meeting->kind = kind;
  meeting->name = name;
  meeting->arrived |= 1u << lane;
  if (!(mask & warp.alive & ~meeting->arrived)) {
    complete(warp, base, *meeting);
    maybe_yield();
    return;
  }
  Thread& thread = threads[current];
  thread.state = AT_WARP;
  thread.mask = mask;
  thread.where = name;
  wait();
}

bool in_shared(const void* at, size_t bytes) {
  auto* p = static_cast<const uint8_t*>(at);
  return (p >= lina_shared && p + bytes <= lina_shared + shared_bytes) || (p >= module_->shared_begin && p + bytes <= module_->shared_end);
}

void land(Thread& thread, size_t count) {
  for (size_t i = 0; i < count; i++) {
    const Copy& copy = thread.copies[i];
    if (copy.valid) {
      memcpy(copy.to, copy.from, size_t(copy.bytes));
    } else {
      memset(copy.to, 0, size_t(copy.bytes));
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + ptrdiff_t(count));
}

}  // namespace

EXPORT uint64_t lina_shuffle(uint32_t mask, uint64_t bits, int kind, int argument, int width) {
  static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  if (width < 1 || width > 32 || (width & (width - 1))) abandon(lina::LAUNCH_FAILED, "%s of width %d, which must be a power of two up to 32", names[kind], width);
  unsigned self = current, lane = self % 32;
  Warp& warp = warps[self / 32];
  warp.in[lane] = bits;
  meet(mask, SHUFFLE, names[kind]);
  int begin = int(lane) & ~(width - 1), end = begin + width, from;
  if (kind == 0) {
    from = begin | (argument & (width - 1));
  } else if (kind == 1) {
    from = int(lane) - argument;
    if (from < begin) return bits;
  } else {
    from = kind == 2 ? int(lane) + argument : int(lane) ^ argument;
    if (from >= end || from < 0) return bits;
  }
  if (!(mask >> from & 1)) return ~0ull;
  return warp.out[from];
}

EXPORT uint64_t lina_vote(uint32_t mask, uint64_t value, int kind) {
  unsigned self = current;
  Warp& warp = warps[self / 32];
  warp.in[self % 32] = value;
  meet(mask, kind, VOTES[kind]);
  return warp.out[self % 32];
}

EXPORT uint32_t lina_active() { return warps[current / 32].alive; }

EXPORT void lina_mma(float* c, const uint32_t* a, const uint32_t* b) {
  unsigned lane = current % 32;
  Warp& warp = warps[current / 32];
  warp.first[lane] = a;
  warp.second[lane] = b;
  warp.third[lane] = c;
  meet(~0u, MMA, "mma_bf16");
}

EXPORT void lina_load_matrices(uint32_t* out, const void* row, int transposed) {
  unsigned lane = current % 32;
  Warp& warp = warps[current / 32];
  if (!in_shared(row, 16)) abandon(lina::ILLEGAL_ADDRESS, "load_matrices of %p, which is not shared memory of this block", row);
  if (reinterpret_cast<uintptr_t>(row) % 16) abandon(lina::MISALIGNED_ADDRESS, "load_matrices of %p, which is not aligned to 16 bytes", row);
  warp.first[lane] = row;
  warp.third[lane] = out;
  meet(~0u, transposed ? MATRICES_TRANSPOSED : MATRICES, transposed ? "load_matrices_transposed" : "load_matrices");
}

// ---- Barriers ----

EXPORT int lina_barrier(int predicate, int kind) {
  if (barrier_arrived == 0) {
    barrier_kind = kind;
    barrier_value = kind == 2 ? 1 : 0;
  } else if (kind != barrier_kind) {
    abandon(lina::LAUNCH_FAILED, "threads of one block meet at different kinds of __syncthreads");
  }
  if (kind == 1) barrier_value += predicate != 0;
  if (kind == 2) barrier_value &= predicate != 0;
  if (kind == 3) barrier_value |= predicate != 0;
  if (++barrier_arrived < total) {
    threads[current].state = AT_BARRIER;
    threads[current].where = "__syncthreads";
    wait();
    return barrier_result;
  }
  barrier_arrived = 0;
  int result = barrier_result = barrier_value;
  for (unsigned t = 0; t < total; t++) {
    if (t != current) push_ready(t);
  }
  maybe_yield();
  return result;
}

EXPORT void lina_barrier_named(int id, int count) {
  if (id < 1 || id > 15 || count < 32 || count % 32 || unsigned(count) > total) {
    abandon(lina::LAUNCH_FAILED, "named barrier %d of %d threads: 1 to 15, and whole warps of the block", id, count);
  }
  Named& barrier = named[id];
  if (barrier.waiting.empty()) {
    barrier.threads = count;
  } else if (barrier.threads != count) {
    abandon(lina::LAUNCH_FAILED, "named barrier %d is awaited for %d threads here and for %d elsewhere", id, count, barrier.threads);
  }
  if (barrier.waiting.size() + 1 < size_t(count)) {
    barrier.waiting.push_back(current);
    threads[current].state = AT_NAMED;
    threads[current].where = "a named barrier";
    wait();
    return;
  }
  for (unsigned t : barrier.waiting) push_ready(t);
  barrier.waiting.clear();
  maybe_yield();
}

EXPORT void lina_yield() {
  push_ready(current);
  wait(true);
}

EXPORT void lina_trap() { abandon(lina::LAUNCH_FAILED, "__trap()"); }

// ---- Asynchronous copies: until they are waited for, NaNs are where they go ----

EXPORT void lina_copy_async(void* to, const void* from, int bytes, bool valid) {
  if (!in_shared(to, size_t(bytes))) abandon(lina::ILLEGAL_ADDRESS, "copy_async to %p, which is not shared memory of this block", to);
  if (reinterpret_cast<uintptr_t>(to) % unsigned(bytes)) abandon(lina::MISALIGNED_ADDRESS, "copy_async to %p, which is not aligned to %d bytes", to, bytes);
  if (reinterpret_cast<uintptr_t>(from) % unsigned(bytes)) abandon(lina::MISALIGNED_ADDRESS, "copy_async from %p, which is not aligned to %d bytes", from, bytes);
  if (valid) {
    volatile uint8_t probe = *static_cast<const uint8_t*>(from);  // a bad source faults here, where it is named
    (void)probe;
  }
  memset(to, 0xff, size_t(bytes));
  threads[current].copies.push_back({to, from, bytes, valid});
}

EXPORT void lina_copy_commit() { threads[current].groups.push_back(threads[current].copies.size()); }

EXPORT void lina_copy_wait(int groups) {
  Thread& thread = threads[current];
  if (thread.groups.size() <= size_t(groups)) return;
  size_t done = thread.groups.size() - size_t(groups), count = thread.groups[done - 1];
  land(thread, count);
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + ptrdiff_t(done));
  for (size_t& each : thread.groups) each -= count;
}

// ---- Faults ----

namespace {

// SIGXCPU is what the watchdog sends.
const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGXCPU};
constexpr int SIGNAL_COUNT = 6;
struct sigaction before[SIGNAL_COUNT];
std::atomic<uint64_t> launches{0};  // odd while a kernel runs

uint64_t limit_s() {
  const char* text = getenv("LINA_EMULATOR_LIMIT_S");
  return text && *text ? strtoull(text, nullptr, 10) : 60;
}

// Looks twice a second whether the same kernel still runs.
void* watch(void*) {
  uint64_t seen = 0, since = 0;
  for (;; since++) {
    usleep(500'000);
    uint64_t now = launches;
    if (now != seen || now % 2 == 0) {
      seen = now;
      since = 0;
    } else if (since >= 2 * limit_s()) {
      pthread_kill(runner, SIGXCPU);
      since = 0;
    }
  }
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!running || !pthread_equal(pthread_self(), runner)) {
    if (signal == SIGXCPU) return;
    // Not ours: as if this handler were not there.
    for (int i = 0; i < SIGNAL_COUNT; i++) {
      if (SIGNALS[i] != signal) continue;
      if (before[i].sa_flags & SA_SIGINFO) {
        before[i].sa_sigaction(signal, info, context);
      } else if (before[i].sa_handler != SIG_DFL && before[i].sa_handler != SIG_IGN) {
        before[i].sa_handler(signal);
      } else {
        sigaction(signal, &before[i], nullptr);  // the instruction runs again and ends the process
      }
    }
    return;
  }
  void* at = info->si_addr;
  if (signal == SIGXCPU) abandon(lina::TIMEOUT, "the kernel ran for more than %llu s: it waits for what only another thread or block can do, or is too large here", static_cast<unsigned long long>(limit_s()));
  if (signal == SIGFPE) abandon(lina::LAUNCH_FAILED, "integer division by zero");
  if (signal == SIGILL || signal == SIGTRAP) {
    // -fsanitize-trap: the check's number follows the instruction: ud1l N(%eax), %eax is 67 0f b9 40 N; brk #(0x5500 + N) on aarch64.
    auto* code = static_cast<const uint8_t*>(at);
    int check = -1;
#if defined(__x86_64__)
    if (code[0] == 0x67 && code[1] == 0x0f && code[2] == 0xb9) check = code[4];
#else
    check = (code[0] >> 5 | code[1] << 3) & 255;
#endif
    if (check == 22) abandon(lina::MISALIGNED_ADDRESS, "misaligned address: a load or store wider than the alignment of its pointer, or a null pointer");
    if (check == 18) abandon(lina::ILLEGAL_ADDRESS, "index out of the bounds of an array");
    if (check == 3) abandon(lina::LAUNCH_FAILED, "integer division overflow");
    abandon(lina::ILLEGAL_INSTRUCTION, "a trap (check %d): unreachable code, or undefined behaviour that clang saw", check);
  }
  // x86 tells no address when a 16-byte vector access is misaligned.
  if (info->si_code == SI_KERNEL && at == nullptr) abandon(lina::MISALIGNED_ADDRESS, "misaligned address of a 16-byte load or store");
  auto* p = static_cast<uint8_t*>(at);
  if (p >= lina_shared && p < lina_shared + SHARED_SPACE) {
    abandon(lina::ILLEGAL_ADDRESS, "byte %td of dynamic shared memory, of which the launch gave %zu", p - lina_shared, shared_bytes);
  }
  abandon(lina::ILLEGAL_ADDRESS, "illegal address %p (unmapped, freed, behind the end of an allocation, or a null pointer)", at);
}

// Takes and gives back the signals of faults for the length of a launch.
class FaultGuard {
 public:
  FaultGuard() {
    static void* memory = nullptr;
    if (!memory) memory = mmap(nullptr, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack_t mine{};
    mine.ss_sp = memory;
    mine.ss_size = 65536;
    sigaltstack(&mine, &old_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    runner = pthread_self();
    for (int i = 0; i < SIGNAL_COUNT; i++) sigaction(SIGNALS[i], &action, &before[i]);
    static pthread_t watchdog;
    static bool watched = pthread_create(&watchdog, nullptr, watch, nullptr) == 0;
    (void)watched;
    running = true;
    launches++;
  }
  ~FaultGuard() {
    launches++;
    running = false;
    // SIGXCPU stays ours: the watchdog may have sent it at the last moment.
    for (int i = 0; i < SIGNAL_COUNT - 1; i++) sigaction(SIGNALS[i], &before[i], nullptr);
    if (old_.ss_flags & SS_ONSTACK) old_.ss_flags = 0;
    sigaltstack(&old_, nullptr);
  }

 private:
  stack_t old_{};
};

// Opens exactly the pages of `bytes` of dynamic shared memory.
void open_shared(size_t bytes) {
  static size_t open = SHARED_SPACE;
  size_t need = (bytes + PAGE - 1) / PAGE * PAGE;
  if (need == open) return;
  mprotect(lina_shared, need, PROT_READ | PROT_WRITE);
  mprotect(lina_shared + need, SHARED_SPACE - need, PROT_NONE);
  open = need;
}

void run_block() {
  begun = exited = 0;
  ready_warps = 0;
  for (uint32_t& each : ready_lanes) each = 0;
  if (seed) {
    for (unsigned i = 0; i < 32; i++) {
      unsigned j = unsigned(random_next() % (i + 1));
      haste[i] = haste[j];
      haste[j] = i;
    }
  }
  barrier_arrived = 0;
  for (Named& each : named) each.waiting.clear();
  unsigned count = (total + 31) / 32;
  for (unsigned w = 0; w < count; w++) {
    unsigned lanes = total - 32 * w;
    warps[w].alive = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    for (Meeting& each : warps[w].meetings) each.arrived = 0;
  }
  size_t slack = (shared_bytes + PAGE - 1) / PAGE * PAGE;
  memset(lina_shared, 0xff, slack);
  if (module_->shared_begin) memset(module_->shared_begin, 0xff, size_t(module_->shared_end - module_->shared_begin));
  unsigned t = birth();
  threads[t].stack = take_stack();
  threads[t].sp = new_stack(threads[t].stack, thread_main);
  set_current(t);
  lina_switch(&main_sp, threads[t].sp);
  if (status) return;
  for (size_t i = shared_bytes; i < slack; i++) {
    if (lina_shared[i] != 0xff) {
      status = lina::ILLEGAL_ADDRESS;
      char text[512];
      snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u): byte %zu of dynamic shared memory was written, of which the launch gave %zu", kernel->name,
               lina_blockIdx.x, lina_blockIdx.y, lina_blockIdx.z, i, shared_bytes);
      lina::fail_sticky(status, text);
      return;
    }
  }
}

}  // namespace

int lina::launch(const Module& module, const Kernel& which, Dim grid, Dim block, size_t shared, void** values) {
  std::lock_guard<std::mutex> lock(launching);
  const char* text = getenv("LINA_EMULATOR_SEED");
  uint64_t wish = text ? strtoull(text, nullptr, 10) : 0;
  if (wish != seed) {
    seed = wish;
    random_state = seed * 0x9e3779b97f4a7c15ull + 1;
  }
  kernel = &which;
  module_ = &module;
  parameters = values;
  shared_bytes = shared;
  total = block.x * block.y * block.z;
  lina_gridDim = grid;
  lina_blockDim = block;
  status = SUCCESS;
  open_shared(shared);
  FaultGuard guard;
  uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  // In random mode blocks come in another order too: start + i * step modulo blocks, with a step that has no factor in common.
  uint64_t step = 1, start = 0;
  if (seed && blocks > 1) {
    start = random_next() % blocks;
    step = blocks - 1;
  }
  for (uint64_t i = 0; i < blocks; i++) {
    uint64_t b = (start + i * step) % blocks;
    lina_blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    descending = seed ? random_next() & 1 : b & 1;
    run_block();
    if (status) {
      stacks.clear();  // those of the abandoned threads are lost: errors are few
      return status;
    }
  }
  return SUCCESS;
}
