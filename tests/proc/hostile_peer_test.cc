// A peer that has the cluster's secret and lies, and strangers at the peers' port: they get no
// bytes, change none, and others are served meanwhile. An honest pair hands over and verifies all
// the while.
#include "tests/proc/hostile_peer.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <memory>

#include "daemon/engine/proofs.h"
#include "daemon/mapping/stream.h"
#include "daemon/node/directory.h"
#include "kvferry/v1/peer.grpc.pb.h"

namespace kvferry::testing {
namespace {

using client::TransferState;
using hostile::HostilePeer;
using namespace engine;

constexpr uint64_t kTokens = 512;
const std::string kSecret = "0123456789abcdef0123456789abcdef";

HostileScene& scene() {
  struct SecretFile {
    std::string path = "/tmp/kvferry-secret.XXXXXX";
    SecretFile() {
      const UniqueFd fd(::mkostemp(path.data(), O_CLOEXEC));
      REQUIRE(::write(fd.get(), kSecret.data(), kSecret.size()) ==
              static_cast<ssize_t>(kSecret.size()));
    }
    ~SecretFile() { ::unlink(path.c_str()); }
  };
  static SecretFile secret;
  static HostileScene shared({{"gpu.enabled=off", "peer.cluster_secret_file=" + secret.path},
                              "[[peers]]\nidentity = \"evil\"\naddresses = [\"127.0.0.1\"]\n"});
  return shared;
}

std::unique_ptr<HostilePeer>& evil_one() {
  scene();  // goes after the peer
  static std::unique_ptr<HostilePeer> peer;
  return peer;
}
HostilePeer& evil() {
  if (!evil_one()) evil_one() = std::make_unique<HostilePeer>("evil", kSecret);
  return *evil_one();
}

engine::TransferKey wire_key(const TransferKey& key, const node::CardSet& sender) {
  engine::TransferKey out;
  out.instance = sender.instance->name;
  out.incarnation = sender.instance->incarnation;
  out.id = key.id;
  std::copy(key.secret.begin(), key.secret.end(), out.secret.bytes.begin());
  return out;
}

std::shared_ptr<const node::CardSet> set_of(HostilePeer& peer, const std::string& instance) {
  const rpc::CardPage page = peer.cards_of(instance);
  auto set = node::make_card_set(instance, page.incarnation, page.cards);
  REQUIRE(set);
  return *set;
}

rpc::RankCard first_card(const node::CardSet& set) {
  auto card = rpc::decode_card(set.cards.at(0).card);
  REQUIRE(card);
  return *card;
}

// A PULL of everything, right in all that its maker can know; `by`: who proves it.
void prove(MsgPull& pull, const engine::TransferKey& key, const std::string& by) {
  ProofFields fields;
  fields.pull = pull.pull;
  fields.id = key.id;
  fields.instance = key.instance;
  fields.incarnation = key.incarnation;
  fields.receiver_rank = pull.receiver_rank;
  fields.sender_node = "sender";
  fields.receiver_node = by;
  fields.cards = pull.cards;
  pull.proof = receiver_proof(key.secret, fields);
}

MsgPull pull_of(const HostilePeer& peer, const engine::TransferKey& key,
                const node::CardSet& sender, const node::CardSet& receiver,
                const std::string& by = "evil") {
  static uint64_t last_pull = 0;
  MsgPull pull;
  pull.pull = {peer.boot(), ++last_pull};
  pull.transfer = wire_name(key, key.incarnation);
  pull.receiver_instance = receiver.instance->name;
  pull.receiver_incarnation = receiver.instance->incarnation;
  pull.cards = node::digest_of_pair(sender.digest, receiver.digest);
  pull.needs = {{0, 0, kTokens, {{0, kTokens}}}};
  pull.remaining_ms = 20'000;
  for (uint64_t credit = 1; credit <= 4; ++credit) pull.credits.push_back({{credit}, 64 << 10, {}});
  pull.oldest = 1;
  prove(pull, key, by);
  return pull;
}

// The SLICE of everything that answers the daemon's pull, right in everything.
MsgSlice slice_of(const HostilePeer& peer, const MsgPull& pull, const engine::TransferKey& key,
                  const node::CardSet& sender, const node::CardSet& receiver) {
  MsgSlice slice;
  slice.pull = pull.pull;
  slice.send = {peer.boot(), 1};
  slice.last = true;
  slice.ranges = {{0, {{0, kTokens}}}};
  const auto table = mapping::LegTable::make(sender.instance, receiver.instance);
  REQUIRE(table);
  const auto stream = mapping::compile_stream(**table, 0, 0, pull.needs, slice.ranges);
  REQUIRE(stream);
  slice.bytes = stream->bytes;
  slice.digest = stream->digest;
  ProofFields fields;
  fields.pull = pull.pull;
  fields.send = slice.send;
  fields.id = key.id;
  fields.instance = key.instance;
  fields.incarnation = key.incarnation;
  fields.sender_node = "evil";
  fields.receiver_node = "receiver";
  fields.cards = pull.cards;
  slice.proof = sender_proof(key.secret, fields);
  return slice;
}

double dropped(const bench::DaemonProcess& daemon, const std::string& cause) {
  return metric(daemon, "kvferry_messages_dropped_total", "cause=\"" + cause + "\"");
}

void require_end(Party& party, const std::string& id, TransferState state,
                 const std::string& reason) {
  const auto ended = party.wait(id, kPatience);
  require_ok(ended);
  INFO(party.instance());
  CHECK((*ended)[0].reason == reason);
  CHECK(name_of((*ended)[0].state) == name_of(state));
  require_ok(party.close(id));
}

}  // namespace

TEST_CASE("hellos with odd values are refused by name, or make a link that harms nobody") {
  HostileScene& s = scene();
  HostilePeer peer("evil", kSecret);
  HostilePeer stranger("evil", "another secret of 32 bytes length");
  CHECK(stranger.shake_hands(s.daemon(0)) == "PEER_NOT_ALLOWED");
  REQUIRE(peer.shake_hands(s.daemon(1)) == "");
  const BootId receivers_boot = peer.theirs().boot;
  REQUIRE(peer.shake_hands(s.daemon(0)) == "");
  const BootId senders_boot = peer.theirs().boot;
  using Hello = rpc::PeerHello;
  const std::vector<std::pair<HostilePeer::Spoil, std::string>> rows = {
      {[](Hello& h) { h.node = "stranger"; }, "PEER_NOT_ALLOWED"},
      {[](Hello& h) { h.node = "sender"; }, "PEER_NOT_ALLOWED"},
      {[](Hello& h) { h.node = "a/../b"; }, "PEER_NOT_ALLOWED"},
      {[&](Hello& h) { h.boot = senders_boot; }, "IDENTITY_MISMATCH"},
      {[&](Hello& h) { h.boot = receivers_boot; }, ""},  // it counts within the node alone
      {[](Hello& h) { h.boot = {}; }, "BAD_MESSAGE"},
      {[](Hello& h) { h.challenge.fill(7); }, "CHALLENGE_UNKNOWN"},
      {[](Hello& h) { h.protocol_min = h.protocol_max = 99; }, "PROTOCOL_MISMATCH"},
      {[](Hello& h) { h.ucx_version = "99.0.0"; }, "UCX_MISMATCH"},
      {[](Hello& h) { h.ucx_version = std::string(1000, '9'); }, "BAD_MESSAGE"},
      {[](Hello& h) { h.checks = {2}, h.check = 2, h.min_check = 2; }, ""},
      {[](Hello& h) { h.checks = {3}, h.check = 3, h.min_check = 3; }, "CHECK_TOO_WEAK"},
      {[](Hello& h) { h.checks = {UINT32_MAX}; }, "CHECK_TOO_WEAK"},
      {[](Hello& h) { h.chunk_bytes = 0; }, "BAD_MESSAGE"},
      {[](Hello& h) { h.chunk_bytes = 4095; }, "BAD_MESSAGE"},
      {[](Hello& h) { h.chunk_bytes = UINT64_MAX; }, "BAD_MESSAGE"},
      {[](Hello& h) { h.max_credits = 0; }, "BAD_MESSAGE"},
      {[](Hello& h) { h.max_credits = UINT32_MAX; }, ""},  // the smaller one of both counts
      {[](Hello& h) { h.rails.clear(); }, "BAD_MESSAGE"},
      {[](Hello& h) { h.rails.resize(1000, h.rails[0]); }, "BAD_MESSAGE"},
      {[](Hello& h) { h.rails[0].address.clear(); }, "BAD_MESSAGE"},
      {[](Hello& h) { h.rails[0].address.resize(40 << 10); }, "BAD_MESSAGE"},
      {[](Hello& h) { h.rails[0].address.resize(100 << 10); }, "MESSAGE_TOO_LARGE"},
      {[](Hello& h) { h.rails[0].address.resize(1 << 20); }, "PEER_UNREACHABLE"},  // gRPC's word
      {[](Hello& h) { h.address = std::string(300, 'a'); }, "BAD_MESSAGE"},
      {[](Hello& h) { h.renews.fill(7); }, "UNKNOWN_LINK"},
      {[](Hello& h) { h.renew_ms = UINT64_MAX; }, ""},    // the smaller one counts ...
      {[](Hello& h) { h.renew_ms = 1; }, ""},             // ... but none below a second
      {[](Hello& h) { h.address = "192.0.2.1:1"; }, ""},  // not allowed there: never dialled
  };
  for (std::size_t i = 0; i < rows.size(); ++i) {
    INFO("row " << i);
    CHECK(peer.shake_hands(s.daemon(0), rows[i].first) == rows[i].second);
  }
  s.honest().require_more();
}

TEST_CASE("forged, relayed and repeated pulls bring no byte and do not disturb the right one") {
  HostileScene& s = scene();
  HostilePeer& peer = evil();
  const auto sender = s.attach("wanted", 0, true);
  const auto receiver = s.attach("wanted-decode", 1, false);
  const auto ticket = sender->ticket();
  require_ok(ticket);
  peer.link(s.daemon(1));
  const auto right = set_of(peer, "default/wanted-decode");
  peer.link(s.daemon(0));
  const auto from = set_of(peer, "default/wanted");
  const auto mine = peer.invent("evil-decode", first_card(*from));
  peer.show(right);
  const TransferKey key = new_key("wanted");
  Party::Send slice;
  slice.tokens = client::TokenRange{0, 256};
  slice.last = false;
  require_ok(sender->send(key, slice));
  const engine::TransferKey wire = wire_key(key, *from);
  engine::TransferKey guess = wire;
  random_bytes(guess.secret.bytes);

  std::vector<std::pair<MsgPull, Reason>> pulls;
  // An overheard name, and a proof under another secret.
  pulls.emplace_back(pull_of(peer, guess, *from, *mine), Reason::kPermission);
  pulls.back().first.transfer = wire_name(wire, wire.incarnation);
  // The receiver's own pull, which it could have shown to this peer.
  pulls.emplace_back(pull_of(peer, wire, *from, *right, "receiver"), Reason::kPermission);
  // One who knows the secret, and says that he is the receiver's rank.
  pulls.emplace_back(pull_of(peer, wire, *from, *right), Reason::kProtocol);
  // He comes as a rank that there is not, and under cards that nobody has.
  pulls.emplace_back(pull_of(peer, wire, *from, *mine), Reason::kProtocol);
  pulls.back().first.receiver_rank = 7;
  prove(pulls.back().first, wire, "evil");
  pulls.emplace_back(pull_of(peer, wire, *from, *mine), Reason::kStaleCards);
  pulls.back().first.cards.bytes[0] ^= 1;
  prove(pulls.back().first, wire, "evil");
  for (const auto& [pull, reason] : pulls) {
    CAPTURE(pull.pull.counter);
    const std::vector<uint8_t> sealed = peer.seal(peer.next_sequence(), pull);
    peer.say(pull);
    // Again under its old number, and once more as a new message.
    peer.say_bytes(sealed);
    peer.say(pull);
    const auto its = [&id = pull.pull](const MsgEnd& end) { return end.pull == id; };
    REQUIRE(peer.pump([&] { return peer.find<MsgEnd>(its) != nullptr; }));
    const MsgEnd end = *peer.find<MsgEnd>(its);
    CHECK(name_of(end.reason) == name_of(reason));
    CHECK(end.outcome == Outcome::kFailed);
  }
  // A name of another secret waits for its Send, and ends no other.
  peer.say(pull_of(peer, guess, *from, *mine));
  MsgDecline decline;
  decline.transfer = wire_name(wire, wire.incarnation);
  decline.receiver_instance = right->instance->name;
  decline.receiver_incarnation = right->instance->incarnation;
  peer.say(decline);
  CHECK(peer.find<MsgSlice>() == nullptr);
  CHECK(peer.offers_heard == 0);

  require_ok(receiver->receive(key, *ticket, {}));
  slice.index = 1;
  slice.tokens = client::TokenRange{256, 512};
  slice.last = true;
  require_ok(sender->send(key, slice));
  require_end(*receiver, key.id, TransferState::kCompleted, "NONE");
  require_end(*sender, key.id, TransferState::kDelivered, "NONE");
  CHECK(receiver->verify() == "");
  CHECK(peer.offers_heard == 0);
  s.honest().require_more();
}

TEST_CASE("floods of pulls and claims end at their limits, and others are served meanwhile") {
  HostileScene& s = scene();
  HostilePeer& peer = evil();
  constexpr std::size_t kFlood = 3000, kParked = 1024;
  peer.link(s.daemon(0));
  const double before = dropped(s.daemon(0), "limit");
  const auto from = set_of(peer, "default/prefill");
  const auto mine = peer.invent("evil-decode", first_card(*from));
  engine::TransferKey key = wire_key(new_key("prefill"), *from);
  const auto ends = [&] {
    return static_cast<std::size_t>(
        std::count_if(peer.heard.begin(), peer.heard.end(), [](const ControlMessage& message) {
          const auto* end = std::get_if<MsgEnd>(&message);
          return end != nullptr && end->reason == Reason::kNoSend;
        }));
  };
  for (std::size_t i = 0; i < kFlood; ++i) {
    key.id = "flood" + std::to_string(i);
    peer.say(pull_of(peer, key, *from, *mine));
    if (i % 100 == 0) (void)peer.pump([] { return true; });
  }
  CHECK(peer.pump([&] { return ends() >= kFlood - kParked; }));
  MsgClaim claim;
  claim.receiver_instance = mine->instance->name;
  claim.receiver_incarnation = mine->instance->incarnation;
  claim.ttl_ms = UINT64_MAX;
  for (std::size_t i = 0; i < kFlood; ++i) {
    key.id = "claim" + std::to_string(i);
    claim.transfer = wire_name(key, key.incarnation);
    peer.say(claim);
    if (i % 100 == 0) (void)peer.pump([] { return true; });
  }
  // Of both the oldest go.
  CHECK(
      peer.pump([&] { return dropped(s.daemon(0), "limit") >= before + 2 * (kFlood - kParked); }));
  s.honest().require_more();
}

TEST_CASE("messages cut, lengthened, changed and out of order cost their own lane at most") {
  HostileScene& s = scene();
  HostilePeer& peer = evil();
  struct Row {
    std::string name;
    std::string cause;  // why they have no effect, and how many they are at least
    std::size_t count = 0;
    std::function<void()> say;
  };
  std::vector<uint8_t> ping;  // the next message, rightly sealed
  const auto from_far = [&](uint64_t ahead) {
    peer.say_bytes(peer.seal(peer.next_sequence() + ahead, MsgPing{}));
  };
  const std::vector<Row> rows = {
      {"cut", "malformed", link::kOverheadBytes - 1,
       [&] {
         for (std::size_t bytes = 1; bytes < ping.size(); ++bytes)
           peer.say_bytes(std::span(ping).first(bytes));
       }},
      // All but version, selector, length and what must be zero is told by the tag.
      {"changed", "bad_tag", link::kOverheadBytes - 18,
       [&] {
         for (std::size_t at = 0; at < ping.size(); ++at) {
           std::vector<uint8_t> changed = ping;
           changed[at] ^= 0x40;
           peer.say_bytes(changed);
         }
       }},
      {"as long as may be", "malformed", 1,
       [&] { peer.say_bytes(std::vector<uint8_t>(link::kMaxSealedBytes, 0x4b)); }},
      {"too many held behind a gap", "limit", 1,
       [&] {
         for (uint64_t i = 0; i < 1000; ++i) from_far(2 + i);
       }},
      {"said again", "duplicate", 1,
       [&] {
         for (uint64_t i = 0; i < peer.next_sequence(); ++i)
           peer.say_bytes(peer.seal(i, MsgHello{false}));
       }},
      {"the last number that there is, again", "duplicate", 1,
       [&] {
         for (int i = 0; i < 2; ++i) peer.say_bytes(peer.seal(UINT64_MAX, MsgPing{}));
       }},
      {"well formed, and of nothing that there is", "protocol", 1,
       [&] {
         for (const ControlMessage& message :
              {ControlMessage(MsgMapped{0}), ControlMessage(MsgMapped{255}),
               ControlMessage(MsgWritten{{peer.boot(), 1}, 0, 0, {1}, {}}),
               ControlMessage(MsgDrained{{peer.boot(), 1}}),
               ControlMessage(MsgDrop{{peer.theirs().boot, 1}, 0}),
               ControlMessage(MsgUpdate{{peer.boot(), 1}, {{{1}, 1 << 20, {}}}, {{0, 0}}, 1}),
               ControlMessage(MsgLaneDown{0, 0}), ControlMessage(MsgLaneDown{200, 9})})
           peer.say(message);
       }},
      {"offers for pulls that nobody made", "protocol", 1,
       [&] {
         for (uint64_t i = 1; i < 100; ++i)
           peer.offer({{peer.boot(), i}, {peer.boot(), 1}, 0, i, {i}, {i}, 4096, {}}, 4096);
       }},
  };
  for (const int side : {0, 1}) {
    CAPTURE(side);
    for (const Row& row : rows) {
      INFO(row.name);
      peer.link(s.daemon(side));
      ping = peer.seal(peer.next_sequence(), MsgPing{});
      const double before = dropped(s.daemon(side), row.cause);
      row.say();
      CHECK(peer.pump([&] {
        return dropped(s.daemon(side), row.cause) >= before + static_cast<double>(row.count);
      }));
    }
  }
  s.honest().require_more();
}

TEST_CASE("a sender that lies about slices, lengths and credits changes no page") {
  HostileScene& s = scene();
  HostilePeer& peer = evil();
  const auto receiver = s.attach("trusting", 1, false);
  peer.link(s.daemon(1));
  const auto to = set_of(peer, "default/trusting");
  const auto mine = peer.invent("evil-prefill", first_card(*to));
  const std::string ticket = peer.ticket_to(*mine);
  struct Row {
    std::string name;
    std::string reason;  // that the Receive ends with
    std::function<void(MsgSlice&, MsgOffer&, uint64_t&)> lie;
  };
  const std::vector<Row> rows = {
      {"nothing more", "DEADLINE", [](MsgSlice&, MsgOffer& o, uint64_t&) { o.bytes = 0; }},
      {"another digest", "LAYOUT_MISMATCH",
       [](MsgSlice& m, MsgOffer&, uint64_t&) { m.digest ^= 1; }},
      {"fewer bytes", "LAYOUT_MISMATCH", [](MsgSlice& m, MsgOffer&, uint64_t&) { m.bytes -= 1; }},
      {"2^64 - 1 bytes", "LAYOUT_MISMATCH",
       [](MsgSlice& m, MsgOffer&, uint64_t&) { m.bytes = UINT64_MAX; }},
      {"tokens before those it says", "LAYOUT_MISMATCH",
       [](MsgSlice& m, MsgOffer&, uint64_t&) { m.ranges[0].ranges[0].begin = 128; }},
      {"a group that is not", "PROTOCOL",
       [](MsgSlice& m, MsgOffer&, uint64_t&) { m.ranges[0].group = 9; }},
      {"a wrong proof", "DEADLINE",
       [](MsgSlice& m, MsgOffer&, uint64_t&) { m.proof.bytes[0] ^= 1; }},
      {"aux that it may not bring", "PROTOCOL",
       [](MsgSlice& m, MsgOffer&, uint64_t&) { m.last = false, m.with_aux = true; }},
      {"an offer of less", "PROTOCOL",
       [](MsgSlice&, MsgOffer& o, uint64_t& d) { o.bytes = d = 4096; }},
      {"an offer of more", "PROTOCOL",
       [](MsgSlice&, MsgOffer& o, uint64_t& d) { o.bytes = d = 1 << 20; }},
      {"less data than told", "PROTOCOL", [](MsgSlice&, MsgOffer&, uint64_t& d) { d = 32 << 10; }},
      {"more data than told", "PROTOCOL", [](MsgSlice&, MsgOffer&, uint64_t& d) { d = 256 << 10; }},
      {"a credit never given", "PROTOCOL",
       [](MsgSlice&, MsgOffer& o, uint64_t&) { o.credit.value = 1 << 30; }},
      {"credit 0", "PROTOCOL", [](MsgSlice&, MsgOffer& o, uint64_t&) { o.credit.value = 0; }},
      {"a chunk past the last", "PROTOCOL",
       [](MsgSlice&, MsgOffer& o, uint64_t&) { o.chunk = UINT64_MAX; }},
      {"another send's", "DEADLINE", [](MsgSlice&, MsgOffer& o, uint64_t&) { o.send.counter = 9; }},
      {"a check that was not agreed", "PROTOCOL",
       [](MsgSlice&, MsgOffer& o, uint64_t&) { o.check.kind = CheckKind::kXxh3; }},
  };
  for (const auto& [name, reason, lie] : rows) {
    INFO(name);
    peer.link(s.daemon(1));
    const TransferKey key = new_key("evil-prefill");
    Party::Receive receive;
    receive.wait = receive.deadline = milliseconds(2000);
    require_ok(receiver->receive(key, ticket, receive));
    REQUIRE(peer.pump([&] { return peer.find<MsgPull>() != nullptr; }));
    const MsgPull pull = *peer.find<MsgPull>();
    MsgSlice slice = slice_of(peer, pull, wire_key(key, *mine), *mine, *to);
    MsgOffer offer{pull.pull, slice.send, 0, 0, {1}, {1}, 64 << 10, {}};
    uint64_t data = 64 << 10;
    lie(slice, offer, data);
    peer.say(slice);
    // Credits come with the pull or after the slice.
    REQUIRE(peer.pump([&] {
      const auto status = receiver->rank(0).status(receiver->handle(key.id, 0));
      const auto granted = [](const MsgUpdate& update) { return !update.credits.empty(); };
      return !pull.credits.empty() || peer.find<MsgUpdate>(granted) != nullptr ||
             (status && is_terminal(status->state));
    }));
    if (offer.bytes != 0) peer.offer(offer, data);
    REQUIRE(peer.pump([&] {
      const auto status = receiver->rank(0).status(receiver->handle(key.id, 0));
      return status && is_terminal(status->state);
    }));
    require_end(*receiver, key.id, TransferState::kFailed, reason);
    CHECK(receiver->verify_untouched() == "");
  }
  s.honest().require_more();
}

TEST_CASE("a receiver that takes no offer, or never acknowledges, ends with its transfer") {
  HostileScene& s = scene();
  HostilePeer& peer = evil();
  const auto sender = s.attach("patient", 0, true);
  for (const bool takes : {false, true}) {
    CAPTURE(takes);
    peer.link(s.daemon(0));
    const auto from = set_of(peer, "default/patient");
    const auto mine = peer.invent("evil-decode", first_card(*from));
    const TransferKey key = new_key("patient");
    Party::Send send;
    send.deadline = milliseconds(2000);
    require_ok(sender->send(key, send));
    peer.say(pull_of(peer, wire_key(key, *from), *from, *mine));
    REQUIRE(peer.pump([&] { return peer.offers_heard > 0; }));
    if (takes) peer.accept_offer();
    s.honest().require_more();
    REQUIRE(peer.pump([&] {
      const auto status = sender->rank(0).status(sender->handle(key.id, 0));
      return status && is_terminal(status->state);
    }));
    require_end(*sender, key.id, TransferState::kFailed, "DEADLINE");
  }
  CHECK(comes_true([&] { return metric(s.daemon(0), "kvferry_arena_bytes", "quarantined") == 0; }));
  s.honest().require_more();
}

TEST_CASE("strangers at the peers' port: silence, half handshakes, garbage, too much") {
  HostileScene& s = scene();
  HostilePeer& peer = evil();
  {
    std::vector<UniqueFd> strangers;
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(s.daemon(0).peer_port());
    const std::string preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const std::string hello("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11);
    for (int i = 0; i < 600; ++i) {
      strangers.emplace_back(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
      REQUIRE(::connect(strangers.back().get(), reinterpret_cast<const sockaddr*>(&address),
                        sizeof address) == 0);
      const std::string said = i % 4 == 0   ? ""
                               : i % 4 == 1 ? hello
                               : i % 4 == 2 ? preface + std::string(256, '\xff')
                                            : std::string(4096, static_cast<char>(i));
      (void)::send(strangers.back().get(), said.data(), said.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    peer.link(s.daemon(0));
    s.honest().require_more();
  }
  auto channel = grpc::CreateChannel("127.0.0.1:" + std::to_string(s.daemon(0).peer_port()),
                                     grpc::InsecureChannelCredentials());
  const auto stub = v1::PeerService::NewStub(channel);
  const auto handshake = [&](std::size_t bytes) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kPatience);
    v1::HandshakeRequest request;
    request.set_hello(std::string(bytes, 'x'));
    request.set_tag(std::string(16, 't'));
    v1::HandshakeResponse response;
    return stub->Handshake(&context, request, &response).error_code();
  };
  CHECK(handshake(64) == grpc::StatusCode::PERMISSION_DENIED);
  // Above what a handshake may have, what any request may have, and by far.
  for (const std::size_t bytes :
       {std::size_t{65} << 10, std::size_t{2} << 20, std::size_t{64} << 20})
    CHECK(handshake(bytes) == grpc::StatusCode::RESOURCE_EXHAUSTED);
  // The challenges of strangers push each other out; who has just asked for one still has it.
  for (int i = 0; i < 1000; ++i) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kPatience);
    v1::ChallengeResponse response;
    REQUIRE(stub->Challenge(&context, v1::ChallengeRequest(), &response).ok());
  }
  peer.link(s.daemon(0));
  s.honest().require_more();
  // Calls about a link under a tag that is not its own.
  for (int i = 0; i < 100; ++i) {
    grpc::ClientContext context;
    v1::LinkRequest request;
    request.set_link(std::string(16, static_cast<char>(i)));
    request.set_number(1);
    request.set_tag(std::string(16, 't'));
    v1::LinkResponse response;
    REQUIRE(stub->CloseLink(&context, request, &response).error_code() ==
            grpc::StatusCode::NOT_FOUND);
  }
  s.honest().require_more();
}

TEST_CASE("when the liar has gone, the daemons hold what they held before") {
  HostileScene& s = scene();
  evil_one().reset();
  // Nor does the link to it last: it ends by silence, with its lane and connections.
  for (const int side : {0, 1})
    CHECK(comes_true([&] { return metric(s.daemon(side), "kvferry_lanes", "state=\"up\"") <= 1; }));
  s.require_nothing_left();
}

}  // namespace kvferry::testing
