// The main process against a rails process that has been taken over.
#include <csignal>
#include <set>

#include "tests/proc/rails_harness.h"

namespace kvferry::rails::testing {
namespace {

RailsConfig liar(const std::string& lie) {
  RailsConfig config = loopback();
  config.executable = KVFERRY_RAILS_LIAR;
  config.unchecked_environment = {"LIAR=" + lie};
  return config;
}

TEST_CASE("A process whose records cannot be is ended and its death told") {
  const std::string lie = GENERATE("tail", "ready-slot", "ready-twice", "kind", "length", "slot");
  INFO(lie);
  Node node(liar(lie));
  REQUIRE(node.client->start(monotonic_now()));
  REQUIRE(pump({&node}, [&] { return !node.deaths.empty(); }));
  REQUIRE(node.deaths[0].signal == SIGKILL);
  REQUIRE(node.deaths[0].why == "impossible record on the ring of rail 0");
  REQUIRE(node.controls.empty());
}

// Counts how often each operation is told to have ended.
class CountingNode : public Node {
 public:
  using Node::Node;
  void on_send_ended(SendToken token, bool ok) override {
    ++send_ends[token.value];
    Node::on_send_ended(token, ok);
  }
  void on_receive_ended(LandingId landing, bool ok, uint64_t bytes) override {
    ++receive_ends[landing.value];
    Node::on_receive_ended(landing, ok, bytes);
  }
  std::map<uint64_t, int> send_ends, receive_ends;
};

TEST_CASE("Random records end no operation twice, invent none and grow nothing without bound") {
  CountingNode node(liar("garbage"));
  start({&node});
  std::set<uint64_t> sent, accepted;
  // What the liar names is partly what there is: lanes 1 to 3, tokens below 40.
  for (uint64_t lane = 1; lane <= 3; ++lane)
    REQUIRE(node.client->connect(LaneKey{lane}, 0, Node::bytes_of("address")));
  uint64_t landing = 0;
  node.offer_handler = [&](const Node::Offer& offer) {
    REQUIRE(offer.header.size() <= kSmallSlotBytes);
    if (!offer.descriptor) return;
    // Both answers have to work; most lies about lengths fit no region.
    if (offer.bytes <= kArenaBytes && landing < 30 &&
        node.client->accept(offer.descriptor, LaneKey{1}, {0, 0, offer.bytes},
                            LandingId{landing + 1})) {
      accepted.insert(++landing);
      return;
    }
    (void)node.client->drop(offer.descriptor);
  };
  for (uint64_t token = 1; token < 40; ++token)
    if (node.client->send_control(LaneKey{1 + token % 3}, Node::bytes_of("x"), SendToken{token}))
      sent.insert(token);
  REQUIRE(sent.size() == 39);
  // The liar never reads its command ring. What main has to give back must not pile up for ever: it
  // ends the process instead, long before the liar has told all it has.
  REQUIRE(pump({&node}, [&] {
    node.controls.clear();
    node.offers.clear();
    return !node.deaths.empty();
  }));
  REQUIRE(node.deaths[0].signal == SIGKILL);
  REQUIRE(node.client->bogus_records() > 100);
  for (const auto& [token, times] : node.send_ends) {
    REQUIRE(sent.contains(token));
    REQUIRE(times == 1);
  }
  for (const auto& [token, times] : node.receive_ends) {
    REQUIRE(accepted.contains(token));
    REQUIRE(times == 1);
  }
  REQUIRE(node.ready_count == 1);
}

TEST_CASE("A process that never becomes ready is ended after its time") {
  RailsConfig mute = liar("mute");
  mute.ready_timeout = std::chrono::milliseconds(200);
  Node node(mute);
  REQUIRE(node.client->start(monotonic_now()));
  REQUIRE(pump({&node}, [&] { return !node.deaths.empty(); }));
  REQUIRE(node.deaths[0].signal == SIGKILL);
  REQUIRE(node.deaths[0].why == "not ready in time");
}

TEST_CASE("An executable that is something else is a death like any other") {
  RailsConfig config = loopback();
  config.executable = "/bin/false";
  Node node(config);
  REQUIRE(node.client->start(monotonic_now()));
  REQUIRE(pump({&node}, [&] { return !node.deaths.empty(); }));
  REQUIRE(node.deaths[0].exited);
  REQUIRE(node.deaths[0].status == 1);
}

TEST_CASE("Segments that could shrink and configurations that cannot be are refused") {
  const int plain = ::memfd_create("plain", MFD_CLOEXEC);
  REQUIRE(::ftruncate(plain, 4096) == 0);
  const Segment segment = {plain, 4096};
  const auto reason = [&](RailsConfig config, std::span<const Segment> segments) {
    auto made = RailsClient::make(std::move(config), segments);
    return made ? std::string("made") : made.error().reason;
  };
  REQUIRE(reason(loopback(), {&segment, 1}) == "SEGMENT_INVALID");
  REQUIRE(reason(loopback(), {}) == "SEGMENT_INVALID");
  ::close(plain);
  auto sealed = make_sealed_memfd("sealed", 4096);
  REQUIRE(sealed);
  const Segment good = {sealed->get(), 4096};
  const Segment longer = {sealed->get(), 8192};
  REQUIRE(reason(loopback(), {&good, 1}) == "made");
  REQUIRE(reason(loopback(), {&longer, 1}) == "SEGMENT_INVALID");
  RailsConfig config = loopback();
  config.rails[0].transport = "rdma?";
  REQUIRE(reason(config, {&good, 1}) == "RAILS_CONFIG_INVALID");
  config = loopback();
  config.rails.clear();
  REQUIRE(reason(config, {&good, 1}) == "RAILS_CONFIG_INVALID");
  config = loopback();
  config.rails[0].device = "lo,eth0";
  REQUIRE(reason(config, {&good, 1}) == "RAILS_CONFIG_INVALID");
  config = loopback();
  config.executable = "/nonexistent/kvferry-rails";
  REQUIRE(reason(config, {&good, 1}) == "RAILS_NOT_FOUND");
  config = loopback();
  config.ucx.overrides = {{"PROTO_ENABLE", "y"}};
  REQUIRE(reason(config, {&good, 1}) == "UCX_OVERRIDE_DENIED");
  config = loopback();
  config.ucx.port_first = 5000;
  config.ucx.port_last = 5000;
  REQUIRE(reason(config, {&good, 1}) == "PORT_RANGE_INVALID");
}

}  // namespace
}  // namespace kvferry::rails::testing
