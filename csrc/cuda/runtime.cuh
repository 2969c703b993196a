// The functions of the CUDA runtime that the launchers need, with errors as exceptions.
#pragma once

#include <stdexcept>
#include <string>

#include "launch.h"
#include "portable.cuh"

namespace bdfast {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline void check_launch(const char* op) { check(cudaGetLastError(), op); }

inline void clear(void* memory, size_t bytes, const Device& device) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(device.stream)), "cudaMemsetAsync");
}

inline void copy(void* to, const void* from, size_t bytes, const Device& device) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(device.stream)),
        "cudaMemcpyAsync");
}

}  // namespace cuda
}  // namespace bdfast
