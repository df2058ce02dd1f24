// From the messages about pools to plain structs and back, with every check that needs no state.
// Pure functions but for the question that they are given; any thread.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/rpc/worker_backend.h"
#include "kvferry/v1/worker.pb.h"

namespace kvferry::rpc {

inline constexpr int kMaxPoolsPerCall = 64;
inline constexpr int kMaxPoolNames = 4096;  // as many as a worker may have

// INVALID_ARGUMENT NAME_INVALID.
tl::unexpected<Error> bad_name(std::string field);

// 1 to `most` names of pools; `field` is the list's.
Status check_pool_names(const google::protobuf::RepeatedPtrField<std::string>& names,
                        const std::string& field, int most);

// `check_kind` says whether a kind is taken; its error gets the field.
Result<std::vector<PoolRequest>> pools_of(const v1::RegisterPoolsRequest& request,
                                          const std::function<Status(PoolKind)>& check_kind);

void to_proto(const PoolsOutcome& outcome, v1::RegisterPoolsResponse& out);

}  // namespace kvferry::rpc
