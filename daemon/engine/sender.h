// The sender's side: sends, the legs that receivers pull, chunks on their way out and the staging
// regions they hold. Implements the tables "sender leg" and "chunk" of README.md. Part of Core.
//
//   sender_calls.cc   what workers ask; a send's end, its receivers, release of its source
//   sender_pulls.cc   what receivers' daemons say: PULL, END, CLAIM, DECLINE, also before the Send
//   sender_legs.cc    slices of a leg: compile, announce, ack; resync; revoke
//   sender_chunks.cc  gather, offer, staging; chunks lent to receivers on this daemon
//   sender_streams.cc legs whose streams are equal: what is gathered for one serves the others
//   sender_mapped.cc  chunks gathered straight into a receiver's mapped arena; DRAINED
//   sender_needs.cc   what receivers need: RECEIVER_READY
//   sender_packed.cc  packed copies: room for them, their making, their end
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "daemon/engine/state.h"
#include "daemon/engine/timers.h"

namespace kvferry::engine {

class Core;

class Sender {
 public:
  explicit Sender(Core& core);

  // Calls of workers.
  void open_send(const OpenSendOp& op);
  void send(const SendOp& op);
  void cancel(uint64_t send, const OpRef& op);
  void close(uint64_t send, const OpRef& op);
  void revoke(uint64_t send, const RevokeOp& op);
  void receiver_needs(uint64_t send, const OpRef& op);
  void worker_gone(WorkerId worker);
  void layout_gone(const LayoutHandle* layout, Reason reason);
  bool uses(const LayoutHandle* layout) const;
  void end_all(Reason reason);
  bool idle() const;

  // Answers.
  void pull_resolved(PullResolved& event);
  bool compiled(Compiled& event);
  void packed(Packed& event);
  bool copy_ended(const CopyEnded& event);
  bool condition_met(ConditionId condition);
  bool condition_failed(ConditionId condition);
  void offer_send_ended(OfferId offer);

  // Messages.
  void pull_in(Link& link, MsgPull& message);
  void update_in(Link& link, const MsgUpdate& message);
  void end_in(Link& link, const MsgEnd& message);
  void claim_in(Link& link, const MsgClaim& message);
  void decline_in(Link& link, const MsgDecline& message);
  void refuse_in(Link& link, const RefuseIn& event);

  // From Lanes.
  void lane_down(Link& link, uint32_t lane, uint32_t epoch);
  void link_dead(Link& link);
  void resync(Link& link);
  void rails_died();

  // The other end of a local leg is to copy this chunk from its pages, which are lent until `repay`
  // tells of the copy's end. Without a plan if the slice or the leg is no more: a message about
  // that is on its way.
  struct Loan {
    uint64_t id = 0;
    std::shared_ptr<const Plan> plan;
  };
  Loan lend(uint64_t pull, uint64_t slice, uint64_t chunk);
  void repay(uint64_t loan, const CopyEnded& event);

  void timer(TimerKey key);
  // Gathers and offers for which there is room, credit and a lane.
  void flush();

  Send* find(uint64_t id);
  const Send* find(uint64_t id) const;
  const std::map<uint64_t, Send>& sends() const { return sends_; }
  const std::map<uint64_t, TxLeg>& legs() const { return legs_; }
  const std::map<uint64_t, Staging>& stagings() const { return stagings_; }
  const std::map<uint64_t, StagingRegion>& staging_regions() const { return regions_; }
  uint64_t packed_bytes() const { return packed_bytes_; }
  uint32_t packed_copies() const { return packed_copies_; }
  void check_invariants(std::vector<std::pair<RegionKind, memory::Region>>& regions) const;
  uint64_t on_lane(LinkId link, uint32_t lane) const;  // bytes, counted anew

 private:
  using NameAndRank = std::pair<TransferName, uint32_t>;

  // A CLAIM, DECLINE or END that came before its Send; unverified until then.
  struct Remembered {
    enum class Kind : uint8_t { kClaim, kDecline, kEnded } kind = Kind::kClaim;
    LinkId link;
    std::string node;
    NameAndRank of;
    PullId pull;
    std::string instance;  // the receiver's
    Incarnation incarnation;
    uint32_t rank = 0;
    Digest16 cards;
    Proof proof;
    Reason reason = Reason::kNone;
    Time until;
  };

  // sender_calls.cc
  Send* find(const NameAndRank& name);
  Send* admit(const OpRef& op, uint64_t handle, const TransferKey& key,
              const std::shared_ptr<const LayoutHandle>& layout, uint32_t max_receivers,
              Duration lease, Duration deadline, bool& existing);
  bool same_call(const OpRef& op, const Send& send, const SendOp& call, const SendOp& before);
  void add_slice(Send& send, const SendOp& op);
  static bool offers_something(const SendOp& op);
  static uint64_t end_of(const SendOp& op);  // where the last of its ranges ends
  void reply(const OpRef& op, const Send& send, bool existing);
  void start(Send& send);
  void end_send(Send& send, TransferState state, Reason reason);
  bool may_arrive(const TxChunk& chunk) const;
  Delivery delivery_of(const Send& send) const;
  bool source_read(const Send& send) const;
  void evaluate(Send& send);
  void release(Send& send);
  void forget_if_done(uint64_t send);
  void lease_timer(Send& send);

  // sender_pulls.cc
  void meet(Send& send);
  void park(Link& link, std::shared_ptr<const MsgPull> pull);
  std::unique_ptr<ParkedPull> unpark(Link& link, uint64_t pull);
  void accept_pull(Send& send, Link& link, std::shared_ptr<const MsgPull> pull,
                   const std::vector<CreditGrant>& credits, Time expires);
  void end_pull(Link& link, uint64_t pull, const TransferName& name, Outcome outcome,
                Reason reason);
  void answer_end(Link& link, uint64_t pull, const PeerPull& ended);
  void forget_below(Link& link, uint64_t oldest);
  void receiver_ended(Link& link, const MsgEnd& message);
  Place* place_for(Send& send, const TxLeg& leg, const PullResolved& event, Reason& refusal);
  bool proven(const Send& send, const std::string& node, const PullId& pull, uint32_t receiver_rank,
              const Digest16& cards, const Proof& proof) const;
  void remember(Remembered entry);
  void forget(uint64_t remembered);
  void apply_claim(Send& send, const Remembered& claim);
  void apply_decline(Send& send, const Remembered& decline);
  void lose_place(Send& send, const std::string& instance, const Incarnation& incarnation,
                  uint32_t rank, Reason reason);
  bool pulled(const Send& send, const std::string& instance, const Incarnation& incarnation,
              uint32_t rank) const;

  // sender_needs.cc
  void leg_needs(Send& send, Place& place, const std::vector<GroupRanges>& needs);

  // sender_legs.cc
  TxLeg* leg_of(Link& link, const PullId& pull);
  void pump(TxLeg& leg);
  void announce(TxLeg& leg, uint64_t ordinal, TxSlice& slice);
  MsgSlice slice_message(const TxLeg& leg, uint64_t ordinal, const TxSlice& slice) const;
  bool tell_slice(TxLeg& leg, uint64_t ordinal, const TxSlice& slice);
  void take_credits(Link& link, TxLeg& leg, const std::vector<CreditGrant>& credits);
  void ack(TxLeg& leg, const Ack& ack);
  bool all_acked(const TxLeg& leg) const;
  void delivered(const TxLeg& leg);
  // Ends the leg on this side: END to the peer, its staging as soon as nobody touches it.
  void end_leg(TxLeg& leg, Outcome outcome, Reason reason);
  // ... and what follows for its receiver and the send.
  void leg_over(uint64_t leg, LegFate fate, Outcome outcome, Reason reason);
  void fail_place(Send& send, const ReceiverKey& key, Reason reason);
  void drop_slice(TxLeg& leg, uint64_t ordinal);
  void answer_revokes(Send& send);

  // sender_chunks.cc
  bool next_idle(TxLeg& leg);
  bool same_arena(TxLeg& leg);
  void update(TxLeg& leg);
  void leave_queues(TxLeg& leg);
  StagingRegion& begin_gather(TxLeg& leg, uint64_t ordinal, uint64_t chunk);
  Staging& begin_chunk(TxLeg& leg, StagingRegion& region);
  void gather(TxLeg& leg, const memory::Region& region);
  void gathered(StagingRegion& region, const CopyEnded& event);
  void chunk_gathered(uint64_t staging, CopyOutcome outcome);
  void chunk_read(TxLeg& leg, TxSlice& slice);
  void gather_all(uint32_t arena);
  std::set<std::pair<uint64_t, uint64_t>>::const_iterator unknown_to_peer(const TxLeg& leg) const;
  bool must_ask(const TxLeg& leg) const;
  void offer(TxLeg& leg);
  void chunk_acked(TxLeg& leg, TxSlice& slice, uint64_t ordinal, uint64_t chunk);
  // END(COMPLETED) acknowledges everything, whatever acks are still on their way.
  void ack_all(TxLeg& leg);
  void lost_offer(Staging& staging, bool credit_usable);
  static void stray_offer(TxLeg& leg, const Staging& staging);
  void unwant(uint64_t staging);
  void give_back(StagingRegion& region);
  // The newest offer's bytes are on their lane no more; kArrived: the peer has said that it has
  // them.
  enum class Left : uint8_t { kArrived, kUnknown };
  void off_lane(Staging& staging, Left how);
  void free_if_done(uint64_t staging);

  // sender_streams.cc
  void enter_stream(TxLeg& leg, uint64_t ordinal, TxSlice& slice);
  void leave_stream(const TxLeg& leg, TxSlice& slice);
  // Others may find the region; nobody finds it any more.
  void list(const TxLeg& leg, const TxSlice& slice, StagingRegion& region);
  void unlist(const StagingRegion& region);
  StagingRegion* shareable(TxLeg& leg);
  void may_share(const TxLeg& leg);
  void share(TxLeg& leg, StagingRegion& region);
  void share_all();
  void check_streams() const;
  void check_shares() const;

  // sender_mapped.cc
  bool bad_mapped(const Link& link, const MsgPull& pull) const;
  void update_mapped(TxLeg& leg);
  void gather_mapped();
  void gather_into_peer(TxLeg& leg);
  void written(TxLeg& leg, TxSlice& slice, Staging& staging);
  static uint64_t idle_chunks(const TxLeg& leg);
  void give_back_credits(TxLeg& leg, uint64_t ordinal, const std::vector<uint64_t>& idle);
  void give_back_credit(TxLeg& leg, const std::pair<uint64_t, uint64_t>& of,
                        const CreditGrant& credit, Check check);
  // A gather into a peer's region has ended.
  void writing_ended(const Staging& staging);
  void ask_drained(Link& link, const PullId& pull);
  void tell_drained(Link& link, const PullId& pull, const PeerPull& ended);
  void resync_writes(Link& link, const TxLeg& leg);

  // sender_packed.cc
  bool packed_refused(const SendOp& op);
  void add_packed(Send& send, SendSlice& slice);
  void make_packed(Send& send, uint32_t index);
  void drop_packed(Send& send, SendSlice& slice);
  void free_packed(Send& send);
  void free_packed(SendSlice& slice);
  void check_packed() const;

  Core& core_;
  std::map<uint64_t, Send> sends_;
  std::map<NameAndRank, uint64_t> by_name_;
  std::map<uint64_t, TxLeg> legs_;
  std::map<uint64_t, Staging> stagings_;
  std::map<OfferId, uint64_t> newest_;     // offers that are out -> staging
  std::map<OfferId, uint64_t> sends_out_;  // UCX sends that have not ended -> staging
  std::map<CopyId, uint64_t> gathers_;     // -> staging region
  std::map<uint64_t, StagingRegion> regions_;
  std::map<uint64_t, TxStream> streams_;
  std::set<uint64_t> sharing_;  // legs for which others' regions may hold a chunk
  std::map<CopyId, std::pair<uint64_t, uint32_t>> packings_;         // -> send, send index
  uint64_t packed_bytes_ = 0;                                        // of all packed copies ...
  uint32_t packed_copies_ = 0;                                       // ... that have any
  std::map<CompileId, std::pair<uint64_t, uint64_t>> compiles_;      // -> leg, ordinal
  std::map<ConditionId, std::pair<uint64_t, uint32_t>> conditions_;  // -> send, send index
  std::map<ResolveId, uint64_t> resolves_;                           // -> leg
  std::map<NameAndRank, std::map<uint64_t, std::pair<LinkId, uint64_t>>> parked_;  // by arrival
  std::map<uint64_t, Remembered> remembered_;                                      // by arrival
  std::map<NameAndRank, std::set<uint64_t>> remembered_by_name_;
  std::map<LinkId, std::set<uint64_t>> remembered_by_link_;
  // Legs whose chunks are staged in one arena.
  struct Turns {
    explicit Turns(Shares of) : shares(std::move(of)) {}
    Shares shares;
    FairQueue credited;  // with a credit for it
    FairQueue ahead;     // ... without
    std::set<FairKey> starving;
    uint64_t ahead_total = 0;
  };
  std::vector<Turns> turns_;  // by arena
  std::set<uint64_t> ready_;  // legs with something to offer
  FairQueue mapped_turns_;    // mapped legs with a credit and a chunk to gather
  // Gathers into peers' regions that run: of all, and of each pull of each node (Link::peer).
  uint32_t mapped_gathers_ = 0;
  std::map<std::pair<uint64_t, PullId>, uint32_t> writing_;
};

}  // namespace kvferry::engine
