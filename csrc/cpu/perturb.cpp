// perturb_: compute the norm of the direction, save the weights, and move them by rho along the direction.
#include <optional>
#include <string>

#include "flat.h"
#include "simd.h"

namespace bdfast {
namespace {

enum class Mode { kSam, kAsam, kPath };
enum Place { kParams, kDirs, kSaved, kLists };

Mode mode_of(const std::string& mode) {
  if (mode == "asam") return Mode::kAsam;
  return mode == "path" ? Mode::kPath : Mode::kSam;
}

// The quantity whose norm is computed.
template <Mode kMode>
inline float normed(float param, float x) {
  if (kMode == Mode::kPath) return x - param;
  return kMode == Mode::kAsam ? x * param : x;
}

template <Mode kMode, class E, class T = typename E::Stored>
inline double sum_of_squares(const T* params, const T* dirs, int64_t n) {
  auto squared = [=](int64_t i) {
    float d = normed<kMode>(kMode == Mode::kSam ? 0.0f : E::load(params[i]), E::load(dirs[i]));
    return d * d;
  };
  if constexpr (kMode == Mode::kSam) return sum_in_lanes(n, squared, dirs);
  return sum_in_lanes(n, squared, params, dirs);
}

template <Mode kMode, class E, class T = typename E::Stored>
inline void step(T* params, const T* dirs, int64_t n, float factor) {
  in_lanes(
      0, n,
      [=](int64_t i) {
        float param = E::load(params[i]);
        float d = normed<kMode>(param, E::load(dirs[i]));
        if (kMode == Mode::kAsam) d *= param;
        params[i] = E::store(param + d * factor);
      },
      params, dirs);
}

template <class T>
inline void save(T* saved, const T* params, int64_t n, bool streamed) {
  if (streamed) return stream(saved, params, n);
  std::copy(params, params + n, saved);
}

// Calls f(Constant<Mode>{}).
template <Mode kMode>
struct Constant {
  static constexpr Mode value = kMode;
};

template <class F>
inline auto with_mode(Mode mode, F f) {
  if (mode == Mode::kAsam) return f(Constant<Mode::kAsam>{});
  if (mode == Mode::kPath) return f(Constant<Mode::kPath>{});
  return f(Constant<Mode::kSam>{});
}

BDFAST_VECTORISED double squares_of_piece(Mode mode, ScalarType dtype, const void* params, const void* dirs,
                                          int64_t begin, int64_t n) {
  return with_type(dtype, [=](auto type) {
    using E = decltype(type);
    using T = typename E::Stored;
    return with_mode(mode, [=](auto constant) {
      constexpr Mode kMode = decltype(constant)::value;
      return sum_of_squares<kMode, E>(static_cast<const T*>(params) + begin, static_cast<const T*>(dirs) + begin, n);
    });
  });
}

BDFAST_VECTORISED void step_piece(Mode mode, ScalarType dtype, void* params, const void* dirs, void* saved,
                                  bool streamed, int64_t begin, int64_t n, float factor) {
  with_type(dtype, [=](auto type) {
    using E = decltype(type);
    using T = typename E::Stored;
    with_mode(mode, [=](auto constant) {
      constexpr Mode kMode = decltype(constant)::value;
      for (int64_t at = begin, end = begin + n; at < end; at += kStreamElements) {
        int64_t count = std::min(kStreamElements, end - at);
        T* param = static_cast<T*>(params) + at;
        save(static_cast<T*>(saved) + at, param, count, streamed);
        // Not a step of length 0: if the norm is not finite, neither is some direction, and 0 times it is NaN.
        if (factor != 0) step<kMode, E>(param, static_cast<const T*>(dirs) + at, count, factor);
      }
    });
  });
  if (streamed) end_of_stream();
}

// The norm of each tensor, or one norm of all, in float64.
std::vector<double> measure(const FlatLists<kLists>& flat, Mode mode, bool per_tensor) {
  std::vector<double> parts(flat.pieces.size());
  for_each_piece(flat, [&](int64_t p) {
    const auto& [index, begin, end] = flat.pieces[p];
    const auto& entry = flat.entries[index];
    parts[p] = squares_of_piece(mode, flat.dtype, entry[kParams], entry[kDirs], begin, end - begin);
  });
  std::vector<double> norms(per_tensor ? flat.entries.size() : 1);
  for (size_t p = 0; p < parts.size(); p++) norms[per_tensor ? flat.pieces[p].entry : 0] += parts[p];
  for (double& norm : norms) norm = std::sqrt(norm);
  return norms;
}

Tensor perturb(const List& params, const List& dirs, const List& saved, const std::optional<Tensor>& norm, double rho,
               const std::string& mode_name, const std::string& scope, double eps) {
  BDFAST_REFUSE_UNLESS(dirs.size() == params.size() && saved.size() == params.size());
  ScalarType dtype = check_lists({&params, &dirs, &saved});
  bool per_tensor = scope == "tensor";
  size_t count = per_tensor ? params.size() : 1;
  MemoryUse use(dtype);
  use.write(params);
  use.write(saved);
  use.read(dirs, params);
  const float* known = nullptr;
  if (norm) {
    known = per_tensor ? values<float>(*norm, ScalarType::Float, {static_cast<int64_t>(count)})
                       : values<float>(*norm, ScalarType::Float, {});
    use.read(*norm);
  }
  use.check();
  FlatLists<kLists> flat = make_flat<kLists>(dtype, {&params, &dirs, &saved});
  Mode mode = mode_of(mode_name);
  Tensor result = per_tensor ? new_result({static_cast<int64_t>(count)}, aoti_torch_dtype_float32())
                             : new_result({}, aoti_torch_dtype_float32());
  float* norms = static_cast<float*>(result.mutable_data_ptr());
  if (known != nullptr) {
    std::copy_n(known, count, norms);
  } else {
    std::vector<double> measured = measure(flat, mode, per_tensor);
    std::copy(measured.begin(), measured.end(), norms);
  }
  std::vector<float> factors(count);
  for (size_t i = 0; i < count; i++) {
    bool moving = norms[i] > 0 && std::isfinite(norms[i]);
    factors[i] = moving ? static_cast<float>(rho / (norms[i] + eps)) : 0.0f;
  }
  for_each_piece(flat, [&](int64_t p) {
    const auto& [index, begin, end] = flat.pieces[p];
    const auto& entry = flat.entries[index];
    step_piece(mode, flat.dtype, entry[kParams], entry[kDirs], entry[kSaved], flat.streamed, begin, end - begin,
               factors[per_tensor ? index : 0]);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdfast_cpu, CPU, m) { m.impl("perturb_", TORCH_BOX(&perturb)); }

}  // namespace bdfast
