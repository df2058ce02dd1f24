// Owners of memory that two processes map: one memfd mapping (SharedMemory), and the host arena
// made of several. Making and destroying happens on one thread; the bytes belong to whoever the
// engine says, so the const functions may be called from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string_view>
#include <utility>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/memory/region.h"

namespace kvferry::memory {

enum class Access : uint8_t { kReadOnly, kReadWrite };

struct SharedMemoryOptions {
  bool huge_pages = false;  // ask for transparent huge pages; the kernel may decline
  bool in_core_dumps = false;
  bool populate = false;    // fill the page tables now instead of at first touch
  bool last_seals = false;  // create(): nobody who gets the descriptor can add seals
  // create(): called with the new mapping before a page of it is there, e.g. to say from which NUMA
  // node they are to come.
  std::function<void(std::byte* data, uint64_t bytes)> before_touch{};
};

// A memfd and its mapping. Closes and unmaps when it goes; moves keep the address.
class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // A new memfd of `bytes` (> 0, any size), zeroed, all blocks allocated so that no later touch can
  // fail for want of memory, sealed against shrinking and growing, close-on-exec, mapped read and
  // write. `name` shows up in /proc/PID/maps. Errors: INVALID_ARGUMENT SIZE_INVALID,
  // RESOURCE_EXHAUSTED MEMORY_EXHAUSTED, INTERNAL SHARED_MEMORY_FAILED (the call named in the
  // text). Blocks for as long as the kernel zeroes `bytes`.
  static Result<SharedMemory> create(std::string_view name, uint64_t bytes,
                                     const SharedMemoryOptions& options = {});

  // Maps the first `bytes` of an existing descriptor, which must be sealed against shrinking and at
  // least that large. For memory of our own side (the rails process maps the arena so); what comes
  // from a worker goes through HostPool::import. Errors: INVALID_ARGUMENT SIZE_INVALID,
  // SHARED_MEMORY_NOT_SEALED or SHARED_MEMORY_TOO_SMALL; INTERNAL SHARED_MEMORY_FAILED.
  static Result<SharedMemory> map(UniqueFd fd, uint64_t bytes, Access access,
                                  const SharedMemoryOptions& options = {});

  // How much of it is in huge pages now, in bytes; 0 as well where /proc does not tell. Reads the
  // list of all of the process's mappings: for start-up.
  uint64_t huge_page_bytes() const;

  // Adds F_SEAL_* bits, e.g. F_SEAL_FUTURE_WRITE: this mapping stays writable, later ones are not.
  Status seal(int seals);

  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  int fd() const { return fd_.get(); }  // borrowed
  explicit operator bool() const { return data_ != nullptr; }

 private:
  SharedMemory(UniqueFd fd, std::byte* data, uint64_t bytes)
      : fd_(std::move(fd)), data_(data), bytes_(bytes) {}
  UniqueFd fd_;
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

// The arena in host memory: segments that are registered with the network one by one, each a memfd
// of its own. The daemon creates it, the rails process maps the same descriptors.
class HostArena {
 public:
  HostArena() = default;

  // One new segment for each size (> 0). All or none. Errors as SharedMemory::create, and
  // INVALID_ARGUMENT TOO_MANY_SEGMENTS.
  static Result<HostArena> create(std::string_view name, const std::vector<uint64_t>& segment_bytes,
                                  const SharedMemoryOptions& options = {});

  // The same arena in another process. Errors as SharedMemory::map.
  struct Segment {
    UniqueFd fd;
    uint64_t bytes = 0;
  };
  static Result<HostArena> map(std::vector<Segment> segments,
                               const SharedMemoryOptions& options = {});

  // The region's first byte; nullptr unless the whole region lies inside its segment.
  std::byte* address_of(const Region& region) const;

  uint32_t segment_count() const { return static_cast<uint32_t>(segments_.size()); }
  const SharedMemory& segment(uint32_t index) const { return segments_[index]; }
  std::vector<uint64_t> segment_bytes() const;
  // Borrowed, in the order of the segments; to be passed to the rails process.
  std::vector<int> fds() const;
  uint64_t total_bytes() const;

 private:
  std::vector<SharedMemory> segments_;
};

}  // namespace kvferry::memory
