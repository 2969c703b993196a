// Shared by the inner loops: element types, the change of a sub-weight, and vectorised loops and sums.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "memory.h"

// Compiled once per x86-64 level; the loader selects the best one for the machine. `flatten` inlines all called
// functions, so that they are compiled for that level too. Not with sanitizers: the resolvers run before the sanitizers
// are ready.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(__clang__) && defined(__GNUC__) && \
    __GNUC__ >= 12 && !defined(__SANITIZE_ADDRESS__)
#define BDFAST_VECTORISED __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BDFAST_VECTORISED
#endif

namespace bdfast {

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

// A selection without a branch. For `?:` the compiler would emit one if an operand is float arithmetic, which it may
// not execute speculatively.
inline uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// The element types: storage and conversion to and from float32, rounding to nearest, ties to even. Without branches
// and structs in memory, which would prevent vectorisation.
struct Float32 {
  using Stored = float;
  static float load(Stored value) { return value; }
  static Stored store(float value) { return value; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static float load(Stored value) { return float_of(static_cast<uint32_t>(value) << 16); }
  static Stored store(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<Stored>(value != value ? (bits >> 16) | 0x40 : rounded);
  }
};

struct Float16 {
  using Stored = uint16_t;
  static float load(Stored value) {
    uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16, magnitude = value & 0x7fff;
    // Subnormal: its fraction counts units of 2^-24. Normal: the exponent moves from bias 15 to bias 127.
    uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? (255u - 31) << 23 : (127u - 15) << 23);
    return float_of(sign | select(magnitude < 0x0400, subnormal, normal));
  }
  static Stored store(float value) {
    uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    // After adding 0.5, the last bit of a subnormal result is the last bit of the sum, so the addition rounds it.
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    uint32_t normal = (magnitude - ((127u - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    uint32_t finite = select(magnitude < 0x38800000, subnormal, select(magnitude < 0x47800000, normal, 0x7c00));
    return static_cast<Stored>(sign | select(magnitude > 0x7f800000, 0x7e00, finite));
  }
};

// Calls f(E{}) for the element type E.
template <class F>
inline auto with_type(torch::headeronly::ScalarType dtype, F f) {
  switch (dtype) {
    case torch::headeronly::ScalarType::BFloat16:
      return f(BFloat16{});
    case torch::headeronly::ScalarType::Half:
      return f(Float16{});
    default:
      return f(Float32{});
  }
}

template <bool kHasRef, class E>
inline float change(const typename E::Stored* x, const typename E::Stored* ref, int64_t i) {
  if constexpr (kHasRef) return std::fabs(E::load(x[i]) - E::load(ref[i]));
  return std::fabs(E::load(x[i]));
}

// Number of partial sums. Shorter sums are computed without vectors.
constexpr int64_t kLanes = 32;
// Length of a float32 sum; longer sums are combined in float64.
constexpr int64_t kStretch = 1024;

// Calls body(i) for i from begin to end - 1, vectorised if the body allows it. The body reads the arrays.
template <class Body, class... T>
inline void in_lanes(int64_t begin, int64_t end, Body body, const T*... arrays) {
  int64_t whole = begin + (end - begin) / kLanes * kLanes;
  for (int64_t i = begin; i < whole; i += kLanes) {
    (fetch_ahead(arrays + i, kLanes), ...);
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; lane++) body(i + lane);
  }
  for (int64_t i = whole; i < end; i++) body(i);
}

// term(begin) + ... + term(end - 1) with a fixed number of partial sums, independent of the vector width: small
// rounding errors, and the same order on every machine. The terms read the arrays.
template <class Term, class... T>
inline float sum_of_stretch(int64_t begin, int64_t end, Term term, const T*... arrays) {
  int64_t whole = begin + (end - begin) / kLanes * kLanes;
  float lanes[kLanes] = {};
  for (int64_t i = begin; i < whole; i += kLanes) {
    (fetch_ahead(arrays + i, kLanes), ...);
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

template <class Term, class... T>
inline double sum_in_lanes(int64_t n, Term term, const T*... arrays) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    total += sum_of_stretch(begin, std::min(n, begin + kStretch), term, arrays...);
  }
  return total;
}

}  // namespace bdfast
