// Cleared tails between two real daemons, byte by byte: what lies past the prompt's end in the
// blocks that have moved is zeros, and nothing else is touched.
#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {
namespace {

struct Row {
  const char* name;
  const char* from;
  const char* to;
  uint32_t sender_block;
  uint32_t receiver_block;
  uint64_t tokens;
};

std::unique_ptr<Party> attach(const DaemonPair& pair, const Row& row, bool sends) {
  Party::Options options;
  options.instance = std::string(row.name) + (sends ? "-prefill" : "-decode");
  options.socket = pair.side(sends ? 0 : 1).socket();
  options.shape = shape_of(4, 8, 64, row.tokens);
  options.shape.tokens_per_block = sends ? row.sender_block : row.receiver_block;
  const auto topology = bench::parse_topology(sends ? row.from : row.to);
  require_ok(topology);
  options.topology = *topology;
  options.sends = sends;
  options.seed = sends ? 1 : 2;
  options.zero_tail = !sends;
  auto party = Party::make(options);
  require_ok(party);
  return std::move(*party);
}

void require_completed(Party& receiver, const std::string& id) {
  const auto received = receiver.wait(id, kPatience);
  require_ok(received);
  for (const TransferStatus& status : *received) {
    INFO(status.reason);
    REQUIRE(name_of(status.state) == name_of(client::TransferState::kCompleted));
  }
}

}  // namespace

TEST_CASE("the cells past the prompt's end in moved blocks are cleared and no others") {
  const std::unique_ptr<DaemonPair> pair = start_pair({"engine.chunk_bytes=64KiB"});
  // Equal blocks, larger and smaller ones at the receiver; heads from several senders in one block.
  const Row rows[] = {
      {"same", "tp1", "tp1", 16, 16, 250},   {"one", "tp2", "tp1", 16, 16, 1},
      {"full", "tp1", "tp2", 16, 16, 64},    {"join", "tp4", "tp1", 16, 16, 77},
      {"larger", "tp2", "tp1", 4, 16, 41},   {"larger-split", "tp1", "tp2", 4, 64, 70},
      {"smaller", "tp1", "tp2", 32, 8, 101}, {"stages", "pp2", "tp2", 16, 32, 45}};
  for (const Row& row : rows) {
    CAPTURE(row.name);
    const auto sender = attach(*pair, row, true);
    const auto receiver = attach(*pair, row, false);
    const auto ticket = sender->ticket();
    require_ok(ticket);
    const TransferKey key = new_key(sender->instance());
    require_ok(sender->send(key, {}));
    require_ok(receiver->receive(key, *ticket, {}));
    require_completed(*receiver, key.id);
    CHECK(receiver->verify() == "");
    CHECK(receiver->verify_tail(row.tokens) == "");
  }
  CHECK(metric(pair->side(1), "kvferry_copies_total", "kind=\"clear\"") > 0);
}

TEST_CASE("slices of some layers that reach the prompt's end clear the tails of those layers") {
  const std::unique_ptr<DaemonPair> pair = start_pair({"engine.chunk_bytes=64KiB"});
  const Row row{"layers", "tp2", "tp1", 8, 32, 83};
  const auto sender = attach(*pair, row, true);
  const auto receiver = attach(*pair, row, false);
  const auto ticket = sender->ticket();
  require_ok(ticket);
  const TransferKey key = new_key(sender->instance());
  require_ok(receiver->receive(key, *ticket, {}));
  // Some tokens of all layers, then what is left of two layers each: the end is reached twice.
  const std::vector<Party::Send> slices = [] {
    std::vector<Party::Send> out(3);
    out[0].tokens = client::TokenRange{0, 40};
    out[1].tokens = client::TokenRange{40, 83};
    out[1].layers = {0, 2};
    out[2].tokens = client::TokenRange{40, 83};
    out[2].layers = {2, 4};
    return out;
  }();
  for (uint32_t i = 0; i < slices.size(); ++i) {
    Party::Send slice = slices[i];
    slice.index = i;
    slice.last = i + 1 == slices.size();
    require_ok(sender->send(key, slice));
  }
  require_completed(*receiver, key.id);
  CHECK(receiver->verify() == "");
  CHECK(receiver->verify_tail(row.tokens) == "");
}

}  // namespace kvferry::testing
