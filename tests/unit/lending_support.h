// What the tests of lent and borrowed arenas share: a directory, the log's lines, events, a raw
// client of the lender's socket, and links without a link manager.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "daemon/base/crypto.h"
#include "daemon/base/seqpacket.h"
#include "daemon/memory/shared_memory.h"
#include "daemon/node/arena_borrower.h"
#include "daemon/node/arena_lender.h"
#include "daemon/node/arena_wire.h"

namespace kvferry::node {

inline constexpr std::chrono::seconds kPatience{20};

// The lines that were logged (lending_log.cc), "message key=value ...".
std::vector<std::string> logged(const std::string& part = {});
void forget_log();

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string path = (std::filesystem::temp_directory_path() / "kvferry-lend-XXXXXX").string();
    REQUIRE(::mkdtemp(path.data()) != nullptr);
    path_ = path;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline std::size_t open_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

// A condition that another thread or process makes true.
template <typename Condition>
bool soon(Condition&& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

// What went to the engine.
class Events {
 public:
  EventSink sink() {
    return [this](engine::Event event) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        all_.push_back(std::move(event));
      }
      changed_.notify_all();
    };
  }
  // Waits for the n-th event (from 1) of the kind for which `pick` holds.
  template <typename T>
  bool wait(std::function<bool(const T&)> pick = {}, std::size_t n = 1) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, kPatience, [&] { return count_locked<T>(pick) >= n; });
  }
  template <typename T>
  std::size_t count(std::function<bool(const T&)> pick = {}) {
    std::lock_guard<std::mutex> lock(mutex_);
    return count_locked<T>(pick);
  }
  bool mapped(LinkId link, uint32_t arena) {
    return wait<engine::ArenaMapped>(
        [=](const auto& event) { return event.link == link && event.arena == arena; });
  }
  // How often the arena was told to be lent over the link.
  std::size_t lent(LinkId link, uint32_t arena) {
    return count<engine::ArenaLent>(
        [=](const auto& event) { return event.link == link && event.arena == arena; });
  }
  // All that says what a peer has no more.
  std::size_t evidence() {
    return count<engine::PeerUnmapped>() + count<engine::PeerProcessGone>();
  }
  bool unmapped(LinkId link) {
    return wait<engine::PeerUnmapped>([=](const auto& event) { return event.link == link; });
  }
  std::size_t size() {
    std::lock_guard<std::mutex> lock(mutex_);
    return all_.size();
  }

 private:
  template <typename T>
  std::size_t count_locked(const std::function<bool(const T&)>& pick) {
    std::size_t count = 0;
    for (const engine::Event& event : all_)
      if (const T* one = std::get_if<T>(&event); one != nullptr && (!pick || pick(*one))) ++count;
    return count;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<engine::Event> all_;
};

inline rpc::HostId host_id(uint8_t byte = 7) {
  rpc::HostId host;
  host.bytes.fill(byte);
  return host;
}
inline BootId boot_id(uint8_t byte) {
  BootId boot;
  boot.bytes.fill(byte);
  return boot;
}
// What both sides of a link derive from its keys, for the lender's number of it.
inline rpc::WelcomeProof proof_of(LinkId link) {
  rpc::WelcomeProof proof;
  std::memcpy(proof.bytes.data(), &link.value, sizeof link.value);
  proof.bytes[15] = 1;
  return proof;
}
inline PeerRef peer_ref(uint64_t link, uint8_t boot = 1) {
  return {LinkId{link}, "peer-" + std::to_string(boot), boot_id(boot)};
}

// An arena in host memory, as a lender has it.
struct HostMemory {
  explicit HostMemory(const std::vector<uint64_t>& sizes, uint32_t arena = 3, uint32_t first = 10) {
    auto made = memory::HostArena::create("kvferry-test", sizes);
    REQUIRE(made);
    memory = std::move(*made);
    lent.number = arena;
    for (uint32_t i = 0; i < sizes.size(); ++i)
      lent.segments.push_back({first + i, sizes[i], memory.segment(i).fd(), {}});
  }
  memory::HostArena memory;
  LentArena lent;
};

inline ArenaLenderConfig lender_config(const TemporaryDirectory& directory) {
  ArenaLenderConfig config;
  config.host = host_id();
  config.socket_path = directory.file("arenas.sock");
  return config;
}

inline std::unique_ptr<ArenaLender> start_lender(ArenaLenderConfig config,
                                                 std::vector<LentArena> arenas, Events& events) {
  auto lender = ArenaLender::start(std::move(config), std::move(arenas), events.sink());
  INFO((lender ? "" : lender.error().to_string()));
  REQUIRE(lender);
  return std::move(*lender);
}

// A client of the lender's socket that may say anything.
class RawClient {
 public:
  explicit RawClient(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    fd.reset(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    REQUIRE(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  }

  template <typename T>
  bool send(const T& message, std::span<const int> fds = {}) {
    return send_message(fd.get(), &message, sizeof message, fds);
  }
  bool show(const Token& token) {
    wire::Show message;
    std::memcpy(message.token, token.bytes.data(), sizeof message.token);
    return send(message);
  }
  // The next message and its descriptors; false at the end or when nothing comes.
  template <typename T>
  bool receive(T& message, std::vector<UniqueFd>& fds) {
    pollfd polled{fd.get(), POLLIN, 0};
    if (::poll(&polled, 1, 20000) != 1) return false;
    std::byte buffer[wire::kReadBytes];
    std::size_t bytes = 0;
    if (receive_message(fd.get(), buffer, bytes, fds) != Received::kMessage) return false;
    if (bytes != sizeof message) return false;
    std::memcpy(&message, buffer, sizeof message);
    return true;
  }
  // Whether the other end has closed: waited for, and whatever comes before is dropped.
  bool closed() {
    while (true) {
      pollfd polled{fd.get(), POLLIN, 0};
      if (::poll(&polled, 1, 20000) != 1) return false;
      std::byte buffer[4096];
      std::size_t bytes = 0;
      std::vector<UniqueFd> fds;
      if (receive_message(fd.get(), buffer, bytes, fds) == Received::kClosed) return true;
    }
  }

  UniqueFd fd;
};

// Links between a borrower and lenders of this process. A borrower's link n is the lender's link
// n + 100.
class Calls : public ArenaCalls {
 public:
  using Done = std::function<void(Result<rpc::ArenasOffer>)>;

  void connect(LinkId link, ArenaLender& lender, const PeerRef& at_lender) {
    std::lock_guard<std::mutex> lock(mutex_);
    links_[link] = {&lender, at_lender};
  }
  // Instead of a lender's answers: these first, one by one.
  void answer_next(Result<rpc::ArenasOffer> answer) {
    std::lock_guard<std::mutex> lock(mutex_);
    next_.push_back(std::move(answer));
  }
  // The next questions are kept.
  void hold() {
    std::lock_guard<std::mutex> lock(mutex_);
    held_ = std::vector<std::function<void()>>{};
  }
  void release() {
    std::vector<std::function<void()>> held;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      held = std::move(held_.value());
      held_.reset();
    }
    for (const auto& answer : held) answer();
  }
  std::size_t held() {
    std::lock_guard<std::mutex> lock(mutex_);
    return held_ ? held_->size() : 0;
  }
  std::size_t asked() {
    std::lock_guard<std::mutex> lock(mutex_);
    return asked_;
  }

  void get_arenas(LinkId link, rpc::ArenasQuery query, Time, Done done) override {
    std::function<void()> answer;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++asked_;
      if (!next_.empty()) {
        answer = [done, result = std::move(next_.front())] { done(result); };
        next_.pop_front();
      } else if (const auto found = links_.find(link); found != links_.end()) {
        query.proof = proof_of(found->second.second.link);
        answer = [done, query, to = found->second] {
          rpc::ArenasOffer offer = to.first->offer(to.second, query);
          offer.proof = query.proof;
          done(std::move(offer));
        };
      } else {
        answer = [done] { done(fail(Code::kUnavailable, "LINK_DOWN", "no such link")); };
      }
      if (held_) return held_->push_back(std::move(answer));
    }
    answer();
  }

 private:
  std::mutex mutex_;
  std::map<LinkId, std::pair<ArenaLender*, PeerRef>> links_;
  std::deque<Result<rpc::ArenasOffer>> next_;
  std::optional<std::vector<std::function<void()>>> held_;
  std::size_t asked_ = 0;
};

}  // namespace kvferry::node
