// Errors on gRPC calls: the canonical code, a message for people, and the whole ErrorDetail in the
// trailing metadata `kvferry-error-bin`.
#pragma once

#include <grpcpp/grpcpp.h>

#include "daemon/base/result.h"
#include "kvferry/v1/worker.pb.h"

namespace kvferry::rpc {

inline constexpr char kErrorMetadata[] = "kvferry-error-bin";

inline void to_proto(const Error& error, v1::ErrorDetail& out) {
  out.set_code(static_cast<int>(error.code));
  out.set_reason(error.reason);
  out.set_field(error.field);
  out.set_message(error.message);
}

// Adds the detail to the context's trailing metadata; call once, before the call is finished.
inline grpc::Status to_status(grpc::CallbackServerContext& context, const Error& error) {
  v1::ErrorDetail detail;
  to_proto(error, detail);
  context.AddTrailingMetadata(kErrorMetadata, detail.SerializeAsString());
  return {static_cast<grpc::StatusCode>(error.code), error.to_string()};
}

}  // namespace kvferry::rpc
