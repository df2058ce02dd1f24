// Each family of topologies and layouts through two real daemons: one worker a rank, every byte of
// the receivers' pools compared. All rows of the families are run in one process by
// acceptance_test.
#include <algorithm>
#include <catch2/catch.hpp>
#include <map>
#include <string>

#include "tests/proc/hand_off_daemons.h"
#include "tests/unit/acceptance_sides.h"

using namespace kvferry;
using namespace kvferry::acceptance;
using namespace kvferry::testing;
using mapping::Granularity;

namespace {

// Each kind of check has a pair, which takes no peer that does less.
constexpr const char* kChecks[] = {"none", "xxh3", "gmac"};
DaemonPair& daemons(const std::string& check) {
  static std::map<std::string, std::unique_ptr<DaemonPair>> pairs;
  std::unique_ptr<DaemonPair>& pair = pairs[check];
  if (!pair) {
    pair = start_pair(
        {"engine.chunk_bytes=16KiB", "checks.kind=" + check, "checks.min_check=" + check});
  }
  return *pair;
}

template <typename T>
T ok(client::Result<T> result, const std::string& what) {
  if (!result) wrong(what + ": " + result.error().to_string());
  return std::move(*result);
}
void ok(const client::Status& status, const std::string& what) {
  if (!status) wrong(what + ": " + status.error().to_string());
}

client::Layout as_client_layout(const mapping::RankLayout& from) {
  client::Layout layout;
  layout.rank = from.topology.rank;
  layout.rank_count = from.topology.rank_count;
  layout.dp_group = from.topology.dp_group;
  layout.fingerprint = from.fingerprint;
  for (const mapping::PoolSpan& pool : from.pools) layout.pools.push_back({pool.name, pool.bytes});
  for (const mapping::Group& group : from.groups) {
    client::Group to;
    to.tokens_per_block = group.tokens_per_block;
    to.sliding_window = group.sliding_window;
    to.cp_size = group.cp_size;
    to.cp_index = group.cp_index;
    to.cp_interleave = group.cp_interleave;
    to.tail = group.tail == mapping::Tail::kZero ? client::Tail::kZero : client::Tail::kLeave;
    to.block_count = group.block_count;
    to.id_space = group.id_space;
    to.blocks_per_id = group.blocks_per_id;
    for (const mapping::Plane& plane : group.planes) {
      const auto granularity =
          plane.granularity == Granularity::kToken   ? client::Granularity::kToken
          : plane.granularity == Granularity::kBlock ? client::Granularity::kBlock
                                                     : client::Granularity::kRequest;
      to.planes.push_back({plane.layer, plane.role, plane.units_total, plane.unit_begin,
                           plane.unit_count, granularity, plane.cell_bytes, plane.type,
                           plane.optional, plane.order, plane.pool, plane.offset,
                           plane.block_stride, plane.unit_stride, plane.token_stride});
    }
    layout.groups.push_back(std::move(to));
  }
  return layout;
}

// The workers of one side, one client a rank.
struct Side {
  std::string instance;
  std::vector<Rank> ranks;
  std::vector<std::unique_ptr<client::Client>> clients;

  Side(const SideSpec& spec, std::string name, const std::string& socket, uint64_t seed)
      : instance(std::move(name)) {
    std::mt19937_64 random(seed);
    ranks = make_side(spec, random);
    for (Rank& rank : ranks) {
      client::AttachOptions options;
      options.socket = socket;
      options.name = instance + "-" + std::to_string(rank.layout.topology.rank);
      options.reconnect = false;
      clients.push_back(ok(client::Client::attach(options), "attach"));
      for (const mapping::PoolSpan& pool : rank.layout.pools) {
        const auto memory = ok(clients.back()->alloc_pool(pool.name, pool.bytes), "alloc_pool");
        rank.memory.emplace_back(memory.data, memory.bytes);
      }
      clean(rank);
      client::LayoutRegistration registration;
      registration.instance = instance;
      registration.layout = as_client_layout(rank.layout);
      (void)ok(clients.back()->register_layout(registration), "register_layout");
    }
  }
  client::LayoutRef layout(std::size_t rank) const {
    return {instance, ranks[rank].layout.topology.rank};
  }
};

struct Options {
  uint32_t sender_dp = 0;
  uint32_t receiver_dp = 0;
  bool tells_dp = true;
  bool receiver_first = false;
  std::string check = "none";
};

std::vector<client::TransferHandle> receive_all(const Case& of, Side& side, const TransferKey& key,
                                                const std::string& ticket, const Options& options) {
  std::vector<client::TransferHandle> handles(side.ranks.size());
  for (std::size_t i = 0; i < side.ranks.size(); ++i) {
    const Rank& rank = side.ranks[i];
    if (rank.layout.topology.dp_group != options.receiver_dp) continue;
    std::vector<client::GroupBlocks> groups;
    for (uint32_t g = 0; g < rank.blocks.size(); ++g)
      groups.push_back({g, 0, rank.blocks[g].ids, {}, cached_of(of, rank, g)});
    client::ReceiveRequest request;
    request.key = key;
    request.layout = side.layout(i);
    request.ticket = ticket;
    if (options.tells_dp) request.sender_dp_group = options.sender_dp;
    request.num_tokens = of.receiver.prompt;
    request.groups = groups;
    handles[i] = ok(side.clients[i]->receive(request), "receive");
  }
  return handles;
}

std::vector<client::TransferHandle> send_all(const Case& of, Side& side, const TransferKey& key,
                                             const Options& options) {
  std::vector<client::TransferHandle> handles(side.ranks.size());
  const std::vector<SliceSpec> slices = slices_of(of);
  for (std::size_t i = 0; i < side.ranks.size(); ++i) {
    const Rank& rank = side.ranks[i];
    if (rank.layout.topology.dp_group != options.sender_dp) continue;
    for (std::size_t s = 0; s < slices.size(); ++s) {
      const bool last = s + 1 == slices.size();
      std::vector<client::GroupBlocks> groups;
      for (uint32_t g = 0; g < rank.blocks.size(); ++g) {
        const bool state = is_state(of.sender.groups[rank.model[g]]);
        if (!state || last) groups.push_back({g, 0, rank.blocks[g].ids, {}, 0});
      }
      client::SendRequest request;
      request.key = key;
      request.layout = side.layout(i);
      request.index = static_cast<uint32_t>(s);
      request.num_tokens = of.sender.prompt;
      request.tokens = {slices[s].tokens.begin, slices[s].tokens.end};
      if (slices[s].layers)
        request.layers = {static_cast<uint32_t>(slices[s].layers->begin),
                          static_cast<uint32_t>(slices[s].layers->end)};
      request.groups = groups;
      request.last = last;
      if (last) request.aux = "first token";
      handles[i] = ok(side.clients[i]->send(request), "send");
    }
  }
  return handles;
}

void wait_all(Side& side, const std::vector<client::TransferHandle>& handles,
              client::TransferState wanted) {
  const auto limit = std::chrono::steady_clock::now() + kPatience;
  for (std::size_t i = 0; i < handles.size(); ++i) {
    if (handles[i] == 0) continue;
    const auto status = ok(side.clients[i]->wait(handles[i], limit), side.instance + " wait");
    if (status.state != wanted)
      wrong(side.instance + " rank " + std::to_string(i) + " ended " +
            std::string(client::name_of(status.state)) + " " + std::string(status.reason));
    if (wanted == client::TransferState::kCompleted &&
        ok(side.clients[i]->aux(handles[i]), "aux") != "first token")
      wrong("aux is wrong");
    ok(side.clients[i]->close(handles[i]), "close");
  }
}

void hand_over(const Case& of, const Options& options = {}) {
  static uint32_t count = 0;
  INFO(of.name);
  const std::string number = std::to_string(++count);
  const auto run = [&] {
    const DaemonPair& pair = daemons(options.check);
    Side sender(of.sender, "prefill" + number, pair.side(0).socket(), of.seed);
    Side receiver(of.receiver, "decode" + number, pair.side(1).socket(), of.seed + 1);
    for (const Rank& rank : sender.ranks) fill(rank);
    const std::string ticket = ok(sender.clients[0]->ticket(sender.instance), "ticket");
    const TransferKey key = new_key(sender.instance);
    std::vector<client::TransferHandle> receiving;
    if (options.receiver_first) receiving = receive_all(of, receiver, key, ticket, options);
    const auto sending = send_all(of, sender, key, options);
    if (!options.receiver_first) receiving = receive_all(of, receiver, key, ticket, options);
    wait_all(receiver, receiving, client::TransferState::kCompleted);
    wait_all(sender, sending, client::TransferState::kDelivered);
    const Holders holders = holders_of(sender.ranks, options.sender_dp);
    uint64_t cells = 0;
    for (std::size_t i = 0; i < receiver.ranks.size(); ++i) {
      const Rank& rank = receiver.ranks[i];
      std::vector<std::vector<std::byte>> expected;
      if (receiving[i] != 0)
        expected = expected_memory(of, rank, holders, cells);
      else
        for (const auto& pool : rank.memory) expected.emplace_back(pool.size(), kUntouched);
      compare(rank, expected);
    }
    for (const Rank& rank : sender.ranks) {  // a sender's pages are only read
      std::vector<std::vector<std::byte>> before;
      for (const auto& pool : rank.memory) before.emplace_back(pool.begin(), pool.end());
      fill(rank);
      compare(rank, before);
    }
  };
  REQUIRE_NOTHROW(run());
}

std::vector<ModelGroup> hybrid(uint64_t window) {
  std::vector<ModelGroup> groups(2, attention(4, 4).front());
  groups[0].layers = {0, 2};
  groups[0].window = window;
  groups[1].layers = {1, 3};
  return groups;
}

}  // namespace

TEST_CASE("symmetric and asymmetric topologies through daemons") {
  hand_over(between("tp2pp2", "tp2pp2", attention(8, 8)));
  hand_over(between("tp4", "tp2pp2", attention(8, 8)));
  hand_over(between("pp4", "tp4", attention(8, 8)), {.receiver_first = true});
  hand_over(between("1", "pp2", attention(8, 8)));
}

TEST_CASE("attention data parallelism through daemons, the sender's group known or not") {
  for (const bool tells : {true, false}) {
    for (const bool first : {true, false}) {
      hand_over(between("tp4D", "tp2pp2", attention(4, 8)),
                {.sender_dp = 2, .tells_dp = tells, .receiver_first = first});
      hand_over(between("tp2pp2 D", "tp2pp2 D", attention(4, 8)),
                {.sender_dp = 1, .receiver_dp = 1, .tells_dp = tells, .receiver_first = first});
    }
  }
  hand_over(between("tp2", "tp2D", attention(4, 8)), {.receiver_dp = 1});
}

TEST_CASE("latent attention through daemons") {
  hand_over(between("tp4D", "tp8", latent(4)), {.sender_dp = 3});
  hand_over(between("tp4D", "tp8", latent(4)), {.sender_dp = 1, .tells_dp = false});
  hand_over(between("tp8", "tp4", latent(4)));
  hand_over(between("tp4", "tp4D", latent(4)), {.receiver_dp = 2, .receiver_first = true});
}

TEST_CASE("heads that are replicated or do not divide, and uneven pipelines, through daemons") {
  hand_over(between("tp4", "tp2", attention(4, 2)));
  hand_over(between("tp2", "tp8", attention(4, 4)));
  hand_over(between("tp16", "tp4", attention(2, 8)));
  hand_over(between("tp6", "tp4", attention(3, 24)));
  hand_over(between("tp3", "tp2", attention(3, 12)));
  hand_over(between("tp2pp2", "pp4", attention(7, 4)));
  hand_over(between("pp3", "pp2", latent(5)));
}

TEST_CASE("draft layers on one side only through daemons") {
  std::vector<ModelGroup> extra = attention(7, 4);
  extra.front().parts.front().layers = {0, 1, 2, 3, 4, 5};
  Part draft = extra.front().parts.front();
  draft.layers = {6};
  draft.optional = true;
  extra.front().parts.push_back(draft);
  Case of = between("tp2", "pp2", attention(6, 4));
  of.receiver.groups = extra;
  hand_over(of);
  std::swap(of.sender.groups, of.receiver.groups);
  hand_over(of);
  // A stage that has nothing but draft layers.
  of = between("tp2", "pp2", attention(4, 2));
  of.receiver.groups.front().layers = {0, 1, 2, 3, 4, 5, 6, 7};
  of.receiver.groups.front().parts.front().layers = {0, 1, 2, 3};
  draft.heads = 2;
  draft.layers = {4, 5, 6, 7};
  of.receiver.groups.front().parts.push_back(draft);
  hand_over(of);
}

TEST_CASE("wide instances through daemons") {
  hand_over(between("tp8pp2", "tp8pp2", attention(4, 8)));
  hand_over(between("tp8D", "tp16", latent(2)), {.sender_dp = 5});
}

TEST_CASE("context parallelism through daemons") {
  for (const uint64_t interleave : {uint64_t{0}, uint64_t{1}}) {
    Case of = between("tp2", "cp2", attention(4, 4), 83);
    of.receiver.topology.interleave = interleave;
    hand_over(of);
    of = between("tp4", "cp4", latent(4), 83);
    of.receiver.topology.interleave = interleave;
    hand_over(of);
    of = between("cp2", "cp2", attention(4, 4), 83);
    of.sender.topology.interleave = of.receiver.topology.interleave = interleave;
    hand_over(of);
  }
}

TEST_CASE("memory forms through daemons") {
  const std::vector<std::pair<std::string, std::string>> forms{
      {"lr|but", "lr|btu"}, {"lr|btu", "lr|but"}, {"l|rbut", "l|brtu"}, {"l|butr", "|blrut"},
      {"|bltur", "|bultr"}, {"|blrtu", "l|btur"}, {"|lrbut", "|blrut"}};
  for (const auto& [from, to] : forms) {
    Case of = between("tp2", "tp4", attention(3, 4, from));
    of.receiver.groups = attention(3, 4, to);
    of.name += ", " + from + " to " + to;
    hand_over(of);
  }
}

TEST_CASE("element types through daemons") {
  for (const auto& [type, bytes] : std::vector<std::pair<std::string, uint64_t>>{
           {"bf16", 32}, {"fp8_e4m3", 16}, {"fp32", 64}, {"int8", 6}}) {
    std::vector<ModelGroup> groups = attention(4, 4);
    groups.front().parts = {part({"key", "value"}, 4, bytes, type)};
    Case of = between("tp2", "tp4", groups);
    of.name += ", " + type;
    hand_over(of);
  }
}

TEST_CASE("scales, indexers and interleaved planes through daemons") {
  std::vector<ModelGroup> groups = attention(4, 4);
  groups.front().parts = {
      part({"key", "value"}, 4, 8, "fp4"),
      part({"key_scale", "value_scale"}, 4, 24, "fp8_e4m3", "lr|bu", Granularity::kBlock)};
  hand_over(between("tp2", "tp4", groups));
  groups.front().parts = {part({"key", "value"}, 4, 16, "int8"),
                          part({"key_scale", "value_scale"}, 4, 4, "fp32", "l|brut")};
  hand_over(between("tp4", "tp2pp2", groups));
  std::vector<ModelGroup> sparse = latent(6);
  sparse.front().parts.push_back(part({"indexer_key"}, 1, 20, "fp8_e4m3", "l|btu"));
  sparse.front().parts.back().layers = {0, 2, 5};
  hand_over(between("tp4D", "tp8", sparse), {.sender_dp = 2});
  ModelGroup interleaved;
  interleaved.layers = {0, 1, 2, 3};
  interleaved.one_storage = true;
  interleaved.parts = {part({"key", "value"}, 2, 32, "bf16"), part({"index"}, 1, 16, "bf16")};
  hand_over(between("tp2", "1", {interleaved}));
}

TEST_CASE("recurrent state through daemons") {
  ModelGroup mamba;  // convolution in sections, and the state
  mamba.layers = {1, 3};
  mamba.parts = {part({"conv_x"}, 4, 12, "fp32", "lr|bu", Granularity::kRequest),
                 part({"conv_b", "conv_c"}, 1, 48, "fp32", "lr|bu", Granularity::kRequest),
                 part({"ssm"}, 4, 64, "fp32", "l|bru", Granularity::kRequest)};
  ModelGroup delta;  // sections [Q|K|V] and a state in fp32
  delta.layers = {1, 3};
  delta.parts = {part({"conv_q", "conv_k", "conv_v"}, 4, 6, "bf16", "l|bru", Granularity::kRequest),
                 part({"state"}, 4, 128, "fp32", "lr|bu", Granularity::kRequest)};
  ModelGroup full = attention(4, 4).front();
  full.layers = {0, 2};
  for (const ModelGroup& state : {mamba, delta}) {
    for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
             {"tp4", "tp4"}, {"tp2", "tp4"}, {"tp4", "tp2"}}) {
      for (const uint64_t cached : {uint64_t{0}, uint64_t{1}}) {
        Case of = between(from, to, {full, state});
        of.cached = {16, cached};
        of.slices = {{{0, 16}, {}}, {{16, 45}, {}}};
        hand_over(of, {.receiver_first = cached == 1});
      }
    }
  }
}

TEST_CASE("windows that cut long prompts through daemons") {
  hand_over(between("tp2", "tp4", windowed(4, {256, 24}), 300));
  hand_over(between("tp2", "tp4", windowed(4, {1024, 24}), 1100), {.receiver_first = true});
  Case of = between("tp2", "tp4", windowed(6, {1024, 1024, 1024, 1024, 1024, 0}), 1100);
  of.cached = {0, 88, 512, 1024, 1100, 640};
  hand_over(of);
}

TEST_CASE("a full hit on some ranks only through daemons") {
  const std::vector<uint64_t> all{60, 60};
  const std::vector<uint64_t> none{0, 0};
  for (const bool first : {true, false}) {
    Case of = between("tp2", "tp4", hybrid(24), 60);
    of.cached_by_rank = {all, none, none, none};
    hand_over(of, {.receiver_first = first});
    of.cached_by_rank = {{60, 0}, {0, 60}, {13, 59}, all};
    hand_over(of, {.receiver_first = first});
    of = between("pp2", "tp2", hybrid(24), 60);
    of.cached_by_rank = {all, none};
    hand_over(of, {.receiver_first = first});
    of = between("tp2", "tp4", hybrid(24), 60);
    of.cached_by_rank = {none, all, all, none};
    of.slices = {{{0, 32}, {}}, {{32, 60}, {}}};
    hand_over(of, {.receiver_first = first});
  }
}

TEST_CASE("block sizes, windows, cached prefixes and longer prompts through daemons") {
  for (const auto& [from, to] :
       std::vector<std::pair<uint64_t, uint64_t>>{{16, 64}, {64, 16}, {48, 32}}) {
    Case of = between("tp2", "tp4", attention(2, 4, "lr|but", from), 100);
    of.receiver.groups = attention(2, 4, "lr|but", to);
    of.cached = {50};
    of.receiver.groups.front().tail = mapping::Tail::kZero;
    hand_over(of);
  }
  Case of = between("tp2", "tp4", hybrid(24), 60);
  of.receiver.groups_reversed = true;
  of.sender.prompt = 68;
  hand_over(of);
  for (const std::vector<uint64_t>& cached :
       {std::vector<uint64_t>{60, 60}, std::vector<uint64_t>{60, 0},
        std::vector<uint64_t>{8, 56}}) {
    of.cached = cached;
    hand_over(of);
  }
  of = between("tp2", "tp4", hybrid(24), 60);
  of.sender.groups[1].shares_storage = of.receiver.groups[1].shares_storage = true;
  hand_over(of);
  of = between("tp2", "1", attention(2, 4), 75);
  of.sender.groups.front().blocks_per_id = 2;
  hand_over(of);
}

TEST_CASE("slices of every kind through daemons") {
  const std::vector<std::vector<SliceSpec>> ways{
      {{{0, 16}, {}}, {{16, 32}, {}}, {{32, 75}, {}}},
      {{{0, 5}, {}}, {{5, 21}, {}}, {{21, 22}, {}}, {{22, 71}, {}}, {{71, 75}, {}}},
      {{{0, 75}, Range{0, 1}},
       {{0, 75}, Range{1, 2}},
       {{0, 75}, Range{2, 3}},
       {{0, 75}, Range{3, 4}}},
      {{{0, 37}, Range{0, 2}},
       {{0, 37}, Range{2, 4}},
       {{37, 75}, Range{0, 2}},
       {{37, 75}, Range{2, 4}}},
      {{{0, 32}, {}}, {{32, 32}, {}}, {{32, 75}, {}}},
      {{{0, 75}, {}}, {{75, 75}, {}}}};
  for (const auto& slices : ways) {
    for (const bool first : {true, false}) {
      Case of = between("tp2", "tp4", hybrid(24), 75);
      of.slices = slices;
      hand_over(of, {.receiver_first = first});
    }
  }
}

TEST_CASE("a thousand slices through daemons") {
  std::vector<ModelGroup> groups = attention(1, 2);
  groups.front().parts.front().cell_bytes = 4;
  Case of = between("tp2", "1", groups, 8000);
  for (uint64_t at = 0; at < 8000; at += 8) of.slices.push_back({{at, at + 8}, {}});
  hand_over(of);
}

TEST_CASE("one of each family with checks, which change nothing") {
  const std::string check = GENERATE("xxh3", "gmac");
  hand_over(between("tp4", "tp2pp2", attention(8, 8)), {.check = check});
  hand_over(between("tp4D", "tp8", latent(4)),
            {.sender_dp = 1, .tells_dp = false, .receiver_first = true, .check = check});
  Case of = between("tp2", "tp4", hybrid(24), 75);
  of.slices = {{{0, 37}, Range{0, 2}}, {{0, 37}, Range{2, 4}}, {{37, 75}, {}}};
  of.cached = {8, 56};
  hand_over(of, {.check = check});
  of = between("tp2", "tp4", attention(3, 4, "|bltur"), 100);
  of.receiver.groups = attention(3, 4, "lr|btu", 64);
  of.receiver.groups.front().tail = mapping::Tail::kZero;
  hand_over(of, {.receiver_first = true, .check = check});
  // More than one chunk of each leg.
  hand_over(between("tp2", "1", attention(4, 8), 2000), {.check = check});
}

TEST_CASE("after all of that no arena memory is held") {
  for (const char* check : kChecks)
    for (const int side : {0, 1})
      CHECK(comes_true([&] { return arena_in_use(daemons(check).side(side)) == 0; }));
}
