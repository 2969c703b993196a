// Element types, and packs of them of sixteen bytes.
#pragma once

#include <cstdint>

#include "plan.h"
#include "portable.cuh"

namespace bdfast {
namespace cuda {

struct Float32 {
  using Stored = float;
  static __device__ float load(Stored value) { return value; }
  static __device__ Stored store(float value) { return value; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static __device__ float load(Stored value) { return __uint_as_float(static_cast<unsigned>(value) << 16); }
  static __device__ Stored store(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
};

struct Float16 {
  using Stored = uint16_t;
  static __device__ float load(Stored value) { return __half2float(__ushort_as_half(value)); }
  static __device__ Stored store(float value) { return __half_as_ushort(__float2half_rn(value)); }
};

// Calls f(E{}) for the element type E.
template <class F>
void with_type(Dtype dtype, F f) {
  if (dtype == Dtype::kBFloat16) return f(BFloat16{});
  if (dtype == Dtype::kFloat16) return f(Float16{});
  f(Float32{});
}

constexpr int kPackBytes = 16;

template <class E>
struct alignas(kPackBytes) Pack {
  static constexpr int size = kPackBytes / static_cast<int>(sizeof(typename E::Stored));
  typename E::Stored values[size];
};

template <class E>
__device__ __forceinline__ Pack<E> load_pack(const typename E::Stored* at) {
  // The address comes from a table, so the compiler has to be told that it is in global memory.
  uint4 bits = __ldcg(reinterpret_cast<const uint4*>(at));
  Pack<E> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

template <class E>
__device__ __forceinline__ void store_pack(typename E::Stored* at, const Pack<E>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, sizeof(pack));
  __stcg(reinterpret_cast<uint4*>(at), bits);
}

// The threads that share a range of elements: one thread, a warp or the block.
struct Team {
  int index;
  int size;
};

__device__ __forceinline__ uintptr_t beyond_pack(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % kPackBytes;
}

// How many of n elements precede the first pack boundary; n if the arrays do not have it at the same element.
template <class T, class... Rest>
__device__ __forceinline__ int64_t before_packs(int64_t n, const T* at, const Rest*... rest) {
  uintptr_t beyond = beyond_pack(at);
  int64_t head = static_cast<int64_t>((kPackBytes - beyond) % kPackBytes / sizeof(T));
  return (true && ... && (beyond_pack(rest) == beyond)) && head < n ? head : n;
}

// Calls packs(i) for every whole pack, with the index of its first element, and single(i) for every other element.
template <class E, class Packs, class Single, class... Arrays>
__device__ __forceinline__ void for_elements(const Team& team, int64_t n, Packs packs, Single single,
                                             const Arrays*... arrays) {
  constexpr int64_t kSize = Pack<E>::size;
  // Enough loads in flight per thread to use the memory bandwidth; more would cost registers.
  [[maybe_unused]] constexpr int kUnrolled = sizeof...(Arrays) > 3 ? 1 : 2;
  int64_t head = before_packs(n, arrays...);
  int64_t tail = head + (n - head) / kSize * kSize;
#pragma unroll 1
  for (int64_t i = team.index; i < head; i += team.size) single(i);
#pragma unroll kUnrolled
  for (int64_t i = head + team.index * kSize; i < tail; i += team.size * kSize) packs(i);
#pragma unroll 1
  for (int64_t i = tail + team.index; i < n; i += team.size) single(i);
}

}  // namespace cuda
}  // namespace bdfast
