#include "daemon/rpc/worker_ops.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "daemon/mapping/limits.h"
#include "daemon/mapping/packed.h"
#include "daemon/mapping/tokens.h"

namespace kvferry::rpc {
namespace {

constexpr std::size_t kMaxPromptHashes = 131'072;  // of a call: all its groups together
constexpr uint64_t kPageBytes = 4096;

// Milliseconds of a request; 0 is the default, longer than the most is cut.
Duration time_of(uint32_t ms, Duration fallback, Duration most) {
  if (ms == 0) return fallback;
  return std::min<Duration>(std::chrono::milliseconds(ms), most);
}

template <typename Fixed>
Status take_bytes(const std::string& text, const std::string& field, Fixed& out) {
  if (text.size() != out.bytes.size())
    return invalid(field, "WRONG_SIZE",
                   std::to_string(text.size()) + " bytes, not " + std::to_string(out.bytes.size()));
  std::memcpy(out.bytes.data(), text.data(), text.size());
  return {};
}

Status check_id_and_secret(const v1::TransferRef& ref, engine::TransferKey& key) {
  if (ref.transfer_id().empty() || ref.transfer_id().size() > kMaxTransferIdBytes) {
    return invalid("transfer.transfer_id", "TRANSFER_ID_SIZE",
                   std::to_string(ref.transfer_id().size()) + " bytes, not 1 to 64");
  }
  key.id = ref.transfer_id();
  KVFERRY_RETURN_IF_ERROR(take_bytes(ref.secret(), "transfer.secret", key.secret));
  if (key.secret.is_zero())
    return invalid("transfer.secret", "SECRET_ZERO", "a secret of zeros is none");
  return {};
}

// The part of "tenant/name" behind the slash.
std::string_view bare_name(std::string_view instance) {
  return instance.substr(instance.find('/') + 1);
}

// The instance is the sender's own.
Result<engine::TransferKey> sender_key(const v1::TransferRef& ref, const LayoutView& layout) {
  engine::TransferKey key;
  KVFERRY_RETURN_IF_ERROR(check_id_and_secret(ref, key));
  if (!ref.instance().empty() && ref.instance() != bare_name(layout.handle->instance))
    return invalid("transfer.instance", "NOT_OWN_INSTANCE", "a sender names its own instance");
  key.instance = layout.handle->instance;
  key.incarnation = layout.handle->incarnation;
  if (!ref.incarnation().empty()) {
    Incarnation incarnation;
    KVFERRY_RETURN_IF_ERROR(take_bytes(ref.incarnation(), "transfer.incarnation", incarnation));
    if (incarnation != key.incarnation)
      return invalid("transfer.incarnation", "OTHER_INCARNATION", "not the registered one");
  }
  return key;
}

// The instance is the one that the ticket leads to.
Result<engine::TransferKey> receiver_key(const v1::TransferRef& ref, const TicketFacts& ticket) {
  engine::TransferKey key;
  KVFERRY_RETURN_IF_ERROR(check_id_and_secret(ref, key));
  if (!ref.instance().empty() && ref.instance() != bare_name(ticket.instance))
    return invalid("transfer.instance", "OTHER_INSTANCE", "the ticket names another instance");
  key.instance = ticket.instance;
  key.incarnation = ticket.incarnation;
  if (!ref.incarnation().empty()) {
    Incarnation incarnation;
    KVFERRY_RETURN_IF_ERROR(take_bytes(ref.incarnation(), "transfer.incarnation", incarnation));
    if (!ticket.incarnation.is_zero() && incarnation != ticket.incarnation)
      return invalid("transfer.incarnation", "OTHER_INCARNATION", "the ticket names another one");
    key.incarnation = incarnation;
  }
  return key;
}

Result<engine::ReadyCondition> ready_of(const v1::ReadyCondition& ready, const OpLimits& limits) {
  engine::ReadyCondition out;
  switch (ready.kind_case()) {
    case v1::ReadyCondition::KIND_NOT_SET:
    case v1::ReadyCondition::kHostSynced:
      break;
    case v1::ReadyCondition::kTimeline:
      if (ready.timeline().word() >= limits.timeline_words) {
        return invalid("ready.timeline.word", "WORD_OUT_OF_RANGE",
                       std::to_string(ready.timeline().word()) + " of " +
                           std::to_string(limits.timeline_words));
      }
      out.kind = engine::ReadyCondition::Kind::kTimeline;
      out.word = ready.timeline().word();
      out.value = ready.timeline().value();
      break;
    case v1::ReadyCondition::kCudaIpcEvent:
      if (!limits.cuda_events) return not_served("ready.cuda_ipc_event", "CUDA events");
      if (ready.cuda_ipc_event().handle().size() != out.event.size()) {
        return invalid("ready.cuda_ipc_event.handle", "HANDLE_SIZE",
                       "a cudaIpcEventHandle_t has " + std::to_string(out.event.size()) + " bytes");
      }
      out.kind = engine::ReadyCondition::Kind::kCudaEvent;
      std::copy(ready.cuda_ipc_event().handle().begin(), ready.cuda_ipc_event().handle().end(),
                out.event.begin());
      break;
  }
  return out;
}

template <typename Request>
Status take_done(const Request& request, const OpLimits& limits,
                 std::optional<engine::DoneWord>& out) {
  if (!request.has_done()) return {};
  if (request.done().word() >= limits.done_words) {
    return invalid(
        "done.word", "WORD_OUT_OF_RANGE",
        std::to_string(request.done().word()) + " of " + std::to_string(limits.done_words));
  }
  out = engine::DoneWord{request.done().word(), request.done().value()};
  return {};
}

Result<uint32_t> receivers_of(uint32_t asked, const OpLimits& limits) {
  if (asked > limits.max_receivers) {
    return invalid("max_receivers", "TOO_MANY_RECEIVERS",
                   std::to_string(asked) + " of at most " + std::to_string(limits.max_receivers));
  }
  return std::max<uint32_t>(asked, 1);
}

Status check_tokens(uint64_t num_tokens) {
  if (num_tokens == 0 || num_tokens > kMaxTokens)
    return invalid("num_tokens", "TOKENS_OUT_OF_RANGE", std::to_string(num_tokens));
  return {};
}

std::string group_field(int index, std::string_view name) {
  return "groups[" + std::to_string(index) + "]." + std::string(name);
}

Result<engine::GroupBlocks> blocks_of(const v1::GroupBlocks& from, int index) {
  const std::string& bytes = from.block_ids();
  if (bytes.size() % 4 != 0)
    return invalid(group_field(index, "block_ids"), "WRONG_SIZE", "not a multiple of 4 bytes");
  if (bytes.size() / 4 > kMaxBlocks)
    return invalid(group_field(index, "block_ids"), "TOO_MANY_BLOCKS",
                   std::to_string(bytes.size() / 4) + " of at most " + std::to_string(kMaxBlocks));
  engine::GroupBlocks out;
  out.group = from.group();
  out.first_block = from.first_block();
  out.ids.resize(bytes.size() / 4);
  // An empty vector has no address that memcpy may be given.
  if (!out.ids.empty()) std::memcpy(out.ids.data(), bytes.data(), bytes.size());
  return out;
}

// Before anything is kept for each of them.
Status check_group_count(int count) {
  if (static_cast<std::size_t>(count) > mapping::kMaxGroups)
    return invalid("groups", "TOO_MANY_GROUPS", std::to_string(count) + " of at most 64");
  return {};
}

Status check_range(const v1::TokenRange& tokens, uint64_t prompt, std::string field) {
  if (tokens.begin() <= tokens.end() && tokens.end() <= prompt) return {};
  return invalid(std::move(field), "TOKENS_OUT_OF_RANGE",
                 std::to_string(tokens.begin()) + "-" + std::to_string(tokens.end()) + " of " +
                     std::to_string(prompt));
}

// Needs and offers travel whole in one message between daemons: what would not fit is refused here,
// where the caller can still send smaller slices. `room_bytes`: what the message has for them.
template <typename Groups>
Status check_fits_message(const Groups& groups, std::size_t room_bytes) {
  constexpr std::size_t kGroupBytes = 24;
  constexpr std::size_t kRangeBytes = 16;
  std::size_t bytes = 0;
  for (const auto& group : groups) bytes += kGroupBytes + group.ranges.size() * kRangeBytes;
  if (bytes > room_bytes) {
    return invalid("groups", "TOO_FRAGMENTED",
                   "the holes cut the tokens into more ranges than one message carries");
  }
  return {};
}
// Of 64 KiB a PULL's names and credits need less than 2 KiB; beside aux a SLICE has 4,000 bytes.
constexpr std::size_t kPullRoom = 62 * 1024;
constexpr std::size_t kSliceRoom = 63 * 1024;
constexpr std::size_t kSliceRoomBesideAux = 3'600;

// `field`: of the list.
template <typename List>
Result<std::vector<std::string>> hashes_of(const List& list, const std::string& field) {
  if (static_cast<std::size_t>(list.size()) > kMaxBlocks)
    return invalid(field, "TOO_MANY_BLOCKS", std::to_string(list.size()));
  for (int i = 0; i < list.size(); ++i) {
    if (list[i].empty() || list[i].size() > kMaxHashBytes)
      return invalid(field + "[" + std::to_string(i) + "]", "WRONG_SIZE",
                     std::to_string(list[i].size()) + " bytes, not 1 to 32");
  }
  return std::vector<std::string>(list.begin(), list.end());
}

Result<std::vector<engine::PromptHashes>> prompt_hashes_of(
    const google::protobuf::RepeatedPtrField<v1::PromptHashes>& from,
    const mapping::RankLayout& layout) {
  if (static_cast<std::size_t>(from.size()) > mapping::kMaxGroups)
    return invalid("prompt_hashes", "TOO_MANY_GROUPS", std::to_string(from.size()));
  std::vector<engine::PromptHashes> out;
  std::size_t total = 0;
  for (int i = 0; i < from.size(); ++i) {
    const std::string field = "prompt_hashes[" + std::to_string(i) + "].";
    if (from[i].group() >= layout.groups.size())
      return invalid(field + "group", "UNKNOWN_GROUP", "the layout has no such group");
    auto hashes = hashes_of(from[i].hashes(), field + "hashes");
    KVFERRY_RETURN_IF_ERROR(hashes);
    total += hashes->size();
    if (total > kMaxPromptHashes)
      return invalid(field + "hashes", "TOO_MANY_HASHES",
                     "more than " + std::to_string(kMaxPromptHashes) + " in one call");
    out.push_back({from[i].group(), std::move(*hashes)});
  }
  return out;
}

Result<bool> waits_for_arena(v1::ArenaFull when_full) {
  if (when_full != v1::ARENA_FULL_UNSPECIFIED && when_full != v1::ARENA_FULL_WAIT &&
      when_full != v1::ARENA_FULL_FAIL)
    return invalid("arena_full", "UNKNOWN_VALUE", "no such choice");
  return when_full != v1::ARENA_FULL_FAIL;
}

bool is_request_group(const mapping::RankLayout& layout, uint32_t group) {
  return group < layout.groups.size() && !layout.groups[group].planes.empty() &&
         layout.groups[group].planes.front().granularity == mapping::Granularity::kRequest;
}

}  // namespace

Error as_spelled(Error error) {
  static constexpr std::pair<std::string_view, std::string_view> kWhole[] = {
      {"transfer.id", "transfer.transfer_id"},
      {"wait_for_arena", "arena_full"},
      {"lease", "lease_ms"},
      {"wait", "wait_ms"},
      {"deadline", "deadline_ms"},
      {"ttl", "ttl_ms"},
      {"needs", "groups"},
      {"offer", "groups"},
      {"blocks", "groups"}};
  static constexpr std::pair<std::string_view, std::string_view> kLast[] = {
      {"cp_interleave", "cp_interleave_tokens"}, {"offset", "offset_bytes"},
      {"block_stride", "block_stride_bytes"},    {"unit_stride", "unit_stride_bytes"},
      {"token_stride", "token_stride_bytes"},    {"cached", "cached_tokens"}};
  std::string& field = error.field;
  for (const auto& [ours, theirs] : kWhole) {
    if (field != ours) continue;
    field = theirs;
    return error;
  }
  const std::size_t dot = field.rfind('.');
  const std::string_view last = std::string_view(field).substr(dot + 1);  // npos + 1 is 0
  if (last == "prompt" && field.starts_with("groups[")) {
    field = "num_tokens";
    return error;
  }
  for (const auto& [ours, theirs] : kLast) {
    if (last != ours) continue;
    field.replace(field.size() - ours.size(), ours.size(), theirs);
    break;
  }
  // What does not fit to the instance's other ranks is said of one of them.
  if (field.starts_with("ranks["))
    field = "layout" + field.substr(std::min(field.find(']') + 1, field.size()));
  return error;
}

tl::unexpected<Error> not_served(std::string field, std::string_view feature) {
  return fail(Code::kUnimplemented, "FEATURE_NOT_SERVED",
              std::string(feature) + " are not served by this daemon", std::move(field));
}

Status check_handle(uint64_t client_handle) {
  if (client_handle == 0) return invalid("client_handle", "HANDLE_ZERO", "0 names no transfer");
  return {};
}

Status check_hash_scheme(const std::string& scheme) {
  const bool printable =
      std::all_of(scheme.begin(), scheme.end(), [](char c) { return c > ' ' && c < '\x7f'; });
  if (scheme.size() > kMaxHashSchemeBytes || !printable)
    return invalid("reuse_hash_scheme", "HASH_SCHEME_INVALID", "at most 64 printable characters");
  return {};
}

Status check_ticket_text(const std::string& ticket) {
  const bool printable =
      std::all_of(ticket.begin(), ticket.end(), [](char c) { return c > ' ' && c < '\x7f'; });
  if (ticket.empty() || ticket.size() > kMaxTicketBytes || !printable)
    return invalid("ticket", "TICKET_INVALID", "1 to 512 printable characters");
  return {};
}

Result<engine::OpenSendOp> to_open_send(const v1::OpenSendRequest& request,
                                        const LayoutView& layout, const OpLimits& limits) {
  engine::OpenSendOp op;
  KVFERRY_RETURN_IF_ERROR(check_handle(request.client_handle()));
  op.client_handle = request.client_handle();
  auto key = sender_key(request.transfer(), layout);
  KVFERRY_RETURN_IF_ERROR(key);
  op.key = std::move(*key);
  op.layout = layout.handle;
  op.lease = time_of(request.lease_ms(), limits.lease, limits.lease_max);
  op.deadline = time_of(request.deadline_ms(), limits.deadline, limits.deadline_max);
  auto receivers = receivers_of(request.max_receivers(), limits);
  KVFERRY_RETURN_IF_ERROR(receivers);
  op.max_receivers = *receivers;
  return op;
}

Result<engine::SendOp> to_send(const v1::SendRequest& request, const LayoutView& layout,
                               const OpLimits& limits) {
  engine::SendOp op;
  KVFERRY_RETURN_IF_ERROR(check_handle(request.client_handle()));
  op.client_handle = request.client_handle();
  auto key = sender_key(request.transfer(), layout);
  KVFERRY_RETURN_IF_ERROR(key);
  op.key = std::move(*key);
  op.layout = layout.handle;
  op.send_index = request.send_index();
  KVFERRY_RETURN_IF_ERROR(check_tokens(request.num_tokens()));
  op.num_tokens = request.num_tokens();
  KVFERRY_RETURN_IF_ERROR(take_done(request, limits, op.done));
  if (request.has_layers()) {
    if (request.layers().begin() >= request.layers().end() ||
        request.layers().end() > mapping::kMaxLayers)
      return invalid("layers", "LAYERS_OUT_OF_RANGE", "an empty or too large range");
    op.layers = Range{request.layers().begin(), request.layers().end()};
  }
  op.last = request.last();
  if (request.has_aux()) {
    if (!request.last()) return invalid("aux", "AUX_NOT_LAST", "aux goes with the last slice");
    if (request.aux().size() > kMaxAuxBytes)
      return invalid("aux", "AUX_TOO_LARGE", std::to_string(request.aux().size()) + " bytes");
    op.aux = request.aux();
  }
  auto ready = ready_of(request.ready(), limits);
  KVFERRY_RETURN_IF_ERROR(ready);
  op.ready = *ready;

  KVFERRY_RETURN_IF_ERROR(check_group_count(request.groups_size()));
  KVFERRY_RETURN_IF_ERROR(check_range(request.tokens(), request.num_tokens(), "tokens"));
  std::vector<mapping::GroupOffer> offers;
  for (int i = 0; i < request.groups_size(); ++i) {
    const v1::GroupBlocks& group = request.groups(i);
    auto blocks = blocks_of(group, i);
    KVFERRY_RETURN_IF_ERROR(blocks);
    if (group.cached_tokens() != 0)
      return invalid(group_field(i, "cached_tokens"), "RECEIVER_ONLY", "a sender caches nothing");
    const bool request_group = is_request_group(*layout.layout, group.group());
    const v1::TokenRange& tokens = group.has_tokens() ? group.tokens() : request.tokens();
    const uint64_t prompt = request_group ? 1 : request.num_tokens();
    KVFERRY_RETURN_IF_ERROR(check_range(group.tokens(), prompt, group_field(i, "tokens")));
    const Range range = request_group ? Range{0, 1} : Range{tokens.begin(), tokens.end()};
    offers.push_back({prompt, range, *blocks});
    op.blocks.push_back(std::move(*blocks));
  }
  auto rounded = mapping::round_offer(*layout.layout, offers);
  if (!rounded) return tl::unexpected<Error>(as_spelled(rounded.error()));
  op.offer = std::move(*rounded);
  KVFERRY_RETURN_IF_ERROR(check_fits_message(op.offer, op.aux ? kSliceRoomBesideAux : kSliceRoom));
  if (request.packed_copy()) {
    const auto packed = mapping::packed_shape(*layout.layout, op.offer, op.layers);
    if (!packed) return tl::unexpected<Error>(as_spelled(packed.error()));
    op.packed_bytes = round_up(packed->bytes, kPageBytes);  // what it takes
  }
  op.lease = time_of(request.lease_ms(), limits.lease, limits.lease_max);
  op.deadline = time_of(request.deadline_ms(), limits.deadline, limits.deadline_max);
  auto receivers = receivers_of(request.max_receivers(), limits);
  KVFERRY_RETURN_IF_ERROR(receivers);
  op.max_receivers = *receivers;
  return op;
}

Result<engine::ReceiveOp> to_receive(const v1::ReceiveRequest& request, const LayoutView& layout,
                                     const TicketFacts& ticket, const OpLimits& limits) {
  engine::ReceiveOp op;
  KVFERRY_RETURN_IF_ERROR(check_handle(request.client_handle()));
  op.client_handle = request.client_handle();
  auto key = receiver_key(request.transfer(), ticket);
  KVFERRY_RETURN_IF_ERROR(key);
  op.key = std::move(*key);
  op.ticket = request.ticket();
  op.layout = layout.handle;
  if (request.has_sender_dp_group()) {
    if (request.sender_dp_group() >= mapping::kMaxRanks)
      return invalid("sender_dp_group", "OUT_OF_RANGE", "dp groups are below 4096");
    op.sender_dp_group = request.sender_dp_group();
  }
  KVFERRY_RETURN_IF_ERROR(check_tokens(request.num_tokens()));
  op.num_tokens = request.num_tokens();
  auto hashes = prompt_hashes_of(request.prompt_hashes(), *layout.layout);
  KVFERRY_RETURN_IF_ERROR(hashes);
  op.hashes = std::move(*hashes);
  op.reuse_pin = request.reuse_pin();
  KVFERRY_RETURN_IF_ERROR(take_done(request, limits, op.done));
  auto waits = waits_for_arena(request.arena_full());
  KVFERRY_RETURN_IF_ERROR(waits);
  op.wait_for_arena = *waits;
  auto ready = ready_of(request.ready(), limits);
  KVFERRY_RETURN_IF_ERROR(ready);
  op.ready = *ready;

  KVFERRY_RETURN_IF_ERROR(check_group_count(request.groups_size()));
  std::vector<mapping::GroupReceive> receives;
  for (int i = 0; i < request.groups_size(); ++i) {
    const v1::GroupBlocks& group = request.groups(i);
    auto blocks = blocks_of(group, i);
    KVFERRY_RETURN_IF_ERROR(blocks);
    if (group.has_tokens())
      return invalid(group_field(i, "tokens"), "SENDER_ONLY", "a receiver states cached_tokens");
    const uint64_t prompt =
        is_request_group(*layout.layout, group.group()) ? 1 : request.num_tokens();
    receives.push_back({prompt, group.cached_tokens(), *blocks});
    op.blocks.push_back(std::move(*blocks));
  }
  auto needs = mapping::compute_needs(*layout.layout, receives);
  if (!needs) return tl::unexpected<Error>(as_spelled(needs.error()));
  op.needs = std::move(*needs);
  KVFERRY_RETURN_IF_ERROR(check_fits_message(op.needs, kPullRoom));
  op.wait = time_of(request.wait_ms(), limits.wait, limits.wait_max);
  op.deadline = time_of(request.deadline_ms(), limits.deadline, limits.deadline_max);
  return op;
}

Result<engine::ClaimOp> to_claim(const v1::ClaimRequest& request, const LayoutView& layout,
                                 const TicketFacts& ticket, const OpLimits& limits) {
  engine::ClaimOp op;
  KVFERRY_RETURN_IF_ERROR(check_handle(request.client_handle()));
  op.client_handle = request.client_handle();
  auto key = receiver_key(request.transfer(), ticket);
  KVFERRY_RETURN_IF_ERROR(key);
  op.key = std::move(*key);
  op.ticket = request.ticket();
  op.layout = layout.handle;
  op.ttl = time_of(request.ttl_ms(), limits.lease, limits.lease_max);
  return op;
}

Result<engine::DeclineOp> to_decline(const v1::DeclineRequest& request, const LayoutView& layout,
                                     const TicketFacts& ticket) {
  engine::DeclineOp op;
  auto key = receiver_key(request.transfer(), ticket);
  KVFERRY_RETURN_IF_ERROR(key);
  op.key = std::move(*key);
  op.ticket = request.ticket();
  op.layout = layout.handle;
  return op;
}

Result<engine::ReserveOp> to_reserve(const v1::ReserveRequest& request, const LayoutView& layout,
                                     const TicketFacts& ticket, const OpLimits& limits) {
  engine::ReserveOp op;
  auto key = receiver_key(request.transfer(), ticket);
  KVFERRY_RETURN_IF_ERROR(key);
  op.key = std::move(*key);
  op.layout = layout.handle;
  op.bytes = request.bytes();
  auto waits = waits_for_arena(request.arena_full());
  KVFERRY_RETURN_IF_ERROR(waits);
  op.may_wait = *waits;
  op.lease = time_of(request.lease_ms(), limits.lease, limits.lease_max);
  return op;
}

Result<engine::CommitReuseOp> to_commit_reuse(const v1::CommitReuseRequest& request) {
  engine::CommitReuseOp op;
  KVFERRY_RETURN_IF_ERROR(check_handle(request.client_handle()));
  op.client_handle = request.client_handle();
  KVFERRY_RETURN_IF_ERROR(check_group_count(request.groups_size()));
  for (int i = 0; i < request.groups_size(); ++i) {
    const auto& from = request.groups(i);
    auto hashes = hashes_of(from.hashes(), group_field(i, "hashes"));
    KVFERRY_RETURN_IF_ERROR(hashes);
    op.groups.push_back({from.group(), from.tokens(), std::move(*hashes)});
  }
  return op;
}

Result<engine::LookupReuseOp> to_lookup_reuse(const v1::LookupReuseRequest& request,
                                              const LayoutView& layout) {
  engine::LookupReuseOp op;
  op.layout = layout.handle;
  if (request.prompt_hashes_size() == 0)
    return invalid("prompt_hashes", "MISSING", "what is looked up");
  auto hashes = prompt_hashes_of(request.prompt_hashes(), *layout.layout);
  KVFERRY_RETURN_IF_ERROR(hashes);
  op.hashes = std::move(*hashes);
  if (request.pin_ms() > kMaxPinMs)
    return invalid("pin_ms", "PIN_TOO_LONG", "at most 1000 milliseconds");
  op.pin = std::chrono::milliseconds(request.pin_ms());
  return op;
}

Result<engine::WithdrawReuseOp> to_withdraw_reuse(const v1::WithdrawReuseRequest& request,
                                                  const LayoutView& layout) {
  engine::WithdrawReuseOp op;
  op.layout = layout.handle;
  KVFERRY_RETURN_IF_ERROR(check_group_count(request.groups_size()));
  for (int i = 0; i < request.groups_size(); ++i) {
    const v1::GroupBlocks& from = request.groups(i);
    if (from.group() >= layout.layout->groups.size())
      return invalid(group_field(i, "group"), "UNKNOWN_GROUP", "the layout has no such group");
    if (from.has_tokens())
      return invalid(group_field(i, "tokens"), "UNEXPECTED", "blocks are withdrawn whole");
    if (from.cached_tokens() != 0)
      return invalid(group_field(i, "cached_tokens"), "UNEXPECTED", "blocks are withdrawn by id");
    if (from.first_block() != 0)
      return invalid(group_field(i, "first_block"), "UNEXPECTED", "the list has no positions");
    auto blocks = blocks_of(from, i);
    KVFERRY_RETURN_IF_ERROR(blocks);
    const mapping::Group& group = layout.layout->groups[from.group()];
    const auto count = static_cast<int64_t>(group.block_count / group.blocks_per_id);
    for (std::size_t j = 0; j < blocks->ids.size(); ++j) {
      if (blocks->ids[j] >= mapping::kHole && blocks->ids[j] < count) continue;
      return invalid(group_field(i, "block_ids") + "[" + std::to_string(j) + "]",
                     "BLOCK_OUT_OF_RANGE", std::to_string(blocks->ids[j]));
    }
    op.groups.push_back(std::move(*blocks));
  }
  return op;
}

void to_proto(const engine::Reply::Receiver& receiver,
              v1::GetReceiverNeedsResponse::Receiver& out) {
  out.set_instance(std::string(bare_name(receiver.instance)));
  out.set_incarnation(receiver.incarnation.bytes.data(), receiver.incarnation.bytes.size());
  out.set_dp_group(receiver.dp_group);
  out.set_ready(receiver.ready);
  for (const mapping::GroupRanges& group : receiver.needs) {
    auto* to = out.add_groups();
    to->set_group(group.group);
    for (const Range& range : group.ranges) {
      v1::TokenRange* tokens = to->add_ranges();
      tokens->set_begin(range.begin);
      tokens->set_end(range.end);
    }
  }
}

void to_proto(const ResolveOutcome& outcome, v1::ResolveResponse& out) {
  out.set_reachable(outcome.reachable);
  out.set_compatible(outcome.compatible);
  if (outcome.problem) {
    v1::ErrorDetail* problem = out.mutable_problem();
    problem->set_code(static_cast<int32_t>(outcome.problem->code));
    problem->set_reason(outcome.problem->reason);
    problem->set_field(outcome.problem->field);
    problem->set_message(outcome.problem->message);
  }
  out.set_transport(outcome.transport);
  out.set_instance(outcome.instance);
  out.set_incarnation(outcome.incarnation.bytes.data(), outcome.incarnation.bytes.size());
  out.set_rank_count(outcome.rank_count);
}

}  // namespace kvferry::rpc
