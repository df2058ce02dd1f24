#include "daemon/memory/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <limits>
#include <string>

#include "daemon/base/huge_pages.h"
#include "daemon/base/units.h"

namespace kvferry::memory {
namespace {

constexpr uint64_t kMaxBytes = uint64_t{1} << 46;  // of user address space, with room to spare
constexpr std::size_t kMaxSegments = 1024;
constexpr std::size_t kMaxNameBytes = 200;  // memfd_create takes 249

Status check_size(uint64_t bytes) {
  if (bytes == 0 || bytes > kMaxBytes)
    return invalid("bytes", "SIZE_INVALID", "a mapping has 1 to 2^46 bytes");
  return {};
}

// Bytes that this process may have at most: the machine's, or its cgroup's limit.
uint64_t memory_limit() {
  const long pages = ::sysconf(_SC_PHYS_PAGES);
  uint64_t limit = pages > 0 ? static_cast<uint64_t>(pages) * 4096 : kMaxBytes;
  std::string path;
  std::ifstream cgroups("/proc/self/cgroup");
  for (std::string line; std::getline(cgroups, line);)
    if (line.starts_with("0::")) path = line.substr(3);
  // Within a container the path may be the host's; its own group is at the root.
  for (const std::string& at : {path, std::string()}) {
    std::ifstream file("/sys/fs/cgroup" + at + "/memory.max");
    if (uint64_t bytes = 0; file >> bytes) limit = std::min(limit, bytes);  // or "max"
  }
  return limit;
}

// The kernel does not refuse to fill more memory than there is: it kills.
Status check_memory(uint64_t bytes) {
  const uint64_t limit = memory_limit();
  if (bytes >= limit)
    return fail(
        Code::kResourceExhausted, "MEMORY_EXHAUSTED",
        std::to_string(bytes) + " bytes, of which the process may have " + std::to_string(limit));
  return {};
}

tl::unexpected<Error> call_failed(std::string_view call) {
  return fail_errno("SHARED_MEMORY_FAILED", call, errno);
}

void advise(std::byte* data, uint64_t bytes, const SharedMemoryOptions& options) {
  if (!options.in_core_dumps) ::madvise(data, bytes, MADV_DONTDUMP);
}

Result<std::byte*> map_fd(int fd, uint64_t bytes, Access access) {
  const int protection = access == Access::kReadWrite ? PROT_READ | PROT_WRITE : PROT_READ;
  void* data = map_aligned(fd, bytes, protection);
  if (data == MAP_FAILED) return call_failed("mmap");
  return static_cast<std::byte*>(data);
}

Status allocate_blocks(int fd, uint64_t bytes) {
  int rc = 0;
  do {
    rc = ::fallocate(fd, 0, 0, static_cast<off_t>(bytes));
  } while (rc != 0 && errno == EINTR);
  if (rc == 0) return {};
  if (errno == ENOSPC || errno == ENOMEM)
    return fail(Code::kResourceExhausted, "MEMORY_EXHAUSTED",
                "no memory for " + std::to_string(bytes) + " bytes of shared memory");
  return call_failed("fallocate");
}

}  // namespace

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  if (this != &other) {
    if (data_ != nullptr) ::munmap(data_, bytes_);
    fd_ = std::move(other.fd_);
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

Result<SharedMemory> SharedMemory::create(std::string_view name, uint64_t bytes,
                                          const SharedMemoryOptions& options) {
  KVFERRY_RETURN_IF_ERROR(check_size(bytes));
  KVFERRY_RETURN_IF_ERROR(check_memory(bytes));
  const std::string short_name(name.substr(0, kMaxNameBytes));
  UniqueFd fd(::memfd_create(short_name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return call_failed("memfd_create");
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) return call_failed("ftruncate");
  auto data = map_fd(fd.get(), bytes, Access::kReadWrite);
  if (!data) return tl::unexpected<Error>(std::move(data).error());
  SharedMemory memory(std::move(fd), *data, bytes);
  advise(memory.data_, bytes, options);
  if (options.before_touch) options.before_touch(memory.data_, bytes);
  // Huge pages come only by touching a mapping that asks for them, so that goes first; a failure
  // here shows again in fallocate.
  if (options.huge_pages) populate_huge(memory.data_, bytes);
  KVFERRY_RETURN_IF_ERROR(allocate_blocks(memory.fd(), bytes));
  KVFERRY_RETURN_IF_ERROR(
      memory.seal(F_SEAL_SHRINK | F_SEAL_GROW | (options.last_seals ? F_SEAL_SEAL : 0)));
  if (options.populate) ::madvise(memory.data_, bytes, MADV_POPULATE_WRITE);
  return memory;
}

Result<SharedMemory> SharedMemory::map(UniqueFd fd, uint64_t bytes, Access access,
                                       const SharedMemoryOptions& options) {
  KVFERRY_RETURN_IF_ERROR(check_size(bytes));
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0) return call_failed("fcntl(F_GET_SEALS)");
  if ((seals & F_SEAL_SHRINK) == 0)
    return invalid("fd", "SHARED_MEMORY_NOT_SEALED", "the memory can still be shrunk");
  struct stat file {};
  if (::fstat(fd.get(), &file) != 0) return call_failed("fstat");
  if (file.st_size < 0 || static_cast<uint64_t>(file.st_size) < bytes)
    return invalid("fd", "SHARED_MEMORY_TOO_SMALL",
                   "the memory has " + std::to_string(file.st_size) + " bytes, expected " +
                       std::to_string(bytes));
  auto data = map_fd(fd.get(), bytes, access);
  if (!data) return tl::unexpected<Error>(std::move(data).error());
  SharedMemory memory(std::move(fd), *data, bytes);
  advise(memory.data_, bytes, options);
  if (options.populate)
    ::madvise(memory.data_, bytes,
              access == Access::kReadWrite ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
  return memory;
}

uint64_t SharedMemory::huge_page_bytes() const {
  const auto begin = reinterpret_cast<uintptr_t>(data_);
  std::ifstream maps("/proc/self/smaps");
  uint64_t bytes = 0;
  bool ours = false;
  for (std::string line; std::getline(maps, line);) {
    uint64_t first = 0;
    uint64_t last = 0;
    uint64_t kib = 0;
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " ", &first, &last) == 2)
      ours = first >= begin && first < begin + bytes_;
    else if (ours && std::sscanf(line.c_str(), "ShmemPmdMapped: %" SCNu64 " kB", &kib) == 1)
      bytes += kib << 10;
  }
  return bytes;
}

Status SharedMemory::seal(int seals) {
  if (::fcntl(fd_.get(), F_ADD_SEALS, seals) != 0) return call_failed("fcntl(F_ADD_SEALS)");
  return {};
}

Result<HostArena> HostArena::create(std::string_view name,
                                    const std::vector<uint64_t>& segment_bytes,
                                    const SharedMemoryOptions& options) {
  if (segment_bytes.size() > kMaxSegments)
    return invalid("segments", "TOO_MANY_SEGMENTS",
                   "an arena has at most " + std::to_string(kMaxSegments) + " segments");
  uint64_t total = 0;
  for (const uint64_t bytes : segment_bytes)
    total += std::min(bytes, kMaxBytes);  // of 1,024 at most; a larger one is refused below
  KVFERRY_RETURN_IF_ERROR(check_memory(total));
  HostArena arena;
  arena.segments_.reserve(segment_bytes.size());
  for (const uint64_t bytes : segment_bytes) {
    auto segment = SharedMemory::create(name, bytes, options);
    if (!segment) return tl::unexpected<Error>(std::move(segment).error());
    arena.segments_.push_back(std::move(*segment));
  }
  return arena;
}

Result<HostArena> HostArena::map(std::vector<Segment> segments,
                                 const SharedMemoryOptions& options) {
  if (segments.size() > kMaxSegments)
    return invalid("segments", "TOO_MANY_SEGMENTS",
                   "an arena has at most " + std::to_string(kMaxSegments) + " segments");
  HostArena arena;
  arena.segments_.reserve(segments.size());
  for (Segment& part : segments) {
    auto segment = SharedMemory::map(std::move(part.fd), part.bytes, Access::kReadWrite, options);
    if (!segment) return tl::unexpected<Error>(std::move(segment).error());
    arena.segments_.push_back(std::move(*segment));
  }
  return arena;
}

std::byte* HostArena::address_of(const Region& region) const {
  if (region.segment >= segments_.size()) return nullptr;
  const SharedMemory& segment = segments_[region.segment];
  uint64_t end = 0;
  if (!checked_add(region.offset, region.bytes, end) || end > segment.bytes()) return nullptr;
  return segment.data() + region.offset;
}

std::vector<uint64_t> HostArena::segment_bytes() const {
  std::vector<uint64_t> sizes;
  for (const SharedMemory& segment : segments_) sizes.push_back(segment.bytes());
  return sizes;
}

std::vector<int> HostArena::fds() const {
  std::vector<int> fds;
  for (const SharedMemory& segment : segments_) fds.push_back(segment.fd());
  return fds;
}

uint64_t HostArena::total_bytes() const {
  uint64_t total = 0;  // at most 1024 segments of 2^46 bytes: no overflow
  for (const SharedMemory& segment : segments_) total += segment.bytes();
  return total;
}

}  // namespace kvferry::memory
