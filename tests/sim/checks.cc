// Workload: what must hold of what the daemons tell and of the bytes in the pages.
#include <algorithm>

#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;

namespace {

// The causes that explain a reason; 0: nothing does.
uint32_t explains(Reason reason) {
  constexpr uint32_t kAny = ~uint32_t{0};
  switch (reason) {
    case Reason::kCancelled:
      return kCauseCancel;
    case Reason::kDeadline:
    case Reason::kExpired:
    case Reason::kNoSend:
    case Reason::kRefused:
    case Reason::kReleased:
    case Reason::kPeerUnreachable:
      return kAny;
    case Reason::kDeclined:
      // A Receive that was given up before its sender heard of it is declined.
      return kCauseDecline | kCauseCancel | kCauseWorker | kCauseUnregister;
    case Reason::kStaleCards:
      return kCauseStale | kCauseWorker | kCauseDaemon | kCauseUnregister;
    case Reason::kNotOffered:
      return kCauseNotOffered;
    case Reason::kLayoutMismatch:
      return kCauseSkewed;
    case Reason::kDataLoss:
      return kCauseCorrupt;
    case Reason::kNotReady:
      return kCauseCondition;
    case Reason::kGatherFailed:
    case Reason::kScatterFailed:
      return kCauseCopy;
    case Reason::kPeerLost:
      return kCauseLink | kCauseDaemon;
    case Reason::kWorkerLost:
      return kCauseWorker | kCauseUnregister;
    case Reason::kUnregistered:
      return kCauseUnregister;
    case Reason::kShutdown:
      return kCauseDrain;
    case Reason::kArenaExhausted:
      return kCauseExhausted;
    case Reason::kPermission:
      return kCauseSecret;
    default:
      return 0;
  }
}

bool is_end(TransferState state) {
  return state != TransferState::kOpen && state != TransferState::kActive;
}

[[noreturn]] void broken(const char* name, const Side& side, const std::string& what) {
  throw Violation(name, label(side) + ": " + what);
}

}  // namespace

// Against the record before it: nothing that was final may change.
void Workload::check_record(Side& side, const TransferRecord& now) const {
  if (now.role != side.role) broken("records", side, "the record tells another role");
  if (now.state == TransferState::kDelivered && side.role == Role::kReceiver)
    broken("records", side, "a receiver is DELIVERED");
  if (now.state == TransferState::kCompleted && side.role == Role::kSender)
    broken("records", side, "a sender is COMPLETED");
  if (now.released && now.memory_in_use) broken("released", side, "RELEASED, and memory in use");
  if (side.role == Role::kReceiver && now.released && !is_end(now.state))
    broken("released", side, "DEST_RELEASED before the end");
  const bool arrived =
      now.state == TransferState::kDelivered || now.state == TransferState::kCompleted;
  if (arrived != (now.delivery == Delivery::kDelivered))
    broken("records", side, "state and delivery do not agree: " + describe(now));
  if (!side.record) return;
  const TransferRecord& before = *side.record;
  if (before.released && !now.released) broken("released", side, "RELEASED is taken back");
  if (before.released && before.released_reason != now.released_reason)
    broken("released", side, "the reason of RELEASED has changed");
  if (before.state == TransferState::kActive && now.state == TransferState::kOpen)
    broken("records", side, "ACTIVE goes back to OPEN");
  if (is_end(before.state) && (before.state != now.state || before.reason != now.reason))
    broken("records", side,
           "the end has changed from " + describe(before) + " to " + describe(now));
  if (is_end(before.state) && before.delivery != now.delivery)
    broken("records", side, "delivery has changed after the end");
}

// A transfer may end badly only by what was done to it.
void Workload::check_reason(const Side& side) const {
  const TransferRecord& now = *side.record;
  if (now.state == TransferState::kDelivered || now.state == TransferState::kCompleted) return;
  const uint32_t causes = side.transfer->causes;
  if ((causes & kCauseHostile) != 0) return;
  if (causes == 0) broken("liveness", side, "ended without any cause: " + describe(now));
  if ((explains(now.reason) & causes) == 0)
    broken("reasons", side,
           "ended for a reason that nothing explains (causes " + std::to_string(causes) +
               "): " + describe(now));
}

const Side* Workload::sender_of_cell(const Transfer& transfer, const Side& receiver,
                                     uint64_t unit) const {
  const Instance& to = *transfer.receivers[receiver.place].instance;
  for (const Leg& leg : legs_between(transfer.sender->ranks, transfer.sender_group, to.ranks,
                                     transfer.receivers[receiver.place].dp_group)) {
    if (leg.receiver_rank != receiver.worker->rank || leg.empty) continue;
    if (leg.units.begin <= unit && unit < leg.units.end)
      return transfer.sides[leg.sender_rank - transfer.sender_group * transfer.sender->ranks.tp];
  }
  return nullptr;
}

// What a receiver has of one sender, all in all: of slices that a Revoke has dropped only if its
// leg had ended by then. It has nothing that was sent after that Revoke then, and its last slice
// was one of those that were dropped.
void Workload::check_dropped(const Side& side, const Side& sender,
                             const std::set<uint32_t>& used) const {
  uint32_t revoke = 0;
  for (const uint32_t index : used) {
    const uint32_t by = sender.sent[index].dropped_by;
    if (by != 0 && (revoke == 0 || by < revoke)) revoke = by;
  }
  if (revoke == 0) return;
  for (const uint32_t index : used)
    if (sender.sent[index].after_revokes >= revoke)
      broken("revoked", side,
             "COMPLETED with cells of a dropped slice beside some of slice " +
                 std::to_string(index) + " of " + label(sender) + ", which was sent after that");
  if (std::none_of(sender.sent.begin(), sender.sent.end(),
                   [&](const Slice& of) { return of.last && of.dropped_by == revoke; }))
    broken("revoked", side,
           "COMPLETED with cells of a dropped slice, and no last slice was dropped");
}

// COMPLETED: every needed cell holds what the sender's worker last wrote there for a slice that
// counts, nothing else of the transfer's blocks was touched, and the aux is there.
void Workload::check_pages(const Side& side) const {
  const Transfer& transfer = *side.transfer;
  const Pool& pool = *side.worker->layout->pool;
  const bool hostile = (transfer.causes & kCauseHostile) != 0;  // its bytes are the enemy's
  if (!hostile && (transfer.aux.has_value() != (side.record->aux != nullptr) ||
                   (transfer.aux && *transfer.aux != *side.record->aux)))
    broken("aux", side, "COMPLETED with another aux than was sent");
  Pool untouched(shape_, pool.units, 1);
  std::map<const Side*, std::set<uint32_t>> used;  // indices into what each sender has sent
  for (uint32_t g = 0; g < shape_.groups; ++g) {
    const GroupNeed* need = nullptr;
    for (const GroupNeed& n : side.needs)
      if (n.group == g) need = &n;
    untouched.fill_block(g, 0, side.uid);
    for (std::size_t position = 0; position < side.blocks[g].size(); ++position) {
      const uint64_t first = position * kTokensPerBlock;
      const auto block = static_cast<uint32_t>(side.blocks[g][position]);
      const bool needed =
          need != nullptr && need->ranges[0].begin <= first && first < need->ranges[0].end;
      const uint32_t layer0 = g * shape_.layers_per_group;
      if (!needed) {
        const uint8_t* is = pool.bytes.data() + pool.cell_at(g, block, layer0, pool.units.begin, 0);
        const uint8_t* was =
            untouched.bytes.data() + untouched.cell_at(g, 0, layer0, pool.units.begin, 0);
        if (!std::equal(is, is + pool.block_bytes(), was))
          broken("outside", side, "a block outside the needs was written");
        continue;
      }
      if (hostile) continue;
      for (uint32_t layer = layer0; layer < layer0 + shape_.layers_per_group; ++layer)
        for (uint64_t unit = pool.units.begin; unit < pool.units.end; ++unit) {
          const Side* from = sender_of_cell(transfer, side, unit);
          for (uint64_t t = 0; t < kTokensPerBlock; ++t) {
            const uint64_t token = first + t;
            const uint8_t* cell = pool.bytes.data() + pool.cell_at(g, block, layer, unit, t);
            if (shape_.zero_tail && token >= need->end) {
              if (std::any_of(cell, cell + kCellBytes, [](uint8_t byte) { return byte != 0; }))
                broken("tail", side, "COMPLETED with a cell past the prompt's end not cleared");
              continue;
            }
            const uint64_t text = transfer.text_of(token);
            const auto version = version_of(text, layer, unit, token, cell);
            bool known = false;
            if (version && from != nullptr) {
              const auto slice =
                  std::find_if(from->sent.begin(), from->sent.end(), [&](const Slice& of) {
                    const Range layers = of.layers.value_or(Range{0, shape_.layers()});
                    return of.version == *version && of.tokens.begin <= token &&
                           token < of.tokens.end && layers.begin <= layer && layer < layers.end;
                  });
              known = slice != from->sent.end();
              if (known) used[from].insert(slice->send_index);
            }
            if (!known && version && side.hashed)
              known = was_sent(text, *version, layer, unit, token);
            if (!known)
              broken("bytes", side,
                     "COMPLETED with wrong bytes at group " + std::to_string(g) + " layer " +
                         std::to_string(layer) + " unit " + std::to_string(unit) + " token " +
                         std::to_string(token));
          }
        }
    }
  }
  // What comes from its own node may be older than the transfer.
  if (side.hashed) return;
  for (const auto& [sender, slices] : used) check_dropped(side, *sender, slices);
}

// What is told of a receiver are needs of its sides; of one that is ready, all of them but what its
// own node has.
void Workload::check_needs(const Side& side, const Reply& reply) {
  const Transfer& transfer = *side.transfer;
  if ((transfer.causes & kCauseHostile) != 0) return;
  for (const Reply::Receiver& told : reply.receivers) {
    const auto group = std::find_if(
        transfer.receivers.begin(), transfer.receivers.end(), [&](const ReceiverGroup& of) {
          return of.instance->name == told.instance && of.dp_group == told.dp_group;
        });
    if (group == transfer.receivers.end())
      broken("needs", side, "needs of a receiver that was never told of this transfer");
    ++needs_told_;
    for (uint32_t g = 0; g < shape_.groups; ++g) {
      Range most;
      bool exact = told.ready;
      for (const Side* receiver : group->sides) {
        if (!has_leg(side, *receiver)) continue;
        exact = exact && !receiver->hashed && !receiver->lost;
        for (const GroupNeed& need : receiver->needs)
          if (need.group == g) most = need.ranges.front();  // alike on all ranks
      }
      Range now;
      for (const GroupRanges& of : told.needs)
        if (of.group == g && !of.ranges.empty())
          now = {of.ranges.front().begin, of.ranges.back().end};
      if (now.begin < now.end && (now.begin < most.begin || most.end < now.end))
        broken("needs", side, "more is told to be needed than any receiver asked for");
      const bool moves = std::any_of(group->sides.begin(), group->sides.end(), [&](const Side* r) {
        return has_leg(side, *r) && !leg_is_empty(side, *r);
      });
      if (exact && moves && !(now == most))
        broken("needs", side, "a receiver is ready, and not all that it needs is told");
    }
  }
}

// Every page that a gather reads must still be the side's ...
void Workload::before_gather(const SimPlan& plan, uint64_t offset, uint64_t bytes) const {
  if (plan.side == 0) {
    before_reuse(plan, offset, bytes);
    return;
  }
  if (plan.layout->packed_side != 0) return;  // memory of its own, as long as the plan is there
  const Side& side = *side_by_uid(plan.side);
  if (plan.layout->quiet) broken("quiet", side, "a gather reads a layout that is quiet");
  if (side.lost) return;
  if (side.released()) broken("released", side, "a gather reads pages after SOURCE_RELEASED");
  each_piece(plan, offset, bytes, [&](uint64_t page, uint64_t, uint64_t) {
    const auto [group, block] = plan.layout->pool->block_of(page);
    if (plan.layout->pool->owner_of(group, block) != side.uid)
      broken("released", side, "a gather reads a block that is not the transfer's");
  });
}

// ... and so must every page that a scatter writes, which the caller must have said is ready.
void Workload::before_scatter(const SimPlan& plan, uint64_t offset, uint64_t bytes) const {
  if (plan.layout->packed_side != 0) return;
  const Side& side = *side_by_uid(plan.side);
  if (plan.layout->quiet) broken("quiet", side, "a scatter writes a layout that is quiet");
  if (side.lost) return;
  if (side.released()) broken("released", side, "a scatter writes pages after DEST_RELEASED");
  if (side.in(TransferState::kCompleted))
    broken("released", side, "a scatter writes after COMPLETED");
  if (!side.destination_ready)
    broken("ready", side, "a scatter writes before the destination is ready");
  each_piece(plan, offset, bytes, [&](uint64_t page, uint64_t, uint64_t) {
    const auto [group, block] = plan.layout->pool->block_of(page);
    if (plan.layout->pool->owner_of(group, block) != side.uid)
      broken("outside", side, "a scatter writes a block that is not the transfer's");
    plan.layout->pool->readable_at(group, block) = 0;
  });
}

bool Workload::has_leg(const Side& sender, const Side& receiver) const {
  const Transfer& transfer = *sender.transfer;
  const ReceiverGroup& group = transfer.receivers[receiver.place];
  const auto legs = legs_between(transfer.sender->ranks, transfer.sender_group,
                                 group.instance->ranks, group.dp_group);
  return std::any_of(legs.begin(), legs.end(), [&](const Leg& leg) {
    return leg.sender_rank == sender.worker->rank && leg.receiver_rank == receiver.worker->rank;
  });
}

bool Workload::leg_is_empty(const Side& sender, const Side& receiver) const {
  const Transfer& transfer = *sender.transfer;
  const ReceiverGroup& group = transfer.receivers[receiver.place];
  for (const Leg& leg : legs_between(transfer.sender->ranks, transfer.sender_group,
                                     group.instance->ranks, group.dp_group))
    if (leg.sender_rank == sender.worker->rank && leg.receiver_rank == receiver.worker->rank)
      return leg.empty;
  return true;
}

// What both sides have said about one hand-off (with one receiver: with several, DELIVERED speaks
// of one of them only).
void Workload::check_agreement(const Transfer& transfer) const {
  if (transfer.receivers.size() != 1 || (transfer.causes & kCauseHostile) != 0) return;
  const auto known = [](const Side& side) { return !side.lost && side.terminal(); };
  for (const Side* receiver : transfer.receivers[0].sides) {
    bool all_delivered = true;
    for (const Side* sender : transfer.sides) {
      if (!has_leg(*sender, *receiver)) continue;
      all_delivered = all_delivered && known(*sender) && sender->in(TransferState::kDelivered);
    }
    // What a receiver has from its own node its senders know nothing of.
    if (receiver->hashed) continue;
    if (all_delivered && !receiver->lost && !receiver->in(TransferState::kCompleted))
      broken("agreement", *receiver, "all its senders are DELIVERED, but it is not COMPLETED");
  }
  for (const Side* sender : transfer.sides) {
    if (!known(*sender) || sender->revokes > 0) continue;
    bool all_completed = true;
    for (const Side* receiver : transfer.receivers[0].sides)
      if (has_leg(*sender, *receiver))
        all_completed =
            all_completed && known(*receiver) && receiver->in(TransferState::kCompleted);
    if (all_completed && sender->record->delivery == Delivery::kNo)
      broken("agreement", *sender, "all its receivers are COMPLETED, but it says delivery NO");
  }
}

void Workload::check_side_at_end(const Side& side) const {
  if (side.lost || side.refused || !side.called) return;
  if (!side.accepted) broken("replies", side, "was never accepted");
  if (!side.terminal()) broken("limits", side, "has not ended");
  if (!side.released()) broken("released", side, "was never released");
  if (side.transfer->causes != 0) return;
  const TransferState good =
      side.role == Role::kSender ? TransferState::kDelivered : TransferState::kCompleted;
  if (!side.in(good)) broken("liveness", side, "did not succeed: " + describe(*side.record));
}

void Workload::final_checks() const {
  for (const auto& side : sides_) check_side_at_end(*side);
  for (const auto& transfer : transfers_) check_agreement(*transfer);
}

void Workload::check_finished() const {
  if (!finished()) throw Violation("limits", "something has not ended:" + open_things());
}

}  // namespace kvferry::sim
