// Workload: which transfers there are, and what their workers are going to do.
#include <algorithm>
#include <tuple>

#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;
using std::chrono::seconds;

namespace {

// Long enough for anything that still moves at all.
constexpr Duration kLong = seconds(25);

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
  if (world_.hostile) plan_enemy();
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

Transfer& Workload::new_transfer() {
  transfers_.push_back(std::make_unique<Transfer>());
  Transfer& transfer = *transfers_.back();
  transfer.uid = transfers_.size();
  transfer.id = "t" + std::to_string(transfer.uid);
  transfer.secret.bytes[0] = static_cast<uint8_t>(transfer.uid);
  transfer.secret.bytes[15] = 0x5E;
  return transfer;
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
  Transfer& transfer = new_transfer();
  transfer.sender = sender;
  transfer.sender_incarnation = sender->incarnation;
  transfer.sender_group = static_cast<uint32_t>(rng_.below(sender->ranks.dp));
  transfer.tokens = rng_.between(1, world_.scenario.max_tokens);
  transfer.sender_tokens = transfer.tokens + (rng_.chance(200) ? rng_.below(9) : 0);
  transfer.lease = transfer.wait = transfer.deadline = kLong;
  if (rng_.chance(400)) transfer.aux = "aux of " + transfer.id;
  choose_habits(transfer, *receiver);
  draw_prompt(transfer);

  make_sender_sides(transfer);
  for (uint32_t place = 0; place < transfer.receivers.size(); ++place)
    make_receiver_sides(transfer, place);
  plan_sides(transfer);
}

void Workload::make_sender_sides(Transfer& transfer) {
  const std::vector<Slice> slices = make_slices(transfer);
  const Instance& sender = *transfer.sender;
  for (uint32_t i = 0; i < sender.ranks.tp; ++i) {
    Worker& worker = *sender.workers[transfer.sender_group * sender.ranks.tp + i];
    Side& side = make_side(transfer, Role::kSender, worker);
    transfer.sides.push_back(&side);
    if (!take_blocks(side, transfer.sender_tokens)) side.done_calling = side.refused = true;
    plan_slices(side, slices);
  }
}

void Workload::make_receiver_sides(Transfer& transfer, uint32_t place) {
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

void Workload::plan_sides(Transfer& transfer) {
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

}  // namespace kvferry::sim
