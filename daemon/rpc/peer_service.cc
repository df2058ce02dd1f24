#include "daemon/rpc/peer_service.h"

#include <grpcpp/alarm.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>

#include <atomic>
#include <charconv>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "daemon/rpc/peer_status.h"
#include "daemon/rpc/tls_credentials.h"
#include "kvferry/v1/peer.grpc.pb.h"

namespace kvferry::rpc {
namespace {

// Of all connections together.
constexpr std::size_t kQuotaBytes = std::size_t{64} << 20;
constexpr int kQuotaThreads = 32;
constexpr int kMaxMetadataBytes = 8 << 10;

int milliseconds_of(Duration time) {
  return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(time).count());
}

// "ipv4:127.0.0.1:5000", "ipv6:[::1]:5000", with the brackets perhaps as %5B and %5D.
Caller parse_peer(const std::string& text) {
  Caller out;
  const std::size_t scheme = text.find(':');
  const std::size_t colon = text.rfind(':');
  if (scheme == std::string::npos || colon <= scheme) return out;
  std::from_chars(text.data() + colon + 1, text.data() + text.size(), out.port);
  std::string host = text.substr(scheme + 1, colon - scheme - 1);
  for (const char* bracket : {"%5B", "%5D", "[", "]"}) {
    const std::size_t at = host.find(bracket);
    if (at != std::string::npos) host.erase(at, std::string_view(bracket).size());
  }
  // Mapped addresses are what a listener for both families sees of an IPv4 peer.
  if (host.rfind("::ffff:", 0) == 0 && host.find('.') != std::string::npos) host.erase(0, 7);
  out.host = std::move(host);
  return out;
}

template <std::size_t N>
bool take(const std::string& from, std::array<uint8_t, N>& out) {
  if (from.size() != N) return false;
  std::copy(from.begin(), from.end(), out.begin());
  return true;
}
template <std::size_t N>
std::string text_of(const std::array<uint8_t, N>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), N};
}

// One call at the backend. Finishes it at the latest when the backend drops its callback, so that
// no call outlives the daemon's parts.
class Pending {
 public:
  Pending(grpc::ServerUnaryReactor* reactor, std::atomic<uint32_t>& count,
          const std::function<void(Code)>& on_answer)
      : reactor_(reactor), count_(count), on_answer_(on_answer) {}
  ~Pending() { finish({grpc::StatusCode::UNAVAILABLE, "the daemon is stopping"}); }
  Pending(const Pending&) = delete;
  Pending& operator=(const Pending&) = delete;

  // Finishes it when the time is over, unless somebody has claimed it. `self` is this object.
  void limit(const std::shared_ptr<Pending>& self, Duration time) {
    const auto until = std::chrono::system_clock::now() +
                       std::chrono::duration_cast<std::chrono::system_clock::duration>(time);
    alarm_.Set(until, [weak = std::weak_ptr(self)](bool expired) {
      const auto pending = expired ? weak.lock() : nullptr;
      if (pending == nullptr || !pending->claim()) return;
      pending->finish(peer_status({Code::kDeadlineExceeded, "TOO_SLOW", "no answer in time", {}}));
    });
  }
  // Whoever gets true must finish().
  bool claim() { return !claimed_.exchange(true); }
  void finish(const grpc::Status& status) {
    if (finished_.exchange(true)) return;
    count_.fetch_sub(1);
    if (on_answer_) on_answer_(static_cast<Code>(status.error_code()));
    reactor_->Finish(status);
  }

 private:
  grpc::ServerUnaryReactor* const reactor_;
  std::atomic<uint32_t>& count_;
  const std::function<void(Code)>& on_answer_;
  std::atomic<bool> claimed_{false};
  std::atomic<bool> finished_{false};
  grpc::Alarm alarm_;
};

class Service final : public v1::PeerService::CallbackService {
 public:
  Service(PeerBackend& backend, const PeerServerConfig& config)
      : backend_(backend), config_(config), tls_(config.tls != nullptr) {}

  grpc::ServerUnaryReactor* Challenge(grpc::CallbackServerContext* context,
                                      const v1::ChallengeRequest* request,
                                      v1::ChallengeResponse* response) override {
    auto* reactor = context->DefaultReactor();
    auto pending = begin(reactor);
    if (!pending || !small(*request, *pending)) return reactor;
    backend_.challenge(caller_of(*context), [pending, response](Result<Random32> random) {
      if (!pending->claim()) return;
      if (random) response->set_challenge(text_of(*random));
      pending->finish(random ? grpc::Status::OK : peer_status(random.error()));
    });
    return reactor;
  }

  grpc::ServerUnaryReactor* Handshake(grpc::CallbackServerContext* context,
                                      const v1::HandshakeRequest* request,
                                      v1::HandshakeResponse* response) override {
    auto* reactor = context->DefaultReactor();
    auto pending = begin(reactor);
    if (!pending || !small(*request, *pending)) return reactor;
    SignedHello hello;
    hello.bytes = request->hello();
    if (!take(request->tag(), hello.tag)) {
      pending->finish(bad_shape());
      return reactor;
    }
    backend_.handshake(caller_of(*context), std::move(hello),
                       [pending, response](Result<SignedHello> answer) {
                         if (!pending->claim()) return;
                         if (answer) {
                           response->set_hello(std::move(answer->bytes));
                           response->set_tag(text_of(answer->tag));
                         }
                         pending->finish(answer ? grpc::Status::OK : peer_status(answer.error()));
                       });
    return reactor;
  }

  grpc::ServerUnaryReactor* GetCards(grpc::CallbackServerContext* context,
                                     const v1::LinkRequest* request,
                                     v1::LinkResponse* response) override {
    return link_call(context, LinkMethod::kGetCards, *request, response);
  }
  grpc::ServerUnaryReactor* ReopenLane(grpc::CallbackServerContext* context,
                                       const v1::LinkRequest* request,
                                       v1::LinkResponse* response) override {
    return link_call(context, LinkMethod::kReopenLane, *request, response);
  }
  grpc::ServerUnaryReactor* LaneDown(grpc::CallbackServerContext* context,
                                     const v1::LinkRequest* request,
                                     v1::LinkResponse* response) override {
    return link_call(context, LinkMethod::kLaneDown, *request, response);
  }
  grpc::ServerUnaryReactor* CloseLink(grpc::CallbackServerContext* context,
                                      const v1::LinkRequest* request,
                                      v1::LinkResponse* response) override {
    return link_call(context, LinkMethod::kCloseLink, *request, response);
  }
  grpc::ServerUnaryReactor* JoinForward(grpc::CallbackServerContext* context,
                                        const v1::LinkRequest* request,
                                        v1::LinkResponse* response) override {
    return link_call(context, LinkMethod::kJoinForward, *request, response);
  }
  grpc::ServerUnaryReactor* GetArenas(grpc::CallbackServerContext* context,
                                      const v1::LinkRequest* request,
                                      v1::LinkResponse* response) override {
    return link_call(context, LinkMethod::kGetArenas, *request, response);
  }
  grpc::ServerUnaryReactor* GetTrace(grpc::CallbackServerContext* context,
                                     const v1::LinkRequest* request,
                                     v1::LinkResponse* response) override {
    return link_call(context, LinkMethod::kGetTrace, *request, response);
  }

 private:
  // Null, with the call finished, when too much is waiting.
  std::shared_ptr<Pending> begin(grpc::ServerUnaryReactor* reactor) {
    if (pending_.fetch_add(1) >= config_.max_pending) {
      pending_.fetch_sub(1);
      if (config_.on_answer) config_.on_answer(Code::kResourceExhausted);
      reactor->Finish(
          peer_status({Code::kResourceExhausted, "BUSY", "too many calls at a time", {}}));
      return nullptr;
    }
    auto pending = std::make_shared<Pending>(reactor, pending_, config_.on_answer);
    pending->limit(pending, config_.call_limit);
    return pending;
  }

  // Of who has no link yet; else the call is finished.
  bool small(const google::protobuf::Message& request, Pending& pending) const {
    if (request.ByteSizeLong() <= config_.max_hello_bytes) return true;
    if (pending.claim())
      pending.finish(peer_status(
          {Code::kResourceExhausted, "MESSAGE_TOO_LARGE", "too large for who has no link", {}}));
    return false;
  }

  Caller caller_of(const grpc::CallbackServerContext& context) const {
    Caller caller = parse_peer(context.peer());
    if (tls_) caller.certificate = shown_certificate(*context.auth_context());
    return caller;
  }

  static grpc::Status bad_shape() {
    return peer_status(
        {Code::kInvalidArgument, "BAD_MESSAGE", "a message that no daemon sends", {}});
  }

  grpc::ServerUnaryReactor* link_call(grpc::CallbackServerContext* context, LinkMethod method,
                                      const v1::LinkRequest& request, v1::LinkResponse* response) {
    auto* reactor = context->DefaultReactor();
    auto pending = begin(reactor);
    if (!pending) return reactor;
    LinkCall call;
    call.number = request.number();
    call.body = request.body();
    if (!take(request.link(), call.link) || !take(request.tag(), call.tag)) {
      pending->finish(bad_shape());
      return reactor;
    }
    backend_.call(caller_of(*context), method, std::move(call),
                  [pending, response](Result<LinkReply> reply) {
                    if (!pending->claim()) return;
                    if (reply) {
                      response->set_body(std::move(reply->body));
                      response->set_tag(text_of(reply->tag));
                    }
                    pending->finish(reply ? grpc::Status::OK : peer_status(reply.error()));
                  });
    return reactor;
  }

  PeerBackend& backend_;
  const PeerServerConfig config_;
  const bool tls_;
  std::atomic<uint32_t> pending_{0};
};

// Of this process's servers only this one is for strangers. gRPC adds to each of them what others
// are given: its reflection by being linked, health by a switch for all.
class NothingElse final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments* arguments) override {
    arguments->SetPointer(grpc::kHealthCheckServiceInterfaceArg, nullptr);
  }
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->clear();
  }
};

}  // namespace

class PeerServer::Impl {
 public:
  Impl(PeerBackend& backend, const PeerServerConfig& config) : service(backend, config) {}

  Service service;
  std::shared_ptr<grpc::ServerCredentials> credentials;
  std::unique_ptr<grpc::Server> server;
  int port = 0;
  std::atomic<bool> stopped{false};
};

PeerServer::PeerServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Result<std::unique_ptr<PeerServer>> PeerServer::start(const PeerServerConfig& config,
                                                      PeerBackend& backend) {
  auto impl = std::make_unique<Impl>(backend, config);
  grpc::ServerBuilder builder;
  impl->credentials = config.tls == nullptr ? grpc::InsecureServerCredentials()
                                            : tls_server_credentials(config.tls);
  builder.AddListeningPort(config.listen, impl->credentials, &impl->port);
  builder.RegisterService(&impl->service);
  builder.SetOption(std::make_unique<NothingElse>());
  builder.SetMaxReceiveMessageSize(config.max_message_bytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, config.max_streams);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS,
                             milliseconds_of(config.connect_limit));
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, milliseconds_of(config.idle_limit));
  // Two daemons on one port would take turns in answering.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  grpc::ResourceQuota quota("peers");
  quota.Resize(kQuotaBytes);
  quota.SetMaxThreads(kQuotaThreads);
  builder.SetResourceQuota(quota);
  impl->server = builder.BuildAndStart();
  if (impl->server == nullptr || impl->port == 0)
    return fail(Code::kUnavailable, "LISTEN_FAILED", "cannot listen for peers on " + config.listen,
                "peer.listen");
  return std::unique_ptr<PeerServer>(new PeerServer(std::move(impl)));
}

PeerServer::~PeerServer() {
  shutdown(monotonic_now() + std::chrono::seconds(1));
}

uint16_t PeerServer::port() const {
  return static_cast<uint16_t>(impl_->port);
}

void PeerServer::shutdown(Time deadline) {
  if (impl_->stopped.exchange(true)) return;
  const Duration left = deadline - monotonic_now();
  impl_->server->Shutdown(
      gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                   gpr_time_from_nanos(left.count() > 0 ? left.count() : 0, GPR_TIMESPAN)));
  impl_->server->Wait();
}

}  // namespace kvferry::rpc
