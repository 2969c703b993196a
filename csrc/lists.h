// What the kernels ask of the lists they are given. Python tries them as they come and looks for the reason only where
// they are refused: it can name the argument, and make dense copies of what no kernel reads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "entry.h"

namespace bdfast {

#define BDFAST_REFUSE_UNLESS(condition) \
  STD_TORCH_CHECK(condition, "the arguments cannot be used as they are; call the functions in bdfast.ops")

// Whether each row is one block of memory, in any order inside, and the blocks follow each other.
inline bool rows_are_dense(const Entry& x) {
  if (x.is_contiguous()) return true;
  int64_t rows = x.size(0), columns = x.numel() / std::max<int64_t>(1, rows);
  if (rows != 1 && x.stride(0) != columns) return false;
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t d = 1; d < x.dim(); d++) {
    if (x.size(d) > 1) steps.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(steps.begin(), steps.end());
  int64_t span = 1;
  for (const auto& [stride, size] : steps) {
    if (stride != span) return false;
    span *= size;
  }
  return span == columns;
}

inline ScalarType checked_dtype(const Entry& x) {
  if (x.dtype_code() == aoti_torch_dtype_float32()) return ScalarType::Float;
  if (x.dtype_code() == aoti_torch_dtype_bfloat16()) return ScalarType::BFloat16;
  BDFAST_REFUSE_UNLESS(x.dtype_code() == aoti_torch_dtype_float16());
  return ScalarType::Half;
}

// Lists of one length, dtype and device; entries of one shape and one order in memory, with dense rows. Lists that an
// op does without are empty, but for the first.
inline ScalarType check_lists(std::initializer_list<const List*> lists,
                              int32_t device_type = aoti_torch_device_type_cpu()) {
  const List& first = **lists.begin();
  BDFAST_REFUSE_UNLESS(!first.empty());
  ScalarType dtype = checked_dtype(first[0]);
  for (const List* list : lists) {
    if (list->empty()) continue;
    BDFAST_REFUSE_UNLESS(list->size() == first.size());
    for (size_t i = 0; i < first.size(); i++) {
      const Entry &x = (*list)[i], &lead = first[i];
      BDFAST_REFUSE_UNLESS(x.device_type() == device_type && x.dtype_code() == first[0].dtype_code());
      if (list == &first) {
        BDFAST_REFUSE_UNLESS(x.dim() > 0 && rows_are_dense(x));
      } else {
        // Equal strides, or both contiguous: those of dimensions of size 1 may then differ.
        BDFAST_REFUSE_UNLESS(x.has_sizes_of(lead) &&
                             (x.has_strides_of(lead) || (x.is_contiguous() && lead.is_contiguous())));
      }
    }
  }
  return dtype;
}

// A list that is written holds no memory twice, and shares none with the lists in `others`.
inline void check_written(const List& written, std::initializer_list<const List*> others) {
  std::vector<const void*> addresses;
  addresses.reserve(written.size());
  for (const Entry& x : written) {
    if (x.numel() > 0) addresses.push_back(x.const_data_ptr());
  }
  std::sort(addresses.begin(), addresses.end());
  BDFAST_REFUSE_UNLESS(std::adjacent_find(addresses.begin(), addresses.end()) == addresses.end());
  for (const List* list : others) {
    for (const Entry& x : *list) {
      bool found = std::binary_search(addresses.begin(), addresses.end(), x.const_data_ptr());
      BDFAST_REFUSE_UNLESS(!found || x.numel() == 0);
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

// A number or a vector, not initialised.
inline Tensor new_result(std::vector<int64_t> sizes, int32_t dtype, int32_t device_type = aoti_torch_device_type_cpu(),
                         int32_t device_index = 0) {
  std::vector<int64_t> strides(sizes.size(), 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// A single number.
inline float number(const Tensor& x) {
  BDFAST_REFUSE_UNLESS(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 0);
  return *static_cast<const float*>(x.const_data_ptr());
}

}  // namespace bdfast
