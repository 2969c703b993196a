// sharp_step_: SGD from the saved weights with a mix of two gradients; also computes the distance to a reference.
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
};

enum class Momentum { kNone, kPlain, kNesterov };

// Options as template arguments: a branch in the inner loop would prevent vectorisation.
template <Momentum kMomentum, bool kHasFirst>
struct Kind {
  static constexpr Momentum momentum = kMomentum;
  static constexpr bool has_first = kHasFirst;
};

template <class K, class E, class T = typename E::Stored>
inline float moved(const std::array<T*, kLists>& at, int64_t i, const Options& o) {
  float weight = E::load(at[kSaved][i]);
  float gradient = E::load(at[kGrads][i]);
  if constexpr (K::has_first) {
    gradient = (1 - o.alpha) * E::load(at[kFirstGrads][i]) + o.alpha * gradient;
  }
  gradient = o.sign * gradient + o.weight_decay * weight;
  if constexpr (K::momentum != Momentum::kNone) {
    float buffer = o.momentum * E::load(at[kMomentum][i]) + o.damped * gradient;
    at[kMomentum][i] = E::store(buffer);
    gradient = K::momentum == Momentum::kNesterov ? gradient + o.momentum * buffer : buffer;
  }
  return weight - o.lr * gradient;
}

// Writes the new weights to `out` and returns their squared distance to the reference, if there is one.
template <class K, class E, class T = typename E::Stored>
inline float step(const std::array<T*, kLists>& at, T* out, int64_t begin, int64_t end, const Options& o) {
  T* momentum = K::momentum != Momentum::kNone ? at[kMomentum] : at[kSaved];
  T* first = K::has_first ? at[kFirstGrads] : at[kGrads];
  auto written = [=](int64_t i) {
    float param = moved<K, E>(at, i, o);
    out[i - begin] = E::store(param);
    return param;
  };
  if (at[kReferences] == nullptr) {
    in_lanes(begin, end, written, at[kSaved], at[kGrads], momentum, first);
    return 0;
  }
  auto squared = [=](int64_t i) {
    float d = written(i) - E::load(at[kReferences][i]);
    return d * d;
  };
  return sum_of_stretch(begin, end, squared, at[kSaved], at[kGrads], momentum, first, at[kReferences]);
}

// Calls f(Kind{}).
template <class F>
inline auto with_kind(Momentum momentum, bool first, F f) {
  constexpr Momentum kNone = Momentum::kNone, kPlain = Momentum::kPlain, kNesterov = Momentum::kNesterov;
  if (momentum == kNone) return first ? f(Kind<kNone, true>{}) : f(Kind<kNone, false>{});
  if (momentum == kPlain) return first ? f(Kind<kPlain, true>{}) : f(Kind<kPlain, false>{});
  return first ? f(Kind<kNesterov, true>{}) : f(Kind<kNesterov, false>{});
}

BDFAST_VECTORISED double step_piece(ScalarType dtype, const std::array<void*, kLists>& entry, int64_t begin, int64_t n,
                                    bool streamed, Momentum momentum, const Options& o) {
  return with_type(dtype, [=, &entry, &o](auto type) {
    using E = decltype(type);
    using T = typename E::Stored;
    std::array<T*, kLists> at;
    for (int list = 0; list < kLists; list++) {
      at[list] = entry[list] == nullptr ? nullptr : static_cast<T*>(entry[list]) + begin;
    }
    return with_kind(momentum, at[kFirstGrads] != nullptr, [=, &o](auto kind) {
      using K = decltype(kind);
      T buffer[kStreamElements];
      double squared_distance = 0;
      for (int64_t i = 0; i < n; i += kStreamElements) {
        int64_t end = std::min(n, i + kStreamElements);
        squared_distance += step<K, E>(at, streamed ? buffer : at[kParams] + i, i, end, o);
        if (streamed) stream(at[kParams] + i, buffer, end - i);
      }
      if (streamed) end_of_stream();
      return squared_distance;
    });
  });
}

Tensor sharp_step(const List& params, const List& saved, const List& grads, const List& momentum_buffers,
                  const List& first_grads, const List& references, double lr, double momentum, double dampening,
                  bool nesterov, double weight_decay, double alpha, bool maximize) {
  BDFAST_REFUSE_UNLESS(saved.size() == params.size() && grads.size() == params.size());
  ScalarType dtype = check_lists({&params, &saved, &grads, &momentum_buffers, &first_grads, &references});
  MemoryUse use(dtype);
  use.write(params);
  use.write(momentum_buffers);
  use.read(saved, params);
  for (const List* list : {&grads, &first_grads, &references}) use.read(*list);
  use.check();
  FlatLists<kLists> flat =
      make_flat<kLists>(dtype, {&params, &saved, &grads, &momentum_buffers, &first_grads, &references});
  Options options{static_cast<float>(lr),           static_cast<float>(momentum), static_cast<float>(1 - dampening),
                  static_cast<float>(weight_decay), static_cast<float>(alpha),    maximize ? -1.0f : 1.0f};
  Momentum kind = nesterov ? Momentum::kNesterov : Momentum::kPlain;
  if (momentum_buffers.empty()) kind = Momentum::kNone;
  std::vector<double> parts(flat.pieces.size());
  for_each_piece(flat, [&](int64_t p) {
    const auto& [index, begin, end] = flat.pieces[p];
    parts[p] = step_piece(flat.dtype, flat.entries[index], begin, end - begin, flat.streamed, kind, options);
  });
  double squared_distance = 0;
  for (double part : parts) squared_distance += part;
  Tensor result = new_result({}, aoti_torch_dtype_float32());
  *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(squared_distance);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdfast_cpu, CPU, m) { m.impl("sharp_step_", TORCH_BOX(&sharp_step)); }

}  // namespace bdfast
