// neuron_norms: the 1, 2 or inf norm of every row of x - ref, or of x.
#include <limits>
#include <stdexcept>

#include "rows.h"
#include "simd.h"

namespace bdfast {
namespace {

enum class Norm { kSum, kSumOfSquares, kLargest };

template <Norm kNorm, bool kHasRef, class E>
struct Kind {
  using Element = E;
  static constexpr Norm value = kNorm;
  static constexpr bool has_ref = kHasRef;
};

Norm norm_of(double ord) {
  if (ord == 1) return Norm::kSum;
  if (ord == 2) return Norm::kSumOfSquares;
  if (ord == std::numeric_limits<double>::infinity()) return Norm::kLargest;
  throw std::invalid_argument("neuron_norms: ord: expected 1, 2 or inf, got another number; choose one of these.");
}

template <Norm kNorm, bool kHasRef, class E>
inline float term(const typename E::Stored* x, const typename E::Stored* ref, int64_t i) {
  float d = change<kHasRef, E>(x, ref, i);
  return kNorm == Norm::kSum ? d : d * d;
}

// The bit patterns of non-negative floats have the order of their values, with NaN above all.
template <bool kHasRef, class E>
inline float largest(const typename E::Stored* x, const typename E::Stored* ref, int64_t n) {
  uint32_t bits = 0;
#pragma omp simd reduction(max : bits)
  for (int64_t i = 0; i < n; i++) bits = std::max(bits, bits_of(change<kHasRef, E>(x, ref, i)));
  return float_of(bits);
}

// The sum, the sum of squares or the maximum of a row or a part of it.
template <Norm kNorm, bool kHasRef, class E>
inline double measure(const typename E::Stored* x, const typename E::Stored* ref, int64_t n) {
  if constexpr (kNorm == Norm::kLargest) return largest<kHasRef, E>(x, ref, n);
  return sum_in_lanes(n, [=](int64_t i) { return term<kNorm, kHasRef, E>(x, ref, i); }, x, ref);
}

template <Norm kNorm, bool kHasRef, class E>
inline double measure_narrow(const typename E::Stored* x, const typename E::Stored* ref, int64_t n) {
  if constexpr (kNorm == Norm::kLargest) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < n; i++) bits = std::max(bits, bits_of(change<kHasRef, E>(x, ref, i)));
    return float_of(bits);
  }
  float total = 0;
  for (int64_t i = 0; i < n; i++) total += term<kNorm, kHasRef, E>(x, ref, i);
  return total;
}

float finish(Norm norm, double total) {
  return static_cast<float>(norm == Norm::kSumOfSquares ? std::sqrt(total) : total);
}

// Calls f(norm, type, x, ref) with the norm and the element type as template arguments.
template <class F>
inline auto with_norm(Norm norm, ScalarType dtype, const Block& block, F f) {
  return with_type(dtype, [=, &block](auto type) {
    using E = decltype(type);
    using Stored = typename E::Stored;
    const Stored *x = static_cast<const Stored*>(block.x), *ref = static_cast<const Stored*>(block.ref);
    auto with_ref = [=](auto constant) {
      constexpr Norm kNorm = decltype(constant)::value;
      return ref == nullptr ? f(Kind<kNorm, false, E>{}, x, x) : f(Kind<kNorm, true, E>{}, x, ref);
    };
    if (norm == Norm::kSum) return with_ref(Kind<Norm::kSum, false, E>{});
    if (norm == Norm::kSumOfSquares) return with_ref(Kind<Norm::kSumOfSquares, false, E>{});
    return with_ref(Kind<Norm::kLargest, false, E>{});
  });
}

BDFAST_VECTORISED double measure_part(Norm norm, ScalarType dtype, const Block& block, int64_t begin, int64_t n) {
  return with_norm(norm, dtype, block, [=](auto kind, const auto* x, const auto* ref) {
    using K = decltype(kind);
    return measure<K::value, K::has_ref, typename K::Element>(x + begin, ref + begin, n);
  });
}

// The norms of `count` whole rows, the first of which begins at `begin`.
BDFAST_VECTORISED void measure_rows(Norm norm, ScalarType dtype, const Block& block, int64_t begin, int64_t count,
                                    float* out) {
  int64_t columns = block.columns;
  with_norm(norm, dtype, block, [=](auto kind, const auto* x, const auto* ref) {
    using K = decltype(kind);
    for (int64_t row = 0, at = begin; row < count; row++, at += columns) {
      out[row] = finish(norm, measure<K::value, K::has_ref, typename K::Element>(x + at, ref + at, columns));
    }
  });
}

// Rows of fewer than kLanes columns, which are too short for wide vectors.
void measure_narrow_rows(Norm norm, ScalarType dtype, const Block& block, int64_t begin, int64_t count, float* out) {
  int64_t columns = block.columns;
  with_norm(norm, dtype, block, [=](auto kind, const auto* x, const auto* ref) {
    using K = decltype(kind);
    for (int64_t row = 0, at = begin; row < count; row++, at += columns) {
      out[row] = finish(norm, measure_narrow<K::value, K::has_ref, typename K::Element>(x + at, ref + at, columns));
    }
  });
}

// Rows of one column: the norm is the change d itself. With both operations rounded, sqrt(d * d) is exactly d too,
// unless d * d overflows or is subnormal.
template <Norm kNorm, bool kHasRef, class E>
inline void measure_single(const typename E::Stored* x, const typename E::Stored* ref, int64_t n, float* out) {
  in_lanes(0, n, [=](int64_t i) { out[i] = change<kHasRef, E>(x, ref, i); }, x, ref);
  if constexpr (kNorm == Norm::kSumOfSquares) {
    constexpr uint32_t kLow = 0x20800000, kHigh = 0x5f000000;  // 2^-62 and 2^63
    uint32_t beyond = 0;
#pragma omp simd reduction(| : beyond)
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits = bits_of(out[i]);
      beyond |= static_cast<uint32_t>(bits != 0) & static_cast<uint32_t>(bits - kLow > kHigh - kLow);
    }
    for (int64_t i = 0; beyond != 0 && i < n; i++) out[i] = finish(kNorm, out[i] * out[i]);
  }
}

BDFAST_VECTORISED void measure_single_column(Norm norm, ScalarType dtype, const Block& block, int64_t begin,
                                             int64_t count, float* out) {
  with_norm(norm, dtype, block, [=](auto kind, const auto* x, const auto* ref) {
    using K = decltype(kind);
    for (int64_t i = 0; i < count; i += kStreamElements) {
      int64_t n = std::min(kStreamElements, count - i);
      measure_single<K::value, K::has_ref, typename K::Element>(x + begin + i, ref + begin + i, n, out + i);
    }
  });
}

double combine(Norm norm, double total, double part) {
  if (norm != Norm::kLargest) return total + part;
  return part > total || std::isnan(part) ? part : total;
}

Tensor neuron_norms(const List& xs, const List& refs, double ord) {
  Norm norm = norm_of(ord);
  Blocks blocks = make_blocks({}, xs, refs);
  Tensor result = new_result({blocks.rows}, aoti_torch_dtype_float32());
  float* out = static_cast<float*>(result.mutable_data_ptr());
  ask_for_large_pages(out, blocks.rows * static_cast<int64_t>(sizeof(float)));
  for (const Block& block : blocks.list) {
    if (block.columns == 0) std::fill_n(out + block.first_row, block.rows, 0.0f);  // rows that no piece covers
  }

  std::vector<Piece> pieces = cut(blocks, EveryRow{});
  std::vector<double> parts(pieces.size());
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++) {
      const auto& [b, begin, end] = pieces[p];
      const Block& block = blocks.list[b];
      if (end - begin < block.columns) {
        parts[p] = measure_part(norm, blocks.dtype, block, begin, end - begin);
        continue;
      }
      auto* measure = block.columns == 1       ? measure_single_column
                      : block.columns < kLanes ? measure_narrow_rows
                                               : measure_rows;
      float* norms = out + block.first_row + begin / block.columns;
      measure(norm, blocks.dtype, block, begin, (end - begin) / block.columns, norms);
    }
  });

  // Rows that were split into several pieces, in the order of the pieces.
  double total = 0;
  for (size_t p = 0; p < pieces.size(); p++) {
    const Block& block = blocks.list[pieces[p].entry];
    if (pieces[p].end - pieces[p].begin >= block.columns) continue;
    total = combine(norm, pieces[p].begin % block.columns == 0 ? 0 : total, parts[p]);
    if (pieces[p].end % block.columns == 0) {
      out[block.first_row + pieces[p].begin / block.columns] = finish(norm, total);
    }
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdfast_cpu, CPU, m) { m.impl("neuron_norms", TORCH_BOX(&neuron_norms)); }

}  // namespace bdfast
