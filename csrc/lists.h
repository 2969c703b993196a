// The checks that all kernels make before they write. A kernel only refuses; Python then finds the argument to name, or
// copies tensors that no kernel can read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "entry.h"

namespace bdfast {

#define BDFAST_REFUSE_UNLESS(condition) \
  STD_TORCH_CHECK(condition, "the arguments cannot be used as they are; call the functions in bdfast.ops")

// Whether each row is one contiguous block of memory, in any order inside, and the blocks are adjacent.
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

// Whether there is memory at `data`, and its address is a multiple of the item size.
inline bool is_usable(const void* data, size_t item_size) {
  return data != nullptr && reinterpret_cast<uintptr_t>(data) % item_size == 0;
}

inline size_t item_size(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

inline ScalarType checked_dtype(const Entry& x) {
  if (x.dtype_code() == aoti_torch_dtype_float32()) return ScalarType::Float;
  if (x.dtype_code() == aoti_torch_dtype_bfloat16()) return ScalarType::BFloat16;
  BDFAST_REFUSE_UNLESS(x.dtype_code() == aoti_torch_dtype_float16());
  return ScalarType::Half;
}

// Lists of equal length, dtype and device; entries of equal shape and memory order, with dense rows and aligned
// addresses. All lists but the first may be empty, where the op does without them.
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
      BDFAST_REFUSE_UNLESS(x.numel() == 0 || is_usable(x.const_data_ptr(), item_size(dtype)));
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

// The address ranges that a call reads and writes. A range that is written must not overlap any other, or the results
// would depend on the order of the threads. The lists were checked before, so entries have no gaps.
class MemoryUse {
 public:
  explicit MemoryUse(ScalarType dtype) : item_size_(item_size(dtype)) {}

  void write(const List& list) {
    for (const Entry& x : list) add(x.const_data_ptr(), x.numel() * item_size_, true);
  }

  void read(const List& list) {
    for (const Entry& x : list) add(x.const_data_ptr(), x.numel() * item_size_, false);
  }

  // Entry i may be the same tensor as entry i of `written`: the kernels read each element before they write it.
  void read(const List& list, const List& written) {
    for (size_t i = 0; i < list.size(); i++) {
      const void* data = list[i].const_data_ptr();
      if (data != written[i].const_data_ptr()) add(data, list[i].numel() * item_size_, false);
    }
  }

  void read(const Tensor& vector) {
    add(vector.const_data_ptr(), vector.numel() * static_cast<int64_t>(vector.element_size()), false);
  }

  void check() {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    uintptr_t written_end = 0, end = 0;
    for (const Range& range : ranges_) {
      BDFAST_REFUSE_UNLESS(range.begin >= (range.written ? end : written_end));
      end = std::max(end, range.end);
      if (range.written) written_end = std::max(written_end, range.end);
    }
  }

 private:
  struct Range {
    uintptr_t begin;
    uintptr_t end;
    bool written;
  };

  void add(const void* data, int64_t bytes, bool written) {
    uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    if (bytes > 0) ranges_.push_back({begin, begin + static_cast<uintptr_t>(bytes), written});
  }

  int64_t item_size_;
  std::vector<Range> ranges_;
};

// The data of a CPU tensor of this dtype and shape (a number or a vector).
template <class T>
const T* values(const Tensor& x, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  BDFAST_REFUSE_UNLESS(x.is_cpu() && x.scalar_type() == dtype && x.dim() == static_cast<int64_t>(sizes.size()) &&
                       std::equal(sizes.begin(), sizes.end(), x.sizes().begin()) && x.is_contiguous());
  const void* data = x.const_data_ptr();
  BDFAST_REFUSE_UNLESS(x.numel() == 0 || is_usable(data, sizeof(T)));
  return static_cast<const T*>(data);
}

// An uninitialised number or vector.
inline Tensor new_result(std::vector<int64_t> sizes, int32_t dtype, int32_t device_type = aoti_torch_device_type_cpu(),
                         int32_t device_index = 0) {
  std::vector<int64_t> strides(sizes.size(), 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

}  // namespace bdfast
