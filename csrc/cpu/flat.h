// Lists of tensors as flat memory, for ops that treat every element alike: rows play no part here.
#pragma once

#include <array>

#include "lists.h"

namespace bdfast {

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

// The lists were checked. Those that are written stay const here, as tensors are handles.
template <size_t N>
FlatLists<N> make_flat(ScalarType dtype, const std::array<const List*, N>& lists) {
  FlatLists<N> flat{std::vector<std::array<void*, N>>(lists[0]->size()), {}, dtype};
  for (size_t i = 0; i < flat.entries.size(); i++) {
    for (size_t list = 0; list < N; list++) {
      flat.entries[i][list] = lists[list]->empty() ? nullptr : (*lists[list])[i].mutable_data_ptr();
    }
    int64_t numel = (*lists[0])[i].numel();
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
