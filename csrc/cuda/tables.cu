// Plans in device memory, uploaded once.
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "runtime.cuh"

namespace bdfast {
namespace cuda {
namespace {

// A training step uses a few. The limit is for programs that create new tensors for every call.
constexpr size_t kMostTables = 256;

struct Resident {
  char* memory;
  Planned planned;
  bool captured;  // a CUDA graph reads it for as long as it lives
};

// The key holds every address and shape, so reused memory is recognised. The plan follows from it; of a large network
// it is ten times as long.
using Key = std::tuple<int, Split, std::vector<char>>;
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

Planned resident(const HostList& list, Split split, const Device& device) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  Residents& all = residents();
  bool capturing = is_capturing(device);
  static_assert(sizeof(HostTensor) == (kMostLists + 2) * 8, "bytes that nobody sets would be part of the key");
  const char* bytes = reinterpret_cast<const char*>(list.data());
  Key key{device.index, split, std::vector<char>(bytes, bytes + list.size() * sizeof(HostTensor))};
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
    Plan plan = plan_of(list, split);
    std::vector<char> table = packed(plan);
    Resident added{};
    check(cudaMalloc(reinterpret_cast<void**>(&added.memory), std::max<size_t>(1, table.size())), "cudaMalloc");
    added.planned = planned_at(added.memory, plan);
    cudaError_t error = cudaMemcpyAsync(added.memory, table.data(), table.size(), cudaMemcpyHostToDevice, stream);
    // Other streams will read it without synchronising with this one.
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) cudaFree(added.memory);
    check(error, "uploading a plan");
    found = all.emplace(std::move(key), added).first;
  }
  found->second.captured = found->second.captured || capturing;
  return found->second.planned;
}

}  // namespace cuda
}  // namespace bdfast
