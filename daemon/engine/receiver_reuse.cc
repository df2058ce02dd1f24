// Blocks that the node has already: which of a receive's needs they cover, and their copies, from
// page to page, in chunks of which only a few are under way in all.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {
namespace {

const GroupBlocks* blocks_of(const ReceiveOp& op, uint32_t group) {
  for (const GroupBlocks& of : op.blocks)
    if (of.group == group) return &of;
  return nullptr;
}

int32_t id_at(const GroupBlocks& blocks, uint64_t entry) {
  const bool listed = entry >= blocks.first_block && entry - blocks.first_block < blocks.ids.size();
  return listed ? blocks.ids[entry - blocks.first_block] : mapping::kHole;
}

void add_range(std::vector<Range>& ranges, const Range& range) {
  if (range.empty()) return;
  if (!ranges.empty() && ranges.back().end == range.begin)
    ranges.back().end = range.end;
  else
    ranges.push_back(range);
}

}  // namespace

// Enters what the receive writes and finds what it need not fetch, before its PULLs go out.
void Receiver::claim_places(Receive& receive) {
  const ReceiveOp& op = *receive.asked;
  if (receive.layout->reuse_space.is_zero()) return;  // nobody finds its blocks
  std::set<BlockPlace> taken;
  for (const GroupNeed& need : op.needs) {
    const GroupBlocks* blocks = blocks_of(op, need.group);
    const uint64_t tokens = receive.layout->reuse_groups.at(need.group).block_tokens;
    if (blocks == nullptr) continue;
    for (const Range& range : need.ranges) {
      // Blocks without hashes may share an id space with some that have: all of theirs are taken.
      const uint64_t first = tokens == 0 ? blocks->first_block : range.begin / tokens;
      const uint64_t end =
          tokens == 0 ? blocks->first_block + blocks->ids.size() : ceil_div(range.end, tokens);
      for (uint64_t entry = first; entry < end; ++entry)
        if (const int32_t id = id_at(*blocks, entry); id >= 0)
          taken.insert(core_.reuse.place(receive.layout, need.group, id));
    }
  }
  std::set<BlockPlace> in_place;
  if (!op.hashes.empty()) {
    auto rest = std::make_shared<ReceiveOp>(op);
    for (const PromptHashes& hashes : op.hashes) match(receive, hashes, taken, in_place, *rest);
    std::erase_if(rest->needs, [](const GroupNeed& need) { return need.ranges.empty(); });
    receive.op = std::move(rest);
  }
  core_.reuse.drop_pin(receive.worker, op.reuse_pin);
  for (const BlockPlace& place : taken) {
    if (in_place.contains(place)) continue;
    core_.reuse.write(place);
    receive.writes.push_back(place);
    if (core_.reuse.is_read(place) && !flawed(Flaw::kWriteUnread))
      receive.read_by_others.insert(place);
  }
  if (!receive.read_by_others.empty()) blocked_.insert(receive.id);
  for (auto& [id, copy] : receive.copies) {
    copy.compile = CompileId{core_.next_number()};
    copy_compiles_[copy.compile] = {receive.id, id};
    core_.emit(CompileCopy{
        copy.compile, copy.source, {copy.source_blocks}, receive.layout, op.blocks, {copy.need}});
  }
}

// One group: block by block from the first that is needed, as long as the node has them.
void Receiver::match(Receive& receive, const PromptHashes& hashes,
                     const std::set<BlockPlace>& taken, std::set<BlockPlace>& in_place,
                     ReceiveOp& rest) {
  const auto need = std::find_if(rest.needs.begin(), rest.needs.end(),
                                 [&](const GroupNeed& of) { return of.group == hashes.group; });
  const GroupBlocks* blocks = blocks_of(rest, hashes.group);
  if (need == rest.needs.end() || need->ranges.empty() || blocks == nullptr) return;
  const uint64_t tokens = receive.layout->reuse_groups.at(hashes.group).block_tokens;
  std::map<std::pair<uint64_t, uint32_t>, uint64_t> by_source;  // layout, group -> copy
  uint64_t entry = need->ranges.front().begin / tokens;
  // A block that the prompt does not fill has no hash.
  for (; entry < hashes.hashes.size() && (entry + 1) * tokens <= need->end; ++entry) {
    const int32_t id = id_at(*blocks, entry);
    if (id < 0) continue;  // nothing is needed there
    const BlockPlace own = core_.reuse.place(receive.layout, hashes.group, id);
    const auto holder = core_.reuse.find(*receive.layout, hashes.group, hashes.hashes[entry],
                                         rest.reuse_pin, own, taken);
    if (!holder) break;
    ++core_.stats.reuse_blocks;
    if (holder->place == own) {
      in_place.insert(own);
      continue;
    }
    core_.reuse.read(holder->place);
    auto [source, fresh] = by_source.try_emplace({holder->place.layout, holder->group}, 0);
    if (fresh) {
      source->second = core_.next_number();
      ReuseCopy& copy = receive.copies[source->second];
      copy.source = holder->layout;
      copy.source_blocks = {holder->group, entry, {}};
      copy.need.group = hashes.group;
    }
    ReuseCopy& copy = receive.copies.at(source->second);
    copy.places.push_back(holder->place);
    copy.source_blocks.ids.resize(entry - copy.source_blocks.first_block, mapping::kHole);
    copy.source_blocks.ids.push_back(holder->place.block);
    for (const Range& range : need->ranges)
      add_range(copy.need.ranges, intersect(range, {entry * tokens, (entry + 1) * tokens}));
    copy.need.begin = copy.need.ranges.front().begin;
    copy.need.end = copy.need.ranges.back().end;
  }
  const uint64_t hit = entry * tokens;
  if (hit <= need->ranges.front().begin) return;
  need->begin = std::max(need->begin, hit);
  std::vector<Range> left;
  for (const Range& range : need->ranges) add_range(left, intersect(range, {hit, UINT64_MAX}));
  need->ranges = std::move(left);
}

// ---- when
// ----------------------------------------------------------------------------------------

void Receiver::may_be_ready(Receive& receive) {
  if (receive.ready || receive.terminal() || !receive.signalled) return;
  if (!receive.read_by_others.empty()) return;
  receive.ready = true;
  receive.timeline.note(Step::kReady, core_.now);
  core_.timers.cancel({TimerKind::kReady, receive.id, 0});
  queue_copies(receive);
  scatter_landed(receive);
  for (const uint64_t pull : receive.legs)
    if (RxLeg& leg = legs_.at(pull); leg.local) update(leg);
}

void Receiver::places_quiet() {
  std::erase_if(blocked_, [this](uint64_t id) {
    Receive* receive = find(id);
    if (receive == nullptr || receive->terminal()) return true;
    std::erase_if(receive->read_by_others,
                  [this](const BlockPlace& place) { return !core_.reuse.is_read(place); });
    if (!receive->read_by_others.empty()) return false;
    may_be_ready(*receive);
    return true;
  });
}

bool Receiver::copy_compiled(CopyCompiled& event) {
  const auto it = copy_compiles_.find(event.compile);
  if (it == copy_compiles_.end()) return false;
  const auto [id, copy_id] = it->second;
  copy_compiles_.erase(it);
  Receive& receive = receives_.at(id);
  ReuseCopy& copy = receive.copies.at(copy_id);
  Reason reason = event.reason;
  if (reason == Reason::kNone &&
      (event.source == nullptr || event.destination == nullptr || event.source->bytes == 0 ||
       event.source->bytes != event.destination->bytes))
    reason = Reason::kInternal;
  if (reason != Reason::kNone) {
    end_receive(receive, TransferState::kFailed, reason);
    forget_if_done(id);
    return true;
  }
  copy.from = std::move(event.source);
  copy.to = std::move(event.destination);
  if (receive.ready) {
    queue_copies(receive);
    return true;
  }
  const TimerKey key{TimerKind::kReady, id, 0};
  if (!core_.timers.pending(key)) core_.timers.set(key, core_.now + core_.config.ready_timeout);
  return true;
}

// ---- chunks
// --------------------------------------------------------------------------------------

void Receiver::queue_copies(Receive& receive) {
  for (auto& [id, copy] : receive.copies) {
    if (copy.queued || copy.from == nullptr) continue;
    copy.queued = true;
    copy_turns_.emplace_back(receive.id, id);
  }
}

void Receiver::run_copies() {
  while (copying_.size() < core_.config.reuse_copies && !copy_turns_.empty()) {
    const auto [id, copy_id] = copy_turns_.front();
    copy_turns_.pop_front();
    Receive* receive = find(id);
    if (receive == nullptr || receive->terminal()) continue;
    ReuseCopy& copy = receive->copies.at(copy_id);
    LocalCopy command;
    command.copy = CopyId{core_.next_number()};
    command.source = copy.from;
    command.destination = copy.to;
    command.offset = copy.started;
    command.bytes = std::min(core_.config.chunk_bytes, copy.from->bytes - copy.started);
    copy.started += command.bytes;
    ++copy.running;
    ++receive->copying;
    copying_[command.copy] = {id, copy_id, command.bytes};
    core_.emit(std::move(command));
    if (copy.started < copy.from->bytes) copy_turns_.emplace_back(id, copy_id);
    release(*receive);
  }
}

bool Receiver::chunk_copied(const CopyEnded& event) {
  const auto it = copying_.find(event.copy);
  if (it == copying_.end()) return false;
  const CopyChunk chunk = it->second;
  copying_.erase(it);
  Receive& receive = receives_.at(chunk.receive);
  ReuseCopy& copy = receive.copies.at(chunk.copy);
  --copy.running;
  --receive.copying;
  copy.done += chunk.bytes;
  if (event.outcome == CopyOutcome::kOk) {
    core_.stats.reuse_bytes += chunk.bytes;
    receive.timeline.note(Step::kReused, core_.now);
  } else if (!receive.terminal()) {
    end_receive(receive, TransferState::kFailed, Reason::kScatterFailed);
  }
  // Ending the receive has ended all its copies of which no chunk was under way.
  const auto left = receive.copies.find(chunk.copy);
  if (left != receive.copies.end() && left->second.running == 0 &&
      (receive.terminal() || left->second.done == left->second.from->bytes))
    end_copy(receive, chunk.copy);
  release(receive);
  if (receive.terminal())
    forget_if_done(chunk.receive);
  else
    check_complete(chunk.receive);
  return true;
}

void Receiver::end_copy(Receive& receive, uint64_t id) {
  const auto it = receive.copies.find(id);
  copy_compiles_.erase(it->second.compile);
  for (const BlockPlace& place : it->second.places) core_.reuse.read_ended(place);
  receive.copies.erase(it);
}

// The receive is over: what has not begun never will, what runs goes on and is waited for.
void Receiver::end_copies(Receive& receive) {
  blocked_.erase(receive.id);
  std::erase_if(copy_turns_, [&](const auto& turn) { return turn.first == receive.id; });
  std::vector<uint64_t> idle;
  for (const auto& [id, copy] : receive.copies)
    if (copy.running == 0) idle.push_back(id);
  for (const uint64_t id : idle) end_copy(receive, id);
}

}  // namespace kvferry::engine
