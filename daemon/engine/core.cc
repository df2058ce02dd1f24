#include "daemon/engine/core.h"

#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/ended.h"

namespace kvferry::engine {
namespace {

constexpr std::size_t kMostIdBytes = 64;

std::vector<Arena> make_arenas(const EngineConfig& config) {
  std::vector<Arena> arenas;
  arenas.reserve(config.arenas.size());
  for (std::size_t number = 0; number < config.arenas.size(); ++number)
    arenas.emplace_back(config, number);
  return arenas;
}

void check_arenas(const std::vector<ArenaConfig>& arenas) {
  KVFERRY_CHECK(!arenas.empty() && !arenas.front().mapped, "there is an arena in host memory");
  bool mapped = false;
  std::size_t segments = 0;
  for (const ArenaConfig& arena : arenas) {
    segments += arena.segment_bytes.size();
    mapped = mapped || arena.mapped;
  }
  KVFERRY_CHECK(!mapped || (arenas.size() <= kMaxArenas && segments <= kMaxSegments),
                "mapped arenas and their segments have numbers that can be told");
}

}  // namespace

Core::Core(EngineConfig configuration)
    : config(std::move(configuration)),
      arenas(make_arenas(config)),
      workers(*this),
      lanes(*this),
      sender(*this),
      receiver(*this),
      claims(*this),
      reservations(*this, arenas.size()),
      reuse(*this) {
  check_arenas(config.arenas);
  for (uint32_t number = 0; number < arenas.size(); ++number)
    arena_by_segment_.insert(arena_by_segment_.end(), arenas[number].segment_count(), number);
}

Duration Core::limited(Duration asked, Duration otherwise) const {
  if (asked <= Duration{}) asked = otherwise;
  return std::min(asked, config.max_deadline);
}

void Core::reply_error(const OpRef& op, Code code, std::string reason, std::string message,
                       std::string field) {
  Reply answer;
  answer.op = op;
  answer.error = Error{code, std::move(reason), std::move(message), std::move(field)};
  emit(std::move(answer));
}

// Whether new work of this worker and layout is turned away; then it has its answer.
bool Core::refused(const OpRef& op, const LayoutHandle* layout) {
  if (!workers.known(op.worker)) {
    reply_error(op, Code::kFailedPrecondition, "NOT_ATTACHED", "the worker is not attached");
    return true;
  }
  if (draining) {
    reply_error(op, Code::kUnavailable, "DRAINING", "the daemon takes no new transfers");
    return true;
  }
  for (const auto& leaving : leaving_) {
    if (leaving.get() != layout) continue;
    reply_error(op, Code::kFailedPrecondition, std::string(name_of(Reason::kUnregistered)),
                "the layout is being taken back", "layout");
    return true;
  }
  return false;
}

// Whether a call that names a transfer is well formed; else it has its answer.
bool Core::well_formed(const OpRef& op, const TransferKey& key, const LayoutHandle* layout) {
  const char* field = key.id.empty() || key.id.size() > kMostIdBytes ? "transfer.id"
                      : key.instance.empty()                         ? "transfer.instance"
                      : layout == nullptr                            ? "layout"
                                                                     : nullptr;
  if (field == nullptr) {
    KVFERRY_CHECK(layout->arena < arenas.size() && !config.arenas[layout->arena].mapped,
                  "a layout's arena is one of the configuration's, and not mapped");
    KVFERRY_CHECK(!layout->mapped_arena || (*layout->mapped_arena < arenas.size() &&
                                            config.arenas[*layout->mapped_arena].mapped),
                  "a layout's mapped arena is one of the configuration's");
    return true;
  }
  reply_error(op, Code::kInvalidArgument, "BAD_TRANSFER", std::string("bad ") + field, field);
  return false;
}

template <typename Op>
void Core::by_handle(const Op& op, void (Sender::*on_send)(uint64_t, const OpRef&),
                     void (Receiver::*on_receive)(uint64_t, const OpRef&)) {
  const auto ref = workers.find(op.op.worker, op.client_handle);
  if (!ref) {
    reply_error(op.op, Code::kNotFound, "TRANSFER_UNKNOWN", "no open transfer has this handle",
                "client_handle");
  } else if (ref->role == Role::kSender) {
    (sender.*on_send)(ref->id, op.op);
  } else {
    (receiver.*on_receive)(ref->id, op.op);
  }
}

void Core::handle(Event event) {
  flushed = false;
  std::visit([this](auto& of) { on(of); }, event);
}

void Core::on(OpenSendOp& op) {
  if (well_formed(op.op, op.key, op.layout.get())) sender.open_send(op);
}
void Core::on(SendOp& op) {
  if (well_formed(op.op, op.key, op.layout.get())) sender.send(op);
}
void Core::on(ReceiveOp& op) {
  if (well_formed(op.op, op.key, op.layout.get())) receiver.receive(op);
}
void Core::on(ClaimOp& op) {
  if (well_formed(op.op, op.key, op.layout.get())) claims.claim(op);
}
void Core::on(DeclineOp& op) {
  if (well_formed(op.op, op.key, op.layout.get())) claims.decline(op);
}
void Core::on(ReserveOp& op) {
  if (well_formed(op.op, op.key, op.layout.get())) reservations.reserve(op);
}
void Core::on(CancelOp& op) {
  by_handle(op, &Sender::cancel, &Receiver::cancel);
}
void Core::on(CloseOp& op) {
  if (workers.find(op.op.worker, op.client_handle)) {
    by_handle(op, &Sender::close, &Receiver::close);
    return;
  }
  // Closed before, as far as anybody can still tell.
  Reply answer;
  answer.op = op.op;
  answer.existing = true;
  emit(std::move(answer));
}
void Core::on(RevokeOp& op) {
  const auto ref = workers.find(op.op.worker, op.client_handle);
  if (ref && ref->role == Role::kSender)
    sender.revoke(ref->id, op);
  else
    reply_error(op.op, Code::kNotFound, "TRANSFER_UNKNOWN", "no open send has this handle",
                "client_handle");
}
void Core::on(ReceiverNeedsOp& op) {
  const auto ref = workers.find(op.op.worker, op.client_handle);
  if (ref && ref->role == Role::kSender)
    sender.receiver_needs(ref->id, op.op);
  else
    reply_error(op.op, Code::kNotFound, "TRANSFER_UNKNOWN", "no open send has this handle",
                "client_handle");
}
void Core::on(CommitReuseOp& op) {
  const auto ref = workers.find(op.op.worker, op.client_handle);
  if (ref && ref->role == Role::kReceiver)
    reuse.commit(*receiver.find(ref->id), op);
  else
    reply_error(op.op, Code::kNotFound, "TRANSFER_UNKNOWN", "no receive has this handle",
                "client_handle");
}
void Core::on(LookupReuseOp& op) {
  reuse.lookup(op);
}
void Core::on(WithdrawReuseOp& op) {
  reuse.withdraw(op);
}
void Core::on(WorkerAttached& event) {
  workers.attached(event);
}
void Core::on(WorkerGone& event) {
  if (!workers.known(event.worker)) return;
  sender.worker_gone(event.worker);
  receiver.worker_gone(event.worker);
  claims.worker_gone(event.worker);
  reservations.worker_gone(event.worker);
  reuse.worker_gone(event.worker);
  workers.gone(event.worker);
}
void Core::on(UnregisterLayout& event) {
  if (event.layout == nullptr) return;
  if (std::find(leaving_.begin(), leaving_.end(), event.layout) != leaving_.end()) return;
  leaving_.push_back(event.layout);
  sender.layout_gone(event.layout.get(), event.reason);
  receiver.layout_gone(event.layout.get(), event.reason);
  claims.layout_gone(event.layout.get());
  reservations.layout_gone(event.layout.get());
  reuse.layout_gone(event.layout.get());
}
void Core::on(Resolved& event) {
  if (!receiver.resolved(event)) (void)claims.resolved(event);
}
void Core::on(PullResolved& event) {
  sender.pull_resolved(event);
}
void Core::on(Compiled& event) {
  if (!sender.compiled(event)) (void)receiver.compiled(event);
}
void Core::on(CopyCompiled& event) {
  (void)receiver.copy_compiled(event);
}
void Core::on(Packed& event) {
  sender.packed(event);
}
void Core::on(CopyEnded& event) {
  if (!sender.copy_ended(event)) (void)receiver.copy_ended(event);
}
void Core::on(ConditionMet& event) {
  if (!sender.condition_met(event.condition)) (void)receiver.condition_met(event.condition);
}
void Core::on(ConditionFailed& event) {
  if (!sender.condition_failed(event.condition)) (void)receiver.condition_failed(event.condition);
}
void Core::on(LinkUp& event) {
  lanes.link_up(event);
}
void Core::on(LinkEnded& event) {
  lanes.link_ended(event);
}
void Core::on(LaneConnected& event) {
  lanes.lane_connected(event.lane);
}
void Core::on(LaneFailed& event) {
  lanes.lane_failed(event.lane);
}
void Core::on(LaneReopened& event) {
  lanes.lane_reopened(event.lane);
}
void Core::on(LaneReopenFailed& event) {
  lanes.lane_reopen_failed(event.lane);
}
void Core::on(PeerLaneDown& event) {
  lanes.peer_lane_down(event.lane);
}
void Core::on(MessageIn& event) {
  lanes.message_in(event);
}
void Core::on(RefuseIn& event) {
  lanes.refuse_in(event);
}
void Core::on(OfferIn& event) {
  lanes.offer_in(event);
}
void Core::on(ReceiveEnded& event) {
  receiver.receive_ended(event);
}
void Core::on(OfferSendEnded& event) {
  sender.offer_send_ended(event.offer);
}
void Core::on(ArenaMapped& event) {
  lanes.arena_mapped(event);
}
void Core::on(PeerProcessGone& event) {
  lanes.process_gone(event);
  receiver.process_gone(event);
}
void Core::on(ArenaLent& event) {
  lanes.arena_lent(event);
}
void Core::on(PeerUnmapped& event) {
  if (lanes.find(event.link) == nullptr) receiver.peer_unmapped(event.link);
}
void Core::on(ReleaseQuarantine& event) {
  receiver.release_quarantine(event);
}
void Core::on(RailsUp&) {
  lanes.rails_up();
}
void Core::on(RailsDied&) {
  lanes.rails_died();
}
void Core::on(Drain& event) {
  draining = true;
  reservations.drain();
  timers.set({TimerKind::kDrain, 0, 0}, event.limit);
}

void Core::advance() {
  flushed = false;
  while (const auto key = timers.pop_due(now)) timer(*key);
}

void Core::timer(TimerKey key) {
  switch (key.kind) {
    case TimerKind::kPing:
    case TimerKind::kLaneSilence:
    case TimerKind::kLinkSilence:
    case TimerKind::kGap:
    case TimerKind::kLaneRetry:
      lanes.timer(key);
      break;
    case TimerKind::kLease:
    case TimerKind::kSendDeadline:
    case TimerKind::kLegDeadline:
    case TimerKind::kParked:
    case TimerKind::kRemembered:
      sender.timer(key);
      break;
    case TimerKind::kWait:
    case TimerKind::kReceiveDeadline:
    case TimerKind::kReady:
    case TimerKind::kLanding:
      receiver.timer(key);
      break;
    case TimerKind::kClaimRenew:
    case TimerKind::kClaimEnd:
    case TimerKind::kDeclineEnd:
      claims.timer(key);
      break;
    case TimerKind::kReusePin:
      reuse.timer(key);
      break;
    case TimerKind::kReservation:
      reservations.timer(key);
      break;
    case TimerKind::kDrain:
      sender.end_all(Reason::kShutdown);
      receiver.end_all(Reason::kShutdown);
      break;
  }
}

void Core::flush() {
  do {  // what is said within this daemon is heard at once
    lanes.loop();
    if (reuse.take_news()) receiver.places_quiet();
    reservations.flush();
    lanes.flush();
    sender.flush();
    receiver.flush();
  } while (lanes.looping());
  reuse.flush();
  workers.publish();  // before the rest, which says that the records are final
  for (Reply& answer : answers_) out->push_back(std::move(answer));
  answers_.clear();
  tell_quiet_layouts();
  tell_drained();
  flushed = true;
}

void Core::tell_quiet_layouts() {
  std::erase_if(leaving_, [this](const std::shared_ptr<const LayoutHandle>& layout) {
    if (sender.uses(layout.get()) || receiver.uses(layout.get()) || reuse.reads(layout.get()))
      return false;
    reuse.forget(layout.get());
    emit(LayoutQuiet{layout});
    return true;
  });
}

void Core::tell_drained() {
  if (!draining || drained_told || !sender.idle() || !receiver.idle()) return;
  drained_told = true;
  timers.cancel({TimerKind::kDrain, 0, 0});
  emit(Drained{});
}

}  // namespace kvferry::engine
