// CUDA C++ on a CPU, for tests: enough of it for csrc/cuda, whose files are compiled by g++ as they are.
//
// Every CUDA thread is a fiber, resumed in forward, reverse or random order; a barrier or a warp collective suspends it
// until those arrive that it waits for. Shared memory starts as NaN in every block. Reported, with block, thread and
// line: barriers that not all threads reach, different barriers at a time, warp collectives whose lanes have left, do
// not come, or do something else. Under AddressSanitizer accesses out of bounds show, under ThreadSanitizer races.
// Not modelled: weak memory order, and anything of time.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "../../csrc/cpu/simd.h"

#define BDFAST_EMULATED
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

enum class Order { kForward, kReverse, kRandom };

struct Settings {
  Order order = Order::kForward;
  uint64_t seed = 1;
  int os_threads = 1;  // that share the blocks of a launch
};

Settings& settings();

// Launches since the last call.
int64_t take_launches();

struct Thread {
  uint3 index;
};

struct Block {
  uint3 index;
  Thread* current;
};

extern __thread Block* block;

void launch(int64_t blocks, int threads, const std::function<void()>& kernel);
void barrier(const char* file, int line);

// The values that the lanes of the warp give, by lane; all 32 have to call it at the same place.
const uint64_t* exchange(unsigned mask, uint64_t value, const char* file, int line);

template <class T>
T shuffled(unsigned mask, T value, int lane_of_source, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t given = 0;
  std::memcpy(&given, &value, sizeof(T));
  const uint64_t* all = exchange(mask, given, file, line);
  std::memcpy(&value, &all[lane_of_source], sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(block->current->index.x % 32); }

}  // namespace emulator

#define threadIdx (::emulator::block->current->index)
#define blockIdx (::emulator::block->index)

#define __syncthreads() ::emulator::barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, distance) \
  ::emulator::shuffled(mask, value, ::emulator::lane() ^ (distance), __FILE__, __LINE__)
#define __shfl_up_sync(mask, value, distance)                                                                  \
  ::emulator::shuffled(mask, value,                                                                            \
                       ::emulator::lane() < (distance) ? ::emulator::lane() : ::emulator::lane() - (distance), \
                       __FILE__, __LINE__)

template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
void __stcg(T* at, T value) {
  *at = value;
}

template <class T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

inline unsigned __float_as_uint(float value) { return bdfast::bits_of(value); }
inline float __uint_as_float(unsigned bits) { return bdfast::float_of(bits); }

// The 16-bit types travel as their bits; those of the CPU backend convert them.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {bdfast::BFloat16::store(value)}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __half __float2half_rn(float value) { return {bdfast::Float16::store(value)}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half value) { return bdfast::Float16::load(value.bits); }

#define BDFAST_LAUNCH(kernel, blocks, stream, ...) \
  ::emulator::launch(static_cast<int64_t>(blocks), ::bdfast::cuda::kThreads, [=] { kernel(__VA_ARGS__); })

// The runtime: the memory of the device is the machine's, and everything has happened when a call returns.
typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

namespace emulator {
extern bool capturing;     // as if a CUDA graph were being captured
extern int64_t uploads;    // copies from the host
extern int64_t allocated;  // by cudaMalloc and not freed
}  // namespace emulator

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "success" : "out of memory"; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (bytes) std::memcpy(to, from, bytes);
  emulator::uploads += kind == cudaMemcpyHostToDevice;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  emulator::allocated += *memory != nullptr;
  return *memory || bytes == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* memory) {
  emulator::allocated -= memory != nullptr;
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulator::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
