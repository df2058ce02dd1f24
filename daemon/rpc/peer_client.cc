#include "daemon/rpc/peer_client.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <utility>

#include "daemon/rpc/peer_status.h"
#include "kvferry/v1/peer.grpc.pb.h"

namespace kvferry::rpc {
namespace {

constexpr int kMaxMessageBytes = 4 << 20;

// A call under way; kept alive by its callback.
template <typename Request, typename Response>
struct Call {
  grpc::ClientContext context;
  Request request;
  Response response;

  explicit Call(Time deadline) {
    const Duration left = deadline - monotonic_now();
    context.set_deadline(
        gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                     gpr_time_from_nanos(left.count() > 0 ? left.count() : 0, GPR_TIMESPAN)));
  }
};

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

class GrpcPeerStub final : public PeerStub {
 public:
  explicit GrpcPeerStub(const std::shared_ptr<grpc::Channel>& channel)
      : stub_(v1::PeerService::NewStub(channel)) {}

  void challenge(Time deadline, std::function<void(Result<Random32>)> done) override {
    auto call = std::make_shared<Call<v1::ChallengeRequest, v1::ChallengeResponse>>(deadline);
    stub_->async()->Challenge(&call->context, &call->request, &call->response,
                              [call, done = std::move(done)](const grpc::Status& status) {
                                Random32 random{};
                                if (!status.ok())
                                  return done(tl::unexpected<Error>(peer_error(status)));
                                if (!take(call->response.challenge(), random))
                                  return done(bad_answer());
                                done(random);
                              });
  }

  void handshake(SignedHello hello, Time deadline,
                 std::function<void(Result<SignedHello>)> done) override {
    auto call = std::make_shared<Call<v1::HandshakeRequest, v1::HandshakeResponse>>(deadline);
    call->request.set_hello(std::move(hello.bytes));
    call->request.set_tag(text_of(hello.tag));
    stub_->async()->Handshake(&call->context, &call->request, &call->response,
                              [call, done = std::move(done)](const grpc::Status& status) {
                                SignedHello answer;
                                if (!status.ok())
                                  return done(tl::unexpected<Error>(peer_error(status)));
                                if (!take(call->response.tag(), answer.tag))
                                  return done(bad_answer());
                                answer.bytes = std::move(*call->response.mutable_hello());
                                done(std::move(answer));
                              });
  }

  void call(LinkMethod method, LinkCall link_call, Time deadline,
            std::function<void(Result<LinkReply>)> done) override {
    auto call = std::make_shared<Call<v1::LinkRequest, v1::LinkResponse>>(deadline);
    call->request.set_link(text_of(link_call.link));
    call->request.set_number(link_call.number);
    call->request.set_body(std::move(link_call.body));
    call->request.set_tag(text_of(link_call.tag));
    auto finish = [call, done = std::move(done)](const grpc::Status& status) {
      LinkReply reply;
      if (!status.ok()) return done(tl::unexpected<Error>(peer_error(status)));
      if (!take(call->response.tag(), reply.tag)) return done(bad_answer());
      reply.body = std::move(*call->response.mutable_body());
      done(std::move(reply));
    };
    auto* async = stub_->async();
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
    }
    finish(grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "no such method"));
  }

 private:
  const std::unique_ptr<v1::PeerService::Stub> stub_;
};

class GrpcPeerDialer final : public PeerDialer {
 public:
  std::shared_ptr<PeerStub> dial(const std::string& host, uint16_t port) override {
    const std::string literal = host.find(':') == std::string::npos ? host : "[" + host + "]";
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
    arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
    // Each dial starts afresh instead of sitting out the back-off of the one before.
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    // A proxy of the environment is not where the peer was allowed to be.
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    arguments.SetString(GRPC_ARG_SERVICE_CONFIG, "{}");
    return std::make_shared<GrpcPeerStub>(
        grpc::CreateCustomChannel((host.find(':') == std::string::npos ? "ipv4:" : "ipv6:") +
                                      literal + ":" + std::to_string(port),
                                  grpc::InsecureChannelCredentials(), arguments));
  }
};

}  // namespace

std::unique_ptr<PeerDialer> grpc_peer_dialer() {
  return std::make_unique<GrpcPeerDialer>();
}

}  // namespace kvferry::rpc
