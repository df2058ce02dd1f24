// What the tests of hostile local processes share: a scene with four tenants, and calls by hand.
#pragma once

#include <sys/resource.h>

#include <memory>
#include <string>
#include <vector>

#include "client/cpp/src/connection.h"
#include "tests/proc/bad_input_subject.h"
#include "tests/proc/hostile_scene.h"

namespace kvferry::testing {

using bad_input::good_pool;
using Stub = v1::WorkerService::Stub;

inline constexpr uint32_t kFewTransfers = 16;  // of a worker at the second socket

// The soft limit of descriptors that the daemons are started with; they raise it themselves.
inline constexpr rlim_t kFewDescriptors = 256;

// Lowers this process's soft limit for its own life.
class FewDescriptors {
 public:
  FewDescriptors() {
    REQUIRE(::getrlimit(RLIMIT_NOFILE, &before_) == 0);
    const rlimit few{kFewDescriptors, before_.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &few) == 0);
  }
  ~FewDescriptors() { (void)::setrlimit(RLIMIT_NOFILE, &before_); }
  FewDescriptors(const FewDescriptors&) = delete;
  FewDescriptors& operator=(const FewDescriptors&) = delete;

 private:
  rlimit before_{};
};

inline HostileScene& hostile_scene() {
  static const std::unique_ptr<HostileScene> shared = [] {
    const FewDescriptors few;
    return std::make_unique<HostileScene>(
        HostileScene::Options{{"gpu.enabled=off"},
                              "[[socket]]\npath = \"NAME.other\"\ntenant = \"other\"\n"
                              "worker_limits.max_transfers = 16\n"
                              "worker_limits.max_pool_bytes = \"1MiB\"\n"
                              "worker_limits.max_descriptors = 20\n"
                              "[[socket]]\npath = \"NAME.crowd\"\ntenant = \"crowd\"\n"
                              "limits.max_workers = 3\nlimits.max_transfers = 5\n"
                              "limits.max_pools = 4\nlimits.max_pool_bytes = \"2MiB\"\n"
                              "limits.max_descriptors = 6\n"
                              "limits.max_claims = 3\nlimits.max_reservations = 2\n"
                              "[[socket]]\npath = \"NAME.listed\"\ntenant = \"listed\"\n"
                              "mode = \"0666\"\nuids = [12346, 12347]\n"});
  }();
  return *shared;
}
// Its workers have small limits together.
inline std::string crowd_socket() {
  return hostile_scene().path("sender.crowd");
}
inline std::string other_socket() {
  return hostile_scene().path("sender.other");
}

inline client::Result<std::unique_ptr<client::Connection>> attach(const std::string& socket,
                                                                  const std::string& name) {
  client::AttachOptions options;
  options.socket = socket;
  options.name = name;
  options.attach_timeout = kPatience;
  auto attachment = client::Attachment::connect(options);
  if (!attachment) return attachment.error();
  return std::make_unique<client::Connection>(std::move(*attachment));
}

inline std::unique_ptr<client::Connection> attached(const std::string& socket,
                                                    const std::string& name) {
  auto connection = attach(socket, name);
  require_ok(connection);
  return std::move(*connection);
}

inline client::Status send_pool(const client::Connection& worker, const std::string& name, int fd,
                                uint64_t bytes) {
  return worker.attachment->send_pools(
      std::vector<client::PoolToSend>{{name, lifeline::PoolKind::kHostShm, bytes, fd}},
      std::chrono::steady_clock::now() + kPatience);
}

template <typename Request, typename Response>
Response good(const client::Connection& worker,
              grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
              const Request& request) {
  auto answer = worker.call(method, request, kPatience);
  require_ok(answer);
  return std::move(*answer);
}
// The reason of a call that is refused.
template <typename Request, typename Response>
std::string refused(const client::Connection& worker,
                    grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                    const Request& request) {
  const auto answer = worker.call(method, request, kPatience);
  return answer ? "" : answer.error().reason;
}

template <typename Request>
Request with_handle(uint64_t handle) {
  Request request;
  request.set_client_handle(handle);
  return request;
}

}  // namespace kvferry::testing
