// libcudart and libcuda for the CPU emulator: device memory is host memory, filled with 0xFF bytes (NaNs) when it is new, and with a closed
// page behind each mapping. What is freed stays closed for a while, so that a use after the free faults.

#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

using namespace lina;

namespace {

constexpr size_t PAGE = 4096, GRANULE = 2 << 20;

std::mutex lock;
size_t used;                                                // bytes of device memory
std::map<uintptr_t, size_t> allocations, host_allocations;  // bytes by address
std::deque<std::pair<uintptr_t, size_t>> quarantine;        // freed mappings

struct Memory {  // cuMemCreate
  int file;
  size_t bytes;
};

size_t memory_bytes() {
  static size_t bytes = setting("LINA_EMULATOR_MEMORY_MIB", 8192) << 20;
  return bytes;
}

constexpr size_t QUARANTINE = 1024;

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

// Whether memory can be read: the system looks, as reading it might end the process.
bool lina::is_open(const void* at, size_t bytes) {
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

bool lina::is_pinned(const void* at) {
  std::lock_guard<std::mutex> guard(lock);
  auto address = reinterpret_cast<uintptr_t>(at);
  auto after = host_allocations.upper_bound(address);
  if (after == host_allocations.begin()) return false;
  --after;
  return address < after->first + after->second;
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
