// The hostile end of a SEQPACKET socket, and a folder for it.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "daemon/base/seqpacket.h"
#include "tests/fuzz/input.h"

namespace kvferry::fuzz {

// Goes with the process.
class Folder {
 public:
  Folder() {
    path_ = (std::filesystem::temp_directory_path() / "kvferry-fuzz-XXXXXX").string();
    FUZZ_CHECK(::mkdtemp(path_.data()) != nullptr, "a folder");
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

class SocketClient {
 public:
  explicit SocketClient(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    fd_.reset(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    FUZZ_CHECK(
        ::connect(fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0,
        "somebody listens");
  }

  bool send(std::span<const uint8_t> bytes, std::span<const int> fds = {}) {
    return send_message(fd_.get(), bytes.data(), bytes.size(), fds);
  }
  // The next message, waited for; empty when the other end has closed. That neither comes in ten
  // seconds is a fault.
  std::vector<std::byte> receive() {
    for (;;) {
      pollfd polled{fd_.get(), POLLIN, 0};
      const int ready = ::poll(&polled, 1, 10'000);
      // The fuzzer's own timer.
      if (ready < 0 && errno == EINTR) continue;
      FUZZ_CHECK(ready == 1, "it is answered or closed");
      std::vector<std::byte> buffer(4096);
      std::size_t bytes = 0;
      std::vector<UniqueFd> fds;
      switch (receive_message(fd_.get(), buffer, bytes, fds)) {
        case Received::kMessage:
          buffer.resize(bytes);
          return buffer;
        case Received::kNothing:
          continue;
        default:
          return {};
      }
    }
  }
  // This end says no more; what the other one still says is read until it closes too.
  void finish() {
    ::shutdown(fd_.get(), SHUT_WR);
    while (!receive().empty()) {
    }
  }

 private:
  UniqueFd fd_;
};

inline std::size_t open_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

}  // namespace kvferry::fuzz
