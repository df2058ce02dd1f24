// Hand-offs between two real daemons over tcp, verified byte by byte: topologies, shapes, token
// counts, slices, and several at once.
#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {
namespace {

DaemonPair& daemons() {
  static const std::unique_ptr<DaemonPair> pair = start_pair({"engine.chunk_bytes=256KiB"});
  return *pair;
}

bench::Shape latent_shape(uint32_t layers, uint32_t bytes, uint64_t tokens) {
  bench::Shape shape = shape_of(layers, 1, bytes, tokens);
  shape.latent = true;
  shape.tokens_per_block = 32;
  return shape;
}

struct Parties {
  std::unique_ptr<Party> sender;
  std::unique_ptr<Party> receiver;
};

// `side`: of the daemons, where the sender is.
Parties attach(const std::string& name, const bench::Shape& shape, const std::string& from,
               const std::string& to, uint32_t requests = 1, int side = 0) {
  Parties parties;
  for (const bool sends : {true, false}) {
    Party::Options options;
    options.instance = name + (sends ? "-prefill" : "-decode");
    options.socket = daemons().side(sends ? side : 1 - side).socket();
    options.shape = shape;
    const auto topology = bench::parse_topology(sends ? from : to);
    require_ok(topology);
    options.topology = *topology;
    options.sends = sends;
    options.requests = requests;
    options.seed = sends ? 1 : 2;
    auto party = Party::make(options);
    require_ok(party);
    (sends ? parties.sender : parties.receiver) = std::move(*party);
  }
  return parties;
}

void require_done(Parties& parties, const std::string& id) {
  const auto received = parties.receiver->wait(id, kPatience);
  require_ok(received);
  for (const TransferStatus& status : *received) {
    INFO(status.reason);
    REQUIRE(name_of(status.state) == name_of(client::TransferState::kCompleted));
    CHECK(status.released);
    CHECK_FALSE(status.memory_in_use);
  }
  const auto sent = parties.sender->wait(id, kPatience);
  require_ok(sent);
  for (const TransferStatus& status : *sent) {
    INFO(status.reason);
    REQUIRE(name_of(status.state) == name_of(client::TransferState::kDelivered));
    CHECK(status.delivery == client::Delivery::kDelivered);
  }
}

enum class First { kSender, kReceiver };

void hand_over(Parties& parties, First first) {
  const auto ticket = parties.sender->ticket();
  require_ok(ticket);
  const TransferKey key = new_key(parties.sender->instance());
  if (first == First::kReceiver) {
    require_ok(parties.receiver->receive(key, *ticket, {}));
    // The PULL is at the sender's daemon, or on its way, before there is a Send.
    REQUIRE(comes_true([&] { return parties.receiver->rank(0).stats().operations_accepted > 0; }));
    require_ok(parties.sender->send(key, {}));
  } else {
    require_ok(parties.sender->send(key, {}));
    REQUIRE(comes_true([&] { return parties.sender->rank(0).stats().operations_accepted > 0; }));
    require_ok(parties.receiver->receive(key, *ticket, {}));
  }
  require_done(parties, key.id);
  CHECK(parties.receiver->verify() == "");
  require_ok(parties.sender->close(key.id));
  require_ok(parties.receiver->close(key.id));
}

}  // namespace

TEST_CASE("a request arrives whole between different topologies") {
  struct Row {
    const char* name;
    bench::Shape shape;
    const char* from;
    const char* to;
  };
  const Row row = GENERATE(Row{"same", shape_of(4, 8, 256, 640), "tp1", "tp1"},
                           Row{"split", shape_of(4, 8, 256, 640), "tp2", "tp4"},
                           Row{"join", shape_of(4, 8, 256, 640), "tp4", "tp2"},
                           Row{"stages", shape_of(6, 8, 256, 640), "pp2", "tp2"},
                           Row{"to-stages", shape_of(5, 8, 256, 640), "tp2", "pp2"},
                           Row{"both", shape_of(4, 8, 128, 320), "tp2pp2", "tp4"},
                           Row{"replicas-in", shape_of(2, 2, 256, 320), "tp4", "tp2"},
                           Row{"replicas-out", shape_of(2, 2, 256, 320), "tp2", "tp4"},
                           Row{"latent", latent_shape(61, 1152, 480), "tp2", "tp4"},
                           Row{"latent-join", latent_shape(8, 1152, 480), "tp4", "tp1"});
  CAPTURE(row.name);
  Parties parties = attach(row.name, row.shape, row.from, row.to);
  hand_over(parties, First::kSender);
  parties.receiver->clean();
  hand_over(parties, First::kReceiver);
}

TEST_CASE("prompts of few tokens and with a partly filled last block arrive") {
  for (const uint64_t tokens : std::vector<uint64_t>{1, 7, 15, 16, 17, 33, 250}) {
    CAPTURE(tokens);
    Parties parties =
        attach("short" + std::to_string(tokens), shape_of(3, 4, 128, tokens), "tp2", "tp1");
    hand_over(parties, First::kSender);
  }
}

TEST_CASE("slices of a chunked prefill arrive, whenever the receiver comes") {
  Parties parties = attach("slices", shape_of(4, 4, 256, 600), "tp2", "tp1");
  const auto ticket = parties.sender->ticket();
  require_ok(ticket);
  // Ends that are no block edges, an empty one inside and an empty last one.
  const std::vector<client::TokenRange> slices = {{0, 100},   {100, 160}, {160, 160},
                                                  {160, 333}, {333, 600}, {600, 600}};
  for (const std::size_t before : {std::size_t{0}, std::size_t{3}, slices.size()}) {
    CAPTURE(before);
    parties.receiver->clean();
    const TransferKey key = new_key(parties.sender->instance());
    for (std::size_t i = 0; i <= slices.size(); ++i) {
      if (i == before) require_ok(parties.receiver->receive(key, *ticket, {}));
      if (i == slices.size()) break;
      Party::Send slice;
      slice.index = static_cast<uint32_t>(i);
      slice.tokens = slices[i];
      slice.last = i + 1 == slices.size();
      require_ok(parties.sender->send(key, slice));
    }
    require_done(parties, key.id);
    CHECK(parties.receiver->verify() == "");
  }
}

TEST_CASE("many transfers at once in both directions all arrive") {
  constexpr uint32_t kRequests = 6;
  const bench::Shape shape = shape_of(4, 8, 256, 512);
  Parties there = attach("there", shape, "tp2", "tp1", kRequests, 0);
  Parties back = attach("back", shape, "tp1", "tp2", kRequests, 1);
  std::vector<std::pair<Parties*, std::string>> running;
  for (uint32_t request = 0; request < kRequests; ++request) {
    for (Parties* parties : {&there, &back}) {
      const auto ticket = parties->sender->ticket();
      require_ok(ticket);
      const TransferKey key = new_key(parties->sender->instance());
      Party::Send send;
      send.request = request;
      Party::Receive receive;
      receive.request = request;
      if (request % 2 == 0) require_ok(parties->sender->send(key, send));
      require_ok(parties->receiver->receive(key, *ticket, receive));
      if (request % 2 != 0) require_ok(parties->sender->send(key, send));
      running.emplace_back(parties, key.id);
    }
  }
  for (auto& [parties, id] : running) require_done(*parties, id);
  CHECK(there.receiver->verify() == "");
  CHECK(back.receiver->verify() == "");
}

TEST_CASE("aux of the last slice comes to every receiver rank with the completion") {
  Parties parties = attach("aux", shape_of(2, 4, 128, 64), "tp2", "tp4");
  const auto ticket = parties.sender->ticket();
  require_ok(ticket);
  for (const std::size_t bytes : {std::size_t{5}, std::size_t{3000}, std::size_t{64} << 10}) {
    CAPTURE(bytes);
    const TransferKey key = new_key(parties.sender->instance());
    Party::Send send;
    send.aux = std::string();
    for (std::size_t i = 0; i < bytes; ++i) send.aux->push_back(static_cast<char>(i * 7 + i / 251));
    require_ok(parties.sender->send(key, send));
    require_ok(parties.receiver->receive(key, *ticket, {}));
    require_done(parties, key.id);
    for (uint32_t rank = 0; rank < parties.receiver->ranks(); ++rank) {
      const auto aux = parties.receiver->rank(rank).aux(parties.receiver->handle(key.id, rank));
      require_ok(aux);
      CHECK(*aux == *send.aux);
    }
    require_ok(parties.sender->close(key.id));
    require_ok(parties.receiver->close(key.id));
  }
}

TEST_CASE("done words are set when the source is released and when the transfer is complete") {
  Parties parties = attach("words", shape_of(2, 4, 128, 64), "tp1", "tp1");
  const auto ticket = parties.sender->ticket();
  require_ok(ticket);
  const auto sent = parties.sender->rank(0).alloc_done_word();
  require_ok(sent);
  require_ok(parties.receiver->rank(0).alloc_done_word());  // so that the numbers differ
  const auto received = parties.receiver->rank(0).alloc_done_word();
  require_ok(received);
  for (uint64_t round = 1; round <= 3; ++round) {
    const TransferKey key = new_key(parties.sender->instance());
    Party::Send send;
    send.done = client::DoneWord{*sent, 100 + round};
    require_ok(parties.sender->send(key, send));
    REQUIRE(comes_true([&] { return parties.sender->rank(0).stats().operations_accepted > 0; }));
    CHECK(parties.sender->rank(0).done_value(*sent) == (round == 1 ? 0 : 100 + round - 1));
    Party::Receive receive;
    receive.done = client::DoneWord{*received, 200 + round};
    require_ok(parties.receiver->receive(key, *ticket, receive));
    require_done(parties, key.id);
    CHECK(parties.sender->rank(0).done_value(*sent) == 100 + round);
    CHECK(parties.receiver->rank(0).done_value(*received) == 200 + round);
  }
  CHECK(parties.receiver->rank(0).done_value(*received - 1) == 0);
}

TEST_CASE("aux that only the rank whose leg does not carry it gives is missed") {
  Parties parties = attach("no-aux", shape_of(2, 4, 128, 64), "tp2", "tp1");
  const auto ticket = parties.sender->ticket();
  require_ok(ticket);
  const TransferKey key = new_key(parties.sender->instance());
  require_ok(parties.receiver->receive(key, *ticket, {}));
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const std::vector<int32_t> ids = parties.sender->blocks(rank, 0, {0, 64});
    const client::GroupBlocks group{0, 0, ids, {}, 0};
    client::SendRequest request;
    request.key = key;
    request.layout = {parties.sender->instance(), rank};
    request.num_tokens = 64;
    request.tokens = {0, 64};
    request.groups = {&group, 1};
    if (rank == 1) request.aux = "first token";
    require_ok(parties.sender->rank(rank).send(request));
  }
  const auto received = parties.receiver->wait(key.id, kPatience);
  require_ok(received);
  CHECK(name_of(received->front().state) == name_of(client::TransferState::kFailed));
  CHECK(received->front().reason == "AUX_MISSING");
}

TEST_CASE("after all of that nothing is held") {
  for (int side = 0; side < 2; ++side) {
    CAPTURE(side);
    CHECK(comes_true([&] { return arena_in_use(daemons().side(side)) == 0; }, seconds(5)));
    CHECK(comes_true([&] { return metric(daemons().side(side), "kvferry_transfers_open") == 0; },
                     seconds(5)));
    CHECK(comes_true([&] { return metric(daemons().side(side), "kvferry_workers") == 0; },
                     seconds(5)));
  }
}

}  // namespace kvferry::testing
