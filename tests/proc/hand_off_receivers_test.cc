// Several receivers of one transfer through two real daemons: refused where the sender allowed one,
// served where it allowed more, and what the failure of one means to the others. Every byte of
// every receiver's pools is compared.
#include <algorithm>

#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {
namespace {

using client::TransferState;

std::unique_ptr<Party> attach(const std::string& instance, bool sends, const char* topology,
                              const bench::Shape& shape = small_shape()) {
  static const std::unique_ptr<DaemonPair> pair = start_pair({"engine.chunk_bytes=64KiB"});
  Party::Options options;
  options.instance = instance;
  options.socket = pair->side(sends ? 0 : 1).socket();
  options.shape = shape;
  const auto parsed = bench::parse_topology(topology);
  require_ok(parsed);
  options.topology = *parsed;
  options.sends = sends;
  options.seed = std::hash<std::string>{}(instance) % 1000;
  auto party = Party::make(options);
  require_ok(party);
  return std::move(*party);
}

struct Scene {
  std::unique_ptr<Party> sender = attach("prefill", true, "tp2");
  std::unique_ptr<Party> one = attach("decode-one", false, "tp1");
  std::unique_ptr<Party> two = attach("decode-two", false, "tp2");
  TransferKey key = new_key("prefill");
  std::string ticket;

  Scene() {
    const auto got = sender->ticket();
    require_ok(got);
    ticket = *got;
  }
  // The first half of the prompt, or the second, which is the last slice.
  void send_half(int half, uint32_t max_receivers, const std::optional<std::string>& aux = {}) {
    Party::Send slice;
    slice.index = static_cast<uint32_t>(half);
    slice.tokens = half == 0 ? client::TokenRange{0, 256} : client::TokenRange{256, 512};
    slice.last = half == 1;
    slice.max_receivers = max_receivers;
    slice.aux = aux;
    require_ok(sender->send(key, slice));
  }
  void receive(Party& party) const { require_ok(party.receive(key, ticket, {})); }
  // It is one of the transfer's receivers: the first slice has come to all its ranks.
  void require_admitted(Party& party) const {
    for (uint32_t rank = 0; rank < party.ranks(); ++rank)
      REQUIRE(comes_true([&] {
        const auto status = party.rank(rank).status(party.handle(key.id, rank));
        return status && status->state == TransferState::kActive && status->slices > 0;
      }));
  }
  void require_end(Party& party, TransferState state, const std::string& reason) const {
    const auto ended = party.wait(key.id, kPatience);
    require_ok(ended);
    for (const TransferStatus& status : *ended) {
      CHECK(name_of(status.state) == name_of(state));
      CHECK(status.reason == reason);
      CHECK(status.released);
      CHECK_FALSE(status.memory_in_use);
    }
  }
  void require_received(Party& party) const {
    require_end(party, TransferState::kCompleted, "NONE");
    CHECK(party.verify() == "");
  }
  // Not a byte of it has come, and none went anywhere else.
  void require_refused(Party& party, const std::string& reason) const {
    require_end(party, TransferState::kFailed, reason);
    const std::string all = std::to_string(small_shape().bytes());
    const std::string found = party.verify();
    CAPTURE(found);
    CHECK(found.find(" " + all + " wrong bytes of " + all + ",") != std::string::npos);
  }
  bool source_held() const {
    for (uint32_t rank = 0; rank < sender->ranks(); ++rank) {
      const auto status = sender->rank(rank).status(sender->handle(key.id, rank));
      if (!status || status->released || is_terminal(status->state)) return false;
    }
    return true;
  }
};

}  // namespace

TEST_CASE("eight ranks that need the same latents: what one has gathered serves the others") {
  static const std::unique_ptr<DaemonPair> pair =
      start_pair({"engine.chunk_bytes=64KiB", "checks.kind=xxh3"});
  bench::Shape shape = small_shape();
  shape.kv_heads = 1;
  shape.latent = true;
  std::unique_ptr<Party> parties[2];
  for (const bool sends : {true, false}) {
    Party::Options options;
    options.instance = sends ? "latent-prefill" : "latent-decode";
    options.socket = pair->side(sends ? 0 : 1).socket();
    options.shape = shape;
    options.topology = *bench::parse_topology(sends ? "tp1" : "tp8");
    options.sends = sends;
    auto party = Party::make(options);
    require_ok(party);
    parties[sends ? 0 : 1] = std::move(*party);
  }
  const TransferKey key = new_key("latent-prefill");
  const auto ticket = parties[0]->ticket();
  require_ok(ticket);
  // They wait already, so that they start together.
  require_ok(parties[1]->receive(key, *ticket, {}));
  for (uint32_t rank = 0; rank < 8; ++rank)
    REQUIRE(comes_true([&] { return parties[1]->rank(rank).stats().operations_accepted > 0; }));
  require_ok(parties[0]->send(key, {}));
  for (const auto& party : parties) {
    const auto ended = party->wait(key.id, kPatience);
    require_ok(ended);
    for (const TransferStatus& status : *ended) {
      INFO(status.reason);
      CHECK(name_of(status.state) ==
            name_of(party == parties[0] ? TransferState::kDelivered : TransferState::kCompleted));
    }
  }
  CHECK(parties[1]->verify() == "");
  const bench::DaemonProcess& daemon = pair->side(0);
  const double chunks = 8.0 * static_cast<double>(shape.bytes() >> 16);
  const auto gathered = [&] { return metric(daemon, "kvferry_chunks_total", "\"gathered\""); };
  const auto shared = [&] { return metric(daemon, "kvferry_chunks_total", "\"shared\""); };
  REQUIRE(comes_true([&] { return gathered() + shared() == chunks; }));
  CAPTURE(gathered(), shared());
  CHECK(shared() > 0);
  REQUIRE(comes_true([&] { return arena_in_use(daemon) == 0; }));
}

TEST_CASE("a second receiver is refused and the first gets everything") {
  Scene s;
  s.send_half(0, 1);
  s.receive(*s.two);
  s.require_admitted(*s.two);
  s.receive(*s.one);
  s.require_refused(*s.one, "REFUSED");
  CHECK(s.source_held());
  s.send_half(1, 1);
  s.require_received(*s.two);
  s.require_end(*s.sender, TransferState::kDelivered, "NONE");
}

TEST_CASE("two receivers that the sender allowed both get everything, a third is refused") {
  Scene s;
  std::unique_ptr<Party> three = attach("decode-three", false, "tp1");
  s.send_half(0, 2);
  s.receive(*s.one);
  s.receive(*s.two);
  s.require_admitted(*s.one);
  s.require_admitted(*s.two);
  s.receive(*three);
  s.require_refused(*three, "REFUSED");
  const std::string aux = "for everybody";
  s.send_half(1, 2, aux);
  for (Party* party : {s.one.get(), s.two.get()}) {
    s.require_received(*party);
    for (uint32_t rank = 0; rank < party->ranks(); ++rank) {
      const auto got = party->rank(rank).aux(party->handle(s.key.id, rank));
      require_ok(got);
      CHECK(*got == aux);
    }
  }
  s.require_end(*s.sender, TransferState::kDelivered, "NONE");
}

TEST_CASE("the source is held for the second receiver after the first has everything") {
  Scene s;
  s.send_half(0, 2);
  s.send_half(1, 2);
  s.receive(*s.one);
  s.require_received(*s.one);
  CHECK(s.source_held());
  s.receive(*s.two);
  s.require_received(*s.two);
  s.require_end(*s.sender, TransferState::kDelivered, "NONE");
}

TEST_CASE("a second receiver that never comes holds the source as long as the lease") {
  Scene s;
  // The receiver waits already, so that the lease need not be long enough for it to come.
  s.receive(*s.one);
  for (uint32_t rank = 0; rank < s.one->ranks(); ++rank)
    REQUIRE(comes_true([&] { return s.one->rank(rank).stats().operations_accepted > 0; }));
  Party::Send send;
  send.max_receivers = 2;
  send.lease = milliseconds(1500);
  const auto begin = std::chrono::steady_clock::now();
  require_ok(s.sender->send(s.key, send));
  s.require_received(*s.one);
  s.require_end(*s.sender, TransferState::kDelivered, "NONE");
  CHECK(std::chrono::steady_clock::now() - begin >= send.lease);
  // Who comes after it gets nothing.
  s.receive(*s.two);
  const auto late = s.two->wait(s.key.id, kPatience);
  require_ok(late);
  for (const TransferStatus& status : *late) {
    CHECK(status.state == TransferState::kFailed);
    CHECK(status.bytes_done == 0);
  }
}

TEST_CASE("one receiver's cancel leaves the other alone") {
  Scene s;
  s.send_half(0, 2);
  s.receive(*s.one);
  s.receive(*s.two);
  s.require_admitted(*s.one);
  s.require_admitted(*s.two);
  for (uint32_t rank = 0; rank < s.two->ranks(); ++rank)  // each rank for itself
    require_ok(s.two->rank(rank).cancel(s.two->handle(s.key.id, rank)));
  s.require_end(*s.two, TransferState::kCancelled, "CANCELLED");
  CHECK(s.source_held());
  s.send_half(1, 2);
  s.require_received(*s.one);
  s.require_end(*s.sender, TransferState::kDelivered, "NONE");
}

TEST_CASE("receivers that compete for one place all end, and who completes has every byte") {
  Scene s;
  // One rank admits one receiver; two may choose different ones, none of which can complete then.
  const bool one_rank = GENERATE(true, false);
  if (one_rank) {
    s.sender = attach("prefill-one", true, "tp1");
    const auto ticket = s.sender->ticket();
    require_ok(ticket);
    s.ticket = *ticket;
  }
  std::vector<std::unique_ptr<Party>> parties;
  for (int i = 0; i < 4; ++i)
    parties.push_back(attach("rival-" + std::to_string(i), false, i % 2 == 0 ? "tp1" : "tp2"));
  for (int round = 0; round < 6; ++round) {
    CAPTURE(one_rank, round);
    s.key = new_key(s.sender->instance());
    if (round % 2 == 0) require_ok(s.sender->send(s.key, {}));
    for (auto& party : parties) {
      party->clean();
      s.receive(*party);
    }
    if (round % 2 != 0) require_ok(s.sender->send(s.key, {}));
    std::size_t complete = 0;
    for (auto& party : parties) {
      const auto ended = party->wait(s.key.id, kPatience);
      require_ok(ended);
      const bool all = std::all_of(ended->begin(), ended->end(), [](const TransferStatus& of) {
        return of.state == TransferState::kCompleted;
      });
      if (all) CHECK(party->verify() == "");
      complete += all ? 1 : 0;
      require_ok(party->close(s.key.id));
    }
    if (one_rank)
      CHECK(complete == 1);
    else
      CHECK(complete <= 1);
    const auto sent = s.sender->wait(s.key.id, kPatience);
    require_ok(sent);
    for (const TransferStatus& status : *sent) {
      CHECK(is_terminal(status.state));
      CHECK(status.released);
      if (complete == 1) CHECK(status.state == TransferState::kDelivered);
    }
    require_ok(s.sender->close(s.key.id));
  }
}

TEST_CASE("a peer that does not fit is refused while a good one goes on") {
  Scene s;
  bench::Shape other = small_shape();
  SECTION("other heads") {
    other.head_bytes = 128;
  }
  SECTION("another model") {
    other.name = "another";
  }
  std::unique_ptr<Party> stranger = attach("stranger", false, "tp1", other);
  s.send_half(0, 1);
  s.receive(*s.one);
  s.require_admitted(*s.one);
  // Its own transfer, under way at the same time.
  const TransferKey key = new_key("prefill");
  Party::Send send;
  require_ok(s.sender->send(key, send));
  require_ok(stranger->receive(key, s.ticket, {}));
  const auto refused = stranger->wait(key.id, kPatience);
  require_ok(refused);
  CHECK(refused->front().state == TransferState::kFailed);
  CHECK(refused->front().reason == "INCOMPATIBLE");
  CHECK(refused->front().bytes_done == 0);
  s.send_half(1, 1);
  s.require_received(*s.one);
  s.require_end(*s.sender, TransferState::kDelivered, "NONE");
}

}  // namespace kvferry::testing
