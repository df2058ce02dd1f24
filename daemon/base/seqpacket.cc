#include "daemon/base/seqpacket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

namespace kvferry {

Result<UniqueFd> listen_seqpacket(const std::string& path, uint32_t mode,
                                  const std::string& failed) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, kMaxSocketPathBytes);
  const auto* generic = reinterpret_cast<const sockaddr*>(&address);
  struct stat existing {};
  if (::lstat(path.c_str(), &existing) == 0) {
    if (!S_ISSOCK(existing.st_mode))
      return fail(Code::kFailedPrecondition, failed, path + " is not a socket");
    UniqueFd probe(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (::connect(probe.get(), generic, sizeof address) == 0 || errno == EAGAIN)
      return fail(Code::kAlreadyExists, "SOCKET_IN_USE", "another process listens at " + path);
    ::unlink(path.c_str());
  }
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return fail_errno(failed, "socket", errno);
  if (::bind(fd.get(), generic, sizeof address) != 0)
    return fail_errno(failed, "bind(" + path + ")", errno);
  // Before listen: nobody can have connected under a wider mode.
  if (::chmod(path.c_str(), static_cast<mode_t>(mode)) != 0)
    return fail_errno(failed, "chmod(" + path + ")", errno);
  if (::listen(fd.get(), 128) != 0) return fail_errno(failed, "listen", errno);
  return fd;
}

UniqueFd spare_descriptor() {
  return UniqueFd(::open("/dev/null", O_RDONLY | O_CLOEXEC));
}

UniqueFd accept_connection(int listener, UniqueFd& spare) {
  UniqueFd fd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!fd && (errno == EMFILE || errno == ENFILE) && spare) {
    spare.reset();
    UniqueFd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC)).reset();
    spare = spare_descriptor();
  }
  return fd;
}

bool send_message(int fd, const void* data, std::size_t bytes, std::span<const int> fds) {
  if (fds.size() > kMaxMessageFds) return false;
  iovec part{const_cast<void*>(data), bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxMessageFds)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size_bytes());
  }
  return ::sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
}

Received receive_message(int fd, std::span<std::byte> buffer, std::size_t& bytes,
                         std::vector<UniqueFd>& fds, std::size_t max_fds) {
  iovec part{buffer.data(), buffer.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxMessageFds)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = CMSG_SPACE(sizeof(int) * std::min(max_fds, kMaxMessageFds));
  const ssize_t got = ::recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0) return errno == EAGAIN || errno == EINTR ? Received::kNothing : Received::kClosed;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int value = -1;
      std::memcpy(&value, CMSG_DATA(header) + i * sizeof(int), sizeof value);
      fds.emplace_back(value);
    }
  }
  if (got == 0) return Received::kClosed;
  if ((message.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) != 0) return Received::kBroken;
  bytes = static_cast<std::size_t>(got);
  return Received::kMessage;
}

UniqueFd open_process(pid_t pid) {
  return UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
}

UniqueFd peer_process(int fd, pid_t pid) {
  int pidfd = -1;
  socklen_t length = sizeof pidfd;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &length) == 0 && pidfd >= 0) {
    ::fcntl(pidfd, F_SETFD, FD_CLOEXEC);
    return UniqueFd(pidfd);
  }
  if (pid <= 0) return {};
  UniqueFd opened = open_process(pid);
  if (opened && hung_up(fd)) return {};
  return opened;
}

bool readable_now(int fd) {
  pollfd entry{fd, POLLIN | POLLRDHUP, 0};
  return ::poll(&entry, 1, 0) > 0;
}

bool hung_up(int fd) {
  pollfd entry{fd, POLLRDHUP, 0};
  return ::poll(&entry, 1, 0) > 0 && (entry.revents & (POLLHUP | POLLRDHUP | POLLERR)) != 0;
}

}  // namespace kvferry
