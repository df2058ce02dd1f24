// Shared memory in transparent huge pages: scattered copies of a few KiB each, and the kernel's
// copies to and from sockets, otherwise spend as long on addresses as on bytes.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace kvferry {

constexpr uint64_t kHugePageBytes = uint64_t{2} << 20;

// Maps the first `bytes` of `fd`, shared; from one huge page on at a multiple of its size, which
// huge pages need and mmap(nullptr, ...) does not promise for a memfd. `fd` must not be on
// hugetlbfs, whose pages may be larger. Returns MAP_FAILED with errno, as mmap does. Thread-safe.
inline void* map_aligned(int fd, uint64_t bytes, int protection) {
  if (bytes < kHugePageBytes) return ::mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  // Room to choose from is taken, the mapping put into it, and what is left over given back.
  const uint64_t page = 4096;
  const uint64_t mapped = (bytes + page - 1) / page * page;
  const uint64_t room = mapped + kHugePageBytes;
  void* const taken =
      ::mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (taken == MAP_FAILED) return MAP_FAILED;
  auto* const begin = static_cast<std::byte*>(taken);
  const uint64_t past = reinterpret_cast<uintptr_t>(begin) % kHugePageBytes;
  const uint64_t head = past == 0 ? 0 : kHugePageBytes - past;
  std::byte* const base = begin + head;
  if (::mmap(base, bytes, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
    ::munmap(taken, room);
    return MAP_FAILED;
  }
  if (head != 0) ::munmap(begin, head);
  ::munmap(base + mapped, room - head - mapped);  // at least a page: head is less than a huge one
  return base;
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
  // Touched by the kernel, which answers where a store would be a SIGBUS for want of memory. Which
  // page is touched decides the NUMA node of the huge one; interleaving goes by a page's number, so
  // it is not the first of each.
  auto* const base = static_cast<std::byte*>(data);
  uint64_t page = 0;
  for (uint64_t at = 0; at + kHugePageBytes <= bytes; at += kHugePageBytes, page += 167)
    if (::madvise(base + at + page * 4096 % kHugePageBytes, 1, MADV_POPULATE_WRITE) != 0) return;
  ::madvise(data, bytes, MADV_COLLAPSE);
  ::madvise(data, bytes, MADV_POPULATE_WRITE);
}

}  // namespace kvferry
