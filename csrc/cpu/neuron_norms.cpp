// neuron_norms: the 1, 2 or inf norm of every row of x - ref, or of x.
#include <limits>
#include <stdexcept>

#include "rows.h"
#include "simd.h"

namespace bdfast {
namespace {

enum class Norm { kSum, kSumOfSquares, kLargest };

Norm norm_of(double ord) {
  if (ord == 1) return Norm::kSum;
  if (ord == 2) return Norm::kSumOfSquares;
  if (ord == std::numeric_limits<double>::infinity()) return Norm::kLargest;
  throw std::invalid_argument("neuron_norms: ord is not 1, 2 or inf; choose one of these.");
}

template <Norm kNorm, bool kHasRef, class T>
inline float term(const T* x, const T* ref, int64_t i) {
  float d = change<kHasRef>(x, ref, i);
  return kNorm == Norm::kSum ? d : d * d;
}

template <Norm kNorm, bool kHasRef, class T>
inline float sum(const T* x, const T* ref, int64_t n) {
  return sum_of_stretch(0, n, [=](int64_t i) { return term<kNorm, kHasRef>(x, ref, i); });
}

// The bits of floats without a sign are in the order of their values, with NaN above all.
template <bool kHasRef, class T>
inline float largest(const T* x, const T* ref, int64_t n) {
  uint32_t bits = 0;
#pragma omp simd reduction(max : bits)
  for (int64_t i = 0; i < n; i++) bits = std::max(bits, bits_of(change<kHasRef>(x, ref, i)));
  return float_of(bits);
}

template <bool kHasRef, class T>
inline float measure(Norm norm, const T* x, const T* ref, int64_t n) {
  if (norm == Norm::kSum) return sum<Norm::kSum, kHasRef>(x, ref, n);
  if (norm == Norm::kSumOfSquares) return sum<Norm::kSumOfSquares, kHasRef>(x, ref, n);
  return largest<kHasRef>(x, ref, n);
}

inline float measure(Norm norm, ScalarType dtype, const Block& block, int64_t begin, int64_t n) {
  return with_type(dtype, [=, &block](auto type) {
    using T = typename decltype(type)::type;
    const T* x = static_cast<const T*>(block.x) + begin;
    if (block.ref == nullptr) return measure<false, T>(norm, x, nullptr, n);
    return measure<true>(norm, x, static_cast<const T*>(block.ref) + begin, n);
  });
}

BDFAST_VECTORISED float measure_stretch(Norm norm, ScalarType dtype, const Block& block, int64_t begin, int64_t n) {
  return measure(norm, dtype, block, begin, n);
}

double combine(Norm norm, double total, double part) {
  if (norm != Norm::kLargest) return total + part;
  return part > total || std::isnan(part) ? part : total;
}

double measure_row(Norm norm, ScalarType dtype, const Block& block, int64_t begin, int64_t end) {
  if (end - begin < kLanes) return measure(norm, dtype, block, begin, end - begin);
  double total = 0;
  for (; begin < end; begin += kStretch) {
    float part = measure_stretch(norm, dtype, block, begin, std::min(kStretch, end - begin));
    total = combine(norm, total, part);
  }
  return total;
}

float finish(Norm norm, double total) {
  return static_cast<float>(norm == Norm::kSumOfSquares ? std::sqrt(total) : total);
}

Tensor neuron_norms(const List& xs, const List& refs, double ord) {
  Norm norm = norm_of(ord);
  Blocks blocks = make_blocks({}, xs, refs);
  Tensor result = torch::stable::new_empty(xs[0], {blocks.rows}, ScalarType::Float);
  float* out = static_cast<float*>(result.mutable_data_ptr());
  std::fill(out, out + blocks.rows, 0.0f);

  std::vector<Piece> pieces = cut(blocks, [](int64_t) { return true; });
  std::vector<double> parts(pieces.size());
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++) {
      const auto& [b, begin, end] = pieces[p];
      const Block& block = blocks.list[b];
      if (end - begin < block.columns) {
        parts[p] = measure_row(norm, blocks.dtype, block, begin, end);
        continue;
      }
      for (int64_t start = begin; start < end; start += block.columns) {
        double total = measure_row(norm, blocks.dtype, block, start, start + block.columns);
        out[block.first_row + start / block.columns] = finish(norm, total);
      }
    }
  });

  // Rows that were cut into several pieces, in the order of the pieces.
  double total = 0;
  for (size_t p = 0; p < pieces.size(); p++) {
    const Block& block = blocks.list[pieces[p].block];
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
