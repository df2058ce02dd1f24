// The owner of a mapping, and the sealed memfd that both processes map.
// Any thread, one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"

namespace kvferry::rails {

// A shared mapping of a whole memfd, left out of core dumps.
class Mapping {
 public:
  Mapping() = default;
  static Result<Mapping> map(int fd, uint64_t bytes);
  Mapping(Mapping&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping() { reset(); }
  std::byte* base() const { return base_; }
  uint64_t bytes() const { return bytes_; }
  void reset();

 private:
  std::byte* base_ = nullptr;
  uint64_t bytes_ = 0;
};

// Zeroed, close-on-exec, sealed against any change of size: nobody can make the other side's
// mapping fault.
Result<UniqueFd> make_sealed_memfd(const char* name, uint64_t bytes);

// Fails with SEGMENT_INVALID unless `fd` is a memfd that cannot shrink below `bytes`.
Status check_sealed(int fd, uint64_t bytes);

struct SocketPair {
  UniqueFd ours;
  UniqueFd theirs;
};
// A Unix socket pair of `type` (SOCK_STREAM or SOCK_SEQPACKET), both ends close-on-exec and
// non-blocking.
Result<SocketPair> make_socket_pair(int type);

// Doorbell: one byte, never blocks; a full one is already ringing.
void ring_doorbell(int fd);
// Reads what was rung, a bounded amount.
void quiet_doorbell(int fd);

}  // namespace kvferry::rails
