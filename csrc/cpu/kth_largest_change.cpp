// kth_largest_change: exact selection, usually in one pass over the selected rows. A sample gives a bracket around the
// answer; the pass counts the keys above the bracket and collects those inside. If too many are inside (ties), or the
// answer is outside, it is found digit by digit from histograms instead, without further memory.
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "rows.h"
#include "simd.h"

namespace bdfast {
namespace {

// The key of a change is its bit pattern, which has the order of the absolute values, with NaN above all.
constexpr uint32_t kLargestKey = 0x7fffffff;
constexpr int64_t kBatch = 1024;
constexpr int64_t kSample = 16384;

struct Bracket {
  uint32_t lower;
  uint32_t upper;
};

// 11 + 10 + 10 digits cover the 31 bits without the sign.
struct Digit {
  int shift;
  int bits;
};
constexpr Digit kDigits[] = {{20, 11}, {10, 10}, {0, 10}};
constexpr size_t kBins = 1 << 11;

using Histogram = std::array<int64_t, kBins>;

// The bin that holds the q-th largest key; q becomes its rank inside the bin.
size_t descend(const Histogram& histogram, size_t bins, int64_t& q) {
  size_t bin = bins - 1;
  for (; q > histogram[bin]; bin--) q -= histogram[bin];
  return bin;
}

struct Pool {
  Blocks blocks;
  std::vector<Piece> pieces;
  int64_t size;
};

template <class E>
inline uint32_t key_of(const typename E::Stored* x, const typename E::Stored* ref, int64_t i) {
  return bits_of(change<true, E>(x, ref, i));
}

template <class E>
inline void keys_of(const typename E::Stored* x, const typename E::Stored* ref, int64_t n, uint32_t* keys) {
  in_lanes(0, n, [=](int64_t i) { keys[i] = key_of<E>(x, ref, i); }, x, ref);
}

BDFAST_VECTORISED void keys_of(ScalarType dtype, const Block& block, int64_t begin, int64_t n, uint32_t* keys) {
  with_type(dtype, [=, &block](auto type) {
    using Stored = typename decltype(type)::Stored;
    const Stored *x = static_cast<const Stored*>(block.x), *ref = static_cast<const Stored*>(block.ref);
    keys_of<decltype(type)>(x + begin, ref + begin, n, keys);
  });
}

// Calls body(keys, n) for batches of the keys of these pieces.
template <class Body>
void for_batches(const Pool& pool, int64_t first, int64_t last, Body body) {
  uint32_t keys[kBatch];
  for (int64_t p = first; p < last; p++) {
    const auto& [b, begin, end] = pool.pieces[p];
    for (int64_t start = begin; start < end; start += kBatch) {
      int64_t n = std::min(kBatch, end - start);
      keys_of(pool.blocks.dtype, pool.blocks.list[b], start, n, keys);
      body(keys, n);
    }
  }
}

// A bracket for the q-th largest key, four standard deviations wide on each side, from evenly spaced samples.
Bracket bracket_by_sample(const Pool& pool, int64_t q) {
  int64_t stride = std::max<int64_t>(1, pool.size / kSample);
  std::vector<uint32_t> sample;
  sample.reserve(pool.size / stride + 1);
  int64_t skip = 0;
  for (const auto& [b, begin, end] : pool.pieces) {
    int64_t at = begin + skip;
    for (; at < end; at += stride) {
      keys_of(pool.blocks.dtype, pool.blocks.list[b], at, 1, &sample.emplace_back());
    }
    skip = at - end;
  }
  double size = static_cast<double>(sample.size());
  double share = static_cast<double>(q) / static_cast<double>(pool.size);
  double margin = 4 * std::sqrt(size * share * (1 - share)) + 1;
  double first = std::floor(size * share - margin), last = std::ceil(size * share + margin);
  auto largest = [&](double rank) {
    auto place = sample.begin() + static_cast<int64_t>(rank);
    std::nth_element(sample.begin(), place, sample.end(), std::greater<uint32_t>());
    return *place;
  };
  return {last < size ? largest(last) : 0, first >= 0 ? largest(first) : kLargestKey};
}

// Collects the keys inside the bracket and counts those above. Few are inside: each group has a bit mask of them.
template <class E>
inline int64_t keep_inside(const typename E::Stored* x, const typename E::Stored* ref, int64_t n, Bracket bracket,
                           uint32_t* kept, int64_t& above) {
  constexpr int64_t kGroup = kLanes;
  uint32_t width = bracket.upper - bracket.lower;
  uint32_t larger[kGroup] = {};
  int64_t inside = 0, whole = n / kGroup * kGroup;
  for (int64_t begin = 0; begin < whole; begin += kGroup) {
    fetch_ahead(x + begin, kGroup);
    fetch_ahead(ref + begin, kGroup);
    uint32_t found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = 0; i < kGroup; i++) {
      uint32_t key = key_of<E>(x, ref, begin + i);
      larger[i] += key > bracket.upper;
      found |= static_cast<uint32_t>(key - bracket.lower <= width) << i;
    }
    for (; found != 0; found &= found - 1) kept[inside++] = key_of<E>(x, ref, begin + __builtin_ctz(found));
  }
  for (int64_t i = whole; i < n; i++) {
    uint32_t key = key_of<E>(x, ref, i);
    larger[0] += key > bracket.upper;
    if (key - bracket.lower <= width) kept[inside++] = key;
  }
  for (uint32_t count : larger) above += count;
  return inside;
}

BDFAST_VECTORISED int64_t keep_inside(ScalarType dtype, const Block& block, int64_t begin, int64_t n, Bracket bracket,
                                      uint32_t* kept, int64_t& above) {
  return with_type(dtype, [=, &block, &above](auto type) {
    using Stored = typename decltype(type)::Stored;
    const Stored *x = static_cast<const Stored*>(block.x), *ref = static_cast<const Stored*>(block.ref);
    return keep_inside<decltype(type)>(x + begin, ref + begin, n, bracket, kept, above);
  });
}

// The q-th largest of the keys in the bracket: a histogram narrows the search to one bin.
uint32_t largest(uint32_t* begin, uint32_t* end, Bracket bracket, int64_t q) {
  int shift = 0;
  while ((bracket.upper - bracket.lower) >> shift >= kBins) shift++;
  auto bin_of = [=](uint32_t key) { return (key - bracket.lower) >> shift; };
  Histogram histogram{};
  for (uint32_t* key = begin; key < end; key++) histogram[bin_of(*key)]++;
  size_t bin = descend(histogram, kBins, q);
  end = std::partition(begin, end, [=](uint32_t key) { return bin_of(key) == bin; });
  std::nth_element(begin, begin + (q - 1), end, std::greater<uint32_t>());
  return begin[q - 1];
}

std::optional<uint32_t> select_inside(const Pool& pool, Bracket bracket, int64_t q) {
  int64_t capacity = std::max(2 * kSample, pool.size / 8);
  std::unique_ptr<uint32_t[]> collected(new uint32_t[capacity]);
  std::atomic<int64_t> inside{0}, above{0};
  for_pieces(pool.pieces, [&](int64_t first, int64_t last) {
    int64_t mine = 0;
    std::unique_ptr<uint32_t[]> kept(new uint32_t[kPieceElements]);
    for (int64_t p = first; p < last; p++) {
      const auto& [b, begin, end] = pool.pieces[p];
      int64_t found =
          keep_inside(pool.blocks.dtype, pool.blocks.list[b], begin, end - begin, bracket, kept.get(), mine);
      int64_t place = inside.fetch_add(found);
      if (place + found <= capacity) std::copy_n(kept.get(), found, collected.get() + place);
    }
    above += mine;
  });
  if (inside > capacity || q <= above || q > above + inside) return std::nullopt;
  return largest(collected.get(), collected.get() + inside, bracket, q - above);
}

// Histogram of the next digit of the keys that begin with the digits found so far.
Histogram histogram_of(const Pool& pool, Digit digit, uint32_t found) {
  Histogram histogram{};
  std::mutex mutex;
  uint32_t mask = (1u << digit.bits) - 1;
  int above = digit.shift + digit.bits;
  for_pieces(pool.pieces, [&](int64_t first, int64_t last) {
    Histogram mine{};
    for_batches(pool, first, last, [&](const uint32_t* keys, int64_t n) {
      for (int64_t i = 0; i < n; i++) {
        if (keys[i] >> above == found >> above) mine[(keys[i] >> digit.shift) & mask]++;
      }
    });
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t bin = 0; bin < kBins; bin++) histogram[bin] += mine[bin];
  });
  return histogram;
}

uint32_t select_by_digits(const Pool& pool, int64_t q) {
  uint32_t found = 0;
  for (Digit digit : kDigits) {
    Histogram histogram = histogram_of(pool, digit, found);
    size_t bin = descend(histogram, size_t{1} << digit.bits, q);
    found |= static_cast<uint32_t>(bin) << digit.shift;
  }
  return found;
}

Tensor kth_largest_change(const List& xs, const List& refs, const Tensor& neurons, int64_t q) {
  BDFAST_REFUSE_UNLESS(xs.size() == refs.size());
  Pool pool{make_blocks({}, xs, refs), {}, 0};
  const bool* selected = values<bool>(neurons, ScalarType::Bool, {pool.blocks.rows});
  pool.pieces = cut(pool.blocks, [=](int64_t row) { return selected[row]; });
  pool.size = count_elements(pool.pieces);
  if (q < 1 || q > pool.size) {
    throw std::invalid_argument("kth_largest_change: q: expected 1 to " + std::to_string(pool.size) +
                                ", the number of sub-weights of the selected neurons, got " + std::to_string(q) +
                                "; lower q or select more neurons.");
  }
  std::optional<uint32_t> key = select_inside(pool, bracket_by_sample(pool, q), q);
  if (!key) key = select_by_digits(pool, q);
  Tensor result = new_result({}, aoti_torch_dtype_float32());
  *static_cast<float*>(result.mutable_data_ptr()) = float_of(*key);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdfast_cpu, CPU, m) { m.impl("kth_largest_change", TORCH_BOX(&kth_largest_change)); }

}  // namespace bdfast
