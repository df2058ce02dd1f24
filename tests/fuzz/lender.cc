// The lender's socket with clients that say anything, while links come and go. What counts as
// evidence is told to the engine only as it was earned: PeerUnmapped once, of a link that has ended
// and whose token was shown by somebody who said UNMAPPED afterwards.
#include <cstring>
#include <mutex>
#include <optional>
#include <set>

#include "daemon/memory/host_pool.h"
#include "daemon/memory/shared_memory.h"
#include "daemon/node/arena_lender.h"
#include "daemon/node/arena_wire.h"
#include "tests/fuzz/socket_client.h"

namespace {

using namespace kvferry;

constexpr uint32_t kLinks = 3;
constexpr uint64_t kPage = 4096;

memory::HostArena& arena() {
  static memory::HostArena made = [] {
    auto created = memory::HostArena::create("kvferry-fuzz", std::vector<uint64_t>{kPage, kPage});
    FUZZ_CHECK(created.has_value(), "an arena");
    return std::move(*created);
  }();
  return made;
}

class World {
 public:
  World() {
    static fuzz::Folder folder;
    node::ArenaLenderConfig config;
    config.host.bytes.fill(7);
    config.socket_path = path_ = folder.file("arenas.sock");
    config.max_connections = 6;
    config.max_unproven = 3;
    node::LentArena lent;
    lent.number = 3;
    for (uint32_t i = 0; i < 2; ++i)
      lent.segments.push_back({10 + i, kPage, arena().segment(i).fd(), {}});
    auto started = node::ArenaLender::start(std::move(config), {lent},
                                            [this](engine::Event event) { on_event(event); });
    FUZZ_CHECK(started.has_value(), "it starts");
    lender_ = std::move(*started);
  }

  void step(fuzz::Input& in) {
    const uint32_t link = in.below(kLinks);
    switch (in.below(8)) {
      case 0:
        if (links_[link].up) return;
        links_[link] = {next_link_++, true, {}};
        lender_->on_link_up(ref(link), engine::CheckKind::kNone);
        return;
      case 1:
        if (!links_[link].up) return;
        links_[link].up = false;
        {
          std::lock_guard<std::mutex> lock(mutex_);
          ended_.insert(links_[link].id);
        }
        lender_->on_link_gone(LinkId{links_[link].id});
        return;
      case 2:
        links_[link].token = lender_->offer(ref(link), {config_host()}).token;
        FUZZ_CHECK(links_[link].up || links_[link].token.is_zero(), "no token without a link");
        return;
      case 3:
        if (clients_.size() < 8) clients_.push_back({std::make_unique<fuzz::SocketClient>(path_)});
        return;
      case 4:
        if (!clients_.empty()) {
          clients_.back().socket->finish();
          clients_.pop_back();
        }
        return;
      default:
        return say(in, link);
    }
  }

  void finish() {
    for (Client& client : clients_) client.socket->finish();
    clients_.clear();
    lender_->stop();
    const auto stats = lender_->stats();
    FUZZ_CHECK(stats.connections == 0 && stats.processes == 0, "nothing is watched after the end");
  }

 private:
  struct Link {
    uint64_t id = 0;
    bool up = false;
    Token token;
  };
  struct Client {
    std::unique_ptr<fuzz::SocketClient> socket;
  };
  static rpc::HostId config_host() {
    rpc::HostId host;
    host.bytes.fill(7);
    return host;
  }
  node::PeerRef ref(uint32_t link) const {
    BootId boot;
    boot.bytes.fill(static_cast<uint8_t>(1 + link % 2));
    return {LinkId{links_[link].id}, link % 2 == 0 ? "peer-a" : "peer-b", boot};
  }

  void say(fuzz::Input& in, uint32_t link) {
    if (clients_.empty()) return;
    Client& client = clients_[in.below(static_cast<uint32_t>(clients_.size()))];
    std::vector<uint8_t> bytes;
    switch (in.below(4)) {
      case 0: {
        const auto raw = in.bytes(1 + in.below(80));
        bytes.assign(raw.begin(), raw.end());
        break;
      }
      case 1: {
        node::wire::Unmapped message;
        bytes.resize(sizeof message);
        std::memcpy(bytes.data(), &message, sizeof message);
        break;
      }
      default: {
        node::wire::Show message;
        std::memcpy(message.token, links_[link].token.bytes.data(), sizeof message.token);
        bytes.resize(sizeof message);
        std::memcpy(bytes.data(), &message, sizeof message);
        if (!links_[link].token.is_zero()) {
          std::lock_guard<std::mutex> lock(mutex_);
          shown_.insert(links_[link].id);
        }
      }
    }
    if (!bytes.empty() && in.below(16) == 1) bytes[in.byte() % bytes.size()] ^= in.byte();
    const std::vector<int> fds(in.below(16) == 1 ? 1 + in.below(3) : 0, STDERR_FILENO);
    if (!bytes.empty()) (void)client.socket->send(bytes, fds);
  }

  // On the lender's thread, or within offer().
  void on_event(const engine::Event& event) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (const auto* unmapped = std::get_if<engine::PeerUnmapped>(&event)) {
      FUZZ_CHECK(ended_.contains(unmapped->link.value), "evidence counts once the link has ended");
      FUZZ_CHECK(shown_.contains(unmapped->link.value), "of a link whose token was shown");
      FUZZ_CHECK(told_.insert(unmapped->link.value).second, "and once");
    } else if (const auto* lent = std::get_if<engine::ArenaLent>(&event)) {
      FUZZ_CHECK(lent->arena == 3, "only what is lent");
      FUZZ_CHECK(shown_.contains(lent->link.value), "to somebody who has come for it");
    } else {
      FUZZ_CHECK(false, "this process lives, so no other evidence is there");
    }
  }

  std::string path_;
  std::mutex mutex_;
  std::set<uint64_t> ended_, shown_, told_;
  Link links_[kLinks];
  uint64_t next_link_ = 1;
  std::vector<Client> clients_;
  std::unique_ptr<node::ArenaLender> lender_;  // the last member: its thread calls on_event()
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  fuzz::Input in(data, size);
  World world;
  for (int steps = 0; !in.empty() && steps < 200; ++steps) world.step(in);
  world.finish();
  return 0;
}
