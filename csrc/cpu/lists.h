// What the kernels ask of the lists they are given. Python tries them as they come and looks for the reason only where
// they are refused: it can name the argument, and make dense copies of what no kernel reads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace bdfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using List = std::vector<Tensor>;

#define BDFAST_REFUSE_UNLESS(condition) \
  STD_TORCH_CHECK(condition, "the arguments cannot be used as they are; call the functions in bdfast.ops")

inline bool same(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// Whether each row is one block of memory, in any order inside, and the blocks follow each other.
inline bool rows_are_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  auto sizes = x.sizes(), strides = x.strides();
  int64_t rows = sizes[0], columns = x.numel() / std::max<int64_t>(1, rows);
  if (rows != 1 && strides[0] != columns) return false;
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (size_t i = 1; i < sizes.size(); i++) {
    if (sizes[i] > 1) steps.emplace_back(strides[i], sizes[i]);
  }
  std::sort(steps.begin(), steps.end());
  int64_t span = 1;
  for (const auto& [stride, size] : steps) {
    if (stride != span) return false;
    span *= size;
  }
  return span == columns;
}

// Lists of one length, dtype and device; entries of one shape and one order in memory, with dense rows. Lists that an
// op does without are empty, but for the first.
inline ScalarType check_lists(std::initializer_list<const List*> lists) {
  const List& first = **lists.begin();
  BDFAST_REFUSE_UNLESS(!first.empty());
  ScalarType dtype = first[0].scalar_type();
  BDFAST_REFUSE_UNLESS(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half);
  for (const List* list : lists) {
    if (list->empty()) continue;
    BDFAST_REFUSE_UNLESS(list->size() == first.size());
    for (size_t i = 0; i < first.size(); i++) {
      const Tensor &x = (*list)[i], &lead = first[i];
      BDFAST_REFUSE_UNLESS(x.is_cpu() && x.scalar_type() == dtype);
      if (list == &first) {
        BDFAST_REFUSE_UNLESS(x.dim() > 0 && rows_are_dense(x));
      } else {
        // Equal strides, or both contiguous: those of dimensions of size 1 may then differ.
        BDFAST_REFUSE_UNLESS(same(x.sizes(), lead.sizes()) &&
                             (same(x.strides(), lead.strides()) || (x.is_contiguous() && lead.is_contiguous())));
      }
    }
  }
  return dtype;
}

// A list that is written holds no memory twice, and shares none with the lists in `others`.
inline void check_written(const List& written, std::initializer_list<const List*> others) {
  std::vector<const void*> addresses;
  addresses.reserve(written.size());
  for (const Tensor& x : written) {
    if (x.numel() > 0) addresses.push_back(x.const_data_ptr());
  }
  std::sort(addresses.begin(), addresses.end());
  BDFAST_REFUSE_UNLESS(std::adjacent_find(addresses.begin(), addresses.end()) == addresses.end());
  for (const List* list : others) {
    for (const Tensor& x : *list) {
      BDFAST_REFUSE_UNLESS(x.numel() == 0 ||
                           !std::binary_search(addresses.begin(), addresses.end(), x.const_data_ptr()));
    }
  }
}

// The values of a vector of this length.
template <class T>
const T* vector_values(const Tensor& vector, ScalarType dtype, int64_t size) {
  BDFAST_REFUSE_UNLESS(vector.is_cpu() && vector.scalar_type() == dtype && vector.dim() == 1 &&
                       vector.numel() == size && vector.is_contiguous());
  return static_cast<const T*>(vector.const_data_ptr());
}

// A single number.
inline float number(const Tensor& x) {
  BDFAST_REFUSE_UNLESS(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 0);
  return *static_cast<const float*>(x.const_data_ptr());
}

}  // namespace bdfast
