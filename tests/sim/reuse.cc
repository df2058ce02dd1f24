// Workload: prefix caches. Prompts that begin alike; receives whose pages are kept and published;
// look-ups with pins; pages that are taken back, or received into, while others may read them.
//
// All of it is drawn apart from the rest.
#include <algorithm>

#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;

uint64_t Transfer::text_of(uint64_t token) const {
  const Transfer* at = this;
  while (at->parent != nullptr && token < at->shared) at = at->parent;
  return at->uid;
}

void Workload::draw_prompt(Transfer& transfer) {
  const uint32_t habit = world_.scenario.habits.reuse;
  Rng own(world_.scenario.seed ^ mix(transfer.uid ^ 0x4EA5));
  if (transfers_.size() < 2 || !own.chance(habit)) return;
  // A system prompt that many begin with, or any other.
  const uint64_t chosen = own.chance(600) ? 0 : own.below(transfers_.size() - 1);
  const Transfer& parent = *transfers_[chosen];
  if ((parent.causes & kCauseHostile) != 0) return;  // its text is whatever the enemy says
  uint64_t shared = std::min(parent.tokens, transfer.tokens);
  if (own.chance(400)) shared = own.below(shared + 1);
  transfer.parent = &parent;
  transfer.shared = round_down(shared, kTokensPerBlock);
}

std::vector<PromptHashes> Workload::hashes_of(const Side& side) const {
  std::vector<std::string> names;
  for (uint64_t end = kTokensPerBlock; end <= side.transfer->tokens; end += kTokensPerBlock)
    names.push_back("text" + std::to_string(side.transfer->text_of(end - 1)) + "/" +
                    std::to_string(end));
  std::vector<PromptHashes> hashes;
  for (uint32_t g = 0; g < shape_.groups; ++g) hashes.push_back({g, names});
  return hashes;
}

void Workload::plan_lookup(Side& side) {
  const uint32_t habit = world_.scenario.habits.reuse;
  Rng own(world_.scenario.seed ^ mix(side.uid ^ 0x4EA6));
  side.hashed = own.chance(habit);
  if (!own.chance(habit / 2)) return;
  const Duration pin = own.chance(300) ? Duration{} : own.micros(1000, 50000);
  later(side, own.micros(0, 60000), [this, pin](Side& s) {
    if (!can_call(s) || s.called || s.declines || s.terminal()) return;
    world_.nodes[s.worker->node]->post(
        LookupReuseOp{op(s, PendingOp::Kind::kLookup), s.worker->layout, hashes_of(s), pin});
  });
}

// Some of the blocks that a receive will write are ones that its worker has published: calling it
// is enough to take them back. Those that hold already what comes are liked most.
void Workload::take_published(Side& side) {
  const Habits& habits = world_.scenario.habits;
  Rng own(world_.scenario.seed ^ mix(side.uid ^ 0x4EA7));
  if (!own.chance(habits.reuse / 2)) return;
  Worker& worker = *side.worker;
  Pool& pool = *worker.layout->pool;
  const auto text_at = [](const Transfer& of, uint64_t position) {
    return of.text_of((position + 1) * kTokensPerBlock - 1);
  };
  for (const GroupNeed& need : side.needs) {
    for (uint64_t position = need.begin / kTokensPerBlock;
         position < side.blocks[need.group].size(); ++position) {
      if (!own.chance(400)) continue;
      int32_t* taken = nullptr;
      for (auto& [uid, kept] : worker.cache) {
        if (!kept.committed || kept.withdrawing) continue;
        auto& blocks = kept.blocks[need.group];
        const Transfer& of = *side_by_uid(uid)->transfer;
        for (uint64_t p = 0; p < blocks.size(); ++p) {
          if (blocks[p] < 0) continue;
          const bool alike = p == position && text_at(of, p) == text_at(*side.transfer, position);
          if (taken == nullptr || alike) taken = &blocks[p];
        }
      }
      if (taken == nullptr) return;
      int32_t& mine = side.blocks[need.group][position];
      const auto old = static_cast<uint32_t>(mine);
      pool.owner_of(need.group, old) = 0;
      pool.fill_block(need.group, old, mix(side.uid) ^ 0xDEAD);
      worker.free_blocks[need.group].insert(old);
      mine = std::exchange(*taken, -1);
      pool.owner_of(need.group, static_cast<uint32_t>(mine)) = side.uid;
      side.took = true;
      // It waits for who reads them, and these may wait for a condition.
      if (habits.never_ready != 0) blame(*side.transfer, kCauseCondition);
    }
  }
}

// Whether the pages of a side that are its worker's again go to its cache. Pages that may be
// published have to, as they must be withdrawn before anything else is written there.
bool Workload::keep(Side& side) {
  if (side.role == Role::kSender || side.blocks.empty() || side.lost) return false;
  Rng own(world_.scenario.seed ^ mix(side.uid ^ 0x4EA8));
  const Transfer& transfer = *side.transfer;
  std::vector<CommitReuseOp::Group> groups;
  if (side.in(TransferState::kCompleted) && can_call(side) &&
      own.chance(world_.scenario.habits.reuse))
    for (const PromptHashes& hashes : hashes_of(side))
      for (const GroupNeed& need : side.needs)
        if (need.group == hashes.group && need.begin == 0)
          groups.push_back({need.group,
                            own.chance(700) ? transfer.tokens : own.below(transfer.tokens + 1),
                            hashes.hashes});
  if (groups.empty() && !side.took) return false;
  Worker& worker = *side.worker;
  Kept& kept = worker.cache[side.uid];
  kept.blocks = std::move(side.blocks);
  side.blocks.clear();
  if (groups.empty()) {
    withdraw_later(side, own.micros(0, 20000));
    return true;
  }
  for (const auto& group : groups)
    for (uint64_t p = 0; p < group.tokens / kTokensPerBlock; ++p)
      worker.layout->pool->readable_at(group.group,
                                       static_cast<uint32_t>(kept.blocks[group.group][p])) = 1;
  world_.nodes[worker.node]->post(
      CommitReuseOp{op(side, PendingOp::Kind::kCommit), side.handle, std::move(groups)});
  return true;
}

void Workload::committed(Side& side, bool ok) {
  Rng own(world_.scenario.seed ^ mix(side.uid ^ 0x4EA9));
  const auto kept = side.worker->cache.find(side.uid);
  require(kept != side.worker->cache.end(), "reuse", "a commit of pages that were not kept");
  kept->second.committed = ok;
  if (ok) ++commits_;
  // Often at once: the next ones ask for it just then.
  withdraw_later(side, own.micros(1000, own.chance(500) ? 50000 : 600000));
}

void Workload::withdraw_later(Side& side, Duration delay) {
  later(side, delay, [this](Side& s) { call_withdraw(s); });
}

void Workload::call_withdraw(Side& side) {
  Worker& worker = *side.worker;
  const Node& node = *world_.nodes[worker.node];
  const auto kept = worker.cache.find(side.uid);
  const bool there = worker.id == side.attached && node.alive() && node.life() == worker.life;
  if (kept == worker.cache.end() || !there || worker.quiet_due) return;
  kept->second.withdrawing = true;
  WithdrawReuseOp call{op(side, PendingOp::Kind::kWithdraw), worker.layout, {}};
  for (uint32_t g = 0; g < shape_.groups; ++g)
    call.groups.push_back({g, 0, kept->second.blocks[g]});
  world_.nodes[worker.node]->post(std::move(call));
}

// From this moment nobody may read them.
void Workload::withdrawn(Side& side) {
  Worker& worker = *side.worker;
  Pool& pool = *worker.layout->pool;
  const auto kept = worker.cache.find(side.uid);
  require(kept != worker.cache.end(), "reuse", "pages are withdrawn twice");
  for (uint32_t g = 0; g < shape_.groups; ++g)
    for (const int32_t id : kept->second.blocks[g]) {
      if (id < 0) continue;
      const auto block = static_cast<uint32_t>(id);
      pool.readable_at(g, block) = 0;
      pool.owner_of(g, block) = 0;
      pool.fill_block(g, block, mix(side.uid) ^ 0xDEAD);
      worker.free_blocks[g].insert(block);
    }
  worker.cache.erase(kept);
}

void Workload::before_reuse(const SimPlan& plan, uint64_t offset, uint64_t bytes) const {
  require(!plan.layout->quiet, "quiet", "a copy reads a layout that is quiet");
  if (!attached(plan.layout->worker)) return;
  Pool& pool = *plan.layout->pool;
  each_piece(plan, offset, bytes, [&](uint64_t page, uint64_t, uint64_t) {
    const auto [group, block] = pool.block_of(page);
    require(pool.readable_at(group, block) != 0, "reuse",
            "a copy reads a block that was taken back, written or never published");
  });
}

// Whether any sender of this text has sent this cell in this version.
bool Workload::was_sent(uint64_t text, uint32_t version, uint32_t layer, uint64_t unit,
                        uint64_t token) const {
  for (const auto& side : sides_) {
    if (side->role != Role::kSender || side->transfer->text_of(token) != text) continue;
    const Range units = side->transfer->sender->ranks.units_of(side->worker->rank);
    if (unit < units.begin || units.end <= unit) continue;
    for (const Slice& slice : side->sent) {
      const Range layers = slice.layers.value_or(Range{0, shape_.layers()});
      if (slice.version == version && slice.tokens.begin <= token && token < slice.tokens.end &&
          layers.begin <= layer && layer < layers.end)
        return true;
    }
  }
  return false;
}

}  // namespace kvferry::sim
