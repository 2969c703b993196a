// sharp_step_: SGD from the saved weights with a mix of two gradients, and the distance to a reference on the way.
#include "flat.h"
#include "simd.h"

namespace bdfast {
namespace {

enum Place { kParams, kSaved, kGrads, kMomentum, kFirstGrads, kReferences, kLists };

struct Options {
  float lr;
  float momentum;
  float damped;  // 1 - dampening
  float weight_decay;
  float alpha;
  float sign;  // -1 to ascend
  bool nesterov;
};

// The lists that take part, as template arguments: the inner loop is free of branches.
template <bool kHasMomentum, bool kHasFirst>
struct Lists {
  static constexpr bool has_momentum = kHasMomentum;
  static constexpr bool has_first = kHasFirst;
};

template <class L, class E, class T = typename E::Stored>
inline float moved(const std::array<T*, kLists>& at, int64_t i, const Options& o) {
  float weight = E::load(at[kSaved][i]);
  float gradient = E::load(at[kGrads][i]);
  if constexpr (L::has_first) {
    gradient = (1 - o.alpha) * E::load(at[kFirstGrads][i]) + o.alpha * gradient;
  }
  gradient = o.sign * gradient + o.weight_decay * weight;
  if constexpr (L::has_momentum) {
    float buffer = o.momentum * E::load(at[kMomentum][i]) + o.damped * gradient;
    at[kMomentum][i] = E::store(buffer);
    gradient = o.nesterov ? gradient + o.momentum * buffer : buffer;
  }
  return weight - o.lr * gradient;
}

template <class L, class E, class T = typename E::Stored>
inline void step(const std::array<T*, kLists>& at, int64_t n, const Options& o) {
  T* params = at[kParams];
#pragma omp simd
  for (int64_t i = 0; i < n; i++) params[i] = E::store(moved<L, E>(at, i, o));
}

template <class L, class E, class T = typename E::Stored>
inline double step_and_measure(const std::array<T*, kLists>& at, int64_t n, const Options& o) {
  return sum_in_lanes(n, [=](int64_t i) {
    float param = moved<L, E>(at, i, o);
    at[kParams][i] = E::store(param);
    float d = param - E::load(at[kReferences][i]);
    return d * d;
  });
}

template <class F>
inline auto with_lists(bool momentum, bool first, F f) {
  if (momentum) return first ? f(Lists<true, true>{}) : f(Lists<true, false>{});
  return first ? f(Lists<false, true>{}) : f(Lists<false, false>{});
}

BDFAST_VECTORISED double chunk_step(ScalarType dtype, const std::array<void*, kLists>& entry, int64_t begin, int64_t n,
                                    const Options& o) {
  return with_type(dtype, [=, &entry, &o](auto type) {
    using E = decltype(type);
    using T = typename E::Stored;
    std::array<T*, kLists> at;
    for (int list = 0; list < kLists; list++) {
      at[list] = entry[list] == nullptr ? nullptr : static_cast<T*>(entry[list]) + begin;
    }
    return with_lists(at[kMomentum] != nullptr, at[kFirstGrads] != nullptr, [=, &o](auto lists) {
      using L = decltype(lists);
      if (at[kReferences] != nullptr) return step_and_measure<L, E>(at, n, o);
      step<L, E>(at, n, o);
      return 0.0;
    });
  });
}

Tensor sharp_step(const List& params, const List& saved, const List& grads, const List& momentum_buffers,
                  const List& first_grads, const List& references, double lr, double momentum, double dampening,
                  bool nesterov, double weight_decay, double alpha, bool maximize) {
  BDFAST_REFUSE_UNLESS(saved.size() == params.size() && grads.size() == params.size());
  ScalarType dtype = check_lists({&params, &saved, &grads, &momentum_buffers, &first_grads, &references});
  check_written(params, {&grads, &momentum_buffers, &first_grads, &references});
  check_written(momentum_buffers, {&saved, &grads, &first_grads, &references});
  FlatLists<kLists> flat =
      make_flat<kLists>(dtype, {&params, &saved, &grads, &momentum_buffers, &first_grads, &references});
  Options options{static_cast<float>(lr),
                  static_cast<float>(momentum),
                  static_cast<float>(1 - dampening),
                  static_cast<float>(weight_decay),
                  static_cast<float>(alpha),
                  maximize ? -1.0f : 1.0f,
                  nesterov};
  std::vector<double> parts(flat.chunks.size());
  for_chunks(flat, [&](int64_t c) {
    const auto& [tensor, begin, end] = flat.chunks[c];
    parts[c] = chunk_step(flat.dtype, flat.entries[tensor], begin, end - begin, options);
  });
  double squared_distance = 0;
  for (double part : parts) squared_distance += part;
  Tensor result = torch::stable::new_empty(params[0], {}, ScalarType::Float);
  *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(squared_distance);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdfast_cpu, CPU, m) { m.impl("sharp_step_", TORCH_BOX(&sharp_step)); }

}  // namespace bdfast
