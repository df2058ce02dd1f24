// One attachment together with its gRPC channel: what calls are made on. Immutable; any thread.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <memory>
#include <string>

#include "client/cpp/src/attachment.h"
#include "client/cpp/src/encode.h"
#include "kvferry/v1/worker.grpc.pb.h"

namespace kvferry::client {

struct Connection {
  explicit Connection(std::shared_ptr<Attachment> to);

  std::shared_ptr<Attachment> attachment;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<pb::WorkerService::Stub> stub;

  // The token that every call carries.
  void authenticate(grpc::ClientContext& context) const;

  // A unary call; blocks at most for `timeout`.
  template <typename Request, typename Response>
  Result<Response> call(grpc::Status (pb::WorkerService::Stub::*method)(grpc::ClientContext*,
                                                                        const Request&, Response*),
                        const Request& request, milliseconds timeout) const {
    grpc::ClientContext context;
    authenticate(context);
    context.set_deadline(std::chrono::system_clock::now() + timeout);
    Response response;
    const grpc::Status status = (stub.get()->*method)(&context, request, &response);
    if (!status.ok()) return error_of(context, status);
    return response;
  }

  static Error error_of(const grpc::ClientContext& context, const grpc::Status& status);
};

}  // namespace kvferry::client
