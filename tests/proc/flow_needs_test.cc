// What a sender learns of its receivers before it computes anything, and what a ticket leads to.
#include "tests/proc/flow_scene.h"

using namespace kvferry::testing;
namespace kc = kvferry::client;

namespace {

constexpr uint64_t kWindow = 48;
const FlowGroup kFull{{0, 2}, 0};
const FlowGroup kSliding{{1, 3}, kWindow};

using Range = std::pair<uint64_t, uint64_t>;
std::vector<Range> ranges_of(const kc::ReceiverNeeds& needs, uint32_t group) {
  std::vector<Range> out;
  for (const kc::GroupNeeds& of : needs.groups)
    if (of.group == group)
      for (const kc::TokenRange& range : of.ranges) out.emplace_back(range.begin, range.end);
  return out;
}

}  // namespace

TEST_CASE("an open send learns what its receivers need, in its own groups, before it computes") {
  // The decode engine numbers its groups the other way round and has a part of each.
  FlowScene scene({kFull, kSliding}, {kSliding, kFull}, 2);
  FlowRequest request(scene, 320);
  std::vector<kc::TransferHandle> sends;
  for (const auto& worker : scene.prefill) sends.push_back(worker->open_send(request.key));
  CHECK(scene.prefill[0]->client().receiver_needs(sends[0])->empty());
  request.receive({288, 160});
  scene.run([&] {
    return scene.prefill[0]->told(sends[0]).receiver_ready == 1 &&
           scene.prefill[1]->told(sends[1]).receiver_ready == 1;
  });
  for (std::size_t r = 0; r < 2; ++r) {
    const auto needs = scene.prefill[r]->client().receiver_needs(sends[r]);
    require_ok(needs);
    REQUIRE(needs->size() == 1);
    CHECK((*needs)[0].ready);
    CHECK((*needs)[0].instance == "decode");
    CHECK((*needs)[0].incarnation == scene.decode[0]->registered().incarnation);
    CHECK(ranges_of((*needs)[0], 0) == std::vector<Range>{{160, 320}});
    CHECK(ranges_of((*needs)[0], 1) == std::vector<Range>{{288, 320}});
  }
  // It computes and sends no more than that.
  request.compute(160, 320);
  request.send(160, 320, true);
  scene.run([&] { return request.sent() && request.received(); });
  for (std::size_t r = 0; r < 2; ++r)
    CHECK(scene.decode[r]->told(request.receives[r]).completed == 1);
  CHECK(request.right);
  const auto ended = scene.prefill[0]->client().receiver_needs(sends[0]);
  REQUIRE_FALSE(ended);
  CHECK(ended.error().reason == "TRANSFER_ENDED");
}

TEST_CASE("a ticket is resolved: reachable, compatible, or why not") {
  FlowScene scene;
  kc::Client& decode = scene.decode[0]->client();
  auto found = decode.resolve(scene.ticket, scene.decode[0]->layout());
  require_ok(found);
  CHECK(found->reachable);
  CHECK(found->compatible);
  CHECK(found->transport == "tcp");
  CHECK(found->instance == "prefill");
  CHECK(found->rank_count == 2);
  CHECK(found->incarnation == scene.prefill[0]->registered().incarnation);
  CHECK(found->problem.reason.empty());

  found = decode.resolve(scene.ticket);
  require_ok(found);
  CHECK(found->reachable);

  const auto own = scene.prefill[0]->client().resolve(scene.ticket);
  require_ok(own);
  CHECK(own->transport == "local");

  // Another model.
  FlowWorker::Options options;
  options.socket = scene.pair->side(1).socket();
  options.instance = "other";
  options.cell_bytes = 64;
  FlowWorker other(options);
  found = other.client().resolve(scene.ticket, other.layout());
  require_ok(found);
  CHECK(found->reachable);
  CHECK_FALSE(found->compatible);
  CHECK(found->problem.reason == "INCOMPATIBLE");

  // Nobody listens there.
  found = decode.resolve("kvferry:127.0.0.1:1/prefill", scene.decode[0]->layout());
  require_ok(found);
  CHECK_FALSE(found->reachable);
  CHECK_FALSE(found->problem.reason.empty());
}
