// What the inner loops share: element types, the change of a sub-weight, and how they reach the vector units.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// Compiled once per level of x86-64; the loader takes the best one for the machine. Everything that is called inside
// has to be inlined to be compiled for that level too, which is what `flatten` asks for.
// Sanitizers instrument the resolvers, which run before the sanitizers do.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(__clang__) && defined(__GNUC__) && \
    __GNUC__ >= 12 && !defined(__SANITIZE_ADDRESS__)
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

// Sums shorter than the lanes are not worth them: setting up wide vectors would cost more than the sum.
constexpr int64_t kLanes = 32;
// The length of a float32 sum; beyond it, sums are added up in float64.
constexpr int64_t kStretch = 1024;

// term(0) + ... + term(n - 1) in a fixed number of lanes, whatever a vector of the machine holds: short sums that lose
// next to nothing, in the same order on every machine.
template <class Term>
inline float sum_of_stretch(int64_t begin, int64_t end, Term term) {
  int64_t whole = begin + (end - begin) / kLanes * kLanes;
  float lanes[kLanes] = {};
  for (int64_t i = begin; i < whole; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; lane++) lanes[lane] += term(i + lane);
  }
  for (int64_t width = kLanes / 2; width > 0 && whole > begin; width /= 2) {
    for (int64_t lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
  }
  float total = lanes[0];
  for (int64_t i = whole; i < end; i++) total += term(i);
  return total;
}

template <class Term>
inline double sum_in_lanes(int64_t n, Term term) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    total += sum_of_stretch(begin, std::min(n, begin + kStretch), term);
  }
  return total;
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
