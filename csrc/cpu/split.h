// Distribution of pieces of work among the threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace bdfast {

// Large enough to hide the overhead of a piece, small enough to keep many threads busy with a small network. The pieces
// depend on shapes, never on the number of threads, so results combined in their order always have the same bits.
constexpr int64_t kPieceElements = 32768;

// The elements [begin, end) of an entry of the lists.
struct Piece {
  int64_t entry;
  int64_t begin;
  int64_t end;
};

inline int64_t count_elements(const std::vector<Piece>& pieces) {
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.end - piece.begin;
  return total;
}

// Calls body(first, last) on ranges of pieces, so that all threads have about as many elements even if some pieces are
// small. Uses one thread if there are fewer elements than two full pieces.
template <class Body>
void for_pieces(const std::vector<Piece>& pieces, const Body& body) {
  std::vector<int64_t> ends;
  ends.reserve(pieces.size());
  int64_t total = 0;
  for (const Piece& piece : pieces) ends.push_back(total += piece.end - piece.begin);
  int64_t shares = std::max<int64_t>(1, total / kPieceElements);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    auto pieces_before = [&](int64_t share) {
      if (share == shares) return static_cast<int64_t>(pieces.size());
      return static_cast<int64_t>(std::upper_bound(ends.begin(), ends.end(), total / shares * share) - ends.begin());
    };
    body(pieces_before(first), pieces_before(last));
  });
}

}  // namespace bdfast
