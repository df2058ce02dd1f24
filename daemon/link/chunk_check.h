// Checks of chunk data, which no message's tag covers: XXH3 against faults, GMAC also against who
// can change bytes on their way. The check itself travels under the tag of OFFER or WRITTEN.
// Values; any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "daemon/base/secret.h"
#include "daemon/engine/messages.h"

namespace kvferry::link {

// AES-128, for the GMAC of one chunk and no other (LinkTable::chunk_key): with a key of its own for
// each, no nonce can come twice under one key, whatever is gathered again.
using ChunkKey = SecretBytes<struct ChunkKeyTag, 16>;

class ChunkCheck {
 public:
  // kNone or kXxh3.
  explicit ChunkCheck(engine::CheckKind kind) : kind_(kind) {}
  // kGmac under the key of that number.
  ChunkCheck(const ChunkKey& key, uint64_t number)
      : kind_(engine::CheckKind::kGmac), key_(key), number_(number) {}

  // XXH3 with 128 bits, canonical; GMAC (NIST SP 800-38D) with all 128 bits, under nonce zero.
  engine::Check of(std::span<const std::byte> data) const;
  // Compares without leaking by time where the first difference stands.
  bool matches(std::span<const std::byte> data, const engine::Check& check) const;

 private:
  engine::CheckKind kind_;
  ChunkKey key_;
  uint64_t number_ = 0;
};

}  // namespace kvferry::link
