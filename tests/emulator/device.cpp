// libcudart and libcuda for the CPU emulator: the device, its attributes, and errors, which stay once a kernel has failed.

#include "emulator.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

using namespace lina;

namespace {

std::mutex lock;
std::atomic<int> sticky_status{0};
std::map<int, std::string> reasons;  // why the last failure of each status happened

// The text stays valid: one buffer per code and thread.
const char* text_of(int code) {
  thread_local std::map<int, std::string> texts;
  std::string why = why_failed(code);
  std::string& text = texts[code];
  text = std::string(name_of(code) + (code ? 9 : 4)) + " in the CPU emulator" + (why.empty() ? "" : ": " + why);
  return text.c_str();
}

}  // namespace

size_t lina::setting(const char* name, size_t otherwise) {
  const char* text = getenv(name);
  return text && *text ? strtoull(text, nullptr, 10) : otherwise;
}
const char* lina::name_of(int code) {
  switch (code) {
    case SUCCESS: return "cudaSuccess";
    case INVALID_VALUE: return "cudaErrorInvalidValue";
    case OUT_OF_MEMORY: return "cudaErrorMemoryAllocation";
    case 101: return "cudaErrorInvalidDevice";
    case 200: return "cudaErrorInvalidKernelImage";
    case NOT_FOUND: return "cudaErrorSymbolNotFound";
    case 600: return "cudaErrorNotReady";
    case ILLEGAL_ADDRESS: return "cudaErrorIllegalAddress";
    case TIMEOUT: return "cudaErrorLaunchTimeout";
    case ILLEGAL_INSTRUCTION: return "cudaErrorIllegalInstruction";
    case MISALIGNED_ADDRESS: return "cudaErrorMisalignedAddress";
    case LAUNCH_FAILED: return "cudaErrorLaunchFailure";
    case 801: return "cudaErrorNotSupported";
    default: return "cudaErrorUnknown";
  }
}
int lina::invalid(const std::string& why) {
  set_why(INVALID_VALUE, why);
  return INVALID_VALUE;
}
int lina::sticky() { return sticky_status; }
void lina::set_why(int status, std::string why) {
  std::lock_guard<std::mutex> guard(lock);
  reasons[status] = std::move(why);
}
std::string lina::why_failed(int status) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = reasons.find(status);
  return found == reasons.end() ? "" : found->second;
}
void lina::fail_sticky(int status, std::string why) {
  set_why(status, why);
  int none = 0;
  sticky_status.compare_exchange_strong(none, status);
}
void lina::forget_errors() {
  std::lock_guard<std::mutex> guard(lock);
  reasons.clear();
  sticky_status = 0;
}

EXPORT int cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
EXPORT int cudaSetDevice(int device) { return device == 0 ? sticky() : 101; }
EXPORT int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
EXPORT int cudaDeviceGetAttribute(int* value, int attribute, int) {
  // Launches overlap from Hopper on; modules for Hopper alone, 90, are not emulated.
  int capability = int(setting("LINA_EMULATOR_CAPABILITY", 91));
  switch (attribute) {
    case 1: *value = int(MOST_THREADS); return 0;                                 // threads per block
    case 8: *value = 48 * 1024; return 0;                                        // shared memory of a block
    case 10: *value = 32; return 0;                                              // warp
    case 12: *value = 65536; return 0;                                           // registers of a block
    case 16: *value = int(setting("LINA_EMULATOR_MULTIPROCESSORS", 2)); return 0;
    case 38: *value = 32 << 20; return 0;                                        // L2
    case 39: *value = 2048; return 0;                                            // threads of a multiprocessor
    case 75: *value = capability / 10; return 0;
    case 76: *value = capability % 10; return 0;
    case 81: *value = 228 * 1024; return 0;                                      // shared memory of a multiprocessor
    case 97: *value = int(MOST_SHARED); return 0;                                // shared memory of a block on request
    default: *value = 0; return 0;
  }
}
EXPORT int cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return 0;
}
EXPORT int cudaDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
EXPORT int cudaDeviceSynchronize() {
  run_all();
  return sticky();
}
EXPORT int cudaDeviceReset() {
  run_all();
  forget_errors();
  return 0;
}
EXPORT const char* cudaGetErrorName(int code) { return name_of(code); }
EXPORT const char* cudaGetErrorString(int code) { return text_of(code); }
EXPORT int cudaGetLastError() { return sticky(); }
EXPORT int cudaPeekAtLastError() { return sticky(); }
EXPORT int cuInit(unsigned) { return 0; }
EXPORT int cuDeviceGetName(char* name, int length, int) {
  snprintf(name, size_t(length), "CPU emulator of CUDA");
  return 0;
}
EXPORT int cuGetErrorName(int code, const char** out) {
  *out = name_of(code);
  return 0;
}
EXPORT int cuGetErrorString(int code, const char** out) {
  *out = text_of(code);
  return 0;
}
