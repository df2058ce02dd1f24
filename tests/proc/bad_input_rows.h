// Wrong requests as tables: a good request, and rows that spoil one thing of it each, with the
// error that must come. The unit test runs them against the conversions, the process test sends
// them to a daemon.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "kvferry/v1/worker.pb.h"

namespace kvferry::bad_input {

template <typename Request>
struct Row {
  std::string name;  // what is wrong
  std::function<void(Request&)> spoil;
  Code code = Code::kInvalidArgument;
  std::string reason;
  std::string field;  // as the error names it
};

template <typename Request>
using Rows = std::vector<Row<Request>>;

// A field of which no value is wrong, or none that this table can tell, and why.
struct Exempt {
  std::string field;
  std::string why;
};

// One rank with groups of tokens (0), of one state a request (1), and of tokens in the storage of
// group 0 (2), all in one pool.
inline constexpr char kInstance[] = "bad-input";
inline constexpr char kPool[] = "kv";
inline constexpr uint64_t kPoolBytes = 20480;
v1::RankLayout good_layout();
Rows<v1::RankLayout> layout_rows();
// Of RankLayout.pools; a daemon that knows its pools has other words for some of them.
Rows<v1::RankLayout> pool_span_rows();
std::vector<Exempt> layout_exempt();

// Requests for that layout, with a prompt of 40 tokens. `ticket` is of its own instance.
v1::OpenSendRequest good_open_send();
v1::SendRequest good_send();
v1::ReceiveRequest good_receive(const std::string& ticket);
v1::ClaimRequest good_claim(const std::string& ticket);
v1::DeclineRequest good_decline(const std::string& ticket);
v1::ReserveRequest good_reserve(const std::string& ticket);
v1::CommitReuseRequest good_commit();
v1::LookupReuseRequest good_lookup();
v1::WithdrawReuseRequest good_withdraw();

Rows<v1::OpenSendRequest> open_send_rows();
Rows<v1::SendRequest> send_rows();
Rows<v1::ReceiveRequest> receive_rows();
Rows<v1::ClaimRequest> claim_rows();
Rows<v1::DeclineRequest> decline_rows();
Rows<v1::ReserveRequest> reserve_rows();
Rows<v1::CommitReuseRequest> commit_rows();
Rows<v1::LookupReuseRequest> lookup_rows();
Rows<v1::WithdrawReuseRequest> withdraw_rows();
// Of all of them: times, which have defaults and are cut, and what has no wrong value.
std::vector<Exempt> operation_exempt();

std::string ids(const std::vector<int32_t>& block_ids);

}  // namespace kvferry::bad_input
