// A correct kernel, and what goes wrong in such kernels, one at a time: test_planted_bugs.py wants each to be caught.
// Arguments: which bug, order, threads of the system. Prints right or wrong.
#include <cstdio>

#include "emulator.h"
// After the emulator.
#include "../../csrc/cuda/rows.cuh"

using namespace bdfast::cuda;

namespace {

enum Bug {
  kNone,
  kMissingBarrier,
  kDivergentBarrier,
  kVectorBeyondTheEnd,
  kMisalignedVector,
  kOverwrittenTooEarly,
  kUnguardedGlobalSum,
  kSharedNeverWritten,
  kShuffleWithoutAllLanes,
  kLanesInDifferentShuffles,
  kWrongRow,
  kIndexOf32Bits,
  kRowsThatShareAnElement,
};

using Packed = Pack<Float32>;

// Sums of rows, a block each; the sum of all in sums[rows].
template <int kBug>
__global__ void sum_rows(const float* x, int rows, int columns, float* sums) {
  __shared__ float of_warps[kThreads / kWarp];
  int thread = threadIdx.x, row = blockIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  int64_t begin = static_cast<int64_t>(row) * columns;
  if (kBug == kIndexOf32Bits) {
    volatile int pitch = 1 << 30;
    int offset = row * pitch;
    begin += offset == 7;
  }
  if (kBug == kWrongRow) begin = static_cast<int64_t>(row) * (columns - columns % 4);
  const float* at = x + begin;
  float total = 0;
  int64_t tail = columns / 4 * 4;
  if (kBug == kVectorBeyondTheEnd) tail = (columns + 3) / 4 * 4;
  bool packs = reinterpret_cast<uintptr_t>(at) % kPackBytes == 0 || kBug == kMisalignedVector;
  for (int64_t i = packs ? thread * 4 : tail; i < tail; i += kThreads * 4) {
    Packed pack = load_pack<Float32>(at + i);
    for (int k = 0; k < 4; k++) total += i + k < columns ? pack.values[k] : 0;
  }
  for (int64_t i = (packs ? tail : 0) + thread; i < columns; i += kThreads) total += at[i];

  if (kBug == kShuffleWithoutAllLanes && thread >= kThreads - 4) return;
  if (kBug == kLanesInDifferentShuffles && lane % 2) total += __shfl_xor_sync(kWholeWarp, total, 0) * 0;
  total = total_of_warp<Sum>(total);
  if (lane == 0 && !(kBug == kSharedNeverWritten && warp == 5)) of_warps[warp] = total;
  if (kBug == kDivergentBarrier) {
    if (warp < 4) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (kBug != kMissingBarrier) {
    __syncthreads();
  }
  if (kBug == kOverwrittenTooEarly && thread == kThreads - 1) of_warps[2] = 0;
  total = 0;
  for (int i = 0; i < kThreads / kWarp; i++) total += of_warps[i];
  if (thread != 0) return;
  sums[row] = total;
  if (kBug == kRowsThatShareAnElement && row + 1 < rows) sums[row + 1] = total;
  if (kBug == kUnguardedGlobalSum) sums[rows] += total;
}

template <int kBug>
bool is_right(int rows, int columns) {
  std::vector<float> values(static_cast<size_t>(rows) * columns), sums(rows + 1);
  for (size_t i = 0; i < values.size(); i++) values[i] = static_cast<float>(i * 7 % 13);
  const float* x = values.data();
  float* results = sums.data();
  auto kernel = sum_rows<kBug>;
  BDFAST_LAUNCH(kernel, rows, nullptr, x, rows, columns, results);
  bool right = true;
  for (int row = 0; row < rows; row++) {
    float truth = 0;
    for (int i = 0; i < columns; i++) truth += values[static_cast<size_t>(row) * columns + i];
    right = right && sums[row] == truth;
  }
  return right;
}

template <int... kBugs>
bool choose(int bug, std::integer_sequence<int, kBugs...>) {
  // The last of five rows starts at a pack and ends within one; those before it start elsewhere.
  bool right = false;
  (void)((bug == kBugs && ((right = is_right<kBugs>(5, 1003)), true)) || ...);
  return right;
}

}  // namespace

int main(int, char** arguments) {
  int bug = std::atoi(arguments[1]);
  emulator::settings() = {static_cast<emulator::Order>(std::atoi(arguments[2])), 3, std::atoi(arguments[3])};
  std::puts(choose(bug, std::make_integer_sequence<int, kRowsThatShareAnElement + 1>{}) ? "right" : "wrong");
}
