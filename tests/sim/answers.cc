// Workload: what daemons tell their workers, and what goes wrong from the workers' point of view.
#include <algorithm>

#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;

void Workload::on_reply(uint32_t node, const Reply& reply) {
  Worker* worker = worker_of(node, reply.op.worker);
  if (worker == nullptr) return;  // its lifeline is closed
  const auto found = worker->ops.find(reply.op.op_id);
  if (found == worker->ops.end())
    throw Violation("replies", "a second answer to op " + std::to_string(reply.op.op_id) +
                                   ", or one to a call that was not made");
  const PendingOp pending = found->second;
  worker->ops.erase(found);
  Side& side = *pending.side;
  --side.open_calls;
  const bool ok = reply.error.code == Code::kOk;
  const uint32_t causes = side.transfer->causes;
  const auto unexpected = [&](const char* call) {
    throw Violation("replies", std::string(call) + " of " + label(side) + " is answered " +
                                   reply.error.to_string());
  };
  const bool sends =
      pending.kind == PendingOp::Kind::kFirst || pending.kind == PendingOp::Kind::kMore;
  if (sends && send_without_copy(side, pending.kind, reply)) return;
  switch (pending.kind) {
    case PendingOp::Kind::kFirst:
      if (ok) {
        side.accepted = true;
        require(!side.slot || *side.slot == reply.slot, "slots", "a side's slot has changed");
        side.slot = reply.slot;
      } else {
        constexpr uint32_t kMay = kCauseDrain | kCauseExhausted | kCauseUnregister | kCauseDecline |
                                  kCauseWorker | kCauseDaemon | kCauseHostile;
        if ((causes & kMay) == 0) unexpected("the first call");
        require(!side.record, "replies", "a refused call has a status record");
        side.refused = side.done_calling = true;
        side.to_send.clear();
        if (!keep(side)) give_blocks(side, true);
      }
      break;
    case PendingOp::Kind::kMore:
      if (!ok && causes == 0 && !side.terminal()) unexpected("a later Send");
      break;
    case PendingOp::Kind::kRepeat:
      if (ok && !side.refused)
        require(reply.existing, "replies", "a repeated call has started something");
      if (!ok && side.accepted && !side.closing && !side.terminal() && causes == 0)
        unexpected("a repeated call");
      break;
    case PendingOp::Kind::kCancel:
      if (!ok && side.accepted && !side.closing) unexpected("Cancel");
      if (ok && !reply.memory_in_use)
        require(side.released(), "replies", "Cancel tells of free pages that no record shows");
      break;
    case PendingOp::Kind::kRevoke:
      if (!ok && causes == 0) unexpected("Revoke");
      revoked(side, reply.dropped_sends);
      break;
    case PendingOp::Kind::kClose:
      if (!ok) unexpected("Close");
      side.closed = true;
      break;
    case PendingOp::Kind::kClaim:
    case PendingOp::Kind::kDecline:
      if (!ok && causes == 0) unexpected("Claim or Decline");
      break;
    case PendingOp::Kind::kClaimAgain:
      if (ok) {
        // An id stays dead for a while, by the daemon's clock.
        require(reply.existing || !side.accepted || side.transfer->leapt, "replies",
                "a claim started after its Receive");
        ++claims_again_;
      } else if (reply.error.reason != "DECLINED" && reply.error.reason != "TRANSFER_CLOSED" &&
                 causes == 0) {
        unexpected("a repeated Claim");
      }
      break;
    case PendingOp::Kind::kReserve: {
      if (ok) {
        require(reply.reserved_bytes > 0, "replies", "a reservation of nothing");
        ++side.reservations;
        break;
      }
      const std::string& why = reply.error.reason;
      if (why != "ARENA_EXHAUSTED" && why != "RESERVATION_TOO_LARGE" && why != "TRANSFER_ENDED" &&
          causes == 0)
        unexpected("Reserve");
      break;
    }
    case PendingOp::Kind::kNeeds:
      if (ok)
        check_needs(side, reply);
      else if (reply.error.reason != "TRANSFER_ENDED" && causes == 0)
        unexpected("ReceiverNeeds");
      break;
    case PendingOp::Kind::kLookup:
      if (!ok && causes == 0) unexpected("LookupReuse");
      side.pin = reply.pin;
      break;
    case PendingOp::Kind::kCommit:
      if (!ok && causes == 0) unexpected("CommitReuse");
      committed(side, ok);
      break;
    case PendingOp::Kind::kWithdraw:
      if (!ok) unexpected("WithdrawReuse");
      withdrawn(side);
      break;
  }
  settle(side);
}

void Workload::on_publish(uint32_t node, const Publish& publish) {
  Worker* worker = worker_of(node, publish.worker);
  if (worker == nullptr) return;
  const auto found = worker->sides.find(publish.record.client_handle);
  require(found != worker->sides.end(), "records", "a record of a handle that was never given");
  Side& side = *found->second;
  require(!side.slot_freed, "records", "a record after its slot was freed");
  require(!side.slot || *side.slot == publish.slot, "slots", "a side's slot has changed");
  for (const auto& [handle, another] : worker->sides)
    require(
        another == &side || another->slot_freed || !another->slot || *another->slot != publish.slot,
        "slots", "two sides have one slot");
  side.slot = publish.slot;
  check_record(side, publish.record);
  const bool was_terminal = side.terminal();
  const bool was_released = side.released();
  side.record = publish.record;
  const bool done =
      side.role == Role::kSender
          ? side.released() && (!side.terminal() || side.in(TransferState::kDelivered))
          : side.in(TransferState::kCompleted);
  if (done && !side.done_set)
    throw Violation("done", "the done word of " + label(side) + " was not set");
  if (side.terminal() && !was_terminal) {
    if (world_.now().ns > side.limit.ns + Duration(std::chrono::milliseconds(1500)).count())
      throw Violation("limits", label(side) + " ended after its limits");
    check_reason(side);
    if (side.in(TransferState::kCompleted)) check_pages(side);
  }
  if (side.released() && !was_released) {
    if (world_.nodes[node]->copying(side.uid))
      throw Violation("released",
                      "the pages of " + label(side) + " are released while a copy runs");
    if (!keep(side)) give_blocks(side, true);
  }
  settle(side);
}

// Set once, with or before the record that says the same, and never while a copy touches the pages.
void Workload::on_done_word(uint32_t node, const SetDoneWord& set) {
  Worker* worker = worker_of(node, set.worker);
  if (worker == nullptr) return;
  const auto found = worker->sides.find(set.word);
  require(found != worker->sides.end() && found->second->uid == set.value, "done",
          "a done word that nobody named is set");
  Side& side = *found->second;
  require(!side.done_set, "done", "a done word is set twice");
  require(!world_.nodes[node]->copying(side.uid), "done", "a done word is set while a copy runs");
  side.done_set = true;
}

void Workload::on_free_slot(uint32_t node, const FreeSlot& free) {
  Worker* worker = worker_of(node, free.worker);
  if (worker == nullptr) return;
  for (auto& [handle, side] : worker->sides)
    if (side->slot == free.slot && !side->slot_freed) {
      require(side->closing, "slots", "a slot is freed that its worker has not closed");
      side->slot_freed = true;
      return;
    }
  throw Violation("slots", "a slot is freed that nobody has");
}

void Workload::copy_failed(uint64_t side) {
  blame(*side_by_uid(side)->transfer, kCauseCopy);
}

void Workload::link_lost(uint32_t a, uint32_t b) {
  for (auto& transfer : transfers_) {
    bool over = true;
    bool there = false;
    for (const auto& side : sides_) {
      if (side->transfer != transfer.get()) continue;
      over = over && (side->terminal() || side->lost || side->refused);
      there = there || side->worker->node == a || side->worker->node == b;
    }
    if (there && !over) blame(*transfer, kCauseLink);
  }
}

// Whatever waits there may have waited for too long at once.
void Workload::leapt(uint32_t node) {
  for (const auto& side : sides_) {
    if (side->worker->node != node) continue;
    side->transfer->leapt = true;
    if (!side->terminal()) blame(*side->transfer, kCauseTime | kCauseLink | kCauseCondition);
  }
}

void Workload::unreachable(const TransferKey& key, uint32_t cause) {
  for (auto& transfer : transfers_)
    if (transfer->id == key.id) blame(*transfer, cause);
}

// All that this node's workers send is taken back.
void Workload::revoke_all(uint32_t node) {
  for (auto& side : sides_)
    if (side->role == Role::kSender && side->worker->node == node && side->called && !side->lost &&
        !side->closing)
      later(*side, rng_.micros(0, 1500), [this](Side& s) { call_revoke(s, 0); });
}

void Workload::data_corrupted() {
  for (auto& transfer : transfers_) blame(*transfer, kCauseCorrupt);
}

bool Workload::finished() const {
  if (to_begin_ != 0 || planned_ != 0) return false;
  for (const auto& side : sides_) {
    if (side->lost || side->refused) continue;
    if (side->open_calls != 0) return false;
    if (side->called && !(side->closed && side->slot_freed)) return false;
  }
  for (const auto& worker : workers_)
    if (worker->quiet_due || !worker->cache.empty()) return false;
  return true;
}

// Who asked when, and how many were served.
void Workload::count_receivers(const Transfer& transfer, Totals& totals) const {
  Time first = Time::never();
  Time last{};
  for (const Side* sender : transfer.sides) {
    first = std::min(first, sender->called_at);
    last = std::max(last, sender->called_at);
  }
  uint64_t served = 0;
  for (const ReceiverGroup& group : transfer.receivers) {
    bool completed = true;
    for (const Side* side : group.sides) {
      if (!side->in(TransferState::kCompleted)) {
        completed = false;
        continue;
      }
      if (side->claimed) ++totals.claims_kept;
      std::size_t legs = 0;
      std::size_t here = 0;
      for (const Side* sender : transfer.sides) {
        if (!has_leg(*sender, *side)) continue;
        ++legs;
        if (sender->worker->node == side->worker->node) ++here;
      }
      if (here > 0) ++(here == legs ? totals.local_receivers : totals.mixed_receivers);
      if (side->called_at < first) ++totals.early_receivers;
      if (side->called_at > last) ++totals.late_receivers;
    }
    if (completed) ++served;
  }
  if (served > 1) ++totals.several_receivers;
}

void Workload::count(Totals& totals) const {
  totals.claims_again += claims_again_;
  totals.reuse_commits += commits_;
  totals.packed_refused += packed_refused_;
  totals.needs_told += needs_told_;
  for (const auto& transfer : transfers_) count_receivers(*transfer, totals);
  for (const auto& side : sides_) {
    if (side->claimed) ++totals.claims;
    if (side->declines) ++totals.declines;
    totals.reservations += side->reservations;
    if (side->cancelled) ++totals.cancels;
    if (side->revokes > 0) ++totals.revokes;
    if (!side->terminal()) continue;
    if (side->in(TransferState::kCompleted))
      ++totals.completed;
    else if (side->in(TransferState::kDelivered))
      ++totals.delivered;
    else
      ++totals.reasons[std::string(name_of(side->record->reason))];
    for (const Slice& slice : side->sent)
      if (slice.dropped) ++totals.resent_slices;
  }
}

std::string Workload::open_things() const {
  std::string out;
  if (to_begin_ != 0) out += " transfers to begin: " + std::to_string(to_begin_);
  if (planned_ != 0) out += " planned: " + std::to_string(planned_);
  for (const auto& side : sides_) {
    if (side->lost || side->refused) continue;
    const bool open =
        side->open_calls != 0 || (side->called && !(side->closed && side->slot_freed));
    if (!open) continue;
    out += "\n  " + label(*side) + " open calls " + std::to_string(side->open_calls) + " " +
           (side->record ? describe(*side->record) : std::string("no record")) + " causes " +
           std::to_string(side->transfer->causes);
  }
  for (const auto& worker : workers_)
    for (const auto& [uid, kept] : worker->cache)
      out += "\n  kept pages of " + label(*side_by_uid(uid));
  for (const auto& worker : workers_)
    if (worker->quiet_due)
      out += "\n  a layout of node" + std::to_string(worker->node) + " is not quiet";
  return out;
}

}  // namespace kvferry::sim
