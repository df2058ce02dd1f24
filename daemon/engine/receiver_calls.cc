// Receives: the calls of their workers, their legs as the directory finds them, and their end.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"
#include "daemon/engine/ended.h"
#include "daemon/engine/proofs.h"

namespace kvferry::engine {
namespace {

constexpr std::size_t kMostLegs = 1024;  // of a transfer
constexpr uint64_t kMostRanges = 3500;   // in a PULL: it fits 64 KiB

}  // namespace

const Receive* Receiver::find(uint64_t id) const {
  const auto it = receives_.find(id);
  return it == receives_.end() ? nullptr : &it->second;
}

Receive* Receiver::find(uint64_t id) {
  const auto it = receives_.find(id);
  return it == receives_.end() ? nullptr : &it->second;
}

const Receive* Receiver::find(const RankKey& key) const {
  const auto it = by_name_.find(key);
  return it == by_name_.end() ? nullptr : &receives_.at(it->second);
}

void Receiver::reply(const OpRef& op, const Receive& receive, bool existing) {
  Reply answer;
  answer.op = op;
  answer.existing = existing;
  answer.slot = receive.slot;
  answer.state = receive.record.state;
  answer.memory_in_use = receive.record.memory_in_use;
  core_.emit(std::move(answer));
}

// The field in which a repeated call differs from the first.
const char* Receiver::different(const Receive& receive, const ReceiveOp& op) const {
  const ReceiveOp& first = *receive.asked;
  return receive.worker != op.op.worker                     ? "transfer.id"
         : receive.record.client_handle != op.client_handle ? "client_handle"
         : receive.layout != op.layout                      ? "layout"
         : first.ticket != op.ticket                        ? "ticket"
         : first.sender_dp_group != op.sender_dp_group      ? "sender_dp_group"
         : first.needs != op.needs                          ? "needs"
         : first.blocks != op.blocks                        ? "blocks"
         : first.num_tokens != op.num_tokens                ? "num_tokens"
         : !(first.ready == op.ready)                       ? "ready"
         : first.wait_for_arena != op.wait_for_arena        ? "wait_for_arena"
         : first.hashes != op.hashes                        ? "prompt_hashes"
         : first.reuse_pin != op.reuse_pin                  ? "reuse_pin"
         : first.done != op.done                            ? "done"
         : first.wait != op.wait                            ? "wait"
         : first.deadline != op.deadline                    ? "deadline"
                                                            : nullptr;
}

void Receiver::receive(const ReceiveOp& op) {
  const RankKey name = rank_key(wire_name(op.key, op.key.incarnation), *op.layout);
  if (const auto it = by_name_.find(name); it != by_name_.end()) {
    const Receive& known = receives_.at(it->second);
    if (const char* field = different(known, op))
      core_.reply_error(op.op, Code::kAlreadyExists, "TRANSFER_EXISTS",
                        "the transfer exists with another " + std::string(field), field);
    else
      reply(op.op, known, true);
    return;
  }
  if (core_.workers.buried(Role::kReceiver, name)) {
    core_.reply_error(op.op, Code::kAlreadyExists, "TRANSFER_CLOSED",
                      "the transfer was closed; its id is not used again", "transfer.id");
    return;
  }
  if (core_.workers.find(op.op.worker, op.client_handle)) {
    core_.reply_error(op.op, Code::kAlreadyExists, "HANDLE_IN_USE",
                      "the handle names another transfer", "client_handle");
    return;
  }
  uint64_t ranges = 0;
  for (const GroupNeed& need : op.needs) ranges += 2 + need.ranges.size();
  if (ranges > kMostRanges) {
    core_.reply_error(op.op, Code::kInvalidArgument, std::string(name_of(Reason::kTooFragmented)),
                      "the needs have too many ranges", "needs");
    return;
  }
  if (core_.refused(op.op, op.layout.get())) return;
  if (core_.reservations.elsewhere(op.op, name, *op.layout)) return;
  if (core_.reuse.bad_groups(op.op, *op.layout, op.hashes)) return;
  Receive fresh;
  fresh.id = core_.next_number();
  fresh.worker = op.op.worker;
  fresh.key = op.key;
  fresh.name = name.transfer;
  fresh.hash = short_hash(fresh.name);
  fresh.timeline.note(Step::kAsked, core_.now);
  fresh.layout = op.layout;
  fresh.created = core_.now;
  fresh.record.client_handle = op.client_handle;
  fresh.record.role = Role::kReceiver;
  fresh.asked = std::make_shared<const ReceiveOp>(op);
  fresh.op = fresh.asked;
  fresh.done = op.done;
  if (!core_.workers.enter(op.op, fresh, Role::kReceiver)) return;
  Receive& receive = receives_.emplace(fresh.id, std::move(fresh)).first->second;
  by_name_.emplace(name, receive.id);
  const Duration wait = core_.limited(op.wait, core_.config.default_wait);
  receive.deadline = core_.limited(op.deadline, core_.config.default_deadline);
  receive.must_end = core_.now + wait + receive.deadline;
  core_.timers.set({TimerKind::kWait, receive.id, 0}, core_.now + wait);
  receive.signalled = op.ready.kind == ReadyCondition::Kind::kHostSynced;
  claim_places(receive);
  may_be_ready(receive);
  if (!receive.signalled) {
    receive.condition = ConditionId{core_.next_number()};
    conditions_[receive.condition] = receive.id;
    core_.emit(WatchCondition{receive.condition, receive.worker, op.ready, receive.layout});
  }
  core_.claims.received(receive.worker, name);
  receive.reservation = core_.reservations.received(name);
  core_.workers.changed(receive, Role::kReceiver);
  reply(op.op, receive, false);
  ask_legs(receive);
}

void Receiver::ask_legs(Receive& receive) {
  receive.resolve = ResolveId{core_.next_number()};
  ++receive.resolves;
  resolves_[receive.resolve] = receive.id;
  core_.emit(Resolve{receive.resolve, receive.op});
}

bool Receiver::resolved(Resolved& event) {
  const auto it = resolves_.find(event.resolve);
  if (it == resolves_.end()) return false;
  Receive& receive = receives_.at(it->second);
  resolves_.erase(it);
  receive.resolve = {};
  Reason reason = event.reason;
  if (reason == Reason::kNone && event.legs.empty()) reason = Reason::kIncompatible;
  if (reason == Reason::kNone && event.legs.size() > kMostLegs) reason = Reason::kTooFragmented;
  for (const ReceiverLeg& leg : event.legs) {
    if (reason != Reason::kNone) break;
    const Link* link = core_.lanes.find_node(leg.node);
    if (reason == Reason::kNone && link == nullptr) reason = Reason::kPeerLost;
    if (reason == Reason::kNone && link->own_pulls.size() >= core_.config.max_legs)
      reason = Reason::kRefused;
  }
  if (reason != Reason::kNone) {
    end_receive(receive, TransferState::kFailed, reason);
    return true;
  }
  receive.sender_incarnation = event.sender_incarnation;
  receive.timeline.note(Step::kResolved, core_.now);
  // A ticket by name does not tell the incarnation, of which the sender's name for it has.
  if (TransferName known = receive.name; known.incarnation != event.sender_incarnation) {
    known.incarnation = event.sender_incarnation;
    receive.hash = short_hash(known);
  }
  for (const ReceiverLeg& leg : event.legs) {
    receive.groups.insert(leg.sender_dp_group);
    make_leg(receive, *core_.lanes.find_node(leg.node), leg, event.cards);
  }
  receive.decided = receive.groups.size() == 1;
  receive.record.bytes_total = 0;
  if (receive.decided)
    for (const ReceiverLeg& leg : event.legs) receive.record.bytes_total += leg.expected_bytes;
  for (const uint64_t pull : receive.legs) update(legs_.at(pull));
  core_.workers.changed(receive, Role::kReceiver);
  return true;
}

void Receiver::make_leg(Receive& receive, Link& link, const ReceiverLeg& of,
                        const Digest16& cards) {
  RxLeg leg;
  leg.pull = ++last_pull_;
  leg.link = link.id;
  leg.arena = receive.layout->arena;
  leg.local = link.looped();
  leg.receive = receive.id;
  leg.sender_rank = of.sender_rank;
  leg.dp_group = of.sender_dp_group;
  leg.empty = of.empty;
  leg.carries_aux = of.carries_aux;
  leg.expected_bytes = of.expected_bytes;
  leg.credit_bytes = std::min(link.chunk_bytes, of.expected_bytes);
  leg.context = of.context;
  choose_mapped(leg, receive, link);
  leg.reserved = receive.reservation != 0 && !leg.local && !leg.mapped;
  leg.name = receive.name;
  leg.name.incarnation = receive.sender_incarnation;
  leg.turn = {receive.tenant, receive.worker.value, receive.id, leg.pull};
  leg.peer = link.peer;
  auto message = std::make_shared<MsgPull>();
  message->pull = {core_.config.boot, leg.pull};
  message->transfer = leg.name;
  message->sender_rank = of.sender_rank;
  message->receiver_rank = receive.layout->rank;
  message->receiver_instance = receive.layout->instance;
  message->receiver_incarnation = receive.layout->incarnation;
  message->cards = cards;
  message->needs = receive.op->needs;
  if (leg.mapped) message->mapped = leg.arena;
  ProofFields fields;
  fields.pull = message->pull;
  fields.id = leg.name.id;
  fields.instance = leg.name.instance;
  fields.incarnation = leg.name.incarnation;
  fields.sender_rank = of.sender_rank;
  fields.receiver_rank = message->receiver_rank;
  fields.sender_node = link.node;
  fields.receiver_node = core_.config.node;
  fields.cards = cards;
  message->proof = receiver_proof(receive.key.secret, fields);
  leg.message = std::move(message);
  note_node(receive, link);
  link.own_pulls.insert(leg.pull);
  receive.legs.insert(leg.pull);
  unsent_.insert(leg.pull);
  legs_.emplace(leg.pull, std::move(leg));
}

void Receiver::cancel(uint64_t id, const OpRef& op) {
  Receive& receive = receives_.at(id);
  if (!receive.terminal()) end_receive(receive, TransferState::kCancelled, Reason::kCancelled);
  reply(op, receive, false);
}

void Receiver::close(uint64_t id, const OpRef& op) {
  Receive& receive = receives_.at(id);
  if (!receive.terminal() || !receive.record.released) {
    core_.reply_error(op, Code::kFailedPrecondition, "STILL_OPEN",
                      "the transfer has not ended, or its pages are not released");
    return;
  }
  reply(op, receive, false);
  core_.workers.leave(receive);
  receive.attached = false;
  forget_if_done(id);
}

void Receiver::worker_gone(WorkerId worker) {
  std::vector<uint64_t> ids;
  for (const auto& [id, receive] : receives_)
    if (receive.worker == worker) ids.push_back(id);
  for (const uint64_t id : ids) {
    Receive& receive = receives_.at(id);
    receive.attached = false;
    if (!receive.terminal()) end_receive(receive, TransferState::kFailed, Reason::kWorkerLost);
    forget_if_done(id);
  }
}

void Receiver::layout_gone(const LayoutHandle* layout, Reason reason) {
  for (auto& [id, receive] : receives_)
    if (receive.layout.get() == layout && !receive.terminal())
      end_receive(receive, TransferState::kFailed, reason);
}

bool Receiver::uses(const LayoutHandle* layout) const {
  return std::any_of(receives_.begin(), receives_.end(), [&](const auto& entry) {
    const Receive& receive = entry.second;
    return receive.layout.get() == layout && (!receive.terminal() || receive.writing());
  });
}

void Receiver::end_all(Reason reason) {
  for (auto& [id, receive] : receives_)
    if (!receive.terminal()) end_receive(receive, TransferState::kFailed, reason);
}

bool Receiver::idle() const {
  return std::all_of(receives_.begin(), receives_.end(), [](const auto& entry) {
    return entry.second.terminal() && !entry.second.writing();
  });
}

// ---- a receive's end --------------------------------------------------------------------------

void Receiver::end_receive(Receive& receive, TransferState state, Reason reason) {
  KVFERRY_CHECK(!receive.terminal(), "a receive ends once");
  receive.record.state = state;
  receive.record.reason = reason;
  receive.timeline.note(Step::kEnded, core_.now);
  if (state == TransferState::kCompleted) {
    receive.record.delivery = Delivery::kDelivered;
    if (receive.done && receive.attached)
      core_.emit(SetDoneWord{receive.worker, receive.done->word, receive.done->value});
  }
  // Given up before its sender has heard of it: told, so that the pages there need not wait out
  // their lease.
  const bool given_up = reason == Reason::kCancelled || reason == Reason::kWorkerLost ||
                        reason == Reason::kUnregistered;
  const bool unheard = std::all_of(receive.legs.begin(), receive.legs.end(), [&](uint64_t pull) {
    return legs_.at(pull).state == RxLegState::kUnsent;
  });
  if (given_up && unheard) core_.claims.decline_unheard(receive);
  core_.timers.cancel({TimerKind::kWait, receive.id, 0});
  core_.timers.cancel({TimerKind::kReceiveDeadline, receive.id, 0});
  core_.timers.cancel({TimerKind::kReady, receive.id, 0});
  if (receive.resolve) {
    resolves_.erase(receive.resolve);
    core_.emit(CancelResolve{receive.resolve});
    receive.resolve = {};
  }
  if (receive.condition && conditions_.erase(receive.condition) > 0)
    core_.emit(UnwatchCondition{receive.condition});
  const Outcome outcome = state == TransferState::kCompleted   ? Outcome::kCompleted
                          : state == TransferState::kCancelled ? Outcome::kCancelled
                                                               : Outcome::kFailed;
  const std::set<uint64_t> legs = std::exchange(receive.legs, {});
  for (const uint64_t pull : legs) end_leg(legs_.at(pull), outcome, reason);
  receive.landed.clear();
  end_copies(receive);
  if (receive.reservation != 0) core_.reservations.receive_ended(receive.reservation);
  core_.emit(ended(receive, Role::kReceiver, core_.now));
  core_.workers.changed(receive, Role::kReceiver);
  release(receive);
}

// Our side of the leg is terminal: its regions as the table says, END to the peer.
void Receiver::end_leg(RxLeg& leg, Outcome outcome, Reason reason) {
  leave_queues(leg);
  end_credits(leg);
  for (const auto& [order, offer] : std::exchange(leg.held, {})) drop_offer(offer);
  // None is left where all has arrived; only an early end looks through those of other legs.
  for (auto it = regions_.begin(); leg.regions_held > 0 && it != regions_.end();) {
    RxRegion& region = it->second;
    ++it;
    if (region.leg != leg.pull) continue;
    if (region.state == RegionState::kLanding) {
      if (flawed(Flaw::kFreeLanding))
        free_region(region.id);
      else
        quarantine(region);
    } else if (region.state == RegionState::kLanded) {
      free_region(region.id);
    }
  }
  for (const auto& [ordinal, slice] : leg.slices) compiles_.erase(slice.compile);
  leg.slices.clear();
  leg.coverage.clear();
  leg.to_copy.clear();
  leg.refused.clear();
  leg.new_acks.clear();
  leg.new_credits.clear();
  to_update_.erase(leg.pull);
  leave_queues(leg);
  leg.outcome = outcome;
  leg.reason = reason;
  const bool pulled = leg.state != RxLegState::kUnsent;
  unsent_.erase(leg.pull);
  leg.state = outcome == Outcome::kReleased ? RxLegState::kReleased : RxLegState::kEnded;
  if (leg.mapped && pulled) {
    end_mapped(leg);
  } else if (!pulled || leg.peer_ended) {
    // The peer never heard of it, or has told its end already.
    close_leg(leg.pull);
  } else {
    answer_end(*core_.lanes.find(leg.link), leg);
  }
}

// DEST_RELEASED: terminal, and no copy writes the pages.
void Receiver::release(Receive& receive) {
  const bool writing = receive.writing();
  if (receive.record.memory_in_use != writing) {
    receive.record.memory_in_use = writing;
    core_.workers.changed(receive, Role::kReceiver);
  }
  if (receive.record.released || writing || !receive.terminal()) return;
  receive.record.released = true;
  receive.timeline.note(Step::kReleased, core_.now);
  for (const BlockPlace& place : std::exchange(receive.writes, {})) core_.reuse.write_ended(place);
  receive.record.released_reason = receive.record.reason;
  core_.workers.changed(receive, Role::kReceiver);
}

void Receiver::forget_if_done(uint64_t id) {
  Receive& receive = receives_.at(id);
  if (receive.attached || !receive.terminal() || receive.writing()) return;
  const RankKey key = rank_key(receive.name, *receive.layout);
  core_.workers.bury(Role::kReceiver, key, receive.record.reason);
  by_name_.erase(key);
  core_.traces.keep(trace_of(receive, Role::kReceiver, core_.now), core_.now);
  receives_.erase(id);
}

void Receiver::timer(TimerKey key) {
  if (key.kind == TimerKind::kLanding) {
    const auto it = regions_.find(key.a);
    if (it != regions_.end() && it->second.state == RegionState::kQuarantined &&
        flawed(Flaw::kFreeByTime))
      free_region(key.a);
    else if (it == regions_.end() || it->second.state != RegionState::kLanding)
      return;
    if (!regions_.contains(key.a)) return;
    const RxRegion& region = it->second;
    core_.lanes.give_up({region.link, region.lane, region.epoch});
    return;
  }
  Receive* receive = find(key.a);
  if (receive == nullptr || receive->terminal()) return;
  const bool missing = std::any_of(receive->legs.begin(), receive->legs.end(),
                                   [&](uint64_t pull) { return not_offered(legs_.at(pull)); });
  const Reason reason = key.kind == TimerKind::kReady ? Reason::kNotReady
                        : missing                     ? Reason::kNotOffered
                                                      : Reason::kDeadline;
  end_receive(*receive, TransferState::kFailed, reason);
}

}  // namespace kvferry::engine
