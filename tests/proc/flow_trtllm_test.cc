// The flow of an engine whose every rank answers a context request by itself and asks for finished
// transfers by number and time-out: context first, generation first, duplicates, cancels that are
// repeated until memory is free.
#include "tests/proc/flow_scene.h"

using namespace kvferry::testing;
namespace kc = kvferry::client;

TEST_CASE("context first: each rank responds, generation asks for what is finished") {
  FlowScene scene({FlowGroup{}}, {}, 2);
  std::vector<std::unique_ptr<FlowRequest>> requests;
  for (const uint64_t tokens : {64U, 120U, 16U}) {
    requests.push_back(std::make_unique<FlowRequest>(scene, tokens));
    requests.back()->prefill_all();  // respond_and_send_async on every rank
  }
  for (auto& request : requests) request->receive();  // request_and_receive_async
  // check_gen_transfer_status(at least one): some order, all in the end.
  std::size_t finished = 0;
  while (finished < requests.size()) {
    const std::size_t before = finished;
    scene.run([&] {
      finished = static_cast<std::size_t>(
          std::count_if(requests.begin(), requests.end(),
                        [](const auto& request) { return request->received(); }));
      return finished > before;
    });
  }
  scene.run([&] {
    return std::all_of(requests.begin(), requests.end(),
                       [](const auto& request) { return request->sent(); });
  });
  for (auto& request : requests) {
    request->require_well();
    request->close();
  }
  scene.require_quiet();
}

TEST_CASE("a blocking receive returns when the pages and aux may be read") {
  FlowScene scene;
  FlowRequest request(scene, 96);
  request.compute(0, 96);
  request.send(0, 96, true, [](kc::SendRequest& of) { of.aux = "draft tokens"; });
  FlowWorker& decode = *scene.decode[0];
  const FlowWorker::Pages pages = decode.allocate(96);
  const auto receive = decode.receive(request.key, scene.ticket, pages, 96);
  const auto ended = decode.client().wait(receive, std::chrono::steady_clock::now() + kPatience);
  require_ok(ended);
  CHECK(ended->state == kc::TransferState::kCompleted);
  CHECK(ended->released);
  CHECK(decode.holds(request.number, pages, 0, 0, 96));
  CHECK(*decode.client().aux(receive) == "draft tokens");
  require_ok(decode.client().close(receive));
  scene.run([&] { return request.sent(); });
}

TEST_CASE("a duplicate request starts nothing, and another body under its id is told apart") {
  FlowScene scene;
  FlowRequest request(scene, 64);
  FlowWorker& decode = *scene.decode[0];
  request.receive();
  // The same body: existing, the same handle, no second transfer.
  const auto same = decode.receive(request.key, scene.ticket, request.decode_pages[0], 64);
  CHECK(same == request.receives[0]);
  // Other blocks under the same id.
  const FlowWorker::Pages other = decode.allocate(64);
  std::vector<kc::GroupBlocks> groups{{0, 0, other[0], {}, 0}};
  kc::ReceiveRequest changed;
  changed.key = request.key;
  changed.layout = decode.layout();
  changed.ticket = scene.ticket;
  changed.num_tokens = 64;
  changed.groups = groups;
  const auto refused = decode.client().receive(changed);
  require_ok(refused);
  scene.run([&] { return decode.told(*refused).rejected.has_value(); });
  CHECK(decode.told(*refused).rejected->code == kc::Code::kAlreadyExists);
  CHECK(decode.told(*refused).rejected->field == "groups");
  decode.give_back(other);
  // The first one goes on.
  request.prefill_all();
  scene.run([&] {
    return request.sent() && decode.told(same).completed == 1 &&
           decode.told(same).dest_released == 1;
  });
  CHECK(request.right);
  request.close();
  scene.require_quiet();
}

TEST_CASE("cancel is asked every loop until memory is free, and is quick") {
  FlowScene scene;
  for (const bool of_sender : {true, false}) {
    FlowRequest request(scene, 400);
    request.compute(0, 400);
    request.receive();
    request.send(0, 300, false);
    kc::Client& client = of_sender ? scene.prefill[0]->client() : scene.decode[0]->client();
    const auto handle = of_sender ? request.sends[0] : request.receives[0];
    bool in_use = true;
    const auto limit = std::chrono::steady_clock::now() + kPatience;
    while (in_use && std::chrono::steady_clock::now() < limit) {
      const auto cancelled = client.cancel(handle);
      require_ok(cancelled);
      CHECK(cancelled->state == kc::TransferState::kCancelled);
      in_use = cancelled->memory_in_use;
    }
    CHECK_FALSE(in_use);
    CHECK(client.status(handle)->released);
    scene.run([&] { return request.sent() && request.received(); });
    request.close();
  }
  scene.require_quiet();
}

TEST_CASE("generation first: the context side waits for all its peers' requests") {
  FlowScene scene({FlowGroup{}}, {}, 2);
  FlowRequest request(scene, 80);
  for (const auto& worker : scene.prefill) request.sends.push_back(worker->open_send(request.key));
  request.receive();
  scene.run([&] {  // prepare_context_requests
    return scene.prefill[0]->told(request.sends[0]).receiver_ready == 1 &&
           scene.prefill[1]->told(request.sends[1]).receiver_ready == 1;
  });
  request.prefill_all();
  scene.run([&] { return request.sent() && request.received(); });
  request.require_well();
  request.close();
  scene.require_quiet();
}
