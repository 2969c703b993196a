// Prefetching, large pages and streaming stores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bdfast {

constexpr int64_t kLineBytes = 64;
// The hardware prefetcher stops at the page boundary. Distances of 512 to 2048 bytes were about equally fast.
constexpr int64_t kAheadBytes = 1024;
// Smaller lists stay in the caches between passes, so they are written with ordinary stores.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;
// Elements in the buffer between a loop and the streaming stores.
constexpr int64_t kStreamElements = 256;

// Prefetches the cache lines kAheadBytes after x[0] to x[n - 1]. Beyond the end of an array this has no effect.
template <class T>
inline void fetch_ahead(const T* x, int64_t n) {
  const char* at = reinterpret_cast<const char*>(x) + kAheadBytes;
  for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(T)); byte += kLineBytes) __builtin_prefetch(at + byte);
}

// For large new memory. The system clears and maps each page at the first write; with 4 kB pages this takes longer than
// the op itself. If the request fails, nothing changes.
inline void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  begin = (begin + kPage - 1) / kPage * kPage;
  end = end / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Copies with stores that bypass the caches, so the old contents are not read first. Call end_of_stream afterwards.
template <class T>
inline void stream(T* to, const T* from, int64_t n) {
#if defined(__SSE2__)
  constexpr int64_t kLine = kLineBytes / sizeof(T), kPart = kLine / 4;
  int64_t misaligned = reinterpret_cast<uintptr_t>(to) % kLineBytes / sizeof(T);
  int64_t i = misaligned == 0 ? 0 : std::min<int64_t>(n, kLine - misaligned);
  std::memcpy(to, from, i * sizeof(T));
  for (; i + kLine <= n; i += kLine) {
    for (int64_t part = 0; part < kLine; part += kPart) {
      __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + part));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + part), value);
    }
  }
  std::memcpy(to + i, from + i, (n - i) * sizeof(T));
#else
  std::memcpy(to, from, n * sizeof(T));
#endif
}

// Makes streamed data visible to other threads.
inline void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace bdfast
