// A list of tensors as rows (neurons), and how the rows are split into pieces for the threads.
#pragma once

#include <type_traits>

#include "../lists.h"
#include "split.h"

namespace bdfast {

// One entry of the lists. Row r starts at element r * columns, in the same memory order in all three tensors.
struct Block {
  void* param;      // null if the op writes no tensor
  const void* x;    // null if the op only writes
  const void* ref;  // null for zeros
  int64_t rows;
  int64_t columns;
  int64_t first_row;  // in the count over the whole list
};

struct Blocks {
  std::vector<Block> list;
  ScalarType dtype;
  int64_t rows;
};

inline Blocks make_blocks(const List& params, const List& xs, const List& refs) {
  const List& first = xs.empty() ? params : xs;
  Blocks blocks{{}, check_lists({&first, &params, &refs}), 0};
  blocks.list.reserve(first.size());
  for (size_t i = 0; i < first.size(); i++) {
    int64_t rows = first[i].size(0), numel = first[i].numel();
    blocks.list.push_back(
        {params.empty() ? nullptr : params[i].mutable_data_ptr(), xs.empty() ? nullptr : xs[i].const_data_ptr(),
         refs.empty() ? nullptr : refs[i].const_data_ptr(), rows, rows == 0 ? 0 : numel / rows, blocks.rows});
    blocks.rows += rows;
  }
  return blocks;
}

struct EveryRow {
  bool operator()(int64_t) const { return true; }
};

// Splits the selected rows into pieces of similar size. The pieces depend on shapes and selection, never on the number
// of threads, so results that are combined in the order of the pieces always have the same bits.
template <class Selected>
std::vector<Piece> cut(const Blocks& blocks, Selected selected) {
  std::vector<Piece> pieces;
  for (size_t b = 0; b < blocks.list.size(); b++) {
    const Block& block = blocks.list[b];
    if (block.columns == 0) continue;
    int64_t rows_per_piece = std::max<int64_t>(1, kPieceElements / block.columns);
    for (int64_t row = 0; row < block.rows;) {
      int64_t first = row, last = std::min(block.rows, row + rows_per_piece);
      if constexpr (std::is_same_v<Selected, EveryRow>) row = last;
      while (row < last && selected(block.first_row + row)) row++;
      int64_t end = row * block.columns;
      for (int64_t begin = first * block.columns; begin < end; begin += kPieceElements) {
        pieces.push_back({static_cast<int64_t>(b), begin, std::min(end, begin + kPieceElements)});
      }
      if (row < block.rows && !selected(block.first_row + row)) row++;
    }
  }
  return pieces;
}

}  // namespace bdfast
