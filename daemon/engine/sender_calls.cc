// Sends: the calls of their workers, their receivers' places, their end and the release of the
// source.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"
#include "daemon/engine/ended.h"
#include "daemon/engine/proofs.h"

namespace kvferry::engine {

const Send* Sender::find(uint64_t id) const {
  const auto it = sends_.find(id);
  return it == sends_.end() ? nullptr : &it->second;
}

Send* Sender::find(uint64_t id) {
  const auto it = sends_.find(id);
  return it == sends_.end() ? nullptr : &it->second;
}

Send* Sender::find(const NameAndRank& name) {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : &sends_.at(it->second);
}

void Sender::reply(const OpRef& op, const Send& send, bool existing) {
  Reply answer;
  answer.op = op;
  answer.existing = existing;
  answer.slot = send.slot;
  answer.state = send.record.state;
  answer.memory_in_use = send.record.memory_in_use;
  core_.emit(std::move(answer));
}

// The send that a call names: an existing one if the call fits it, else a new one. Nothing (and the
// caller has its answer) if neither can be.
Send* Sender::admit(const OpRef& op, uint64_t handle, const TransferKey& key,
                    const std::shared_ptr<const LayoutHandle>& layout, uint32_t max_receivers,
                    Duration lease, Duration deadline, bool& existing) {
  if (key.instance != layout->instance || key.incarnation != layout->incarnation) {
    core_.reply_error(op, Code::kInvalidArgument, "INSTANCE_MISMATCH",
                      "the transfer is of another instance than the layout", "transfer.instance");
    return nullptr;
  }
  const NameAndRank name{wire_name(key, key.incarnation), layout->rank};
  const uint32_t receivers = std::max<uint32_t>(max_receivers, 1);
  if (Send* send = find(name)) {
    const char* field = send->worker != op.worker              ? "transfer.id"
                        : send->record.client_handle != handle ? "client_handle"
                        : send->layout != layout               ? "layout"
                        : send->max_receivers != receivers     ? "max_receivers"
                                                               : nullptr;
    if (field != nullptr) {
      core_.reply_error(op, Code::kAlreadyExists, "TRANSFER_EXISTS",
                        "the transfer exists with another " + std::string(field), field);
      return nullptr;
    }
    existing = true;
    return send;
  }
  if (core_.workers.buried(Role::kSender, sender_key(name.first, name.second))) {
    core_.reply_error(op, Code::kAlreadyExists, "TRANSFER_CLOSED",
                      "the transfer was closed; its id is not used again", "transfer.id");
    return nullptr;
  }
  if (core_.workers.find(op.worker, handle)) {
    core_.reply_error(op, Code::kAlreadyExists, "HANDLE_IN_USE",
                      "the handle names another transfer", "client_handle");
    return nullptr;
  }
  if (core_.refused(op, layout.get())) return nullptr;
  Send fresh;
  fresh.id = core_.next_number();
  fresh.worker = op.worker;
  fresh.key = key;
  fresh.name = name.first;
  fresh.hash = short_hash(fresh.name);
  fresh.layout = layout;
  fresh.created = core_.now;
  fresh.record.client_handle = handle;
  fresh.record.role = Role::kSender;
  fresh.max_receivers = receivers;
  fresh.deadline = core_.limited(deadline, core_.config.default_deadline);
  if (!core_.workers.enter(op, fresh, Role::kSender)) return nullptr;
  Send& send = sends_.emplace(fresh.id, std::move(fresh)).first->second;
  by_name_.emplace(name, send.id);
  send.lease_end = core_.now + core_.limited(lease, core_.config.default_lease);
  lease_timer(send);
  core_.workers.changed(send, Role::kSender);
  existing = false;
  return &send;
}

void Sender::open_send(const OpenSendOp& op) {
  bool existing = false;
  Send* send = admit(op.op, op.client_handle, op.key, op.layout, op.max_receivers, op.lease,
                     op.deadline, existing);
  if (send == nullptr) return;
  if (!send->opened) send->opened = {op.lease, op.deadline};
  if (*send->opened != std::pair(op.lease, op.deadline)) {
    const char* field = send->opened->first != op.lease ? "lease" : "deadline";
    core_.reply_error(op.op, Code::kAlreadyExists, "TRANSFER_EXISTS",
                      "the transfer exists with another " + std::string(field), field);
    return;
  }
  if (!existing) send->timeline.note(Step::kAsked, core_.now);
  reply(op.op, *send, existing);
  if (!existing) meet(*send);
}

bool Sender::same_call(const OpRef& op, const Send& send, const SendOp& call,
                       const SendOp& before) {
  const char* field = call.num_tokens != before.num_tokens       ? "num_tokens"
                      : call.offer != before.offer               ? "offer"
                      : call.blocks != before.blocks             ? "blocks"
                      : call.layers != before.layers             ? "layers"
                      : call.last != before.last                 ? "last"
                      : call.aux != before.aux                   ? "aux"
                      : !(call.ready == before.ready)            ? "ready"
                      : call.done != before.done                 ? "done"
                      : call.packed_bytes != before.packed_bytes ? "packed_copy"
                      : call.lease != before.lease               ? "lease"
                      : call.deadline != before.deadline         ? "deadline"
                                                                 : nullptr;
  if (field == nullptr) {
    reply(op, send, true);
    return true;
  }
  core_.reply_error(op, Code::kAlreadyExists, "SEND_EXISTS",
                    "this send index was used with another " + std::string(field), field);
  return false;
}

void Sender::send(const SendOp& op) {
  bool existing = false;
  Send* known = find(NameAndRank{wire_name(op.key, op.key.incarnation), op.layout->rank});
  const std::size_t made = known == nullptr ? 0 : known->sends.size();
  if (op.send_index > made) {
    core_.reply_error(op.op, Code::kInvalidArgument, "SEND_INDEX_GAP",
                      "send indices are 0, 1, ...; the next one is " + std::to_string(made),
                      "send_index");
    return;
  }
  // A transfer that begins without the room it asks for does not begin.
  if (known == nullptr && packed_refused(op)) return;
  Send* send = admit(op.op, op.client_handle, op.key, op.layout, op.max_receivers, op.lease,
                     op.deadline, existing);
  if (send == nullptr) return;
  if (op.send_index < send->sends.size()) {
    (void)same_call(op.op, *send, op, *send->sends[op.send_index].op);
    return;
  }
  if (op.done && send->done && *op.done != *send->done) {
    core_.reply_error(op.op, Code::kInvalidArgument, "DONE_WORD_DIFFERS",
                      "an earlier Send of the transfer named another done word", "done");
    return;
  }
  const bool last_sent = send->last.has_value();
  if (send->terminal() || last_sent || send->by_ordinal.size() >= core_.config.max_slices) {
    const bool full = !send->terminal() && !last_sent;
    core_.reply_error(op.op, full ? Code::kResourceExhausted : Code::kFailedPrecondition,
                      send->terminal() ? std::string(name_of(send->record.reason))
                                       : (full ? "TOO_MANY_SLICES" : "AFTER_LAST"),
                      send->terminal()
                          ? "the transfer has ended"
                          : (full ? "the transfer has too many slices" : "the last slice was sent"),
                      send->terminal() ? "transfer.id" : "send_index");
    return;
  }
  if (packed_refused(op)) return;
  add_slice(*send, op);
  reply(op.op, *send, false);
  const uint64_t id = send->id;
  if (!existing) meet(*send);
  send = find(id);
  if (send == nullptr || send->terminal()) return;
  const std::set<uint64_t> legs = send->legs;
  for (const uint64_t leg : legs) {
    const auto it = legs_.find(leg);
    if (it != legs_.end() && it->second.resolved) pump(it->second);
  }
  if ((send = find(id)) != nullptr) evaluate(*send);
}

bool Sender::offers_something(const SendOp& op) {
  return std::any_of(op.offer.begin(), op.offer.end(), [](const GroupRanges& group) {
    return std::any_of(group.ranges.begin(), group.ranges.end(),
                       [](const Range& range) { return !range.empty(); });
  });
}

uint64_t Sender::end_of(const SendOp& op) {
  uint64_t end = 0;
  for (const GroupRanges& group : op.offer)
    for (const Range& range : group.ranges) end = std::max(end, range.end);
  return end;
}

void Sender::add_slice(Send& send, const SendOp& op) {
  const auto index = static_cast<uint32_t>(send.sends.size());
  SendSlice& slice = send.sends.emplace_back();
  send.timeline.note(Step::kAsked, core_.now);
  slice.op = std::make_shared<const SendOp>(op);
  if (op.done) send.done = op.done;
  if (!send.lease_over && !send.terminal()) {
    send.lease_end =
        std::max(send.lease_end, core_.now + core_.limited(op.lease, core_.config.default_lease));
  }
  const bool offers = offers_something(op);
  slice.gone = !offers && !op.last;
  if (slice.gone) return;
  slice.ordinal = send.by_ordinal.size();
  send.by_ordinal.push_back(index);
  if (op.last) send.last = slice.ordinal;
  if (const uint64_t end = end_of(op); end > 0) send.by_end.emplace(end, slice.ordinal);
  if (op.packed_bytes)
    add_packed(send, slice);
  else if (offers)
    ++send.paged;
  slice.ready = op.ready.kind == ReadyCondition::Kind::kHostSynced;
  if (slice.ready) {
    send.timeline.note(Step::kReady, core_.now);
    make_packed(send, index);
    return;
  }
  slice.condition = ConditionId{core_.next_number()};
  conditions_[slice.condition] = {send.id, index};
  core_.emit(WatchCondition{slice.condition, send.worker, op.ready, send.layout});
}

bool Sender::condition_met(ConditionId condition) {
  const auto it = conditions_.find(condition);
  if (it == conditions_.end()) return false;
  const auto [id, index] = it->second;
  conditions_.erase(it);
  Send& send = sends_.at(id);
  send.sends[index].ready = true;
  send.timeline.note(Step::kReady, core_.now);
  make_packed(send, index);
  const std::set<uint64_t> legs = send.legs;
  for (const uint64_t leg : legs) {
    const auto found = legs_.find(leg);
    if (found != legs_.end() && found->second.resolved) pump(found->second);
  }
  release(send);  // or a packed copy reads the pages now
  return true;
}

bool Sender::condition_failed(ConditionId condition) {
  const auto it = conditions_.find(condition);
  if (it == conditions_.end()) return false;
  const uint64_t id = it->second.first;
  conditions_.erase(it);
  if (Send& send = sends_.at(id); !send.terminal())
    end_send(send, TransferState::kFailed, Reason::kNotReady);
  forget_if_done(id);
  return true;
}

void Sender::cancel(uint64_t id, const OpRef& op) {
  Send& send = sends_.at(id);
  if (!send.terminal()) end_send(send, TransferState::kCancelled, Reason::kCancelled);
  reply(op, sends_.at(id), false);
}

void Sender::close(uint64_t id, const OpRef& op) {
  Send& send = sends_.at(id);
  if (!send.terminal() || !send.record.released) {
    core_.reply_error(op, Code::kFailedPrecondition, "STILL_OPEN",
                      "the transfer has not ended, or its pages are not released");
    return;
  }
  reply(op, send, false);
  core_.workers.leave(send);
  send.attached = false;
  forget_if_done(id);
}

void Sender::worker_gone(WorkerId worker) {
  std::vector<uint64_t> ids;
  for (const auto& [id, send] : sends_)
    if (send.worker == worker) ids.push_back(id);
  for (const uint64_t id : ids) {
    Send& send = sends_.at(id);
    send.attached = false;
    if (!send.terminal() && !send.record.released)
      end_send(send, TransferState::kFailed, Reason::kWorkerLost);
    forget_if_done(id);
  }
}

void Sender::layout_gone(const LayoutHandle* layout, Reason reason) {
  std::vector<uint64_t> ids;
  for (const auto& [id, send] : sends_)
    if (send.layout.get() == layout && !send.terminal()) ids.push_back(id);
  for (const uint64_t id : ids) {
    end_send(sends_.at(id), TransferState::kFailed, reason);
    forget_if_done(id);
  }
}

bool Sender::uses(const LayoutHandle* layout) const {
  return std::any_of(sends_.begin(), sends_.end(), [&](const auto& entry) {
    const Send& send = entry.second;
    return send.layout.get() == layout && (!send.terminal() || send.reads > 0);
  });
}

void Sender::end_all(Reason reason) {
  std::vector<uint64_t> ids;
  for (const auto& [id, send] : sends_)
    if (!send.terminal()) ids.push_back(id);
  for (const uint64_t id : ids) {
    end_send(sends_.at(id), TransferState::kFailed, reason);
    forget_if_done(id);
  }
}

bool Sender::idle() const {
  return std::all_of(sends_.begin(), sends_.end(), [](const auto& entry) {
    return entry.second.terminal() && entry.second.gathers == 0;
  });
}

// ---- a send's end -----------------------------------------------------------------------------

// Its transfer timer runs from the first activity.
void Sender::start(Send& send) {
  if (send.started || send.terminal()) return;
  send.started = true;
  core_.timers.set({TimerKind::kSendDeadline, send.id, 0}, core_.now + send.deadline);
}

// DELIVERED is known by ENDs and acks alone; else, whether everything may have arrived.
// Whether the receiver may have the chunk, or get it before it hears of our end: the copy of one
// that is lent goes on.
bool Sender::may_arrive(const TxChunk& chunk) const {
  return chunk.offered_once || (chunk.staging != 0 && stagings_.at(chunk.staging).lent);
}

Delivery Sender::delivery_of(const Send& send) const {
  if (!send.last || send.places.empty() || !send.all_offered) return Delivery::kNo;
  for (const auto& [key, place] : send.places) {
    if (!key.group_known) return Delivery::kNo;
    for (const auto& [rank, of] : place.legs) {
      if (of.fate == LegFate::kExpected) return Delivery::kNo;
      if (of.fate != LegFate::kOpen) continue;
      const TxLeg& leg = legs_.at(of.leg);
      if (leg.announced <= *send.last) return Delivery::kNo;
      for (const auto& [ordinal, slice] : leg.slices) {
        if (slice.dropped) continue;
        for (const TxChunk& chunk : slice.chunks)
          if (!may_arrive(chunk)) return Delivery::kNo;
      }
    }
  }
  return Delivery::kUnknown;
}

void Sender::end_send(Send& send, TransferState state, Reason reason) {
  KVFERRY_CHECK(!send.terminal(), "a send ends once");
  send.record.delivery =
      state == TransferState::kDelivered ? Delivery::kDelivered : delivery_of(send);
  send.record.state = state;
  send.record.reason = reason;
  send.timeline.note(Step::kEnded, core_.now);
  if (reason == Reason::kExpired) ++core_.stats.leases_expired;
  core_.timers.cancel({TimerKind::kLease, send.id, 0});
  core_.timers.cancel({TimerKind::kSendDeadline, send.id, 0});
  const Outcome outcome = state == TransferState::kDelivered   ? Outcome::kDelivered
                          : state == TransferState::kCancelled ? Outcome::kCancelled
                                                               : Outcome::kFailed;
  const std::set<uint64_t> legs = send.legs;
  for (const uint64_t leg : legs) end_leg(legs_.at(leg), outcome, reason);
  for (SendSlice& slice : send.sends) {
    if (!slice.condition || conditions_.erase(slice.condition) == 0) continue;
    core_.emit(UnwatchCondition{slice.condition});
  }
  free_packed(send);
  core_.emit(ended(send, Role::kSender, core_.now));
  core_.workers.changed(send, Role::kSender);
  release(send);
  answer_revokes(send);
}

// Whether nobody will want to read the pages any more, as long as the send is not terminal: what is
// not packed has been gathered by all who may come.
bool Sender::source_read(const Send& send) const {
  if (!send.last || (send.unpacked > 0 && !flawed(Flaw::kReleaseUnpacked))) return false;
  if (send.packed > 0 && send.paged == 0) return true;
  if (send.places.size() < send.max_receivers && !send.lease_over) return false;
  if (send.places.empty()) return false;
  for (const uint64_t id : send.legs)
    if (!legs_.at(id).resolved) return false;
  for (const auto& [key, place] : send.places) {
    if (place.failed) continue;
    for (const auto& [rank, of] : place.legs) {
      if (of.fate == LegFate::kExpected) return false;
      if (of.fate != LegFate::kOpen) continue;
      const TxLeg& leg = legs_.at(of.leg);
      if (leg.announced <= *send.last || leg.ungathered > 0) return false;
    }
  }
  return true;
}

void Sender::release(Send& send) {
  const bool reading = send.reads > 0;
  if (send.record.memory_in_use != reading) {
    send.record.memory_in_use = reading;
    core_.workers.changed(send, Role::kSender);
  }
  if (send.record.released || reading || !(send.terminal() || source_read(send))) return;
  send.record.released = true;
  send.timeline.note(Step::kReleased, core_.now);
  send.record.released_reason = send.terminal() ? send.record.reason : Reason::kNone;
  if (send.done && send.attached)
    core_.emit(SetDoneWord{send.worker, send.done->word, send.done->value});
  core_.workers.changed(send, Role::kSender);
}

// After anything that may have ended the send or released its source.
void Sender::evaluate(Send& send) {
  if (!send.terminal()) {
    const bool resolving = std::any_of(send.legs.begin(), send.legs.end(),
                                       [&](uint64_t leg) { return !legs_.at(leg).resolved; });
    const bool full = send.places.size() >= send.max_receivers;
    bool running = resolving || !(full || send.lease_over);
    bool any_delivered = false;
    bool any_failed = false;
    Reason reason = send.places.empty() ? Reason::kExpired : Reason::kNone;
    for (const auto& [key, place] : send.places) {
      if (place.failed) {
        any_failed = true;
        reason = place.reason;
        continue;
      }
      for (const auto& [rank, of] : place.legs) {
        running |= of.fate == LegFate::kExpected || of.fate == LegFate::kOpen;
        any_delivered |= of.fate == LegFate::kDelivered;
      }
    }
    if (!running) {
      if (any_delivered)
        end_send(send, TransferState::kDelivered, Reason::kNone);
      else if (any_failed || send.places.empty())
        end_send(send, TransferState::kFailed, reason);
      else
        end_send(send, TransferState::kCancelled, Reason::kReleased);
    }
  }
  release(send);
  forget_if_done(send.id);
}

// A transfer whose worker is gone, or has closed it, is forgotten once nothing touches its pages.
void Sender::forget_if_done(uint64_t id) {
  Send& send = sends_.at(id);
  if (send.attached || !send.terminal() || send.gathers > 0) return;
  const Reason reason = send.record.reason == Reason::kNone ? Reason::kRefused : send.record.reason;
  core_.workers.bury(Role::kSender, sender_key(send.name, send.layout->rank), reason);
  by_name_.erase({send.name, send.layout->rank});
  core_.traces.keep(trace_of(send, Role::kSender, core_.now), core_.now);
  sends_.erase(id);
}

// ---- timers -----------------------------------------------------------------------------------

// The lease runs until all places are taken.
void Sender::lease_timer(Send& send) {
  const TimerKey key{TimerKind::kLease, send.id, 0};
  if (send.terminal() || send.lease_over || send.places.size() >= send.max_receivers)
    core_.timers.cancel(key);
  else
    core_.timers.set(key, send.lease_end);
}

void Sender::timer(TimerKey key) {
  switch (key.kind) {
    case TimerKind::kLease: {
      Send& send = sends_.at(key.a);
      if (send.lease_end > core_.now) {
        core_.timers.set(key, send.lease_end);
        break;
      }
      send.lease_over = true;
      evaluate(send);
      break;
    }
    case TimerKind::kSendDeadline: {
      Send& send = sends_.at(key.a);
      end_send(send, TransferState::kFailed, Reason::kDeadline);
      forget_if_done(key.a);
      break;
    }
    case TimerKind::kLegDeadline:
      leg_over(key.a, LegFate::kFailed, Outcome::kFailed, Reason::kDeadline);
      break;
    case TimerKind::kParked: {
      Link* link = core_.lanes.find(LinkId{key.a});
      if (link == nullptr) break;
      const TransferName name = link->pulls.at(key.b).parked->pull->transfer;
      unpark(*link, key.b);
      end_pull(*link, key.b, name, Outcome::kFailed, Reason::kNoSend);
      break;
    }
    case TimerKind::kRemembered:
      forget(key.a);
      break;
    default:
      break;
  }
}

}  // namespace kvferry::engine
