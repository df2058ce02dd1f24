// The few cryptographic functions the protocol needs, over OpenSSL's libcrypto. Pure functions
// except random_bytes; thread-safe. None of them can fail on valid input: a failure inside the
// library aborts the process, since going on would mean sending unauthenticated messages.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string_view>

#include "daemon/base/secret.h"

namespace kvferry {

using Bytes = std::span<const uint8_t>;
using Sha256 = std::array<uint8_t, 32>;

inline Bytes bytes_of(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

// The hash of the concatenated pieces.
Sha256 sha256(std::initializer_list<Bytes> pieces);
// HMAC-SHA256 of the concatenated pieces; callers cut it to the length they carry.
Sha256 hmac_sha256(Bytes key, std::initializer_list<Bytes> pieces);
// HKDF-SHA256 (RFC 5869), of a secret that is not empty; salt and info may be. out.size() <= 255
// * 32.
void hkdf_sha256(Bytes secret, Bytes salt, Bytes info, std::span<uint8_t> out);
// GMAC (NIST SP 800-38D) of `data` under AES-128 and the nonce zero: `key` must be used once only.
std::array<uint8_t, 16> gmac_aes128(const std::array<uint8_t, 16>& key, Bytes data);
// From the system's generator.
void random_bytes(std::span<uint8_t> out);

// Copies the first out.size() bytes of a hash.
template <std::size_t N>
std::array<uint8_t, N> cut(const Sha256& hash) {
  static_assert(N <= 32);
  std::array<uint8_t, N> out{};
  for (std::size_t i = 0; i < N; ++i) out[i] = hash[i];
  return out;
}

}  // namespace kvferry
