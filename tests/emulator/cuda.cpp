// libcudart and libcuda for the CPU emulator: device memory is host memory, filled with 0xFF bytes (NaNs) when it is new and with a closed
// page behind each mapping. A stream's work is kept until the host asks about the stream or an event of it, so work comes as late as it
// may: what reads pinned memory that the host has changed since, or memory that another stream has not been waited for, shows. Nothing
// runs beside the host.

#include "emulator.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

using namespace lina;

namespace {

constexpr size_t PAGE = 4096, GRANULE = 2 << 20;

size_t setting(const char* name, size_t otherwise) {
  const char* text = getenv(name);
  return text && *text ? strtoull(text, nullptr, 10) : otherwise;
}

size_t memory_bytes() {
  static size_t bytes = setting("LINA_EMULATOR_MEMORY_MIB", 8192) << 20;
  return bytes;
}

std::mutex lock;
std::atomic<int> sticky_status{0};
std::map<int, std::string> reasons;  // why the last failure of each status happened
size_t used;                         // bytes of device memory
std::map<uintptr_t, size_t> allocations, host_allocations;  // bytes by address
std::deque<std::pair<uintptr_t, size_t>> quarantine;         // freed mappings, closed so that a use after the free faults

struct Memory {  // cuMemCreate
  int file;
  size_t bytes;
};

struct LoadedKernel {
  const Module* module;
  const Kernel* kernel;
  int most_shared = 48 * 1024;
};
struct LoadedModule {
  void* library;
  const Module* module;
  std::map<std::string, LoadedKernel> kernels;
};

// Work is numbered from 1 in the order of its stream.
struct Stream {
  std::deque<std::function<void()>> work;
  uint64_t enqueued = 0, done = 0;
};

// Where an event was recorded last; what waits for it keeps a copy.
struct Point {
  std::shared_ptr<Stream> stream;
  uint64_t number = 0;
};
struct Event {
  std::shared_ptr<timespec> at = std::make_shared<timespec>();
  bool timed, recorded = false;
  Point point;
};

std::recursive_mutex order;  // of all that concerns streams
std::map<void*, std::shared_ptr<Stream>> streams;

std::shared_ptr<Stream> stream_of(void* handle) {
  auto& found = streams[handle];
  if (!found) found = std::make_shared<Stream>();
  return found;
}

// Runs a stream's work up to a number.
void run_until(Stream& stream, uint64_t number) {
  while (stream.done < number && !stream.work.empty()) {
    auto work = std::move(stream.work.front());
    stream.work.pop_front();
    if (!lina::sticky()) work();
    stream.done++;
  }
}

void run_all() {
  std::lock_guard<std::recursive_mutex> guard(order);
  auto all = streams;
  for (auto& [handle, stream] : all) run_until(*stream, stream->enqueued);
}

// A real queue holds about as many commands before the host has to wait.
constexpr size_t LONGEST_QUEUE = 1024;

const char* name_of(int code) {
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

// The text stays valid: one buffer per code and thread.
const char* text_of(int code) {
  thread_local std::map<int, std::string> texts;
  std::string why = why_failed(code);
  std::string& text = texts[code];
  text = std::string(name_of(code) + (code ? 9 : 4)) + " in the CPU emulator" + (why.empty() ? "" : ": " + why);
  return text.c_str();
}

int invalid(const std::string& why) {
  set_why(INVALID_VALUE, why);
  return INVALID_VALUE;
}

#define STICKY \
  if (int failed = sticky()) return failed

}  // namespace

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
void lina::enqueue(void* handle, std::function<void()> work) {
  std::lock_guard<std::recursive_mutex> guard(order);
  auto stream = stream_of(handle);
  stream->work.push_back(std::move(work));
  stream->enqueued++;
  const char* text = getenv("LINA_EMULATOR_DEFER");
  if (text && text[0] == '0') run_until(*stream, stream->enqueued);
  if (stream->work.size() > LONGEST_QUEUE) run_until(*stream, stream->enqueued - LONGEST_QUEUE);
}
void lina::forget_errors() {
  std::lock_guard<std::mutex> guard(lock);
  reasons.clear();
  sticky_status = 0;
}

// ---- Device ----

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
  int capability = int(setting("LINA_EMULATOR_CAPABILITY", 80));
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

// ---- Memory ----

namespace {

constexpr size_t QUARANTINE = 1024;

// Whether memory can be read: the system looks, as reading it might end the process.
bool is_open(const void* at, size_t bytes) {
  static int pipes[2] = {-1, -1};
  if (pipes[0] < 0 && pipe2(pipes, O_NONBLOCK | O_CLOEXEC) != 0) return true;
  auto first = reinterpret_cast<uintptr_t>(at);
  for (uintptr_t i : {first, first + bytes - 1}) {
    char byte;
    if (write(pipes[1], reinterpret_cast<const void*>(i), 1) != 1) return false;
    if (read(pipes[0], &byte, 1) != 1) return false;
  }
  return true;
}

size_t rounded(size_t bytes) { return std::max<size_t>((bytes + 255) / 256 * 256, 256); }

// Memory whose last byte, rounded up to 256, lies before a closed page; on the device NaNs all over.
int allocate(void** out, size_t bytes, std::map<uintptr_t, size_t>& table, bool device) {
  size_t whole = rounded(bytes), mapped = (whole + PAGE - 1) / PAGE * PAGE + PAGE;
  {
    std::lock_guard<std::mutex> guard(lock);
    if (device && used + whole > memory_bytes()) return OUT_OF_MEMORY;
    if (device) used += whole;
  }
  auto* base = static_cast<uint8_t*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base == MAP_FAILED) return OUT_OF_MEMORY;
  mprotect(base + mapped - PAGE, PAGE, PROT_NONE);
  uint8_t* at = base + mapped - PAGE - whole;
  if (device) memset(base, 0xff, mapped - PAGE);
  std::lock_guard<std::mutex> guard(lock);
  table[reinterpret_cast<uintptr_t>(at)] = bytes;
  *out = at;
  return 0;
}

int release(void* pointer, std::map<uintptr_t, size_t>& table, bool device) {
  if (!pointer) return 0;
  auto at = reinterpret_cast<uintptr_t>(pointer);
  size_t bytes;
  {
    std::lock_guard<std::mutex> guard(lock);
    auto found = table.find(at);
    if (found == table.end()) return INVALID_VALUE;
    bytes = found->second;
    table.erase(found);
  }
  size_t whole = rounded(bytes);
  uintptr_t base = at / PAGE * PAGE, end = at + whole;
  int result = 0;
  if (device) {
    // What lies around the memory up to the page's ends was never anybody's to write.
    for (uintptr_t i = base; i < end && !result; i++) {
      if (i == at) i += bytes;
      if (i == end || *reinterpret_cast<uint8_t*>(i) == 0xff) continue;
      std::string where = i < at ? std::to_string(at - i) + " bytes before" : "byte " + std::to_string(i - at) + " of";
      fail_sticky(ILLEGAL_ADDRESS, where + " an allocation of " + std::to_string(bytes) + " bytes was written");
      fprintf(stderr, "CUDA emulator: %s\n", why_failed(ILLEGAL_ADDRESS).c_str());
      result = ILLEGAL_ADDRESS;
    }
  }
  std::lock_guard<std::mutex> guard(lock);
  if (device) used -= whole;
  mmap(reinterpret_cast<void*>(base), end - base, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  quarantine.push_back({base, end + PAGE - base});
  if (quarantine.size() > QUARANTINE) {
    munmap(reinterpret_cast<void*>(quarantine.front().first), quarantine.front().second);
    quarantine.pop_front();
  }
  return result;
}

}  // namespace

EXPORT int cudaMalloc(void** out, size_t bytes) {
  STICKY;
  return allocate(out, bytes, allocations, true);
}
EXPORT int cudaFree(void* at) {
  run_all();
  STICKY;
  return release(at, allocations, true);
}
EXPORT int cudaFreeAsync(void* at, void* stream) {
  STICKY;
  {
    std::lock_guard<std::mutex> guard(lock);
    if (!allocations.count(reinterpret_cast<uintptr_t>(at))) return INVALID_VALUE;
  }
  enqueue(stream, [=] { release(at, allocations, true); });
  return 0;
}
EXPORT int cudaHostAlloc(void** out, size_t bytes, unsigned) {
  STICKY;
  return allocate(out, bytes, host_allocations, false);
}
EXPORT int cudaFreeHost(void* at) {
  run_all();
  STICKY;
  return release(at, host_allocations, false);
}
EXPORT int cudaMemGetInfo(size_t* free, size_t* total) {
  STICKY;
  std::lock_guard<std::mutex> guard(lock);
  *total = memory_bytes();
  *free = memory_bytes() - used;
  return 0;
}
namespace {

bool is_pinned(const void* at) {
  std::lock_guard<std::mutex> guard(lock);
  auto address = reinterpret_cast<uintptr_t>(at);
  auto after = host_allocations.upper_bound(address);
  if (after == host_allocations.begin()) return false;
  --after;
  return address < after->first + after->second;
}

}  // namespace

EXPORT int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  STICKY;
  if (kind < 1 || kind > 3) return invalid("cudaMemcpyAsync of kind " + std::to_string(kind));
  if (bytes == 0) return 0;
  auto failed = [=](const char* why) { fail_sticky(ILLEGAL_ADDRESS, "cudaMemcpyAsync of " + std::to_string(bytes) + " bytes: " + why); };
  auto copy = [=](const void* source) {
    // A closed page would end the process here, outside of any kernel.
    if (!is_open(source, bytes)) return failed("the source is not allocated");
    if (!is_open(to, bytes)) return failed("the target is not allocated");
    memmove(to, source, bytes);
  };
  if (kind == 1 && !is_pinned(from)) {
    // Pageable memory is read before the call returns.
    auto snapshot = std::make_shared<std::vector<uint8_t>>(static_cast<const uint8_t*>(from), static_cast<const uint8_t*>(from) + bytes);
    enqueue(stream, [=] { copy(snapshot->data()); });
    return 0;
  }
  enqueue(stream, [=] { copy(from); });
  if (kind == 2 && !is_pinned(to)) {
    // Pageable memory is written before the call returns.
    std::lock_guard<std::recursive_mutex> guard(order);
    auto mine = stream_of(stream);
    run_until(*mine, mine->enqueued);
  }
  return sticky();
}
EXPORT int cudaMemsetAsync(void* at, int value, size_t bytes, void* stream) {
  STICKY;
  if (bytes == 0) return 0;
  enqueue(stream, [=] {
    if (is_open(at, bytes)) {
      memset(at, value, bytes);
    } else {
      fail_sticky(ILLEGAL_ADDRESS, "cudaMemsetAsync of " + std::to_string(bytes) + " bytes: they are not allocated");
    }
  });
  return 0;
}

// ---- Streams and events ----

EXPORT int cudaStreamCreateWithPriority(void** stream, unsigned, int) {
  STICKY;
  std::lock_guard<std::recursive_mutex> guard(order);
  *stream = new char;
  stream_of(*stream);
  return 0;
}
EXPORT int cudaStreamDestroy(void* handle) {
  std::lock_guard<std::recursive_mutex> guard(order);
  auto stream = stream_of(handle);
  run_until(*stream, stream->enqueued);
  streams.erase(handle);
  delete static_cast<char*>(handle);
  return sticky();
}
EXPORT int cudaStreamWaitEvent(void* stream, void* event, unsigned) {
  STICKY;
  if (!event) return invalid("cudaStreamWaitEvent of a null event");
  std::lock_guard<std::recursive_mutex> guard(order);
  Point point = static_cast<Event*>(event)->point;
  if (point.stream) enqueue(stream, [=] { run_until(*point.stream, point.number); });
  return 0;
}
// The first question after new work is answered "not ready", so that callers have to wait as for a GPU.
// Also how the emulated NCCL (nccl.cpp) puts its operations on a stream.
EXPORT int cudaLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  STICKY;
  enqueue(stream, [=] { function(data); });
  return 0;
}
EXPORT int cudaStreamQuery(void* handle) {
  STICKY;
  std::lock_guard<std::recursive_mutex> guard(order);
  auto stream = stream_of(handle);
  bool idle = stream->work.empty();
  run_until(*stream, stream->enqueued);
  STICKY;
  return idle ? 0 : 600;
}
EXPORT int cudaStreamSynchronize(void* handle) {
  std::lock_guard<std::recursive_mutex> guard(order);
  auto stream = stream_of(handle);
  run_until(*stream, stream->enqueued);
  return sticky();
}
EXPORT int cudaEventCreateWithFlags(void** event, unsigned flags) {
  STICKY;
  auto* made = new Event;
  made->timed = !(flags & 2);
  *event = made;
  return 0;
}
EXPORT int cudaEventDestroy(void* event) {
  delete static_cast<Event*>(event);
  return sticky();
}
EXPORT int cudaEventRecord(void* handle, void* stream) {
  STICKY;
  if (!handle) return invalid("cudaEventRecord of a null event");
  std::lock_guard<std::recursive_mutex> guard(order);
  auto* event = static_cast<Event*>(handle);
  event->at = std::make_shared<timespec>();
  enqueue(stream, [at = event->at] { clock_gettime(CLOCK_MONOTONIC, at.get()); });
  event->point = {stream_of(stream), stream_of(stream)->enqueued};
  event->recorded = true;
  return 0;
}
EXPORT int cudaEventQuery(void* handle) {
  STICKY;
  std::lock_guard<std::recursive_mutex> guard(order);
  Point& point = static_cast<Event*>(handle)->point;
  if (!point.stream || point.stream->done >= point.number) return 0;
  run_until(*point.stream, point.number);
  STICKY;
  return 600;
}
EXPORT int cudaEventSynchronize(void* handle) {
  std::lock_guard<std::recursive_mutex> guard(order);
  Point& point = static_cast<Event*>(handle)->point;
  if (point.stream) run_until(*point.stream, point.number);
  return sticky();
}
EXPORT int cudaEventElapsedTime(float* ms, void* start, void* end) {
  STICKY;
  std::lock_guard<std::recursive_mutex> guard(order);
  for (void* handle : {start, end}) {
    auto* event = static_cast<Event*>(handle);
    if (!event->timed || !event->recorded) return invalid("cudaEventElapsedTime of an event without a time");
    if (event->point.stream->done < event->point.number) return 600;
  }
  timespec &a = *static_cast<Event*>(start)->at, &b = *static_cast<Event*>(end)->at;
  *ms = float(double(b.tv_sec - a.tv_sec) * 1e3 + double(b.tv_nsec - a.tv_nsec) * 1e-6);
  return 0;
}

// ---- The driver: virtual memory ----

EXPORT int cuInit(unsigned) { return 0; }
EXPORT int cuDeviceGetName(char* name, int length, int) {
  snprintf(name, size_t(length), "CPU emulator of CUDA");
  return 0;
}
EXPORT int cuMemGetAllocationGranularity(size_t* out, const void*, int) {
  *out = GRANULE;
  return 0;
}
EXPORT int cuMemAddressReserve(uintptr_t* out, size_t bytes, size_t, uintptr_t, unsigned long long) {
  STICKY;
  if (!bytes || bytes % GRANULE) return invalid("cuMemAddressReserve of a size that is no multiple of the granularity");
  // Aligned to the granularity, with closed pages before and after it.
  auto base = reinterpret_cast<uintptr_t>(mmap(nullptr, bytes + 2 * GRANULE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base == uintptr_t(MAP_FAILED)) return OUT_OF_MEMORY;
  *out = base / GRANULE * GRANULE + GRANULE;
  return 0;
}
EXPORT int cuMemAddressFree(uintptr_t at, size_t bytes) {
  munmap(reinterpret_cast<void*>(at), bytes);
  return sticky();
}
EXPORT int cuMemCreate(void** out, size_t bytes, const void*, unsigned long long) {
  STICKY;
  if (!bytes || bytes % GRANULE) return invalid("cuMemCreate of a size that is no multiple of the granularity");
  {
    std::lock_guard<std::mutex> guard(lock);
    if (used + bytes > memory_bytes()) return OUT_OF_MEMORY;
    used += bytes;
  }
  int file = memfd_create("lina-emulator", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, off_t(bytes)) != 0) return OUT_OF_MEMORY;
  *out = new Memory{file, bytes};
  return 0;
}
EXPORT int cuMemMap(uintptr_t at, size_t bytes, size_t offset, void* handle, unsigned long long) {
  STICKY;
  auto* memory = static_cast<Memory*>(handle);
  if (offset || bytes > memory->bytes) return invalid("cuMemMap beyond its memory");
  auto* target = reinterpret_cast<void*>(at);
  void* mapped = mmap(target, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory->file, 0);
  if (mapped == MAP_FAILED) return OUT_OF_MEMORY;
  memset(mapped, 0xff, bytes);
  mprotect(mapped, bytes, PROT_NONE);
  return 0;
}
EXPORT int cuMemSetAccess(uintptr_t at, size_t bytes, const void*, size_t) {
  STICKY;
  return mprotect(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE) == 0 ? 0 : invalid("cuMemSetAccess of what is not mapped");
}
EXPORT int cuMemUnmap(uintptr_t at, size_t bytes) {
  run_all();
  mmap(reinterpret_cast<void*>(at), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return sticky();
}
EXPORT int cuMemRelease(void* handle) {
  auto* memory = static_cast<Memory*>(handle);
  close(memory->file);
  {
    std::lock_guard<std::mutex> guard(lock);
    used -= memory->bytes;
  }
  delete memory;
  return sticky();
}

// ---- The driver: modules and launches ----

EXPORT int cuModuleLoadData(void** out, const void* image) {
  STICKY;
  // The section headers are the last of an ELF file.
  auto* header = static_cast<const Elf64_Ehdr*>(image);
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return 200;
  size_t bytes = header->e_shoff + size_t(header->e_shnum) * header->e_shentsize;
  // Kernels find the engine's functions through the global scope.
  static void* self = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&sticky), &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
  }();
  (void)self;
  int file = memfd_create("lina-module", MFD_CLOEXEC);
  if (file < 0) return OUT_OF_MEMORY;
  for (size_t done = 0; done < bytes;) {
    ssize_t n = write(file, static_cast<const char*>(image) + done, bytes - done);
    if (n <= 0) {
      close(file);
      return OUT_OF_MEMORY;
    }
    done += size_t(n);
  }
  std::string path = "/proc/self/fd/" + std::to_string(file);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    set_why(200, dlerror());
    close(file);
    return 200;
  }
  // The file stays open: the loader knows libraries by their paths, so a number must not come twice.
  auto* module = static_cast<const Module*>(dlsym(library, "lina_module"));
  if (!module) return 200;
  auto* loaded = new LoadedModule{library, module, {}};
  for (int i = 0; i < module->count; i++) loaded->kernels[module->kernels[i].name] = {module, &module->kernels[i]};
  *out = loaded;
  return 0;
}
EXPORT int cuModuleGetFunction(void** out, void* module, const char* name) {
  STICKY;
  auto& kernels = static_cast<LoadedModule*>(module)->kernels;
  auto found = kernels.find(name);
  if (found == kernels.end()) {
    set_why(NOT_FOUND, std::string("no extern \"C\" __global__ void ") + name);
    return NOT_FOUND;
  }
  *out = &found->second;
  return 0;
}
EXPORT int cuModuleUnload(void* module) {
  run_all();
  auto* loaded = static_cast<LoadedModule*>(module);
  dlclose(loaded->library);
  delete loaded;
  return sticky();
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
  STICKY;
  if (attribute != 8) return 0;
  auto* kernel = static_cast<LoadedKernel*>(function);
  if (value < 0 || size_t(value) > MOST_SHARED) return invalid("dynamic shared memory of " + std::to_string(value) + " bytes");
  kernel->most_shared = value;
  return 0;
}
// What tests ask of the emulator alone: a module's kernels, one per line: "name p8 i4 f4 s12", kinds as in kernel.h and sizes in bytes.
EXPORT const char* linaSignatures(void* module) {
  thread_local std::string text;
  text.clear();
  const Module* found = static_cast<LoadedModule*>(module)->module;
  for (int k = 0; k < found->count; k++) {
    const Kernel& kernel = found->kernels[k];
    text += kernel.name;
    for (int i = 0; i < kernel.count; i++) text += std::string(" ") + kernel.kinds[i] + std::to_string(kernel.sizes[i]);
    text += "\n";
  }
  return text.c_str();
}
EXPORT int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** parameters,
                          void** extra) {
  STICKY;
  auto* kernel = static_cast<LoadedKernel*>(function);
  std::string name = kernel->kernel->name;
  auto shape = [](unsigned x, unsigned y, unsigned z) { return std::to_string(x) + " x " + std::to_string(y) + " x " + std::to_string(z); };
  if (extra) return invalid(name + ": `extra` is not emulated");
  if (!gx || !gy || !gz || gx > 0x7fffffffu || gy > 65535 || gz > 65535) {
    return invalid(name + ": a grid is 1 to 2147483647 x 65535 x 65535 blocks: current value is " + shape(gx, gy, gz));
  }
  if (!bx || !by || !bz || bz > 64 || uint64_t(bx) * by * bz > MOST_THREADS) {
    return invalid(name + ": a block has 1 to 1024 threads: current value is " + shape(bx, by, bz));
  }
  size_t fixed = size_t(kernel->module->shared_end - kernel->module->shared_begin);
  (void)fixed;  // of the whole module, not of the kernel, so it cannot be checked here
  if (shared > size_t(kernel->most_shared)) {
    return invalid(name + ": " + std::to_string(shared) + " bytes of dynamic shared memory, of which cuFuncSetAttribute allowed " + std::to_string(kernel->most_shared));
  }
  // The driver copies the arguments.
  const Kernel* code = kernel->kernel;
  const Module* module = kernel->module;
  auto bytes = std::make_shared<std::vector<std::vector<uint8_t>>>();
  for (int i = 0; i < code->count; i++) {
    auto* from = static_cast<const uint8_t*>(parameters[i]);
    bytes->emplace_back(from, from + code->sizes[i]);
  }
  enqueue(stream, [=] {
    std::vector<void*> values;
    for (auto& each : *bytes) values.push_back(each.data());
    // A failure is told by a later call, as on a GPU; the message is written now.
    if (int status = launch(*module, *code, {gx, gy, gz}, {bx, by, bz}, shared, values.data())) {
      fprintf(stderr, "CUDA emulator: %s: %s\n", name_of(status), why_failed(status).c_str());
    }
  });
  return sticky();
}
EXPORT int cuTensorMapEncodeTiled(void*, int, unsigned, void*, const void*, const void*, const void*, const void*, int, int, int, int) {
  set_why(801, "the bulk tensor copy engine is not emulated");
  return 801;
}
EXPORT int cuGetErrorName(int code, const char** out) {
  *out = name_of(code);
  return 0;
}
EXPORT int cuGetErrorString(int code, const char** out) {
  *out = text_of(code);
  return 0;
}
