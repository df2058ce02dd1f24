#include "client/cpp/src/encode.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

namespace kvferry::client {
namespace {

static_assert(std::endian::native == std::endian::little, "block ids are copied as they are");

constexpr std::size_t kMaxIdBytes = 64;
constexpr std::size_t kMaxAuxBytes = 64 * 1024;

Error invalid(std::string field, std::string reason, std::string message) {
  return {Code::kInvalidArgument, std::move(reason), std::move(message), std::move(field), {}};
}

void put16(const Bytes16& bytes, std::string* out) {
  out->assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Status put(const TransferKey& key, pb::TransferRef* out) {
  if (key.id.empty() || key.id.size() > kMaxIdBytes)
    return invalid("key.id", "TRANSFER_ID", "a transfer id has 1 to 64 bytes");
  out->set_instance(key.instance);
  if (key.incarnation) put16(*key.incarnation, out->mutable_incarnation());
  out->set_transfer_id(key.id);
  put16(key.secret, out->mutable_secret());
  return {};
}

// Milliseconds on the wire; longer ones than fit mean "as long as the daemon allows".
Result<uint32_t> wire_ms(milliseconds time, const char* field) {
  if (time.count() < 0) return invalid(field, "NEGATIVE_TIME", "a time cannot be negative");
  return static_cast<uint32_t>(
      std::min<int64_t>(time.count(), std::numeric_limits<uint32_t>::max()));
}

Status put(const ReadyCondition& ready, pb::ReadyCondition* out) {
  switch (ready.kind) {
    case ReadyCondition::Kind::kHostSynced:
      out->mutable_host_synced();
      return {};
    case ReadyCondition::Kind::kTimeline:
      out->mutable_timeline()->set_word(ready.word);
      out->mutable_timeline()->set_value(ready.value);
      return {};
    case ReadyCondition::Kind::kCudaIpcEvent:
      if (ready.event_handle.size() != 64)
        return invalid("ready.event_handle", "EVENT_HANDLE", "a handle has 64 bytes");
      out->mutable_cuda_ipc_event()->set_handle(ready.event_handle);
      return {};
  }
  return invalid("ready.kind", "READY_KIND", "not a kind of ready condition");
}

void put(const GroupBlocks& blocks, pb::GroupBlocks* out) {
  out->set_group(blocks.group);
  out->set_first_block(blocks.first_block);
  out->set_block_ids(blocks.ids.data(), blocks.ids.size_bytes());
  if (blocks.tokens) {
    out->mutable_tokens()->set_begin(blocks.tokens->begin);
    out->mutable_tokens()->set_end(blocks.tokens->end);
  }
  out->set_cached_tokens(blocks.cached_tokens);
}

void put(const DoneWord& done, pb::DoneWord* out) {
  out->set_word(done.word);
  out->set_value(done.value);
}

// Before anything is copied: an operation with so many ids could never be sent.
Status check_size(std::span<const GroupBlocks> groups) {
  std::size_t bytes = 0;
  for (const GroupBlocks& group : groups) {
    if (group.ids.size_bytes() > kMaxOperationBytes) bytes = kMaxOperationBytes;
    bytes += group.ids.size_bytes() + 64;
  }
  if (bytes + kMaxAuxBytes + kMaxHashesBytes + 4096 > kMaxOperationBytes)
    return invalid("groups", "OPERATION_TOO_LARGE", "too many block ids for one operation");
  return {};
}

Status check_size(std::span<const PromptHashes> hashes) {
  std::size_t bytes = 0;
  for (const PromptHashes& group : hashes) {
    bytes += 16;
    for (const std::string& hash : group.hashes) {
      bytes += 8 + hash.size();
      if (bytes > kMaxHashesBytes)
        return invalid("prompt_hashes", "OPERATION_TOO_LARGE", "too many hashes for one call");
    }
  }
  return {};
}

template <typename Request>
void put(std::span<const PromptHashes> hashes, Request* out) {
  for (const PromptHashes& group : hashes) {
    auto* to = out->add_prompt_hashes();
    to->set_group(group.group);
    for (const std::string& hash : group.hashes) to->add_hashes(hash);
  }
}

pb::Granularity wire(Granularity value) {
  return static_cast<pb::Granularity>(value);
}

void put(const Plane& plane, pb::Plane* out) {
  out->set_layer(plane.layer);
  out->set_role(plane.role);
  out->set_units_total(plane.units_total);
  out->set_unit_begin(plane.unit_begin);
  out->set_unit_count(plane.unit_count);
  out->set_granularity(wire(plane.granularity));
  out->set_cell_bytes(plane.cell_bytes);
  out->set_type(plane.type);
  out->set_optional(plane.optional);
  out->set_order(plane.order);
  out->set_pool(plane.pool);
  out->set_offset_bytes(plane.offset);
  out->set_block_stride_bytes(plane.block_stride);
  out->set_unit_stride_bytes(plane.unit_stride);
  out->set_token_stride_bytes(plane.token_stride);
}

void put(const Group& group, pb::Group* out) {
  out->set_tokens_per_block(group.tokens_per_block);
  out->set_sliding_window_tokens(group.sliding_window);
  out->set_cp_size(group.cp_size);
  out->set_cp_index(group.cp_index);
  out->set_cp_interleave_tokens(group.cp_interleave);
  out->set_tail(static_cast<pb::Tail>(group.tail));
  out->set_block_count(group.block_count);
  out->set_id_space(group.id_space);
  out->set_blocks_per_id(group.blocks_per_id);
  for (const Plane& plane : group.planes) put(plane, out->add_planes());
}

// Assigns `value` from a Result or returns its error from the enclosing function.
#define KVFERRY_CLIENT_ASSIGN(value, expr)                \
  do {                                                    \
    auto kvferry_result_ = (expr);                        \
    if (!kvferry_result_) return kvferry_result_.error(); \
    value(*kvferry_result_);                              \
  } while (false)
#define KVFERRY_CLIENT_CHECK(expr)                                                       \
  do {                                                                                   \
    if (auto kvferry_status_ = (expr); !kvferry_status_) return kvferry_status_.error(); \
  } while (false)

}  // namespace

void encode(const LayoutRef& layout, pb::LayoutRef* out) {
  out->set_instance(layout.instance);
  out->set_rank(layout.rank);
}

Result<pb::Operation> encode(const OpenSendRequest& request, TransferHandle handle) {
  pb::Operation operation;
  pb::OpenSendRequest* out = operation.mutable_open_send();
  out->set_client_handle(handle);
  KVFERRY_CLIENT_CHECK(put(request.key, out->mutable_transfer()));
  encode(request.layout, out->mutable_layout());
  KVFERRY_CLIENT_ASSIGN(out->set_lease_ms, wire_ms(request.lease, "lease"));
  KVFERRY_CLIENT_ASSIGN(out->set_deadline_ms, wire_ms(request.deadline, "deadline"));
  out->set_max_receivers(request.max_receivers);
  return operation;
}

Result<pb::Operation> encode(const SendRequest& request, TransferHandle handle) {
  KVFERRY_CLIENT_CHECK(check_size(request.groups));
  pb::Operation operation;
  pb::SendRequest* out = operation.mutable_send();
  out->set_client_handle(handle);
  KVFERRY_CLIENT_CHECK(put(request.key, out->mutable_transfer()));
  encode(request.layout, out->mutable_layout());
  out->set_send_index(request.index);
  out->set_num_tokens(request.num_tokens);
  out->mutable_tokens()->set_begin(request.tokens.begin);
  out->mutable_tokens()->set_end(request.tokens.end);
  for (const GroupBlocks& group : request.groups) put(group, out->add_groups());
  if (request.layers) {
    out->mutable_layers()->set_begin(request.layers->first);
    out->mutable_layers()->set_end(request.layers->second);
  }
  out->set_last(request.last);
  if (request.aux) {
    if (request.aux->size() > kMaxAuxBytes)
      return invalid("aux", "AUX_TOO_LONG", "aux has at most 65536 bytes");
    if (!request.last) return invalid("aux", "AUX_NOT_LAST", "aux rides on the last slice only");
    out->set_aux(request.aux->data(), request.aux->size());
  }
  KVFERRY_CLIENT_CHECK(put(request.ready, out->mutable_ready()));
  out->set_packed_copy(request.packed_copy);
  KVFERRY_CLIENT_ASSIGN(out->set_lease_ms, wire_ms(request.lease, "lease"));
  KVFERRY_CLIENT_ASSIGN(out->set_deadline_ms, wire_ms(request.deadline, "deadline"));
  out->set_max_receivers(request.max_receivers);
  if (request.done) put(*request.done, out->mutable_done());
  return operation;
}

Result<pb::Operation> encode(const ReceiveRequest& request, TransferHandle handle) {
  KVFERRY_CLIENT_CHECK(check_size(request.groups));
  pb::Operation operation;
  pb::ReceiveRequest* out = operation.mutable_receive();
  out->set_client_handle(handle);
  KVFERRY_CLIENT_CHECK(put(request.key, out->mutable_transfer()));
  encode(request.layout, out->mutable_layout());
  out->set_ticket(request.ticket);
  if (request.sender_dp_group) out->set_sender_dp_group(*request.sender_dp_group);
  out->set_num_tokens(request.num_tokens);
  for (const GroupBlocks& group : request.groups) put(group, out->add_groups());
  KVFERRY_CLIENT_CHECK(check_size(request.prompt_hashes));
  put(request.prompt_hashes, out);
  out->set_reuse_pin(request.reuse_pin);
  KVFERRY_CLIENT_CHECK(put(request.ready, out->mutable_ready()));
  out->set_arena_full(request.wait_for_arena ? pb::ARENA_FULL_WAIT : pb::ARENA_FULL_FAIL);
  KVFERRY_CLIENT_ASSIGN(out->set_wait_ms, wire_ms(request.wait, "wait"));
  KVFERRY_CLIENT_ASSIGN(out->set_deadline_ms, wire_ms(request.deadline, "deadline"));
  if (request.done) put(*request.done, out->mutable_done());
  return operation;
}

Result<pb::Operation> encode_claim(const ClaimRequest& request, TransferHandle handle) {
  pb::Operation operation;
  pb::ClaimRequest* out = operation.mutable_claim();
  out->set_client_handle(handle);
  KVFERRY_CLIENT_CHECK(put(request.key, out->mutable_transfer()));
  if (!request.layout.instance.empty()) encode(request.layout, out->mutable_layout());
  out->set_ticket(request.ticket);
  KVFERRY_CLIENT_ASSIGN(out->set_ttl_ms, wire_ms(request.ttl, "ttl"));
  return operation;
}

Result<pb::Operation> encode_decline(const ClaimRequest& request) {
  pb::Operation operation;
  pb::DeclineRequest* out = operation.mutable_decline();
  KVFERRY_CLIENT_CHECK(put(request.key, out->mutable_transfer()));
  if (!request.layout.instance.empty()) encode(request.layout, out->mutable_layout());
  out->set_ticket(request.ticket);
  return operation;
}

pb::Operation encode_close(TransferHandle handle) {
  pb::Operation operation;
  operation.mutable_close_transfer()->set_client_handle(handle);
  return operation;
}

pb::Operation encode_commit(std::vector<GroupCommit> groups, TransferHandle handle) {
  pb::Operation operation;
  pb::CommitReuseRequest* out = operation.mutable_commit_reuse();
  out->set_client_handle(handle);
  for (GroupCommit& group : groups) {
    auto* to = out->add_groups();
    to->set_group(group.group);
    to->set_tokens(group.tokens);
    for (std::string& hash : group.hashes) to->add_hashes(std::move(hash));
  }
  return operation;
}

Result<pb::LookupReuseRequest> encode_lookup(const LayoutRef& layout,
                                             std::span<const PromptHashes> hashes, milliseconds pin,
                                             const std::optional<Bytes16>& reuse_key) {
  KVFERRY_CLIENT_CHECK(check_size(hashes));
  pb::LookupReuseRequest out;
  encode(layout, out.mutable_layout());
  put(hashes, &out);
  KVFERRY_CLIENT_ASSIGN(out.set_pin_ms, wire_ms(pin, "pin"));
  if (reuse_key) put16(*reuse_key, out.mutable_reuse_key());
  return out;
}

Result<pb::WithdrawReuseRequest> encode_withdraw(const LayoutRef& layout,
                                                 std::span<const GroupBlocks> blocks) {
  KVFERRY_CLIENT_CHECK(check_size(blocks));
  pb::WithdrawReuseRequest out;
  encode(layout, out.mutable_layout());
  for (const GroupBlocks& group : blocks) put(group, out.add_groups());
  return out;
}

Result<pb::ReserveRequest> encode(const ReserveRequest& request) {
  pb::ReserveRequest out;
  KVFERRY_CLIENT_CHECK(put(request.key, out.mutable_transfer()));
  encode(request.layout, out.mutable_layout());
  out.set_ticket(request.ticket);
  out.set_bytes(request.bytes);
  out.set_arena_full(request.wait_for_arena ? pb::ARENA_FULL_WAIT : pb::ARENA_FULL_FAIL);
  KVFERRY_CLIENT_ASSIGN(out.set_lease_ms, wire_ms(request.lease, "lease"));
  return out;
}

pb::RegisterLayoutRequest encode(const LayoutRegistration& registration) {
  pb::RegisterLayoutRequest out;
  out.set_instance(registration.instance);
  pb::RankLayout* layout = out.mutable_layout();
  const Layout& from = registration.layout;
  layout->mutable_topology()->set_rank(from.rank);
  layout->mutable_topology()->set_rank_count(from.rank_count);
  layout->mutable_topology()->set_dp_group(from.dp_group);
  layout->set_fingerprint(from.fingerprint);
  for (const Group& group : from.groups) put(group, layout->add_groups());
  for (const PoolSpan& pool : from.pools) {
    auto* to = layout->add_pools();
    to->set_name(pool.name);
    to->set_bytes(pool.bytes);
  }
  if (registration.incarnation) put16(*registration.incarnation, out.mutable_incarnation());
  if (registration.instance_key) put16(*registration.instance_key, out.mutable_instance_key());
  if (registration.reuse_key) put16(*registration.reuse_key, out.mutable_reuse_key());
  out.set_reuse_hash_scheme(registration.reuse_hash_scheme);
  return out;
}

std::string transfer_key(Side side, const TransferKey& key, const LayoutRef& layout) {
  std::string out;
  out.reserve(64 + key.instance.size() + key.id.size() + layout.instance.size());
  const auto put_part = [&out](const char* data, std::size_t size) {
    out.append(reinterpret_cast<const char*>(&size), sizeof size).append(data, size);
  };
  out.push_back(static_cast<char>(side));
  put_part(key.instance.data(), key.instance.size());
  put_part(key.id.data(), key.id.size());
  put_part(layout.instance.data(), layout.instance.size());
  out.append(reinterpret_cast<const char*>(&layout.rank), sizeof layout.rank);
  out.append(reinterpret_cast<const char*>(key.secret.data()), key.secret.size());
  if (key.incarnation)
    out.append(reinterpret_cast<const char*>(key.incarnation->data()), key.incarnation->size());
  return out;
}

Error decode(const pb::ErrorDetail& detail) {
  return {static_cast<Code>(detail.code()), detail.reason(), detail.message(), detail.field(),
          milliseconds(detail.retry_after_ms())};
}

Bytes16 decode16(const std::string& bytes) {
  Bytes16 out{};
  if (bytes.size() == out.size()) std::memcpy(out.data(), bytes.data(), out.size());
  return out;
}

}  // namespace kvferry::client
