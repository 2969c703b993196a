// The launchers that the binding and the tests call: host code that needs neither CUDA headers nor torch.
#pragma once

#include <functional>

#include "plan.h"

namespace bdfast {
namespace cuda {

// The device and stream of an op, and its allocator for memory that lives until the op ends, in stream order.
struct Device {
  int index;
  void* stream;
  std::function<void*(size_t bytes)> allocate;
};

// All launchers throw std::runtime_error if CUDA reports an error. Pointers are to device memory.

// data: x, ref (null for zeros). One launch, two if a row is longer than kLongestRow.
void neuron_norms(const HostList& list, Dtype dtype, double ord, float* norms, const Device& device);

// data: x, ref. Four launches. NaN if fewer than q sub-weights are selected: the host does not wait to check.
void kth_largest_change(const HostList& list, Dtype dtype, const bool* neurons, int64_t q, float* change,
                        const Device& device);

// data: param, x, ref. One launch.
void zero_changed(const HostList& list, Dtype dtype, const bool* neurons, const float* tau, int64_t* count,
                  const Device& device);

// data: param. One launch.
void scale_neurons(const HostList& list, Dtype dtype, const float* scale, const Device& device);

enum class PerturbMode { kSam, kAsam, kPath };

// data: param, direction, saved. Three launches; one with a known norm.
void perturb(const HostList& list, Dtype dtype, PerturbMode mode, bool per_tensor, double rho, double eps,
             const float* known_norms, float* norms, const Device& device);

struct SgdOptions {
  float lr;
  float momentum;
  float damped;  // 1 - dampening
  float weight_decay;
  float alpha;
  float sign;  // -1 to ascend
  bool nesterov;
};

// data: param, saved, gradient, momentum buffer, first gradient, reference; null for lists that were left out. One
// launch, two with references.
void sharp_step(const HostList& list, Dtype dtype, const SgdOptions& options, float* squared_distance,
                const Device& device);

// The plan of a list, with its table in device memory. Both are kept, so a repeated call neither plans nor uploads.
Planned resident(const HostList& list, Split split, const Device& device);

}  // namespace cuda
}  // namespace bdfast
