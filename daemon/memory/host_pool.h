// A worker's KV memory in host shared memory, imported from a file descriptor. The worker is not
// trusted: it may hand over any descriptor, and keeps one of its own with which it can punch holes.
// So the descriptor is checked before it is mapped, and every copy from or to the pool runs under
// the guard of fault_guard.h; a fault ends the pool, and so does a hole that is seen later. All
// functions may be called from any thread.
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
#include "daemon/memory/pool.h"

namespace kvferry::memory {

struct HostPoolLimits {
  uint64_t max_bytes = uint64_t{1} << 46;  // what the worker may still register
};

class HostPool final : public Pool {
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

  // Memory of the daemon's own that is used like a worker's, all of it taken at once; no
  // descriptor. INVALID_ARGUMENT SIZE_INVALID, RESOURCE_EXHAUSTED MEMORY_EXHAUSTED. Blocks for as
  // long as the kernel zeroes `bytes`.
  static Result<std::shared_ptr<HostPool>> create(uint64_t bytes);

  ~HostPool() override;

  bool contains(const void* address) const override;
  // Both of one file, wherever in it.
  bool same_memory(const Pool& other) const override;

  // Whether all blocks are still allocated. A hole punched since the import costs the daemon memory
  // when it is read, and what is read is not what the worker computed. One fstat.
  bool still_allocated() const;
  // Whether a copy may begin. Looks for holes once in kLookEvery, as a layout may have a pool a
  // layer and its copies are many; a hole fails the pool.
  static constexpr Duration kLookEvery = std::chrono::milliseconds(20);
  bool usable(Time now) override;

 private:
  struct FileId {
    dev_t device;
    ino_t inode;
  };
  HostPool(UniqueFd fd, FileId file, std::byte* base, uint64_t bytes, uint64_t mapped_bytes)
      : Pool(base, bytes, nullptr), fd_(std::move(fd)), file_(file), mapped_bytes_(mapped_bytes) {}

  const UniqueFd fd_;
  const FileId file_;
  const uint64_t mapped_bytes_;  // rounded up to the file's page size
  std::atomic<int64_t> next_look_{0};
};

}  // namespace kvferry::memory
