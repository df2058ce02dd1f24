// The engine's state and what its parts share: numbers, commands, counters. Each part owns its
// tables and changes only those; what concerns another part is a call to it.
//
//   Workers   attachments, status slots, handles, ids that stay dead
//   Lanes     links, lanes, sequences, resync
//   Sender    sends, their legs, staging
//   Receiver  receives, their legs, landing regions
//   Claims    a receiver's CLAIMs and DECLINEs
//   ReuseIndex  which local blocks hold what, who reads and writes them
//   Reservations  arena capacity promised before a Receive
//   Arena     regions by kind, promises: one for host memory and for each device
//   Timers    all that is timed
//
// Arenas stand side by side: each has its own queues and lines in Sender, Receiver and
// Reservations, so that a full one holds up nobody who needs another. A mapped one has landing legs
// alone.
#pragma once

#include "daemon/engine/arena.h"
#include "daemon/engine/claims.h"
#include "daemon/engine/commands.h"
#include "daemon/engine/config.h"
#include "daemon/engine/events.h"
#include "daemon/engine/flaws.h"
#include "daemon/engine/lanes.h"
#include "daemon/engine/receiver.h"
#include "daemon/engine/reservations.h"
#include "daemon/engine/reuse.h"
#include "daemon/engine/sender.h"
#include "daemon/engine/snapshot.h"
#include "daemon/engine/timers.h"
#include "daemon/engine/traces.h"
#include "daemon/engine/workers.h"

namespace kvferry::engine {

class Core {
 public:
  explicit Core(EngineConfig configuration);
  Core(const Core&) = delete;
  Core& operator=(const Core&) = delete;

  void handle(Event event);
  void advance();
  void flush();
  EngineSnapshot snapshot(Time at) const;
  std::vector<LiveCredit> live_credits() const;
  bool knows(LinkId link, const PullId& pull, CreditId credit) const;
  std::vector<TransferTrace> find_traces(const TraceQuery& query, Time at) const;
  void check_invariants() const;

  template <typename Any>
  void emit(Any&& command) {
    out->push_back(std::forward<Any>(command));
  }
  // Answers leave after the batch's status records: what a worker is told, its slot shows already.
  void emit(Reply answer) { answers_.push_back(std::move(answer)); }
  // Numbers of everything the engine makes, but pulls and credits, which have their own.
  uint64_t next_number() { return ++last_number; }
  void dropped(DropCause cause) { ++stats.dropped[static_cast<std::size_t>(cause)]; }
  // `asked` as configured limits allow: 0 is the default, more than the most is the most.
  Duration limited(Duration asked, Duration otherwise) const;
  void reply_error(const OpRef& op, Code code, std::string reason, std::string message,
                   std::string field = {});

  // The number of the arena that the region lies in.
  uint32_t arena_of(const memory::Region& region) const {
    return arena_by_segment_.at(region.segment);
  }
  // Whether new work of this worker and layout is turned away; then the call has its answer.
  bool refused(const OpRef& op, const LayoutHandle* layout);

  const EngineConfig config;
  Time now;
  Commands* out = nullptr;
  EngineStats stats;
  uint64_t last_number = 0;
  bool draining = false;
  bool drained_told = false;
  bool flushed = true;  // since the last event: grants are what they should be

  Timers timers;
  std::vector<Arena> arenas;
  Workers workers;
  Lanes lanes;
  Sender sender;
  Receiver receiver;
  Claims claims;
  Reservations reservations;
  ReuseIndex reuse;
  Traces traces;

 private:
  // One for each event.
  void on(OpenSendOp& op);
  void on(SendOp& op);
  void on(ReceiveOp& op);
  void on(CancelOp& op);
  void on(CloseOp& op);
  void on(RevokeOp& op);
  void on(ReceiverNeedsOp& op);
  void on(ClaimOp& op);
  void on(DeclineOp& op);
  void on(ReserveOp& op);
  void on(CommitReuseOp& op);
  void on(LookupReuseOp& op);
  void on(WithdrawReuseOp& op);
  void on(WorkerAttached& event);
  void on(WorkerGone& event);
  void on(UnregisterLayout& event);
  void on(Resolved& event);
  void on(PullResolved& event);
  void on(Compiled& event);
  void on(CopyCompiled& event);
  void on(Packed& event);
  void on(CopyEnded& event);
  void on(ConditionMet& event);
  void on(ConditionFailed& event);
  void on(LinkUp& event);
  void on(LinkEnded& event);
  void on(LaneConnected& event);
  void on(LaneFailed& event);
  void on(LaneReopened& event);
  void on(LaneReopenFailed& event);
  void on(PeerLaneDown& event);
  void on(MessageIn& event);
  void on(RefuseIn& event);
  void on(OfferIn& event);
  void on(ReceiveEnded& event);
  void on(OfferSendEnded& event);
  void on(ArenaMapped& event);
  void on(ArenaLent& event);
  void on(PeerProcessGone& event);
  void on(PeerUnmapped& event);
  void on(ReleaseQuarantine& event);
  void on(RailsUp& event);
  void on(RailsDied& event);
  void on(Drain& event);

  bool well_formed(const OpRef& op, const TransferKey& key, const LayoutHandle* layout);
  template <typename Op>
  void by_handle(const Op& op, void (Sender::*on_send)(uint64_t, const OpRef&),
                 void (Receiver::*on_receive)(uint64_t, const OpRef&));
  void timer(TimerKey key);
  void tell_quiet_layouts();
  void tell_drained();

  std::vector<uint32_t> arena_by_segment_;
  std::vector<Reply> answers_;                                // of this batch
  std::vector<std::shared_ptr<const LayoutHandle>> leaving_;  // layouts taken back, not yet quiet
};

}  // namespace kvferry::engine
