// The listener for other daemons, seen by strangers: what it takes at most.
#include <grpcpp/grpcpp.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/rpc/peer_service.h"
#include "daemon/rpc/peer_status.h"
#include "kvferry/v1/peer.grpc.pb.h"
#include "tests/unit/link_support.h"

using namespace kvferry;
using namespace kvferry::testing;

namespace {

// Answers nothing until it is told to.
struct SilentBackend : rpc::PeerBackend {
  void challenge(const rpc::Caller&, std::function<void(Result<rpc::Random32>)> done) override {
    MutexLock lock(mutex);
    waiting.push_back(std::move(done));
    arrived.notify_all();
  }
  void handshake(const rpc::Caller&, rpc::SignedHello,
                 std::function<void(Result<rpc::SignedHello>)> done) override {
    done(fail(Code::kUnimplemented, "HEARD", "small enough"));
  }
  void call(const rpc::Caller&, rpc::LinkMethod, rpc::LinkCall,
            std::function<void(Result<rpc::LinkReply>)> done) override {
    done(fail(Code::kUnimplemented, "HEARD", "small enough"));
  }
  // Waits until so many challenges have come; false if that takes too long.
  bool reached(std::size_t count) {
    MutexLock lock(mutex);
    const Time until = monotonic_now() + kPatience;
    while (waiting.size() < count && arrived.wait_until(mutex, until)) {
    }
    return waiting.size() >= count;
  }
  std::vector<std::function<void(Result<rpc::Random32>)>> take() {
    MutexLock lock(mutex);
    return std::exchange(waiting, {});
  }

  Mutex mutex;
  CondVar arrived;
  std::vector<std::function<void(Result<rpc::Random32>)>> waiting;
};

// A stranger who speaks to the peers' port as no daemon does.
struct Stranger {
  explicit Stranger(uint16_t port) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    channel = grpc::CreateCustomChannel("ipv4:127.0.0.1:" + std::to_string(port),
                                        grpc::InsecureChannelCredentials(), arguments);
    stub = v1::PeerService::NewStub(channel);
  }
  struct Asked {
    grpc::ClientContext context;
    v1::ChallengeRequest request;
    v1::ChallengeResponse response;
    std::unique_ptr<grpc::ClientAsyncResponseReader<v1::ChallengeResponse>> reader;
    grpc::Status status;
  };
  void ask(grpc::CompletionQueue& queue) {
    auto& of = calls.emplace_back(std::make_unique<Asked>());
    of->context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(1));
    of->reader = stub->AsyncChallenge(&of->context, of->request, &queue);
    of->reader->Finish(&of->response, &of->status, of.get());
  }
  Error handshake(std::size_t bytes) {
    grpc::ClientContext context;
    v1::HandshakeRequest request;
    request.set_hello(std::string(bytes, 'x'));
    request.set_tag(std::string(16, 't'));
    v1::HandshakeResponse response;
    return rpc::peer_error(stub->Handshake(&context, request, &response));
  }
  Error call(std::size_t bytes) {
    grpc::ClientContext context;
    v1::LinkRequest request;
    request.set_link(std::string(16, 'l'));
    request.set_tag(std::string(16, 't'));
    request.set_body(std::string(bytes, 'x'));
    v1::LinkResponse response;
    return rpc::peer_error(stub->GetCards(&context, request, &response));
  }

  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::PeerService::Stub> stub;
  std::vector<std::unique_ptr<Asked>> calls;
};

}  // namespace

TEST_CASE("the peers' port takes no large messages, and smaller ones of who has no link") {
  SilentBackend backend;
  const auto server = rpc::PeerServer::start({"127.0.0.1:0"}, backend);
  REQUIRE(server);
  Stranger stranger((*server)->port());
  CHECK(stranger.handshake(60 << 10).reason == "HEARD");
  CHECK(stranger.handshake(64 << 10).reason == "MESSAGE_TOO_LARGE");
  CHECK(stranger.call((1 << 20) - 100).reason == "HEARD");
  // It ends while its client still writes, who may see no more than that.
  const Code code = stranger.call(1 << 20).code;
  CHECK((code == Code::kResourceExhausted || code == Code::kUnavailable));
  CHECK(stranger.call(100).reason == "HEARD");
}

TEST_CASE("a connection to the peers' port has eight calls at a time") {
  SilentBackend backend;
  const auto server = rpc::PeerServer::start({"127.0.0.1:0"}, backend);
  REQUIRE(server);
  grpc::CompletionQueue queue;
  Stranger one((*server)->port());
  for (int i = 0; i < 9; ++i) one.ask(queue);
  REQUIRE(backend.reached(8));
  // Another connection's arrives, although the ninth was sent before it.
  Stranger other((*server)->port());
  other.ask(queue);
  REQUIRE(backend.reached(9));
  {
    MutexLock lock(backend.mutex);
    CHECK(backend.waiting.size() == 9);
  }
  for (auto& done : backend.take()) done(rpc::Random32{});
  REQUIRE(backend.reached(1));  // now the ninth
  for (auto& done : backend.take()) done(rpc::Random32{});
  void* tag = nullptr;
  bool ok = false;
  for (int i = 0; i < 10; ++i) REQUIRE(queue.Next(&tag, &ok));
  for (const auto& of : one.calls) CHECK(of->status.ok());
  queue.Shutdown();
}

TEST_CASE("a call at the peers' port ends although neither its client nor the backend ends it") {
  SilentBackend backend;
  rpc::PeerServerConfig config;
  config.listen = "127.0.0.1:0";
  config.call_limit = std::chrono::milliseconds(50);
  config.max_pending = 1;
  const auto server = rpc::PeerServer::start(config, backend);
  REQUIRE(server);
  Stranger stranger((*server)->port());
  for (int i = 0; i < 2; ++i) {  // its place is free again afterwards
    grpc::CompletionQueue queue;
    stranger.ask(queue);
    void* tag = nullptr;
    bool ok = false;
    REQUIRE(queue.Next(&tag, &ok));
    const Error error = rpc::peer_error(stranger.calls.back()->status);
    CHECK(error.code == Code::kDeadlineExceeded);
    CHECK(error.reason == "TOO_SLOW");
    queue.Shutdown();
  }
  for (auto& done : backend.take()) done(rpc::Random32{});  // too late, and harmless
}
