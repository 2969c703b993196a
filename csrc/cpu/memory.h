// How the loops ask for memory before they need it, and write what nobody reads soon.
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
// The processor's own look ahead ends at the page. 512 to 2048 bytes are about as good as each other here.
constexpr int64_t kAheadBytes = 1024;
// Lists below this stay in the caches from one pass to the next, if they are left there.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;
// So many elements lie between a loop and the stream that takes its results.
constexpr int64_t kStreamElements = 256;

// Asks for the lines of x[0] to x[n - 1], further on. Beyond the end of an array this asks for nothing.
template <class T>
inline void fetch_ahead(const T* x, int64_t n) {
  const char* at = reinterpret_cast<const char*>(x) + kAheadBytes;
  for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(T)); byte += kLineBytes) __builtin_prefetch(at + byte);
}

// For large memory that is new: the system has to clear and map every page of it at the first write, and takes longer
// for that than the op for its work, unless the pages are large too. Only a request: nothing is changed where it fails.
inline void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  begin = (begin + kPage - 1) / kPage * kPage;
  end = end / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A copy past the caches: what is overwritten is not read first, as a store otherwise does. Ends with end_of_stream.
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

// Makes what was streamed visible to other threads.
inline void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace bdfast
