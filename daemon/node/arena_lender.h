// The lender's side of mapped arenas: which arenas a peer may map, the Unix socket where a peer on
// this host gets their descriptors, and the evidence that it does not write any more. README.md has
// the rules. Constant arenas; nothing is copied here.
//
// A peer's daemon asks with GetArenas (offer()), comes to the socket with the token it was given,
// gets descriptors, and stays connected. `sink` is told
//   ArenaLent        before the peer can have what it takes to map the arena
//   PeerUnmapped     it said so, and its link has ended
//   PeerProcessGone  its process has exited
// Neither a closed connection nor time ends what was lent.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/node/peer_links.h"
#include "daemon/rpc/peer_messages.h"

namespace kvferry::node {

// An arena that peers may map. Numbers are those of EngineConfig::arenas and of its segments.
struct LentArena {
  struct Segment {
    uint32_t number = 0;
    uint64_t bytes = 0;
    int fd = -1;                       // of kinds with descriptors; borrowed, outlives the lender
    std::array<uint8_t, 64> handle{};  // of the others
  };
  uint32_t number = 0;
  rpc::LentKind kind = rpc::LentKind::kHostMemfd;
  std::array<uint8_t, 16> device_uuid{};  // zero: host memory
  std::vector<Segment> segments;
};

struct ArenaLenderConfig {
  rpc::HostId host;         // this_host(); zero: nobody is on the same one
  std::string socket_path;  // at most 107 bytes, absolute; empty: no descriptors are handed out
  uint32_t socket_mode = 0600;
  Duration token_timeout = std::chrono::seconds(5);  // from connecting to a token
  // One for each process that may have something, and those that have shown no token yet.
  uint32_t max_connections = 256 + 16;
  uint32_t max_unproven = 16;
  uint32_t max_processes = 256;  // whose end is awaited
  // Over which one process has got something and has not said UNMAPPED of. One more is refused:
  // forgetting an old one would lose what is known of it.
  uint32_t max_links_of_process = 64;
};

// The kernel's boot id; zero where it cannot be read.
rpc::HostId this_host();

class ArenaLender final : public ArenaOffers, public LinkWatch {
 public:
  struct Stats {
    uint32_t connections = 0;     // that have shown a token, now
    uint32_t processes = 0;       // whose end is evidence for something, now
    uint64_t handed_out = 0;      // connections that got all there was to get
    uint64_t refused = 0;         // connections turned away or broken off, for whatever reason
    uint64_t unmapped = 0;        // PeerUnmapped told
    uint64_t processes_gone = 0;  // PeerProcessGone told
  };

  // Binds the socket, if one is wanted, and starts the thread `kvf-lend`. INVALID_ARGUMENT
  // LENDER_CONFIG names the field; ALREADY_EXISTS SOCKET_IN_USE when a living process listens
  // there (a dead one's file is replaced); INTERNAL LENDER_FAILED names the call.
  static Result<std::unique_ptr<ArenaLender>> start(ArenaLenderConfig config,
                                                    std::vector<LentArena> arenas, EventSink sink);
  // Stops. The link manager is gone, or has been told of another to answer and to watch.
  ~ArenaLender() override;
  ArenaLender(const ArenaLender&) = delete;
  ArenaLender& operator=(const ArenaLender&) = delete;
  // Closes the socket and all connections and joins the thread; nothing is told from then on.
  // Idempotent.
  void stop();

  // What that peer could map: nothing for a link that is not up, nor on this host without a socket.
  rpc::ArenasOffer offer(const PeerRef& peer, const rpc::ArenasQuery& query) override
      KVFERRY_EXCLUDES(mutex_);
  void on_link_up(const PeerRef& peer, engine::CheckKind check) override KVFERRY_EXCLUDES(mutex_);
  // The token is void. Connection and process are looked at until there is evidence.
  void on_link_gone(LinkId link) override KVFERRY_EXCLUDES(mutex_);

  // Whether the end of a process of that node (empty: of any) and life (nothing: any) is being
  // waited for, so that what was lent to it comes free without an operator. Any thread.
  bool watches(const std::string& node, const std::optional<BootId>& boot) const
      KVFERRY_EXCLUDES(mutex_);
  Stats stats() const KVFERRY_EXCLUDES(mutex_);

 private:
  class Loop;
  // One of a peer's daemon: its node, which the link manager has checked, and its boot id, which is
  // the peer's own word, so that it may be another node's too.
  using Life = std::pair<std::string, BootId>;
  struct Link {
    PeerRef peer;
    Token token;  // zero: none has been given
    rpc::WelcomeProof proof;
    bool used = false;        // it has been shown
    std::set<uint32_t> lent;  // arenas of which the engine has been told
  };

  ArenaLender(ArenaLenderConfig config, std::vector<LentArena> arenas, EventSink sink);
  // The link that the token names, if it is up and the token has not been shown before.
  bool take_token(const Token& token, PeerRef& peer, rpc::WelcomeProof& proof)
      KVFERRY_EXCLUDES(mutex_);
  bool is_up(LinkId link) const KVFERRY_EXCLUDES(mutex_);
  // The link's peer is about to get all it takes to map the arenas.
  void tell_lent(LinkId link) KVFERRY_EXCLUDES(mutex_);
  void tell_lent(Link& link, uint32_t arena) KVFERRY_REQUIRES(mutex_);

  const ArenaLenderConfig config_;
  const std::vector<LentArena> arenas_;
  const EventSink sink_;
  mutable Mutex mutex_;
  std::map<LinkId, Link> links_ KVFERRY_GUARDED_BY(mutex_);
  std::set<Life> watched_ KVFERRY_GUARDED_BY(mutex_);  // of the loop's processes
  Stats stats_ KVFERRY_GUARDED_BY(mutex_);
  std::unique_ptr<Loop> loop_;  // null without a socket
};

}  // namespace kvferry::node
