// scale_neurons_: multiply every row by its own factor.
#include "rows.h"
#include "simd.h"

namespace bdfast {
namespace {

template <class E>
inline void scale(typename E::Stored* param, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) param[i] = E::store(E::load(param[i]) * factor);
}

// Scales [begin, end); factors[0] belongs to the row that contains `begin`.
BDFAST_VECTORISED void scale_piece(ScalarType dtype, const Block& block, int64_t begin, int64_t end,
                                   const float* factors) {
  with_type(dtype, [=, &block](auto type) {
    using E = decltype(type);
    auto* param = static_cast<typename E::Stored*>(block.param);
    for (int64_t start = begin, row = 0; start < end; start += block.columns, row++) {
      scale<E>(param + start, std::min(block.columns, end - start), factors[row]);
    }
  });
}

void scale_neurons(const List& params, const Tensor& scale) {
  Blocks blocks = make_blocks(params, {}, {});
  const float* factors = values<float>(scale, ScalarType::Float, {blocks.rows});
  MemoryUse use(blocks.dtype);
  use.write(params);
  use.read(scale);
  use.check();
  // Rows with factor 1 are skipped: masks consist mostly of ones.
  std::vector<Piece> pieces = cut(blocks, [=](int64_t row) { return factors[row] != 1.0f; });
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++) {
      const auto& [b, begin, end] = pieces[p];
      const Block& block = blocks.list[b];
      scale_piece(blocks.dtype, block, begin, end, factors + block.first_row + begin / block.columns);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdfast_cpu, CPU, m) { m.impl("scale_neurons_", TORCH_BOX(&scale_neurons)); }

}  // namespace bdfast
