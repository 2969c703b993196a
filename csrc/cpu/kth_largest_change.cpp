// kth_largest_change: exact selection in one pass over the selected rows, almost always. A sample brackets the answer;
// the pass counts what lies above the bracket and collects what lies in it. Where too much does (ties), or the sample
// misled, the answer is found digit by digit from histograms instead, with no memory beyond them.
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

// The key of a change is its bits: they order like the absolute values, with NaN above all.
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

struct Pool {
  Blocks blocks;
  std::vector<Piece> pieces;
  int64_t size;
};

template <class E>
inline void keys_of(const typename E::Stored* x, const typename E::Stored* ref, int64_t n, uint32_t* keys) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) keys[i] = bits_of(change<true, E>(x, ref, i));
}

BDFAST_VECTORISED void keys_of(ScalarType dtype, const Block& block, int64_t begin, int64_t n, uint32_t* keys) {
  with_type(dtype, [=, &block](auto type) {
    using Stored = typename decltype(type)::Stored;
    const Stored *x = static_cast<const Stored*>(block.x), *ref = static_cast<const Stored*>(block.ref);
    keys_of<decltype(type)>(x + begin, ref + begin, n, keys);
  });
}

// Calls body(keys, n) on batches of the keys of these pieces; body may overwrite them.
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

// Evenly spaced keys, and where among them, sorted, the q-th largest of all should be, give or take four sigma.
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
  std::sort(sample.begin(), sample.end(), std::greater<uint32_t>());
  double size = static_cast<double>(sample.size());
  double share = static_cast<double>(q) / static_cast<double>(pool.size);
  double margin = 4 * std::sqrt(size * share * (1 - share)) + 1;
  double first = std::floor(size * share - margin), last = std::ceil(size * share + margin);
  return {last < size ? sample[static_cast<size_t>(last)] : 0,
          first >= 0 ? sample[static_cast<size_t>(first)] : kLargestKey};
}

// Moves the keys inside the bracket to the front, and counts them and those above. Few are inside, so that most groups
// are done with once they are counted; in the others no branch, as it could not be foreseen.
BDFAST_VECTORISED int64_t keep_inside(uint32_t* keys, int64_t n, Bracket bracket, int64_t& above) {
  constexpr int64_t kGroup = 16;
  uint32_t width = bracket.upper - bracket.lower;
  uint32_t larger[kGroup] = {};
  int64_t inside = 0;
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    int64_t end = std::min(n, begin + kGroup);
    uint32_t found = 1;
    if (end - begin == kGroup) {
      found = 0;
#pragma omp simd reduction(| : found)
      for (int64_t i = 0; i < kGroup; i++) {
        uint32_t key = keys[begin + i];
        larger[i] += key > bracket.upper;
        found |= key - bracket.lower <= width;
      }
    } else {
      for (int64_t i = begin; i < end; i++) larger[i - begin] += keys[i] > bracket.upper;
    }
    if (!found) continue;
    for (int64_t i = begin; i < end; i++) {
      uint32_t key = keys[i];
      keys[inside] = key;
      inside += key - bracket.lower <= width;
    }
  }
  for (uint32_t count : larger) above += count;
  return inside;
}

std::optional<uint32_t> select_inside(const Pool& pool, Bracket bracket, int64_t q) {
  int64_t capacity = std::max(2 * kSample, pool.size / 8);
  std::unique_ptr<uint32_t[]> collected(new uint32_t[capacity]);
  std::atomic<int64_t> inside{0}, above{0};
  for_pieces(pool.pieces, [&](int64_t first, int64_t last) {
    int64_t mine = 0;
    for_batches(pool, first, last, [&](uint32_t* keys, int64_t n) {
      int64_t found = keep_inside(keys, n, bracket, mine);
      int64_t place = inside.fetch_add(found);
      if (place + found <= capacity) std::copy(keys, keys + found, collected.get() + place);
    });
    above += mine;
  });
  if (inside > capacity || q <= above || q > above + inside) return std::nullopt;
  uint32_t* answer = collected.get() + (q - above - 1);
  std::nth_element(collected.get(), answer, collected.get() + inside, std::greater<uint32_t>());
  return *answer;
}

// Counts the digit of those keys that begin with the digits found so far.
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
    size_t bin = (size_t{1} << digit.bits) - 1;
    for (; q > histogram[bin]; bin--) q -= histogram[bin];
    found |= static_cast<uint32_t>(bin) << digit.shift;
  }
  return found;
}

Tensor kth_largest_change(const List& xs, const List& refs, const Tensor& neurons, int64_t q) {
  BDFAST_REFUSE_UNLESS(xs.size() == refs.size());
  Pool pool{make_blocks({}, xs, refs), {}, 0};
  const bool* selected = vector_values<bool>(neurons, ScalarType::Bool, pool.blocks.rows);
  pool.pieces = cut(pool.blocks, [=](int64_t row) { return selected[row]; });
  pool.size = count_elements(pool.pieces);
  if (q < 1 || q > pool.size) {
    throw std::invalid_argument("kth_largest_change: q is " + std::to_string(q) + ", expected 1 to " +
                                std::to_string(pool.size) +
                                ", the number of sub-weights of the selected neurons; lower q or select more neurons.");
  }
  std::optional<uint32_t> key = select_inside(pool, bracket_by_sample(pool, q), q);
  if (!key) key = select_by_digits(pool, q);
  Tensor result = torch::stable::new_empty(xs[0], {}, ScalarType::Float);
  *static_cast<float*>(result.mutable_data_ptr()) = float_of(*key);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdfast_cpu, CPU, m) { m.impl("kth_largest_change", TORCH_BOX(&kth_largest_change)); }

}  // namespace bdfast
