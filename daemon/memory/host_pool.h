// A worker's KV memory in host shared memory, imported from a file descriptor. The worker is not
// trusted: it may hand over any descriptor, and keeps one of its own with which it can punch holes.
// So the descriptor is checked before it is mapped, and every copy from or to the pool runs under
// the guard of fault_guard.h; a fault ends the pool, and so does a hole that is seen later.
//
// Shared: the registration holds one reference and each copy under way another, so the mapping
// lasts until the last copy has ended. All functions may be called from any thread.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/base/units.h"

namespace kvferry::memory {

struct HostPoolLimits {
  uint64_t max_bytes = uint64_t{1} << 46;  // what the worker may still register
};

class HostPool {
 public:
  // Checks `fd` and maps its first `bytes` for reading and writing. `field` names the descriptor in
  // errors. All are INVALID_ARGUMENT except the last two:
  //   POOL_SIZE_INVALID     bytes is 0 or beyond what can be mapped
  //   POOL_NOT_A_FILE       no regular file, or a descriptor without access (O_PATH)
  //   POOL_NOT_WRITABLE     not opened for reading and writing, or sealed against writing
  //   POOL_WRONG_FILESYSTEM neither tmpfs nor hugetlbfs
  //   POOL_NOT_SEALED       can still be shrunk
  //   POOL_TOO_SMALL        the file is smaller than `bytes`
  //   POOL_SPARSE           some of the file's blocks are not allocated
  //   POOL_LIMIT            RESOURCE_EXHAUSTED: larger than limits.max_bytes
  //   POOL_MAP_FAILED       INTERNAL: the kernel refused a call; the text says which
  static Result<std::shared_ptr<HostPool>> import(UniqueFd fd, uint64_t bytes,
                                                  const HostPoolLimits& limits = {},
                                                  std::string field = "pools");

  // Memory of the daemon's own that is used like a worker's, all of it taken at once. Errors: those
  // of SharedMemory::create. Blocks for as long as the kernel zeroes `bytes`.
  static Result<std::shared_ptr<HostPool>> create(std::string_view name, uint64_t bytes);

  ~HostPool();
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  std::byte* base() const { return base_; }
  uint64_t bytes() const { return bytes_; }
  bool contains(const void* address) const;
  // Whether both are of one file, so that some bytes may be of both.
  bool same_file(const HostPool& other) const {
    return file_.device == other.file_.device && file_.inode == other.file_.inode;
  }

  // Set when a copy faulted or a hole was seen, never cleared: nothing is copied from or to the
  // pool any more.
  bool failed() const { return failed_.load(std::memory_order_acquire); }
  void mark_failed() { failed_.store(true, std::memory_order_release); }

  // Whether all blocks are still allocated. A hole punched since the import costs the daemon memory
  // when it is read, and what is read is not what the worker computed. One fstat.
  bool still_allocated() const;
  // Whether a copy may begin. Looks for holes once in kLookEvery, as a layout may have a pool a
  // layer and its copies are many; a hole fails the pool.
  static constexpr Duration kLookEvery = std::chrono::milliseconds(20);
  bool usable(Time now);

 private:
  struct FileId {
    dev_t device;
    ino_t inode;
  };
  HostPool(UniqueFd fd, FileId file, std::byte* base, uint64_t bytes, uint64_t mapped_bytes)
      : fd_(std::move(fd)), file_(file), base_(base), bytes_(bytes), mapped_bytes_(mapped_bytes) {}

  const UniqueFd fd_;
  const FileId file_;
  std::byte* const base_;
  const uint64_t bytes_;
  const uint64_t mapped_bytes_;  // rounded up to the file's page size
  std::atomic<bool> failed_{false};
  std::atomic<int64_t> next_look_{0};
};

}  // namespace kvferry::memory
