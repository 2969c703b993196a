// All ops on lists that are hard in some respect, for the sanitizers: every array ends where its memory ends. Prints a
// checksum of all results, which has to be the same in every order of threads. Arguments: order, threads of the system,
// how many of the dtypes.
#include <cstdio>
#include <memory>

#include "emulator.h"
// After the emulator.
#include "../../csrc/cuda/launch.h"

using namespace bdfast::cuda;

namespace {

struct Shape {
  int64_t rows, columns;
};
// Rows for a thread, a warp, a block and several blocks; none, one; 27 and 147 columns as in first convolutions.
constexpr Shape kShapes[] = {{5, 1},   {300, 3}, {3, 16}, {33, 17},  {70, 27}, {0, 5},
                             {9, 147}, {40, 64}, {4, 0},  {3, 1500}, {1, 1},   {2, 70001}};
constexpr int64_t kRows = 5 + 300 + 3 + 33 + 70 + 9 + 40 + 4 + 3 + 1 + 2;

uint64_t checksum = 14695981039346656037ull;

void add_to_checksum(const void* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) {
    checksum = (checksum ^ static_cast<const unsigned char*>(memory)[i]) * 1099511628211ull;
  }
}

// One list of these shapes. Tensors start up to three elements behind a 16-byte boundary, differently in every list.
struct Memory {
  std::vector<char*> blocks;
  std::vector<void*> tensors;
  std::vector<size_t> sizes;

  Memory(Dtype dtype, unsigned seed) {
    size_t each = dtype == Dtype::kFloat32 ? 4 : 2;
    for (size_t t = 0; t < std::size(kShapes); t++) {
      size_t elements = kShapes[t].rows * kShapes[t].columns, shift = seed * t % 4;
      blocks.push_back(static_cast<char*>(std::malloc((elements + shift) * each)));
      tensors.push_back(blocks.back() + shift * each);
      sizes.push_back(elements * each);
      for (size_t i = 0; i < elements; i++) {
        seed = seed * 1664525u + 1013904223u;
        float value = static_cast<float>(seed >> 8) / (1 << 23) - 1.0f;
        if (dtype == Dtype::kFloat32) static_cast<float*>(tensors[t])[i] = value;
        if (dtype == Dtype::kBFloat16) static_cast<uint16_t*>(tensors[t])[i] = bdfast::BFloat16::store(value);
        if (dtype == Dtype::kFloat16) static_cast<uint16_t*>(tensors[t])[i] = bdfast::Float16::store(value);
      }
    }
  }
  ~Memory() {
    for (char* block : blocks) std::free(block);
  }
  void check() const {
    for (size_t t = 0; t < tensors.size(); t++) add_to_checksum(tensors[t], sizes[t]);
  }
};

HostList list_of(const std::vector<const Memory*>& lists) {
  HostList list(std::size(kShapes));
  for (size_t t = 0; t < list.size(); t++) {
    list[t] = {{}, kShapes[t].rows, kShapes[t].columns};
    for (size_t place = 0; place < lists.size(); place++) {
      list[t].data[place] = lists[place] == nullptr ? nullptr : lists[place]->tensors[t];
    }
  }
  return list;
}

void run_all(Dtype dtype) {
  std::vector<void*> workspace;
  Device device{0, nullptr, [&](size_t bytes) { return workspace.emplace_back(std::malloc(bytes)); }};
  Memory a(dtype, 1), b(dtype, 2), c(dtype, 3), d(dtype, 5), e(dtype, 7), f(dtype, 11);
  std::vector<float> norms(kRows), scale(kRows);
  std::unique_ptr<bool[]> neurons(new bool[kRows]);
  for (int64_t row = 0; row < kRows; row++) {
    neurons[row] = row % 5 != 0;
    scale[row] = row % 3 ? 0.5f : 1.0f;
  }
  for (double ord : {1.0, 2.0, HUGE_VAL}) {
    neuron_norms(list_of({&a, ord == 1 ? &b : nullptr}), dtype, ord, norms.data(), device);
    add_to_checksum(norms.data(), norms.size() * sizeof(float));
  }
  float tau, squared_distance;
  int64_t count;
  kth_largest_change(list_of({&a, &b}), dtype, neurons.get(), 30000, &tau, device);
  zero_changed(list_of({&c, &a, &b}), dtype, neurons.get(), &tau, &count, device);
  scale_neurons(list_of({&c}), dtype, scale.data(), device);
  float norm[std::size(kShapes)];
  perturb(list_of({&a, &b, &d}), dtype, PerturbMode::kAsam, true, 0.5, 1e-12, nullptr, norm, device);
  perturb(list_of({&a, &b, &d}), dtype, PerturbMode::kPath, false, 0.5, 1e-12, nullptr, norm, device);
  SgdOptions options{0.1f, 0.9f, 1.0f, 1e-3f, 0.7f, 1.0f, false};
  sharp_step(list_of({&a, &d, &b, &e, &c, &f}), dtype, options, &squared_distance, device);
  sharp_step(list_of({&a, &a, &b}), dtype, options, &squared_distance, device);
  add_to_checksum(&tau, sizeof(tau));
  add_to_checksum(&count, sizeof(count));
  add_to_checksum(norm, sizeof(norm[0]));
  for (const Memory* memory : {&a, &c, &d, &e}) memory->check();
  for (void* block : workspace) std::free(block);
}

}  // namespace

int main(int, char** arguments) {
  int order = std::atoi(arguments[1]), os_threads = std::atoi(arguments[2]);
  emulator::settings() = {static_cast<emulator::Order>(order), 3, os_threads};
  constexpr Dtype kDtypes[] = {Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat16};
  std::for_each_n(kDtypes, std::atoi(arguments[3]), run_all);
  std::printf("%016llx\n", static_cast<unsigned long long>(checksum));
}
