// Another daemon's borrower: a process that maps what a test's lender lends, writes where it is
// told, and is killed or stopped. Its end is the evidence that the lender looks for, and the driver
// opens CUDA IPC handles only there. The test's end starts arena_peer and asks it over a socket;
// errors of the set-up fail the test.
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
#include <string>

#include "daemon/base/unique_fd.h"
#include "daemon/memory/region.h"
#include "daemon/rpc/peer_messages.h"

namespace kvferry::node {

inline constexpr std::size_t kPeerArenas = 4;
inline constexpr std::size_t kPeerSegments = 4;

enum class PeerOp : uint32_t {
  kUp = 1,   // a link over which `offer` is the answer; waits for `expected` mapped arenas
  kWrite,    // `byte` to all of the region
  kHold,     // a copy begins: the arena is held
  kRelease,  // it ends
  kGone,     // the link's end
};

struct PeerOffer {
  std::array<char, 108> path{};
  Token token;
  rpc::HostId host;
  uint32_t arena_count = 0;
  struct Arena {
    uint32_t number = 0;
    rpc::LentKind kind{};
    std::array<uint8_t, 16> device_uuid{};
    uint32_t segment_count = 0;
    std::array<rpc::OfferedArena::Segment, kPeerSegments> segments{};
  };
  std::array<Arena, kPeerArenas> arenas{};
};

struct PeerRequest {
  PeerOp op{};
  uint64_t link = 0;
  uint32_t expected = 0;
  PeerOffer offer;
  uint32_t arena = 0;
  memory::Region region;
  uint8_t byte = 0;
};

struct PeerReply {
  std::array<char, 64> reason{};  // empty: done
};

inline PeerOffer to_plain(const rpc::ArenasOffer& offer) {
  PeerOffer out;
  offer.socket_path.copy(out.path.data(), out.path.size() - 1);
  out.token = offer.token;
  out.host = offer.host;
  REQUIRE(offer.arenas.size() <= kPeerArenas);
  for (const rpc::OfferedArena& arena : offer.arenas) {
    PeerOffer::Arena& to = out.arenas[out.arena_count++];
    to.number = arena.number;
    to.kind = arena.kind;
    to.device_uuid = arena.device_uuid;
    REQUIRE(arena.segments.size() <= kPeerSegments);
    for (const auto& segment : arena.segments) to.segments[to.segment_count++] = segment;
  }
  return out;
}

class ArenaPeer {
 public:
  // `library`: of the fake driver; null: it has no GPU.
  ArenaPeer(const char* binary, const char* library) {
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
  ~ArenaPeer() {
    if (pid_ <= 0) return;
    socket_.reset();
    int status = 0;
    ::waitpid(pid_, &status, 0);
    CHECK(status == 0);
  }
  ArenaPeer(const ArenaPeer&) = delete;
  ArenaPeer& operator=(const ArenaPeer&) = delete;

  std::string up(uint64_t link, const rpc::ArenasOffer& offer, uint32_t expected) {
    PeerRequest request;
    request.op = PeerOp::kUp;
    request.link = link;
    request.offer = to_plain(offer);
    request.expected = expected;
    return ask(request);
  }
  std::string write(uint64_t link, uint32_t arena, const memory::Region& region, uint8_t byte) {
    PeerRequest request;
    request.op = PeerOp::kWrite;
    request.link = link;
    request.arena = arena;
    request.region = region;
    request.byte = byte;
    return ask(request);
  }
  std::string tell(PeerOp op, uint64_t link, uint32_t arena = 0) {
    PeerRequest request;
    request.op = op;
    request.link = link;
    request.arena = arena;
    return ask(request);
  }
  void stop() {
    REQUIRE(::kill(pid_, SIGSTOP) == 0);
    int status = 0;
    REQUIRE(::waitpid(pid_, &status, WUNTRACED) == pid_);
    REQUIRE(WIFSTOPPED(status));
  }
  void kill() {
    REQUIRE(::kill(pid_, SIGKILL) == 0);
    REQUIRE(::waitpid(pid_, nullptr, 0) == pid_);
    pid_ = -1;
  }

 private:
  std::string ask(const PeerRequest& request) {
    REQUIRE(::send(socket_.get(), &request, sizeof request, MSG_NOSIGNAL) ==
            static_cast<ssize_t>(sizeof request));
    PeerReply reply;
    REQUIRE(::recv(socket_.get(), &reply, sizeof reply, 0) == static_cast<ssize_t>(sizeof reply));
    return reply.reason.data();
  }

  pid_t pid_ = -1;
  UniqueFd socket_;
};

}  // namespace kvferry::node
