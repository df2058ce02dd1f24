// Errors of the peer service as gRPC statuses: code and message as they are, reason and field in
// the details. Pure functions, any thread.
#pragma once

#include <grpcpp/support/status.h>

#include <string>

#include "daemon/base/result.h"
#include "kvferry/v1/peer.pb.h"

namespace kvferry::rpc {

inline grpc::Status peer_status(const Error& error) {
  v1::PeerError details;
  details.set_reason(error.reason);
  details.set_field(error.field);
  return {static_cast<grpc::StatusCode>(error.code), error.message, details.SerializeAsString()};
}

// What the peer's backend said, or what the transport itself found.
inline Error peer_error(const grpc::Status& status) {
  constexpr std::size_t kMost = 1024;  // a peer's words end up in logs
  Error error;
  error.code = static_cast<Code>(status.error_code());
  error.message = status.error_message().substr(0, kMost);
  v1::PeerError details;
  if (!status.error_details().empty() && status.error_details().size() <= kMost &&
      details.ParseFromString(status.error_details())) {
    error.reason = details.reason();
    error.field = details.field();
  } else if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) {
    error.reason = "PEER_TIMEOUT";
  } else {
    // Also what only a foreign server would answer, such as UNIMPLEMENTED.
    error.code = status.error_code() == grpc::StatusCode::UNIMPLEMENTED ? Code::kUnimplemented
                                                                        : Code::kUnavailable;
    error.reason = "PEER_UNREACHABLE";
  }
  return error;
}

}  // namespace kvferry::rpc
