// Between the public structs and the protobuf messages. Pure functions.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "kvferry/result.h"
#include "kvferry/types.h"
#include "kvferry/v1/layout.pb.h"
#include "kvferry/v1/worker.pb.h"

namespace kvferry::client {

namespace pb = ::kvferry::v1;

// A SubmitRequest has at most 8 MiB.
inline constexpr std::size_t kMaxOperationBytes = std::size_t{7} << 20;
// Beside the block ids of the same call.
inline constexpr std::size_t kMaxHashesBytes = std::size_t{2} << 20;

// INVALID_ARGUMENT naming the field for what can be seen to be wrong without the daemon: lengths of
// ids and secrets, negative times, aux that is too long, an operation beyond kMaxOperationBytes.
// op_id is left 0.
Result<pb::Operation> encode(const OpenSendRequest& request, TransferHandle handle);
Result<pb::Operation> encode(const SendRequest& request, TransferHandle handle);
Result<pb::Operation> encode(const ReceiveRequest& request, TransferHandle handle);
Result<pb::Operation> encode_claim(const ClaimRequest& request, TransferHandle handle);
Result<pb::Operation> encode_decline(const ClaimRequest& request);
pb::Operation encode_close(TransferHandle handle);
pb::Operation encode_commit(std::vector<GroupCommit> groups, TransferHandle handle);

Result<pb::LookupReuseRequest> encode_lookup(const LayoutRef& layout,
                                             std::span<const PromptHashes> hashes, milliseconds pin,
                                             const std::optional<Bytes16>& reuse_key);
Result<pb::WithdrawReuseRequest> encode_withdraw(const LayoutRef& layout,
                                                 std::span<const GroupBlocks> blocks);
Result<pb::ReserveRequest> encode(const ReserveRequest& request);
pb::RegisterLayoutRequest encode(const LayoutRegistration& registration);
void encode(const LayoutRef& layout, pb::LayoutRef* out);
// What names the transfer among those of one side: two requests mean the same one if it is equal.
std::string transfer_key(Side side, const TransferKey& key, const LayoutRef& layout);

Error decode(const pb::ErrorDetail& detail);
// Of a field that holds 16 bytes; zeros if it has another length.
Bytes16 decode16(const std::string& bytes);

}  // namespace kvferry::client
