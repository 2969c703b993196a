// Lists of tensors as flat memory, for ops that treat every element alike: rows play no part here.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace bdfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The elements [begin, end) of entry `tensor` of the lists.
struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t end;
};

// Entry i of N lists: the first elements, in the order of the lists; null where a list was left out.
template <size_t N>
struct FlatLists {
  std::vector<std::array<void*, N>> entries;
  std::vector<Chunk> chunks;
  ScalarType dtype;
};

// As long as a piece of rows. Shapes alone decide about the cut, never the number of threads: sums that are added up
// in the order of the chunks repeat bit for bit.
constexpr int64_t kChunkElements = 32768;

// Arguments were checked in Python, where messages can name them; this repeats what memory safety rests on. The lists
// that are written to stay const here, as tensors are handles.
template <size_t N>
FlatLists<N> make_flat(const std::array<const std::vector<Tensor>*, N>& lists) {
  const std::vector<Tensor>& first = *lists[0];
  STD_TORCH_CHECK(!first.empty(), "the list is empty; call the functions in bdfast.ops");
  FlatLists<N> flat{{}, {}, first[0].scalar_type()};
  STD_TORCH_CHECK(
      flat.dtype == ScalarType::Float || flat.dtype == ScalarType::BFloat16 || flat.dtype == ScalarType::Half,
      "the dtype is not float32, bfloat16 or float16; call the functions in bdfast.ops");
  flat.entries.resize(first.size());
  for (size_t i = 0; i < first.size(); i++) {
    int64_t numel = first[i].numel();
    for (size_t list = 0; list < N; list++) {
      if (lists[list]->empty()) continue;
      STD_TORCH_CHECK(lists[list]->size() == first.size(),
                      "the lists differ in length; call the functions in bdfast.ops");
      const Tensor& x = (*lists[list])[i];
      STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == flat.dtype && x.numel() == numel,
                      "the tensors of an entry differ in device, dtype or shape; call the functions in bdfast.ops");
      flat.entries[i][list] = x.mutable_data_ptr();
    }
    for (int64_t begin = 0; begin < numel; begin += kChunkElements) {
      flat.chunks.push_back({static_cast<int64_t>(i), begin, std::min(numel, begin + kChunkElements)});
    }
  }
  return flat;
}

// Calls body(c) for every chunk; one thread alone where there is less than a chunk of work for two.
template <size_t N, class Body>
void for_chunks(const FlatLists<N>& flat, const Body& body) {
  int64_t elements = 0, count = static_cast<int64_t>(flat.chunks.size());
  for (const Chunk& chunk : flat.chunks) elements += chunk.end - chunk.begin;
  int64_t full = std::max<int64_t>(1, elements / kChunkElements);
  torch::stable::parallel_for(0, count, (count + full - 1) / full, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; c++) body(c);
  });
}

}  // namespace bdfast
