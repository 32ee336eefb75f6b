// Runs a kernel's blocks one after another on the calling thread, each CUDA thread as a fiber that runs until it waits: at a barrier of the
// block, or for the lanes of its warp (shuffles, votes, mma, ldmatrix). Detects barriers and warp operations that can never complete,
// faults, misaligned accesses, and writes behind the dynamic shared memory. Not parallel and not preemptive, so a missing barrier shows
// because one warp runs ahead of the others as far as it can: in blocks of even index the first one, in those of odd index the last.
// LINA_EMULATOR_SEED makes order and haste of the warps random.

#include "engine.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include <sys/mman.h>

#include "switch.h"

using lina::Dim;

Dim lina_threadIdx, lina_blockIdx, lina_blockDim, lina_gridDim;
alignas(65536) uint8_t lina_shared[LINA_SHARED_SPACE];

namespace lina::engine {

constexpr size_t STACK = 256 * 1024;

struct Named {
  int threads = 0;
  std::vector<unsigned> waiting;
};

std::mutex launching;
std::vector<Thread> threads(MOST_THREADS);
Warp warps[32];
Named named[16];
uint32_t ready_lanes[32], ready_warps;  // bits of what can run
unsigned haste[32];                     // warps in the order in which they run, in random mode
std::vector<uint8_t*> stacks;
unsigned stacks_made;

unsigned total, begun, exited, current;
unsigned after_previous;  // threads of the block that have said so
bool overlaps;
bool descending;
unsigned barrier_arrived;
int barrier_kind, barrier_value, barrier_result;
void* main_sp;
void** parameters;
const Kernel* kernel;
const Module* module;
size_t shared_bytes;
int status;
uint64_t random_state, seed;

uint64_t random_next() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

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
    mprotect(memory, LINA_PAGE, PROT_NONE);
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

void wait(bool away) {
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

void maybe_yield() {
  if (seed && random_next() % 2 == 0) {
    push_ready(current);
    wait();
  }
}

// Opens exactly the pages of `bytes` of dynamic shared memory.
void open_shared(size_t bytes) {
  static size_t open = LINA_SHARED_SPACE;
  size_t need = (bytes + LINA_PAGE - 1) / LINA_PAGE * LINA_PAGE;
  if (need == open) return;
  mprotect(lina_shared, need, PROT_READ | PROT_WRITE);
  mprotect(lina_shared + need, LINA_SHARED_SPACE - need, PROT_NONE);
  open = need;
}

void run_block() {
  begun = exited = after_previous = 0;
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
  size_t slack = (shared_bytes + LINA_PAGE - 1) / LINA_PAGE * LINA_PAGE;
  memset(lina_shared, 0xff, slack);
  if (module->shared_begin) memset(module->shared_begin, 0xff, size_t(module->shared_end - module->shared_begin));
  unsigned t = birth();
  threads[t].stack = take_stack();
  threads[t].sp = new_stack(threads[t].stack, thread_main);
  set_current(t);
  lina_switch(&main_sp, threads[t].sp);
  if (status) return;
  if (overlaps && after_previous != total) {
    status = lina::LAUNCH_FAILED;
    lina::fail_sticky(status, std::string("kernel ") + kernel->name + " is launched to overlap the one before it, and not all of its threads say after_previous()");
    return;
  }
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

}  // namespace lina::engine

using namespace lina::engine;

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

EXPORT void lina_after_previous() { after_previous++; }

EXPORT void lina_trap() { abandon(lina::LAUNCH_FAILED, "__trap()"); }

int lina::launch(const Module& module, const Kernel& which, Dim grid, Dim block, size_t shared, void** values, bool may_overlap) {
  using namespace engine;
  std::lock_guard<std::mutex> lock(launching);
  auto wished = [] {
    const char* text = getenv("LINA_EMULATOR_SEED");
    return uint64_t(text ? strtoull(text, nullptr, 10) : 0);
  };
  // Beside the host the environment may change while it is read.
  static const bool beside = getenv("LINA_EMULATOR_STREAMS") != nullptr;
  static const uint64_t first = wished();
  uint64_t wish = beside ? first : wished();
  if (wish != seed) {
    seed = wish;
    random_state = seed * 0x9e3779b97f4a7c15ull + 1;
  }
  kernel = &which;
  engine::module = &module;
  parameters = values;
  shared_bytes = shared;
  overlaps = may_overlap;
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
