// perturb_: compute the norm of the direction, save the weights, and move them by rho along the direction.
#include "launch.h"
#include "rows.cuh"
#include "runtime.cuh"

namespace bdfast {
namespace cuda {
namespace {

enum Place { kParam, kDirection, kSaved };

template <PerturbMode kMode>
struct Constant {
  static constexpr PerturbMode value = kMode;
};

template <class F>
void with_mode(PerturbMode mode, F f) {
  if (mode == PerturbMode::kAsam) return f(Constant<PerturbMode::kAsam>{});
  if (mode == PerturbMode::kPath) return f(Constant<PerturbMode::kPath>{});
  f(Constant<PerturbMode::kSam>{});
}

// The quantity whose norm is computed.
template <PerturbMode kMode>
__device__ __forceinline__ float normed(float param, float x) {
  if (kMode == PerturbMode::kPath) return x - param;
  return kMode == PerturbMode::kAsam ? x * param : x;
}

template <PerturbMode kMode, class E>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm) sum_squares(Table table, double* parts) {
  using T = typename E::Stored;
  constexpr bool kHasParam = kMode != PerturbMode::kSam;
  Piece piece = table.pieces[blockIdx.x];
  const Entry& entry = table.entries[piece.entry];
  const T* direction = static_cast<const T*>(entry.data[kDirection]) + piece.begin;
  const T* param = kHasParam ? static_cast<const T*>(entry.data[kParam]) + piece.begin : direction;
  float total = 0;
  auto add = [&](T p, T x) {
    float d = normed<kMode>(E::load(p), E::load(x));
    total += d * d;
  };
  auto packs = [&](int64_t i) {
    Pack<E> x = load_pack<E>(direction + i), p = x;
    if (kHasParam) p = load_pack<E>(param + i);
#pragma unroll
    for (int k = 0; k < Pack<E>::size; k++) add(p.values[k], x.values[k]);
  };
  Team team{static_cast<int>(threadIdx.x), kThreads};
  for_elements<E>(
      team, piece.end - piece.begin, packs, [&](int64_t i) { add(param[i], direction[i]); }, param, direction);
  total = total_of_block<Sum>(total);
  if (threadIdx.x == 0) parts[piece.part] = total;
}

__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    norms_of_groups(Table table, const double* parts, float* norms) {
  Group group = table.groups[blockIdx.x];
  double total = total_of_group<Sum>(group, parts);
  if (threadIdx.x == 0) norms[group.result] = static_cast<float>(sqrt(total));
}

template <PerturbMode kMode, class E>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    step(Table table, const float* norms, bool per_tensor, double rho, double eps) {
  using T = typename E::Stored;
  Piece piece = table.pieces[blockIdx.x];
  const Entry& entry = table.entries[piece.entry];
  T* param = static_cast<T*>(entry.data[kParam]) + piece.begin;
  const T* direction = static_cast<const T*>(entry.data[kDirection]) + piece.begin;
  T* saved = static_cast<T*>(entry.data[kSaved]) + piece.begin;
  float norm = norms[per_tensor ? piece.entry : 0];
  // If the norm is not finite, neither is some direction, and 0 times it is NaN. The weights then keep their bits.
  bool moves = norm > 0 && isfinite(norm);
  float factor = moves ? static_cast<float>(rho / (norm + eps)) : 0.0f;
  moves = factor != 0;
  auto moved = [&](T p, T x) {
    float weight = E::load(p), d = normed<kMode>(weight, E::load(x));
    if (kMode == PerturbMode::kAsam) d *= weight;
    return moves ? E::store(weight + d * factor) : p;
  };
  auto packs = [&](int64_t i) {
    Pack<E> p = load_pack<E>(param + i), x = load_pack<E>(direction + i);
    store_pack<E>(saved + i, p);
#pragma unroll
    for (int k = 0; k < Pack<E>::size; k++) p.values[k] = moved(p.values[k], x.values[k]);
    store_pack<E>(param + i, p);
  };
  auto single = [&](int64_t i) {
    saved[i] = param[i];
    param[i] = moved(param[i], direction[i]);
  };
  Team team{static_cast<int>(threadIdx.x), kThreads};
  for_elements<E>(team, piece.end - piece.begin, packs, single, param, direction, saved);
}

}  // namespace

void perturb(const HostList& list, Dtype dtype, PerturbMode mode, bool per_tensor, double rho, double eps,
             const float* known_norms, float* norms, const Device& device) {
  Planned plan = resident(list, per_tensor ? Split::kFlatPerTensor : Split::kFlat, device);
  with_type(dtype, [&](auto type) {
    using E = decltype(type);
    with_mode(mode, [&](auto constant) {
      constexpr PerturbMode kMode = decltype(constant)::value;
      if (known_norms != nullptr) {
        copy(norms, known_norms, plan.groups * sizeof(float), device);
      } else {
        double* parts = static_cast<double*>(device.allocate(plan.parts * sizeof(double)));
        if (plan.pieces > 0) {
          auto squares = sum_squares<kMode, E>;
          BDFAST_LAUNCH(squares, plan.pieces, device.stream, plan.table, parts);
          check_launch("perturb_");
        }
        BDFAST_LAUNCH(norms_of_groups, plan.groups, device.stream, plan.table, parts, norms);
        check_launch("perturb_");
      }
      if (plan.pieces == 0) return;
      auto kernel = step<kMode, E>;
      BDFAST_LAUNCH(kernel, plan.pieces, device.stream, plan.table, norms, per_tensor, rho, eps);
      check_launch("perturb_");
    });
  });
}

}  // namespace cuda
}  // namespace bdfast
