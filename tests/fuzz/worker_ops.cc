// Workers' messages on the way to the engine: the first byte chooses the message, the rest is its
// protobuf. What is taken is what the engine counts on: ranges in order, bounded, of groups there
// are.
#include "daemon/rpc/worker_ops.h"

#include "daemon/mapping/tokens.h"
#include "daemon/mapping/validate.h"
#include "daemon/rpc/layout_proto.h"
#include "daemon/rpc/pool_messages.h"
#include "daemon/rpc/quiet_parser.h"
#include "tests/fuzz/input.h"
#include "tests/proc/bad_input_rows.h"

namespace {

using namespace kvferry;

// That of the tables of wrong requests: groups of tokens, of state and of tokens in shared storage.
mapping::RankLayout make_layout() {
  const auto layout = rpc::from_proto(bad_input::good_layout());
  FUZZ_CHECK(layout && mapping::validate_layout(*layout), "the layout is a valid one");
  return *layout;
}

struct Registered {
  mapping::RankLayout layout = make_layout();
  std::shared_ptr<engine::LayoutHandle> handle = std::make_shared<engine::LayoutHandle>();
  Registered() {
    handle->instance = std::string("default/") + bad_input::kInstance;
    handle->incarnation.bytes.fill(7);
  }
  rpc::LayoutView view() const { return {handle, &layout}; }
  rpc::TicketFacts ticket() const { return {handle->instance, handle->incarnation}; }
};

void check_ranges(const std::vector<Range>& ranges) {
  FUZZ_CHECK(ranges.size() <= 4096, "ranges are bounded");
  for (std::size_t i = 0; i < ranges.size(); ++i)
    FUZZ_CHECK(ranges[i].begin < ranges[i].end && (i == 0 || ranges[i - 1].end < ranges[i].begin),
               "ranges ascend and do not touch");
}

void check_key(const engine::TransferKey& key) {
  FUZZ_CHECK(!key.id.empty() && key.id.size() <= rpc::kMaxTransferIdBytes, "an id has a size");
  FUZZ_CHECK(key.instance.find('/') != std::string::npos, "an instance has a tenant");
}

const Registered& registered() {
  static const Registered one;
  return one;
}

void check(const engine::OpenSendOp& op) {
  check_key(op.key);
  FUZZ_CHECK(op.lease > Duration::zero() && op.deadline > Duration::zero() && op.max_receivers > 0,
             "every wait is finite");
}
void check(const engine::SendOp& op) {
  check_key(op.key);
  FUZZ_CHECK(op.lease > Duration::zero() && op.deadline > Duration::zero(), "every wait is finite");
  FUZZ_CHECK(!op.aux || op.aux->size() <= rpc::kMaxAuxBytes, "aux is bounded");
  for (const auto& group : op.offer) {
    FUZZ_CHECK(group.group < registered().layout.groups.size(), "a group there is");
    check_ranges(group.ranges);
  }
  FUZZ_CHECK(
      mapping::validate_offer(mapping::holding_of(registered().layout), op.offer).has_value(),
      "a peer takes the offer");
}
void check(const engine::ReceiveOp& op) {
  check_key(op.key);
  FUZZ_CHECK(op.wait > Duration::zero() && op.deadline > Duration::zero(), "every wait is finite");
  for (const auto& need : op.needs) check_ranges(need.ranges);
  FUZZ_CHECK(
      mapping::validate_needs(mapping::holding_of(registered().layout), op.needs).has_value(),
      "a peer takes the needs");
}
void check(const engine::ClaimOp& op) {
  check_key(op.key);
}
void check(const engine::DeclineOp& op) {
  check_key(op.key);
}
void check(const engine::ReserveOp& op) {
  check_key(op.key);
  FUZZ_CHECK(op.lease > Duration::zero(), "every wait is finite");
}
void check_hashes(const std::vector<std::string>& hashes) {
  for (const std::string& hash : hashes)
    FUZZ_CHECK(!hash.empty() && hash.size() <= rpc::kMaxHashBytes, "a hash has a size");
}
void check(const engine::CommitReuseOp& op) {
  for (const auto& group : op.groups) check_hashes(group.hashes);
}
void check(const engine::LookupReuseOp& op) {
  for (const auto& prompt : op.hashes) check_hashes(prompt.hashes);
  FUZZ_CHECK(op.pin >= Duration::zero() && op.pin <= std::chrono::milliseconds(rpc::kMaxPinMs),
             "a pin is short");
}
void check(const engine::WithdrawReuseOp& op) {
  for (const auto& group : op.groups)
    FUZZ_CHECK(group.group < registered().layout.groups.size(), "a group there is");
}

template <typename Request, typename Convert>
void convert(std::span<const uint8_t> bytes, Convert&& to) {
  Request request;
  if (!request.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return;
  const auto op = to(request);
  if (op)
    check(*op);
  else
    FUZZ_CHECK(!op.error().reason.empty() && !op.error().field.empty(), "what is wrong has a name");
}

void pools(std::span<const uint8_t> bytes) {
  v1::RegisterPoolsRequest request;
  if (!request.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return;
  const auto read = rpc::pools_of(request, [](rpc::PoolKind) -> Status { return {}; });
  if (!read) return;
  FUZZ_CHECK(read->size() <= rpc::kMaxPoolsPerCall, "pools of a call are bounded");
  for (const auto& pool : *read)
    FUZZ_CHECK(rpc::valid_name(pool.name) && pool.bytes > 0, "a pool has a name and bytes");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  [[maybe_unused]] static const bool quiet = (kvferry::rpc::quiet_parser(), true);
  const Registered& of = registered();
  const rpc::OpLimits limits;
  fuzz::Input in(data, size);
  const uint32_t kind = in.below(10);
  const auto bytes = in.rest();
  switch (kind) {
    case 0:
      convert<v1::OpenSendRequest>(
          bytes, [&](const auto& r) { return rpc::to_open_send(r, of.view(), limits); });
      break;
    case 1:
      convert<v1::SendRequest>(bytes,
                               [&](const auto& r) { return rpc::to_send(r, of.view(), limits); });
      break;
    case 2:
      convert<v1::ReceiveRequest>(
          bytes, [&](const auto& r) { return rpc::to_receive(r, of.view(), of.ticket(), limits); });
      break;
    case 3:
      convert<v1::ClaimRequest>(
          bytes, [&](const auto& r) { return rpc::to_claim(r, of.view(), of.ticket(), limits); });
      break;
    case 4:
      convert<v1::DeclineRequest>(
          bytes, [&](const auto& r) { return rpc::to_decline(r, of.view(), of.ticket()); });
      break;
    case 5:
      convert<v1::ReserveRequest>(
          bytes, [&](const auto& r) { return rpc::to_reserve(r, of.view(), of.ticket(), limits); });
      break;
    case 6:
      convert<v1::CommitReuseRequest>(bytes,
                                      [&](const auto& r) { return rpc::to_commit_reuse(r); });
      break;
    case 7:
      convert<v1::LookupReuseRequest>(
          bytes, [&](const auto& r) { return rpc::to_lookup_reuse(r, of.view()); });
      break;
    case 8:
      convert<v1::WithdrawReuseRequest>(
          bytes, [&](const auto& r) { return rpc::to_withdraw_reuse(r, of.view()); });
      break;
    default:
      pools(bytes);
  }
  return 0;
}
