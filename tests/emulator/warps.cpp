// Operations of a warp: its lanes meet, the last one to come computes for all (shuffles, votes, mma.m16n8k16, ldmatrix), and they go on. Also
// asynchronous copies, which belong to one thread.

#include "engine.h"

#include <cstring>

using namespace lina::engine;

namespace {

// Kinds of meeting: votes are 0 .. 31, then these.
enum { SHUFFLE = 32, MMA, MATRICES, MATRICES_TRANSPOSED };

float bf16_to_float(uint16_t bits) {
  uint32_t all = uint32_t(bits) << 16;
  float out;
  memcpy(&out, &all, 4);
  return out;
}

// PTX mma.m16n8k16: with g = lane / 4 and t = lane % 4, a[0] has row g and columns 2t, 2t+1; a[1] row g+8; a[2], a[3] the same at columns + 8;
// b[0] has rows 2t, 2t+1 of column g, b[1] rows + 8; c[0], c[1] have row g and columns 2t, 2t+1, c[2], c[3] row g + 8.
void run_mma(Warp& warp) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, t = lane % 4;
    auto* ra = static_cast<const uint32_t*>(warp.first[lane]);
    auto* rb = static_cast<const uint32_t*>(warp.second[lane]);
    auto* rc = static_cast<const float*>(warp.third[lane]);
    for (int i = 0; i < 4; i++) {
      int row = g + 8 * (i & 1), column = 2 * t + 8 * (i >> 1);
      a[row][column] = bf16_to_float(uint16_t(ra[i]));
      a[row][column + 1] = bf16_to_float(uint16_t(ra[i] >> 16));
      c[row][2 * t + (i >> 1)] = rc[2 * (i & 1) + (i >> 1)];
    }
    for (int i = 0; i < 2; i++) {
      b[2 * t + 8 * i][g] = bf16_to_float(uint16_t(rb[i]));
      b[2 * t + 8 * i + 1][g] = bf16_to_float(uint16_t(rb[i] >> 16));
    }
  }
  for (int i = 0; i < 16; i++) {
    float sum[8] = {};
    for (int k = 0; k < 16; k++) {
      for (int j = 0; j < 8; j++) sum[j] += a[i][k] * b[k][j];
    }
    for (int j = 0; j < 8; j++) c[i][j] += sum[j];
  }
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, t = lane % 4;
    auto* rc = static_cast<float*>(warp.third[lane]);
    rc[0] = c[g][2 * t];
    rc[1] = c[g][2 * t + 1];
    rc[2] = c[g + 8][2 * t];
    rc[3] = c[g + 8][2 * t + 1];
  }
}

// PTX ldmatrix.x4: out[j] of a lane has elements 2 (lane % 4) and the next of row lane / 4 of matrix j (transposed: of column lane / 4).
void run_matrices(Warp& warp, bool transposed) {
  for (int lane = 0; lane < 32; lane++) {
    auto* out = static_cast<uint32_t*>(warp.third[lane]);
    for (int j = 0; j < 4; j++) {
      int major = lane / 4, minor = 2 * (lane % 4);
      uint16_t low, high;
      if (transposed) {
        low = static_cast<const uint16_t*>(warp.first[8 * j + minor])[major];
        high = static_cast<const uint16_t*>(warp.first[8 * j + minor + 1])[major];
      } else {
        low = static_cast<const uint16_t*>(warp.first[8 * j + major])[minor];
        high = static_cast<const uint16_t*>(warp.first[8 * j + major])[minor + 1];
      }
      out[j] = low | uint32_t(high) << 16;
    }
  }
}

// LinaVote of kernel.h.
enum { BALLOT, ANY, ALL, SYNC, ADD, MIN, MAX, UMIN, UMAX, AND, OR, EXOR, MATCH };
const char* const VOTES[] = {
    "__ballot_sync", "__any_sync", "__all_sync", "__syncwarp", "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
    "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync", "__reduce_xor_sync", "__match_any_sync",
};

void run_vote(Warp& warp, uint32_t lanes, int kind) {
  if (kind == SYNC) return;
  if (kind == MATCH) {
    for (int i = 0; i < 32; i++) {
      if (!(lanes >> i & 1)) continue;
      uint32_t same = 0;
      for (int j = 0; j < 32; j++) same |= uint32_t((lanes >> j & 1) && warp.in[j] == warp.in[i]) << j;
      warp.out[i] = same;
    }
    return;
  }
  bool first = true;
  uint32_t all = 0;
  for (int i = 0; i < 32; i++) {
    if (!(lanes >> i & 1)) continue;
    uint32_t x = uint32_t(warp.in[i]);
    if (kind == BALLOT) {
      all |= x << i;
    } else if (first) {
      all = x;
    } else if (kind == ANY || kind == OR) {
      all |= x;
    } else if (kind == ALL || kind == AND) {
      all &= x;
    } else if (kind == ADD) {
      all += x;
    } else if (kind == MIN) {
      all = int32_t(x) < int32_t(all) ? x : all;
    } else if (kind == MAX) {
      all = int32_t(x) > int32_t(all) ? x : all;
    } else if (kind == UMIN) {
      all = x < all ? x : all;
    } else if (kind == UMAX) {
      all = x > all ? x : all;
    } else {
      all ^= x;
    }
    first = false;
  }
  for (int i = 0; i < 32; i++) {
    if (lanes >> i & 1) warp.out[i] = all; // the other lanes may not have read the result of a meeting of their own
  }
}

// All lanes have arrived: computes, and lets those that wait go on.
void complete(Warp& warp, unsigned base, Meeting& meeting) {
  uint32_t lanes = meeting.arrived;
  if (meeting.kind >= MMA && lanes != ~0u) abandon(lina::LAUNCH_FAILED, "%s needs all 32 lanes: only 0x%08x of the warp are there", meeting.name, lanes);
  if (meeting.kind == SHUFFLE) {
    // A lane that is not there has no value to give: all ones, a NaN, so that using it shows.
    for (int i = 0; i < 32; i++) {
      if (meeting.mask >> i & 1) warp.out[i] = lanes >> i & 1 ? warp.in[i] : ~0ull;
    }
  } else if (meeting.kind == MMA) {
    run_mma(warp);
  } else if (meeting.kind == MATRICES || meeting.kind == MATRICES_TRANSPOSED) {
    run_matrices(warp, meeting.kind == MATRICES_TRANSPOSED);
  } else {
    run_vote(warp, lanes, meeting.kind);
  }
  meeting.arrived = 0;
  for (int i = 0; i < 32; i++) {
    if ((lanes >> i & 1) && base + i != current) push_ready(base + i);
  }
}

void meet(uint32_t mask, int kind, const char* name) {
  unsigned lane = current % 32, base = current & ~31u;
  Warp& warp = warps[current / 32];
  if (!(mask >> lane & 1)) abandon(lina::LAUNCH_FAILED, "%s with mask 0x%08x, in which lane %u itself is missing", name, mask, lane);
  Meeting* meeting = nullptr;
  for (Meeting& each : warp.meetings) {
    if (each.arrived ? each.mask == mask : !meeting) {
      meeting = &each;
      if (each.arrived) break;
    }
  }
  if (meeting->arrived && meeting->kind != kind) {
    abandon(lina::LAUNCH_FAILED, "lanes of one warp meet at different operations: %s here, others (0x%08x) at %s", name, meeting->arrived, meeting->name);
  }
  meeting->mask = mask;
  meeting->kind = kind;
  meeting->name = name;
  meeting->arrived |= 1u << lane;
  if (!(mask & warp.alive & ~meeting->arrived)) {
    complete(warp, base, *meeting);
    maybe_yield();
    return;
  }
  Thread& thread = threads[current];
  thread.state = AT_WARP;
  thread.mask = mask;
  thread.where = name;
  wait();
}

bool in_shared(const void* at, size_t bytes) {
  auto* p = static_cast<const uint8_t*>(at);
  return (p >= lina_shared && p + bytes <= lina_shared + shared_bytes) || (p >= module->shared_begin && p + bytes <= module->shared_end);
}

void land(Thread& thread, size_t count) {
  for (size_t i = 0; i < count; i++) {
    const Copy& copy = thread.copies[i];
    if (copy.valid) {
      memcpy(copy.to, copy.from, size_t(copy.bytes));
    } else {
      memset(copy.to, 0, size_t(copy.bytes));
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + ptrdiff_t(count));
}

}  // namespace

void lina::engine::check_meetings(Warp& warp, unsigned base) {
  for (Meeting& meeting : warp.meetings) {
    if (meeting.arrived && !(meeting.mask & warp.alive & ~meeting.arrived)) complete(warp, base, meeting);
  }
}

EXPORT uint64_t lina_shuffle(uint32_t mask, uint64_t bits, int kind, int argument, int width) {
  static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  if (width < 1 || width > 32 || (width & (width - 1))) abandon(lina::LAUNCH_FAILED, "%s of width %d, which must be a power of two up to 32", names[kind], width);
  unsigned self = current, lane = self % 32;
  Warp& warp = warps[self / 32];
  warp.in[lane] = bits;
  meet(mask, SHUFFLE, names[kind]);
  int begin = int(lane) & ~(width - 1), end = begin + width, from;
  if (kind == 0) {
    from = begin | (argument & (width - 1));
  } else if (kind == 1) {
    from = int(lane) - argument;
    if (from < begin) return bits;
  } else {
    from = kind == 2 ? int(lane) + argument : int(lane) ^ argument;
    if (from >= end || from < 0) return bits;
  }
  if (!(mask >> from & 1)) return ~0ull;
  return warp.out[from];
}

EXPORT uint64_t lina_vote(uint32_t mask, uint64_t value, int kind) {
  unsigned self = current;
  Warp& warp = warps[self / 32];
  warp.in[self % 32] = value;
  meet(mask, kind, VOTES[kind]);
  return warp.out[self % 32];
}

EXPORT uint32_t lina_active() { return warps[current / 32].alive; }

EXPORT void lina_mma(float* c, const uint32_t* a, const uint32_t* b) {
  unsigned lane = current % 32;
  Warp& warp = warps[current / 32];
  warp.first[lane] = a;
  warp.second[lane] = b;
  warp.third[lane] = c;
  meet(~0u, MMA, "mma_bf16");
}

EXPORT void lina_load_matrices(uint32_t* out, const void* row, int transposed) {
  unsigned lane = current % 32;
  Warp& warp = warps[current / 32];
  if (!in_shared(row, 16)) abandon(lina::ILLEGAL_ADDRESS, "load_matrices of %p, which is not shared memory of this block", row);
  if (reinterpret_cast<uintptr_t>(row) % 16) abandon(lina::MISALIGNED_ADDRESS, "load_matrices of %p, which is not aligned to 16 bytes", row);
  warp.first[lane] = row;
  warp.third[lane] = out;
  meet(~0u, transposed ? MATRICES_TRANSPOSED : MATRICES, transposed ? "load_matrices_transposed" : "load_matrices");
}

// ---- Asynchronous copies: until they are waited for, NaNs are where they go ----

EXPORT void lina_copy_async(void* to, const void* from, int bytes, bool valid) {
  if (!in_shared(to, size_t(bytes))) abandon(lina::ILLEGAL_ADDRESS, "copy_async to %p, which is not shared memory of this block", to);
  if (reinterpret_cast<uintptr_t>(to) % unsigned(bytes)) abandon(lina::MISALIGNED_ADDRESS, "copy_async to %p, which is not aligned to %d bytes", to, bytes);
  if (reinterpret_cast<uintptr_t>(from) % unsigned(bytes)) abandon(lina::MISALIGNED_ADDRESS, "copy_async from %p, which is not aligned to %d bytes", from, bytes);
  if (valid) {
    volatile uint8_t probe = *static_cast<const uint8_t*>(from);  // a bad source faults here, where it is named
    (void)probe;
  }
  memset(to, 0xff, size_t(bytes));
  threads[current].copies.push_back({to, from, bytes, valid});
}

EXPORT void lina_copy_commit() { threads[current].groups.push_back(threads[current].copies.size()); }

EXPORT void lina_copy_wait(int groups) {
  Thread& thread = threads[current];
  if (thread.groups.size() <= size_t(groups)) return;
  size_t done = thread.groups.size() - size_t(groups), count = thread.groups[done - 1];
  land(thread, count);
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + ptrdiff_t(done));
  for (size_t& each : thread.groups) each -= count;
}
