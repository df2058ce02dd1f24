// Writes the inputs that the fuzzers begin with where only a program can make them: good messages,
// which chance would hardly find. Called once for each change of a format:
//   fuzz_seeds tests/fuzz/corpus
#include <filesystem>
#include <fstream>
#include <iostream>

#include "daemon/link/codec.h"
#include "daemon/mapping/validate.h"
#include "daemon/node/cards.h"
#include "daemon/node/tickets.h"
#include "daemon/ops/config.h"
#include "daemon/rpc/layout_proto.h"
#include "daemon/rpc/peer_messages.h"
#include "tests/proc/bad_input_rows.h"

namespace {

using namespace kvferry;

std::filesystem::path corpus;

void write(const std::string& target, const std::string& name, const std::string& bytes) {
  std::filesystem::create_directories(corpus / target);
  std::ofstream out(corpus / target / ("seed-" + name), std::ios::binary);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!out.flush()) throw std::runtime_error("cannot write " + target + "/" + name);
}

std::string two_bytes(std::size_t size) {
  return {static_cast<char>(size & 0xFF), static_cast<char>(size >> 8)};
}

// Both of the body alone and sealed (envelope.cc: a mode, a type, lane, epoch and sequence before
// it).
void message(const std::string& name, const link::Message& of) {
  std::vector<uint8_t> body;
  if (const Status made = link::encode_body(of, body); !made)
    throw std::runtime_error(name + ": " + made.error().to_string());
  const std::string bytes(body.begin(), body.end());
  const char type = static_cast<char>(link::type_of(of));
  write("codec", name, type + bytes);
  write("envelope", name, std::string{2, type} + std::string(16, '\1') + bytes);
}

void messages() {
  using namespace engine;
  const PullId pull{{{1}}, 7};
  const TransferName transfer{"default/prefill", {{2}}, "id", {{3}}};
  message("hello", ControlMessage{MsgHello{true}});
  message("ping", ControlMessage{MsgPing{}});
  message("lane_down", ControlMessage{MsgLaneDown{1, 2}});
  MsgPull asked;
  asked.pull = pull;
  asked.transfer = transfer;
  asked.receiver_instance = "default/decode";
  asked.needs = {{0, 0, 64, {{0, 16}, {32, 64}}}};
  asked.remaining_ms = 1000;
  asked.credits = {{{1}, 64, {}}, {{2}, 64, {}}};
  asked.oldest = 1;
  message("pull", ControlMessage{asked});
  asked.credits.clear();
  asked.mapped = 1;
  message("pull_mapped", ControlMessage{asked});
  message("update", ControlMessage{MsgUpdate{pull, {{{3}, 64, {}}}, {{0, 1}, {0, 2}}, 1}});
  message("update_mapped",
          ControlMessage{MsgUpdate{pull, {{{3}, 64, RegionPlace{1, 128}}}, {{0, 1}}, 1}});
  MsgSlice slice;
  slice.pull = pull;
  slice.send = {{{4}}, 5};
  slice.last = slice.with_aux = true;
  slice.ranges = {{0, {{0, 16}}}, {2, {{0, 64}}}};
  slice.layers = Range{0, 4};
  slice.bytes = 640;
  slice.aux = "aux";
  message("slice", ControlMessage{slice});
  message("offer", MsgOffer{pull, slice.send, 0, 1, {3}, {9}, 64, {CheckKind::kXxh3, {1}}});
  message("refuse", MsgRefuse{pull, {9}});
  MsgEnd end;
  end.pull = pull;
  end.transfer = transfer;
  end.reason = Reason::kDeadline;
  message("end", ControlMessage{end});
  end.proof = Proof{{5}};
  end.mapped = true;
  message("end_mapped", ControlMessage{end});
  message("claim", ControlMessage{MsgClaim{transfer, {}, "default/decode", {{2}}, 0, 1, 500}});
  message("decline", ControlMessage{MsgDecline{transfer, {}, "default/decode", {{2}}, 0, 1}});
  message("drop", ControlMessage{MsgDrop{pull, 1}});
  message("mapped", ControlMessage{MsgMapped{1}});
  message("written", ControlMessage{MsgWritten{pull, 0, 1, {3}, {}}});
  message("drained", ControlMessage{MsgDrained{pull}});
}

mapping::RankLayout good_layout() {
  auto layout = rpc::from_proto(bad_input::good_layout());
  if (!layout) throw std::runtime_error(layout.error().to_string());
  return std::move(*layout);
}

void peers() {
  const auto kind = [](char which, const std::string& bytes) { return which + bytes; };
  rpc::PeerHello hello;
  hello.features = {"mapped"};
  hello.node = "node2";
  hello.address = "node2:7400";
  hello.ucx_version = "1.13.1";
  hello.chunk_bytes = 1 << 20;
  hello.max_credits = 64;
  hello.checks = {0, 1};
  hello.rails = {{"tcp", "lo", {1, 2, 3}}};
  write("peer", "hello", kind(1, rpc::encode_hello(hello)));
  rpc::RankCard card;
  card.node = "node2";
  card.address = hello.address;
  card.instance = "default/decode";
  card.incarnation.bytes.fill(1);
  card.generation = 1;
  card.holding = mapping::holding_of(good_layout());
  std::string set(1, 0);
  for (uint32_t rank = 0; rank < 2; ++rank) {
    card.holding.topology = {rank, 2, 0};
    const std::string bytes = rpc::encode_card(card).value();
    set += two_bytes(bytes.size()) + bytes;
  }
  write("peer", "set", set);
  const std::string bytes = rpc::encode_card(card).value();
  const rpc::SignedCard signed_card{bytes, std::string(16, 'x')};
  write("peer", "card", kind(2, bytes));
  write("peer", "signed_card", kind(3, rpc::encode_signed_card(signed_card)));
  rpc::CardQuery query;
  query.instance = card.instance;
  write("peer", "query", kind(4, rpc::encode(query)));
  rpc::CardPage page;
  page.rank_count = 2;
  page.cards = {signed_card};
  page.more = true;
  page.next_rank = 1;
  write("peer", "page", kind(5, rpc::encode(page)));
  write("peer", "reopen",
        kind(6, rpc::encode(rpc::ReopenLaneRequest{1, 2, "1.13.1", hello.rails[0]})));
  write("peer", "reopened", kind(7, rpc::encode(rpc::ReopenLaneReply{hello.rails[0]})));
  write("peer", "lane_down", kind(8, rpc::encode(rpc::LaneDownNotice{1, 2})));
  write("peer", "close", kind(9, rpc::encode(rpc::CloseLinkNotice{Reason::kShutdown})));
  write("peer", "join",
        kind(10, rpc::encode(rpc::JoinForward{
                     card.instance, card.incarnation, {{"node2", hello.address}}})));
  rpc::ArenasQuery arenas;
  arenas.host.bytes.fill(1);
  write("peer", "arenas", kind(11, rpc::encode(arenas)));
  rpc::ArenasOffer offer;
  offer.host.bytes.fill(1);
  offer.socket_path = "/run/kvferry/arenas.sock";
  offer.token.bytes.fill(2);
  offer.arenas = {{1, rpc::LentKind::kHostMemfd, {}, {{4, 4096, {}}, {5, 4096, {}}}}};
  write("peer", "offer", kind(12, rpc::encode(offer)));
  write("peer", "trace_query", kind(13, rpc::encode(rpc::TraceQuery{"0badcafe"})));
  rpc::TraceReply trace;
  trace.parts = {{"send", 1, "ACTIVE", Reason::kNone, 2, 3, 4, 5, {{"asked", Duration(9), {}, 1}}}};
  write("peer", "trace", kind(14, rpc::encode(trace)));
  node::InstanceTicket ticket;
  ticket.node = card.node;
  ticket.address = card.address;
  ticket.instance = card.instance;
  ticket.incarnation = card.incarnation;
  write("ticket", "instance", node::format_ticket(ticket).value());
  write("ticket", "name", "kvferry:node2:7400/default/decode");
}

void requests() {
  using namespace bad_input;
  const std::string ticket = "kvferry:node2:7400/default/decode";
  const std::string all[] = {
      good_open_send().SerializeAsString(),     good_send().SerializeAsString(),
      good_receive(ticket).SerializeAsString(), good_claim(ticket).SerializeAsString(),
      good_decline(ticket).SerializeAsString(), good_reserve(ticket).SerializeAsString(),
      good_commit().SerializeAsString(),        good_lookup().SerializeAsString(),
      good_withdraw().SerializeAsString()};
  char kind = 0;
  for (const std::string& bytes : all) {
    write("worker_ops", std::to_string(kind), kind + bytes);
    ++kind;
  }
  v1::RegisterPoolsRequest pools;
  auto* pool = pools.add_pools();
  pool->set_name("kv");
  pool->set_kind(v1::POOL_KIND_HOST_SHM);
  pool->set_bytes(4096);
  write("worker_ops", "pools", kind + pools.SerializeAsString());
  v1::RankLayout layout = bad_input::good_layout();
  const std::string bytes = layout.SerializeAsString();
  write("layout", "good", two_bytes(bytes.size()) + bytes + std::string(80, '\1'));
}

// One section a file: a small input is a good one.
void configuration() {
  const std::string text = ops::default_config_text();
  std::size_t begin = 0;
  int number = 0;
  while (begin < text.size()) {
    std::size_t end = text.find("\n\n", begin);
    end = end == std::string::npos ? text.size() : end;
    std::string section;
    std::size_t line = begin;
    while (line < end) {
      const std::size_t stop = std::min(text.find('\n', line), end);
      const std::string_view one(text.data() + line, stop - line);
      if (!one.starts_with("#") && !one.empty()) section.append(one).append("\n");
      line = stop + 1;
    }
    if (!section.empty()) write("config", std::to_string(number++), section);
    begin = end + 2;
  }
  std::string sets(1, 0);
  for (const char* one : {"KVFERRY_ENGINE_LEASE=5s", "engine.chunk=256KiB", "1.5GiB", "250ms"})
    sets.append(one).push_back(0);
  write("config", "sets", sets);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: fuzz_seeds FOLDER\n";
    return 2;
  }
  corpus = argv[1];
  messages();
  peers();
  requests();
  configuration();
  return 0;
}
