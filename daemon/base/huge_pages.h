// Shared memory in transparent huge pages: scattered copies of a few KiB each, and the kernel's
// copies to and from sockets, otherwise spend as long on addresses as on bytes.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>

namespace kvferry {

constexpr uint64_t kHugePageBytes = uint64_t{2} << 20;

// Maps the first `bytes` of `fd`, shared; from one huge page on at a multiple of its size, which
// huge pages need and mmap(nullptr, ...) does not promise for a memfd. `fd` must not be on
// hugetlbfs, whose pages may be larger. Returns MAP_FAILED with errno, as mmap does. Thread-safe.
inline void* map_aligned(int fd, uint64_t bytes, int protection) {
  constexpr int kTries = 8;
  for (int i = 0; bytes >= kHugePageBytes && i < kTries; ++i) {
    // A place is looked for, given back, and asked for: other threads map, too, and what they have
    // put there meanwhile must stay.
    const uint64_t room = bytes + kHugePageBytes;
    void* const found =
        ::mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) break;
    ::munmap(found, room);
    auto* const begin = static_cast<std::byte*>(found);
    const uint64_t past = reinterpret_cast<uintptr_t>(begin) % kHugePageBytes;
    std::byte* const base = past == 0 ? begin : begin + (kHugePageBytes - past);
    void* const mapped = ::mmap(base, bytes, protection, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
    if (mapped != MAP_FAILED || errno != EEXIST) return mapped;
  }
  return ::mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
}

// Which of its small pages is touched first in a mapping's huge page `number`: the NUMA node of
// that one is the huge page's. Interleaving goes by a page's number, so it is not the same of each.
constexpr uint64_t first_touched_page(uint64_t number) {
  return number * 167 % (kHugePageBytes / 4096);
}

// Fills new, still empty memory from map_aligned() with huge pages as far as the kernel grants
// them, and the rest with small ones. Best effort: what is missing in the end is for fallocate to
// find.
inline void populate_huge(void* data, uint64_t bytes) {
#if !defined(MADV_COLLAPSE)
  constexpr int MADV_COLLAPSE = 25;  // Linux 6.1; glibc 2.37
#endif
  ::madvise(data, bytes, MADV_HUGEPAGE);
  // A first touch gives huge pages only where the system's settings for shared memory say so;
  // collapsing gives them when asked, and takes no longer if most of the memory is still empty.
  // Touched by the kernel, which answers where a store would be a SIGBUS for want of memory.
  auto* const base = static_cast<std::byte*>(data);
  for (uint64_t i = 0; i < bytes / kHugePageBytes; ++i)
    if (::madvise(base + i * kHugePageBytes + first_touched_page(i) * 4096, 1,
                  MADV_POPULATE_WRITE) != 0)
      return;
  ::madvise(data, bytes, MADV_COLLAPSE);
  ::madvise(data, bytes, MADV_POPULATE_WRITE);
}

}  // namespace kvferry
