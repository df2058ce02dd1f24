#include <array>
#include <catch2/catch.hpp>
#include <compare>
#include <new>
#include <type_traits>
#include <vector>

#include "daemon/base/crypto.h"
#include "daemon/base/ids.h"
#include "daemon/base/reason.h"
#include "daemon/base/result.h"
#include "daemon/base/secret.h"
#include "daemon/base/units.h"

using namespace kvferry;

TEST_CASE("hmac and hkdf match their published vectors") {
  // RFC 4231 test case 2 and RFC 5869 test case 1.
  CHECK(to_hex(hmac_sha256(bytes_of("Jefe"),
                           {bytes_of("what do ya "), bytes_of("want for nothing?")})) ==
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  std::array<uint8_t, 22> secret{};
  secret.fill(0x0b);
  std::array<uint8_t, 13> salt{};
  std::array<uint8_t, 10> info{};
  REQUIRE(from_hex("000102030405060708090a0b0c", salt));
  REQUIRE(from_hex("f0f1f2f3f4f5f6f7f8f9", info));
  std::array<uint8_t, 42> out{};
  hkdf_sha256(secret, salt, info, out);
  CHECK(to_hex(out) ==
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865");
  // Test case 3: neither salt nor info.
  hkdf_sha256(secret, {}, {}, out);
  CHECK(to_hex(out) ==
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8");
  CHECK(to_hex(sha256({bytes_of("a"), bytes_of("bc")})) ==
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_CASE("base64url takes back only what it gives") {
  for (std::string_view text : {"", "a", "ab", "abc", "abcd"}) {
    const std::string encoded = to_base64url(bytes_of(text));
    std::string back = "unchanged";
    REQUIRE(from_base64url(encoded, back));
    CHECK(back == text);
  }
  std::string out = "unchanged";
  CHECK_FALSE(from_base64url("A", out));
  CHECK_FALSE(from_base64url("AB+/", out));
  CHECK_FALSE(from_base64url("AB", out));  // the spare bits are not zero
  CHECK(out == "unchanged");
}

TEST_CASE("checked arithmetic notices overflow and time saturates") {
  uint64_t out = 0;
  CHECK_FALSE(checked_mul(uint64_t{1} << 63, 2, out));
  CHECK_FALSE(checked_add(~uint64_t{0}, 1, out));
  CHECK(ceil_div(~uint64_t{0}, 2) == uint64_t{1} << 63);
  CHECK(Time::never() + std::chrono::seconds(1) == Time::never());
  CHECK(intersect({2, 5}, {5, 9}).empty());
}

TEST_CASE("every reason has a name and unknown numbers become PROTOCOL") {
  for (uint16_t i = 0; i < kReasonCount; ++i) CHECK(name_of(static_cast<Reason>(i)) != "UNKNOWN");
  CHECK(reason_from_wire(kReasonCount) == Reason::kProtocol);
  CHECK(reason_from_wire(65535) == Reason::kProtocol);
}

TEST_CASE("an error names code, reason and field") {
  const Status status = invalid("groups[1].block_ids[3]", "BLOCK_OUT_OF_RANGE", "17 of 16");
  CHECK(status.error().to_string() ==
        "INVALID_ARGUMENT BLOCK_OUT_OF_RANGE groups[1].block_ids[3]: 17 of 16");
}

// What the place of an object holds when it has gone. Written before and read after byte by byte,
// so that neither the compiler nor what was there makes it zeros.
template <typename T>
std::vector<uint8_t> left_behind(const T& like) {
  alignas(T) static std::array<uint8_t, sizeof(T)> place;
  volatile uint8_t* const at = place.data();
  for (std::size_t i = 0; i < sizeof(T); ++i) at[i] = 0xee;
  T* const object = new (place.data()) T(like);
  object->~T();
  std::vector<uint8_t> out(sizeof(T));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = at[i];
  return out;
}

TEST_CASE("a secret is wiped when it goes, equal by its bytes, and nobody's text") {
  Secret secret;
  CHECK(secret.is_zero());
  secret.bytes.fill(0x5a);
  CHECK_FALSE(secret.is_zero());
  CHECK(left_behind(secret) == std::vector<uint8_t>(sizeof secret, 0));
  // Of bytes that are no secret something stays, which shows that the test can fail.
  Digest16 open;
  open.bytes.fill(0x5a);
  CHECK(left_behind(open) != std::vector<uint8_t>(sizeof open, 0));
  Secret other = secret;
  CHECK(other == secret);
  other.bytes[15] ^= 1;
  CHECK(other != secret);

  static_assert(!std::three_way_comparable<Secret>);
  static_assert(!std::is_convertible_v<Secret, Bytes>);
  static_assert(!std::is_same_v<Secret, Token>);
  std::string text = "a password";
  const char* const at = text.data();
  wipe(text);
  CHECK(text.empty());
  CHECK(at[1] == 0);
}
