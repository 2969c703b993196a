// The ops on a GPU, as the binding and the tests call them: host code that needs neither CUDA's headers nor torch.
#pragma once

#include <functional>

#include "plan.h"

namespace bdfast {
namespace cuda {

// Where an op runs, and what gives it memory there until the op is over; on the stream, so that nobody waits.
struct Device {
  int index;
  void* stream;
  std::function<void*(size_t bytes)> allocate;
};

// All of them throw std::runtime_error where CUDA reports an error. Pointers are to memory of the device.

// data: x, ref (null for zeros). One launch, two where a row is longer than kLongestRow.
void neuron_norms(const HostList& list, Dtype dtype, double ord, float* norms, const Device& device);

// data: x, ref. Four launches. NaN where fewer than q sub-weights are selected, as nobody waits to find that out.
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

// The packed plan in the memory of the device. Plans are kept, so that a list that comes again uploads nothing.
Table resident(const Plan& plan, const Device& device);

}  // namespace cuda
}  // namespace bdfast
