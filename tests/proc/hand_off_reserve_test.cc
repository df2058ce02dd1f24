// Reserve through real daemons: promised, used by its transfer, given back; in line and at once.
#include <thread>

#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {
namespace {

using client::ReserveRequest;
using client::TransferState;

constexpr uint64_t kChunk = 64 * 1024;
constexpr uint64_t kFrames = 32ULL * 1024 * 1024 / kChunk;

struct Scene {
  std::unique_ptr<DaemonPair> pair =
      start_pair({"engine.chunk_bytes=64KiB", "engine.staged_ahead=2"});
  std::unique_ptr<Party> sender = attach("prefill", 0);
  std::unique_ptr<Party> receiver = attach("decode", 1);
  std::string ticket = ticket_of(*sender);

  std::unique_ptr<Party> attach(const std::string& instance, int side) const {
    Party::Options options;
    options.instance = instance;
    options.socket = pair->side(static_cast<std::size_t>(side)).socket();
    options.shape = small_shape();
    const auto topology = bench::parse_topology("tp1");
    require_ok(topology);
    options.topology = *topology;
    options.sends = side == 0;
    auto party = Party::make(options);
    require_ok(party);
    return std::move(*party);
  }
  static std::string ticket_of(Party& party) {
    const auto got = party.ticket();
    require_ok(got);
    return *got;
  }
  ReserveRequest request(const TransferKey& key, uint64_t bytes) const {
    ReserveRequest out;
    out.key = key;
    out.layout = {"decode", 0};
    out.ticket = ticket;
    out.bytes = bytes;
    return out;
  }
  client::Client& worker() const { return receiver->rank(0); }
  double reserved() const { return metric(pair->side(1), "kvferry_arena_reserved_bytes"); }
};

}  // namespace

TEST_CASE("a reservation is its transfer's until that has ended") {
  Scene s;
  const TransferKey key = new_key("prefill");
  const auto promised = s.worker().reserve(s.request(key, small_shape().bytes()));
  require_ok(promised);
  CHECK(*promised == small_shape().bytes());
  const auto again = s.worker().reserve(s.request(key, small_shape().bytes()));
  require_ok(again);
  CHECK(*again == *promised);
  const auto other = s.worker().reserve(s.request(key, 1));
  REQUIRE_FALSE(other);
  CHECK(other.error().reason == "RESERVATION_EXISTS");
  CHECK(other.error().field == "bytes");
  CHECK(comes_true([&] { return s.reserved() == static_cast<double>(*promised); }));

  require_ok(s.receiver->receive(key, s.ticket, {}));
  require_ok(s.sender->send(key, {}));
  const auto ended = s.receiver->wait(key.id, kPatience);
  require_ok(ended);
  CHECK((*ended)[0].state == TransferState::kCompleted);
  CHECK(s.receiver->verify() == "");
  CHECK(comes_true([&] { return s.reserved() == 0 && arena_in_use(s.pair->side(1)) == 0; }));
}

TEST_CASE("a reservation nobody uses ends with its lease, and who stands in line is next") {
  Scene s;
  const uint64_t most = (kFrames - 4) * kChunk;
  ReserveRequest all = s.request(new_key("prefill"), most);
  all.lease = milliseconds(1500);
  require_ok(s.worker().reserve(all));

  const auto larger = s.worker().reserve(s.request(new_key("prefill"), most + 1));
  REQUIRE_FALSE(larger);
  CHECK(larger.error().reason == "RESERVATION_TOO_LARGE");
  CHECK(larger.error().field == "bytes");

  ReserveRequest impatient = s.request(new_key("prefill"), 1);
  impatient.wait_for_arena = false;
  const auto refused = s.worker().reserve(impatient);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().reason == "ARENA_EXHAUSTED");

  const auto waited = s.worker().reserve(s.request(new_key("prefill"), 1));
  require_ok(waited);
  CHECK(*waited == kChunk);
}

TEST_CASE("a worker's reservations end with it") {
  Scene s;
  require_ok(s.worker().reserve(s.request(new_key("prefill"), 10 * kChunk)));
  CHECK(comes_true([&] { return s.reserved() == 10.0 * kChunk; }));
  s.receiver.reset();
  CHECK(comes_true([&] { return s.reserved() == 0; }));
}

}  // namespace kvferry::testing
