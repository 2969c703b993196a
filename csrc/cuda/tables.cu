// Plans in device memory, uploaded once.
#include <map>
#include <mutex>
#include <utility>

#include "runtime.cuh"

namespace bdfast {
namespace cuda {
namespace {

// A training step uses a few. The limit is for programs that create new tensors for every call.
constexpr size_t kMostTables = 256;

struct Resident {
  char* memory;
  bool captured;  // a CUDA graph reads it for as long as it lives
};

// The key holds every address and shape, so reused memory is recognised.
using Key = std::pair<int, std::vector<char>>;
using Residents = std::map<Key, Resident>;

// Never destroyed: CUDA may shut down first at the end of the program.
Residents& residents() {
  static Residents& all = *new Residents;
  return all;
}

void drop_all(Residents& all) {
  for (auto it = all.begin(); it != all.end();) {
    if (it->second.captured) {
      ++it;
      continue;
    }
    check(cudaFree(it->second.memory), "cudaFree");  // waits for the kernels that read it
    it = all.erase(it);
  }
}

bool is_capturing(const Device& device) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(device.stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

Table resident(const Plan& plan, const Device& device) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  Residents& all = residents();
  bool capturing = is_capturing(device);
  Key key{device.index, packed(plan)};
  auto found = all.find(key);
  if (found == all.end()) {
    if (capturing) {
      throw std::runtime_error(
          "bdfast: a CUDA graph is being captured, and these tensors are new to bdfast; run the call once with the "
          "same "
          "tensors before capturing it.");
    }
    if (all.size() >= kMostTables) drop_all(all);
    cudaStream_t stream = static_cast<cudaStream_t>(device.stream);
    Resident added{nullptr, false};
    check(cudaMalloc(reinterpret_cast<void**>(&added.memory), key.second.size()), "cudaMalloc");
    cudaError_t error =
        cudaMemcpyAsync(added.memory, key.second.data(), key.second.size(), cudaMemcpyHostToDevice, stream);
    // Other streams will read it without synchronising with this one.
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) cudaFree(added.memory);
    check(error, "uploading a plan");
    found = all.emplace(std::move(key), added).first;
  }
  found->second.captured = found->second.captured || capturing;
  return table_at(found->second.memory, plan);
}

}  // namespace cuda
}  // namespace bdfast
