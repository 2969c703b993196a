// Lists of tensors as flat memory, for elementwise ops that need no rows.
#pragma once

#include <array>

#include "../lists.h"
#include "memory.h"
#include "split.h"

namespace bdfast {

// Addresses of entry i in N lists, in the order of the lists; null for a list that was left out.
template <size_t N>
struct FlatLists {
  std::vector<std::array<void*, N>> entries;
  std::vector<Piece> pieces;
  ScalarType dtype;
  bool streamed;  // whether memory that is written without being read bypasses the caches
};

// The lists were checked. Written lists are const here too, because entries are handles.
template <size_t N>
FlatLists<N> make_flat(ScalarType dtype, const std::array<const List*, N>& lists) {
  FlatLists<N> flat{std::vector<std::array<void*, N>>(lists[0]->size()), {}, dtype, false};
  for (size_t i = 0; i < flat.entries.size(); i++) {
    for (size_t list = 0; list < N; list++) {
      flat.entries[i][list] = lists[list]->empty() ? nullptr : (*lists[list])[i].mutable_data_ptr();
    }
    int64_t numel = (*lists[0])[i].numel();
    for (int64_t begin = 0; begin < numel; begin += kPieceElements) {
      flat.pieces.push_back({static_cast<int64_t>(i), begin, std::min(numel, begin + kPieceElements)});
    }
  }
  flat.streamed = count_elements(flat.pieces) * (dtype == ScalarType::Float ? 4 : 2) >= kStreamedBytes;
  return flat;
}

// Calls body(p) for every piece.
template <size_t N, class Body>
void for_each_piece(const FlatLists<N>& flat, const Body& body) {
  for_pieces(flat.pieces, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++) body(p);
  });
}

}  // namespace bdfast
