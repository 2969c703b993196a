// neuron_norms: the 1, 2 or inf norm of every row of x - ref, or of x.
#include <cmath>

#include "launch.h"
#include "rows.cuh"
#include "runtime.cuh"

namespace bdfast {
namespace cuda {
namespace {

enum class Norm { kSum, kSumOfSquares, kLargest };

template <Norm kNorm>
struct NormOf {
  static constexpr Norm value = kNorm;
  using How = Sum;
};
template <>
struct NormOf<Norm::kLargest> {
  static constexpr Norm value = Norm::kLargest;
  using How = Largest;
};

template <class N>
__device__ float finish(double total) {
  return static_cast<float>(N::value == Norm::kSumOfSquares ? sqrt(total) : total);
}

template <class N>
__device__ __forceinline__ float with_term(float total, float change) {
  float size = fabsf(change);
  return N::How::combine(total, N::value == Norm::kSumOfSquares ? size * size : size);
}

template <class N, bool kHasRef, class E, class T = typename E::Stored>
__device__ float measure(const Team& team, const T* x, const T* ref, int64_t n) {
  float total = 0;
  auto packs = [&](int64_t i) {
    Pack<E> a = load_pack<E>(x + i), b;
    if (kHasRef) b = load_pack<E>(ref + i);
#pragma unroll
    for (int k = 0; k < Pack<E>::size; k++) {
      total = with_term<N>(total, E::load(a.values[k]) - (kHasRef ? E::load(b.values[k]) : 0.0f));
    }
  };
  auto single = [&](int64_t i) { total = with_term<N>(total, E::load(x[i]) - (kHasRef ? E::load(ref[i]) : 0.0f)); };
  for_elements<E>(team, n, packs, single, x, kHasRef ? ref : x);
  return total_of_team<typename N::How>(team, total);
}

template <class N, bool kHasRef, class E>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm) norms_of_rows(Table table, float* norms, double* parts) {
  using T = typename E::Stored;
  Piece piece = table.pieces[blockIdx.x];
  const Entry& entry = table.entries[piece.entry];
  const T *x = static_cast<const T*>(entry.data[0]), *ref = static_cast<const T*>(entry.data[1]);
  int64_t first_row = entry.first_row;
  for_rows(entry, piece, [&](int64_t row, int64_t begin, int64_t n, Team team) {
    float total = measure<N, kHasRef, E>(team, x + begin, kHasRef ? ref + begin : x, n);
    if (team.index != 0) return;
    if (piece.part >= 0) {
      parts[piece.part] = total;
    } else {
      norms[first_row + row] = finish<N>(total);
    }
  });
}

template <class N>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    norms_of_long_rows(Table table, const double* parts, float* norms) {
  Group group = table.groups[blockIdx.x];
  double total = total_of_group<typename N::How>(group, parts);
  if (threadIdx.x == 0) norms[group.result] = finish<N>(total);
}

template <class F>
void with_norm(double ord, F f) {
  if (ord == 1) return f(NormOf<Norm::kSum>{});
  if (ord == 2) return f(NormOf<Norm::kSumOfSquares>{});
  f(NormOf<Norm::kLargest>{});
}

}  // namespace

void neuron_norms(const HostList& list, Dtype dtype, double ord, float* norms, const Device& device) {
  Planned plan = resident(list, Split::kRows, device);
  if (plan.has_empty_rows) clear(norms, plan.rows * sizeof(float), device);
  if (plan.pieces == 0) return;
  double* parts = plan.parts ? static_cast<double*>(device.allocate(plan.parts * sizeof(double))) : nullptr;
  bool has_ref = filled(list).data[1] != nullptr;
  with_type(dtype, [&](auto type) {
    using E = decltype(type);
    with_norm(ord, [&](auto norm) {
      using N = decltype(norm);
      auto kernel = has_ref ? norms_of_rows<N, true, E> : norms_of_rows<N, false, E>;
      BDFAST_LAUNCH(kernel, plan.pieces, device.stream, plan.table, norms, parts);
      check_launch("neuron_norms");
      if (plan.groups == 0) return;
      auto combine = norms_of_long_rows<N>;
      BDFAST_LAUNCH(combine, plan.groups, device.stream, plan.table, parts, norms);
      check_launch("neuron_norms");
    });
  });
}

}  // namespace cuda
}  // namespace bdfast
