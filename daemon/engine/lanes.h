// Links to peer daemons and their lanes: HELLO and PING, which lane carries control messages,
// numbers and held messages, silence, lane down and its retry, link death, resync. Part of Core.
//
// A message is only handed over where a lane is up. Nothing is queued for later: whatever a peer
// must know is told again by the resync that starts each control lane.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "daemon/engine/state.h"
#include "daemon/engine/timers.h"

namespace kvferry::engine {

class Core;

constexpr uint32_t kMaxProtocolErrors = 16;  // of a link, then it is closed

class Lanes {
 public:
  explicit Lanes(Core& core);

  // Events.
  void link_up(const LinkUp& event);
  void link_ended(const LinkEnded& event);
  void lane_connected(const LaneRef& lane);
  void lane_failed(const LaneRef& lane);
  void lane_reopened(const LaneRef& lane);
  void lane_reopen_failed(const LaneRef& lane);
  void peer_lane_down(const LaneRef& lane);
  void message_in(MessageIn& event);
  void refuse_in(const RefuseIn& event);
  void offer_in(const OfferIn& event);
  void arena_mapped(const ArenaMapped& event);
  // That life of a peer is over: its link ends.
  void process_gone(const PeerProcessGone& event);
  void arena_lent(const ArenaLent& event);
  void rails_up();
  void rails_died();
  void timer(TimerKey key);
  // Resyncs that are due although the control lane stayed; links that broke the protocol too often.
  void flush();
  // Hands over what the two ends of this daemon's own legs have told each other, in order, until
  // both are silent. To be done before whatever that may change, and again while `looping`.
  void loop();
  bool looping() const { return !looped_.empty(); }

  Link* find(LinkId id);
  const Link* find(LinkId id) const;
  Link* find_node(const std::string& node);
  // A node's link, if it is to that life of it. A boot id alone finds nothing: it is the peer's own
  // word, and two nodes may say the same.
  Link* find_life(const std::string& node, const BootId& boot);
  Link* find_life(uint64_t peer, const BootId& boot);
  std::map<LinkId, Link>& all() { return links_; }
  const std::map<LinkId, Link>& all() const { return links_; }

  // On the control lane. False if none is up: the resync will tell it.
  bool send(Link& link, ControlMessage message);
  // An END, which either side may say; the others say themselves who says them.
  bool send_end(Link& link, Role by, MsgEnd message);
  void refuse(const LaneRef& lane, const MsgRefuse& message);
  // The lane on which a chunk of so many bytes should arrive first; nothing if none is up.
  static std::optional<uint32_t> offer_lane(Link& link, uint64_t bytes);
  // It is offered there. Its number in the lane's flow.
  uint64_t carry(Link& link, uint32_t lane, uint64_t bytes);
  bool up(const Link& link, uint32_t lane, uint32_t epoch) const;
  void check_invariants() const;
  // A chunk has come by the lane, which is no silence: on a slow one pings wait behind data.
  void data_in(const LaneRef& lane);
  // This side gives the lane up.
  void give_up(const LaneRef& lane);
  // A message that breaks the protocol: counted; a link on which it repeats is closed with the next
  // flush.
  void protocol_error(LinkId id);

 private:
  bool keep_early(const MessageIn& event);
  Lane* current(const LaneRef& ref, Link*& link);
  void connect(Link& link, uint32_t lane);
  void send_on(Link& link, uint32_t lane, ControlMessage message);
  void hello_in(Link& link, uint32_t lane, const MsgHello& message);
  void lane_up(Link& link, uint32_t lane);
  void lane_down(Link& link, uint32_t lane, bool tell);
  void choose_control(Link& link);
  void resync(Link& link);
  void end_link(LinkId id, Reason reason, bool close);
  void heard(Link& link, uint32_t lane);
  void dispatch(LinkId id, uint32_t lane, ControlMessage& message);
  void deliver(Link& link, Role by, ControlMessage& message);
  void retry_later(Link& link, uint32_t lane);
  void ping(Link& link);
  void silence(LinkId id, uint32_t lane);

  Core& core_;
  std::map<LinkId, Link> links_;
  std::map<std::string, LinkId> by_node_;
  std::map<std::string, uint64_t> peers_;  // node -> number, for good: a link may come again
  std::set<LinkId> to_flush_;  // links with a resync due or protocol errors; perhaps some more
  std::deque<std::pair<Role, ControlMessage>> looped_;  // said by that side, not handed over yet
  bool rails_ = true;                                   // the rails process runs, as far as we know
};

}  // namespace kvferry::engine
