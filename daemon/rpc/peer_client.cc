#include "daemon/rpc/peer_client.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <set>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/base/mutex.h"
#include "daemon/rpc/peer_status.h"
#include "daemon/rpc/tls_credentials.h"
#include "kvferry/v1/peer.grpc.pb.h"

namespace kvferry::rpc {
namespace {

constexpr int kMaxMessageBytes = 4 << 20;

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

tl::unexpected<Error> bad_answer() {
  return fail(Code::kUnavailable, "BAD_MESSAGE", "the peer's answer is none of this protocol");
}

// Where the transport alone knows what is wrong, in gRPC's and OpenSSL's words. Only how well an
// operator is told depends on them.
Error explain(Error error, bool tls, const std::optional<Error>& refused) {
  if (error.reason != "PEER_UNREACHABLE") return error;
  if (refused) return *refused;
  const auto says = [&](std::string_view words) {
    return error.message.find(words) != std::string::npos;
  };
  if (tls && says("certificate verify failed"))
    return {
        Code::kPermissionDenied,
        "PEER_CERTIFICATE",
        "the peer's certificate does not lead to peer.ca_file or is out of date: " + error.message,
        {}};
  if (tls && says("wrong version number"))
    return {Code::kFailedPrecondition,
            "PEER_MODE",
            "the peer speaks no TLS: its peer.mode is plain, and here it is to be mtls: " +
                error.message,
            {}};
  if (says("losed") || says("reset by peer"))
    error.message += tls ? " (perhaps the peer does not take this node's certificate: its log "
                           "tells)"
                         : " (perhaps the peer's peer.mode is mtls, and here it is to be plain)";
  return error;
}

// Channels to a peer, one after another: with TLS a new one for what this node shows and believes
// now.
class Channels {
 public:
  using Stub = v1::PeerService::Stub;

  Channels(const PeerEndpoint& endpoint, std::shared_ptr<const PeerTls> tls)
      : target_(target_of(endpoint)),
        tls_(std::move(tls)),
        server_(std::make_shared<ServerIdentity>(endpoint.identities)) {}

  std::shared_ptr<Stub> now() {
    MutexLock lock(mutex_);
    const auto material = tls_ == nullptr ? nullptr : tls_->material();
    if (stub_ == nullptr || material != material_) {
      stub_ = v1::PeerService::NewStub(make(material.get()));
      material_ = material;
    }
    return stub_;
  }
  Error error_of(const grpc::Status& status) const {
    return explain(peer_error(status), tls_ != nullptr, server_->refused());
  }
  std::optional<PeerCertificate> certificate() const { return server_->shown(); }

 private:
  static std::string target_of(const PeerEndpoint& endpoint) {
    const bool v4 = endpoint.host.find(':') == std::string::npos;
    return (v4 ? "ipv4:" + endpoint.host : "ipv6:[" + endpoint.host + "]") + ":" +
           std::to_string(endpoint.port);
  }
  std::shared_ptr<grpc::Channel> make(const TlsMaterial* material) const {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
    // Despite its name no back-off: how long a connection with its TLS handshake may take.
    arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5000);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
    // Each dial starts afresh instead of sitting out the back-off of the one before.
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    // A proxy of the environment is not where the peer was allowed to be.
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    arguments.SetString(GRPC_ARG_SERVICE_CONFIG, "{}");
    return grpc::CreateCustomChannel(target_,
                                     material == nullptr
                                         ? grpc::InsecureChannelCredentials()
                                         : tls_channel_credentials(*material, server_),
                                     arguments);
  }

  const std::string target_;
  const std::shared_ptr<const PeerTls> tls_;  // null: without TLS
  const std::shared_ptr<ServerIdentity> server_;
  Mutex mutex_;
  std::shared_ptr<const TlsMaterial> material_ KVFERRY_GUARDED_BY(mutex_);
  std::shared_ptr<Stub> stub_ KVFERRY_GUARDED_BY(mutex_);
};

// The calls of a dialer that are under way. A call is over when all that it held is gone, channel
// included.
class CallsUnderWay {
 public:
  void begin(grpc::ClientContext* context) {
    MutexLock lock(mutex_);
    ++count_;
    contexts_.insert(context);
    if (stopped_) context->TryCancel();
  }
  // Before the context goes.
  void leave(grpc::ClientContext* context) {
    MutexLock lock(mutex_);
    contexts_.erase(context);
  }
  void end() {
    MutexLock lock(mutex_);
    if (--count_ == 0) none_left_.notify_all();
  }
  void stop(Time deadline) {
    MutexLock lock(mutex_);
    while (count_ != 0 && none_left_.wait_until(mutex_, deadline)) {
    }
    stopped_ = true;
    for (grpc::ClientContext* context : contexts_) context->TryCancel();
    while (count_ != 0) none_left_.wait(mutex_);
  }

 private:
  Mutex mutex_;
  CondVar none_left_;
  bool stopped_ KVFERRY_GUARDED_BY(mutex_) = false;
  std::size_t count_ KVFERRY_GUARDED_BY(mutex_) = 0;
  std::set<grpc::ClientContext*> contexts_ KVFERRY_GUARDED_BY(mutex_);
};

// A call under way; kept alive by its callback, which must let it go last.
template <typename Request, typename Response>
struct Call {
  // The last member to go tells that the others have.
  struct End {
    std::shared_ptr<CallsUnderWay> calls;
    ~End() { calls->end(); }
  };
  const End end;
  const std::shared_ptr<Channels> channels;
  const std::shared_ptr<Channels::Stub> stub;
  grpc::ClientContext context;
  Request request;
  Response response;

  Call(Time deadline, std::shared_ptr<CallsUnderWay> calls, std::shared_ptr<Channels> channels_in)
      : end{std::move(calls)}, channels(std::move(channels_in)), stub(channels->now()) {
    const Duration left = deadline - monotonic_now();
    context.set_deadline(
        gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                     gpr_time_from_nanos(left.count() > 0 ? left.count() : 0, GPR_TIMESPAN)));
    end.calls->begin(&context);
  }
  ~Call() { end.calls->leave(&context); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

class GrpcPeerStub final : public PeerStub {
 public:
  GrpcPeerStub(const PeerEndpoint& endpoint, std::shared_ptr<const PeerTls> tls,
               std::shared_ptr<CallsUnderWay> calls)
      : calls_(std::move(calls)), channels_(std::make_shared<Channels>(endpoint, std::move(tls))) {}

  std::optional<PeerCertificate> certificate() const override { return channels_->certificate(); }

  void challenge(Time deadline, std::function<void(Result<Random32>)> done) override {
    auto call = begin<v1::ChallengeRequest, v1::ChallengeResponse>(deadline);
    call->stub->async()->Challenge(
        &call->context, &call->request, &call->response,
        [call, done = std::move(done)](const grpc::Status& status) {
          Random32 random{};
          if (!status.ok()) return done(tl::unexpected<Error>(call->channels->error_of(status)));
          if (!take(call->response.challenge(), random)) return done(bad_answer());
          done(random);
        });
  }

  void handshake(SignedHello hello, Time deadline,
                 std::function<void(Result<SignedHello>)> done) override {
    auto call = begin<v1::HandshakeRequest, v1::HandshakeResponse>(deadline);
    call->request.set_hello(std::move(hello.bytes));
    call->request.set_tag(text_of(hello.tag));
    call->stub->async()->Handshake(
        &call->context, &call->request, &call->response,
        [call, done = std::move(done)](const grpc::Status& status) {
          SignedHello answer;
          if (!status.ok()) return done(tl::unexpected<Error>(call->channels->error_of(status)));
          if (!take(call->response.tag(), answer.tag)) return done(bad_answer());
          answer.bytes = std::move(*call->response.mutable_hello());
          done(std::move(answer));
        });
  }

  void call(LinkMethod method, LinkCall link_call, Time deadline,
            std::function<void(Result<LinkReply>)> done) override {
    auto call = begin<v1::LinkRequest, v1::LinkResponse>(deadline);
    call->request.set_link(text_of(link_call.link));
    call->request.set_number(link_call.number);
    call->request.set_body(std::move(link_call.body));
    call->request.set_tag(text_of(link_call.tag));
    auto finish = [call, done = std::move(done)](const grpc::Status& status) {
      LinkReply reply;
      if (!status.ok()) return done(tl::unexpected<Error>(call->channels->error_of(status)));
      if (!take(call->response.tag(), reply.tag)) return done(bad_answer());
      reply.body = std::move(*call->response.mutable_body());
      done(std::move(reply));
    };
    auto* async = call->stub->async();
    switch (method) {
      case LinkMethod::kGetCards:
        return async->GetCards(&call->context, &call->request, &call->response, std::move(finish));
      case LinkMethod::kReopenLane:
        return async->ReopenLane(&call->context, &call->request, &call->response,
                                 std::move(finish));
      case LinkMethod::kLaneDown:
        return async->LaneDown(&call->context, &call->request, &call->response, std::move(finish));
      case LinkMethod::kCloseLink:
        return async->CloseLink(&call->context, &call->request, &call->response, std::move(finish));
      case LinkMethod::kJoinForward:
        return async->JoinForward(&call->context, &call->request, &call->response,
                                  std::move(finish));
      case LinkMethod::kGetArenas:
        return async->GetArenas(&call->context, &call->request, &call->response, std::move(finish));
      case LinkMethod::kGetTrace:
        return async->GetTrace(&call->context, &call->request, &call->response, std::move(finish));
    }
    finish(grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "no such method"));
  }

 private:
  template <typename Request, typename Response>
  std::shared_ptr<Call<Request, Response>> begin(Time deadline) {
    return std::make_shared<Call<Request, Response>>(deadline, calls_, channels_);
  }

  const std::shared_ptr<CallsUnderWay> calls_;
  const std::shared_ptr<Channels> channels_;
};

class GrpcPeerDialer final : public PeerDialer {
 public:
  explicit GrpcPeerDialer(std::shared_ptr<const PeerTls> tls) : tls_(std::move(tls)) {}

  std::shared_ptr<PeerStub> dial(const PeerEndpoint& endpoint) override {
    const bool plain = endpoint.identities.empty();
    KVFERRY_CHECK(plain || tls_ != nullptr, "peers of mode mtls need a certificate");
    return std::make_shared<GrpcPeerStub>(endpoint, plain ? nullptr : tls_, calls_);
  }
  void stop(Time deadline) override { calls_->stop(deadline); }

 private:
  const std::shared_ptr<const PeerTls> tls_;
  const std::shared_ptr<CallsUnderWay> calls_ = std::make_shared<CallsUnderWay>();
};

}  // namespace

std::unique_ptr<PeerDialer> grpc_peer_dialer(std::shared_ptr<const PeerTls> tls) {
  return std::make_unique<GrpcPeerDialer>(std::move(tls));
}

}  // namespace kvferry::rpc
