#include "daemon/memory/host_pool.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#include "daemon/base/huge_pages.h"
#include "daemon/base/units.h"

namespace kvferry::memory {
namespace {

constexpr uint64_t kBlockBytes = 512;  // the unit of st_blocks, whatever the file system
constexpr uint64_t kPageBytes = 4096;
constexpr dev_t kNoDevice = ~dev_t{0};  // of memory that is no file's

tl::unexpected<Error> call_failed(std::string_view call) {
  return fail_errno("POOL_MAP_FAILED", call, errno);
}

bool all_blocks_allocated(const struct stat& file) {
  uint64_t allocated = 0;
  return file.st_size >= 0 && file.st_blocks >= 0 &&
         checked_mul(static_cast<uint64_t>(file.st_blocks), kBlockBytes, allocated) &&
         // The whole file, not only what is mapped: blocks are counted, not located.
         allocated >= static_cast<uint64_t>(file.st_size);
}

Status check_access(int fd, const std::string& field) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || (flags & O_PATH) != 0)
    return invalid(field, "POOL_NOT_A_FILE", "no usable file descriptor");
  if ((flags & O_ACCMODE) != O_RDWR)
    return invalid(field, "POOL_NOT_WRITABLE",
                   "the descriptor is not open for reading and writing");
  return {};
}

Status check_seals(int fd, const std::string& field) {
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0)
    return invalid(field, "POOL_NOT_SEALED", "the memory is not sealed with F_SEAL_SHRINK");
  if ((seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) != 0)
    return invalid(field, "POOL_NOT_WRITABLE", "the memory is sealed against writing");
  return {};
}

}  // namespace

Result<std::shared_ptr<HostPool>> HostPool::import(UniqueFd fd, uint64_t bytes,
                                                   const HostPoolLimits& limits,
                                                   std::string field) {
  if (bytes == 0 || bytes > static_cast<uint64_t>(std::numeric_limits<off_t>::max()) - (1U << 30))
    return invalid(field, "POOL_SIZE_INVALID", "a pool has at least one byte and can be mapped");
  if (bytes > limits.max_bytes)
    return fail(Code::kResourceExhausted, "POOL_LIMIT",
                std::to_string(bytes) + " bytes, of which the worker may register " +
                    std::to_string(limits.max_bytes),
                field);
  KVFERRY_RETURN_IF_ERROR(check_access(fd.get(), field));
  struct stat file {};
  if (::fstat(fd.get(), &file) != 0) return call_failed("fstat");
  if (!S_ISREG(file.st_mode)) return invalid(field, "POOL_NOT_A_FILE", "not a regular file");
  struct statfs volume {};
  if (::fstatfs(fd.get(), &volume) != 0) return call_failed("fstatfs");
  const bool huge = volume.f_type == HUGETLBFS_MAGIC;
  if (volume.f_type != TMPFS_MAGIC && !huge)
    return invalid(field, "POOL_WRONG_FILESYSTEM", "the file lies on neither tmpfs nor hugetlbfs");
  KVFERRY_RETURN_IF_ERROR(check_seals(fd.get(), field));
  // Only now, when it cannot shrink any more, does the size mean something.
  if (::fstat(fd.get(), &file) != 0) return call_failed("fstat");
  if (file.st_size < 0 || static_cast<uint64_t>(file.st_size) < bytes)
    return invalid(field, "POOL_TOO_SMALL",
                   "the file has " + std::to_string(file.st_size) + " bytes, told were " +
                       std::to_string(bytes));
  if (!all_blocks_allocated(file))
    return invalid(field, "POOL_SPARSE", "not all of the file's blocks are allocated");

  // Unmapping huge pages takes a multiple of their size.
  const uint64_t page =
      huge && volume.f_bsize > 0 ? static_cast<uint64_t>(volume.f_bsize) : kPageBytes;
  const uint64_t mapped = round_up(bytes, page);
  constexpr int kReadWrite = PROT_READ | PROT_WRITE;
  void* base = huge ? ::mmap(nullptr, mapped, kReadWrite, MAP_SHARED, fd.get(), 0)
                    : map_aligned(fd.get(), mapped, kReadWrite);
  if (base == MAP_FAILED) return call_failed("mmap");
  // Best effort: a worker's memory has no business in the daemon's core dump.
  ::madvise(base, mapped, MADV_DONTDUMP);
  return std::shared_ptr<HostPool>(new HostPool(std::move(fd), {file.st_dev, file.st_ino},
                                                static_cast<std::byte*>(base), bytes, mapped));
}

Result<std::shared_ptr<HostPool>> HostPool::create(uint64_t bytes) {
  static std::atomic<ino_t> made{0};
  if (bytes == 0 || bytes > uint64_t{1} << 46)
    return invalid("bytes", "SIZE_INVALID", std::to_string(bytes) + " bytes");
  const uint64_t mapped = round_up(bytes, kPageBytes);
  void* base = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED)
    return fail(Code::kResourceExhausted, "MEMORY_EXHAUSTED",
                "mmap of " + std::to_string(mapped) + " bytes: " + std::strerror(errno));
  ::madvise(base, mapped, MADV_HUGEPAGE);
  ::madvise(base, mapped, MADV_POPULATE_WRITE);
  ::madvise(base, mapped, MADV_DONTDUMP);
  return std::shared_ptr<HostPool>(
      new HostPool({}, {kNoDevice, ++made}, static_cast<std::byte*>(base), bytes, mapped));
}

HostPool::~HostPool() {
  ::munmap(base(), mapped_bytes_);
}

bool HostPool::contains(const void* address) const {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto begin = reinterpret_cast<uintptr_t>(base());
  return at >= begin && at - begin < mapped_bytes_;
}

bool HostPool::same_memory(const Pool& other) const {
  const auto* there = dynamic_cast<const HostPool*>(&other);
  return there != nullptr && file_.device == there->file_.device &&
         file_.inode == there->file_.inode;
}

bool HostPool::usable(Time now) {
  if (failed()) return false;
  if (now.ns < next_look_.load(std::memory_order_relaxed)) return true;
  next_look_.store((now + kLookEvery).ns, std::memory_order_relaxed);
  if (still_allocated()) return true;
  mark_failed();
  return false;
}

bool HostPool::still_allocated() const {
  if (!fd_) return true;
  struct stat file {};
  return ::fstat(fd_.get(), &file) == 0 && all_blocks_allocated(file);
}

}  // namespace kvferry::memory
