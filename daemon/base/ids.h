// Distinct types for ids, so that one kind is never taken for another.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string>

#include "daemon/base/secret.h"

namespace kvferry {

// A counter of one daemon's life; 0 means none.
template <typename Tag>
struct Id {
  uint64_t value = 0;
  constexpr auto operator<=>(const Id&) const = default;
  constexpr explicit operator bool() const { return value != 0; }
};

using WorkerId = Id<struct WorkerTag>;  // one attachment (lifeline)
using LinkId = Id<struct LinkTag>;      // one handshake with a peer daemon, local number
// The link of a daemon to itself, over which the two ends of a transfer within it speak. No
// handshake gets this number; it is always there.
inline constexpr LinkId kLoopedLink{UINT64_MAX};
using SendId =
    Id<struct SendTag>;  // one sender rank's side of a transfer; on the wire with the boot id
using ReceiveId = Id<struct ReceiveTag>;  // one receiver rank's side of a transfer, local number
using OfferId = Id<struct OfferTag>;      // one offer, on the wire with the link's boot id
using CreditId = Id<struct CreditTag>;    // one credit of a pull
using CopyId = Id<struct CopyTag>;        // one gather or scatter
using CompileId = Id<struct CompileTag>;  // one compilation of a slice
using ResolveId = Id<struct ResolveTag>;  // one look-up of instances and legs
using ConditionId = Id<struct ConditionTag>;    // one wait for a ready condition
using DescriptorId = Id<struct DescriptorTag>;  // an offer held by the rails process
using LandingId = Id<struct LandingTag>;        // a posted receive

// Fixed-size opaque bytes, ordered and hashable; Tag keeps the kinds apart.
template <typename Tag, std::size_t N>
struct FixedBytes {
  std::array<uint8_t, N> bytes{};
  constexpr auto operator<=>(const FixedBytes&) const = default;
  bool is_zero() const {
    for (uint8_t b : bytes)
      if (b != 0) return false;
    return true;
  }
  std::span<const uint8_t> span() const { return bytes; }
};

using BootId = FixedBytes<struct BootTag, 16>;              // one life of a daemon
using Incarnation = FixedBytes<struct IncarnationTag, 16>;  // one life of an instance
// Never logged, never sent to peers: what a transfer's parties share, or an engine's ranks.
using Secret = SecretBytes<struct SecretTag, 16>;
using SecretTagBytes = FixedBytes<struct SecretTagTag, 8>;  // what names a secret on the wire
using Digest16 = FixedBytes<struct DigestTag, 16>;          // SHA-256 cut to 16
using Proof = FixedBytes<struct ProofTag, 16>;   // HMAC of the transfer's secret cut to 16
using Token = SecretBytes<struct TokenTag, 16>;  // who shows it is a worker, or a link's peer

// A leg attempt, made by the receiver's daemon and never used again.
struct PullId {
  BootId receiver;
  uint64_t counter = 0;
  auto operator<=>(const PullId&) const = default;
};

// One sender rank's side of a transfer as the peer names it.
struct SendRef {
  BootId sender;
  uint64_t counter = 0;
  auto operator<=>(const SendRef&) const = default;
};

struct IdHash {
  template <typename Tag>
  std::size_t operator()(const Id<Tag>& id) const {
    return std::hash<uint64_t>{}(id.value * 0x9E3779B97F4A7C15ULL);
  }
  template <typename Tag, std::size_t N>
  std::size_t operator()(const FixedBytes<Tag, N>& id) const {
    uint64_t word = 0;
    std::memcpy(&word, id.bytes.data(), N < 8 ? N : 8);
    return std::hash<uint64_t>{}(word);
  }
  std::size_t operator()(const PullId& id) const {
    return (*this)(id.receiver) ^ std::hash<uint64_t>{}(id.counter * 0x9E3779B97F4A7C15ULL);
  }
  std::size_t operator()(const SendRef& id) const {
    return (*this)(id.sender) ^ std::hash<uint64_t>{}(id.counter * 0x9E3779B97F4A7C15ULL);
  }
};

// Lower-case hexadecimal.
std::string to_hex(std::span<const uint8_t> bytes);
// Returns false, leaving `out` alone, unless `hex` has exactly 2 * out.size() hexadecimal digits.
bool from_hex(std::string_view hex, std::span<uint8_t> out);
// Base64url without padding.
std::string to_base64url(std::span<const uint8_t> bytes);
bool from_base64url(std::string_view text, std::string& out);

}  // namespace kvferry
