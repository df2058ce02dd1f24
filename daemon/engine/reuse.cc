#include "daemon/engine/reuse.h"

#include <algorithm>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {
namespace {

constexpr uint32_t kMostPins = 64;         // of a worker
constexpr uint32_t kMostWithdrawals = 64;  // of a worker, not yet answered
constexpr uint32_t kMostTries = 16;        // holders of a hash that are looked at
constexpr Duration kLongestPin = std::chrono::seconds(1);

std::string group_field(std::size_t i, const char* name) {
  return "groups[" + std::to_string(i) + "]." + name;
}

// Blocks before `end` that a prompt of `end` whole blocks still needs of a group with this window.
uint64_t needed_before(uint64_t end, const ReuseGroup& group) {
  if (group.window == 0) return end;
  const uint64_t tokens = end * group.block_tokens;
  const uint64_t first = tokens + 1 > group.window ? tokens + 1 - group.window : 0;
  return end - std::min(end, first / group.block_tokens);
}

}  // namespace

uint64_t ReuseIndex::number(const std::shared_ptr<const LayoutHandle>& layout) {
  const auto known = numbers_.find(layout.get());
  if (known != numbers_.end()) return known->second;
  const uint64_t fresh = core_.next_number();
  numbers_.emplace(layout.get(), fresh);
  layouts_.emplace(fresh, Known{layout, false});
  return fresh;
}

BlockPlace ReuseIndex::place(const std::shared_ptr<const LayoutHandle>& layout, uint32_t group,
                             int32_t block) {
  return {number(layout), layout->reuse_groups.at(group).id_space, block};
}

// ---- entries ----------------------------------------------------------------------------------

// False: the index is full, and the worker has no older entry that could go.
bool ReuseIndex::publish(const std::shared_ptr<const LayoutHandle>& layout, const BlockPlace& place,
                         Entry entry) {
  if (const auto known = entries_.find(place); known != entries_.end()) {
    if (known->second.key == entry.key && known->second.group == entry.group) return true;
    unpublish(place);  // the newest word of its worker counts
  }
  auto& aged = by_age_[layout->worker];
  const bool crowded = aged.size() >= core_.config.max_reuse_entries_per_worker ||
                       entries_.size() >= core_.config.max_reuse_entries;
  if (crowded) {
    if (aged.empty()) {
      by_age_.erase(layout->worker);
      return false;
    }
    ++core_.stats.reuse_evicted;
    const BlockPlace oldest = aged.begin()->second;
    unpublish(oldest);
  }
  entry.order = core_.next_number();
  by_age_[layout->worker].emplace(entry.order, place);
  holders_[entry.key].insert(place);
  entries_.emplace(place, std::move(entry));
  return true;
}

bool ReuseIndex::unpublish(const BlockPlace& place) {
  const auto it = entries_.find(place);
  if (it == entries_.end()) return false;
  const auto holders = holders_.find(it->second.key);
  holders->second.erase(place);
  if (holders->second.empty()) holders_.erase(holders);
  const auto aged = by_age_.find(layouts_.at(place.layout).layout->worker);
  aged->second.erase(it->second.order);
  if (aged->second.empty()) by_age_.erase(aged);
  entries_.erase(it);
  return true;
}

void ReuseIndex::unpublish_all(uint64_t layout) {
  std::vector<BlockPlace> places;
  for (auto it = entries_.lower_bound(BlockPlace{layout, 0, INT32_MIN});
       it != entries_.end() && it->first.layout == layout; ++it)
    places.push_back(it->first);
  for (const BlockPlace& place : places) unpublish(place);
}

std::optional<ReuseHolder> ReuseIndex::find(const LayoutHandle& who, uint32_t group,
                                            const std::string& hash, uint64_t pin,
                                            const std::optional<BlockPlace>& own,
                                            const std::set<BlockPlace>& taken) const {
  const ReuseKey key{who.reuse_space, hash};
  if (own) {
    const auto entry = entries_.find(*own);
    if (entry != entries_.end() && entry->second.key == key && entry->second.group == group)
      return ReuseHolder{layouts_.at(own->layout).layout, group, *own};
  }
  if (const auto holders = holders_.find(key); holders != holders_.end()) {
    uint32_t tries = 0;
    for (const BlockPlace& place : holders->second) {
      if (++tries > kMostTries) break;
      if (taken.contains(place)) continue;
      const Entry& entry = entries_.at(place);
      const auto& layout = layouts_.at(place.layout).layout;
      if (layout->serves(entry.group, who, group)) return ReuseHolder{layout, entry.group, place};
    }
  }
  // A pinned block keeps its bytes when it is withdrawn meanwhile. One that somebody waits to write
  // is left alone: two receives could wait for each other's blocks.
  const auto pinned = pins_.find(pin);
  if (pinned == pins_.end() || pinned->second.worker != who.worker) return std::nullopt;
  const auto holders = pinned->second.holders.find(key);
  if (holders == pinned->second.holders.end()) return std::nullopt;
  for (const ReuseHolder& holder : holders->second) {
    if (taken.contains(holder.place) || writers_.contains(holder.place)) continue;
    if (holder.layout->serves(holder.group, who, group)) return holder;
  }
  return std::nullopt;
}

// ---- readers and writers ----------------------------------------------------------------------

void ReuseIndex::read_ended(const BlockPlace& place) {
  const auto it = readers_.find(place);
  KVFERRY_CHECK(it != readers_.end(), "a read ends once");
  if (--it->second > 0) return;
  readers_.erase(it);
  news_ = true;
}

void ReuseIndex::write(const BlockPlace& place) {
  unpublish(place);
  ++writers_[place];
}

void ReuseIndex::write_ended(const BlockPlace& place) {
  const auto it = writers_.find(place);
  KVFERRY_CHECK(it != writers_.end(), "a write ends once");
  if (--it->second == 0) writers_.erase(it);
}

// ---- CommitReuse ------------------------------------------------------------------------------

// What is wrong with the i-th group of a commit, and the field that says it.
const char* ReuseIndex::commit_problem(const Receive& receive, const CommitReuseOp& op,
                                       std::size_t i, std::string& field) {
  const CommitReuseOp::Group& group = op.groups[i];
  const auto& blocks = receive.asked->blocks;
  const auto list = std::find_if(blocks.begin(), blocks.end(),
                                 [&](const GroupBlocks& of) { return of.group == group.group; });
  field = group_field(i, "group");
  if (list == blocks.end()) return "the transfer has no blocks of this group";
  if (receive.layout->reuse_groups.at(group.group).block_tokens == 0)
    return "blocks of this group cannot be reused by their hash";
  for (std::size_t n = 0; n < i; ++n)
    if (op.groups[n].group == group.group) return "the group is named twice";
  field = group_field(i, "tokens");
  if (group.tokens > receive.asked->num_tokens) return "more tokens than the transfer's prompt";
  field = group_field(i, "hashes");
  if (group.hashes.size() > list->ids.size()) return "more hashes than the list has blocks";
  return nullptr;
}

void ReuseIndex::commit(Receive& receive, const CommitReuseOp& op) {
  Reply answer;
  answer.op = op.op;
  answer.slot = receive.slot;
  answer.state = receive.record.state;
  if (receive.committed != nullptr) {
    if (receive.committed->groups != op.groups) {
      core_.reply_error(op.op, Code::kAlreadyExists, "COMMITTED_OTHERWISE",
                        "the transfer was committed with other groups", "groups");
      return;
    }
    answer.existing = true;
    core_.emit(std::move(answer));
    return;
  }
  if (receive.record.state != TransferState::kCompleted) {
    core_.reply_error(op.op, Code::kFailedPrecondition, "NOT_COMPLETED",
                      "only a COMPLETED receive can be committed", "client_handle");
    return;
  }
  if (core_.refused(op.op, receive.layout.get())) return;
  if (receive.layout->reuse_space.is_zero()) {
    core_.reply_error(op.op, Code::kFailedPrecondition, "NO_REUSE",
                      "the layout was registered without a hash scheme", "client_handle");
    return;
  }
  std::vector<std::pair<BlockPlace, Entry>> fresh;
  for (std::size_t i = 0; i < op.groups.size(); ++i) {
    std::string field;
    if (const char* problem = commit_problem(receive, op, i, field)) {
      core_.reply_error(op.op, Code::kInvalidArgument, "BAD_COMMIT", problem, std::move(field));
      return;
    }
    const CommitReuseOp::Group& group = op.groups[i];
    const uint64_t block_tokens = receive.layout->reuse_groups[group.group].block_tokens;
    const auto& blocks = receive.asked->blocks;
    const GroupBlocks& list = *std::find_if(
        blocks.begin(), blocks.end(), [&](const auto& of) { return of.group == group.group; });
    for (std::size_t j = 0; j < group.hashes.size(); ++j) {
      // Only whole blocks: what lies past `tokens` is not the prompt's.
      if (list.first_block + j + 1 > group.tokens / block_tokens) break;
      if (list.ids[j] < 0) continue;
      const BlockPlace at = place(receive.layout, group.group, list.ids[j]);
      if (writers_.contains(at)) {
        core_.reply_error(op.op, Code::kFailedPrecondition, "BLOCK_IN_USE",
                          "another receive writes block " + std::to_string(list.ids[j]),
                          group_field(i, "hashes"));
        return;
      }
      fresh.emplace_back(at, Entry{{receive.layout->reuse_space, group.hashes[j]}, group.group, 0});
    }
  }
  receive.committed = std::make_shared<const CommitReuseOp>(op);
  for (auto& [at, entry] : fresh) {
    if (publish(receive.layout, at, std::move(entry))) continue;
    receive.committed.reset();
    core_.reply_error(op.op, Code::kResourceExhausted, "REUSE_INDEX_FULL",
                      "the node's reuse index is full");
    return;
  }
  ++core_.stats.reuse_commits;
  core_.emit(std::move(answer));
}

// ---- LookupReuse ------------------------------------------------------------------------------

bool ReuseIndex::bad_groups(const OpRef& op, const LayoutHandle& layout,
                            const std::vector<PromptHashes>& groups) {
  if (groups.empty()) return false;
  if (layout.reuse_space.is_zero()) {
    core_.reply_error(op, Code::kFailedPrecondition, "NO_REUSE",
                      "the layout was registered without a hash scheme", "prompt_hashes");
    return true;
  }
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const auto field = "prompt_hashes[" + std::to_string(i) + "].group";
    const char* problem = nullptr;
    if (groups[i].group >= layout.reuse_groups.size())
      problem = "the layout has no such group";
    else if (layout.reuse_groups[groups[i].group].block_tokens == 0)
      problem = "blocks of this group cannot be reused by their hash";
    for (std::size_t n = 0; n < i; ++n)
      if (groups[n].group == groups[i].group) problem = "the group is named twice";
    if (problem == nullptr) continue;
    core_.reply_error(op, Code::kInvalidArgument, "BAD_PROMPT_HASHES", problem, field);
    return true;
  }
  return false;
}

void ReuseIndex::lookup(const LookupReuseOp& op) {
  if (core_.refused(op.op, op.layout.get())) return;
  if (bad_groups(op.op, *op.layout, op.hashes)) return;
  uint32_t& pins = pins_of_[op.op.worker];
  if (op.pin > Duration{} && pins >= kMostPins) {
    core_.reply_error(op.op, Code::kResourceExhausted, "TOO_MANY_PINS",
                      "64 pins of a worker at a time", "pin_ms");
    return;
  }
  Pin pin{op.op.worker, {}};
  Reply answer;
  answer.op = op.op;
  for (const PromptHashes& of : op.hashes) {
    const ReuseGroup& group = op.layout->reuse_groups[of.group];
    std::vector<std::optional<ReuseHolder>> holders;
    uint64_t run = 0;      // blocks in a row that are here
    uint64_t matched = 0;  // the longest prefix, in blocks, of which all that it needs is here
    for (const std::string& hash : of.hashes) {
      holders.push_back(find(*op.layout, of.group, hash, 0, std::nullopt, {}));
      run = holders.back() ? run + 1 : 0;
      if (run == 0 && group.window == 0) break;
      if (run > 0 && run >= needed_before(holders.size(), group)) matched = holders.size();
    }
    answer.matches.push_back({of.group, matched * group.block_tokens});
    core_.stats.reuse_lookup_hits += matched > 0;
    for (uint64_t j = matched - needed_before(matched, group); j < matched; ++j)
      pin.holders[{op.layout->reuse_space, of.hashes[j]}].push_back(*holders[j]);
  }
  ++core_.stats.reuse_lookups;
  if (op.pin > Duration{} && !pin.holders.empty()) {
    answer.pin = core_.next_number();
    for (const auto& [key, holders] : pin.holders)
      for (const ReuseHolder& holder : holders) read(holder.place);
    pins_.emplace(answer.pin, std::move(pin));
    ++pins;
    core_.timers.set({TimerKind::kReusePin, answer.pin, 0},
                     core_.now + std::min<Duration>(op.pin, kLongestPin));
  }
  if (pins == 0) pins_of_.erase(op.op.worker);
  core_.emit(std::move(answer));
}

void ReuseIndex::drop_pin(WorkerId worker, uint64_t pin) {
  const auto it = pins_.find(pin);
  if (it == pins_.end() || it->second.worker != worker) return;
  for (const auto& [key, holders] : it->second.holders)
    for (const ReuseHolder& holder : holders) read_ended(holder.place);
  if (--pins_of_.at(worker) == 0) pins_of_.erase(worker);
  core_.timers.cancel({TimerKind::kReusePin, pin, 0});
  pins_.erase(it);
}

void ReuseIndex::timer(TimerKey key) {
  const auto it = pins_.find(key.a);
  if (it != pins_.end()) drop_pin(WorkerId{it->second.worker}, key.a);
}

// ---- WithdrawReuse and ends -------------------------------------------------------------------

void ReuseIndex::withdraw(const WithdrawReuseOp& op) {
  if (op.layout->reuse_space.is_zero()) {
    core_.reply_error(op.op, Code::kFailedPrecondition, "NO_REUSE",
                      "the layout was registered without a hash scheme", "layout");
    return;
  }
  for (std::size_t i = 0; i < op.groups.size(); ++i) {
    if (op.groups[i].group < op.layout->reuse_groups.size()) continue;
    core_.reply_error(op.op, Code::kInvalidArgument, "UNKNOWN_GROUP",
                      "the layout has no such group", group_field(i, "group"));
    return;
  }
  uint32_t& waiting = withdrawals_of_[op.op.worker];
  if (waiting >= kMostWithdrawals) {
    core_.reply_error(op.op, Code::kResourceExhausted, "TOO_MANY_WITHDRAWALS",
                      "64 withdrawals of a worker at a time");
    return;
  }
  Withdrawal withdrawal{op.op, {}, 0};
  const auto known = numbers_.find(op.layout.get());
  if (known != numbers_.end()) {
    for (const GroupBlocks& group : op.groups) {
      for (const int32_t id : group.ids) {
        if (id < 0) continue;
        const BlockPlace at{known->second, op.layout->reuse_groups[group.group].id_space, id};
        if (unpublish(at)) ++withdrawal.count;
        if (is_read(at)) withdrawal.places.insert(at);
      }
    }
  }
  core_.stats.reuse_withdrawn += withdrawal.count;
  ++waiting;
  withdrawals_.push_back(std::move(withdrawal));
}

void ReuseIndex::flush() {
  std::erase_if(withdrawals_, [this](Withdrawal& withdrawal) {
    std::erase_if(withdrawal.places, [this](const BlockPlace& place) { return !is_read(place); });
    if (!withdrawal.places.empty() && !flawed(Flaw::kWithdrawNow)) return false;
    Reply answer;
    answer.op = withdrawal.op;
    answer.withdrawn = withdrawal.count;
    core_.emit(std::move(answer));
    const auto waiting = withdrawals_of_.find(withdrawal.op.worker);
    if (--waiting->second == 0) withdrawals_of_.erase(waiting);
    return true;
  });
}

void ReuseIndex::layout_gone(const LayoutHandle* layout) {
  const auto known = numbers_.find(layout);
  if (known == numbers_.end()) return;
  layouts_.at(known->second).leaving = true;
  unpublish_all(known->second);
  // A pin promises nothing of a layout that goes: its reads end here.
  for (auto& [id, pin] : pins_) {
    for (auto& [key, holders] : pin.holders) {
      std::erase_if(holders, [&](const ReuseHolder& holder) {
        if (holder.layout.get() != layout) return false;
        read_ended(holder.place);
        return true;
      });
    }
  }
}

bool ReuseIndex::reads(const LayoutHandle* layout) const {
  const auto known = numbers_.find(layout);
  if (known == numbers_.end()) return false;
  const auto first = readers_.lower_bound(BlockPlace{known->second, 0, INT32_MIN});
  return first != readers_.end() && first->first.layout == known->second;
}

// Only numbers of it are left, in reads that go on and in writes of receives that have ended.
void ReuseIndex::forget(const LayoutHandle* layout) {
  const auto known = numbers_.find(layout);
  if (known == numbers_.end()) return;
  layouts_.erase(known->second);
  numbers_.erase(known);
}

void ReuseIndex::worker_gone(WorkerId worker) {
  std::vector<uint64_t> pins;
  for (const auto& [id, pin] : pins_)
    if (pin.worker == worker) pins.push_back(id);
  for (const uint64_t pin : pins) drop_pin(worker, pin);
  std::vector<const LayoutHandle*> gone;
  for (const auto& [number, known] : layouts_)
    if (known.layout->worker == worker && !known.leaving) gone.push_back(known.layout.get());
  for (const LayoutHandle* layout : gone) {
    layout_gone(layout);
    forget(layout);
  }
  for (const Withdrawal& withdrawal : withdrawals_)
    if (withdrawal.op.worker == worker)
      core_.reply_error(withdrawal.op, Code::kFailedPrecondition, "NOT_ATTACHED",
                        "the worker is not attached");
  std::erase_if(withdrawals_,
                [&](const Withdrawal& withdrawal) { return withdrawal.op.worker == worker; });
  withdrawals_of_.erase(worker);
}

void ReuseIndex::check_invariants() const {
  std::size_t held = 0;
  for (const auto& [key, places] : holders_) {
    held += places.size();
    for (const BlockPlace& place : places)
      KVFERRY_CHECK(entries_.at(place).key == key, "a holder is found by what it holds");
  }
  std::size_t aged = 0;
  for (const auto& [worker, places] : by_age_) aged += places.size();
  KVFERRY_CHECK(held == entries_.size() && aged == held, "each entry is found once");
  KVFERRY_CHECK(entries_.size() <= core_.config.max_reuse_entries, "the index is bounded");
  for (const auto& [place, entry] : entries_) {
    KVFERRY_CHECK(layouts_.contains(place.layout) && !layouts_.at(place.layout).leaving,
                  "only blocks of registered layouts are found");
    KVFERRY_CHECK(!writers_.contains(place), "a block that is to be written is not found");
  }
}

}  // namespace kvferry::engine
