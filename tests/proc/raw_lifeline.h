// The lifeline's messages by hand, right ones and wrong ones.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/seqpacket.h"
#include "daemon/base/unique_fd.h"
#include "proto/kvferry/lifeline.h"

namespace kvferry::bad_input {

inline constexpr int kRawPatienceMs = 20'000;
inline constexpr uint64_t kRawPoolBytes = 8192;

// A connection to the lifeline without a client behind it.
class RawLifeline {
 public:
  explicit RawLifeline(const std::string& path)
      : fd_(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    REQUIRE(::connect(fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  }

  void send(const void* data, std::size_t bytes, const std::vector<int>& fds = {}) {
    iovec part{const_cast<void*>(data), bytes};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    std::vector<char> control(CMSG_SPACE(fds.size() * sizeof(int)));
    if (!fds.empty()) {
      message.msg_control = control.data();
      message.msg_controllen = control.size();
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
      std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
    }
    // A daemon that has closed already is as good an answer as any.
    (void)::sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
  }
  template <typename T>
  void send(const T& message, const std::vector<int>& fds = {}) {
    send(&message, sizeof message, fds);
  }

  // The next message; false if the daemon has closed. Its descriptors are closed unless `fds` is
  // given.
  template <typename T>
  bool receive(T& out, std::vector<UniqueFd>* fds = nullptr) {
    for (;;) {
      pollfd entry{fd_.get(), POLLIN, 0};
      REQUIRE(::poll(&entry, 1, kRawPatienceMs) > 0);
      const ssize_t got = fds == nullptr ? ::recv(fd_.get(), &out, sizeof out, MSG_DONTWAIT)
                                         : receive_with_fds(&out, sizeof out, *fds);
      // Told once when what we sent last was not read; an answer may lie behind it.
      if (got < 0 && (errno == ECONNRESET || errno == EAGAIN) && !std::exchange(reset_, true))
        continue;
      return got == static_cast<ssize_t>(sizeof out);
    }
  }
  bool closed() {
    char byte = 0;
    return !receive(byte);
  }
  int fd() const { return fd_.get(); }

 private:
  ssize_t receive_with_fds(void* out, std::size_t size, std::vector<UniqueFd>& fds) {
    std::size_t bytes = 0;
    const std::span<std::byte> buffer(static_cast<std::byte*>(out), size);
    const Received got = receive_message(fd_.get(), buffer, bytes, fds);
    return got == Received::kMessage ? static_cast<ssize_t>(bytes) : 0;
  }

  UniqueFd fd_;
  bool reset_ = false;
};

inline lifeline::AttachRequest attach_request(const std::string& name) {
  lifeline::AttachRequest request;
  std::memcpy(request.name, name.data(), std::min(name.size(), sizeof request.name));
  return request;
}

inline lifeline::PoolsMessage pools_message(uint32_t count, const std::string& name = "pool") {
  lifeline::PoolsMessage message;
  message.count = count;
  for (std::size_t i = 0; i < std::size(message.pools); ++i) {
    const std::string own = name + (i == 0 ? "" : std::to_string(i));
    std::memcpy(message.pools[i].name, own.data(), own.size());
    message.pools[i].bytes = kRawPoolBytes;
  }
  return message;
}

}  // namespace kvferry::bad_input
