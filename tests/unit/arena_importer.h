// A process that maps the device arena of another, as the rails process does: the driver opens a
// CUDA IPC handle only there. The test's end starts arena_importer, hands segments over a socket
// and tells it what to write. Errors of the set-up fail the test; what the view refuses is
// answered.
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
#include <string>
#include <vector>

#include "daemon/base/unique_fd.h"
#include "daemon/gpu/device_arena.h"

namespace kvferry::gpu_test {

inline constexpr std::size_t kMaxSegments = 4;

enum class ImporterOp : uint32_t {
  kOpen = 1,  // the segments, each descriptor with the message; the view before goes
  kWrite,     // `data_bytes` of data to the region
  kClose,     // the view
};

struct WireSegment {
  gpu::ArenaKind kind{};
  uint64_t bytes = 0;
  gpu::Uuid device_uuid{};
  gpu::HandleValue handle{};
};

struct ImporterRequest {
  ImporterOp op = ImporterOp::kOpen;
  uint32_t segment_count = 0;
  std::array<WireSegment, kMaxSegments> segments{};
  memory::Region region{};
  uint32_t data_bytes = 0;
  std::array<uint8_t, 64> data{};
};

struct ImporterReply {
  std::array<char, 64> reason{};  // empty: done. "OUTSIDE": the view has no such region
  uint64_t held = 0;              // what the driver counts as not given back, but for contexts
};

// The library of the fake driver is the importer's only argument.
class Importer {
 public:
  Importer(const char* binary, const char* library) {
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
  // Ends by itself with its socket, and well: also what its sanitizer has found.
  ~Importer() {
    socket_.reset();
    int status = 0;
    ::waitpid(pid_, &status, 0);
    CHECK(status == 0);
  }
  Importer(const Importer&) = delete;
  Importer& operator=(const Importer&) = delete;

  ImporterReply open(const std::vector<gpu::ExportedSegment>& segments) {
    ImporterRequest request;
    REQUIRE(segments.size() <= kMaxSegments);
    request.segment_count = static_cast<uint32_t>(segments.size());
    std::vector<int> fds;
    for (std::size_t i = 0; i < segments.size(); ++i) {
      const gpu::ExportedSegment& one = segments[i];
      request.segments[i] = {one.kind, one.bytes, one.device_uuid, one.handle};
      if (one.fd) fds.push_back(one.fd.get());
    }
    return ask(request, fds);
  }
  ImporterReply write(const memory::Region& region, std::span<const uint8_t> data) {
    ImporterRequest request;
    request.op = ImporterOp::kWrite;
    request.region = region;
    REQUIRE(data.size() <= request.data.size());
    request.data_bytes = static_cast<uint32_t>(data.size());
    std::memcpy(request.data.data(), data.data(), data.size());
    return ask(request, {});
  }
  ImporterReply close() {
    ImporterRequest request;
    request.op = ImporterOp::kClose;
    return ask(request, {});
  }

 private:
  ImporterReply ask(const ImporterRequest& request, const std::vector<int>& fds) {
    ImporterRequest out = request;
    iovec part{&out, sizeof out};
    alignas(cmsghdr) char control[CMSG_SPACE(kMaxSegments * sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (!fds.empty()) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
      std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
    }
    REQUIRE(::sendmsg(socket_.get(), &message, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof out));
    ImporterReply reply;
    REQUIRE(::recv(socket_.get(), &reply, sizeof reply, 0) == static_cast<ssize_t>(sizeof reply));
    return reply;
  }

  pid_t pid_ = -1;
  UniqueFd socket_;
};

}  // namespace kvferry::gpu_test
