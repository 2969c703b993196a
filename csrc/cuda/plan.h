// Splits the work on a list of tensors for a GPU: plain C++ that needs neither CUDA nor torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace bdfast {
namespace cuda {

constexpr int kMostLists = 6;
// Elements per thread block: a ResNet-18 gives 700 pieces, enough for all multiprocessors of a GPU.
constexpr int64_t kPieceElements = 16384;
// Longer rows are split among several blocks.
constexpr int64_t kLongestRow = 65536;

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// One entry of the lists, as passed to an op. Row r starts at element r * columns.
struct HostTensor {
  void* data[kMostLists];  // null for a list that was left out
  int64_t rows;
  int64_t columns;
};

using HostList = std::vector<HostTensor>;

// A non-empty entry, whose null pointers show which lists were left out (those of an empty tensor are null anyway). The
// list must have an element.
inline const HostTensor& filled(const HostList& list) {
  return *std::find_if(list.begin(), list.end(), [](const HostTensor& x) { return x.rows * x.columns > 0; });
}

// The part of it that the kernels read.
struct Entry {
  void* data[kMostLists];
  int64_t columns;
  int64_t first_row;  // in the count over the whole list
};

// The elements [begin, end) of an entry: some whole rows, or a part of one. `part` numbers the pieces whose results are
// combined afterwards; -1 for others.
struct Piece {
  int64_t begin;
  int64_t end;
  int32_t entry;
  int32_t part;
};

// The parts [first, last) are combined into one result: of a row, a tensor, or all tensors.
struct Group {
  int64_t result;
  int32_t first;
  int32_t last;
};

struct Plan {
  std::vector<Entry> entries;
  std::vector<Piece> pieces;
  std::vector<Group> groups;
  int64_t rows = 0;
  int32_t parts = 0;
  bool has_empty_rows = false;  // rows without columns, which no piece covers
};

inline Plan plan_entries(const HostList& list) {
  Plan plan;
  for (const HostTensor& tensor : list) {
    Entry entry{{}, tensor.columns, plan.rows};
    std::copy(tensor.data, tensor.data + kMostLists, entry.data);
    plan.entries.push_back(entry);
    plan.rows += tensor.rows;
    plan.has_empty_rows = plan.has_empty_rows || (tensor.rows > 0 && tensor.columns == 0);
  }
  return plan;
}

// Pieces of whole rows where possible.
inline Plan plan_rows(const HostList& list) {
  Plan plan = plan_entries(list);
  for (size_t i = 0; i < list.size(); i++) {
    int64_t rows = list[i].rows, columns = list[i].columns;
    int32_t entry = static_cast<int32_t>(i);
    if (columns == 0) continue;
    if (columns <= kLongestRow) {
      int64_t step = std::max<int64_t>(1, kPieceElements / columns);
      for (int64_t row = 0; row < rows; row += step) {
        plan.pieces.push_back({row * columns, std::min(rows, row + step) * columns, entry, -1});
      }
      continue;
    }
    for (int64_t row = 0; row < rows; row++) {
      Group group{plan.entries[i].first_row + row, plan.parts, 0};
      for (int64_t begin = 0; begin < columns; begin += kPieceElements) {
        int64_t end = std::min(columns, begin + kPieceElements);
        plan.pieces.push_back({row * columns + begin, row * columns + end, entry, plan.parts++});
      }
      group.last = plan.parts;
      plan.groups.push_back(group);
    }
  }
  return plan;
}

// Pieces of tensors as flat memory. Their parts are combined into one result per tensor, or a single one.
inline Plan plan_flat(const HostList& list, bool per_tensor) {
  Plan plan = plan_entries(list);
  for (size_t i = 0; i < list.size(); i++) {
    Group group{static_cast<int64_t>(i), plan.parts, 0};
    int64_t elements = list[i].rows * list[i].columns;
    for (int64_t begin = 0; begin < elements; begin += kPieceElements) {
      plan.pieces.push_back({begin, std::min(elements, begin + kPieceElements), static_cast<int32_t>(i), plan.parts++});
    }
    group.last = plan.parts;
    if (per_tensor) plan.groups.push_back(group);
  }
  if (!per_tensor) plan.groups.push_back({0, 0, plan.parts});
  return plan;
}

// How a list is split.
enum class Split { kRows, kFlat, kFlatPerTensor };

inline Plan plan_of(const HostList& list, Split split) {
  return split == Split::kRows ? plan_rows(list) : plan_flat(list, split == Split::kFlatPerTensor);
}

// The plan as one block of bytes: entries, pieces, groups.
inline std::vector<char> packed(const Plan& plan) {
  size_t entries = plan.entries.size() * sizeof(Entry), pieces = plan.pieces.size() * sizeof(Piece);
  std::vector<char> bytes(entries + pieces + plan.groups.size() * sizeof(Group));
  if (entries) std::memcpy(bytes.data(), plan.entries.data(), entries);
  if (pieces) std::memcpy(bytes.data() + entries, plan.pieces.data(), pieces);
  if (!plan.groups.empty()) {
    std::memcpy(bytes.data() + entries + pieces, plan.groups.data(), plan.groups.size() * sizeof(Group));
  }
  return bytes;
}

// A packed plan in device memory.
struct Table {
  const Entry* entries;
  const Piece* pieces;
  const Group* groups;
};

// What the host has to know of a plan whose table is in device memory.
struct Planned {
  Table table;
  size_t pieces;
  size_t groups;
  int64_t rows;
  int32_t parts;
  bool has_empty_rows;
};

inline Planned planned_at(const char* memory, const Plan& plan) {
  const char* pieces = memory + plan.entries.size() * sizeof(Entry);
  const char* groups = pieces + plan.pieces.size() * sizeof(Piece);
  Table table{reinterpret_cast<const Entry*>(memory), reinterpret_cast<const Piece*>(pieces),
              reinterpret_cast<const Group*>(groups)};
  return {table, plan.pieces.size(), plan.groups.size(), plan.rows, plan.parts, plan.has_empty_rows};
}

}  // namespace cuda
}  // namespace bdfast
