// zero_changed_: zero the sub-weights of selected rows whose change is at least tau, and count them.
#include "launch.h"
#include "rows.cuh"
#include "runtime.cuh"

namespace bdfast {
namespace cuda {
namespace {

template <class E>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    zero_rows(Table table, const bool* neurons, const float* tau, unsigned long long* count) {
  using T = typename E::Stored;
  Piece piece = table.pieces[blockIdx.x];
  const Entry& entry = table.entries[piece.entry];
  T* params = static_cast<T*>(entry.data[0]);
  const T *xs = static_cast<const T*>(entry.data[1]), *refs = static_cast<const T*>(entry.data[2]);
  int64_t first_row = entry.first_row;
  float threshold = *tau;
  int mine = 0;
  for_rows(entry, piece, [&](int64_t row, int64_t begin, int64_t n, Team team) {
    if (!neurons[first_row + row]) return;
    T* param = params + begin;
    const T *x = xs + begin, *ref = refs + begin;
    // A NaN tau selects exactly the NaN changes.
    auto is_chosen = [&](T a, T b) {
      float change = fabsf(E::load(a) - E::load(b));
      return isnan(threshold) ? isnan(change) : change >= threshold;
    };
    auto packs = [&](int64_t i) {
      Pack<E> pack = load_pack<E>(param + i), a = load_pack<E>(x + i), b = load_pack<E>(ref + i);
#pragma unroll
      for (int k = 0; k < Pack<E>::size; k++) {
        bool chosen = is_chosen(a.values[k], b.values[k]);
        pack.values[k] = chosen ? T{0} : pack.values[k];
        mine += chosen;
      }
      store_pack<E>(param + i, pack);
    };
    auto single = [&](int64_t i) {
      bool chosen = is_chosen(x[i], ref[i]);
      param[i] = chosen ? T{0} : param[i];
      mine += chosen;
    };
    for_elements<E>(team, n, packs, single, param, x, ref);
  });
  int total = total_of_block<Sum>(mine);
  // A sum of integers: the order does not matter.
  if (threadIdx.x == 0 && total > 0) atomicAdd(count, static_cast<unsigned long long>(total));
}

}  // namespace

void zero_changed(const HostList& list, Dtype dtype, const bool* neurons, const float* tau, int64_t* count,
                  const Device& device) {
  Planned plan = resident(list, Split::kRows, device);
  clear(count, sizeof(int64_t), device);
  if (plan.pieces == 0) return;
  auto* counter = reinterpret_cast<unsigned long long*>(count);
  with_type(dtype, [&](auto type) {
    auto kernel = zero_rows<decltype(type)>;
    BDFAST_LAUNCH(kernel, plan.pieces, device.stream, plan.table, neurons, tau, counter);
    check_launch("zero_changed_");
  });
}

}  // namespace cuda
}  // namespace bdfast
