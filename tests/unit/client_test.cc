#include "kvferry/client.h"

#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "client/cpp/src/transfers.h"
#include "kvferry/v1/worker.grpc.pb.h"
#include "tests/unit/lifeline_support.h"

namespace kvferry::client {
namespace {

namespace pb = ::kvferry::v1;
namespace cp = control_page;
using std::chrono::seconds;

Client::Deadline soon() {
  return std::chrono::steady_clock::now() + seconds(20);
}

// The gRPC side of a daemon, as far as the client needs one: it writes down what it is asked and
// answers as told.
class FakeService final : public pb::WorkerService::Service {
 public:
  explicit FakeService(rpc::Recorder& recorder) : recorder_(recorder) {}

  grpc::Status RegisterPools(grpc::ServerContext* context, const pb::RegisterPoolsRequest* request,
                             pb::RegisterPoolsResponse*) override {
    const auto session = session_of(*context);
    if (!session) return {grpc::StatusCode::UNAUTHENTICATED, "token"};
    std::lock_guard<std::mutex> lock(mutex);
    for (const pb::PoolSpec& pool : request->pools()) {
      auto descriptor = session->take_pool(pool.name());
      if (!descriptor) return refuse(*context, descriptor.error());
      pools[pool.name()] = pool.bytes();
    }
    return grpc::Status::OK;
  }
  grpc::Status RegisterLayout(grpc::ServerContext*, const pb::RegisterLayoutRequest* request,
                              pb::RegisterLayoutResponse* response) override {
    std::lock_guard<std::mutex> lock(mutex);
    layouts.push_back(*request);
    response->set_card("card of " + request->instance());
    response->set_generation(layouts.size());
    return grpc::Status::OK;
  }
  grpc::Status GetTicket(grpc::ServerContext* context, const pb::GetTicketRequest*,
                         pb::GetTicketResponse*) override {
    pb::ErrorDetail detail;
    detail.set_code(9);
    detail.set_reason("INSTANCE_INCOMPLETE");
    detail.set_field("instance");
    detail.set_message("rank 1 is missing");
    detail.set_retry_after_ms(250);
    context->AddTrailingMetadata("kvferry-error-bin", detail.SerializeAsString());
    return {grpc::StatusCode::FAILED_PRECONDITION, "rank 1 is missing"};
  }
  grpc::Status GetAux(grpc::ServerContext* context, const pb::GetAuxRequest* request,
                      pb::GetAuxResponse* response) override {
    const auto aux = session_of(*context)->page().aux_of(request->client_handle());
    if (!aux) return {grpc::StatusCode::NOT_FOUND, "aux"};
    response->set_aux(*aux);
    return grpc::Status::OK;
  }
  grpc::Status Submit(
      grpc::ServerContext*,
      grpc::ServerReaderWriter<pb::SubmitResponse, pb::SubmitRequest>* stream) override {
    {
      std::lock_guard<std::mutex> lock(mutex);
      ++streams;
    }
    pb::SubmitRequest request;
    while (stream->Read(&request)) {
      pb::SubmitResponse response;
      for (const pb::Operation& operation : request.operations()) {
        std::optional<pb::OperationResult> result;
        {
          std::lock_guard<std::mutex> lock(mutex);
          operations.push_back(operation);
          result = answer(operation);
        }
        changed.notify_all();
        if (!result) return {grpc::StatusCode::ABORTED, "as told"};
        if (result->outcome() != pb::OPERATION_OUTCOME_UNSPECIFIED)
          *response.add_results() = *result;
      }
      if (!stream->Write(response)) break;
    }
    return grpc::Status::OK;
  }

  bool wait(const std::function<bool()>& condition) {
    std::unique_lock<std::mutex> lock(mutex);
    return changed.wait_for(lock, seconds(20), condition);
  }

  uint64_t pool_bytes(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex);
    return pools[name];
  }
  std::string first_layout() {
    std::lock_guard<std::mutex> lock(mutex);
    return layouts.empty() ? "" : layouts[0].instance();
  }

  static pb::OperationResult accepted(const pb::Operation& operation) {
    pb::OperationResult result;
    result.set_op_id(operation.op_id());
    result.set_outcome(pb::OPERATION_OUTCOME_ACCEPTED);
    return result;
  }
  static pb::OperationResult silent() { return {}; }

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<pb::Operation> operations;
  std::vector<pb::RegisterLayoutRequest> layouts;
  std::map<std::string, uint64_t> pools;
  int streams = 0;
  // Nothing: the stream ends without an answer.
  std::function<std::optional<pb::OperationResult>(const pb::Operation&)> answer = accepted;

 private:
  std::shared_ptr<rpc::Session> session_of(const grpc::ServerContext& context) {
    const auto it = context.client_metadata().find("kvferry-token-bin");
    if (it == context.client_metadata().end() || lifeline == nullptr) return nullptr;
    return lifeline->find(std::span<const uint8_t>(
        reinterpret_cast<const uint8_t*>(it->second.data()), it->second.length()));
  }
  static grpc::Status refuse(grpc::ServerContext& context, const kvferry::Error& error) {
    pb::ErrorDetail detail;
    detail.set_code(static_cast<int>(error.code));
    detail.set_reason(error.reason);
    context.AddTrailingMetadata("kvferry-error-bin", detail.SerializeAsString());
    return {static_cast<grpc::StatusCode>(error.code), error.message};
  }

  rpc::Recorder& recorder_;

 public:
  rpc::Lifeline* lifeline = nullptr;
};

class FakeDaemon {
 public:
  explicit FakeDaemon(const rpc::TemporaryDirectory& directory, uint8_t boot = 1)
      : config(rpc::lifeline_config(directory, boot)), service(recorder) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("unix:" + config.sockets[0].grpc_path,
                             grpc::InsecureServerCredentials());
    builder.SetMaxReceiveMessageSize(8 << 20);
    builder.RegisterService(&service);
    server = builder.BuildAndStart();
    REQUIRE(server);
    auto started = rpc::Lifeline::start(config, recorder);
    REQUIRE(started);
    lifeline = std::move(*started);
    service.lifeline = lifeline.get();
  }
  ~FakeDaemon() {
    lifeline->stop();
    server->Shutdown(std::chrono::system_clock::now());
  }

  rpc::ControlPage& page() { return recorder.attached.back()->page(); }
  std::unique_ptr<Client> attach(AttachOptions options = {}) {
    options.socket = config.sockets[0].path;
    if (options.name.empty()) options.name = "rank0";
    auto client = Client::attach(options);
    INFO((client ? "" : client.error().to_string()));
    REQUIRE(client);
    return std::move(*client);
  }

  rpc::LifelineConfig config;
  rpc::Recorder recorder;
  FakeService service;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<rpc::Lifeline> lifeline;
};

TransferKey key_of(const std::string& id) {
  TransferKey key;
  key.instance = "prefill";
  key.id = id;
  key.secret.fill(9);
  return key;
}

SendRequest send_of(const std::string& id, uint32_t index, std::span<const GroupBlocks> groups) {
  SendRequest send;
  send.key = key_of(id);
  send.layout = {"prefill", 0};
  send.index = index;
  send.num_tokens = 64;
  send.tokens = {0, 64};
  send.groups = groups;
  return send;
}

ReceiveRequest receive_of(const std::string& id) {
  ReceiveRequest receive;
  receive.key = key_of(id);
  receive.layout = {"decode", 0};
  receive.ticket = "ticket";
  receive.num_tokens = 64;
  return receive;
}

cp::Record record_of(TransferHandle handle, TransferState state, Side side, uint32_t flags = 0) {
  cp::Record record;
  record.client_handle = handle;
  record.state = static_cast<uint8_t>(state);
  record.role = static_cast<uint8_t>(side);
  record.flags = flags;
  return record;
}

// Waits for so many events.
std::vector<Event> take(Client& client, std::size_t count) {
  std::vector<Event> out;
  std::vector<Event> some(4);
  const auto deadline = soon();
  while (out.size() < count && std::chrono::steady_clock::now() < deadline) {
    const std::size_t got = client.wait_any(some, deadline);
    for (std::size_t i = 0; i < got; ++i) out.push_back(some[i]);
  }
  return out;
}

std::vector<EventKind> kinds(const std::vector<Event>& events) {
  std::vector<EventKind> out;
  for (const Event& event : events) out.push_back(event.kind);
  return out;
}

}  // namespace

TEST_CASE(
    "a socket that is served by another user than its file's, or than the one expected, is left "
    "alone") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  const uint32_t own = ::geteuid();
  AttachOptions options;
  options.socket = daemon.config.sockets[0].path;
  options.name = "rank0";
  const auto message_of_refusal = [&] {
    const auto client = Client::attach(options);
    REQUIRE_FALSE(client);
    CHECK(client.error().code == Code::kPermissionDenied);
    CHECK(client.error().reason == "DAEMON_USER");
    return client.error().message;
  };
  const std::string served = "served by a process of uid " + std::to_string(own);
  options.daemon_uid = own + 1;
  const std::string unexpected = message_of_refusal();
  CHECK(unexpected.find(served) != std::string::npos);
  CHECK(unexpected.find("expected is uid " + std::to_string(own + 1)) != std::string::npos);
  if (own == 0) {
    // Somebody listens at what belongs to the daemon's user.
    options.daemon_uid.reset();
    REQUIRE(::chown(options.socket.c_str(), 12345, ::getegid()) == 0);
    const std::string foreign = message_of_refusal();
    CHECK(foreign.find(served) != std::string::npos);
    CHECK(foreign.find("owner is uid 12345") != std::string::npos);
    options.daemon_uid = own;  // the file's owner says nothing more
    CHECK(Client::attach(options));
    REQUIRE(::chown(options.socket.c_str(), own, ::getegid()) == 0);
  } else {
    WARN("not root: no socket of another user was tried");
  }
  options.daemon_uid = own;
  options.name = "rank1";
  CHECK(Client::attach(options));
  // The others had not even said their names.
  CHECK(daemon.recorder.attached.size() == (own == 0 ? 2 : 1));
}

TEST_CASE("who serves a socket is compared with its owner as far as both are mapped here") {
  constexpr uint32_t kOverflow = 65534;
  const auto why = [](uint32_t owner, uint32_t listener, std::optional<uint32_t> wanted = {}) {
    return why_not_served(owner, listener, kOverflow, wanted);
  };
  CHECK(why(1000, 1000) == "");
  CHECK(why(1000, 1001) ==
        "it is served by a process of uid 1001, but the file's owner is uid 1000");
  CHECK(why(1000, kOverflow) == "");
  CHECK(why(kOverflow, 1000) == "");
  CHECK(why(kOverflow, kOverflow) == "");
  // One who is expected is that one, whoever owns the file.
  CHECK(why(1000, 1001, 1001) == "");
  CHECK(why(kOverflow, 1001, 1001) == "");
  CHECK(why(1000, kOverflow, kOverflow) == "");
  CHECK(why(1001, 1001, 1000) ==
        "it is served by a process of uid 1001, but the daemon that is expected is uid 1000");
  CHECK(why(kOverflow, 1001, 1000) == why(1001, 1001, 1000));
  CHECK(why(1000, kOverflow, 1000).find("not mapped in this user namespace") != std::string::npos);
}

TEST_CASE(
    "a daemon of another user in the place of one that has ended is refused, and it is told") {
  if (::geteuid() != 0) {
    WARN("not root: no socket of another user was tried");
    return;
  }
  rpc::TemporaryDirectory directory;
  std::optional<FakeDaemon> daemon(std::in_place, directory);
  const std::string path = daemon->config.sockets[0].path;
  const std::string beside = path + ".new";
  const auto client = daemon->attach();
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  REQUIRE(beside.size() < sizeof address.sun_path);
  std::memcpy(address.sun_path, beside.data(), beside.size());
  const UniqueFd other(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  REQUIRE(::bind(other.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  REQUIRE(::listen(other.get(), 16) == 0);
  REQUIRE(::chown(beside.c_str(), 12345, ::getegid()) == 0);
  daemon.reset();
  REQUIRE(::rename(beside.c_str(), path.c_str()) == 0);
  const auto events = take(*client, 2);
  REQUIRE(kinds(events) == std::vector{EventKind::kDaemonRestarted, EventKind::kRejected});
  CHECK(events[1].transfer == 0);
  REQUIRE(events[1].error);
  CHECK(events[1].error->reason == "DAEMON_USER");
}

TEST_CASE("operations arrive in order and as they were given") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  std::vector<int32_t> ids = {7, -1, 2147483647, 0};
  const GroupBlocks groups[] = {{1, 5, ids, TokenRange{3, 9}, 0}};
  SendRequest send = send_of("t1", 0, groups);
  send.aux = "aux";
  send.layers = {2, 4};
  send.ready = ReadyCondition::timeline(3, 99);
  send.lease = milliseconds(1500);
  send.done = DoneWord{2, 8};
  auto first = client->send(send);
  REQUIRE(first);
  auto second = client->send(send_of("t1", 1, groups));
  REQUIRE(second);
  CHECK(*first == *second);
  ids[0] = 1;  // copied before the call returned
  auto other = client->receive(receive_of("t1"));
  REQUIRE(other);
  CHECK(*other != *first);
  REQUIRE(daemon.service.wait([&] { return daemon.service.operations.size() == 3; }));
  const pb::SendRequest& got = daemon.service.operations[0].send();
  CHECK(daemon.service.operations[0].op_id() < daemon.service.operations[1].op_id());
  CHECK(daemon.service.operations[1].send().send_index() == 1);
  CHECK(daemon.service.operations[2].receive().client_handle() == *other);
  CHECK(got.client_handle() == *first);
  CHECK(got.transfer().instance() == "prefill");
  CHECK(got.transfer().transfer_id() == "t1");
  CHECK(got.transfer().secret() == std::string(16, '\x09'));
  CHECK(got.transfer().incarnation().empty());
  CHECK(got.layout().instance() == "prefill");
  REQUIRE(got.groups_size() == 1);
  CHECK(got.groups(0).group() == 1);
  CHECK(got.groups(0).first_block() == 5);
  CHECK(got.groups(0).tokens().begin() == 3);
  const int32_t expected[] = {7, -1, 2147483647, 0};
  CHECK(got.groups(0).block_ids() ==
        std::string(reinterpret_cast<const char*>(expected), sizeof expected));
  CHECK(got.aux() == "aux");
  CHECK(got.layers().begin() == 2);
  CHECK(got.last());
  CHECK(got.ready().timeline().word() == 3);
  CHECK(got.ready().timeline().value() == 99);
  CHECK(got.lease_ms() == 1500);
  CHECK(got.done().value() == 8);
}

TEST_CASE("what is wrong with an operation is told at once where it can be seen") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  const auto field_of = [&](auto change) {
    SendRequest send = send_of("t1", 0, {});
    change(send);
    auto result = client->send(send);
    return result ? std::string("accepted") : result.error().field;
  };
  const std::string long_aux(65537, 'x');
  const std::vector<int32_t> many(2000000);
  const GroupBlocks too_many[] = {{0, 0, many, std::nullopt, 0}};
  CHECK(field_of([](SendRequest& s) { s.key.id.clear(); }) == "key.id");
  CHECK(field_of([](SendRequest& s) { s.key.id.assign(65, 'a'); }) == "key.id");
  CHECK(field_of([&](SendRequest& s) { s.aux = long_aux; }) == "aux");
  CHECK(field_of([](SendRequest& s) {
          s.aux = "x";
          s.last = false;
        }) == "aux");
  CHECK(field_of([](SendRequest& s) { s.lease = milliseconds(-1); }) == "lease");
  CHECK(field_of([](SendRequest& s) { s.deadline = milliseconds(-1); }) == "deadline");
  CHECK(field_of([&](SendRequest& s) { s.groups = too_many; }) == "groups");
  CHECK(field_of([](SendRequest& s) { s.ready.kind = ReadyCondition::Kind::kCudaIpcEvent; }) ==
        "ready.event_handle");
  // Nothing of it was kept.
  CHECK(client->stats().open_transfers == 0);
  CHECK(client->signal(16, 1).error().reason == "WORD_OUT_OF_RANGE");
  CHECK(client->close(77).error().reason == "TRANSFER_UNKNOWN");
}

TEST_CASE("a receiver hears of slices, then completion, then release") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  const TransferHandle handle = *client->receive(receive_of("t1"));
  cp::Record record = record_of(handle, TransferState::kActive, Side::kReceiver);
  record.slices = 1;
  record.bytes_done = 10;
  daemon.page().publish(4, record);
  auto events = take(*client, 1);
  CHECK(kinds(events) == std::vector<EventKind>{EventKind::kSliceReceived});
  CHECK(events[0].bytes_done == 10);
  CHECK(client->close(handle).error().reason == "TRANSFER_OPEN");
  record = record_of(handle, TransferState::kCompleted, Side::kReceiver,
                     cp::kDestReleased | cp::kCompleted);
  record.slices = 3;
  daemon.page().publish(4, record, std::make_shared<const std::string>("hello"));
  events = take(*client, 3);
  CHECK(kinds(events) == std::vector<EventKind>{EventKind::kSliceReceived, EventKind::kCompleted,
                                                EventKind::kDestReleased});
  CHECK(events[0].slices == 3);
  CHECK(events[2].reason == "NONE");
  CHECK(*client->aux(handle) == "hello");
  // Each once.
  daemon.page().publish(4, record);
  std::vector<Event> none(4);
  CHECK(client->poll(none) == 0);
  auto status = client->status(handle);
  REQUIRE(status);
  CHECK(status->state == TransferState::kCompleted);
  CHECK(status->released);
  REQUIRE(client->close(handle));
  CHECK(client->status(handle).error().reason == "TRANSFER_UNKNOWN");
  REQUIRE(daemon.service.wait([&] { return daemon.service.operations.size() == 2; }));
  CHECK(daemon.service.operations[1].close_transfer().client_handle() == handle);
}

TEST_CASE("a sender hears of release before delivery, and after a failure") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  const TransferHandle good = *client->send(send_of("good", 0, {}));
  const TransferHandle bad = *client->send(send_of("bad", 0, {}));
  daemon.page().publish(0, record_of(good, TransferState::kDelivered, Side::kSender,
                                     cp::kSourceReleased | cp::kReceiverReady));
  auto events = take(*client, 3);
  CHECK(kinds(events) == std::vector<EventKind>{EventKind::kReceiverReady,
                                                EventKind::kSourceReleased, EventKind::kDelivered});
  cp::Record record = record_of(bad, TransferState::kFailed, Side::kSender, cp::kSourceReleased);
  record.reason = 3;
  record.released_reason = 3;
  daemon.page().publish(1, record);
  events = take(*client, 2);
  CHECK(kinds(events) == std::vector<EventKind>{EventKind::kFailed, EventKind::kSourceReleased});
  CHECK(events[0].reason == "EXPIRED");
  CHECK(events[1].reason == "EXPIRED");
}

TEST_CASE("waiting for one transfer keeps the events of others") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  const TransferHandle one = *client->receive(receive_of("one"));
  const TransferHandle two = *client->receive(receive_of("two"));
  std::thread publisher([&] {
    daemon.page().publish(
        0, record_of(one, TransferState::kFailed, Side::kReceiver, cp::kDestReleased));
    daemon.page().publish(1, record_of(two, TransferState::kCompleted, Side::kReceiver,
                                       cp::kDestReleased | cp::kCompleted));
  });
  auto status = client->wait(two, soon());
  publisher.join();
  REQUIRE(status);
  CHECK(status->state == TransferState::kCompleted);
  const auto events = take(*client, 2);
  CHECK(kinds(events) == std::vector<EventKind>{EventKind::kFailed, EventKind::kDestReleased});
  CHECK(events[0].transfer == one);
  const auto late = client->wait(*client->receive(receive_of("three")),
                                 std::chrono::steady_clock::now() + milliseconds(20));
  CHECK(late.error().reason == "WAIT_TIMEOUT");
}

TEST_CASE("more changes than the ring holds lose no event") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  std::set<TransferHandle> handles;
  for (uint32_t i = 0; i < 50; ++i) {
    const TransferHandle handle = *client->receive(receive_of("t" + std::to_string(i)));
    handles.insert(handle);
    for (int again = 0; again < 10; ++again)
      daemon.page().publish(i, record_of(handle, TransferState::kActive, Side::kReceiver));
    daemon.page().publish(i, record_of(handle, TransferState::kCompleted, Side::kReceiver,
                                       cp::kDestReleased | cp::kCompleted));
  }
  for (const Event& event : take(*client, 100))
    if (event.kind == EventKind::kDestReleased) handles.erase(event.transfer);
  CHECK(handles.empty());
  CHECK(client->stats().ring_overflows > 0);
}

TEST_CASE("a refused operation is an event, and the end of a transfer that has nothing else") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  daemon.service.answer = [](const pb::Operation& operation) {
    pb::OperationResult result = FakeService::accepted(operation);
    result.set_outcome(pb::OPERATION_OUTCOME_REJECTED);
    result.mutable_error()->set_code(3);
    result.mutable_error()->set_reason("BLOCK_OUT_OF_RANGE");
    result.mutable_error()->set_field("groups[0].block_ids[1]");
    result.mutable_error()->set_retry_after_ms(7);
    return std::optional(result);
  };
  auto client = daemon.attach();
  const TransferHandle handle = *client->send(send_of("t1", 0, {}));
  const auto events = take(*client, 1);
  REQUIRE(events.size() == 1);
  CHECK(events[0].kind == EventKind::kRejected);
  CHECK(events[0].transfer == handle);
  REQUIRE(events[0].error);
  CHECK(events[0].error->to_string() ==
        "INVALID_ARGUMENT BLOCK_OUT_OF_RANGE groups[0].block_ids[1]");
  CHECK(events[0].error->retry_after == milliseconds(7));
  CHECK(client->wait(handle, soon()).error().reason == "BLOCK_OUT_OF_RANGE");
  CHECK(client->close(handle));
  CHECK(client->stats().operations_rejected == 1);
}

TEST_CASE("a claim is forgotten once its decline is accepted; a refused decline leaves it") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  std::string refusal = "DRAINING";  // under the service's lock
  daemon.service.answer = [&refusal](const pb::Operation& operation) {
    pb::OperationResult result = FakeService::accepted(operation);
    if (operation.has_decline() && !refusal.empty()) {
      result.set_outcome(pb::OPERATION_OUTCOME_REJECTED);
      result.mutable_error()->set_code(14);
      result.mutable_error()->set_reason(refusal);
    }
    return std::optional(result);
  };
  auto client = daemon.attach();
  ClaimRequest claim;
  claim.key = key_of("t1");
  claim.layout = {"decode", 0};
  claim.ticket = "ticket";
  const TransferHandle handle = *client->claim(claim);
  REQUIRE(client->decline(claim));
  const auto events = take(*client, 1);
  REQUIRE(events.size() == 1);
  CHECK(events[0].kind == EventKind::kRejected);
  CHECK(events[0].transfer == 0);
  REQUIRE(events[0].error);
  CHECK(events[0].error->reason == "DRAINING");
  CHECK(client->status(handle));
  CHECK(client->close(handle).error().reason == "TRANSFER_OPEN");
  CHECK(*client->claim(claim) == handle);
  {
    std::lock_guard<std::mutex> lock(daemon.service.mutex);
    refusal.clear();
  }
  REQUIRE(client->decline(claim));
  const auto deadline = soon();
  while (client->stats().open_transfers != 0 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(milliseconds(1));  // between two looks
  CHECK(client->status(handle).error().reason == "TRANSFER_UNKNOWN");
}

TEST_CASE(
    "whichever is answered first, a claim and its decline leave nothing; a refused claim stays") {
  const auto open_after = [](std::vector<OperationAnswer> answers) {
    Transfers transfers(16);
    const TransferHandle handle = transfers.begin(Side::kReceiver, "key")->handle;
    CHECK(transfers.handle_of("key") == handle);
    CHECK(transfers.handle_of("another") == 0);
    for (OperationAnswer& answer : answers) transfers.answer(handle, std::move(answer));
    return transfers.counts().open;
  };
  const Error error{Code::kUnavailable, "DRAINING", "", {}, {}};
  const OperationAnswer claimed{.accepted = true, .claim = true, .error = {}};
  const OperationAnswer unclaimed{.claim = true, .error = error};
  const OperationAnswer declined{.accepted = true, .decline = true, .error = {}};
  const OperationAnswer undeclined{.decline = true, .error = error};
  CHECK(open_after({claimed, declined}) == 0);
  CHECK(open_after({declined, claimed}) == 0);
  CHECK(open_after({declined}) == 1);
  CHECK(open_after({claimed, undeclined}) == 1);
  CHECK(open_after({claimed, undeclined, declined}) == 0);
  CHECK(open_after({unclaimed, declined}) == 1);
}

TEST_CASE("a broken stream is opened again and what has no answer is sent again") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  int calls = 0;
  daemon.service.answer =
      [&calls](const pb::Operation& operation) -> std::optional<pb::OperationResult> {
    if (++calls == 2) return std::nullopt;
    return FakeService::accepted(operation);
  };
  auto client = daemon.attach();
  REQUIRE(client->send(send_of("t1", 0, {})));
  REQUIRE(daemon.service.wait([&] { return daemon.service.operations.size() == 1; }));
  // Its answer, too: or it would rightly be sent again.
  const auto deadline = soon();
  while (client->stats().operations_accepted < 1 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::yield();
  REQUIRE(client->send(send_of("t1", 1, {})));
  REQUIRE(daemon.service.wait([&] { return daemon.service.operations.size() == 3; }));
  CHECK(daemon.service.operations[1].op_id() == daemon.service.operations[2].op_id());
  CHECK(daemon.service.streams == 2);
  while (client->stats().operations_accepted < 2 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::yield();
  CHECK(client->stats().operations_queued == 0);
  CHECK(client->attached());
}

TEST_CASE("a full queue is told at once") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  daemon.service.answer = [](const pb::Operation&) { return std::optional(FakeService::silent()); };
  AttachOptions options;
  options.queue_operations = 3;
  auto client = daemon.attach(options);
  for (uint32_t i = 0; i < 3; ++i) REQUIRE(client->send(send_of("t1", i, {})));
  const auto full = client->send(send_of("t1", 3, {}));
  REQUIRE_FALSE(full);
  CHECK(full.error().code == Code::kResourceExhausted);
  CHECK(full.error().reason == "QUEUE_FULL");
  CHECK(full.error().retry_after.count() > 0);
}

TEST_CASE("errors of calls carry reason, field and when to try again") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  const auto ticket = client->ticket("prefill");
  REQUIRE_FALSE(ticket);
  CHECK(ticket.error().code == Code::kFailedPrecondition);
  CHECK(ticket.error().reason == "INSTANCE_INCOMPLETE");
  CHECK(ticket.error().field == "instance");
  CHECK(ticket.error().retry_after == milliseconds(250));
  // A call that the daemon does not know.
  CHECK(client->resolve("x").error().code == Code::kUnimplemented);
}

TEST_CASE("long aux is fetched by a call") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  const TransferHandle handle = *client->receive(receive_of("t1"));
  CHECK(client->aux(handle).error().reason == "AUX_NOT_READY");
  const std::string large(60000, 'y');
  daemon.page().publish(
      0, record_of(handle, TransferState::kCompleted, Side::kReceiver, cp::kDestReleased),
      std::make_shared<const std::string>(large));
  CHECK(*client->aux(handle) == large);
}

TEST_CASE("words are handed out, signalled and read") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  const uint32_t word = *client->alloc_word();
  CHECK(*client->alloc_word() != word);
  REQUIRE(client->signal(word, 41));
  CHECK(daemon.recorder.wait([&] { return daemon.recorder.doorbells > 0; }));
  CHECK(daemon.page().load_timeline(word) == 41U);
  for (int i = 0; i < 14; ++i) REQUIRE(client->alloc_word());
  CHECK(client->alloc_word().error().reason == "NO_WORD");
  client->free_word(word);
  CHECK(*client->alloc_word() == word);
  const uint32_t done = *client->alloc_done_word();
  daemon.page().store_done(done, 6);
  CHECK(client->done_value(done) == 6);
}

TEST_CASE("the event descriptor becomes readable and quiet again") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  const TransferHandle handle = *client->receive(receive_of("t1"));
  pollfd entry{client->event_fd(), POLLIN, 0};
  std::vector<Event> events(1);
  while (client->poll(events) > 0) {
  }
  CHECK(::poll(&entry, 1, 0) == 0);
  daemon.page().publish(
      0, record_of(handle, TransferState::kCompleted, Side::kReceiver, cp::kDestReleased));
  CHECK(::poll(&entry, 1, 20000) == 1);
  std::size_t count = 0;
  while (client->poll(events) > 0) ++count;
  CHECK(count == 2);
  CHECK(::poll(&entry, 1, 0) == 0);
}

TEST_CASE("after the daemon's end the client attaches and registers by itself") {
  rpc::TemporaryDirectory directory;
  auto daemon = std::make_unique<FakeDaemon>(directory, uint8_t{1});
  auto client = daemon->attach();
  auto pool = client->alloc_pool("kv", 8192);
  REQUIRE(pool);
  pool->data[5] = std::byte{3};
  CHECK(daemon->service.pool_bytes("kv") == 8192);
  CHECK(client->alloc_pool("kv", 8192).error().reason == "POOL_EXISTS");
  LayoutRegistration registration;
  registration.instance = "decode";
  registration.layout.pools = {{"kv", 8192}};
  CHECK(client->register_layout(registration)->card == "card of decode");
  const uint32_t word = *client->alloc_word();
  REQUIRE(client->signal(word, 12));
  const TransferHandle open = *client->receive(receive_of("open"));
  const TransferHandle ended = *client->receive(receive_of("ended"));
  REQUIRE(daemon->service.wait([&] { return daemon->service.operations.size() == 2; }));
  // Seen by nobody before the end.
  daemon->page().publish(1, record_of(ended, TransferState::kCompleted, Side::kReceiver,
                                      cp::kDestReleased | cp::kCompleted));
  daemon.reset();

  std::map<TransferHandle, std::vector<EventKind>> by_transfer;
  auto events = take(*client, 4);
  for (const Event& event : events) by_transfer[event.transfer].push_back(event.kind);
  CHECK(by_transfer[0] == std::vector<EventKind>{EventKind::kDaemonRestarted});
  CHECK(by_transfer[ended] ==
        std::vector<EventKind>{EventKind::kCompleted, EventKind::kDestReleased});
  // Its process is this one and lives: the memory is not released.
  CHECK(by_transfer[open] == std::vector<EventKind>{EventKind::kFailed});
  CHECK(client->status(open)->reason == "DAEMON_RESTARTED");
  CHECK_FALSE(client->status(open)->released);
  CHECK(client->close(open).error().reason == "TRANSFER_OPEN");
  CHECK(client->close(ended));
  CHECK_FALSE(client->attached());
  CHECK(client->receive(receive_of("early")).error().reason == "NOT_ATTACHED");

  daemon = std::make_unique<FakeDaemon>(directory, uint8_t{2});
  events = take(*client, 1);
  CHECK(kinds(events) == std::vector<EventKind>{EventKind::kReattached});
  CHECK_FALSE(events[0].error);
  CHECK(client->attached());
  CHECK(client->boot_id()[0] == 2);
  CHECK(daemon->service.pool_bytes("kv") == 8192);
  CHECK(daemon->service.first_layout() == "decode");
  CHECK(daemon->page().load_timeline(word) == 12U);
  CHECK(pool->data[5] == std::byte{3});
  REQUIRE(client->receive(receive_of("later")));
  CHECK(daemon->service.wait([&] { return daemon->service.operations.size() == 1; }));
  CHECK(client->stats().reconnects == 1);
}

// Not a test: a daemon in a process of its own, which the next test starts and kills.
TEST_CASE("a daemon to be killed", "[.daemon]") {
  const char* path = std::getenv("KVFERRY_TEST_DIRECTORY");
  REQUIRE(path != nullptr);
  REQUIRE(::prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);  // also when the test that started it fails
  rpc::TemporaryDirectory directory{std::string(path)};
  FakeDaemon daemon(directory, 7);
  for (;;) ::pause();
}

TEST_CASE("a killed daemon fails the open transfers and releases their memory") {
  rpc::TemporaryDirectory directory;
  std::string variable = "KVFERRY_TEST_DIRECTORY=" + directory.path();
  std::string program = "client_test", filter = "a daemon to be killed";
  char* argv[] = {program.data(), filter.data(), nullptr};
  std::vector<char*> environment;  // ours, with the sanitizers' settings
  for (char** entry = environ; *entry != nullptr; ++entry) environment.push_back(*entry);
  environment.push_back(variable.data());
  environment.push_back(nullptr);
  pid_t daemon = -1;
  REQUIRE(::posix_spawn(&daemon, "/proc/self/exe", nullptr, nullptr, argv, environment.data()) ==
          0);
  AttachOptions options;
  options.socket = directory.file("worker.sock");
  options.name = "rank0";
  const auto deadline = soon();
  auto client = Client::attach(options);
  while (!client && std::chrono::steady_clock::now() < deadline) {
    ::poll(nullptr, 0, 5);  // between two tries
    client = Client::attach(options);
  }
  REQUIRE(client);
  const TransferHandle handle = *(*client)->receive(receive_of("t1"));
  while ((*client)->stats().operations_accepted == 0 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::yield();
  ::kill(daemon, SIGKILL);
  auto status = (*client)->wait(handle, soon());
  REQUIRE(status);
  CHECK(status->state == TransferState::kFailed);
  CHECK(status->reason == "DAEMON_RESTARTED");
  CHECK(status->released);
  CHECK(kinds(take(**client, 1)) == std::vector<EventKind>{EventKind::kDaemonRestarted});
  CHECK((*client)->close(handle));
  int result = 0;
  ::waitpid(daemon, &result, 0);
  CHECK(WIFSIGNALED(result));
}

TEST_CASE("memory of a lost daemon is released when its process has ended") {
  rpc::TemporaryDirectory directory;
  rpc::Recorder recorder;
  auto config = rpc::lifeline_config(directory);
  auto lifeline = rpc::Lifeline::start(config, recorder);
  REQUIRE(lifeline);
  AttachOptions options;
  options.socket = config.sockets[0].path;
  options.name = "rank0";
  auto attachment = Attachment::connect(options);
  REQUIRE(attachment);
  Transfers transfers(16);
  transfers.attach(*attachment);
  const TransferHandle sending = transfers.begin(Side::kSender, "s")->handle;
  const TransferHandle released = transfers.begin(Side::kSender, "r")->handle;
  recorder.attached[0]->page().publish(
      0, record_of(released, TransferState::kActive, Side::kSender, cp::kSourceReleased));
  transfers.lose();
  std::vector<Event> events(8);
  std::size_t count = transfers.take(events);
  std::map<TransferHandle, std::vector<EventKind>> seen;
  for (std::size_t i = 0; i < count; ++i) seen[events[i].transfer].push_back(events[i].kind);
  CHECK(seen[sending] == std::vector<EventKind>{EventKind::kFailed});
  CHECK(seen[released] == std::vector<EventKind>{EventKind::kFailed, EventKind::kSourceReleased});
  CHECK_FALSE(transfers.ended(sending));
  transfers.exited(attachment->get());
  REQUIRE(transfers.take(events) == 1);
  CHECK(events[0].transfer == sending);
  CHECK(events[0].kind == EventKind::kSourceReleased);
  CHECK(events[0].reason == "DAEMON_RESTARTED");
  REQUIRE(transfers.ended(sending));
}

TEST_CASE("a forked child of a client cannot use it") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const bool dead =
        !client->attached() && !client->send(send_of("t1", 0, {})) && !client->ticket("x");
    client.reset();
    ::_exit(dead ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(client->attached());
}

TEST_CASE("ids and secrets survive their text form") {
  const Bytes16 bytes = random_bytes16();
  CHECK(bytes != random_bytes16());
  CHECK(to_text(bytes).size() == 22);
  CHECK(bytes16_from_text(to_text(bytes)) == bytes);
  CHECK_FALSE(bytes16_from_text("too short"));
}

// Run by hand: prints what an engine step pays.
TEST_CASE("costs of enqueueing and polling", "[.cost]") {
  rpc::TemporaryDirectory directory;
  FakeDaemon daemon(directory);
  auto client = daemon.attach();
  const std::vector<int32_t> ids(8000, 5);
  const GroupBlocks groups[] = {{0, 0, ids, std::nullopt, 0}};
  using Clock = std::chrono::steady_clock;
  std::vector<double> costs;
  for (uint32_t i = 0; i < 500; ++i) {
    const auto before = Clock::now();
    REQUIRE(client->send(send_of("t1", i, groups)));
    costs.push_back(std::chrono::duration<double, std::micro>(Clock::now() - before).count());
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  std::sort(costs.begin(), costs.end());
  std::cout << "enqueue 8,000 ids: p50 " << costs[250] << " us, p99 " << costs[495] << " us\n";
  std::vector<Event> events(16);
  const auto before = Clock::now();
  for (int i = 0; i < 100000; ++i) client->poll(events);
  std::cout << "empty poll: "
            << std::chrono::duration<double, std::micro>(Clock::now() - before).count() / 100000
            << " us\n";
}

}  // namespace kvferry::client
