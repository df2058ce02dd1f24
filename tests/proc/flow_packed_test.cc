// Packed copies through real daemons: the prefill engine has its pages back, and overwrites them,
// before anybody pulls.
#include "tests/proc/flow_scene.h"

using namespace kvferry::testing;
namespace kc = kvferry::client;

namespace {

void packed(kc::SendRequest& request) {
  request.packed_copy = true;
}
double packed_bytes(const FlowScene& scene) {
  return metric(scene.pair->side(0), "kvferry_packed_bytes");
}
bool released(FlowScene& scene, const FlowRequest& request) {
  for (std::size_t r = 0; r < request.sends.size(); ++r)
    if (scene.prefill[r]->told(request.sends[r]).source_released == 0) return false;
  return true;
}

}  // namespace

TEST_CASE("pages are free before anybody pulls, and every byte arrives afterwards") {
  FlowScene scene({FlowGroup{}}, {}, 4);
  const std::size_t free = scene.prefill[0]->free_pages();
  FlowRequest request(scene, 500);
  for (uint64_t begin = 0; begin < 500; begin += 176) {  // chunked prefill
    const uint64_t end = std::min<uint64_t>(500, begin + 176);
    request.compute(begin, end);
    request.send(begin, end, end == 500, packed);
  }
  scene.run([&] { return released(scene, request); });
  CHECK(scene.prefill[0]->free_pages() == free);
  CHECK(scene.prefill[0]->told(request.sends[0]).delivered == 0);
  // 32 blocks, on two ranks.
  CHECK(comes_true([&] { return packed_bytes(scene) >= 512.0 * 4 * 4 * kFlowCellBytes; }));
  CHECK(metric(scene.pair->side(0), "kvferry_packed_made_total") == 6);

  request.receive();
  scene.run([&] { return request.sent() && request.received(); });
  request.require_well();
  CHECK(comes_true([&] { return packed_bytes(scene) == 0; }));
  request.close();
  scene.require_quiet();
}

TEST_CASE("slices by layers, some packed and some not") {
  FlowGroup group;
  group.layers = {0, 1, 2, 3};
  FlowScene scene({group});
  FlowRequest request(scene, 200);
  request.compute(0, 200);
  for (uint32_t layer = 0; layer < 4; ++layer)
    request.send(0, 200, layer == 3, [&](kc::SendRequest& of) {
      of.layers = {layer, layer + 1};
      of.packed_copy = layer % 2 == 0;
    });
  request.receive();
  scene.run([&] { return request.sent() && request.received(); });
  request.require_well();
  request.close();
  scene.require_quiet();
}

// The decode side is not ready: a part has landed, the rest lies in the copy when its owner dies.
TEST_CASE("what is packed is delivered although the prefill engine has died since") {
  FlowScene scene;
  const uint32_t word = *scene.decode[0]->client().alloc_word();
  FlowRequest request(scene, 1000);
  request.compute(0, 1000);
  request.send(0, 1000, true, packed);
  request.receive(
      {}, [&](kc::ReceiveRequest& of) { of.ready = kc::ReadyCondition::timeline(word, 1); });
  scene.run([&] {
    return released(scene, request) &&
           scene.prefill[0]->told(request.sends[0]).receiver_ready == 1 &&
           scene.prefill[1]->told(request.sends[1]).receiver_ready == 1;
  });
  const double all = 1008.0 * 4 * 4 * kFlowCellBytes;
  REQUIRE(metric(scene.pair->side(1), "kvferry_arena_bytes", "state=\"landed\"") < all);
  for (const auto& worker : scene.prefill) worker->die();
  REQUIRE(comes_true([&] { return metric(scene.pair->side(0), "kvferry_workers") == 0; }));
  CHECK(packed_bytes(scene) >= all);
  require_ok(scene.decode[0]->client().signal(word, 1));
  scene.run([&] { return request.received(); });
  CHECK(scene.decode[0]->told(request.receives[0]).completed == 1);
  CHECK(request.right);
  CHECK(comes_true([&] { return packed_bytes(scene) == 0; }));
  for (const int side : {0, 1})
    CHECK(comes_true([&] { return arena_in_use(scene.pair->side(side)) == 0; }));
}

TEST_CASE("no room: the Send is refused, holds nothing, and goes without a copy") {
  FlowScene scene({FlowGroup{}}, {}, 1, {"engine.packed_bytes=64KiB"});
  const std::size_t free = scene.prefill[0]->free_pages();
  FlowRequest refused(scene, 1000);
  refused.compute(0, 1000);
  refused.send(0, 1000, true, packed);
  scene.run([&] { return refused.sent(); });
  for (std::size_t r = 0; r < 2; ++r) {
    const auto& told = scene.prefill[r]->told(refused.sends[r]);
    REQUIRE(told.rejected.has_value());
    CHECK(told.rejected->code == kc::Code::kResourceExhausted);
    CHECK(told.rejected->reason == "PACKED_MEMORY_FULL");
    CHECK(told.rejected->field == "packed_copy");
  }
  CHECK(scene.prefill[0]->free_pages() == free);
  CHECK(metric(scene.pair->side(0), "kvferry_packed_refused_total") == 2);
  FlowRequest request(scene, 1000);
  request.prefill_all();
  request.receive();
  scene.run([&] { return request.sent() && request.received(); });
  request.require_well();
  request.close();
  scene.require_quiet();
}

TEST_CASE("nobody comes: the copy goes with the lease, or with a cancel") {
  FlowScene scene;
  FlowRequest request(scene, 200);
  request.compute(0, 200);
  const bool cancelled = GENERATE(false, true);
  request.send(0, 200, true, [&](kc::SendRequest& of) {
    of.packed_copy = true;
    if (!cancelled) of.lease = milliseconds(300);
  });
  scene.run([&] { return released(scene, request); });
  CHECK(comes_true([&] { return packed_bytes(scene) > 0; }));
  for (std::size_t r = 0; r < 2 && cancelled; ++r)
    CHECK(scene.prefill[r]->client().cancel(request.sends[r]).ok());
  scene.run([&] { return request.sent(); });
  for (std::size_t r = 0; r < 2; ++r)
    CHECK(scene.prefill[r]->told(request.sends[r]).reason == (cancelled ? "CANCELLED" : "EXPIRED"));
  CHECK(comes_true([&] { return packed_bytes(scene) == 0; }));
  request.close();
  scene.require_quiet();
}
