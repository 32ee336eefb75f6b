// libnccl for the CPU emulator: ranks are processes of one machine, and a message is a file in a folder of their communicator. Operations
// are work of the emulator's streams, which runs, and then waits for the peers, when the host asks about the stream. So it shows what the
// transport asks of NCCL and in which order, on any machine; but two communicators must be used in one order on all ranks.

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <sys/stat.h>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Result { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6 };
enum Type { I8, U8, I32, U32, I64, U64, F16, F32, F64, BF16 };
enum Op { SUM, PROD, MAX, MIN, AVG };
constexpr size_t WIDTH[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
constexpr int PATIENCE_MS = 15000;

struct Comm {
  std::string folder;
  int rank, size, splits = 0;
  std::vector<long> sent, received;
  std::atomic<int> error{0};
  std::atomic<bool> aborted{false};
};

struct Id {
  char internal[128];
};

std::string last_error;

int fail(Comm* comm, int result, const std::string& why) {
  static std::mutex writing;  // streams may run beside each other
  std::lock_guard<std::mutex> guard(writing);
  last_error = why;
  if (comm) comm->error = result;
  return result;
}

// Whether a call is to fail: LINA_EMULATOR_NCCL_FAIL names it; for tests of what its caller does then.
bool told_to_fail(const char* call) {
  const char* name = getenv("LINA_EMULATOR_NCCL_FAIL");
  return name && strcmp(name, call) == 0;
}

// What a rank leaves in a communicator's folder when it has aborted it.
std::string aborted_path(const Comm& comm) { return comm.folder + "/aborted"; }

std::string path_of(const Comm& comm, int from, int to, long number) {
  return comm.folder + "/" + std::to_string(from) + "." + std::to_string(to) + "." + std::to_string(number);
}

int post(Comm* comm, int peer, const void* data, size_t bytes) {
  std::string path = path_of(*comm, comm->rank, peer, comm->sent[size_t(peer)]++);
  std::string draft = path + ".draft";
  FILE* file = fopen(draft.c_str(), "wb");
  if (!file) return fail(comm, SYSTEM_ERROR, "cannot write " + draft);
  size_t written = bytes ? fwrite(data, 1, bytes, file) : 0;
  fclose(file);
  if (written != bytes || rename(draft.c_str(), path.c_str()) != 0) return fail(comm, SYSTEM_ERROR, "cannot write " + path);
  return SUCCESS;
}

int take(Comm* comm, int peer, void* data, size_t bytes) {
  std::string path = path_of(*comm, peer, comm->rank, comm->received[size_t(peer)]++);
  auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(PATIENCE_MS);
  int file;
  long waits = 0;
  while ((file = open(path.c_str(), O_RDONLY)) < 0) {
    if (comm->aborted) return fail(comm, INVALID_USAGE, "aborted");
    if (++waits % 500 == 0 && access(aborted_path(*comm).c_str(), F_OK) == 0) return fail(comm, REMOTE_ERROR, "a rank has aborted");
    if (std::chrono::steady_clock::now() > end) return fail(comm, REMOTE_ERROR, "nothing comes from rank " + std::to_string(peer));
    usleep(20);
  }
  struct stat about;
  fstat(file, &about);
  size_t done = 0;
  if (size_t(about.st_size) == bytes) {
    while (done < bytes) {
      ssize_t n = read(file, static_cast<char*>(data) + done, bytes - done);
      if (n <= 0) break;
      done += size_t(n);
    }
  }
  close(file);
  unlink(path.c_str());
  if (done == bytes && size_t(about.st_size) == bytes) return SUCCESS;
  return fail(comm, INVALID_USAGE,
              std::to_string(about.st_size) + " bytes from rank " + std::to_string(peer) + " where " + std::to_string(bytes) + " are expected");
}

using Launch = int (*)(void* stream, void (*function)(void*), void* data);

// The emulator's cudaLaunchHostFunc, wherever it was loaded from.
Launch find_launch() {
  Launch found = nullptr;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        if (!strstr(info->dlpi_name, "libemulator.so")) return 0;
        void* library = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
        *static_cast<Launch*>(out) = reinterpret_cast<Launch>(dlsym(library, "cudaLaunchHostFunc"));
        return 1;
      },
      &found);
  return found;
}

// Puts an operation on a stream; what goes wrong then is an asynchronous error of its communicator.
int enqueue(void* stream, std::function<int()> work) {
  static Launch launch = find_launch();
  if (!launch) return fail(nullptr, SYSTEM_ERROR, "the emulator of CUDA is not loaded");
  auto* kept = new std::function<int()>(std::move(work));
  auto run = [](void* data) {
    auto* operation = static_cast<std::function<int()>*>(data);
    (*operation)();
    delete operation;
  };
  return launch(stream, run, kept) == 0 ? SUCCESS : SYSTEM_ERROR;
}

// Every rank's bytes, in rank order.
int gather_all(Comm* comm, const void* mine, void* all, size_t bytes) {
  std::vector<char> own(static_cast<const char*>(mine), static_cast<const char*>(mine) + bytes);
  for (int r = 0; r < comm->size; r++)
    if (r != comm->rank)
      if (int code = post(comm, r, own.data(), bytes)) return code;
  char* out = static_cast<char*>(all);
  if (bytes) memcpy(out + size_t(comm->rank) * bytes, own.data(), bytes);
  for (int r = 0; r < comm->size; r++)
    if (r != comm->rank)
      if (int code = take(comm, r, out + size_t(r) * bytes, bytes)) return code;
  return SUCCESS;
}

float from_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T>
T combine(T a, T b, int op) {
  switch (op) {
    case PROD: return T(a * b);
    case MAX: return a > b ? a : b;
    case MIN: return a < b ? a : b;
    default: return T(a + b);
  }
}

template <typename T, typename Load, typename Store>
void reduce_as(const char* all, char* out, size_t count, size_t width, int ranks, int op, Load load, Store store) {
  for (size_t i = 0; i < count; i++) {
    T sum = load(all + i * width);
    for (int r = 1; r < ranks; r++) sum = combine(sum, load(all + (size_t(r) * count + i) * width), op);
    if (op == AVG) sum = T(sum / T(ranks));
    store(out + i * width, sum);
  }
}

template <typename T>
void reduce_plain(const char* all, char* out, size_t count, int ranks, int op) {
  auto load = [](const char* at) { T x; memcpy(&x, at, sizeof(T)); return x; };
  auto store = [](char* at, T x) { memcpy(at, &x, sizeof(T)); };
  reduce_as<T>(all, out, count, sizeof(T), ranks, op, load, store);
}

int reduce(const char* all, char* out, size_t count, int type, int ranks, int op) {
  switch (type) {
    case U8: reduce_plain<uint8_t>(all, out, count, ranks, op); return SUCCESS;
    case I32: reduce_plain<int32_t>(all, out, count, ranks, op); return SUCCESS;
    case I64: reduce_plain<int64_t>(all, out, count, ranks, op); return SUCCESS;
    case F32: reduce_plain<float>(all, out, count, ranks, op); return SUCCESS;
    case F64: reduce_plain<double>(all, out, count, ranks, op); return SUCCESS;
    case F16: {
      auto load = [](const char* at) { _Float16 x; memcpy(&x, at, 2); return float(x); };
      auto store = [](char* at, float x) { _Float16 y = _Float16(x); memcpy(at, &y, 2); };
      reduce_as<float>(all, out, count, 2, ranks, op, load, store);
      return SUCCESS;
    }
    case BF16: {
      auto load = [](const char* at) { uint16_t x; memcpy(&x, at, 2); return from_bf16(x); };
      auto store = [](char* at, float x) { uint16_t y = to_bf16(x); memcpy(at, &y, 2); };
      reduce_as<float>(all, out, count, 2, ranks, op, load, store);
      return SUCCESS;
    }
    default: return fail(nullptr, INVALID_ARGUMENT, "unknown type");
  }
}

struct Message {
  Comm* comm;
  bool receive;
  void* data;
  size_t bytes;
  int peer;
  void* stream;
};

thread_local int depth = 0;
thread_local std::vector<Message> group;

int run_group() {
  std::vector<Message> messages;
  messages.swap(group);
  if (messages.empty()) return SUCCESS;
  return enqueue(messages[0].stream, [messages]() -> int {
    for (auto& m : messages)
      if (!m.receive)
        if (int code = post(m.comm, m.peer, m.data, m.bytes)) return code;
    for (auto& m : messages)
      if (m.receive)
        if (int code = take(m.comm, m.peer, m.data, m.bytes)) return code;
    return SUCCESS;
  });
}

int message(Comm* comm, bool receive, void* data, size_t count, int type, int peer, void* stream) {
  if (told_to_fail(receive ? "ncclRecv" : "ncclSend")) return fail(comm, SYSTEM_ERROR, "told to fail");
  if (comm && comm->error) return comm->error;  // as NCCL: nothing runs on a communicator that has met an error
  if (!comm || peer < 0 || peer >= comm->size || type < 0 || type > BF16) return fail(comm, INVALID_ARGUMENT, "a wrong argument");
  group.push_back({comm, receive, data, count * WIDTH[type], peer, stream});
  return depth > 0 ? SUCCESS : run_group();
}

Comm* open_comm(const std::string& folder, int rank, int size) {
  mkdir(folder.c_str(), 0700);
  auto* comm = new Comm;
  comm->folder = folder;
  comm->rank = rank;
  comm->size = size;
  comm->sent.resize(size_t(size));
  comm->received.resize(size_t(size));
  return comm;
}

}  // namespace

EXPORT int ncclGetVersion(int* version) {
  *version = 22809;
  return SUCCESS;
}
EXPORT const char* ncclGetErrorString(int result) {
  switch (result) {
    case SUCCESS: return "no error";
    case SYSTEM_ERROR: return "unhandled system error";
    case INVALID_ARGUMENT: return "invalid argument";
    case INVALID_USAGE: return "invalid usage";
    case REMOTE_ERROR: return "remote process exited or there was a network error";
    default: return "unknown result code";
  }
}
EXPORT const char* ncclGetLastError(void*) { return last_error.c_str(); }
EXPORT int ncclGetUniqueId(Id* id) {
  static std::atomic<int> number{0};
  memset(id, 0, sizeof *id);
  const char* folder = getenv("LINA_EMULATOR_NCCL_FOLDER");  // whoever sets it removes what failed ranks leave there
  snprintf(id->internal, sizeof id->internal, "%s/lina-nccl-%d-%d-%ld", folder ? folder : "/dev/shm", getpid(), number++, long(time(nullptr)));
  return SUCCESS;
}
EXPORT int ncclCommInitRankConfig(Comm** out, int size, Id id, int rank, const uint32_t* config) {
  if (rank < 0 || rank >= size || config[2] != 0xcafebeef) return fail(nullptr, INVALID_ARGUMENT, "a wrong argument");
  Comm* comm = open_comm(id.internal, rank, size);
  char mine = 1;
  std::vector<char> all(static_cast<size_t>(size));
  if (int code = gather_all(comm, &mine, all.data(), 1)) return code;
  *out = comm;
  return SUCCESS;
}
EXPORT int ncclCommSplit(Comm* comm, int color, int key, Comm** out, const uint32_t*) {
  int mine[2] = {color, key};
  std::vector<int> all(size_t(2 * comm->size));
  if (int code = gather_all(comm, mine, all.data(), sizeof mine)) return code;
  int number = comm->splits++;
  *out = nullptr;
  if (color < 0) return SUCCESS;
  int rank = 0, size = 0;
  for (int r = 0; r < comm->size; r++) {
    if (all[size_t(2 * r)] != color) continue;
    size++;
    int theirs = all[size_t(2 * r + 1)];
    if (theirs < key || (theirs == key && r < comm->rank)) rank++;
  }
  *out = open_comm(comm->folder + "-" + std::to_string(number) + "-" + std::to_string(color), rank, size);
  return SUCCESS;
}
EXPORT int ncclCommFinalize(Comm* comm) {
  char mine = 1;
  std::vector<char> all(static_cast<size_t>(comm->size));
  return gather_all(comm, &mine, all.data(), 1);
}
EXPORT int ncclCommDestroy(Comm* comm) {
  rmdir(comm->folder.c_str());  // the last rank succeeds
  delete comm;
  return SUCCESS;
}
EXPORT int ncclCommAbort(Comm* comm) {
  comm->aborted = true;  // not freed: a call on another thread may use it
  int mark = creat(aborted_path(*comm).c_str(), 0600);  // the folder stays: others may still look into it
  if (mark >= 0) close(mark);
  return SUCCESS;
}
EXPORT int ncclCommGetAsyncError(Comm* comm, int* error) {
  *error = comm->error;
  return SUCCESS;
}
EXPORT int ncclGroupStart() {
  depth++;
  return SUCCESS;
}
EXPORT int ncclGroupEnd() { return --depth > 0 ? SUCCESS : run_group(); }
EXPORT int ncclSend(const void* data, size_t count, int type, int peer, Comm* comm, void* stream) {
  return message(comm, false, const_cast<void*>(data), count, type, peer, stream);
}
EXPORT int ncclRecv(void* data, size_t count, int type, int peer, Comm* comm, void* stream) {
  return message(comm, true, data, count, type, peer, stream);
}
EXPORT int ncclAllGather(const void* send, void* recv, size_t count, int type, Comm* comm, void* stream) {
  return enqueue(stream, [=]() -> int {
    return gather_all(comm, send, recv, count * WIDTH[type]);
  });
}
EXPORT int ncclAllReduce(const void* send, void* recv, size_t count, int type, int op, Comm* comm, void* stream) {
  if (told_to_fail("ncclAllReduce")) return fail(comm, SYSTEM_ERROR, "told to fail");
  if (comm->error) return comm->error;
  return enqueue(stream, [=]() -> int {
    std::vector<char> all(size_t(comm->size) * count * WIDTH[type]);
    if (int code = gather_all(comm, send, all.data(), count * WIDTH[type])) return code;
    return reduce(all.data(), static_cast<char*>(recv), count, type, comm->size, op);
  });
}
EXPORT int ncclReduce(const void* send, void* recv, size_t count, int type, int op, int root, Comm* comm, void* stream) {
  return enqueue(stream, [=]() -> int {
    std::vector<char> all(size_t(comm->size) * count * WIDTH[type]);
    if (int code = gather_all(comm, send, all.data(), count * WIDTH[type])) return code;
    return comm->rank == root ? reduce(all.data(), static_cast<char*>(recv), count, type, comm->size, op) : SUCCESS;
  });
}
EXPORT int ncclReduceScatter(const void* send, void* recv, size_t count, int type, int op, Comm* comm, void* stream) {
  return enqueue(stream, [=]() -> int {
    size_t bytes = count * WIDTH[type], whole = size_t(comm->size) * bytes;
    std::vector<char> all(size_t(comm->size) * whole), mine(all.size());
    if (int code = gather_all(comm, send, all.data(), whole)) return code;
    for (int r = 0; r < comm->size; r++) memcpy(mine.data() + size_t(r) * bytes, all.data() + size_t(r) * whole + size_t(comm->rank) * bytes, bytes);
    return reduce(mine.data(), static_cast<char*>(recv), count, type, comm->size, op);
  });
}
EXPORT int ncclBroadcast(const void* send, void* recv, size_t count, int type, int root, Comm* comm, void* stream) {
  return enqueue(stream, [=]() -> int {
    size_t bytes = count * WIDTH[type];
    if (comm->rank != root) return take(comm, root, recv, bytes);
    for (int r = 0; r < comm->size; r++)
      if (r != root)
        if (int code = post(comm, r, send, bytes)) return code;
    if (recv != send) memmove(recv, send, bytes);
    return SUCCESS;
  });
}
#ifndef LINA_OLD_NCCL
EXPORT int ncclAlltoAll(const void* send, void* recv, size_t count, int type, Comm* comm, void* stream) {
  return enqueue(stream, [=]() -> int {
    size_t bytes = count * WIDTH[type];
    const char* from = static_cast<const char*>(send);
    char* to = static_cast<char*>(recv);
    for (int r = 0; r < comm->size; r++)
      if (int code = post(comm, r, from + size_t(r) * bytes, bytes)) return code;
    for (int r = 0; r < comm->size; r++)
      if (int code = take(comm, r, to + size_t(r) * bytes, bytes)) return code;
    return SUCCESS;
  });
}
#endif
