// kth_largest_change: exact radix selection on the bits of the changes. Three passes over the selected rows count one
// digit each; every block computes the digit of the previous pass itself, so there is no synchronisation in between.
#include "launch.h"
#include "rows.cuh"
#include "runtime.cuh"

namespace bdfast {
namespace cuda {
namespace {

// 11 + 10 + 10 digits cover the 31 bits without the sign.
constexpr int kDigits = 3;
constexpr int kBins = 1 << 11;
constexpr int kBinsPerThread = kBins / kThreads;

// A histogram may count more than 2^32 in one bin.
using Count = unsigned long long;

__device__ __forceinline__ int shift_of(int digit) { return digit == 0 ? 20 : digit == 1 ? 10 : 0; }
__device__ __forceinline__ int bits_of_digit(int digit) { return digit == 0 ? 11 : 10; }

// The state before a digit is counted: the digits above it, and the rank of the answer among the keys with these
// digits.
struct Search {
  unsigned found;
  Count rank;  // 1 is the largest; 0 if fewer keys were selected
};

struct State {
  Count histograms[kDigits][kBins];
  Search searches[kDigits];
};

// The state after a digit was counted. All threads of the block call it and get the same result.
__device__ Search descend(Search search, const Count* histogram, int digit) {
  __shared__ Count of_warps[kThreads / kWarp];
  __shared__ Search next;
  int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  // Thread 0 has the largest keys.
  int top = kBins - 1 - thread * kBinsPerThread;
  Count mine = 0;
  for (int i = 0; i < kBinsPerThread; i++) mine += histogram[top - i];
  Count up_to_mine = mine;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    Count other = __shfl_up_sync(kWholeWarp, up_to_mine, distance);
    if (lane >= distance) up_to_mine += other;
  }
  if (lane == kWarp - 1) of_warps[thread / kWarp] = up_to_mine;
  if (thread == 0) next = {0, 0};
  __syncthreads();
  for (int warp = 0; warp < thread / kWarp; warp++) up_to_mine += of_warps[warp];
  Count before = up_to_mine - mine;
  if (before < search.rank && search.rank <= up_to_mine) {
    int bin = top;
    Count rank = search.rank - before;
    for (; rank > histogram[bin]; bin--) rank -= histogram[bin];
    next = {search.found | static_cast<unsigned>(bin) << shift_of(digit), rank};
  }
  __syncthreads();
  Search result = next;
  __syncthreads();  // of_warps and next are written again by the next call
  return result;
}

template <class E>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    count_digit(Table table, const bool* neurons, Count q, int digit, State* state) {
  using T = typename E::Stored;
  __shared__ unsigned histogram[kBins];
  Search search{0, q};
  if (digit > 0) {
    Search before = digit == 1 ? Search{0, q} : state->searches[digit - 1];
    search = descend(before, state->histograms[digit - 1], digit - 1);
    if (blockIdx.x == 0 && threadIdx.x == 0) state->searches[digit] = search;
  }
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) histogram[bin] = 0;
  __syncthreads();

  Piece piece = table.pieces[blockIdx.x];
  const Entry& entry = table.entries[piece.entry];
  const T *xs = static_cast<const T*>(entry.data[0]), *refs = static_cast<const T*>(entry.data[1]);
  int64_t first_row = entry.first_row;
  int shift = shift_of(digit), above = shift + bits_of_digit(digit);
  unsigned mask = (1u << bits_of_digit(digit)) - 1;
  auto count = [&](T a, T b) {
    unsigned key = __float_as_uint(fabsf(E::load(a) - E::load(b)));
    if (key >> above == search.found >> above) atomicAdd(&histogram[key >> shift & mask], 1u);
  };
  for_rows(entry, piece, [&](int64_t row, int64_t begin, int64_t n, Team team) {
    if (!neurons[first_row + row]) return;
    const T *x = xs + begin, *ref = refs + begin;
    auto packs = [&](int64_t i) {
      Pack<E> a = load_pack<E>(x + i), b = load_pack<E>(ref + i);
#pragma unroll
      for (int k = 0; k < Pack<E>::size; k++) count(a.values[k], b.values[k]);
    };
    for_elements<E>(team, n, packs, [&](int64_t i) { count(x[i], ref[i]); }, x, ref);
  });
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    if (histogram[bin] > 0) atomicAdd(&state->histograms[digit][bin], static_cast<Count>(histogram[bin]));
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksOfSm) read_result(const State* state, float* change) {
  int last = kDigits - 1;
  Search search = descend(state->searches[last], state->histograms[last], last);
  if (threadIdx.x == 0) *change = __uint_as_float(search.rank > 0 ? search.found : 0x7fffffffu);
}

}  // namespace

void kth_largest_change(const HostList& list, Dtype dtype, const bool* neurons, int64_t q, float* change,
                        const Device& device) {
  Planned plan = resident(list, Split::kRows, device);
  State* state = static_cast<State*>(device.allocate(sizeof(State)));
  clear(state, sizeof(State), device);
  if (plan.pieces > 0) {
    with_type(dtype, [&](auto type) {
      auto kernel = count_digit<decltype(type)>;
      for (int digit = 0; digit < kDigits; digit++) {
        BDFAST_LAUNCH(kernel, plan.pieces, device.stream, plan.table, neurons, static_cast<Count>(q), digit, state);
        check_launch("kth_largest_change");
      }
    });
  }
  BDFAST_LAUNCH(read_result, 1, device.stream, state, change);
  check_launch("kth_largest_change");
}

}  // namespace cuda
}  // namespace bdfast
