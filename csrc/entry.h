// A tensor of a list, as it comes from torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

// Torch 2.13 and newer know it, and then say what went wrong.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace bdfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch::stable::Tensor allocates for its shared ownership and calls torch for every property. On lists of small
// tensors most of the time of an op would go there.
class Entry {
 public:
  explicit Entry(AtenTensorHandle handle) : handle_(handle) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle, &numel_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type_));
  }

  int64_t dim() const { return dim_; }
  int64_t numel() const { return numel_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  int32_t device_type() const { return device_type_; }
  int32_t dtype_code() const { return dtype_; }

  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t d = dim_; numel_ > 0 && d-- > 0; step *= sizes_[d]) {
      if (sizes_[d] != 1 && strides_[d] != step) return false;
    }
    return true;
  }

  bool has_sizes_of(const Entry& other) const {
    return dim_ == other.dim_ && std::equal(sizes_, sizes_ + dim_, other.sizes_);
  }

  // Strides of dimensions of size 1 are ignored.
  bool has_strides_of(const Entry& other) const {
    for (int64_t d = 0; d < dim_; d++) {
      if (sizes_[d] != 1 && strides_[d] != other.strides_[d]) return false;
    }
    return true;
  }

  int32_t device_index() const {
    int32_t index = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle_.get(), &index));
    return index;
  }

  const void* const_data_ptr() const {
    const void* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_.get(), &data));
    return data;
  }

  void* mutable_data_ptr() const {
    void* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_.get(), &data));
    return data;
  }

 private:
  struct Delete {
    void operator()(AtenTensorOpaque* handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
  int64_t dim_, numel_;
  int64_t *sizes_, *strides_;  // owned by torch, valid as long as the handle
  int32_t dtype_, device_type_;
};

using List = std::vector<Entry>;

}  // namespace bdfast

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

// Converts kernel arguments to lists of entries.
template <>
struct ToImpl<bdfast::Entry> {
  static bdfast::Entry call(StableIValue value, uint64_t, bool) { return bdfast::Entry(to<AtenTensorHandle>(value)); }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)
