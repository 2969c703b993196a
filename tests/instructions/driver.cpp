// Runs the inner loop of one kernel once, between `measured` and its end, for callgrind to count. Nothing of torch is
// called: the kernels' files are compiled in, without their registration.
#include <torch/csrc/stable/library.h>
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(...) \
  template <class Library>             \
  void not_registered(Library& m)

#include KERNEL

#include <cstdlib>
#include <vector>

namespace {

constexpr int64_t kElements = 1 << 16;

struct Memory {
  std::vector<float> values = std::vector<float>(kElements);
  explicit Memory(uint32_t seed) {
    for (float& value : values) {
      seed = seed * 1664525u + 1013904223u;
      value = static_cast<float>(seed >> 8) / (1 << 24) - 0.5f;
    }
  }
  void* data() { return values.data(); }
};

Memory a(1), b(2), c(3), d(4), e(5), f(6);

}  // namespace

// Not static, so that callgrind finds it by its name.
extern "C" __attribute__((noinline)) void measured(int64_t columns, bdfast::ScalarType dtype);

int main(int argc, char** argv) {
  int64_t columns = argc > 1 ? std::atoll(argv[1]) : kElements;
  constexpr bdfast::ScalarType kTypes[] = {bdfast::ScalarType::Float, bdfast::ScalarType::BFloat16,
                                           bdfast::ScalarType::Half};
  measured(columns, kTypes[argc > 2 ? std::atoi(argv[2]) : 0]);
}

extern "C" void measured(int64_t columns, bdfast::ScalarType dtype) {
  using namespace bdfast;
  [[maybe_unused]] int64_t rows = kElements / columns;
  [[maybe_unused]] static volatile double sink;
  CALL;
}
