#include "daemon/node/compile_slice.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "daemon/mapping/plan.h"
#include "daemon/mapping/stream.h"
#include "daemon/mapping/validate.h"
#include "daemon/node/registered_layout.h"

namespace kvferry::node {
namespace {

engine::Compiled failed(const engine::Compile& command, Reason reason, std::string message) {
  return {command.compile, reason, std::move(message), nullptr};
}

bool clears_tails(const mapping::RankLayout& layout) {
  for (const mapping::Group& group : layout.groups)
    if (group.tail == mapping::Tail::kZero) return true;
  return false;
}

// The prompt's length as each group sees it; a group without a need has nothing to clear.
std::vector<uint64_t> prompts_of(const mapping::RankLayout& layout,
                                 const std::vector<mapping::GroupNeed>& needs) {
  std::vector<uint64_t> prompts(layout.groups.size(), 0);
  for (const mapping::GroupNeed& need : needs)
    if (need.group < prompts.size()) prompts[need.group] = need.end;
  return prompts;
}

// What compile_now() may cost at most for a small slice, in pieces of a plan. A plane takes as long
// as some of them: it is looked up, described, digested and bound.
constexpr uint64_t kSmallSteps = 1024;
constexpr uint64_t kPlaneSteps = 16;

// The fewest tokens that the rank keeps in one piece, where it keeps tokens.
uint64_t shortest_piece(const mapping::Holding& holding) {
  uint64_t least = uint64_t{1} << 30;  // the most that a block may have
  for (const mapping::Group& group : holding.groups) {
    if (mapping::is_request_group(group)) continue;
    least = std::min(least, std::max<uint64_t>(group.tokens_per_block, 1));
    if (group.cp_size > 1 && group.cp_interleave != 0) least = std::min(least, group.cp_interleave);
  }
  return least;
}

}  // namespace

bool is_small(const engine::Compile& command) {
  const bool sender = command.side == engine::Role::kSender;
  const auto* context = dynamic_cast<const CompileContext*>(command.context.get());
  const auto* layout = dynamic_cast<const RegisteredLayout*>(
      sender ? (command.send ? command.send->layout.get() : nullptr)
             : (command.receive ? command.receive->layout.get() : nullptr));
  if (context == nullptr || layout == nullptr || (sender && command.pull == nullptr) ||
      layout->device() != nullptr ||
      context->sender_rank >= context->table->sender().ranks.size() ||
      context->receiver_rank >= context->table->receiver().ranks.size())
    return false;
  const mapping::Holding& from = context->table->sender().ranks[context->sender_rank];
  const mapping::Holding& to = context->table->receiver().ranks[context->receiver_rank];
  const uint64_t piece = std::min(shortest_piece(from), shortest_piece(to));
  uint64_t steps = 0;
  uint64_t ranges = 0;
  for (const mapping::Group& group : to.groups) steps += kPlaneSteps * group.planes.size();
  for (const mapping::GroupNeed& need : sender ? command.pull->needs : command.receive->needs)
    ranges += need.ranges.size();
  for (const mapping::GroupRanges& group : command.offer) {
    ranges += group.ranges.size();
    for (const Range& range : group.ranges) {
      if (steps > kSmallSteps) return false;
      steps += std::min(range.size(), piece * kSmallSteps) / piece + 2;
    }
  }
  // Each group of the sender's may be met by each of the receiver's.
  return steps + ranges * to.groups.size() <= kSmallSteps;
}

Reason reason_of(const Error& error) {
  static const std::map<std::string, Reason> kReasons{
      {"PEER_NOT_ALLOWED", Reason::kPeerNotAllowed},
      {"IDENTITY_MISMATCH", Reason::kPeerNotAllowed},
      {"PEER_CERTIFICATE", Reason::kPeerNotAllowed},
      {"PEER_MODE", Reason::kPeerNotAllowed},
      {"UCX_MISMATCH", Reason::kUcxMismatch},
      {"STALE_CARDS", Reason::kStaleCards},
      {"INCOMPATIBLE", Reason::kIncompatible},
      {"TOO_FRAGMENTED", Reason::kTooFragmented},
      {"LAYOUT_MISMATCH", Reason::kLayoutMismatch},
      {"BAD_CARD", Reason::kProtocol},
      {"BAD_MESSAGE", Reason::kProtocol},
      {"BAD_TICKET", Reason::kProtocol},
      {"WRONG_NODE", Reason::kProtocol},
      {"UNREGISTERED", Reason::kUnregistered},
      {"RESOLVE_LIMIT", Reason::kDeadline}};
  const auto it = kReasons.find(error.reason);
  if (it != kReasons.end()) return it->second;
  switch (error.code) {
    case Code::kUnavailable:
    case Code::kDeadlineExceeded:
    case Code::kUnimplemented:
    case Code::kFailedPrecondition:
      return Reason::kPeerUnreachable;
    case Code::kInvalidArgument:
    case Code::kNotFound:
      return Reason::kIncompatible;
    default:
      return Reason::kInternal;
  }
}

engine::Compiled compile_now(const engine::Compile& command) {
  const bool sender = command.side == engine::Role::kSender;
  const auto* context = dynamic_cast<const CompileContext*>(command.context.get());
  const auto layout = std::dynamic_pointer_cast<const RegisteredLayout>(
      sender ? (command.send ? command.send->layout : nullptr)
             : (command.receive ? command.receive->layout : nullptr));
  if (context == nullptr || layout == nullptr || (sender && command.pull == nullptr))
    return failed(command, Reason::kInternal, "the slice has no leg, layout or pull");
  const std::vector<mapping::GroupNeed>& needs =
      sender ? command.pull->needs : command.receive->needs;
  const std::vector<mapping::GroupBlocks>& blocks =
      sender ? command.send->blocks : command.receive->blocks;

  const Result<mapping::Stream> stream =
      mapping::compile_stream(*context->table, context->sender_rank, context->receiver_rank, needs,
                              command.offer, command.layers);
  if (!stream) {
    // One side's part of the input is the peer's word; what is wrong with it is the peer's fault.
    const bool peers_word = stream.error().code == Code::kInvalidArgument;
    return failed(command, peers_word ? Reason::kProtocol : reason_of(stream.error()),
                  stream.error().to_string());
  }
  Result<mapping::Plan> bound = mapping::bind_plan(
      *stream, sender ? mapping::Side::kSender : mapping::Side::kReceiver, layout->layout, blocks);
  if (!bound) return failed(command, reason_of(bound.error()), bound.error().to_string());
  auto plan = std::make_shared<CompiledPlan>();
  plan->layout = layout;
  plan->bytes = stream->bytes;
  plan->digest = stream->digest;
  plan->plan = std::make_shared<const mapping::Plan>(std::move(*bound));
  plan->fragments = plan->plan->estimate_pieces();
  if (!sender && clears_tails(layout->layout)) {
    Result<mapping::Plan> tail =
        mapping::bind_tail(*stream, layout->layout, blocks, prompts_of(layout->layout, needs));
    if (!tail) return failed(command, reason_of(tail.error()), tail.error().to_string());
    plan->has_tail = tail->bytes() > 0;
    if (plan->has_tail) plan->tail = std::make_shared<const mapping::Plan>(std::move(*tail));
  }
  if (const Status made = plan->make_device_forms(); !made)
    return failed(command, reason_of(made.error()), made.error().to_string());
  return {command.compile, Reason::kNone, {}, std::move(plan)};
}

// ---- copies between two layouts of this daemon -------------------------------------------------

namespace {

// The groups of `layout` that `needs` names, renumbered from 0: what the others look like is
// nobody's affair in this copy.
struct Part {
  mapping::RankLayout layout;
  std::vector<mapping::GroupNeed> needs;
  std::vector<mapping::GroupBlocks> blocks;
};
Result<Part> part_of(const mapping::RankLayout& layout,
                     const std::vector<mapping::GroupNeed>& needs,
                     const std::vector<mapping::GroupBlocks>& blocks) {
  Part part;
  part.layout.fingerprint = layout.fingerprint;
  part.layout.pools = layout.pools;
  for (const mapping::GroupNeed& need : needs) {
    if (need.group >= layout.groups.size())
      return fail(Code::kInvalidArgument, "UNKNOWN_GROUP", "no such group", "needs");
    const auto number = static_cast<uint32_t>(part.layout.groups.size());
    part.layout.groups.push_back(layout.groups[need.group]);
    part.needs.push_back(need);
    part.needs.back().group = number;
    for (const mapping::GroupBlocks& of : blocks) {
      if (of.group != need.group) continue;
      part.blocks.push_back(of);
      part.blocks.back().group = number;
    }
  }
  return part;
}

std::shared_ptr<const mapping::Instance> alone(const mapping::RankLayout& layout) {
  auto instance = std::make_shared<mapping::Instance>();
  instance->ranks.push_back(mapping::holding_of(layout));
  instance->ranks.front().topology = {};
  return instance;
}

Result<std::shared_ptr<const CompiledPlan>> bound(
    const mapping::Stream& stream, mapping::Side side,
    const std::shared_ptr<const RegisteredLayout>& layout, const mapping::RankLayout& shape,
    const std::vector<mapping::GroupBlocks>& blocks) {
  Result<mapping::Plan> plan = mapping::bind_plan(stream, side, shape, blocks);
  if (!plan) return tl::unexpected<Error>(std::move(plan).error());
  auto compiled = std::make_shared<CompiledPlan>();
  compiled->layout = layout;
  compiled->bytes = stream.bytes;
  compiled->digest = stream.digest;
  compiled->plan = std::make_shared<const mapping::Plan>(std::move(*plan));
  KVFERRY_RETURN_IF_ERROR(compiled->make_device_forms());
  return std::shared_ptr<const CompiledPlan>(std::move(compiled));
}

Status compile_copy(const engine::CompileCopy& command, engine::CopyCompiled& out) {
  const auto source = std::dynamic_pointer_cast<const RegisteredLayout>(command.source);
  const auto destination = std::dynamic_pointer_cast<const RegisteredLayout>(command.destination);
  if (source == nullptr || destination == nullptr)
    return fail(Code::kInternal, "NO_LAYOUT", "a copy has two layouts");
  Result<Part> part = part_of(destination->layout, command.needs, command.destination_blocks);
  if (!part) return tl::unexpected<Error>(std::move(part).error());
  const auto table = mapping::LegTable::make(alone(source->layout), alone(part->layout));
  if (!table) return tl::unexpected<Error>(table.error());
  // The source offers all that anybody asks for: the needs alone decide what is copied.
  uint64_t end = 0;
  for (const mapping::GroupNeed& need : part->needs) end = std::max(end, need.end);
  std::vector<mapping::GroupRanges> offer;
  for (uint32_t group = 0; group < source->layout.groups.size(); ++group)
    offer.push_back(
        {group, {{0, round_up(end, mapping::granule_of(source->layout.groups[group]))}}});
  const Result<mapping::Stream> stream = mapping::compile_stream(**table, 0, 0, part->needs, offer);
  if (!stream) return tl::unexpected<Error>(stream.error());
  auto from = bound(*stream, mapping::Side::kSender, source, source->layout, command.source_blocks);
  if (!from) return tl::unexpected<Error>(std::move(from).error());
  auto to = bound(*stream, mapping::Side::kReceiver, destination, part->layout, part->blocks);
  if (!to) return tl::unexpected<Error>(std::move(to).error());
  out.source = std::move(*from);
  out.destination = std::move(*to);
  return {};
}

}  // namespace

engine::CopyCompiled compile_now(const engine::CompileCopy& command) {
  engine::CopyCompiled answer;
  answer.compile = command.compile;
  if (const Status done = compile_copy(command, answer); !done) {
    answer.reason = reason_of(done.error());
    answer.message = done.error().to_string();
  }
  return answer;
}

}  // namespace kvferry::node
