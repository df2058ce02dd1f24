// From the messages of worker.proto to the engine's operations: everything about a request that can
// be checked without the engine's state is checked here, with an error that names the field as the
// message spells it. Pure functions over a request and the caller's own registered layout.
#pragma once

#include <cstdint>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/engine/events.h"
#include "daemon/rpc/worker_backend.h"
#include "kvferry/v1/worker.pb.h"

namespace kvferry::rpc {

// Defaults and maxima of the configuration.
struct OpLimits {
  Duration lease = std::chrono::seconds(30);
  Duration lease_max = std::chrono::minutes(10);
  Duration wait = std::chrono::seconds(30);
  Duration wait_max = std::chrono::minutes(10);
  Duration deadline = std::chrono::seconds(60);
  Duration deadline_max = std::chrono::minutes(30);
  uint32_t max_receivers = 64;
  uint32_t timeline_words = 1024;
  uint32_t done_words = 1024;
  bool cuda_events = false;  // a GPU is there to look at them
};

inline constexpr std::size_t kMaxAuxBytes = 64 * 1024;
inline constexpr std::size_t kMaxTransferIdBytes = 64;
inline constexpr std::size_t kMaxBlocks = 1U << 20;
inline constexpr std::size_t kMaxTicketBytes = 512;
inline constexpr std::size_t kMaxHashBytes = 32;
inline constexpr uint32_t kMaxPinMs = 1000;
inline constexpr std::size_t kMaxHashSchemeBytes = 64;
inline constexpr uint64_t kMaxTokens = uint64_t{1} << 40;

// The error with its field as the messages spell it: the mapping library and the engine name their
// own members ("groups[0].planes[1].offset", "transfer.id"), a caller knows only the message's.
Error as_spelled(Error error);

// UNIMPLEMENTED FEATURE_NOT_SERVED naming the field whose feature this build does not serve.
tl::unexpected<Error> not_served(std::string field, std::string_view feature);

Result<engine::OpenSendOp> to_open_send(const v1::OpenSendRequest& request,
                                        const LayoutView& layout, const OpLimits& limits);
Result<engine::SendOp> to_send(const v1::SendRequest& request, const LayoutView& layout,
                               const OpLimits& limits);
// `ticket`: what the request's ticket says.
Result<engine::ReceiveOp> to_receive(const v1::ReceiveRequest& request, const LayoutView& layout,
                                     const TicketFacts& ticket, const OpLimits& limits);
Result<engine::ClaimOp> to_claim(const v1::ClaimRequest& request, const LayoutView& layout,
                                 const TicketFacts& ticket, const OpLimits& limits);
Result<engine::DeclineOp> to_decline(const v1::DeclineRequest& request, const LayoutView& layout,
                                     const TicketFacts& ticket);
Result<engine::ReserveOp> to_reserve(const v1::ReserveRequest& request, const LayoutView& layout,
                                     const TicketFacts& ticket, const OpLimits& limits);
Result<engine::CommitReuseOp> to_commit_reuse(const v1::CommitReuseRequest& request);
Result<engine::LookupReuseOp> to_lookup_reuse(const v1::LookupReuseRequest& request,
                                              const LayoutView& layout);
Result<engine::WithdrawReuseOp> to_withdraw_reuse(const v1::WithdrawReuseRequest& request,
                                                  const LayoutView& layout);

void to_proto(const engine::Reply::Receiver& receiver, v1::GetReceiverNeedsResponse::Receiver& out);
void to_proto(const ResolveOutcome& outcome, v1::ResolveResponse& out);

// A handle that is not 0.
Status check_handle(uint64_t client_handle);
// At most 64 printable characters without spaces.
Status check_hash_scheme(const std::string& scheme);
// 1 to 512 printable bytes.
Status check_ticket_text(const std::string& ticket);

}  // namespace kvferry::rpc
