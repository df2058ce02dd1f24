// A process with memory on the fake GPU, as a worker is one to the daemon: CUDA IPC opens nothing
// in the process that exported it. The test's end starts gpu_exporter, tells it what to do over a
// socket and gets handles and descriptors back. Errors of the set-up fail the test.
#pragma once

#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <catch2/catch.hpp>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>

#include "daemon/base/unique_fd.h"

namespace kvferry::gpu_test {

enum class Op : uint32_t {
  kAlloc = 1,  // cuMemAlloc; answers the address and the IPC handle
  kFree,       // what kAlloc gave
  kVmmFd,      // cuMemCreate and map; answers the address and a descriptor
  kVmmFabric,  // ... and a fabric handle
  kWrite,      // `data` to address
  kHandle,     // the IPC handle of an address that kAlloc gave
};

struct Request {
  Op op = Op::kAlloc;
  int32_t device = 0;
  uint64_t bytes = 0;
  uint64_t address = 0;
  std::array<uint8_t, 64> data{};  // the first `bytes` of it
};

struct Reply {
  int32_t code = 0;  // CUresult
  uint32_t has_fd = 0;
  uint64_t address = 0;
  std::array<uint8_t, 64> handle{};
};

// The library of the fake driver is the exporter's only argument.
class Exporter {
 public:
  Exporter(const char* binary, const char* library) {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    socket_.reset(ends[0]);
    const UniqueFd theirs(ends[1]);
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, theirs.get(), STDIN_FILENO);
    char* arguments[] = {const_cast<char*>(binary), const_cast<char*>(library), nullptr};
    REQUIRE(::posix_spawn(&pid_, binary, &actions, nullptr, arguments, environ) == 0);
    ::posix_spawn_file_actions_destroy(&actions);
  }
  ~Exporter() { kill(); }
  Exporter(const Exporter&) = delete;
  Exporter& operator=(const Exporter&) = delete;

  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

  struct Exported {
    uint64_t address = 0;
    std::array<uint8_t, 64> handle{};
    UniqueFd fd;
  };
  Exported alloc(uint64_t bytes, int device = 0) { return ask({Op::kAlloc, device, bytes, 0, {}}); }
  Exported vmm_fd(uint64_t bytes, int device = 0) {
    return ask({Op::kVmmFd, device, bytes, 0, {}});
  }
  Exported vmm_fabric(uint64_t bytes, int device = 0) {
    return ask({Op::kVmmFabric, device, bytes, 0, {}});
  }
  Exported handle_of(uint64_t address, int device = 0) {
    return ask({Op::kHandle, device, 0, address, {}});
  }
  void free(uint64_t address, int device = 0) { ask({Op::kFree, device, 0, address, {}}); }
  void write(uint64_t address, std::span<const uint8_t> data, int device = 0) {
    Request request{Op::kWrite, device, data.size(), address, {}};
    REQUIRE(data.size() <= request.data.size());
    std::memcpy(request.data.data(), data.data(), data.size());
    ask(request);
  }

 private:
  Exported ask(const Request& request) {
    REQUIRE(::send(socket_.get(), &request, sizeof request, MSG_NOSIGNAL) ==
            static_cast<ssize_t>(sizeof request));
    Reply reply;
    iovec part{&reply, sizeof reply};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    REQUIRE(::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC) ==
            static_cast<ssize_t>(sizeof reply));
    REQUIRE(reply.code == 0);
    Exported out{reply.address, reply.handle, {}};
    if (reply.has_fd != 0) {
      const cmsghdr* header = CMSG_FIRSTHDR(&message);
      REQUIRE(header != nullptr);
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
      out.fd.reset(fd);
    }
    return out;
  }

  pid_t pid_ = -1;
  UniqueFd socket_;
};

}  // namespace kvferry::gpu_test
