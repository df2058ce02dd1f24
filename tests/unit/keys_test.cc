#include "daemon/link/keys.h"

#include <catch2/catch.hpp>
#include <set>

#include "daemon/link/envelope.h"

using namespace kvferry;
using namespace kvferry::engine;
using namespace kvferry::link;

namespace {

KeyMaterial material() {
  KeyMaterial m;
  m.initiator_random.fill(1);
  m.responder_random.fill(2);
  m.initiator_node = "node-a";
  m.responder_node = "node-b";
  m.initiator_boot.bytes.fill(3);
  m.responder_boot.bytes.fill(4);
  m.transcript.fill(5);
  return m;
}

constexpr LinkId kLinkA{1};
constexpr LinkId kLinkB{77};

// Both ends of one link, as two daemons have them.
struct Ends {
  LinkTable a;
  LinkTable b;
  Ends() {
    a.add(kLinkA, derive_keys(material(), true));
    b.add(kLinkB, derive_keys(material(), false));
  }
};

MsgOffer some_offer() {
  MsgOffer offer;
  offer.offer = {9};
  offer.bytes = 4096;
  return offer;
}

std::string reason_of(const Result<Opened>& opened) {
  return opened ? "" : opened.error().reason;
}

}  // namespace

TEST_CASE("both sides derive the same keys, each direction its own") {
  const LinkKeys a = derive_keys(material(), true);
  const LinkKeys b = derive_keys(material(), false);
  CHECK(a.out.control == b.in.control);
  CHECK(a.in.control == b.out.control);
  CHECK(a.out.data == b.in.data);
  CHECK(a.in.data == b.out.data);
  CHECK(a.out.call == b.in.call);
  CHECK(a.in.call == b.out.call);
  CHECK(a.out.selector == b.in.selector);
  CHECK(a.link_name == b.link_name);
  std::set<std::array<uint8_t, kKeyBytes>> all;
  for (const DirectionKeys* keys : {&a.out, &a.in})
    for (const KeyBytes* key : {&keys->control, &keys->data, &keys->call}) all.insert(key->bytes);
  CHECK(all.size() == 6);
  const std::set<uint8_t> ids{a.out.control_id, a.in.control_id, a.out.data_id, a.in.data_id};
  CHECK(ids.size() == 4);
}

TEST_CASE("each part of the handshake changes every key") {
  const LinkKeys base = derive_keys(material(), true);
  std::vector<KeyMaterial> others(8, material());
  others[0].initiator_random[31] ^= 1;
  others[1].responder_random[0] ^= 1;
  others[2].initiator_node = "node-c";
  others[3].responder_node = "node-c";
  others[4].initiator_boot.bytes[0] ^= 1;
  others[5].responder_boot.bytes[0] ^= 1;
  others[6].transcript[0] ^= 1;
  others[7].cluster_secret = {1, 2, 3};
  for (const KeyMaterial& other : others) {
    const LinkKeys keys = derive_keys(other, true);
    CHECK(keys.out.control != base.out.control);
    CHECK(keys.in.data != base.in.data);
    CHECK(keys.out.selector != base.out.selector);
  }
  // A name that ends where the next one begins is another pair of names.
  KeyMaterial shifted = material();
  shifted.initiator_node = "node-an";
  shifted.responder_node = "ode-b";
  CHECK(derive_keys(shifted, true).out.control != base.out.control);
}

TEST_CASE("a reused MAC gives what the plain function gives") {
  KeyBytes key;
  key.bytes[0] = 42;
  Mac mac(key);
  for (int round = 0; round < 3; ++round) {
    const TagBytes tag = mac.tag({bytes_of("ab"), bytes_of("c")});
    CHECK(tag == cut<16>(hmac_sha256(key.span(), {bytes_of("abc")})));
  }
  CHECK(mac.tag({bytes_of("abd")}) != mac.tag({bytes_of("abc")}));
}

TEST_CASE("a sealed message opens at the other end under that end's own link number") {
  Ends ends;
  std::vector<uint8_t> out;
  const ControlMessage message = MsgLaneDown{3, 4};
  REQUIRE(ends.a.seal({kLinkA, 2, 5}, 17, message, out));
  Result<Opened> opened = ends.b.open(out, Time{});
  REQUIRE(opened);
  CHECK(opened->lane == LaneRef{kLinkB, 2, 5});
  CHECK(opened->sequence == 17);
  CHECK(opened->message == Message(message));

  REQUIRE(ends.b.seal({kLinkB, 0, 0}, some_offer(), out));
  CHECK(out.size() <= kMaxSealedOfferBytes);
  opened = ends.a.open(out, Time{});
  REQUIRE(opened);
  CHECK(opened->sequence == 9);
  CHECK(opened->message == Message(some_offer()));
}

TEST_CASE("any changed byte makes the tag, the link or the shape wrong") {
  Ends ends;
  std::vector<uint8_t> out;
  REQUIRE(ends.a.seal({kLinkA, 0, 0}, 0, ControlMessage(MsgDrop{{}, 8}), out));
  for (std::size_t i = 0; i < out.size(); ++i) {
    std::vector<uint8_t> changed = out;
    changed[i] ^= 0x10;
    const Result<Opened> opened = ends.b.open(changed, Time{});
    INFO("byte " << i);
    REQUIRE_FALSE(opened);
    const std::string& reason = opened.error().reason;
    const bool in_selector = i >= 8 && i < 16;
    const bool in_shape = i < 3 || (i >= 5 && i < 8) || (i >= 32 && i < 36);
    CHECK(reason == (in_selector ? "UNKNOWN_LINK" : in_shape ? "BAD_ENVELOPE" : "BAD_TAG"));
  }
  for (std::size_t size = 0; size < out.size(); ++size)
    CHECK(reason_of(ends.b.open(Bytes(out.data(), size), Time{})) == "BAD_ENVELOPE");
  CHECK(ends.b.open(out, Time{}));
}

TEST_CASE("a message sent back to its maker is not its peer's") {
  Ends ends;
  std::vector<uint8_t> out;
  REQUIRE(ends.a.seal({kLinkA, 0, 0}, 0, ControlMessage(MsgPing{}), out));
  CHECK(reason_of(ends.a.open(out, Time{})) == "UNKNOWN_LINK");
  // Even with the selector of the other direction.
  const uint64_t selector = derive_keys(material(), true).in.selector;
  for (std::size_t i = 0; i < 8; ++i) out[8 + i] = static_cast<uint8_t>(selector >> (8 * i));
  CHECK(reason_of(ends.a.open(out, Time{})) == "BAD_TAG");
}

TEST_CASE("a well tagged body that cannot be read names its lane") {
  Ends ends;
  std::vector<uint8_t> out;
  REQUIRE(ends.a.seal({kLinkA, 1, 6}, 0, ControlMessage(MsgHello{true}), out));
  // The peer itself tags a HELLO with an impossible flag.
  out.resize(out.size() - kTagBytes);
  out.back() = 2;
  Mac mac(derive_keys(material(), true).out.control);
  const TagBytes tag = mac.tag({bytes_of("kvferry message 1"), out});
  out.insert(out.end(), tag.begin(), tag.end());
  CHECK(reason_of(ends.b.open(out, Time{})) == "BAD_MESSAGE");
  REQUIRE(ends.b.opened_lane());
  CHECK(*ends.b.opened_lane() == LaneRef{kLinkB, 1, 6});
}

TEST_CASE("a removed link neither seals nor opens") {
  Ends ends;
  std::vector<uint8_t> out;
  REQUIRE(ends.a.seal({kLinkA, 0, 0}, 0, ControlMessage(MsgPing{}), out));
  ends.b.remove(kLinkB);
  CHECK(reason_of(ends.b.open(out, Time{})) == "UNKNOWN_LINK");
  ends.a.remove(kLinkA);
  CHECK_FALSE(ends.a.contains(kLinkA));
  const Status status = ends.a.seal({kLinkA, 0, 0}, 0, ControlMessage(MsgPing{}), out);
  REQUIRE_FALSE(status);
  CHECK(status.error().reason == "UNKNOWN_LINK");
  ends.a.add(kLinkA, derive_keys(material(), true));
  CHECK(ends.a.seal({kLinkA, 0, 0}, 0, ControlMessage(MsgPing{}), out));
}

TEST_CASE("keys that follow others derive from those too") {
  const LinkKeys first = derive_keys(material(), true);
  KeyMaterial again = material();
  again.renewal = 1;
  again.before = first.chain;
  const LinkKeys renewed = derive_keys(again, true);
  CHECK(renewed.out.control != first.out.control);
  CHECK(renewed.link_name != first.link_name);
  CHECK(renewed.chain != first.chain);
  CHECK(renewed.renewal == 1);
  CHECK(renewed.out.control_id == 5);
  CHECK(renewed.out.control == derive_keys(again, false).in.control);
  again.before.bytes[0] ^= 1;
  CHECK(derive_keys(again, true).out.control != renewed.out.control);
}

namespace {

constexpr Time kNow{1'000'000};

// One side's keys after those.
LinkKeys keys_after(const LinkKeys& before, bool initiator) {
  KeyMaterial next = material();
  next.renewal = before.renewal + 1;
  next.initiator_random.fill(static_cast<uint8_t>(next.renewal));
  next.before = before.chain;
  return derive_keys(next, initiator);
}

// An end of a renewed link, and what comes from it.
struct Renewed : Ends {
  LinkKeys of_a = derive_keys(material(), true);  // as they are now
  LinkKeys of_b = derive_keys(material(), false);
  void renew_b() { b.renew(kLinkB, of_b = keys_after(of_b, false), false, kNow); }
  void renew_a(Time now = kNow) { a.renew(kLinkA, of_a = keys_after(of_a, true), true, now); }
  std::vector<uint8_t> from_a() { return sealed(a, kLinkA); }
  std::vector<uint8_t> from_b() { return sealed(b, kLinkB); }
  static std::vector<uint8_t> sealed(LinkTable& table, LinkId link) {
    std::vector<uint8_t> out;
    REQUIRE(table.seal({link, 0, 0}, 0, ControlMessage(MsgPing{}), out));
    return out;
  }
  // The renewal that its key id tells.
  static int renewal_of(const std::vector<uint8_t>& message) { return (message[3] - 1) / 4; }
};

}  // namespace

TEST_CASE("renewed keys take over as soon as the peer is known to have them, and old ones go") {
  Renewed ends;
  CHECK(ends.b.open(ends.from_a(), kNow)->first_under == ends.of_b.in.selector);
  CHECK_FALSE(ends.b.open(ends.from_a(), kNow)->first_under);
  CHECK(ends.a.open(ends.from_b(), kNow)->first_under == ends.of_a.in.selector);
  const auto old_from_a = ends.from_a();

  // The answering side has them first, and seals as before until the other one uses them.
  ends.renew_b();
  CHECK(Renewed::renewal_of(ends.from_b()) == 0);
  CHECK(ends.a.open(ends.from_b(), kNow));
  ends.renew_a();
  const auto old_from_b = ends.from_b();
  const auto new_from_a = ends.from_a();
  CHECK(Renewed::renewal_of(new_from_a) == 1);
  CHECK(ends.a.open(old_from_b, kNow));
  CHECK(ends.b.open(new_from_a, kNow)->first_under == ends.of_b.in.selector);
  CHECK_FALSE(ends.b.open(new_from_a, kNow)->first_under);
  const auto new_from_b = ends.from_b();
  CHECK(Renewed::renewal_of(new_from_b) == 1);

  // Messages on their way are opened for the grace, however long the peer took to answer.
  CHECK(ends.b.open(old_from_a, kNow + kOldKeysGrace));
  CHECK(reason_of(ends.b.open(old_from_a, kNow + kOldKeysGrace + Duration(1))) == "UNKNOWN_LINK");
  const Time later = kNow + 10 * kOldKeysGrace;
  CHECK(ends.a.open(old_from_b, later));
  CHECK(ends.a.open(new_from_b, later)->first_under == ends.of_a.in.selector);
  CHECK(ends.a.open(old_from_b, later + kOldKeysGrace));
  CHECK(reason_of(ends.a.open(old_from_b, later + kOldKeysGrace + Duration(1))) == "UNKNOWN_LINK");
  CHECK(ends.a.open(new_from_b, later + 2 * kOldKeysGrace));
}

TEST_CASE("keys of a handshake whose answer was lost give way to those of the next one") {
  Renewed ends;
  ends.renew_b();
  KeyMaterial other = material();
  other.responder_random.fill(9);
  other.renewal = 1;
  other.before = derive_keys(material(), true).chain;
  ends.b.renew(kLinkB, derive_keys(other, false), false, kNow);
  const auto old_from_a = ends.from_a();
  CHECK(ends.b.open(old_from_a, kNow));
  ends.renew_a();
  CHECK(reason_of(ends.b.open(ends.from_a(), kNow)) == "UNKNOWN_LINK");
  ends.a.renew(kLinkA, derive_keys(other, true), true, kNow);
  CHECK(ends.b.open(ends.from_a(), kNow));
  ends.b.remove(kLinkB);
  CHECK(reason_of(ends.b.open(ends.from_a(), kNow)) == "UNKNOWN_LINK");
  CHECK(reason_of(ends.b.open(old_from_a, kNow)) == "UNKNOWN_LINK");
}

TEST_CASE("a chunk's check outlives the keys under which it was made") {
  Renewed ends;
  const uint64_t number = ends.a.chunk_number(kLinkA, 12);
  const auto key = ends.a.chunk_key(kLinkA, true, number);
  REQUIRE(key);
  for (uint32_t renewal = 1; renewal < 2 * kDataKeysKept; ++renewal) {
    ends.renew_b();
    ends.renew_a();
    REQUIRE(ends.b.open(ends.from_a(), kNow));
    const auto there = ends.b.chunk_key(kLinkB, false, number);
    REQUIRE(there);
    CHECK((*there == *key) == (renewal < kDataKeysKept));
    // The same gather's number under other keys is another.
    const uint64_t now = ends.a.chunk_number(kLinkA, 12);
    CHECK(ends.a.chunk_key(kLinkA, true, now) == ends.b.chunk_key(kLinkB, false, now));
    CHECK(ends.a.chunk_key(kLinkA, true, now) != key);
  }
}

TEST_CASE("data keys are forgotten when no chunk can wait any more that was checked under them") {
  Renewed ends;
  const uint64_t number = ends.a.chunk_number(kLinkA, 12);
  ends.renew_a();
  ends.renew_a(kNow + kDataKeyLife);
  CHECK(ends.a.chunk_key(kLinkA, true, number));
  ends.renew_a(kNow + kDataKeyLife + Duration(1));
  CHECK_FALSE(ends.a.chunk_key(kLinkA, true, number));
  ends.a.remove(kLinkA);
  CHECK(ends.a.size() == 0);
}
