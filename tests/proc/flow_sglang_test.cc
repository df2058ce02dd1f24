// The flow of an engine that opens a transfer when a request comes in and computes it only when its
// receiver is ready: senders and receivers polled by every rank in each step of its loop.
#include "tests/proc/flow_scene.h"

using namespace kvferry::testing;
namespace kc = kvferry::client;

namespace {

// What such an engine's poll() says of a sender.
enum class Poll { kBootstrapping, kWaitingForInput, kTransferring, kSuccess, kFailed };

class KvSender {
 public:
  KvSender(FlowWorker& worker, kc::TransferKey key) : worker_(worker), key_(std::move(key)) {
    handle_ = worker_.open_send(key_);
  }
  Poll poll() {
    worker_.step();
    const auto& told = worker_.told(handle_);
    if (told.failed + told.cancelled > 0) return Poll::kFailed;
    if (told.source_released > 0) return Poll::kSuccess;
    if (slices_ > 0) return Poll::kTransferring;
    return told.receiver_ready > 0 ? Poll::kWaitingForInput : Poll::kBootstrapping;
  }
  void send(const FlowWorker::Pages& pages, uint64_t begin, uint64_t end, uint64_t prompt,
            bool last) {
    worker_.send(key_, slices_++, pages, begin, end, prompt, last, [&](kc::SendRequest& of) {
      if (last) of.aux = "first token 42";
    });
  }
  kc::TransferHandle handle() const { return handle_; }

 private:
  FlowWorker& worker_;
  kc::TransferKey key_;
  kc::TransferHandle handle_ = 0;
  uint32_t slices_ = 0;
};

}  // namespace

TEST_CASE("prefill is scheduled when every rank's receiver is ready, and ends with its release") {
  FlowScene scene({FlowGroup{}}, {}, 2);
  for (int round = 0; round < 4; ++round) {
    FlowRequest request(scene, 150);
    std::vector<KvSender> senders;
    for (const auto& worker : scene.prefill) senders.emplace_back(*worker, request.key);
    const auto all = [&](Poll state) {
      return std::all_of(senders.begin(), senders.end(),
                         [&](KvSender& sender) { return sender.poll() == state; });
    };
    CHECK(all(Poll::kBootstrapping));
    request.receive({16});
    scene.run([&] { return all(Poll::kWaitingForInput); });
    for (uint64_t begin = 0; begin < 150; begin += 50) {
      request.compute(begin, begin + 50);
      for (std::size_t r = 0; r < senders.size(); ++r)
        senders[r].send(request.prefill_pages[r], begin, begin + 50, 150, begin == 100);
    }
    scene.run([&] { return all(Poll::kSuccess) && request.received(); });
    CHECK(request.right);
    for (std::size_t r = 0; r < scene.decode.size(); ++r) {
      const auto aux = scene.decode[r]->client().aux(request.receives[r]);
      require_ok(aux);
      CHECK(*aux == "first token 42");
    }
    for (std::size_t r = 0; r < senders.size(); ++r) request.sends.push_back(senders[r].handle());
    scene.run([&] { return request.sent(); });
    request.require_well();
    request.close();
  }
  scene.require_quiet();
}

TEST_CASE("recurrent state goes with the last chunk, its aux and nothing before it") {
  FlowGroup attention;
  attention.layers = {0, 2};
  FlowGroup state;
  state.layers = {1, 3};
  state.state = true;
  constexpr uint32_t kDecodeRanks = 4;
  constexpr uint64_t kTokenBytes = 2 * 2 * (kFlowHeads / kDecodeRanks) * kFlowCellBytes;
  FlowScene scene({attention, state}, {}, kDecodeRanks);
  const auto arrived = [&](const FlowRequest& request, uint64_t chunks) {
    for (std::size_t r = 0; r < scene.decode.size(); ++r)
      if (scene.decode[r]->client().status(request.receives[r])->slices < chunks) return false;
    return true;
  };
  for (int round = 0; round < 3; ++round) {
    FlowRequest request(scene, 150);
    std::vector<KvSender> senders;
    for (const auto& worker : scene.prefill) senders.emplace_back(*worker, request.key);
    request.receive({48, 0});
    scene.run([&] {
      return std::all_of(senders.begin(), senders.end(),
                         [](KvSender& sender) { return sender.poll() == Poll::kWaitingForInput; });
    });
    uint64_t chunks = 0;
    for (uint64_t begin = 48; begin < 150; begin += 51) {
      const uint64_t end = begin + 51;
      request.compute(begin, end);  // the state of these tokens, over that of the chunk before
      for (std::size_t r = 0; r < senders.size(); ++r)
        senders[r].send(request.prefill_pages[r], begin, end, 150, end == 150);
      if (end == 150) break;
      // Whatever goes with this chunk has gone before the next one is computed: whole blocks.
      scene.run([&] { return arrived(request, chunks + 1); });
      ++chunks;
      for (std::size_t r = 0; r < scene.decode.size(); ++r)
        CHECK(scene.decode[r]->client().status(request.receives[r])->bytes_done ==
              (end / kFlowBlock * kFlowBlock - 48) * kTokenBytes);
    }
    for (const KvSender& sender : senders) request.sends.push_back(sender.handle());
    scene.run([&] { return request.sent() && request.received(); });
    request.require_well();
    // Blocks 3 to 9, and one cell of state, which is as large.
    const auto status = scene.decode[0]->client().status(request.receives[0]);
    require_ok(status);
    CHECK(status->bytes_done == (7 * kFlowBlock + 1) * kTokenBytes);
    request.close();
  }
  scene.require_quiet();
}

TEST_CASE("an aborted request fails on both sides and its room is never used again") {
  FlowScene scene;
  FlowRequest request(scene, 100);
  std::vector<KvSender> senders;
  for (const auto& worker : scene.prefill) senders.emplace_back(*worker, request.key);
  request.receive();
  scene.run([&] { return senders[0].poll() == Poll::kWaitingForInput; });
  // abort() on one rank: the others learn it over the receiver.
  require_ok(scene.prefill[0]->client().cancel(senders[0].handle()));
  scene.run([&] {
    return senders[0].poll() == Poll::kFailed && senders[1].poll() == Poll::kFailed &&
           request.received();
  });
  CHECK(scene.decode[0]->told(request.receives[0]).failed == 1);
  for (KvSender& sender : senders) request.sends.push_back(sender.handle());
  scene.run([&] { return request.sent(); });
  // clear(): the id stays dead.
  request.close();
  KvSender again(*scene.prefill[0], request.key);
  scene.run([&] { return scene.prefill[0]->told(again.handle()).rejected.has_value(); });
  CHECK(scene.prefill[0]->told(again.handle()).rejected->reason == "TRANSFER_CLOSED");
  for (std::size_t r = 0; r < 2; ++r) scene.prefill[r]->give_back(request.prefill_pages[r]);
  scene.require_quiet();
}

TEST_CASE("a receiver that never posts: the opened send ends with its lease") {
  FlowScene scene;
  FlowRequest request(scene, 32);
  const auto handle = scene.prefill[0]->open_send(request.key, milliseconds(200));
  scene.run([&] { return scene.prefill[0]->told(handle).over(); });
  CHECK(scene.prefill[0]->told(handle).reason == "EXPIRED");
  CHECK(scene.prefill[0]->told(handle).source_released == 1);
  for (std::size_t r = 0; r < 2; ++r) scene.prefill[r]->give_back(request.prefill_pages[r]);
  scene.require_quiet();
}
