// Workload: which transfers there are, and the calls that their workers make.
#include <algorithm>
#include <tuple>

#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

// Long enough for anything that still moves at all.
constexpr Duration kLong = seconds(25);

Range blocks_around(Range tokens) {
  return {round_down(tokens.begin, kTokensPerBlock), round_up(tokens.end, kTokensPerBlock)};
}

}  // namespace

std::string label(const Side& side) {
  return "transfer " + side.transfer->id + (side.role == Role::kSender ? " sender" : " receiver") +
         " rank " + std::to_string(side.worker->rank) + " of " + side.worker->instance->name +
         " (node" + std::to_string(side.worker->node) + ", handle " + std::to_string(side.handle) +
         ")";
}

void Workload::plan() {
  make_instances();
  to_begin_ = world_.scenario.transfers;
  for (uint32_t i = 0; i < world_.scenario.transfers; ++i)
    world_.after(Duration(static_cast<int64_t>(
                     rng_.below(static_cast<uint64_t>(world_.scenario.window.count())))),
                 [this] { begin_transfer(40); });
}

// A happening that is given up when the side's worker or daemon is gone.
void Workload::later(Side& side, Duration delay, std::function<void(Side&)> what) {
  ++planned_;
  world_.after(delay, [this, &side, what = std::move(what)] {
    --planned_;
    if (!side.lost) what(side);
  });
}

void Workload::blame(Transfer& transfer, uint32_t cause) {
  transfer.causes |= cause;
}

bool Workload::choose_pair(Instance*& sender, Instance*& receiver) {
  sender = instances_[rng_.below(apart_)].get();
  receiver = instances_[rng_.below(apart_)].get();
  if (sender == receiver || !instance_stands(*sender) || !instance_stands(*receiver)) return false;
  for (const Worker* s : sender->workers)
    for (const Worker* r : receiver->workers)
      if (s->node == r->node) return false;
  return true;
}

// Often another pair, which has ranks on one node; drawn apart from the rest.
void Workload::choose_neighbours(Instance*& sender, Instance*& receiver) const {
  Rng own(world_.scenario.seed ^ mix(transfers_.size() ^ 0x10CD));
  if (!own.chance(world_.scenario.habits.local)) return;
  std::vector<std::pair<Instance*, Instance*>> pairs;
  for (const auto& a : instances_)
    for (const auto& b : instances_) {
      if (a == b || !instance_stands(*a) || !instance_stands(*b)) continue;
      const bool meet = std::any_of(a->workers.begin(), a->workers.end(), [&](const Worker* s) {
        return std::any_of(b->workers.begin(), b->workers.end(),
                           [s](const Worker* r) { return s->node == r->node; });
      });
      if (meet) pairs.emplace_back(a.get(), b.get());
    }
  if (!pairs.empty()) std::tie(sender, receiver) = pairs[own.below(pairs.size())];
}

void Workload::begin_transfer(uint32_t tries_left) {
  Instance* sender = nullptr;
  Instance* receiver = nullptr;
  if (!choose_pair(sender, receiver)) {
    if (tries_left == 0)
      --to_begin_;
    else
      world_.after(rng_.micros(1000, 20000),
                   [this, tries_left] { begin_transfer(tries_left - 1); });
    return;
  }
  --to_begin_;
  choose_neighbours(sender, receiver);
  auto owned = std::make_unique<Transfer>();
  Transfer& transfer = *owned;
  transfers_.push_back(std::move(owned));
  transfer.uid = transfers_.size();
  transfer.id = "t" + std::to_string(transfer.uid);
  transfer.secret.bytes[0] = static_cast<uint8_t>(transfer.uid);
  transfer.secret.bytes[15] = 0x5E;
  transfer.sender = sender;
  transfer.sender_incarnation = sender->incarnation;
  transfer.sender_group = static_cast<uint32_t>(rng_.below(sender->ranks.dp));
  transfer.tokens = rng_.between(1, world_.scenario.max_tokens);
  transfer.sender_tokens = transfer.tokens + (rng_.chance(200) ? rng_.below(9) : 0);
  transfer.lease = transfer.wait = transfer.deadline = kLong;
  if (rng_.chance(400)) transfer.aux = "aux of " + transfer.id;
  choose_habits(transfer, *receiver);
  draw_prompt(transfer);

  const std::vector<Slice> slices = make_slices(transfer);
  for (uint32_t i = 0; i < sender->ranks.tp; ++i) {
    Worker& worker = *sender->workers[transfer.sender_group * sender->ranks.tp + i];
    Side& side = make_side(transfer, Role::kSender, worker);
    transfer.sides.push_back(&side);
    if (!take_blocks(side, transfer.sender_tokens)) side.done_calling = side.refused = true;
    plan_slices(side, slices);
  }
  for (uint32_t place = 0; place < transfer.receivers.size(); ++place) {
    ReceiverGroup& group = transfer.receivers[place];
    const Ranks& ranks = group.instance->ranks;
    std::vector<uint64_t> cached;
    for (uint32_t g = 0; g < shape_.groups; ++g)
      cached.push_back(rng_.chance(300) ? rng_.below(transfer.tokens + 3) : 0);
    for (uint32_t j = 0; j < ranks.tp; ++j) {
      Side& side = make_side(transfer, Role::kReceiver,
                             *group.instance->workers[group.dp_group * ranks.tp + j]);
      group.sides.push_back(&side);
      side.place = place;
      if (!take_blocks(side, transfer.tokens)) side.done_calling = side.refused = true;
      for (uint32_t g = 0; g < shape_.groups; ++g)
        if (cached[g] < transfer.tokens) {
          const Range range = blocks_around({cached[g], transfer.tokens});
          side.needs.push_back({g, range.begin, transfer.tokens, {range}});
        }
    }
  }
  const bool room = std::none_of(sides_.begin(), sides_.end(), [&](const auto& side) {
    return side->transfer == &transfer && side->refused;
  });
  if (!room) {  // pages are scarce: this one does not take place
    for (auto& side : sides_)
      if (side->transfer == &transfer) {
        give_blocks(*side, false);
        side->done_calling = side->refused = true;
      }
    return;
  }
  for (Side* side : transfer.sides) plan_sender(*side);
  for (auto& group : transfer.receivers)
    for (Side* side : group.sides) plan_receiver(*side);
  plan_ends(transfer);
}

void Workload::choose_habits(Transfer& transfer, Instance& receiver) {
  const Habits& habits = world_.scenario.habits;
  const auto group_of = [&](Instance& instance) {
    return static_cast<uint32_t>(rng_.below(instance.ranks.dp));
  };
  transfer.receivers.push_back({&receiver, group_of(receiver), {}});
  const bool crowd = rng_.chance(habits.crowd);
  if (crowd || rng_.chance(habits.two_receivers)) {
    // Another dp group of the same instance, or another instance.
    const uint32_t first = transfer.receivers[0].dp_group;
    if (receiver.ranks.dp == 2) {
      transfer.receivers.push_back({&receiver, 1 - first, {}});
    } else {
      for (std::size_t i = 0; i < apart_; ++i) {
        auto& instance = instances_[i];
        if (instance.get() == &receiver || instance.get() == transfer.sender) continue;
        const bool apart =
            std::all_of(instance->workers.begin(), instance->workers.end(), [&](const Worker* w) {
              return std::none_of(transfer.sender->workers.begin(), transfer.sender->workers.end(),
                                  [w](const Worker* s) { return s->node == w->node; });
            });
        if (!apart || !instance_stands(*instance)) continue;
        transfer.receivers.push_back({instance.get(), group_of(*instance), {}});
        break;
      }
    }
    if (!crowd) transfer.max_receivers = static_cast<uint32_t>(transfer.receivers.size());
    if (crowd && transfer.receivers.size() > 1) transfer.causes |= kCauseCrowd;
  }
  transfer.unknown_group = rng_.chance(habits.unknown_group);
  transfer.skewed = rng_.chance(habits.skewed);
  if (transfer.skewed) transfer.causes |= kCauseSkewed;
  if (rng_.chance(habits.missing_sender) || rng_.chance(habits.missing_receiver))
    transfer.causes |= kCauseMissing;
  if (rng_.chance(habits.wrong_secret)) transfer.causes |= kCauseSecret;
  if (rng_.chance(habits.unfinished)) transfer.causes |= kCauseUnfinished;
  if (rng_.chance(habits.not_offered)) transfer.causes |= kCauseNotOffered;
  if (rng_.chance(habits.short_deadline)) {
    transfer.causes |= kCauseTime;
    transfer.lease = rng_.micros(1000, 400000);
    transfer.wait = rng_.micros(1000, 400000);
    transfer.deadline = rng_.micros(1000, 200000);
  }
  // What will not come by itself is not waited for so long.
  constexpr uint32_t kHopeless = kCauseMissing | kCauseSecret | kCauseUnfinished | kCauseCrowd;
  if ((transfer.causes & kHopeless) != 0)
    transfer.lease = transfer.wait = transfer.deadline = rng_.micros(300000, 2000000);
}

// The slices of the transfer's tokens, the same for every rank: by tokens, or by layers.
std::vector<Slice> Workload::make_slices(const Transfer& transfer) {
  const uint64_t end = round_up(transfer.sender_tokens, kTokensPerBlock);
  const uint64_t begin =
      (transfer.causes & kCauseNotOffered) != 0 ? std::min(end, kTokensPerBlock) : 0;
  const uint64_t count = rng_.between(1, 4);
  std::vector<Slice> slices;
  if (rng_.chance(300) && shape_.layers() > 1) {
    const uint64_t parts = std::min<uint64_t>(count, shape_.layers());
    for (uint64_t i = 0; i < parts; ++i)
      slices.push_back({{begin, end},
                        Range{i * shape_.layers() / parts, (i + 1) * shape_.layers() / parts},
                        false,
                        0,
                        {},
                        0,
                        false});
  } else {
    uint64_t at = begin;
    for (uint64_t i = 1; i <= count; ++i) {
      const uint64_t stop =
          i == count ? end : round_down(at + rng_.below(end - at + 1), kTokensPerBlock);
      // A slice that rounds to nothing may be sent all the same.
      if (stop > at || i == count || rng_.chance(200))
        slices.push_back({{at, std::max(at, stop)}, std::nullopt, false, 0, {}, 0, false});
      at = std::max(at, stop);
    }
  }
  slices.back().last = (transfer.causes & kCauseUnfinished) == 0;
  return slices;
}

Side& Workload::make_side(Transfer& transfer, Role role, Worker& worker) {
  auto side = std::make_unique<Side>();
  side->uid = sides_.size() + 1;
  side->transfer = &transfer;
  side->role = role;
  side->worker = &worker;
  side->attached = worker.id;
  side->handle = worker.next_handle++;
  side->word = static_cast<uint32_t>(worker.words.size());
  worker.words.push_back(0);
  worker.sides[side->handle] = side.get();
  sides_.push_back(std::move(side));
  return *sides_.back();
}

bool Workload::take_blocks(Side& side, uint64_t tokens) {
  const uint64_t count = ceil_div(tokens, kTokensPerBlock);
  Worker& worker = *side.worker;
  for (const auto& free : worker.free_blocks)
    if (free.size() < count) return false;
  side.blocks.assign(shape_.groups, {});
  for (uint32_t g = 0; g < shape_.groups; ++g)
    for (uint64_t i = 0; i < count; ++i) {
      auto& free = worker.free_blocks[g];
      auto at = free.lower_bound(static_cast<uint32_t>(rng_.below(worker.layout->pool->blocks)));
      if (at == free.end()) at = free.begin();
      side.blocks[g].push_back(static_cast<int32_t>(*at));
      worker.layout->pool->owner_of(g, *at) = side.uid;
      worker.layout->pool->fill_block(g, *at, side.uid);
      free.erase(at);
    }
  return true;
}

// The pages are the worker's again, and something else is written there at once.
void Workload::give_blocks(Side& side, bool poison) {
  if (side.blocks.empty() || side.lost) return;
  Pool& pool = *side.worker->layout->pool;
  for (uint32_t g = 0; g < side.blocks.size(); ++g)
    for (const int32_t id : side.blocks[g]) {
      const auto block = static_cast<uint32_t>(id);
      pool.owner_of(g, block) = 0;
      if (poison) pool.fill_block(g, block, mix(side.uid) ^ 0xDEAD);
      side.worker->free_blocks[g].insert(block);
    }
  side.blocks.clear();
}

void Workload::plan_slices(Side& side, const std::vector<Slice>& slices) {
  for (Slice slice : slices) {
    slice.version = side.next_version;
    if (rng_.chance(500)) {
      slice.ready.kind = ReadyCondition::Kind::kTimeline;
      slice.ready.word = side.word;
      slice.ready.value = side.next_value++;
    }
    side.to_send.push_back(std::move(slice));
  }
}

void Workload::plan_sender(Side& side) {
  const Habits& habits = world_.scenario.habits;
  if ((side.transfer->causes & kCauseMissing) != 0 && rng_.chance(500)) {
    side.done_calling = side.refused = true;  // this rank never sends
    side.to_send.clear();
    give_blocks(side, true);
    return;
  }
  side.packs = Rng(world_.scenario.seed ^ mix(side.transfer->uid ^ 0x9ACE)).chance(habits.packed);
  if (rng_.chance(habits.open_first))
    later(side, rng_.micros(0, 20000), [this](Side& s) { call_open(s); });
  plan_needs(side);
  later(side, rng_.micros(0, 60000), [this](Side& s) { call_next_send(s); });
}

void Workload::plan_receiver(Side& side) {
  const Habits& habits = world_.scenario.habits;
  Transfer& transfer = *side.transfer;
  if ((transfer.causes & kCauseMissing) != 0 && rng_.chance(500)) side.receives = false;
  if (rng_.chance(habits.claim)) {
    const Duration ttl = side.receives ? seconds(2) : rng_.micros(20000, 300000);
    later(side, rng_.micros(0, 30000), [this, ttl](Side& s) { call_claim(s, ttl); });
  }
  if (rng_.chance(habits.decline)) {
    blame(transfer, kCauseDecline);
    later(side, rng_.micros(0, 80000), [this](Side& s) {
      if (!s.called) call_decline(s);
    });
    if (rng_.chance(700)) side.receives = false;
  }
  plan_reservation(side);
  plan_lookup(side);
  if (!side.receives) {
    side.done_calling = true;
    return;
  }
  later(side, rng_.micros(0, 80000), [this](Side& s) { call_receive(s); });
}

void Workload::plan_ends(Transfer& transfer) {
  const Habits& habits = world_.scenario.habits;
  std::vector<Side*> all = transfer.sides;
  for (auto& group : transfer.receivers)
    all.insert(all.end(), group.sides.begin(), group.sides.end());
  if (rng_.chance(habits.cancel)) {
    const uint64_t count = rng_.between(1, 2);
    for (uint64_t i = 0; i < count; ++i)
      later(*all[rng_.below(all.size())], rng_.micros(0, 120000),
            [this](Side& s) { call_cancel(s); });
  }
  if (rng_.chance(habits.revoke)) {
    const uint64_t from = rng_.below(transfer.sender_tokens);
    for (Side* side : transfer.sides)
      if (rng_.chance(800))
        later(*side, rng_.micros(0, 100000), [this, from](Side& s) { call_revoke(s, from); });
  }
}

// ---- calls -------------------------------------------------------------------------------------

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
