// scale_neurons_: multiply every row by its own factor.
#include "launch.h"
#include "rows.cuh"
#include "runtime.cuh"

namespace bdfast {
namespace cuda {
namespace {

template <class E>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm) scale_rows(Table table, const float* scale) {
  using T = typename E::Stored;
  Piece piece = table.pieces[blockIdx.x];
  const Entry& entry = table.entries[piece.entry];
  T* params = static_cast<T*>(entry.data[0]);
  int64_t first_row = entry.first_row;
  for_rows(entry, piece, [&](int64_t row, int64_t begin, int64_t n, Team team) {
    float factor = scale[first_row + row];
    if (factor == 1.0f) return;  // masks consist mostly of ones
    T* param = params + begin;
    auto packs = [&](int64_t i) {
      Pack<E> pack = load_pack<E>(param + i);
#pragma unroll
      for (int k = 0; k < Pack<E>::size; k++) pack.values[k] = E::store(E::load(pack.values[k]) * factor);
      store_pack<E>(param + i, pack);
    };
    auto single = [&](int64_t i) { param[i] = E::store(E::load(param[i]) * factor); };
    for_elements<E>(team, n, packs, single, param);
  });
}

}  // namespace

void scale_neurons(const HostList& list, Dtype dtype, const float* scale, const Device& device) {
  Planned plan = resident(list, Split::kRows, device);
  if (plan.pieces == 0) return;
  with_type(dtype, [&](auto type) {
    auto kernel = scale_rows<decltype(type)>;
    BDFAST_LAUNCH(kernel, plan.pieces, device.stream, plan.table, scale);
    check_launch("scale_neurons_");
  });
}

}  // namespace cuda
}  // namespace bdfast
