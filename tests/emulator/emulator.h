// What the emulator's parts share: the sticky error, launches, streams.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace lina {

// As kernel.h has it.
struct Kernel {
  const char* name;
  void (*run)(void** parameters);
  int count;
  const unsigned* sizes;
  const char* kinds;
};
// What a compiled module exports as `lina_module`.
struct Module {
  const Kernel* kernels;
  int count;
  uint8_t* shared_begin;
  uint8_t* shared_end;
};
struct Dim {
  unsigned x, y, z;
};

constexpr size_t MOST_SHARED = 227 * 1024;
constexpr unsigned MOST_THREADS = 1024;

// CUDA's numbers of the errors that a kernel or a call can end in.
enum Status {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_FOUND = 500,
  ILLEGAL_ADDRESS = 700,
  TIMEOUT = 702,
  ILLEGAL_INSTRUCTION = 715,
  MISALIGNED_ADDRESS = 716,
  LAUNCH_FAILED = 719,
};

// Runs a kernel to its end; returns SUCCESS or what it failed with. One at a time per process. With `overlaps`, every thread must say
// after_previous(): on a GPU the kernel may begin before the one before it has ended.
int launch(const Module& module, const Kernel& kernel, Dim grid, Dim block, size_t shared, void** parameters, bool overlaps);

// Puts work at the end of a stream; it runs when the host next asks about the stream (streams.cpp).
void enqueue(void* stream, std::function<void()> work);

// The first error of a kernel; every later call returns it, as after a fault on a GPU.
int sticky();
void fail_sticky(int status, std::string why);
// Text of the last failure that has more to say than its code, or empty.
std::string why_failed(int status);
void set_why(int status, std::string why);
// Forgets all errors (cudaDeviceReset).
void forget_errors();

// Runs all streams to their ends.
void run_all();

// A number from the environment.
size_t setting(const char* name, size_t otherwise);
// CUDA's name of a status.
const char* name_of(int status);
// INVALID_VALUE, with a reason.
int invalid(const std::string& why);
// Whether memory can be read.
bool is_open(const void* at, size_t bytes);
// Whether it is page-locked host memory.
bool is_pinned(const void* at);

}  // namespace lina

// What nearly every call begins with.
#define STICKY \
  if (int failed = lina::sticky()) return failed
