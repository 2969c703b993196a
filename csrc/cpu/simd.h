// What the inner loops share: element types, the change of a sub-weight, and how they reach the vector units.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// Compiled once per level of x86-64; the loader takes the best one for the machine. Everything that is called inside
// has to be inlined to be compiled for that level too, which is what `flatten` asks for.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(__clang__) && defined(__GNUC__) && \
    __GNUC__ >= 12
#define BDFAST_VECTORISED __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BDFAST_VECTORISED
#endif

namespace bdfast {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the element type T.
template <class F>
inline auto with_type(torch::headeronly::ScalarType dtype, F f) {
  switch (dtype) {
    case torch::headeronly::ScalarType::BFloat16:
      return f(Type<torch::headeronly::BFloat16>{});
    case torch::headeronly::ScalarType::Half:
      return f(Type<torch::headeronly::Half>{});
    default:
      return f(Type<float>{});
  }
}

template <bool kHasRef, class T>
inline float change(const T* x, const T* ref, int64_t i) {
  if constexpr (kHasRef) return std::fabs(static_cast<float>(x[i]) - static_cast<float>(ref[i]));
  return std::fabs(static_cast<float>(x[i]));
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace bdfast
