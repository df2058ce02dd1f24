// A peer with an identity of its own and no engine: it shakes hands with every daemon, has workers
// of its own in some transfers (of which it knows the secrets), hears all that honest daemons tell
// each other, and says whatever it likes, when it likes, to any of them. What an honest executor
// does for a daemon stands for its links too: requests end when their lane is closed, a descriptor
// is used once, what has no encoding never comes.
//
//   hostile.cc        its links, lanes, requests; what it must not bring about
//   hostile_lent.cc   arenas: what it lends and what it is lent
//   hostile_words.cc  what it says
//
// It acts until things go well again (Faults::until). Then it is silent for ever.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "daemon/engine/commands.h"
#include "daemon/engine/events.h"
#include "tests/sim/world.h"

namespace kvferry::sim {

// Limits of daemons that have an enemy: more than honest ones need, and within its reach.
inline constexpr uint32_t kHostileParked = 256;
inline constexpr uint32_t kHostileLegs = 512;

class Hostile {
 public:
  static constexpr const char* kName = "mallory";

  explicit Hostile(World& world);
  void plan();

  // Its number among nodes, as peers of a Resolve are named: one more than the last daemon's.
  uint32_t index() const { return static_cast<uint32_t>(world_.nodes.size()); }
  bool gone() const { return gone_; }
  bool link_up(uint32_t node) const;
  // That daemon wants a link.
  void dial(uint32_t node);
  bool owns(uint32_t node, LinkId link) const { return links_.contains({node, link.value}); }
  // Carries out what is about one of its links; false: the command is not.
  bool carry_out(uint32_t node, const engine::Command& command);
  void overhear(const engine::ControlMessage& message);
  // Two daemons have lost each other, which it sees.
  void link_lost(uint32_t a, uint32_t b);

  // A gather of that node into what the enemy has lent: its number while it runs; none if no byte
  // of that is there (any more).
  std::optional<uint64_t> begin_gather(uint32_t node, const engine::Gather& command);
  void check_gather(uint64_t gather, const char* when) const;
  void end_gather(uint64_t gather);
  void rails_gone(uint32_t node);
  void node_died(uint32_t node);

  // What that daemon holds for it stays within its limits; it has handled all that has come.
  void check_bounds(uint32_t node) const;
  void check_idle(uint32_t node) const;

 private:
  using LinkKey = std::pair<uint32_t, uint64_t>;  // node, its link
  struct Lane {
    uint32_t epoch = 0;
    bool closed = false;
    uint64_t next = 0;
  };
  struct Link {
    uint32_t node = 0;
    uint64_t life = 0;
    LinkId id;
    BootId boot;  // its own
    bool up = true;
    bool dialled = false;  // by the daemon
    uint64_t chunk_bytes = 0;
    std::vector<Lane> lanes;
    uint64_t next_pull = 1;
    // What it has asked for, by number: whether that was of a transfer of its own.
    std::map<uint64_t, bool> asked;
    // Its arenas that the daemon has mapped, mapped pulls, and where their regions are to be.
    std::set<uint32_t> lends;
    std::set<PullId> mapped_pulls;
    std::vector<std::pair<PullId, engine::CreditGrant>> places;
    std::set<PullId> drained;            // of which the daemon has said so
    std::vector<engine::MsgPull> pulls;  // what it could send to
    std::map<PullId, uint64_t> slices;   // that it has told, of each
    std::map<PullId, uint64_t> chunks;   // ... offered
    std::map<PullId, uint64_t> told;     // credits that it was given
    std::vector<std::pair<PullId, engine::CreditGrant>> credits;
    std::vector<engine::MsgOffer> offers;  // made to it
  };
  struct Request {
    uint32_t node = 0;
    uint64_t life = 0;
    engine::LaneRef lane;
    uint64_t use = 0;
    memory::Region region;
    uint64_t bytes = 0;
  };
  struct Held {
    uint32_t node = 0;
    LinkId link;
    PullId pull;
    uint64_t bytes = 0;
  };
  // A region that it may write, by what a daemon has said.
  struct Lent {
    uint32_t node = 0;
    uint64_t life = 0;
    PullId pull;
    CreditId credit;
    memory::Region region;
    uint64_t grant = 0;
  };

  // A gather into what it has lent. The pulls are those that were told of that region: one, unless
  // it has lied.
  struct Writing {
    LinkKey link;
    std::set<PullId> pulls;
  };

  // hostile.cc
  void establish(uint32_t node, bool dialled);
  void establish(uint32_t node, bool dialled, const BootId& boot);
  BootId choose_boot();
  void end_link(Link& link);
  void post(const Link& link, engine::Event event);
  bool alive(uint32_t node, uint64_t life) const;
  bool whole(const Link& link) const;
  void heard(Link& link, const engine::SendMessage& command);
  bool gave_back(const PullId& pull, CreditId credit) const;
  void note_credits(Link& link, const PullId& pull, const std::vector<engine::CreditGrant>& all);
  void connect(Link& link, const engine::LaneRef& lane);
  void reopen(Link& link, const engine::LaneRef& lane);
  void close_lane(Link& link, const engine::LaneRef& lane);
  void serve(Link& link, const engine::SendOffer& command);
  void accepted(Link& link, const engine::AcceptOffer& command);
  void end_send(OfferId offer, uint32_t node);
  void end_landing(const std::pair<uint32_t, uint64_t>& landing, bool ok);
  void act();
  void check_pulls() const;
  void change_link();
  void beat();
  void leave();

  // hostile_lent.cc
  void write_lent();
  void lend(Link& link);
  void note_told(Link& link, const engine::MsgDrained& message);
  void ask(uint32_t node, const PullId& pull);
  void leave_and_ask(const LinkKey& key, const PullId& pull);
  engine::CreditGrant make_place(Link& link);
  void fill(Link& link, engine::MsgUpdate& update, uint64_t credits);

  // hostile_words.cc
  void speak(Link& link);
  void be_polite(Link& link);
  void flood(Link& link);
  void answer(Link& link, const engine::ControlMessage& message);
  void say(Link& link, engine::ControlMessage message);
  void offer(Link& link, bool wild);
  void offer(Link& link, engine::MsgOffer offer, uint64_t announced);
  engine::LaneRef some_lane(const Link& link);
  PullId some_pull(Link& link);
  engine::ControlMessage some_message(Link& link);
  engine::MsgPull make_pull(Link& link);
  engine::MsgUpdate make_update(Link& link);
  std::optional<engine::MsgSlice> make_slice(Link& link, const engine::MsgPull& pull);
  engine::MsgEnd make_end(Link& link);
  engine::MsgWritten make_written(Link& link);
  void spoil(engine::MsgSlice& slice);
  void spoil(engine::MsgPull& pull);

  World& world_;
  Rng rng_;
  bool gone_ = false;
  BootId boot_;
  std::set<BootId> boots_;  // all that it has said to be
  std::map<LinkKey, Link> links_;
  std::map<std::pair<uint32_t, OfferId>, Request> sends_;  // to it
  std::map<std::pair<uint32_t, uint64_t>, Request> landings_;
  std::map<DescriptorId, Held> held_;
  std::set<DescriptorId> gone_descriptors_;  // that ended with their rails process
  std::vector<Lent> lent_;
  std::set<std::pair<PullId, CreditId>> given_back_;  // no credit: all of the pull
  std::map<uint64_t, Writing> writing_;               // gathers into what it has lent
  uint64_t next_writing_ = 1;
  uint64_t next_place_ = 0;
  std::deque<engine::ControlMessage> overheard_;
  std::deque<engine::ControlMessage> said_;
  uint64_t next_number_ = 1;
  uint64_t next_descriptor_ = uint64_t{1} << 40;  // the network's are below
};

}  // namespace kvferry::sim
