// libnvrtc: compiles CUDA C++ by clang for the processor. The "cubin" is a shared library whose table names its kernels. Sources are
// preprocessed first, so kernels may come from macros, and every `extern "C" __global__ void NAME(` gets a launcher. Not a CUDA front end:
// what clang takes as C++17 with kernel.h is taken.

#include "emulator.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

extern char** environ;

namespace {

struct Program {
  std::string source, log, binary;
};

enum { COMPILATION = 6, INVALID_PROGRAM = 4 };

// The folder of this library, where build.ts also puts kernel.h.
std::string folder() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&folder), &info);
  std::string path = info.dli_fname ? info.dli_fname : "";
  return path.substr(0, path.rfind('/'));
}

bool read_file(const std::string& path, std::string& out) {
  FILE* file = fopen(path.c_str(), "rb");
  if (!file) return false;
  char chunk[65536];
  out.clear();
  for (size_t n; (n = fread(chunk, 1, sizeof chunk, file)) > 0;) out.append(chunk, n);
  fclose(file);
  return true;
}

bool write_file(const std::string& path, const std::string& text) {
  FILE* file = fopen(path.c_str(), "wb");
  if (!file) return false;
  bool good = fwrite(text.data(), 1, text.size(), file) == text.size();
  return fclose(file) == 0 && good;
}

int run(const std::vector<std::string>& arguments, const std::string& log) {
  std::vector<char*> argv;
  for (const std::string& each : arguments) argv.push_back(const_cast<char*>(each.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 1, log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  posix_spawn_file_actions_adddup2(&actions, 1, 2);
  pid_t child;
  int error = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error) return -1;
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return -1;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool is_name(char c) { return c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

void skip_space(const std::string& text, size_t& at) {
  while (at < text.size() && strchr(" \t\r\n", text[at])) at++;
}

// Skips (...) or [...] or {...}.
void skip_group(const std::string& text, size_t& at) {
  int depth = 0;
  do {
    if (strchr("([{", text[at])) depth++;
    if (strchr(")]}", text[at])) depth--;
    at++;
  } while (depth > 0 && at < text.size());
}

// `extern __shared__ [__align__(N)] TYPE NAME[];` becomes a pointer to the dynamic shared memory; `#pragma unroll` lines go, as unrolling
// only makes clang slow. Lines stay where they are.
std::string rewrite(const std::string& source) {
  std::string out;
  for (size_t at = 0; at < source.size();) {
    bool word = at == 0 || !is_name(source[at - 1]);
    if (word && source.compare(at, 7, "#pragma") == 0) {
      size_t next = at + 7;
      while (next < source.size() && (source[next] == ' ' || source[next] == '\t')) next++;
      if (source.compare(next, 6, "unroll") == 0) {
        while (at < source.size() && source[at] != '\n') at++;
        continue;
      }
    }
    if (word && source.compare(at, 6, "extern") == 0) {
      size_t next = at + 6;
      skip_space(source, next);
      if (source.compare(next, 10, "__shared__") == 0) {
        size_t end = source.find(';', next);
        std::string declaration = source.substr(next + 10, end - next - 10);
        if (declaration.find("alignas") != std::string::npos) {
          out += "static_assert(false, \"NVRTC refuses alignas here: write extern __shared__ __align__(n)\");";
        }
        for (size_t i; (i = declaration.find("alignas")) != std::string::npos || (i = declaration.find("__align__")) != std::string::npos;) {
          size_t stop = declaration.find('(', i);
          skip_group(declaration, stop);
          declaration.erase(i, stop - i);
        }
        size_t bracket = declaration.rfind('[');
        if (end != std::string::npos && bracket != std::string::npos) {
          size_t stop = bracket;
          while (stop > 0 && strchr(" \t\n", declaration[stop - 1])) stop--;
          size_t begin = stop;
          while (begin > 0 && is_name(declaration[begin - 1])) begin--;
          std::string name = declaration.substr(begin, stop - begin), type = declaration.substr(0, begin);
          out += "static " + type + "* const " + name + " __attribute__((unused)) = reinterpret_cast<" + type + "*>(lina_shared);";
          at = end + 1;
          continue;
        }
      }
    }
    if (word && source.compare(at, 10, "__shared__") == 0) {
      size_t next = at + 10;
      skip_space(source, next);
      if (source.compare(next, 7, "alignas") == 0) {
        // C++ wants the alignment before `static`, which __shared__ becomes.
        size_t open = source.find('(', next), stop = open;
        skip_group(source, stop);
        out += "__attribute__((aligned" + source.substr(open, stop - open) + ")) __shared__";
        at = stop;
        continue;
      }
    }
    out += source[at++];
  }
  return out;
}

// Names of the extern "C" kernels of a preprocessed source.
std::vector<std::string> kernels_of(const std::string& text) {
  const std::string marker = "__attribute__((annotate(\"lina_kernel\")))";
  std::vector<std::string> names;
  for (size_t at = 0; (at = text.find(marker, at)) != std::string::npos;) {
    size_t back = at;
    at += marker.size();
    while (back > 0 && strchr(" \t\r\n", text[back - 1])) back--;
    bool c = back >= 3 && text.compare(back - 3, 3, "\"C\"") == 0;
    // void, attributes in any order, and the name that the parameters follow.
    std::string name;
    for (;;) {
      skip_space(text, at);
      if (at >= text.size()) break;
      if (text[at] == '(') {
        if (name == "__attribute__" || name == "alignas") {
          skip_group(text, at);
          continue;
        }
        break;
      }
      if (!is_name(text[at])) break;
      size_t begin = at;
      while (at < text.size() && is_name(text[at])) at++;
      name = text.substr(begin, at - begin);
    }
    if (c && !name.empty()) {
      bool known = false;
      for (const std::string& each : names) known |= each == name;
      if (!known) names.push_back(name);
    }
  }
  return names;
}

const char* const FLAGS[] = {
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing", "-fno-math-errno", "-ffp-contract=fast",
    "-fno-unroll-loops", "-fwrapv", "-fno-asynchronous-unwind-tables", "-fsanitize=alignment,bounds", "-fsanitize-trap=all", "-march=native",
    "-fno-delete-null-pointer-checks", "-Wno-ignored-attributes", "-Wno-unknown-pragmas", "-Wno-undefined-inline", "-Wno-attributes",
    "-DLINA_EMULATE",
};

// Lets as many compilers run at once as there are processors.
class Turn {
 public:
  Turn() {
    std::unique_lock<std::mutex> guard(lock_);
    free_.wait(guard, [] { return running_ < std::max(1u, std::thread::hardware_concurrency()); });
    running_++;
  }
  ~Turn() {
    std::lock_guard<std::mutex> guard(lock_);
    running_--;
    free_.notify_one();
  }

 private:
  static inline std::mutex lock_;
  static inline std::condition_variable free_;
  static inline unsigned running_ = 0;
};

int compile(Program& program, const std::vector<std::string>& options) {
  Turn turn;
  static std::atomic<unsigned> number{0};
  std::string home = folder();
  std::string base = home + "/kernel-" + std::to_string(getpid()) + "-" + std::to_string(number++);
  std::string source = base + ".cu", whole = base + ".ii", library = base + ".so", log = base + ".log";
  std::vector<std::string> common = {LINA_CLANG};
  common.insert(common.end(), std::begin(FLAGS), std::end(FLAGS));
  for (const std::string& each : options) {
    if (each.compare(0, 2, "-D") == 0) common.push_back(each);
  }
  int result = 0;
  write_file(source, rewrite(program.source));
  std::vector<std::string> first = common;
  first.insert(first.end(), {"-E", "-x", "c++", "-include", home + "/kernel.h", source, "-o", whole});
  std::string text;
  if (run(first, log) != 0 || !read_file(whole, text)) {
    result = COMPILATION;
  } else {
    text += "\n# 1 \"emulator\"\n";
    if (text.find("struct bf16 {") != std::string::npos) {
      text += "inline float to_f32(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }\n";
      text += "inline bf16 to_bf16(float x) { return {(unsigned short)lina_round_bf16(x)}; }\n";
    }
    text += "extern \"C\" __attribute__((weak, visibility(\"hidden\"))) unsigned char __start_lina_static[], __stop_lina_static[];\n";
    text += "static const LinaKernel lina_kernels[] = {\n";
    std::vector<std::string> names = kernels_of(text);
    for (const std::string& name : names) {
      text += "{\"" + name + "\", &LinaLauncher<&" + name + ">::run, LinaLauncher<&" + name + ">::count, LinaLauncher<&" + name + ">::sizes, LinaLauncher<&" + name + ">::kinds},\n";
    }
    text += "{nullptr, nullptr, 0, nullptr, nullptr}};\n";
    text += "struct LinaModule { const LinaKernel* kernels; int count; unsigned char *begin, *end; };\n";
    text += "extern \"C\" __attribute__((visibility(\"default\"))) const LinaModule lina_module = {lina_kernels, " + std::to_string(names.size()) +
            ", __start_lina_static, __stop_lina_static};\n";
    write_file(whole, text);
    std::vector<std::string> second = common;
    second.insert(second.end(), {"-x", "c++-cpp-output", whole, "-shared", "-lm", "-o", library});
    if (run(second, log) != 0 || !read_file(library, program.binary)) result = COMPILATION;
  }
  read_file(log, program.log);
  const char* keep = getenv("LINA_EMULATOR_KEEP");
  if (!keep) {
    for (const std::string& each : {source, whole, library, log}) unlink(each.c_str());
  }
  return result;
}

}  // namespace

// The version's second number is a hash of the emulator's sources, so that a cache of compiled kernels tells emulators and real compilers apart.
EXPORT int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = LINA_BUILD;
  return 0;
}
EXPORT int nvrtcCreateProgram(void** program, const char* source, const char*, int headers, const char* const*, const char* const*) {
  if (!source || headers) return INVALID_PROGRAM;
  auto* made = new Program;
  made->source = source;
  *program = made;
  return 0;
}
EXPORT int nvrtcCompileProgram(void* program, int count, const char* const* options) {
  std::vector<std::string> list;
  for (int i = 0; i < count; i++) list.push_back(options[i]);
  return compile(*static_cast<Program*>(program), list);
}
EXPORT int nvrtcGetCUBINSize(void* program, size_t* size) {
  *size = static_cast<Program*>(program)->binary.size();
  return 0;
}
EXPORT int nvrtcGetCUBIN(void* program, char* out) {
  const std::string& binary = static_cast<Program*>(program)->binary;
  memcpy(out, binary.data(), binary.size());
  return 0;
}
EXPORT int nvrtcGetProgramLogSize(void* program, size_t* size) {
  *size = static_cast<Program*>(program)->log.size() + 1;
  return 0;
}
EXPORT int nvrtcGetProgramLog(void* program, char* out) {
  const std::string& log = static_cast<Program*>(program)->log;
  memcpy(out, log.c_str(), log.size() + 1);
  return 0;
}
EXPORT int nvrtcDestroyProgram(void** program) {
  delete static_cast<Program*>(*program);
  *program = nullptr;
  return 0;
}
EXPORT const char* nvrtcGetErrorString(int code) {
  switch (code) {
    case 0: return "NVRTC_SUCCESS";
    case INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
    case COMPILATION: return "NVRTC_ERROR_COMPILATION";
    default: return "NVRTC_ERROR_INTERNAL_ERROR";
  }
}
