// The kernels of csrc/cuda and the emulator as one library with a C interface, for Python.
#include <string>

#include "emulator.h"
// After the emulator.
#include "../../csrc/cuda/launch.h"

namespace {

using namespace bdfast::cuda;

std::string error;

// Runs an op on a list that Python made; memory for the op lives as long as it. Fresh memory is NaN.
template <class Op>
int run(const HostTensor* tensors, int64_t count, Op op) {
  std::vector<void*> blocks;
  Device device{0, nullptr, [&](size_t bytes) {
                  blocks.push_back(std::malloc(bytes));
                  std::memset(blocks.back(), 0xff, bytes);
                  return blocks.back();
                }};
  error.clear();
  try {
    op(HostList(tensors, tensors + count), device);
  } catch (const std::exception& raised) {
    error = raised.what();
  }
  for (void* block : blocks) std::free(block);
  return error.empty() ? 0 : 1;
}

}  // namespace

extern "C" {

void emulator_set(int order, uint64_t seed, int os_threads) {
  emulator::settings() = {static_cast<emulator::Order>(order), seed, os_threads};
}
void emulator_set_capturing(int capturing) { emulator::capturing = capturing != 0; }
int64_t emulator_take_launches() { return emulator::take_launches(); }
int64_t emulator_uploads() { return emulator::uploads; }
int64_t emulator_allocated() { return emulator::allocated; }
const char* emulator_error() { return error.c_str(); }

int emulated_neuron_norms(const HostTensor* list, int64_t count, int dtype, double ord, float* norms) {
  return run(list, count, [&](const HostList& tensors, const Device& device) {
    neuron_norms(tensors, static_cast<Dtype>(dtype), ord, norms, device);
  });
}

int emulated_kth_largest_change(const HostTensor* list, int64_t count, int dtype, const bool* neurons, int64_t q,
                                float* change) {
  return run(list, count, [&](const HostList& tensors, const Device& device) {
    kth_largest_change(tensors, static_cast<Dtype>(dtype), neurons, q, change, device);
  });
}

int emulated_zero_changed(const HostTensor* list, int64_t count, int dtype, const bool* neurons, const float* tau,
                          int64_t* zeroed) {
  return run(list, count, [&](const HostList& tensors, const Device& device) {
    zero_changed(tensors, static_cast<Dtype>(dtype), neurons, tau, zeroed, device);
  });
}

int emulated_scale_neurons(const HostTensor* list, int64_t count, int dtype, const float* scale) {
  return run(list, count, [&](const HostList& tensors, const Device& device) {
    scale_neurons(tensors, static_cast<Dtype>(dtype), scale, device);
  });
}

int emulated_perturb(const HostTensor* list, int64_t count, int dtype, int mode, int per_tensor, double rho, double eps,
                     const float* known_norms, float* norms) {
  return run(list, count, [&](const HostList& tensors, const Device& device) {
    perturb(tensors, static_cast<Dtype>(dtype), static_cast<PerturbMode>(mode), per_tensor != 0, rho, eps, known_norms,
            norms, device);
  });
}

int emulated_sharp_step(const HostTensor* list, int64_t count, int dtype, const SgdOptions* options,
                        float* squared_distance) {
  return run(list, count, [&](const HostList& tensors, const Device& device) {
    sharp_step(tensors, static_cast<Dtype>(dtype), *options, squared_distance, device);
  });
}
}
