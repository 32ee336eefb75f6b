// libcuda for the CPU emulator: modules, which are the shared libraries that nvrtc.cpp makes, and launches of their kernels.

#include "emulator.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

using namespace lina;

namespace {

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

}  // namespace

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
static int enqueue_kernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** parameters,
                          void** extra, bool overlaps) {
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
    if (int status = launch(*module, *code, {gx, gy, gz}, {bx, by, bz}, shared, values.data(), overlaps)) {
      fprintf(stderr, "CUDA emulator: %s: %s\n", name_of(status), why_failed(status).c_str());
    }
  });
  return sticky();
}
EXPORT int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** parameters,
                          void** extra) {
  return enqueue_kernel(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra, false);
}
struct LaunchAttribute {
  int id, unused;
  union {
    int allowed;
    char bytes[64];
  } value;
};
struct LaunchConfig {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};
EXPORT int cuLaunchKernelEx(const LaunchConfig* c, void* function, void** parameters, void** extra) {
  STICKY;
  if (!c) return invalid("cuLaunchKernelEx needs a configuration");
  bool overlaps = false;
  for (unsigned i = 0; i < c->count; i++) {
    if (c->attributes[i].id != 6) return invalid("attribute " + std::to_string(c->attributes[i].id) + " of a launch is not emulated");
    overlaps = c->attributes[i].value.allowed != 0;
  }
  return enqueue_kernel(function, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared, c->stream, parameters, extra, overlaps);
}
EXPORT int cuTensorMapEncodeTiled(void*, int, unsigned, void*, const void*, const void*, const void*, const void*, int, int, int, int) {
  set_why(801, "the bulk tensor copy engine is not emulated");
  return 801;
}
