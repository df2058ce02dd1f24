// One engine and the many peers that a benchmark plays around it. Whatever the engine asks for is
// answered at once and without I/O: copies end well, slices compile, offers are accepted and
// acknowledged. What is played costs the same for each event, however many peers there are.
//
// All that must come out is counted; anything else ends the process.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "daemon/engine/engine.h"

namespace kvferry::engine::bench {

// Ends the process with `what` if it is not so.
void require(bool so, const char* what);

struct PeersConfig {
  uint32_t peers = 1;
  uint32_t lanes = 1;             // of each link
  uint64_t chunks = 64;           // of each transfer
  uint64_t arena_chunks = 16384;  // that the engine's arena has room for
  uint32_t batch = 1;             // events that the engine gets before it is flushed
  bool reserved = false;          // each Receive has a reservation of one chunk's room
  bool heartbeats = false;        // time passes, and peers are missed if they say nothing
};

class Peers {
 public:
  explicit Peers(const PeersConfig& config);

  // One transfer with each peer, all at once, to their ends; the engine sends, or receives.
  // Transfers begin in turn and are served as the engine likes.
  void send_to_all();
  void receive_from_all();
  // One second of links on which nothing moves: each peer's lanes ping once, at moments of their
  // own.
  void idle_second();

  // What the daemon takes of the engine ten times a second, for its metrics.
  EngineSnapshot snapshot() const { return engine_.snapshot(now_); }

  // Nothing has been lost, held or left over. To be asked when no transfer runs.
  void verify() const;

  uint64_t chunks_done() const { return chunks_done_; }
  uint64_t events() const { return events_; }
  uint64_t offers_refused() const { return engine_.stats().offers_refused; }

 private:
  struct Peer {
    LinkId link;
    std::string node;
    BootId boot;
    std::vector<uint64_t> next_in;     // by lane
    uint64_t pull = 0;                 // of the transfer that runs; the receiver's number
    uint64_t granted = 0;              // credits that this peer has given for it
    uint64_t landed = 0;               // chunks that this peer has got
    std::vector<CreditGrant> credits;  // that this peer has in hand
    std::vector<uint64_t> to_offer;    // chunks that it has not offered, or that were refused
    SendRef send;
    TransferKey key;
    bool ended = false;  // its transfer, in the engine
    bool closing = false;
  };

  void link_up(Peer& peer);
  void begin();
  void run();
  void say(Peer& peer, ControlMessage message, uint32_t lane = 0);
  Peer& peer_of(const LaneRef& lane) { return peers_[lane.link.value - 1]; }
  Peer& peer_of(uint64_t handle) { return peers_[(handle - 1) % peers_.size()]; }
  uint64_t handle_of(std::size_t peer) const { return round_ * peers_.size() + peer + 1; }
  uint64_t bytes() const { return config_.chunks * kChunk; }
  MsgPull pull_of(const Peer& peer) const;
  MsgSlice slice_of(const Peer& peer) const;
  void offer(Peer& peer);

  template <typename Other>
  void on(Other&) {}
  void on(Reply& of);
  void on(Publish& of);
  void on(Resolve& of);
  void on(ResolvePull& of);
  void on(Compile& of);
  void on(Gather& of);
  void on(Scatter& of);
  void on(ConnectLane& of);
  void on(CloseLink& of);
  void on(SendMessage& of);
  void on(SendRefuse& of);
  void on(SendOffer& of);
  void on(AcceptOffer& of);
  void on(TransferEnded& of);

  static constexpr uint64_t kChunk = 1 << 20;
  static constexpr uint64_t kCredits = 8;

  PeersConfig config_;
  Engine engine_;
  Time now_{1'000'000'000};
  std::vector<Peer> peers_;
  std::shared_ptr<const LayoutHandle> layout_;
  std::shared_ptr<const Plan> plan_;
  std::shared_ptr<const LegContext> context_;
  std::deque<Event> events_due_;
  Commands commands_;
  Role role_ = Role::kSender;
  uint64_t round_ = 0;
  uint64_t descriptors_ = 0;
  uint64_t events_ = 0;
  uint64_t chunks_done_ = 0;
  // Of this round.
  uint64_t moved_ = 0;  // chunks offered or scattered by the engine
  uint64_t transfers_ended_ = 0;
  uint64_t pulls_ = 0;
  uint64_t pings_ = 0;
};

}  // namespace kvferry::engine::bench
