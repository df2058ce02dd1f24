// The status table as a stream: what is open, what changes, and readers that are slow or gone.
#include <grpcpp/grpcpp.h>

#include <catch2/catch.hpp>
#include <map>
#include <string>

#include "tests/proc/bad_input_subject.h"
#include "tests/proc/hand_off_daemons.h"

namespace kvferry::bad_input {
namespace {

using Stub = v1::WorkerService::Stub;

class Watch {
 public:
  // A channel of its own, which takes in little that nobody reads.
  Watch(const client::Connection& connection, std::string token) {
    grpc::ChannelArguments arguments;
    arguments.SetString(GRPC_ARG_DEFAULT_AUTHORITY, "localhost");
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 16 * 1024);
    stub_ = v1::WorkerService::NewStub(
        grpc::CreateCustomChannel("unix:" + connection.attachment->grpc_path(),
                                  grpc::InsecureChannelCredentials(), arguments));
    context_.AddMetadata("kvferry-token-bin", token);
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    reader_ = stub_->Watch(&context_, v1::WatchRequest());
  }
  explicit Watch(const client::Connection& connection)
      : Watch(connection, connection.attachment->token()) {}

  // One message; false when the stream has ended.
  bool next() {
    v1::WatchResponse response;
    if (!reader_->Read(&response)) return false;
    draining = response.draining();
    for (const v1::TransferStatus& status : response.transfers()) {
      ++told;
      last[status.client_handle()] = status;
    }
    return true;
  }
  template <typename Condition>
  bool reads_until(Condition&& condition) {
    while (!condition())
      if (!next()) return false;
    return true;
  }
  grpc::StatusCode end() { return reader_->Finish().error_code(); }
  void cancel() { context_.TryCancel(); }

  std::map<uint64_t, v1::TransferStatus> last;  // by handle
  uint64_t told = 0;
  bool draining = false;

 private:
  grpc::ClientContext context_;
  std::unique_ptr<Stub> stub_;
  std::unique_ptr<grpc::ClientReader<v1::WatchResponse>> reader_;
};

v1::OpenSendRequest open_request(uint64_t handle) {
  v1::OpenSendRequest open = good_open_send();
  open.set_client_handle(handle);
  open.mutable_transfer()->set_transfer_id("watched-" + std::to_string(handle));
  open.set_lease_ms(600'000);
  return open;
}
void cancel_and_close(Subject& subject, uint64_t handle) {
  v1::CancelRequest cancel;
  cancel.set_client_handle(handle);
  subject.good(&Stub::Cancel, cancel);
  v1::CloseTransferRequest close;
  close.set_client_handle(handle);
  subject.good(&Stub::CloseTransfer, close);
}

}  // namespace

TEST_CASE("a watch tells what is open, then what changes, up to the close") {
  Subject subject;
  Watch watch(subject.worker());
  REQUIRE(watch.reads_until([&] { return watch.last.contains(kOpenHandle); }));
  CHECK(watch.last.size() == 1);
  CHECK_FALSE(watch.draining);
  CHECK(watch.last[kOpenHandle].state() == v1::TRANSFER_STATE_OPEN);
  CHECK(watch.last[kOpenHandle].role() == v1::TRANSFER_ROLE_SENDER);
  CHECK(watch.last[kOpenHandle].reason() == "NONE");
  CHECK_FALSE(watch.last[kOpenHandle].released());

  subject.good(&Stub::OpenSend, open_request(50));
  REQUIRE(watch.reads_until([&] { return watch.last.contains(50); }));
  CHECK(watch.last[50].slot() != watch.last[kOpenHandle].slot());
  v1::CancelRequest cancel;
  cancel.set_client_handle(50);
  subject.good(&Stub::Cancel, cancel);
  REQUIRE(
      watch.reads_until([&] { return watch.last[50].state() == v1::TRANSFER_STATE_CANCELLED; }));
  CHECK(watch.last[50].reason() == "CANCELLED");
  REQUIRE(watch.reads_until([&] { return watch.last[50].released(); }));
  v1::CloseTransferRequest close;
  close.set_client_handle(50);
  subject.good(&Stub::CloseTransfer, close);
  REQUIRE(watch.reads_until([&] { return watch.last[50].closed(); }));

  // The next transfer has the slot, and another watch sees the same.
  subject.good(&Stub::OpenSend, open_request(51));
  REQUIRE(watch.reads_until([&] { return watch.last.contains(51); }));
  CHECK(watch.last[51].slot() == watch.last[50].slot());
  Watch second(subject.worker());
  REQUIRE(second.reads_until([&] { return second.last.size() == 2; }));
  CHECK(second.last.contains(51));
  cancel_and_close(subject, 51);
}

TEST_CASE("a watch that is not read misses states between, never the last one") {
  Subject subject;
  Watch watch(subject.worker());
  constexpr uint64_t kRounds = 3000;
  for (uint64_t handle = 100; handle < 100 + kRounds; ++handle) {
    subject.good(&Stub::OpenSend, open_request(handle));
    cancel_and_close(subject, handle);
  }
  subject.good(&Stub::OpenSend, open_request(99));
  REQUIRE(watch.reads_until([&] {
    return watch.last.contains(99) && watch.last[99].state() == v1::TRANSFER_STATE_OPEN;
  }));
  CHECK(watch.last[kOpenHandle].state() == v1::TRANSFER_STATE_OPEN);
  cancel_and_close(subject, 99);
  REQUIRE(watch.reads_until([&] { return watch.last[99].closed(); }));
  // What was told of is told to be closed.
  for (const auto& [handle, status] : watch.last) CHECK((handle == kOpenHandle || status.closed()));
  // Opened, cancelled, closed: three changes each.
  INFO(watch.told);
  CHECK(watch.told < 2 * kRounds);
}

TEST_CASE("a watch ends with its worker, when it is cancelled, and beyond four of them at once") {
  Subject subject;
  {
    auto other = subject.attach("watched");
    const std::string token = other->attachment->token();
    Watch watch(subject.worker(), token);
    REQUIRE(watch.next());
    CHECK(watch.last.empty());
    other.reset();
    while (watch.next()) {
    }
    CHECK(watch.end() == grpc::StatusCode::ABORTED);
    // Its page is gone a moment before its token, which is told as UNAVAILABLE.
    CHECK(testing::comes_true([&] {
      Watch late(subject.worker(), token);
      CHECK_FALSE(late.next());
      return late.end() == grpc::StatusCode::UNAUTHENTICATED;
    }));
  }
  std::vector<std::unique_ptr<Watch>> watches;
  for (int i = 0; i < 4; ++i) {
    watches.push_back(std::make_unique<Watch>(subject.worker()));
    REQUIRE(watches.back()->next());
  }
  Watch fifth(subject.worker());
  CHECK_FALSE(fifth.next());
  CHECK(fifth.end() == grpc::StatusCode::RESOURCE_EXHAUSTED);
  watches.front()->cancel();
  while (watches.front()->next()) {
  }
  CHECK(watches.front()->end() == grpc::StatusCode::CANCELLED);
  watches.pop_back();
  // A place is free again once the daemon has seen it.
  for (;;) {
    Watch again(subject.worker());
    if (again.next()) break;
    REQUIRE(again.end() == grpc::StatusCode::RESOURCE_EXHAUSTED);
  }
}

}  // namespace kvferry::bad_input
