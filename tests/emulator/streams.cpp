// libcudart for the CPU emulator: streams, events and copies. A stream's work is kept until the host asks about the stream or an event of it,
// so work comes as late as it may: what reads pinned memory that the host has changed since, or memory that another stream has not been
// waited for, shows. Nothing runs beside the host.
// With LINA_EMULATOR_STREAMS=asynchronous each stream has a thread, which begins at once: streams run beside the host and each other, as a
// host needs that waits for events on other threads; LINA_EMULATOR_PAUSE_US has every event pass later by a random time of up to so much.

#include "emulator.h"

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include <time.h>
#include <unistd.h>

using namespace lina;

namespace {

// Work is numbered from 1 in the order of its stream.
struct Stream {
  std::deque<std::function<void()>> work;
  uint64_t enqueued = 0, done = 0;
  bool ends = false;  // once its work is done
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

// Never destroyed: threads of streams may be at work when the process ends.
auto& order = *new std::recursive_mutex;  // of all that concerns streams
auto& moved = *new std::condition_variable_any;
auto& streams = *new std::map<void*, std::shared_ptr<Stream>>;

bool asynchronous() {
  static bool wish = [] {
    const char* text = getenv("LINA_EMULATOR_STREAMS");
    return text && std::string(text) == "asynchronous";
  }();
  return wish;
}

// A stream's thread.
void work_on(std::shared_ptr<Stream> stream) {
  std::unique_lock<std::recursive_mutex> guard(order);
  for (;;) {
    moved.wait(guard, [&] { return stream->ends || !stream->work.empty(); });
    if (stream->work.empty()) return;
    auto work = std::move(stream->work.front());
    stream->work.pop_front();
    guard.unlock();
    if (!lina::sticky()) work();
    work = nullptr;
    guard.lock();
    stream->done++;
    moved.notify_all();
  }
}

// Some time passes on the stream that calls it.
void linger() {
  static size_t most = lina::setting("LINA_EMULATOR_PAUSE_US", 0);
  thread_local std::minstd_rand random(std::random_device{}());
  if (asynchronous() && most) usleep(useconds_t(random() % most));
}

std::shared_ptr<Stream> stream_of(void* handle) {
  auto& found = streams[handle];
  if (!found) {
    found = std::make_shared<Stream>();
    if (asynchronous()) std::thread(work_on, found).detach();
  }
  return found;
}

// Runs a stream's work up to a number, or waits for that; the caller holds `order` once at most.
void run_until(Stream& stream, uint64_t number) {
  if (asynchronous()) {
    std::unique_lock<std::recursive_mutex> guard(order);
    moved.wait(guard, [&] { return stream.done >= number; });
    return;
  }
  while (stream.done < number && !stream.work.empty()) {
    auto work = std::move(stream.work.front());
    stream.work.pop_front();
    if (!lina::sticky()) work();
    stream.done++;
  }
}

// A real queue holds about as many commands before the host has to wait.
constexpr size_t LONGEST_QUEUE = 1024;

}  // namespace

void lina::run_all() {
  std::unique_lock<std::recursive_mutex> guard(order);
  auto all = streams;
  if (asynchronous()) guard.unlock();
  for (auto& [handle, stream] : all) run_until(*stream, stream->enqueued);
}
void lina::enqueue(void* handle, std::function<void()> work) {
  std::lock_guard<std::recursive_mutex> guard(order);
  auto stream = stream_of(handle);
  stream->work.push_back(std::move(work));
  stream->enqueued++;
  if (asynchronous()) return moved.notify_all();
  const char* text = getenv("LINA_EMULATOR_DEFER");
  if (text && text[0] == '0') run_until(*stream, stream->enqueued);
  if (stream->work.size() > LONGEST_QUEUE) run_until(*stream, stream->enqueued - LONGEST_QUEUE);
}

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
    std::unique_lock<std::recursive_mutex> guard(order);
    auto mine = stream_of(stream);
    if (asynchronous()) guard.unlock();
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

EXPORT int cudaStreamCreateWithPriority(void** stream, unsigned, int) {
  STICKY;
  std::lock_guard<std::recursive_mutex> guard(order);
  *stream = new char;
  stream_of(*stream);
  return 0;
}
EXPORT int cudaStreamDestroy(void* handle) {
  std::unique_lock<std::recursive_mutex> guard(order);
  auto stream = stream_of(handle);
  if (asynchronous()) guard.unlock();
  run_until(*stream, stream->enqueued);
  if (asynchronous()) guard.lock();
  stream->ends = true;
  moved.notify_all();
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
  bool idle = stream->done == stream->enqueued;
  if (!asynchronous()) run_until(*stream, stream->enqueued);
  STICKY;
  return idle ? 0 : 600;
}
EXPORT int cudaStreamSynchronize(void* handle) {
  std::unique_lock<std::recursive_mutex> guard(order);
  auto stream = stream_of(handle);
  if (asynchronous()) guard.unlock();
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
  enqueue(stream, [at = event->at] {
    linger();
    clock_gettime(CLOCK_MONOTONIC, at.get());
  });
  event->point = {stream_of(stream), stream_of(stream)->enqueued};
  event->recorded = true;
  return 0;
}
EXPORT int cudaEventQuery(void* handle) {
  STICKY;
  std::lock_guard<std::recursive_mutex> guard(order);
  Point& point = static_cast<Event*>(handle)->point;
  if (!point.stream || point.stream->done >= point.number) return 0;
  if (!asynchronous()) run_until(*point.stream, point.number);
  STICKY;
  return 600;
}
EXPORT int cudaEventSynchronize(void* handle) {
  std::unique_lock<std::recursive_mutex> guard(order);
  Point point = static_cast<Event*>(handle)->point;  // of this call: the event may be recorded anew
  if (asynchronous()) guard.unlock();
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
