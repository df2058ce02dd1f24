// The receiver's side: receives, the legs they pull, landing regions and credits, chunks on their
// way in. Implements the tables "receiver leg", "chunk" and "region and credit" of README.md. Part
// of Core.
//
//   receiver_calls.cc    what workers ask; resolution; a receive's end
//   receiver_legs.cc     SLICE, DROP, END; dp groups; resync
//   receiver_chunks.cc   offers, landing, scatter
//   receiver_reuse.cc    blocks that the node has already
//   receiver_local.cc    chunks of legs whose sender is on this daemon
//   receiver_mapped.cc   chunks of legs whose sender writes the regions itself; evidence
//   receiver_credits.cc  grants, withdrawal, PULL and UPDATE
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "daemon/engine/snapshot.h"
#include "daemon/engine/state.h"
#include "daemon/engine/timers.h"

namespace kvferry::engine {

class Core;

class Receiver {
 public:
  explicit Receiver(Core& core);

  // Calls of workers.
  void receive(const ReceiveOp& op);
  void cancel(uint64_t receive, const OpRef& op);
  void close(uint64_t receive, const OpRef& op);
  void worker_gone(WorkerId worker);
  void layout_gone(const LayoutHandle* layout, Reason reason);
  bool uses(const LayoutHandle* layout) const;
  void end_all(Reason reason);
  bool idle() const;

  // Answers.
  bool resolved(Resolved& event);
  bool compiled(Compiled& event);
  bool copy_compiled(CopyCompiled& event);
  bool copy_ended(const CopyEnded& event);
  // Places have lost their last reader: receives that wait for that may be ready.
  void places_quiet();
  bool condition_met(ConditionId condition);
  bool condition_failed(ConditionId condition);
  void receive_ended(const ReceiveEnded& event);

  // Messages.
  void slice_in(Link& link, MsgSlice& message);
  void drop_in(Link& link, const MsgDrop& message);
  void end_in(Link& link, const MsgEnd& message);
  void offer_in(Link& link, const OfferIn& event);
  void mapped_in(Link& link, const MsgMapped& message);
  void written_in(Link& link, const MsgWritten& message);
  void drained_in(Link& link, const MsgDrained& message);

  // Evidence about regions that were lent.
  void process_gone(const PeerProcessGone& event);
  void peer_unmapped(LinkId link);
  void release_quarantine(const ReleaseQuarantine& event);

  // From Lanes.
  void link_up(Link& link);
  void lane_down(Link& link, uint32_t lane, uint32_t epoch);
  void link_dead(Link& link);
  void resync(Link& link);
  void rails_died();
  // Lets the peer forget pulls that are closed, if it has not been told.
  void tell_oldest(Link& link);

  void timer(TimerKey key);
  // Grants for which there is room; PULLs and UPDATEs of the batch.
  void flush();

  Receive* find(uint64_t id);
  const Receive* find(uint64_t id) const;
  // Of the receive that made this pull; null if its leg is gone or has ended.
  const LayoutHandle* layout_of(uint64_t pull) const;
  const Receive* find(const RankKey& key) const;
  bool knows(const RankKey& key) const { return by_name_.contains(key); }
  const std::map<uint64_t, Receive>& receives() const { return receives_; }
  const std::map<uint64_t, RxLeg>& legs() const { return legs_; }
  const std::map<uint64_t, RxRegion>& regions() const { return regions_; }
  Lent lent(const memory::Region& region) const;
  std::vector<LentView> lent() const;
  void check_invariants(std::vector<std::pair<RegionKind, memory::Region>>& regions) const;

 private:
  void check_shares() const;

  // receiver_calls.cc
  void reply(const OpRef& op, const Receive& receive, bool existing);
  const char* different(const Receive& receive, const ReceiveOp& op) const;
  void ask_legs(Receive& receive);
  void make_leg(Receive& receive, Link& link, const ReceiverLeg& of, const Digest16& cards);
  // Ends the transfer on this side: END to every leg, regions as the table says.
  void end_receive(Receive& receive, TransferState state, Reason reason);
  void end_leg(RxLeg& leg, Outcome outcome, Reason reason);
  void release(Receive& receive);
  void forget_if_done(uint64_t receive);

  // receiver_legs.cc
  RxLeg* live_leg(Link& link, const PullId& pull);
  void answer_end(Link& link, const RxLeg& leg);
  void close_leg(uint64_t pull);
  uint64_t oldest(const Link& link) const;
  void wait_is_over(Receive& receive, RxLeg& leg);
  void release_leg(RxLeg& leg);
  void drop_group(Receive& receive, uint32_t group);
  bool complete(const RxLeg& leg) const;
  bool not_offered(const RxLeg& leg) const;
  void check_complete(uint64_t receive);
  void resync_leg(Link& link, RxLeg& leg);

  // receiver_chunks.cc
  void decide(RxLeg& leg, HeldOffer offer);
  void decide_held(uint64_t pull);
  void drop_held(RxLeg& leg, uint64_t slice, uint64_t chunk);
  void drop_offer(const HeldOffer& offer);
  void refuse(RxLeg& leg, const HeldOffer& offer);
  void accept(RxLeg& leg, RxSlice& slice, const HeldOffer& offer);
  void landed(RxRegion& region);
  void scatter_landed(Receive& receive);
  void scattered(RxRegion& region, const CopyEnded& event);
  bool clear_tail(RxRegion& region);
  void ack(RxLeg& leg, const Ack& ack);

  // receiver_reuse.cc
  void claim_places(Receive& receive);
  void match(Receive& receive, const PromptHashes& hashes, const std::set<BlockPlace>& taken,
             std::set<BlockPlace>& in_place, ReceiveOp& rest);
  void may_be_ready(Receive& receive);
  void queue_copies(Receive& receive);
  void run_copies();
  bool chunk_copied(const CopyEnded& event);
  void end_copy(Receive& receive, uint64_t copy);
  void end_copies(Receive& receive);

  // receiver_local.cc
  void slice_to_copy(Receive& receive, RxLeg& leg, uint64_t ordinal);
  void update_local(RxLeg& leg);
  void run_local();
  void copy_chunk(RxLeg& leg);

  // receiver_mapped.cc
  void choose_mapped(RxLeg& leg, const Receive& receive, const Link& link) const;
  void written(RxLeg& leg, const MsgWritten& message);
  void decide_writes(uint64_t pull);
  void end_credits(RxLeg& leg);
  void end_mapped(RxLeg& leg);
  uint64_t free_lent(const RxLeg& leg);
  void written_no_more(const std::vector<uint64_t>& pulls);

  // receiver_credits.cc
  uint64_t wanted(const RxLeg& leg) const;
  bool no_room(const Receive& receive, const RxLeg& leg) const;
  CreditGrant grant_of(const RxRegion& region) const;
  void update(RxLeg& leg);
  void leave_queues(RxLeg& leg);
  void note_reserved(const RxLeg& leg);
  static bool needy(const RxLeg& leg);
  void note_needy(RxLeg& leg);
  void note_credits(const RxLeg& leg);
  void grant(RxLeg& leg, const memory::Region& region);
  void grant_all();
  void grant_all(uint32_t arena);
  void grant_reserved();
  std::optional<uint64_t> loose_region(const RxLeg& leg) const;
  bool withdraw_for(const RxLeg& leg);
  template <typename Spares>
  bool withdraw_used(const RxLeg& leg, Spares&& spares);
  template <typename Spares>
  bool withdraw_frame(const RxLeg& leg, Spares&& spares);
  bool withdraw_share(const RxLeg& leg);
  bool grant_at_once(const RxLeg& leg);
  void withdraw_region(uint64_t region);
  void spend(RxLeg& leg, uint64_t credit);
  void free_region(uint64_t region);
  void quarantine(RxRegion& region);
  void send_pull(Link& link, RxLeg& leg, std::vector<CreditGrant> credits);
  void send_update(Link& link, RxLeg& leg);
  void changed(RxLeg& leg) { to_update_.insert(leg.pull); }

  Core& core_;
  std::map<uint64_t, Receive> receives_;
  std::map<RankKey, uint64_t> by_name_;
  std::map<uint64_t, RxLeg> legs_;  // by pull, until closed
  std::map<uint64_t, RxRegion> regions_;
  std::map<CopyId, uint64_t> scatters_;                          // -> region
  std::map<CompileId, std::pair<uint64_t, uint64_t>> compiles_;  // -> pull, ordinal
  std::map<ConditionId, uint64_t> conditions_;                   // -> receive
  std::map<ResolveId, uint64_t> resolves_;                       // -> receive
  struct CopyChunk {
    uint64_t receive = 0;
    uint64_t copy = 0;
    uint64_t bytes = 0;
  };
  std::map<CopyId, CopyChunk> copying_;
  std::map<CompileId, std::pair<uint64_t, uint64_t>> copy_compiles_;  // -> receive, copy
  std::deque<std::pair<uint64_t, uint64_t>> copy_turns_;              // receive, copy; each once
  FairQueue local_turns_;      // local legs with a chunk that may be copied now
  uint32_t local_copies_ = 0;  // under way
  // Receives with a reservation -> their legs that want a region.
  std::map<uint64_t, std::set<uint64_t>> reserved_;
  std::set<uint64_t> blocked_;  // receives whose places are read
  // Legs that land in one arena.
  struct Turns {
    explicit Turns(Shares of) : shares(std::move(of)) {}
    Shares shares;
    FairQueue waiting;  // with a SLICE, want a region
    FairQueue idle;     // ... without
    std::set<FairKey> starving;
    std::set<FairKey> starving_idle;
    FairQueue needy;                  // those of `waiting` that lack credits for refused chunks
    std::set<uint64_t> withdrawable;  // pulls with LIVE credits ...
    std::set<uint64_t> unheard;       // ... of which no SLICE has come
  };
  std::vector<Turns> turns_;      // by arena
  std::set<uint64_t> unsent_;     // pulls whose first PULL is due
  std::set<uint64_t> to_update_;  // pulls with news for the peer
  uint64_t last_pull_ = 0;
  uint64_t last_order_ = 0;
};

}  // namespace kvferry::engine
