// Turns the signals of faults in kernels into errors that name the place, and ends kernels that run for too long. Signals of other threads,
// and of the kernel's own thread outside of kernels, go where they went before.

#include "engine.h"

#include <atomic>
#include <cstdlib>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

using namespace lina::engine;

namespace {

volatile bool running;
pthread_t runner;
// SIGXCPU is what the watchdog sends.
const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGXCPU};
constexpr int SIGNAL_COUNT = 6;
struct sigaction before[SIGNAL_COUNT];
std::atomic<uint64_t> launches{0};  // odd while a kernel runs
std::atomic<uint64_t> limit{60};    // seconds that it may run; read at launches, as the watchdog runs beside a host that may change the environment

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
    } else if (since >= 2 * limit) {
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
  if (signal == SIGXCPU) abandon(lina::TIMEOUT, "the kernel ran for more than %llu s: it waits for what only another thread or block can do, or is too large here", static_cast<unsigned long long>(limit));
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
  if (p >= lina_shared && p < lina_shared + LINA_SHARED_SPACE) {
    abandon(lina::ILLEGAL_ADDRESS, "byte %td of dynamic shared memory, of which the launch gave %zu", p - lina_shared, shared_bytes);
  }
  abandon(lina::ILLEGAL_ADDRESS, "illegal address %p (unmapped, freed, behind the end of an allocation, or a null pointer)", at);
}

}  // namespace

FaultGuard::FaultGuard() {
  static void* memory = nullptr;
  if (!memory) memory = mmap(nullptr, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  stack_t mine{};
  mine.ss_sp = memory;
  mine.ss_size = 65536;
  sigaltstack(&mine, &old_);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  static const bool beside = getenv("LINA_EMULATOR_STREAMS") != nullptr;
  static const uint64_t first = limit_s();
  limit = beside ? first : limit_s();
  runner = pthread_self();
  for (int i = 0; i < SIGNAL_COUNT; i++) sigaction(SIGNALS[i], &action, &before[i]);
  static pthread_t watchdog;
  static bool watched = pthread_create(&watchdog, nullptr, watch, nullptr) == 0;
  (void)watched;
  running = true;
  launches++;
}

FaultGuard::~FaultGuard() {
  launches++;
  running = false;
  // SIGXCPU stays ours: the watchdog may have sent it at the last moment.
  for (int i = 0; i < SIGNAL_COUNT - 1; i++) sigaction(SIGNALS[i], &before[i], nullptr);
  if (old_.ss_flags & SS_ONSTACK) old_.ss_flags = 0;
  sigaltstack(&old_, nullptr);
}
