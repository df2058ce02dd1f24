// Messages with descriptors over Unix sockets of type SEQPACKET, and the process at the other end.
// Used where one process lends memory to another and wants to see it die. Any thread; nothing
// blocks unless it says so.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"

namespace kvferry {

inline constexpr std::size_t kMaxMessageFds = 64;
inline constexpr std::size_t kMaxSocketPathBytes = 107;

// Binds and listens, close-on-exec and without blocking. The file gets its mode before anybody can
// connect. A socket file that nobody listens at is replaced. ALREADY_EXISTS SOCKET_IN_USE for a
// living one; `failed` is the reason of the others: FAILED_PRECONDITION where something else lies
// there, INTERNAL with the call. The path has 1 to kMaxSocketPathBytes bytes.
Result<UniqueFd> listen_seqpacket(const std::string& path, uint32_t mode,
                                  const std::string& failed);

// The next connection, as listen_seqpacket(); empty: there is none. Where this process has no
// descriptor left, `spare` (one to /dev/null) is given up for a moment to turn the caller away: a
// connection that nobody accepts would wake its poller for ever.
UniqueFd accept_connection(int listener, UniqueFd& spare);
UniqueFd spare_descriptor();

// One message with at most kMaxMessageFds descriptors; false if not all of it went, e.g. because
// the other end reads too slowly.
bool send_message(int fd, const void* data, std::size_t bytes, std::span<const int> fds = {});

enum class Received : uint8_t {
  kMessage,
  kNothing,  // none is there
  kClosed,   // the other end is
  kBroken,   // longer than the buffer, or with more descriptors
};
// Descriptors come close-on-exec; those of a broken message are in `fds` too, to be closed. At most
// `max_fds` (<= kMaxMessageFds, even) are taken.
Received receive_message(int fd, std::span<std::byte> buffer, std::size_t& bytes,
                         std::vector<UniqueFd>& fds, std::size_t max_fds = kMaxMessageFds);

// A descriptor that becomes readable when the process has exited; empty where there is no such
// process or the kernel has no such thing.
UniqueFd open_process(pid_t pid);
// The same of the process that connected, whose pid the socket has told. Where the kernel cannot
// name it by the socket, its pid is opened; a socket that is still connected afterwards makes it
// all but certain that the pid was not reused (the exception, a forked child holding it, can only
// make that child the one that is looked at).
UniqueFd peer_process(int fd, pid_t pid);

bool readable_now(int fd);
bool hung_up(int fd);

}  // namespace kvferry
