// Workload: the calls that workers make.
#include <algorithm>

#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;
using std::chrono::milliseconds;

bool Workload::can_call(const Side& side) const {
  const Node& node = *world_.nodes[side.worker->node];
  return !side.lost && !side.refused && side.worker->id == side.attached && node.alive() &&
         node.life() == side.worker->life && !side.worker->quiet_due;
}

OpRef Workload::op(Side& side, PendingOp::Kind kind) {
  Worker& worker = *side.worker;
  const OpRef ref{worker.id, worker.next_op++};
  worker.ops[ref.op_id] = {kind, &side};
  ++side.open_calls;
  return ref;
}

TransferKey Workload::key_of(const Side& side) const {
  const Transfer& transfer = *side.transfer;
  TransferKey key{transfer.sender->name, transfer.sender_incarnation, transfer.id, transfer.secret};
  if (side.role == Role::kReceiver && (transfer.causes & kCauseSecret) != 0)
    key.secret.bytes[7] = 1;
  return key;
}

std::vector<GroupBlocks> Workload::blocks_of(const Side& side, Range tokens) const {
  const Range around = blocks_around(tokens);
  std::vector<GroupBlocks> out;
  for (uint32_t g = 0; g < side.blocks.size(); ++g) {
    GroupBlocks list{g, around.begin / kTokensPerBlock, {}};
    for (uint64_t t = around.begin; t < around.end; t += kTokensPerBlock)
      list.ids.push_back(side.blocks[g].at(t / kTokensPerBlock));
    out.push_back(std::move(list));
  }
  return out;
}

// Senders ask what their receivers need, drawn apart as well.
void Workload::plan_needs(Side& side) {
  Rng own(world_.scenario.seed ^ mix(side.uid ^ 0x4EED));
  if (!own.chance(200)) return;
  later(side, own.micros(0, 90000), [this](Side& s) {
    if (!can_call(s) || !s.accepted || s.closing) return;
    world_.nodes[s.worker->node]->post(ReceiverNeedsOp{op(s, PendingOp::Kind::kNeeds), s.handle});
  });
}

// The same call again, as a client does that has lost the answer.
void Workload::repeat(Side& side, Event event) {
  if (!rng_.chance(world_.scenario.habits.repeat_call)) return;
  later(side, rng_.micros(0, 20000), [this, event = std::move(event)](Side& s) mutable {
    if (!can_call(s) || s.closing) return;
    const OpRef ref = op(s, PendingOp::Kind::kRepeat);
    std::visit(
        [&](auto& e) {
          if constexpr (requires { e.op; }) e.op = ref;
        },
        event);
    world_.nodes[s.worker->node]->post(std::move(event));
  });
}

void Workload::call_open(Side& side) {
  if (!can_call(side) || side.called) return;
  side.called = side.opened = true;
  side.called_at = std::min(side.called_at, world_.now());
  const Transfer& transfer = *side.transfer;
  side.limit = world_.now() + transfer.lease + transfer.deadline;
  OpenSendOp call{op(side, PendingOp::Kind::kFirst),
                  side.handle,
                  key_of(side),
                  side.worker->layout,
                  transfer.lease,
                  transfer.deadline,
                  transfer.max_receivers};
  world_.nodes[side.worker->node]->post(call);
  repeat(side, call);
}

void Workload::fill(Side& side, const Slice& slice) {
  if (side.blocks.empty()) return;
  Pool& pool = *side.worker->layout->pool;
  for (uint32_t g = 0; g < shape_.groups; ++g) {
    const uint32_t first = g * shape_.layers_per_group;
    const Range layers = intersect({first, first + shape_.layers_per_group},
                                   slice.layers.value_or(Range{0, shape_.layers()}));
    for (uint64_t layer = layers.begin; layer < layers.end; ++layer)
      for (uint64_t token = slice.tokens.begin; token < slice.tokens.end; ++token)
        for (uint64_t unit = pool.units.begin; unit < pool.units.end; ++unit) {
          const auto block = static_cast<uint32_t>(side.blocks[g][token / kTokensPerBlock]);
          const auto layer32 = static_cast<uint32_t>(layer);
          make_cell(
              side.transfer->text_of(token), slice.version, layer32, unit, token,
              pool.bytes.data() + pool.cell_at(g, block, layer32, unit, token % kTokensPerBlock));
        }
  }
}

// The forward pass has written the slice: its condition holds now, or before long.
void Workload::make_ready(Side& side, Slice slice) {
  if (slice.ready.kind == ReadyCondition::Kind::kHostSynced) {
    fill(side, slice);
    return;
  }
  const Habits& habits = world_.scenario.habits;
  const Duration delay =
      rng_.chance(habits.late_condition) ? rng_.micros(5000, 100000) : rng_.micros(0, 3000);
  later(side, delay, [this, slice](Side& s) {
    const bool sent =
        slice.send_index < s.sent.size() && s.sent[slice.send_index].attempt == slice.attempt;
    if (sent && !s.sent[slice.send_index].dropped) fill(s, slice);
    uint64_t& word = s.worker->words.at(s.word);
    if (word + 1 == slice.ready.value) {
      word = slice.ready.value;
      tell_words(*s.worker);
    } else if (word < slice.ready.value) {
      make_ready(s, slice);
    }
  });
}

void Workload::tell_words(const Worker& worker) {
  const Node& node = *world_.nodes[worker.node];
  if (node.alive() && node.life() == worker.life) world_.nodes[worker.node]->words_changed();
}

void Workload::call_next_send(Side& side) {
  if (side.revoking) return;  // goes on when that is answered
  if (side.packed_call) {     // which may have to be made again
    later(side, rng_.micros(100, 1000), [this](Side& s) { call_next_send(s); });
    return;
  }
  if (!can_call(side) || side.to_send.empty() || side.terminal() || side.closing ||
      side.released()) {
    side.done_calling = true;
    settle(side);
    return;
  }
  Slice slice = std::move(side.to_send.front());
  side.to_send.pop_front();
  Transfer& transfer = *side.transfer;
  const bool first = !side.called;
  side.called = true;
  side.called_at = std::min(side.called_at, world_.now());
  slice.send_index = static_cast<uint32_t>(side.sent.size());
  slice.after_revokes = side.revokes;
  slice.attempt = ++side.attempts;
  make_ready(side, slice);
  SendOp call;
  call.op = op(side, first ? PendingOp::Kind::kFirst : PendingOp::Kind::kMore);
  call.client_handle = side.handle;
  call.key = key_of(side);
  call.layout = side.worker->layout;
  call.send_index = slice.send_index;
  call.num_tokens = transfer.sender_tokens;
  call.done = DoneWord{static_cast<uint32_t>(side.handle), side.uid};
  if (!slice.tokens.empty())
    for (uint32_t g = 0; g < shape_.groups; ++g) call.offer.push_back({g, {slice.tokens}});
  call.blocks = blocks_of(side, slice.tokens);
  call.layers = slice.layers;
  call.last = slice.last;
  if (slice.last) call.aux = transfer.aux;
  call.ready = slice.ready;
  call.lease = transfer.lease;
  call.deadline = transfer.deadline;
  call.max_receivers = transfer.max_receivers;
  if (first) side.limit = world_.now() + transfer.lease + transfer.deadline;
  side.sent.push_back(slice);
  Rng own(world_.scenario.seed ^ mix(side.uid ^ 0x9ACE) ^ mix(slice.send_index));
  if (side.packs && own.chance(850)) {
    call.packed_bytes = packed_bytes_of(shape_, *side.worker->layout->pool, call);
    side.packed_call = call;
  }
  world_.nodes[side.worker->node]->post(call);
  if (!call.packed_bytes) repeat(side, call);
  if (side.to_send.empty())
    side.done_calling = true;
  else
    later(side, rng_.micros(0, 8000), [this](Side& s) { call_next_send(s); });
}

// A Send was refused for want of room for its copy: it comes again without one. While a Revoke is
// under way it waits: what that drops comes before it, and it may be the last.
bool Workload::send_without_copy(Side& side, PendingOp::Kind kind, const Reply& reply) {
  if (!side.packed_call || side.packed_call->op.op_id != reply.op.op_id) return false;
  const std::optional<SendOp> call = std::exchange(side.packed_call, std::nullopt);
  if (reply.error.reason != "PACKED_MEMORY_FULL") return false;
  require(reply.error.code == Code::kResourceExhausted && reply.error.field == "packed_copy",
          "replies", "PACKED_MEMORY_FULL with another code or field");
  ++packed_refused_;
  if (!can_call(side)) return false;
  if (side.revoking) {
    side.take_back = true;
    return true;
  }
  SendOp again = *call;
  again.packed_bytes.reset();
  again.op = op(side, kind);
  world_.nodes[side.worker->node]->post(std::move(again));
  return true;
}

void Workload::call_receive(Side& side) {
  side.done_calling = true;
  if (!can_call(side) || side.called || side.declines) {
    settle(side);
    return;
  }
  const Habits& habits = world_.scenario.habits;
  Transfer& transfer = *side.transfer;
  side.called = true;
  side.called_at = std::min(side.called_at, world_.now());
  take_published(side);
  ReceiveOp call;
  call.op = op(side, PendingOp::Kind::kFirst);
  call.client_handle = side.handle;
  call.key = key_of(side);
  call.ticket = "ticket";
  if (!transfer.unknown_group) call.sender_dp_group = transfer.sender_group;
  call.layout = side.worker->layout;
  call.needs = side.needs;
  call.blocks = blocks_of(side, {0, transfer.tokens});
  call.num_tokens = transfer.tokens;
  if (side.hashed) call.hashes = hashes_of(side);
  call.reuse_pin = side.pin;
  call.done = DoneWord{static_cast<uint32_t>(side.handle), side.uid};
  call.wait = transfer.wait;
  call.deadline = transfer.deadline;
  if (rng_.chance(habits.impatient)) {
    call.wait_for_arena = false;
    blame(transfer, kCauseExhausted);
  }
  if (rng_.chance(300)) {
    side.destination_ready = false;
    call.ready = {ReadyCondition::Kind::kTimeline, side.word, 1};
    const bool never = rng_.chance(habits.never_ready);
    if (never) {
      blame(transfer, kCauseCondition);
    } else {
      const Duration delay =
          rng_.chance(habits.late_condition) ? rng_.micros(5000, 150000) : rng_.micros(0, 5000);
      later(side, delay, [this](Side& s) {
        s.destination_ready = true;
        s.worker->words.at(s.word) = 1;
        tell_words(*s.worker);
      });
    }
  }
  side.limit = world_.now() + transfer.wait + transfer.deadline;
  world_.nodes[side.worker->node]->post(call);
  repeat(side, call);
}

void Workload::call_claim(Side& side, Duration ttl) {
  if (!can_call(side) || side.called || side.declines) return;
  side.claimed = true;
  const ClaimOp call{op(side, PendingOp::Kind::kClaim),
                     side.handle,
                     key_of(side),
                     "ticket",
                     side.worker->layout,
                     ttl};
  world_.nodes[side.worker->node]->post(call);
  // Again, also after what ends it. Drawn apart, as reservations are.
  Rng own(world_.scenario.seed ^ mix(side.uid ^ 0xC1A1));
  if (!own.chance(400)) return;
  later(side, own.micros(0, 100000), [this, call](Side& s) {
    if (!can_call(s)) return;
    ClaimOp again = call;
    again.op = op(s, PendingOp::Kind::kClaimAgain);
    world_.nodes[s.worker->node]->post(std::move(again));
  });
}

// Reservations are drawn apart, so that everything else is as it would be without them.
void Workload::plan_reservation(Side& side) {
  Rng own(world_.scenario.seed ^ mix(side.uid ^ 0x4E5E));
  if (!own.chance(world_.scenario.habits.reserve)) return;
  const uint64_t frames = own.chance(300) ? 0 : own.between(1, 4);
  const bool may_wait = own.chance(700);
  const Duration lease = own.chance(300) ? own.micros(1000, 60000) : Duration(milliseconds(500));
  later(side, own.micros(0, 60000), [this, frames, may_wait, lease](Side& s) {
    if (!can_call(s) || s.called || s.declines || s.terminal()) return;
    ReserveOp call;
    call.op = op(s, PendingOp::Kind::kReserve);
    call.key = key_of(s);
    call.layout = s.worker->layout;
    call.bytes = frames * world_.scenario.chunk_bytes;
    call.may_wait = may_wait;
    call.lease = lease;
    world_.nodes[s.worker->node]->post(call);
  });
}

void Workload::call_decline(Side& side) {
  if (!can_call(side)) return;
  side.declines = true;
  world_.nodes[side.worker->node]->post(
      DeclineOp{op(side, PendingOp::Kind::kDecline), key_of(side), "ticket", side.worker->layout});
}

void Workload::call_cancel(Side& side) {
  if (!can_call(side) || !side.called || side.closing) return;
  blame(*side.transfer, kCauseCancel);
  if (!side.terminal()) side.cancelled = true;
  world_.nodes[side.worker->node]->post(CancelOp{op(side, PendingOp::Kind::kCancel), side.handle});
}

void Workload::call_revoke(Side& side, uint64_t from_token) {
  if (!can_call(side) || !side.called || side.terminal() || side.closing || side.revoking ||
      side.released())
    return;
  // Its first Send may be refused for want of room for a copy: then there is nothing to revoke yet.
  if (side.packed_call && !side.accepted) return;
  side.revoking = side.transfer->revoked = true;
  ++side.revokes;
  world_.nodes[side.worker->node]->post(
      RevokeOp{op(side, PendingOp::Kind::kRevoke), side.handle, from_token});
}

void Workload::call_close(Side& side) {
  if (!can_call(side) || side.closing) return;
  side.closing = true;
  world_.nodes[side.worker->node]->post(CloseOp{op(side, PendingOp::Kind::kClose), side.handle});
}

// Dropped slices are computed anew and sent as new slices, before what was not sent yet.
void Workload::revoked(Side& side, const std::vector<uint32_t>& dropped) {
  side.revoking = false;
  uint64_t value = 0;  // the highest that a condition has waited for
  for (const Slice& slice : side.sent) value = std::max(value, slice.ready.value);
  if (std::exchange(side.take_back, false)) {
    side.to_send.push_front(side.sent.back());
    side.sent.pop_back();
  }
  std::vector<Slice> again;
  for (const uint32_t index : dropped) {
    require(index < side.sent.size() && !side.sent[index].dropped, "revoke",
            "Revoke names a slice that was not sent, or dropped before");
    side.sent[index].dropped = true;
    side.sent[index].dropped_by = side.revokes;
    again.push_back(side.sent[index]);
  }
  if (!side.blocks.empty() && !again.empty()) {
    ++side.next_version;
    // Whoever still reads these pages reads nonsense from now on.
    for (const Slice& slice : again) {
      Slice garbage = slice;
      garbage.version = 0xEE;
      fill(side, garbage);
    }
  }
  bool had_last = false;
  for (Slice& slice : again) {
    had_last = had_last || slice.last;
    slice.last = slice.dropped = false;
    slice.dropped_by = 0;
    slice.version = side.next_version;
    slice.ready = {};
    if (rng_.chance(500)) slice.ready = {ReadyCondition::Kind::kTimeline, side.word, 0};
  }
  side.to_send.insert(side.to_send.begin(), again.begin(), again.end());
  if (had_last && !side.to_send.empty()) side.to_send.back().last = true;
  // Conditions count up in the order of sending.
  for (Slice& slice : side.to_send)
    if (slice.ready.kind == ReadyCondition::Kind::kTimeline) slice.ready.value = 0;
  for (Slice& slice : side.to_send)
    if (slice.ready.kind == ReadyCondition::Kind::kTimeline) slice.ready.value = ++value;
  side.done_calling = side.to_send.empty();
  if (!side.to_send.empty())
    later(side, rng_.micros(0, 8000), [this](Side& s) { call_next_send(s); });
}

// Closes what has come to its end.
void Workload::settle(Side& side) {
  if (side.closing || side.lost || side.refused || side.open_calls != 0) return;
  const bool over = side.terminal() && side.released();
  if (!over || side.revoking) return;
  side.done_calling = true;
  later(side, rng_.micros(0, 20000), [this](Side& s) {
    if (s.open_calls == 0) call_close(s);
  });
}

}  // namespace kvferry::sim
