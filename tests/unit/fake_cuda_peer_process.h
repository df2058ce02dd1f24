// The exporting process (fake_cuda_peer.cc), as a test has it: started, commanded, killed.
#pragma once

#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <catch2/catch.hpp>
#include <csignal>
#include <cstring>
#include <string>

#include "tests/unit/fake_cuda_peer.h"

namespace kvferry {

class Peer {
 public:
  Peer() {
    std::array<int, 2> pair{};
    REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair.data()) == 0);
    socket_ = pair[0];
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, pair[1], kPeerSocket);
    std::string program = KVFERRY_FAKE_CUDA_PEER;
    std::array<char*, 2> arguments{program.data(), nullptr};
    REQUIRE(::posix_spawn(&pid_, program.c_str(), &actions, nullptr, arguments.data(), environ) ==
            0);
    ::posix_spawn_file_actions_destroy(&actions);
    ::close(pair[1]);
    receive();
  }
  ~Peer() {
    if (pid_ != 0) CHECK(end() == 0);  // also what its sanitizer has found
    if (fd >= 0) ::close(fd);
  }

  uint8_t command(PeerCommand what) {
    uint8_t answer = 0xff;
    REQUIRE(::send(socket_, &what, sizeof what, 0) == sizeof what);
    REQUIRE(::recv(socket_, &answer, sizeof answer, 0) == sizeof answer);
    return answer;
  }
  void kill() {
    ::kill(pid_, SIGKILL);
    end();
  }
  // Closes the socket, after which the process ends; its status as of wait().
  int end() {
    ::close(socket_);
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = 0;
    return status;
  }

  PeerExports exports{};
  int fd = -1;

 private:
  void receive() {
    iovec data{&exports, sizeof exports};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
    msghdr message{};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    REQUIRE(::recvmsg(socket_, &message, MSG_CMSG_CLOEXEC) == sizeof exports);
    REQUIRE(CMSG_FIRSTHDR(&message) != nullptr);
    std::memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
  }

  pid_t pid_ = 0;
  int socket_ = -1;
};

}  // namespace kvferry
