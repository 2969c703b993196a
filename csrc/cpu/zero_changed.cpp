// zero_changed_: zero the sub-weights of selected rows whose change is at least tau, and count them.
#include <atomic>

#include "rows.h"
#include "simd.h"

namespace bdfast {
namespace {

// A NaN tau selects exactly the NaN changes.
template <bool kTauIsNan, class E, class T = typename E::Stored>
inline int64_t zero(T* param, const T* x, const T* ref, int64_t n, float tau) {
  auto zeroed = [=](int64_t i) {
    float d = change<true, E>(x, ref, i);
    bool chosen = kTauIsNan ? d != d : d >= tau;
    param[i] = chosen ? T{0} : param[i];  // no branch; kept elements keep their bits
    return chosen ? 1.0f : 0.0f;
  };
  return static_cast<int64_t>(sum_in_lanes(n, zeroed, param, x, ref));
}

BDFAST_VECTORISED int64_t zero_piece(ScalarType dtype, const Block& block, int64_t begin, int64_t n, float tau) {
  return with_type(dtype, [=, &block](auto type) {
    using E = decltype(type);
    using T = typename E::Stored;
    T* param = static_cast<T*>(block.param) + begin;
    const T* x = static_cast<const T*>(block.x) + begin;
    const T* ref = static_cast<const T*>(block.ref) + begin;
    return std::isnan(tau) ? zero<true, E>(param, x, ref, n, tau) : zero<false, E>(param, x, ref, n, tau);
  });
}

Tensor zero_changed(const List& params, const List& xs, const List& refs, const Tensor& neurons, const Tensor& tau) {
  BDFAST_REFUSE_UNLESS(xs.size() == params.size() && refs.size() == params.size());
  Blocks blocks = make_blocks(params, xs, refs);
  const bool* selected = values<bool>(neurons, ScalarType::Bool, {blocks.rows});
  float threshold = *values<float>(tau, ScalarType::Float, {});
  MemoryUse use(blocks.dtype);
  use.write(params);
  use.read(xs, params);
  use.read(refs, params);
  use.read(neurons);
  use.read(tau);
  use.check();
  std::vector<Piece> pieces = cut(blocks, [=](int64_t row) { return selected[row]; });

  std::atomic<int64_t> count{0};
  for_pieces(pieces, [&](int64_t first, int64_t last) {
    int64_t mine = 0;
    for (int64_t p = first; p < last; p++) {
      const auto& [b, begin, end] = pieces[p];
      mine += zero_piece(blocks.dtype, blocks.list[b], begin, end - begin, threshold);
    }
    count += mine;
  });

  Tensor result = new_result({}, aoti_torch_dtype_int64());
  *static_cast<int64_t*>(result.mutable_data_ptr()) = count;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdfast_cpu, CPU, m) { m.impl("zero_changed_", TORCH_BOX(&zero_changed)); }

}  // namespace bdfast
