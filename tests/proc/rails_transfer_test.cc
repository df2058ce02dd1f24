// Messages and offers between two rails processes that live.
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <random>

#include "tests/proc/rails_harness.h"
#include "tests/unit/cpus.h"

namespace kvferry::rails::testing {
namespace {

constexpr uint64_t kLane = 1;

CpuSet cpus_of(const Node& node, const std::string& name) {
  const std::string tasks = "/proc/" + std::to_string(node.client->pid()) + "/task";
  for (const auto& task : std::filesystem::directory_iterator(tasks)) {
    std::string found;
    std::getline(std::ifstream(task.path() / "comm"), found);
    if (found == name) return usable_cpus(std::stoi(task.path().filename()));
  }
  FAIL("no thread is called " << name);
  return {};
}

TEST_CASE("A rail's thread keeps to its processors, and says so where it cannot") {
  const CpuSet own = usable_cpus(0);
  REQUIRE(own.any());
  CpuSet one;
  for (std::size_t cpu = 0; cpu < own.size() && one.none(); ++cpu) one.set(cpu, own.test(cpu));
  CpuSet none;
  none.set(none.size() - 1);  // no machine that runs this has it
  REQUIRE((own & none).none());
  RailsConfig config = loopback("tcp");
  config.rails = {{"tcp", "lo", one}, {"shm", ""}, {"tcp", "lo", none}};
  Node a(config);
  Node b(config);
  start({&a, &b});
  CHECK(a.ready.rails[0].binding_errno == 0);
  CHECK(a.ready.rails[1].binding_errno == 0);
  CHECK(a.ready.rails[2].binding_errno == EINVAL);
  CHECK(cpus_of(a, "rail0-tcp") == one);
  CHECK(cpus_of(a, "rail1-shm") == own);
  CHECK(cpus_of(a, "rail2-tcp") == own);
  // It works all the same.
  for (uint32_t rail = 0; rail < 3; ++rail) join(a, b, kLane + rail, rail);
  // And so does the next life of the process.
  a.client->kill("test");
  REQUIRE(pump({&a, &b}, [&] { return a.ready_count == 2; }));
  CHECK(cpus_of(a, "rail0-tcp") == one);
}

TEST_CASE("Control messages of every size cross in both directions, in order") {
  const std::string transport = GENERATE("tcp", "shm");
  Node a(loopback(transport));
  Node b(loopback(transport));
  start({&a, &b});
  REQUIRE(a.ready.ucx_major == 1);
  REQUIRE(a.ready.ucx_minor >= 13);
  if (transport == "tcp") REQUIRE(a.ready.rails[0].tcp_port != 0);
  join(a, b, kLane);
  const std::vector<std::size_t> sizes = {1, 100, 4096, 4097, 20000, 65536, kLargeSlotBytes};
  uint64_t token = 0;
  std::vector<std::string> sent;
  for (std::size_t size : sizes) {
    sent.push_back(std::string(size, static_cast<char>('a' + sent.size())));
    ++token;
    REQUIRE(a.client->send_control(LaneKey{kLane}, Node::bytes_of(sent.back()), SendToken{token}));
    REQUIRE(b.client->send_control(LaneKey{kLane}, Node::bytes_of(sent.back()), SendToken{token}));
  }
  REQUIRE(pump({&a, &b}, [&] {
    return a.controls.size() == sizes.size() && b.controls.size() == sizes.size() &&
           a.sends.size() == sizes.size() && b.sends.size() == sizes.size();
  }));
  REQUIRE(a.controls == sent);
  REQUIRE(b.controls == sent);
  REQUIRE(a.client->bogus_records() == 0);
}

TEST_CASE("More control messages than there are slots arrive all, in order") {
  RailsConfig small = loopback();
  small.limits.inbound_small = 4;
  small.limits.inbound_large = 1;
  small.limits.outbound_small = 8;
  small.limits.outbound_large = 1;
  small.limits.ring_records = 8;
  Node a(small);
  Node b(small);
  start({&a, &b});
  join(a, b, kLane);
  constexpr uint64_t kCount = 5000;
  uint64_t sent = 0;
  REQUIRE(pump({&a, &b}, [&] {
    // RAILS_BUSY is the normal answer here.
    while (sent < kCount &&
           a.client->send_control(LaneKey{kLane}, Node::bytes_of("message " + std::to_string(sent)),
                                  SendToken{sent + 1}))
      ++sent;
    return b.controls.size() == kCount;
  }));
  bool ordered = true;
  for (uint64_t i = 0; i < kCount; ++i)
    ordered = ordered && b.controls[i] == "message " + std::to_string(i);
  REQUIRE(ordered);
  REQUIRE(b.client->stats(0).dropped == 0);
}

TEST_CASE("Offers are accepted and dropped in any order and every accepted byte is right") {
  const std::string transport = GENERATE("tcp", "shm");
  constexpr uint64_t kOffers = 48;
  constexpr uint64_t kSlotBytes = 1 << 20;
  Node a(loopback(transport));
  Node b(loopback(transport));
  start({&a, &b});
  join(a, b, kLane);
  std::mt19937_64 random(7);
  std::vector<uint64_t> sizes;
  for (uint64_t i = 0; i < kOffers; ++i) {
    // From one byte on: forced rendezvous has no smallest size.
    sizes.push_back(i == 0 ? 1 : 1 + random() % kSlotBytes);
    fill(a.arena() + i * kSlotBytes, sizes[i], i);
    REQUIRE(a.client->send_offer(LaneKey{kLane}, Node::bytes_of(std::to_string(i)),
                                 {0, i * kSlotBytes, sizes[i]}, SendToken{i + 1}));
  }
  REQUIRE(pump({&a, &b}, [&] { return b.offers.size() == kOffers; }));
  std::shuffle(b.offers.begin(), b.offers.end(), random);
  uint64_t accepted = 0;
  for (std::size_t n = 0; n < b.offers.size(); ++n) {
    const auto& offer = b.offers[n];
    REQUIRE(offer.descriptor);
    const uint64_t i = std::stoull(Node::text_of(offer.header));
    REQUIRE(offer.bytes == sizes[i]);
    if (n % 4 == 3) {
      REQUIRE(b.client->drop(offer.descriptor));
      continue;
    }
    REQUIRE(b.client->accept(offer.descriptor, LaneKey{kLane},
                             {0, (kOffers - 1 - i) * kSlotBytes, offer.bytes}, LandingId{i + 1}));
    ++accepted;
  }
  REQUIRE(
      pump({&a, &b}, [&] { return b.receives.size() == accepted && a.sends.size() == kOffers; }));
  for (const auto& [landing, receive] : b.receives) {
    const uint64_t i = landing - 1;
    REQUIRE(receive.ok);
    REQUIRE(receive.bytes == sizes[i]);
    REQUIRE(holds(b.arena() + (kOffers - 1 - i) * kSlotBytes, sizes[i], i));
  }
  // A send that was dropped ends as well as one that landed.
  for (const auto& [token, ok] : a.sends) REQUIRE(ok);
  REQUIRE(b.client->stats(0).held_offers == 0);
  REQUIRE(b.client->stats(0).operations == 0);
  // An accepted or dropped descriptor is used up.
  REQUIRE(b.client->drop(b.offers[0].descriptor).error().reason == "OFFER_UNKNOWN");
}

TEST_CASE("Offers beyond those that may be held are told, and leave room for later ones") {
  RailsConfig few = loopback();
  few.limits.held_offers = 4;
  Node a(loopback());
  Node b(few);
  start({&a, &b});
  join(a, b, kLane);
  constexpr uint64_t kBytes = 64 << 10;
  const auto offer = [&](uint64_t i) {
    REQUIRE(a.client->send_offer(LaneKey{kLane}, Node::bytes_of(std::to_string(i)),
                                 {0, i * kBytes, kBytes}, SendToken{i + 1}));
  };
  for (uint64_t i = 0; i < 6; ++i) offer(i);
  // Its sender cannot tell: what is not held counts as sent there.
  REQUIRE(pump({&a, &b}, [&] { return b.offers.size() == 6 && a.sends.size() == 2; }));
  for (uint64_t i = 0; i < 6; ++i) {
    const bool held = i < 4;
    CHECK(static_cast<bool>(b.offers[i].descriptor) == held);
    CHECK(b.offers[i].too_many == !held);
    CHECK(Node::text_of(b.offers[i].header) == std::to_string(i));
  }
  CHECK(b.client->stats(0).held_offers == 4);
  CHECK(b.client->stats(0).dropped == 2);
  REQUIRE(b.client->drop(b.offers[0].descriptor));
  REQUIRE(pump({&a, &b}, [&] { return a.sends.size() == 3; }));
  offer(6);
  REQUIRE(pump({&a, &b}, [&] { return b.offers.size() == 7; }));
  CHECK(b.offers[6].descriptor);
}

TEST_CASE("Two rails of different transports work side by side") {
  RailsConfig both = loopback();
  both.rails.push_back({"shm", ""});
  Node a(both);
  Node b(both);
  start({&a, &b});
  join(a, b, 1, 0);
  join(a, b, 2, 1);
  fill(a.arena(), 4096, 1);
  fill(a.arena() + 4096, 4096, 2);
  for (uint64_t lane : {uint64_t{1}, uint64_t{2}})
    REQUIRE(a.client->send_offer(LaneKey{lane}, Node::bytes_of("x"), {0, (lane - 1) * 4096, 4096},
                                 SendToken{lane}));
  REQUIRE(pump({&a, &b}, [&] { return b.offers.size() == 2; }));
  for (const auto& offer : b.offers) {
    const uint64_t lane = offer.rail + 1;
    // An offer is accepted under a lane of its own rail only.
    REQUIRE_FALSE(
        b.client->accept(offer.descriptor, LaneKey{3 - lane}, {0, 0, 4096}, LandingId{lane}));
    REQUIRE(b.client->accept(offer.descriptor, LaneKey{lane}, {0, (lane - 1) * 4096, 4096},
                             LandingId{lane}));
  }
  REQUIRE(pump({&a, &b}, [&] { return b.receives.size() == 2; }));
  REQUIRE(holds(b.arena(), 4096, 1));
  REQUIRE(holds(b.arena() + 4096, 4096, 2));
}

TEST_CASE("Commands that cannot be right are refused and change nothing") {
  Node a(loopback());
  Node b(loopback());
  REQUIRE(a.client->connect(LaneKey{1}, 0, Node::bytes_of("x")).error().reason == "RAILS_DOWN");
  start({&a, &b});
  join(a, b, kLane);
  const auto header = Node::bytes_of("h");
  const auto offer = [&](Region region, std::vector<uint8_t> head) {
    auto status = a.client->send_offer(LaneKey{kLane}, head, region, SendToken{1});
    return status ? std::string() : status.error().reason;
  };
  REQUIRE(offer({1, 0, 1}, header) == "REGION_INVALID");
  REQUIRE(offer({0, kArenaBytes, 1}, header) == "REGION_INVALID");
  REQUIRE(offer({0, 0, 0}, header) == "REGION_INVALID");
  REQUIRE(offer({0, UINT64_MAX, 2}, header) == "REGION_INVALID");
  REQUIRE(offer({0, 0, 1}, {}) == "MESSAGE_SIZE_INVALID");
  REQUIRE(offer({0, 0, 1}, std::vector<uint8_t>(kMaxOfferHeaderBytes + 1)) ==
          "MESSAGE_SIZE_INVALID");
  REQUIRE(a.client->close(LaneKey{9}).error().reason == "LANE_UNKNOWN");
  REQUIRE(a.client->connect(LaneKey{kLane}, 0, header).error().reason == "LANE_EXISTS");
  REQUIRE(a.client->connect(LaneKey{2}, 1, header).error().reason == "RAIL_UNKNOWN");
  REQUIRE(a.client->connect(LaneKey{2}, 0, {}).error().reason == "ADDRESS_INVALID");
  REQUIRE(a.sends.empty());
  REQUIRE(a.client->stats(0).refused == 0);
}

}  // namespace
}  // namespace kvferry::rails::testing
