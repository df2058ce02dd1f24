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
  Result<Opened> opened = ends.b.open(out);
  REQUIRE(opened);
  CHECK(opened->lane == LaneRef{kLinkB, 2, 5});
  CHECK(opened->sequence == 17);
  CHECK(opened->message == Message(message));

  REQUIRE(ends.b.seal({kLinkB, 0, 0}, some_offer(), out));
  CHECK(out.size() <= kMaxSealedOfferBytes);
  opened = ends.a.open(out);
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
    const Result<Opened> opened = ends.b.open(changed);
    INFO("byte " << i);
    REQUIRE_FALSE(opened);
    const std::string& reason = opened.error().reason;
    const bool in_selector = i >= 8 && i < 16;
    const bool in_shape = i < 3 || (i >= 5 && i < 8) || (i >= 32 && i < 36);
    CHECK(reason == (in_selector ? "UNKNOWN_LINK" : in_shape ? "BAD_ENVELOPE" : "BAD_TAG"));
  }
  for (std::size_t size = 0; size < out.size(); ++size)
    CHECK(reason_of(ends.b.open(Bytes(out.data(), size))) == "BAD_ENVELOPE");
  CHECK(ends.b.open(out));
}

TEST_CASE("a message sent back to its maker is not its peer's") {
  Ends ends;
  std::vector<uint8_t> out;
  REQUIRE(ends.a.seal({kLinkA, 0, 0}, 0, ControlMessage(MsgPing{}), out));
  CHECK(reason_of(ends.a.open(out)) == "UNKNOWN_LINK");
  // Even with the selector of the other direction.
  const uint64_t selector = derive_keys(material(), true).in.selector;
  for (std::size_t i = 0; i < 8; ++i) out[8 + i] = static_cast<uint8_t>(selector >> (8 * i));
  CHECK(reason_of(ends.a.open(out)) == "BAD_TAG");
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
  CHECK(reason_of(ends.b.open(out)) == "BAD_MESSAGE");
  REQUIRE(ends.b.opened_lane());
  CHECK(*ends.b.opened_lane() == LaneRef{kLinkB, 1, 6});
}

TEST_CASE("a removed link neither seals nor opens") {
  Ends ends;
  std::vector<uint8_t> out;
  REQUIRE(ends.a.seal({kLinkA, 0, 0}, 0, ControlMessage(MsgPing{}), out));
  ends.b.remove(kLinkB);
  CHECK(reason_of(ends.b.open(out)) == "UNKNOWN_LINK");
  ends.a.remove(kLinkA);
  CHECK_FALSE(ends.a.contains(kLinkA));
  const Status status = ends.a.seal({kLinkA, 0, 0}, 0, ControlMessage(MsgPing{}), out);
  REQUIRE_FALSE(status);
  CHECK(status.error().reason == "UNKNOWN_LINK");
  ends.a.add(kLinkA, derive_keys(material(), true));
  CHECK(ends.a.seal({kLinkA, 0, 0}, 0, ControlMessage(MsgPing{}), out));
}
