// Stable counting sorts: one pass places items by a key of few values, several passes sort by any key. What lies behind are tiles of
// items: sort_count counts the keys of each tile, and then every block of sort_place knows where its tile's items of each key begin. Within a tile
// warps own stretches one after another and count among their lanes, so equal keys stay in order and no atomic decides a place.

// The digit of a key that this pass sorts by; -1 for an item that is left out. Negative keys count as `last`, or are left out if that is negative.
DEVICE int digit_of(int key, int shift, int mask, int last) {
  if (key < 0) {
    if (last < 0) return -1;
    key = last;
  }
  return (key >> shift) & mask;
}

// Tiles are multiples of 256 items. So many are taken at a time per thread, where a tile has as many: their loads do not wait for each other.
#define AT_ONCE 4

// counts[tile][bins] of items [n] in tiles of `tile`. One block of 256 threads per tile; shared: bins ints.
extern "C" __global__ void sort_count(const int* keys, i64 n, int tile, int shift, int mask, int last, int bins,
                                      int* counts) {
  after_previous();
  extern __shared__ __align__(16) int histogram[];
  for (int b = threadIdx.x; b < bins; b += blockDim.x) histogram[b] = 0;
  __syncthreads();
  i64 start = (i64)blockIdx.x * tile, end = start + tile < n ? start + tile : n;
  for (i64 base = start + threadIdx.x; base < end; base += 256 * AT_ONCE) {
    int digits[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      i64 i = base + j * 256;
      digits[j] = i < end ? digit_of(keys[i], shift, mask, last) : -1;
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (digits[j] >= 0 && digits[j] < bins) atomicAdd(&histogram[digits[j]], 1);
    }
  }
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += blockDim.x) counts[(i64)blockIdx.x * bins + b] = histogram[b];
}

// Exclusive prefix sums of values[bins] in place, by a block of 256 threads; returns the total. `scratch` holds 8 ints.
DEVICE int exclusive_scan(int* values, int bins, int* scratch) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int per = (bins + 255) / 256, from = threadIdx.x * per, to = from + per < bins ? from + per : bins;
  int sum = 0;
  for (int b = from; b < to; b++) sum += values[b];
  int inclusive = sum;
  for (int offset = 1; offset < 32; offset <<= 1) {
    int below = __shfl_up_sync(0xffffffffu, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  int before = inclusive - sum, total = 0;
  for (int w = 0; w < 8; w++) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  for (int b = from; b < to; b++) {
    int value = values[b];
    values[b] = before;
    before += value;
  }
  __syncthreads();
  return total;
}

// Row of the n-th choice of an expert by pieces (expert, first choice, first row), sorted: the last piece at or before (expert, n).
DEVICE int row_by_piece(const int* pieces, int count, int expert, int n) {
  int low = 0, high = count;
  while (low < high) {
    int middle = (low + high) / 2;
    int e = pieces[3 * middle], first = pieces[3 * middle + 1];
    if (e < expert || (e == expert && first <= n)) low = middle + 1;
    else high = middle;
  }
  if (low == 0 || pieces[3 * low - 3] != expert) return -1;
  return pieces[3 * low - 1] + n - pieces[3 * low - 2];
}

// The lanes of a warp that have the same digit as this one; `bits` are those that digits differ in.
DEVICE u32 lanes_alike(int digit, int bits) {
  u32 alike = 0xffffffffu;
  for (int b = 0; b < bits; b++) {
    u32 ones = __ballot_sync(0xffffffffu, (digit >> b) & 1);
    alike &= (digit >> b) & 1 ? ones : ~ones;
  }
  return alike;
}

// What both kinds of placing share: fills warp_base[8][bins] with the place of the next item of each digit for each warp, and first[bins] with
// the first place of each digit. Returns the number of items that are not left out.
DEVICE int prepare_places(const int* keys, i64 n, int tile, int shift, int mask, int last, int bins, const int* counts,
                          int tiles, const int* starts, bool from_zero, int* warp_base, int* first, int* before,
                          int* scratch) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, stretch = tile / 8;
  for (int i = threadIdx.x; i < 10 * bins; i += 256) warp_base[i] = 0;  // first and before lie behind it
  __syncthreads();
  i64 start = (i64)blockIdx.x * tile + warp * stretch;
  for (int step = lane; step < stretch; step += 32 * AT_ONCE) {
    int digits[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      i64 i = start + step + j * 32;
      digits[j] = step + j * 32 < stretch && i < n ? digit_of(keys[i], shift, mask, last) : -1;
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (digits[j] >= 0 && digits[j] < bins) atomicAdd(&warp_base[warp * bins + digits[j]], 1);
    }
  }
  // Where there are few bins, several threads share the tiles of each.
  int sharers = bins < 256 ? 256 / bins : 1;
  for (int i = threadIdx.x; i < sharers * bins; i += 256) {
    int b = i % bins, sum = 0, below = 0;
#pragma unroll 8
    for (int t = i / bins; t < tiles; t += sharers) {
      int count = counts[(i64)t * bins + b];
      sum += count;
      below += t < (int)blockIdx.x ? count : 0;
    }
    atomicAdd(&first[b], sum);
    atomicAdd(&before[b], below);
  }
  __syncthreads();
  int total = exclusive_scan(first, bins, scratch);
  for (int b = threadIdx.x; b < bins; b += 256) {
    int base = before[b] + (from_zero ? 0 : starts ? starts[b] : first[b]);
    for (int w = 0; w < 8; w++) {
      int count = warp_base[w * bins + b];
      warp_base[w * bins + b] = base;
      base += count;
    }
  }
  __syncthreads();
  return total;
}

// Places the choices of tokens: slots[i] is the row of choice i, tokens[row] its token i / choices. Without starts and pieces, experts lie
// in ascending order. scales[row] is the choice's weight, unless they are null. One block of 256 threads per tile; shared: 10 bins + 8 ints.
extern "C" __global__ void sort_place_choices(const int* experts, i64 n, int tile, int bins, int bits, const int* counts,
                                              int tiles, const int* starts, const int* pieces, int piece_count,
                                              int choices, i64 rows, const float* weights, int* slots, int* tokens,
                                              int* offsets, float* scales) {
  after_previous();
  extern __shared__ __align__(16) int memory[];
  int *warp_base = memory, *first = memory + 8 * bins, *before = first + bins, *scratch = before + bins;
  int total = prepare_places(experts, n, tile, 0, 0x7fffffff, -1, bins, counts, tiles, starts, pieces != nullptr,
                             warp_base, first, before, scratch);
  if (offsets && blockIdx.x == 0) {
    for (int b = threadIdx.x; b < bins; b += 256) offsets[b] = first[b];
    if (threadIdx.x == 0) offsets[bins] = total;
  }
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, stretch = tile / 8;
  i64 start = (i64)blockIdx.x * tile + warp * stretch;
  for (int step = 0; step < stretch; step += 32 * AT_ONCE) {
    if (start + step >= n) break;
    int held[AT_ONCE];
    float weight[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      i64 i = start + step + j * 32 + lane;
      bool inside = step + j * 32 < stretch && i < n;
      held[j] = inside ? experts[i] : -1;
      weight[j] = inside && scales ? weights[i] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (step + j * 32 >= stretch) break;
      i64 i = start + step + j * 32 + lane;
      int expert = held[j] < bins ? held[j] : -1;
      bool placed = expert >= 0;
      // One more bit sets the lanes apart that have nothing to place.
      u32 alike = lanes_alike(placed ? expert : 1 << bits, bits + 1);
      u32 below = alike & ((1u << lane) - 1u);
      int row = placed ? warp_base[warp * bins + expert] + __popc(below) : -1;
      __syncwarp();
      if (placed && below == 0) warp_base[warp * bins + expert] += __popc(alike);
      __syncwarp();
      if (i >= n) continue;
      if (placed && pieces) row = row_by_piece(pieces, piece_count, expert, row);
      slots[i] = row;
      if (row < 0 || row >= rows) continue;
      tokens[row] = (int)i / choices;
      if (scales) scales[row] = weight[j];
    }
  }
}

// One pass of a sort: items with keys and values go to their places by one digit. `values` null: an item's value is its number.
extern "C" __global__ void sort_place_items(const int* keys, const int* values, i64 n, int tile, int shift, int mask,
                                            int last, int bins, int bits, const int* counts, int tiles, int* out_keys,
                                            int* out_values) {
  after_previous();
  extern __shared__ __align__(16) int memory[];
  int *warp_base = memory, *first = memory + 8 * bins, *before = first + bins, *scratch = before + bins;
  prepare_places(keys, n, tile, shift, mask, last, bins, counts, tiles, nullptr, false, warp_base, first, before, scratch);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, stretch = tile / 8;
  i64 start = (i64)blockIdx.x * tile + warp * stretch;
  for (int step = 0; step < stretch; step += 32 * AT_ONCE) {
    if (start + step >= n) break;
    int held[AT_ONCE], with[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      i64 i = start + step + j * 32 + lane;
      bool inside = step + j * 32 < stretch && i < n;
      held[j] = inside ? keys[i] : 0;
      with[j] = inside && values ? values[i] : (int)i;
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (step + j * 32 >= stretch) break;
      bool placed = start + step + j * 32 + lane < n;
      int key = held[j] < 0 ? last : held[j], digit = (key >> shift) & mask;
      u32 alike = lanes_alike(placed ? digit : 1 << bits, bits + 1);
      u32 below = alike & ((1u << lane) - 1u);
      int place = warp_base[warp * bins + digit] + __popc(below);
      __syncwarp();
      if (placed && below == 0) warp_base[warp * bins + digit] += __popc(alike);
      __syncwarp();
      if (!placed) continue;
      out_keys[place] = key;
      out_values[place] = with[j];
    }
  }
}
