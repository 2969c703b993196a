// sharp_step_: SGD from the saved weights with a mix of two gradients; also computes the distance to a reference.
#include "launch.h"
#include "rows.cuh"
#include "runtime.cuh"

namespace bdfast {
namespace cuda {
namespace {

enum Place { kParam, kSaved, kGradient, kMomentum, kFirst, kReference };

// The lists that were passed, as template arguments.
template <bool kHasMomentum, bool kHasFirst, bool kHasReference>
struct Lists {
  static constexpr bool momentum = kHasMomentum;
  static constexpr bool first = kHasFirst;
  static constexpr bool reference = kHasReference;
};

template <bool kHasMomentum, bool kHasFirst, class F>
void with_reference(bool reference, F f) {
  if (reference) return f(Lists<kHasMomentum, kHasFirst, true>{});
  f(Lists<kHasMomentum, kHasFirst, false>{});
}

template <bool kHasMomentum, class F>
void with_first(bool first, bool reference, F f) {
  if (first) return with_reference<kHasMomentum, true>(reference, f);
  with_reference<kHasMomentum, false>(reference, f);
}

// Calls f(Lists{}).
template <class F>
void with_lists(const HostTensor& tensor, F f) {
  bool first = tensor.data[kFirst] != nullptr, reference = tensor.data[kReference] != nullptr;
  if (tensor.data[kMomentum] != nullptr) return with_first<true>(first, reference, f);
  with_first<false>(first, reference, f);
}

// Returns the new weight and updates the buffer.
template <class L>
__device__ __forceinline__ float moved(float weight, float gradient, float first, float& buffer, const SgdOptions& o) {
  if (L::first) gradient = (1 - o.alpha) * first + o.alpha * gradient;
  gradient = o.sign * gradient + o.weight_decay * weight;
  if (L::momentum) {
    buffer = o.momentum * buffer + o.damped * gradient;
    gradient = o.nesterov ? gradient + o.momentum * buffer : buffer;
  }
  return weight - o.lr * gradient;
}

template <class L, class E>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm) step(Table table, SgdOptions o, double* parts) {
  using T = typename E::Stored;
  Piece piece = table.pieces[blockIdx.x];
  const Entry& entry = table.entries[piece.entry];
  auto at = [&](int place) { return static_cast<T*>(entry.data[place]) + piece.begin; };
  T *param = at(kParam), *saved = at(kSaved), *gradient = at(kGradient);
  T* buffer = L::momentum ? at(kMomentum) : saved;
  T* first = L::first ? at(kFirst) : gradient;
  T* reference = L::reference ? at(kReference) : saved;
  float total = 0;
  auto packs = [&](int64_t i) {
    Pack<E> w = load_pack<E>(saved + i), g = load_pack<E>(gradient + i), b = w, f = g, r = w;
    if (L::momentum) b = load_pack<E>(buffer + i);
    if (L::first) f = load_pack<E>(first + i);
    if (L::reference) r = load_pack<E>(reference + i);
#pragma unroll
    for (int k = 0; k < Pack<E>::size; k++) {
      float velocity = E::load(b.values[k]);
      float weight = moved<L>(E::load(w.values[k]), E::load(g.values[k]), E::load(f.values[k]), velocity, o);
      b.values[k] = E::store(velocity);
      w.values[k] = E::store(weight);
      float d = weight - E::load(r.values[k]);
      if (L::reference) total += d * d;
    }
    if (L::momentum) store_pack<E>(buffer + i, b);
    store_pack<E>(param + i, w);
  };
  auto single = [&](int64_t i) {
    float velocity = E::load(buffer[i]);
    float weight = moved<L>(E::load(saved[i]), E::load(gradient[i]), E::load(first[i]), velocity, o);
    if (L::momentum) buffer[i] = E::store(velocity);
    float d = weight - E::load(reference[i]);
    if (L::reference) total += d * d;
    param[i] = E::store(weight);
  };
  Team team{static_cast<int>(threadIdx.x), kThreads};
  for_elements<E>(team, piece.end - piece.begin, packs, single, param, saved, gradient, buffer, first, reference);
  if (!L::reference) return;
  total = total_of_block<Sum>(total);
  if (threadIdx.x == 0) parts[piece.part] = total;
}

__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    add_up(Table table, const double* parts, float* squared_distance) {
  double total = total_of_group<Sum>(table.groups[0], parts);
  if (threadIdx.x == 0) *squared_distance = static_cast<float>(total);
}

}  // namespace

void sharp_step(const HostList& list, Dtype dtype, const SgdOptions& options, float* squared_distance,
                const Device& device) {
  Planned plan = resident(list, Split::kFlat, device);
  bool measured = plan.pieces > 0 && filled(list).data[kReference] != nullptr;
  if (!measured) clear(squared_distance, sizeof(float), device);
  if (plan.pieces == 0) return;
  double* parts = measured ? static_cast<double*>(device.allocate(plan.parts * sizeof(double))) : nullptr;
  with_type(dtype, [&](auto type) {
    using E = decltype(type);
    with_lists(filled(list), [&](auto lists) {
      auto kernel = step<decltype(lists), E>;
      BDFAST_LAUNCH(kernel, plan.pieces, device.stream, plan.table, options, parts);
      check_launch("sharp_step_");
    });
  });
  if (!measured) return;
  BDFAST_LAUNCH(add_up, 1, device.stream, plan.table, parts, squared_distance);
  check_launch("sharp_step_");
}

}  // namespace cuda
}  // namespace bdfast
