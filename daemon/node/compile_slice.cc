#include "daemon/node/compile_slice.h"

#include <map>
#include <utility>
#include <vector>

#include "daemon/mapping/plan.h"
#include "daemon/mapping/stream.h"
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

}  // namespace

Reason reason_of(const Error& error) {
  static const std::map<std::string, Reason> kReasons{
      {"PEER_NOT_ALLOWED", Reason::kPeerNotAllowed},
      {"IDENTITY_MISMATCH", Reason::kPeerNotAllowed},
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
  plan->runs = bound->run_count();
  plan->plan = std::make_shared<const mapping::Plan>(std::move(*bound));
  if (!sender && clears_tails(layout->layout)) {
    Result<mapping::Plan> tail =
        mapping::bind_tail(*stream, layout->layout, blocks, prompts_of(layout->layout, needs));
    if (!tail) return failed(command, reason_of(tail.error()), tail.error().to_string());
    plan->tail = std::make_shared<const mapping::Plan>(std::move(*tail));
  }
  return {command.compile, Reason::kNone, {}, std::move(plan)};
}

}  // namespace kvferry::node
