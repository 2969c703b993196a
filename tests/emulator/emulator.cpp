// The scheduler behind emulator.h. Compiled without sanitizers, but with BDFAST_TSAN where the kernels are under
// ThreadSanitizer, which then has to be told about fibers and about what waits for what.
#include "emulator.h"

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <thread>
#include <utility>
#include <vector>

#undef threadIdx
#undef blockIdx

#if !defined(__x86_64__)
#error "fibers are switched by hand on x86-64 only"
#endif

// Saves what a call must preserve, and goes on where the other stack was left.
extern "C" void switch_stacks(void** save, void* load);
__asm__(
    ".text\n.globl switch_stacks\nswitch_stacks:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

#ifdef BDFAST_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define FOR_TSAN(statement) statement
#else
#define FOR_TSAN(statement)
#endif

namespace emulator {

__thread Block* block;
bool capturing = false;
int64_t uploads = 0, allocated = 0;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kReported = 86;  // the exit status of a report

enum class State { kReady, kAtBarrier, kInCollective, kDone };

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  State state = State::kReady;
  const char* file = "?";
  int line = 0;
  void* tsan = nullptr;
};

struct Warp {
  unsigned live = 0;
  unsigned arrived = 0;
  int turn = 0;  // two sets of values: a fast lane may give its next before a slow one has read the last
  uint64_t values[2][kWarp];
  char tsan_tags[2];
};

// One for each thread of the operating system; runs its blocks one after another.
struct Runner : Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;
  char* stacks = nullptr;
  int live = 0, waiting = 0, turn = 0;
  void* scheduler = nullptr;
  const std::function<void()>* kernel = nullptr;
  void* tsan_scheduler = nullptr;
  char tsan_end = 0, tsan_barriers[2];

  Runner() = default;
  Runner(const Runner&) = delete;
  ~Runner() { release(); }

  void prepare(int threads) {
    if (static_cast<int>(fibers.size()) == threads) return;
    release();
    fibers.assign(threads, Fiber{});
    order.resize(threads);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0));
  }
  void release() {
    if (stacks != nullptr) munmap(stacks, fibers.size() * kStackBytes);
    stacks = nullptr;
  }
};

std::atomic<int64_t> launches{0};

Runner& runner() { return *static_cast<Runner*>(block); }
Fiber& self() { return *static_cast<Fiber*>(block->current); }
int lane_of(const Fiber& fiber) { return static_cast<int>(fiber.index.x % kWarp); }

[[noreturn]] void report(const char* what, const Fiber& fiber) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u, %s:%d)\n", what, block->index.x, fiber.index.x, fiber.file,
               fiber.line);
  std::fflush(stderr);
  _exit(kReported);
}

void suspend() {
  Runner& r = runner();
  FOR_TSAN(__tsan_switch_to_fiber(r.tsan_scheduler, 1);)
  switch_stacks(&self().stack_pointer, r.scheduler);
}

void resume(Fiber& fiber) {
  Runner& r = runner();
  r.current = &fiber;
  FOR_TSAN(__tsan_switch_to_fiber(fiber.tsan, 1);)
  switch_stacks(&r.scheduler, fiber.stack_pointer);
}

// Lets go of those at the barrier when all threads that still live are there.
void open_barrier(Runner& r) {
  if (r.waiting == 0 || r.waiting < r.live) return;
  const Fiber* first = nullptr;
  for (Fiber& fiber : r.fibers) {
    if (fiber.state != State::kAtBarrier) continue;
    if (first == nullptr) first = &fiber;
    if (first->line != fiber.line || std::strcmp(first->file, fiber.file) != 0) {
      report("threads of a block wait at different barriers", fiber);
    }
    fiber.state = State::kReady;
  }
  r.waiting = 0;
  r.turn ^= 1;
}

void run_fiber() {
  Runner& r = runner();
  Fiber& fiber = self();
  (*r.kernel)();
  FOR_TSAN(__tsan_release(&r.tsan_end);)
  fiber.state = State::kDone;
  r.live--;
  Warp& warp = r.warps[fiber.index.x / kWarp];
  warp.live &= ~(1u << lane_of(fiber));
  if (warp.arrived) report("a thread has ended while its warp waits for it in a collective", fiber);
  if (r.waiting) report("a thread has ended while others wait at a barrier", fiber);
  suspend();
}

// The thread-local memory of this library: every __shared__ variable of the kernels. `block` is put back after poison.
int find_shared(dl_phdr_info* info, size_t, void* found) {
  static char anchor;
  bool ours = false;
  size_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    uintptr_t offset = reinterpret_cast<uintptr_t>(&anchor) - info->dlpi_addr - header.p_vaddr;
    if (header.p_type == PT_LOAD && offset < header.p_memsz) ours = true;
    if (header.p_type == PT_TLS) bytes = header.p_memsz;
  }
  if (!ours || info->dlpi_tls_data == nullptr) return 0;
  *static_cast<std::pair<void*, size_t>*>(found) = {info->dlpi_tls_data, bytes};
  return 1;
}

void poison_shared(Runner& r) {
  std::pair<void*, size_t> shared{nullptr, 0};
  dl_iterate_phdr(find_shared, &shared);
  if (shared.first != nullptr) std::memset(shared.first, 0xff, shared.second);
  block = &r;
}

uint64_t next_random(uint64_t& state) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return state >> 33;
}

template <class T>
void arrange(std::vector<T>& items, uint64_t& random) {
  for (size_t i = 0; i < items.size(); i++) {
    items[i] = static_cast<T>(settings().order == Order::kReverse ? items.size() - 1 - i : i);
  }
  if (settings().order != Order::kRandom) return;
  for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[next_random(random) % i]);
}

void start(Runner& r, int threads) {
  r.live = threads;
  r.waiting = 0;
  r.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = r.fibers[i];
    fiber.index = {static_cast<unsigned>(i), 0, 0};
    fiber.state = State::kReady;
    r.warps[i / kWarp].live |= 1u << (i % kWarp);
    // As switch_stacks leaves a stack: six registers, where to go on, and an aligned end.
    void** top = reinterpret_cast<void**>(r.stacks + (i + 1) * kStackBytes) - 1;
    *--top = reinterpret_cast<void*>(run_fiber);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
    FOR_TSAN(fiber.tsan = __tsan_create_fiber(0);)
  }
}

void run_block(Runner& r, int threads, int64_t index, uint64_t& random) {
  r.index = {static_cast<unsigned>(index), 0, 0};
  poison_shared(r);
  start(r, threads);
  arrange(r.order, random);
  while (r.live > 0) {
    bool progress = false;
    for (int i : r.order) {
      if (r.fibers[i].state != State::kReady) continue;
      resume(r.fibers[i]);
      progress = true;
    }
    if (progress) continue;
    for (const Fiber& fiber : r.fibers) {
      if (fiber.state == State::kInCollective) report("lanes of a warp never come to a collective", fiber);
    }
    for (const Fiber& fiber : r.fibers) {
      if (fiber.state == State::kAtBarrier) report("some threads never come to a barrier", fiber);
    }
  }
  FOR_TSAN(__tsan_acquire(&r.tsan_end); for (Fiber& fiber : r.fibers) __tsan_destroy_fiber(fiber.tsan);)
}

void run_blocks(Runner& r, int threads, const std::function<void()>& kernel, const std::vector<int64_t>& blocks,
                size_t first, size_t last) {
  r.prepare(threads);
  r.kernel = &kernel;
  FOR_TSAN(r.tsan_scheduler = __tsan_get_current_fiber();)
  uint64_t random = settings().seed;
  for (size_t i = first; i < last; i++) run_block(r, threads, blocks[i], random);
  block = nullptr;
}

}  // namespace

Settings& settings() {
  static Settings chosen;
  return chosen;
}

int64_t take_launches() { return launches.exchange(0); }

void launch(int64_t count, int threads, const std::function<void()>& kernel) {
  if (count < 1 || count > INT32_MAX || threads < 1 || threads > 1024) {
    std::fprintf(stderr, "emulator: a launch of %lld blocks of %d threads\n", static_cast<long long>(count), threads);
    _exit(kReported);
  }
  launches++;
  std::vector<int64_t> blocks(count);
  uint64_t random = settings().seed;
  arrange(blocks, random);
  size_t workers = std::min<size_t>(settings().os_threads, count);
  if (workers <= 1) {
    static Runner kept;
    return run_blocks(kept, threads, kernel, blocks, 0, count);
  }
  std::vector<std::thread> running;
  for (size_t i = 0; i < workers; i++) {
    running.emplace_back([&, i] {
      Runner own;
      run_blocks(own, threads, kernel, blocks, count * i / workers, count * (i + 1) / workers);
    });
  }
  for (std::thread& thread : running) thread.join();
}

void barrier(const char* file, int line) {
  Runner& r = runner();
  Fiber& fiber = self();
  fiber.file = file;
  fiber.line = line;
  fiber.state = State::kAtBarrier;
  r.waiting++;
  if (r.live < static_cast<int>(r.fibers.size())) report("some threads ended before a barrier", fiber);
  [[maybe_unused]] int turn = r.turn;
  FOR_TSAN(__tsan_release(&r.tsan_barriers[turn]);)
  open_barrier(r);
  if (fiber.state != State::kReady) suspend();
  FOR_TSAN(__tsan_acquire(&r.tsan_barriers[turn]);)
}

const uint64_t* exchange(unsigned mask, uint64_t value, const char* file, int line) {
  Runner& r = runner();
  Fiber& fiber = self();
  Warp& warp = r.warps[fiber.index.x / kWarp];
  fiber.file = file;
  fiber.line = line;
  if (mask != kWholeWarp) report("a collective of a part of a warp, which no kernel here needs", fiber);
  if (warp.live != kWholeWarp) report("a lane of a collective has ended", fiber);
  Fiber* lanes = &r.fibers[fiber.index.x / kWarp * kWarp];
  for (const Fiber* other = lanes; warp.arrived && other < lanes + kWarp; other++) {
    if (other->state == State::kInCollective && other->line != line) {
      report("lanes of a warp are in different collectives", fiber);
    }
  }
  int turn = warp.turn;
  warp.values[turn][lane_of(fiber)] = value;
  warp.arrived |= 1u << lane_of(fiber);
  FOR_TSAN(__tsan_release(&warp.tsan_tags[turn]);)
  if (warp.arrived == kWholeWarp) {
    warp.arrived = 0;
    warp.turn ^= 1;
    for (Fiber* other = lanes; other < lanes + kWarp; other++) other->state = State::kReady;
  } else {
    fiber.state = State::kInCollective;
    suspend();
  }
  FOR_TSAN(__tsan_acquire(&warp.tsan_tags[turn]);)
  return warp.values[turn];
}

}  // namespace emulator
