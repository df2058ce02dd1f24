#include "daemon/rails/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <limits>

#include "daemon/base/huge_pages.h"

namespace kvferry::rails {

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this != &other) {
    reset();
    base_ = std::exchange(other.base_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

void Mapping::reset() {
  if (base_ != nullptr) ::munmap(base_, bytes_);
  base_ = nullptr;
  bytes_ = 0;
}

Result<Mapping> Mapping::map(int fd, uint64_t bytes) {
  if (bytes == 0 || bytes > std::numeric_limits<size_t>::max())
    return invalid("bytes", "SEGMENT_INVALID", "cannot map " + std::to_string(bytes) + " bytes");
  void* const base = map_aligned(fd, bytes, PROT_READ | PROT_WRITE);
  if (base == MAP_FAILED) return fail_errno("MAP_FAILED", "mmap", errno);
  // Best effort: a kernel without it only makes dumps larger.
  (void)::madvise(base, bytes, MADV_DONTDUMP);
  Mapping mapping;
  mapping.base_ = static_cast<std::byte*>(base);
  mapping.bytes_ = bytes;
  return mapping;
}

Result<UniqueFd> make_sealed_memfd(const char* name, uint64_t bytes) {
  if (bytes > static_cast<uint64_t>(std::numeric_limits<off_t>::max()))
    return invalid("bytes", "SEGMENT_INVALID", "too large: " + std::to_string(bytes));
  UniqueFd fd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return fail_errno("MEMFD_FAILED", "memfd_create", errno);
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0)
    return fail_errno("MEMFD_FAILED", "ftruncate", errno);
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return fail_errno("MEMFD_FAILED", "fcntl(F_ADD_SEALS)", errno);
  return fd;
}

Status check_sealed(int fd, uint64_t bytes) {
  struct stat info = {};
  if (::fstat(fd, &info) != 0) return fail_errno("SEGMENT_INVALID", "fstat", errno);
  if (info.st_size < 0 || static_cast<uint64_t>(info.st_size) < bytes || bytes == 0)
    return fail(Code::kInvalidArgument, "SEGMENT_INVALID",
                "has " + std::to_string(info.st_size) + " bytes, told " + std::to_string(bytes));
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0)
    return fail(Code::kInvalidArgument, "SEGMENT_INVALID", "not a memfd sealed against shrinking");
  return {};
}

Result<SocketPair> make_socket_pair(int type) {
  int fds[2] = {-1, -1};
  if (::socketpair(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) != 0)
    return fail_errno("SOCKET_FAILED", "socketpair", errno);
  return SocketPair{UniqueFd(fds[0]), UniqueFd(fds[1])};
}

void ring_doorbell(int fd) {
  const char bell = 1;
  (void)::send(fd, &bell, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void quiet_doorbell(int fd) {
  char bells[256];
  for (int round = 0; round < 4; ++round)
    if (::recv(fd, bells, sizeof bells, MSG_DONTWAIT) < static_cast<ssize_t>(sizeof bells)) return;
}

}  // namespace kvferry::rails
