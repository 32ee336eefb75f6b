// What the parts of the engine share: the block that runs, its threads and warps. engine.cpp schedules, warps.cpp has the operations of a
// warp and asynchronous copies, faults.cpp turns signals into errors.
#pragma once
#include "emulator.h"

#include <vector>

#include <signal.h>

// What kernels see (kernel.h).
constexpr size_t LINA_PAGE = 4096;
// The dynamic shared memory, and pages behind it that are closed as far as a block did not ask for them.
constexpr size_t LINA_SHARED_SPACE = (lina::MOST_SHARED + 2 * LINA_PAGE - 1) / LINA_PAGE * LINA_PAGE + 16 * LINA_PAGE;
EXPORT lina::Dim lina_threadIdx, lina_blockIdx, lina_blockDim, lina_gridDim;
EXPORT uint8_t lina_shared[LINA_SHARED_SPACE];

namespace lina::engine {

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

extern std::vector<Thread> threads;  // of the block that runs
extern Warp warps[32];
extern unsigned total, current;  // threads of the block, the one that runs
extern size_t shared_bytes;
extern const Module* module;

// Ends the kernel with an error; the fibers' stacks are simply left.
[[noreturn]] void abandon(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Makes a thread one that can run.
void push_ready(unsigned t);
// Leaves the current thread, whose state says what it waits for, for another one; `away`: for one of another warp.
void wait(bool away = false);
// In random mode a thread may be overtaken wherever it meets others.
void maybe_yield();
// A lane that has exited counts as arrived at what others wait for.
void check_meetings(Warp& warp, unsigned base);

// Takes the signals of faults for the length of a launch.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();

 private:
  stack_t old_{};
};

}  // namespace lina::engine
