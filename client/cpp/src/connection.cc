#include "client/cpp/src/connection.h"

#include <utility>

namespace kvferry::client {

Connection::Connection(std::shared_ptr<Attachment> to) : attachment(std::move(to)) {
  grpc::ChannelArguments arguments;
  // The encoded socket path that would stand here otherwise is refused by other gRPC servers.
  arguments.SetString(GRPC_ARG_DEFAULT_AUTHORITY, "localhost");
  // Never a connection of another client of this process: it would outlive its daemon.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1);
  // Answers are small, and each would be followed by a ping to measure a socket of this host.
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  channel = grpc::CreateCustomChannel("unix:" + attachment->grpc_path(),
                                      grpc::InsecureChannelCredentials(), arguments);
  stub = pb::WorkerService::NewStub(channel);
}

void Connection::authenticate(grpc::ClientContext& context) const {
  context.AddMetadata("kvferry-token-bin", attachment->token());
}

Error Connection::error_of(const grpc::ClientContext& context, const grpc::Status& status) {
  const auto& metadata = context.GetServerTrailingMetadata();
  const auto it = metadata.find("kvferry-error-bin");
  pb::ErrorDetail detail;
  if (it != metadata.end() &&
      detail.ParseFromArray(it->second.data(), static_cast<int>(it->second.length())))
    return decode(detail);
  std::string reason = "RPC_FAILED";
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) reason = "CALL_TIMEOUT";
  if (status.error_code() == grpc::StatusCode::UNAVAILABLE) reason = "DAEMON_UNREACHABLE";
  return {
      static_cast<Code>(status.error_code()), std::move(reason), status.error_message(), {}, {}};
}

}  // namespace kvferry::client
