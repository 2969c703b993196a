// CUDA, either from the toolkit or from tests/emulator, which is included before this file.
#pragma once

#ifndef BDFAST_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define BDFAST_LAUNCH(kernel, blocks, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), ::bdfast::cuda::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace bdfast {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kBlocksOfSm = 4;  // blocks per multiprocessor that must fit: half of its maximum number of threads
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

}  // namespace cuda
}  // namespace bdfast
