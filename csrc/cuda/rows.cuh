// Rows (neurons) of a piece, and sums over the threads that share one.
#pragma once

#include "element.cuh"

namespace bdfast {
namespace cuda {

// Rows up to these lengths are processed by one thread or one warp; longer rows by the block.
constexpr int64_t kThreadRow = 16;
constexpr int64_t kWarpRow = 1024;

// Calls body(row, begin, n, team) for n elements of a row, the first at `begin`, shared by the team. All threads of a
// team make the same calls, so they may synchronise.
template <class Body>
__device__ __forceinline__ void for_rows(const Entry& entry, const Piece& piece, Body body) {
  int64_t columns = entry.columns, first = piece.begin / columns;
  if (piece.part >= 0) {
    body(first, piece.begin, piece.end - piece.begin, Team{static_cast<int>(threadIdx.x), kThreads});
    return;
  }
  int64_t last = piece.end / columns;
  int thread = static_cast<int>(threadIdx.x);
  if (columns <= kThreadRow) {
    for (int64_t row = first + thread; row < last; row += kThreads) body(row, row * columns, columns, Team{0, 1});
  } else if (columns <= kWarpRow) {
    for (int64_t row = first + thread / kWarp; row < last; row += kThreads / kWarp) {
      body(row, row * columns, columns, Team{thread % kWarp, kWarp});
    }
  } else {
    for (int64_t row = first; row < last; row++) body(row, row * columns, columns, Team{thread, kThreads});
  }
}

struct Sum {
  template <class T>
  static __device__ T combine(T a, T b) {
    return a + b;
  }
};

// For non-negative numbers: their bit patterns have the order of their values, with NaN above all.
struct Largest {
  static __device__ float combine(float a, float b) { return __float_as_uint(a) > __float_as_uint(b) ? a : b; }
  static __device__ double combine(double a, double b) { return combine(static_cast<float>(a), static_cast<float>(b)); }
};

template <class How, class T>
__device__ __forceinline__ T total_of_warp(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = How::combine(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}

// To be called by all threads of the block. Ends with a barrier, so it may be called again.
template <class How, class T>
__device__ __forceinline__ T total_of_block(T value) {
  __shared__ T totals[kThreads / kWarp];
  value = total_of_warp<How>(value);
  if (threadIdx.x % kWarp == 0) totals[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = totals[0];
  for (int warp = 1; warp < kThreads / kWarp; warp++) value = How::combine(value, totals[warp]);
  __syncthreads();
  return value;
}

template <class How, class T>
__device__ __forceinline__ T total_of_team(const Team& team, T value) {
  if (team.size == 1) return value;
  return team.size == kWarp ? total_of_warp<How>(value) : total_of_block<How>(value);
}

// Combines the parts of a group in an order that depends only on their number. To be called by all threads of the
// block.
template <class How>
__device__ __forceinline__ double total_of_group(const Group& group, const double* parts) {
  double total = 0;
  for (int64_t part = group.first + threadIdx.x; part < group.last; part += kThreads) {
    total = How::combine(total, parts[part]);
  }
  return total_of_block<How>(total);
}

}  // namespace cuda
}  // namespace bdfast
