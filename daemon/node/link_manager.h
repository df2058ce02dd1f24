// Links to other daemons: who may be linked, dialling and answering handshakes, the keys and rail
// addresses of each link, and the calls about its lanes. It knows nothing of messages on rails.
//
// Thread-safe. Nothing blocks: work that may (name resolution) runs on the task pool. Events go to
// `sink` in an order that keeps LinkUp before everything else of a link and LinkEnded of an old
// link before LinkUp of its successor; the sink is called under a lock and must only enqueue.
//
// Owner's duty at LinkUp, before the engine sees it: LinkTable::add(link, *keys(link)).
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/engine/commands.h"
#include "daemon/engine/events.h"
#include "daemon/link/keys.h"
#include "daemon/node/peer_links.h"
#include "daemon/node/task_pool.h"
#include "daemon/ops/config.h"
#include "daemon/rpc/peer_client.h"
#include "daemon/rpc/peer_service.h"

namespace kvferry::node {

struct LinkManagerConfig {
  std::string node;  // own identity
  BootId boot;
  std::string advertise;               // host:port that peers dial
  std::vector<ops::PeerConfig> peers;  // who may be linked; empty: nobody but ourselves
  // Of mode plain. Empty: none, so loopback only.
  SecretVector cluster_secret;
  // Of mode mtls, which none of the peers is without.
  std::shared_ptr<const rpc::PeerTls> tls;
  uint64_t chunk_bytes = 1 << 20;
  uint32_t max_credits = 64;
  bool can_check = true;  // else only CheckKind::kNone, whatever a peer asks for
  engine::CheckKind check = engine::CheckKind::kNone;
  engine::CheckKind min_check = engine::CheckKind::kNone;
  uint32_t max_lanes = 16;
  uint32_t max_links = 1024;
  Duration renew_interval = std::chrono::hours(1);  // of links' keys; the peers' smaller one counts
  Duration dial_timeout = std::chrono::seconds(5);  // a whole handshake
  Duration call_timeout = std::chrono::seconds(3);  // calls about lanes
  Duration backoff_first = std::chrono::milliseconds(100);  // between failed dials of a node
  Duration backoff_most = std::chrono::seconds(2);
};

// The rail of a side with so many (not 0) that a lane is on.
constexpr uint32_t rail_of(uint32_t lane, std::size_t rails) {
  return lane % static_cast<uint32_t>(rails);
}

// How a lane reaches the peer from here.
struct LanePath {
  uint32_t rail = 0;             // index in set_rails()
  std::string transport;         // the peer's rail
  std::vector<uint8_t> address;  // the peer's rail address
};

// For operators.
struct LinkInfo {
  std::string node;
  std::string address;
  bool linked = false;
  bool dialling = false;
  LinkId link;
  BootId boot;
  bool initiator = false;
  uint32_t lanes = 0;
  std::string ucx_version;
  std::string last_error;
};

// Keys of a link that is up are others from now on: for LinkTable::renew(). Called under the link
// manager's lock, on any thread: must only enqueue.
using RenewedKeysSink = std::function<void(LinkId, const link::LinkKeys&, bool seal_now)>;

class LinkManager : public PeerLinks,
                    public ArenaCalls,
                    public TraceCalls,
                    public rpc::PeerBackend {
 public:
  // `dialer` and `pool` outlive it; the pool is stopped before it is destroyed.
  LinkManager(LinkManagerConfig config, rpc::PeerDialer& dialer, TaskPool& pool, EventSink sink);
  ~LinkManager() override;

  // Who answers GetCards and JoinForward. Before the first call comes in.
  void set_questions(PeerQuestions* questions);
  // Who answers GetArenas; null, as at first: nothing is lent.
  void set_arena_offers(ArenaOffers* offers);
  // Who answers GetTrace; null, as at first: UNIMPLEMENTED.
  void set_trace_answers(TraceAnswers* answers);
  // Who seals and opens messages. Before the first link; without it no link is renewed.
  void set_renewed_keys_sink(RenewedKeysSink sink);
  // One more who is told of each link from its beginning to its end. Before the first link;
  // outlives the manager.
  void add_watch(LinkWatch& watch);
  // Our rails, as the rails process tells when it is ready; none while it is down: handshakes and
  // reopenings are then answered UNAVAILABLE RAILS_DOWN.
  void set_rails(std::string ucx_version, std::vector<rpc::PeerRail> rails);
  // Peers as a reload gives them; links that no longer match are ended, and their peers told.
  void set_peers(std::vector<ops::PeerConfig> peers);
  // After `tls` has other roots: links of peers for whom none of them vouches are ended likewise.
  // That a certificate has expired since the handshake does not count.
  void check_certificates();
  // No dial and no handshake any more; what waits is answered UNAVAILABLE SHUTDOWN. Links stay.
  void stop();

  // Where to connect; NOT_FOUND LINK_DOWN, UNAVAILABLE RAILS_DOWN.
  Result<LanePath> lane_path(const engine::LaneRef& lane) const;
  // Nothing for a link that has ended.
  std::optional<link::LinkKeys> keys(LinkId link) const;
  std::vector<LinkInfo> links() const;
  // Refused or broken off, dialled or answered; not those that give way to the peer's own.
  uint64_t handshakes_failed() const;
  // Handshakes of links that were up: other keys, and the peer proved who it is once more.
  uint64_t links_renewed() const;

  // To be called each second or so: begins handshakes of links whose keys are old, ends links whose
  // keys are too old.
  void renew_links(Time now);
  // The first message under the keys with this selector has come.
  void keys_seen(LinkId link, uint64_t selector, Time now);

  // The engine's commands. The first is answered by LaneReopened or LaneReopenFailed.
  void reopen_lane(const engine::ReopenLane& command);
  void tell_lane_down(const engine::TellLaneDown& command);
  void close_link(const engine::CloseLink& command);
  // For what is found out beside the engine, which is told: LinkEnded. The peer is, too. Any
  // thread.
  void end_link(LinkId link);

  // PeerLinks. A target that is this node itself is answered with kLoopedLink, which is always
  // there and of which neither the engine nor a peer is told: transfers within the daemon need no
  // rails.
  void ensure_link(PeerTarget target, Time deadline,
                   std::function<void(Result<PeerRef>)> done) override;
  bool has_link(const std::string& node) const override;
  std::optional<PeerRef> peer_of(LinkId link) const override;
  bool may_speak_for(const std::string& node, std::string_view tenant) const override;
  void get_cards(LinkId link, rpc::CardQuery query, Time deadline,
                 std::function<void(Result<rpc::CardPage>)> done) override;
  void join_forward(LinkId link, rpc::JoinForward forward, Time deadline,
                    std::function<void(Status)> done) override;

  // ArenaCalls.
  void get_arenas(LinkId link, rpc::ArenasQuery query, Time deadline,
                  std::function<void(Result<rpc::ArenasOffer>)> done) override;

  // TraceCalls.
  void get_trace(const std::string& node, rpc::TraceQuery query, Time deadline,
                 std::function<void(Result<rpc::TraceReply>)> done) override;

  // rpc::PeerBackend.
  void challenge(const rpc::Caller& from, std::function<void(Result<rpc::Random32>)> done) override;
  void handshake(const rpc::Caller& from, rpc::SignedHello hello,
                 std::function<void(Result<rpc::SignedHello>)> done) override;
  void call(const rpc::Caller& from, rpc::LinkMethod method, rpc::LinkCall call,
            std::function<void(Result<rpc::LinkReply>)> done) override;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace kvferry::node
