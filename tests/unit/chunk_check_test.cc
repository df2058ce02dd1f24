#include "daemon/link/chunk_check.h"

#include <catch2/catch.hpp>
#include <vector>

#include "daemon/base/crypto.h"
#include "daemon/link/envelope.h"

using namespace kvferry;
using namespace kvferry::engine;
using namespace kvferry::link;

namespace {

constexpr LinkId kLinkA{1};
constexpr LinkId kLinkB{77};
// Numbers of two gathers, under the data keys of the first handshake.
constexpr uint64_t kNumber = 12 * kDataKeysKept;
constexpr uint64_t kOther = 13 * kDataKeysKept;

// Both ends of one link, as two daemons have them.
struct Ends {
  LinkTable a;
  LinkTable b;
  Ends() {
    KeyMaterial material;
    material.initiator_random.fill(1);
    material.responder_random.fill(2);
    material.initiator_node = "node-a";
    material.responder_node = "node-b";
    a.add(kLinkA, derive_keys(material, true));
    b.add(kLinkB, derive_keys(material, false));
  }
};

}  // namespace

TEST_CASE("GMAC as the specification has it") {
  // Test case 1 of the GCM specification, and a message worked out by other code.
  std::array<uint8_t, 16> key{};
  CHECK(gmac_aes128(key, {}) == std::array<uint8_t, 16>{0x58, 0xe2, 0xfc, 0xce, 0xfa, 0x7e, 0x30,
                                                        0x61, 0x36, 0x7f, 0x1d, 0x57, 0xa4, 0xe7,
                                                        0x45, 0x5a});
  for (std::size_t i = 0; i < key.size(); ++i) key[i] = static_cast<uint8_t>(i);
  std::vector<uint8_t> data(1000);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(i % 251);
  const std::array<uint8_t, 16> tag{0x44, 0x9d, 0xce, 0x50, 0x39, 0x33, 0x4a, 0x8b,
                                    0xfa, 0xfc, 0x0f, 0x72, 0x7b, 0x10, 0x4a, 0xda};
  CHECK(gmac_aes128(key, data) == tag);
  CHECK(gmac_aes128(key, data) == tag);  // nothing is left of the call before
}

TEST_CASE("a chunk's check holds for its bytes, its number, its direction and its link") {
  Ends ends;
  std::vector<std::byte> data(5000, std::byte{7});
  const ChunkCheck sender(ends.a.chunk_key(kLinkA, true, kNumber).value(), kNumber);
  const Check check = sender.of(data);
  CHECK(check.kind == CheckKind::kGmac);
  CHECK(check.number == kNumber);
  const auto receiver = [&](uint64_t number) {
    return ChunkCheck(ends.b.chunk_key(kLinkB, false, number).value(), number);
  };
  CHECK(receiver(kNumber).matches(data, check));
  Check of_another = check;
  of_another.number = kOther;
  CHECK_FALSE(receiver(kOther).matches(data, of_another));
  CHECK_FALSE(receiver(kOther).matches(data, check));
  // Sent back to its maker.
  CHECK_FALSE(
      ChunkCheck(ends.a.chunk_key(kLinkA, false, kNumber).value(), kNumber).matches(data, check));
  Check unkeyed = ChunkCheck(CheckKind::kXxh3).of(data);
  CHECK(ChunkCheck(CheckKind::kXxh3).matches(data, unkeyed));
  CHECK_FALSE(receiver(kNumber).matches(data, unkeyed));
  CHECK_FALSE(ends.a.chunk_key(kLinkB, true, kNumber));  // no such link there
  for (const std::size_t at : {std::size_t{0}, data.size() / 2, data.size() - 1}) {
    data[at] ^= std::byte{1};
    CHECK_FALSE(receiver(kNumber).matches(data, check));
    CHECK_FALSE(ChunkCheck(CheckKind::kXxh3).matches(data, unkeyed));
    data[at] ^= std::byte{1};
  }
  CHECK_FALSE(receiver(kNumber).matches(std::span(data).first(4999), check));
}
