// Sealed messages. As they come (nobody without the key gets further than the tag), and with a tag
// that is right, around any type, numbers and body: what a peer can send that has the link's key.
#include "daemon/link/envelope.h"

#include <cstring>

#include "tests/fuzz/input.h"

namespace {

using namespace kvferry;

constexpr LinkId kLink{7};

link::LinkKeys keys_of(bool initiator) {
  link::KeyMaterial material;
  material.initiator_random.fill(1);
  material.responder_random.fill(2);
  material.initiator_node = "node1";
  material.responder_node = "node2";
  material.initiator_boot.bytes.fill(3);
  material.responder_boot.bytes.fill(4);
  material.cluster_secret.assign(32, 5);
  return link::derive_keys(material, initiator);
}

template <typename U>
void put(std::vector<uint8_t>& out, U value) {
  for (std::size_t i = 0; i < sizeof(U); ++i)
    out.push_back(static_cast<uint8_t>(uint64_t{value} >> (8 * i)));
}

// As the peer would seal it: envelope.h has the form.
std::vector<uint8_t> sealed_by_hand(const link::LinkKeys& peer, fuzz::Input& in) {
  std::vector<uint8_t> out = {'K', 'V', link::kWireVersion, peer.out.control_id, in.byte(), 0,
                              0,   0};
  put(out, peer.out.selector);
  put(out, in.number<uint32_t>());
  put(out, in.number<uint32_t>());
  put(out, in.number<uint64_t>());
  const auto body = in.rest();
  put(out, static_cast<uint32_t>(body.size()));
  out.insert(out.end(), body.begin(), body.end());
  link::Mac mac(peer.out.control);
  const link::TagBytes tag = mac.tag({bytes_of(std::string_view("kvferry message 1")), out});
  out.insert(out.end(), tag.begin(), tag.end());
  return out;
}

// What was opened seals to the same bytes.
void check_sealing(link::LinkTable& peer, const link::Opened& opened,
                   const std::vector<uint8_t>& sealed) {
  std::vector<uint8_t> again;
  const Status made = std::visit(
      [&](const auto& message) -> Status {
        using M = std::decay_t<decltype(message)>;
        if constexpr (std::is_same_v<M, engine::ControlMessage>)
          return peer.seal(opened.lane, opened.sequence, message, again);
        else
          return peer.seal(opened.lane, message, again);
      },
      opened.message);
  FUZZ_CHECK(made.has_value(), "what was opened can be sealed");
  // A reason that this release does not know reads as another one: the codec's fuzzer looks at it.
  if (again.size() == sealed.size()) return;
  FUZZ_CHECK(std::holds_alternative<engine::ControlMessage>(opened.message),
             "sealed again it is as long");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  static const link::LinkKeys ours = keys_of(true);
  static const link::LinkKeys theirs = keys_of(false);
  static link::LinkTable* const here = [] {
    auto* table = new link::LinkTable;
    table->add(kLink, ours);
    return table;
  }();
  static link::LinkTable* const there = [] {
    auto* table = new link::LinkTable;
    table->add(kLink, theirs);
    return table;
  }();

  fuzz::Input in(data, size);
  const uint8_t mode = in.byte();
  if (mode % 4 == 0) {
    FUZZ_CHECK(!here->open(in.rest(), Time{}), "bytes without a key are not a message");
    return 0;
  }
  const std::size_t spoiled = mode % 4 == 1 ? in.number<uint32_t>() : 0;
  std::vector<uint8_t> sealed = sealed_by_hand(theirs, in);
  if (mode % 4 == 1) {
    sealed[spoiled % sealed.size()] ^= static_cast<uint8_t>(1 + (mode >> 2) % 255);
    FUZZ_CHECK(!here->open(sealed, Time{}), "a changed byte is seen");
    return 0;
  }
  const Result<link::Opened> opened = here->open(sealed, Time{});
  if (!opened) {
    const std::string& reason = opened.error().reason;
    FUZZ_CHECK(reason == "BAD_MESSAGE" ? here->opened_lane().has_value()
                                       : sealed.size() > link::kMaxSealedBytes,
               "with a right tag only the body is at fault, and its lane is known");
    return 0;
  }
  FUZZ_CHECK(opened->lane.link == kLink, "the selector finds the link");
  check_sealing(*there, *opened, sealed);
  return 0;
}
