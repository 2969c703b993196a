// The ops for CUDA tensors: makes the checks that all kernels share and calls the launchers. Needs no CUDA headers, and
// is the only file here that uses torch.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <string>

#include "../lists.h"
#include "launch.h"

namespace bdfast {
namespace {

using cuda::Device;
using cuda::Dtype;
using cuda::HostList;

// torch's stable classes name the stream of a device from 2.13 on; this function is older. It is looked up, as a torch
// without CUDA does not have it.
void* current_stream(int32_t device_index) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "this torch does not name its CUDA streams; use another backend: BDFAST_BACKEND=triton");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device_index, &stream));
  return stream;
}

// Checked lists, their device, and workspace memory for one op. The workspace returns to torch at the end of the call;
// torch reuses it on the same stream, so the kernels have finished with it by then.
class Call {
 public:
  explicit Call(std::initializer_list<const List*> lists)
      : dtype_(check_lists(lists, aoti_torch_device_type_cuda())),
        index_((**lists.begin())[0].device_index()),
        guard_(index_) {
    const List& first = **lists.begin();
    tensors_.resize(first.size());
    for (size_t i = 0; i < first.size(); i++) {
      int64_t rows = first[i].size(0);
      tensors_[i].rows = rows;
      tensors_[i].columns = rows == 0 ? 0 : first[i].numel() / rows;
      rows_ += rows;
    }
    size_t place = 0;
    for (const List* list : lists) {
      for (size_t i = 0; i < tensors_.size(); i++) {
        BDFAST_REFUSE_UNLESS(list->empty() || (*list)[i].device_index() == index_);
        tensors_[i].data[place] = list->empty() ? nullptr : (*list)[i].mutable_data_ptr();
      }
      place++;
    }
    for (; place < cuda::kMostLists; place++) {
      for (auto& tensor : tensors_) tensor.data[place] = nullptr;
    }
    device_.index = index_;
    device_.stream = current_stream(index_);
    device_.allocate = [this](size_t bytes) {
      workspace_.push_back(result({static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8()));
      return workspace_.back().mutable_data_ptr();
    };
  }
  Call(const Call&) = delete;

  const HostList& tensors() const { return tensors_; }
  const Device& device() const { return device_; }
  int64_t rows() const { return rows_; }

  Dtype dtype() const {
    if (dtype_ == ScalarType::BFloat16) return Dtype::kBFloat16;
    return dtype_ == ScalarType::Half ? Dtype::kFloat16 : Dtype::kFloat32;
  }

  Tensor result(std::vector<int64_t> sizes, int32_t dtype) const {
    return new_result(std::move(sizes), dtype, aoti_torch_device_type_cuda(), index_);
  }

  // The values of a tensor of this shape on the device of the lists.
  template <class T>
  const T* values(const Tensor& x, ScalarType dtype, const std::vector<int64_t>& sizes) const {
    BDFAST_REFUSE_UNLESS(x.is_cuda() && x.get_device_index() == index_ && x.scalar_type() == dtype &&
                         x.dim() == static_cast<int64_t>(sizes.size()) && x.is_contiguous() &&
                         std::equal(sizes.begin(), sizes.end(), x.sizes().begin()));
    const void* data = x.const_data_ptr();
    BDFAST_REFUSE_UNLESS(x.numel() == 0 || is_usable(data, sizeof(T)));
    return static_cast<const T*>(data);
  }

  // To check for overlap.
  MemoryUse memory_use() const { return MemoryUse(dtype_); }

 private:
  ScalarType dtype_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  HostList tensors_;
  int64_t rows_ = 0;
  Device device_;
  std::vector<Tensor> workspace_;
};

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

Tensor neuron_norms(const List& xs, const List& refs, double ord) {
  BDFAST_REFUSE_UNLESS(ord == 1 || ord == 2 || std::isinf(ord));
  Call call({&xs, &refs});
  Tensor norms = call.result({call.rows()}, aoti_torch_dtype_float32());
  cuda::neuron_norms(call.tensors(), call.dtype(), ord, data<float>(norms), call.device());
  return norms;
}

Tensor kth_largest_change(const List& xs, const List& refs, const Tensor& neurons, int64_t q) {
  BDFAST_REFUSE_UNLESS(xs.size() == refs.size() && q > 0);
  Call call({&xs, &refs});
  const bool* selected = call.values<bool>(neurons, ScalarType::Bool, {call.rows()});
  Tensor change = call.result({}, aoti_torch_dtype_float32());
  cuda::kth_largest_change(call.tensors(), call.dtype(), selected, q, data<float>(change), call.device());
  return change;
}

Tensor zero_changed(const List& params, const List& xs, const List& refs, const Tensor& neurons, const Tensor& tau) {
  BDFAST_REFUSE_UNLESS(xs.size() == params.size() && refs.size() == params.size());
  Call call({&params, &xs, &refs});
  const bool* selected = call.values<bool>(neurons, ScalarType::Bool, {call.rows()});
  const float* threshold = call.values<float>(tau, ScalarType::Float, {});
  MemoryUse use = call.memory_use();
  use.write(params);
  use.read(xs, params);
  use.read(refs, params);
  use.read(neurons);
  use.read(tau);
  use.check();
  Tensor count = call.result({}, aoti_torch_dtype_int64());
  cuda::zero_changed(call.tensors(), call.dtype(), selected, threshold, data<int64_t>(count), call.device());
  return count;
}

void scale_neurons(const List& params, const Tensor& scale) {
  Call call({&params});
  const float* factors = call.values<float>(scale, ScalarType::Float, {call.rows()});
  MemoryUse use = call.memory_use();
  use.write(params);
  use.read(scale);
  use.check();
  cuda::scale_neurons(call.tensors(), call.dtype(), factors, call.device());
}

Tensor perturb(const List& params, const List& dirs, const List& saved, const std::optional<Tensor>& norm, double rho,
               const std::string& mode_name, const std::string& scope, double eps) {
  BDFAST_REFUSE_UNLESS(dirs.size() == params.size() && saved.size() == params.size());
  Call call({&params, &dirs, &saved});
  cuda::PerturbMode mode = mode_name == "asam"   ? cuda::PerturbMode::kAsam
                           : mode_name == "path" ? cuda::PerturbMode::kPath
                                                 : cuda::PerturbMode::kSam;
  bool per_tensor = scope == "tensor";
  std::vector<int64_t> sizes;
  if (per_tensor) sizes.push_back(static_cast<int64_t>(params.size()));
  const float* known = norm ? call.values<float>(*norm, ScalarType::Float, sizes) : nullptr;
  MemoryUse use = call.memory_use();
  use.write(params);
  use.write(saved);
  use.read(dirs, params);
  if (norm) use.read(*norm);
  use.check();
  Tensor norms = call.result(sizes, aoti_torch_dtype_float32());
  cuda::perturb(call.tensors(), call.dtype(), mode, per_tensor, rho, eps, known, data<float>(norms), call.device());
  return norms;
}

Tensor sharp_step(const List& params, const List& saved, const List& grads, const List& momentum_buffers,
                  const List& first_grads, const List& references, double lr, double momentum, double dampening,
                  bool nesterov, double weight_decay, double alpha, bool maximize) {
  BDFAST_REFUSE_UNLESS(saved.size() == params.size() && grads.size() == params.size());
  Call call({&params, &saved, &grads, &momentum_buffers, &first_grads, &references});
  MemoryUse use = call.memory_use();
  use.write(params);
  use.write(momentum_buffers);
  use.read(saved, params);
  for (const List* list : {&grads, &first_grads, &references}) use.read(*list);
  use.check();
  cuda::SgdOptions options{static_cast<float>(lr),
                           static_cast<float>(momentum),
                           static_cast<float>(1 - dampening),
                           static_cast<float>(weight_decay),
                           static_cast<float>(alpha),
                           maximize ? -1.0f : 1.0f,
                           nesterov};
  Tensor squared_distance = call.result({}, aoti_torch_dtype_float32());
  cuda::sharp_step(call.tensors(), call.dtype(), options, data<float>(squared_distance), call.device());
  return squared_distance;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bdfast_cuda, CUDA, m) {
  m.impl("neuron_norms", TORCH_BOX(&neuron_norms));
  m.impl("kth_largest_change", TORCH_BOX(&kth_largest_change));
  m.impl("zero_changed_", TORCH_BOX(&zero_changed));
  m.impl("scale_neurons_", TORCH_BOX(&scale_neurons));
  m.impl("perturb_", TORCH_BOX(&perturb));
  m.impl("sharp_step_", TORCH_BOX(&sharp_step));
}

}  // namespace bdfast
