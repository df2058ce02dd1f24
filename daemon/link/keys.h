// Keys of one link, derived from its handshake, and a keyed MAC that is cheap to use per message.
// Values; a Mac has a context of its own and belongs to one thread at a time.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "daemon/base/crypto.h"
#include "daemon/base/ids.h"
#include "daemon/base/secret.h"
#include "daemon/base/units.h"

namespace kvferry::link {

inline constexpr std::size_t kKeyBytes = 32;
inline constexpr std::size_t kTagBytes = 16;
// For how long what comes under a link's old keys is taken once the peer uses the new ones.
inline constexpr Duration kOldKeysGrace = std::chrono::seconds(30);

using KeyBytes = SecretBytes<struct LinkKeyTag, kKeyBytes>;
using TagBytes = std::array<uint8_t, kTagBytes>;
using Random32 = std::array<uint8_t, 32>;

// Both sides of a handshake see the same values here.
struct KeyMaterial {
  Random32 initiator_random{};
  Random32 responder_random{};
  std::string initiator_node;
  std::string responder_node;
  BootId initiator_boot;
  BootId responder_boot;
  Sha256 transcript{};          // of both handshake messages as sent
  SecretVector cluster_secret;  // empty: none is configured
  // Of a handshake of a link that is up: which one after its first, and the chain key of the keys
  // that these follow, so that a renewal by somebody who does not have those comes to nothing.
  uint32_t renewal = 0;
  KeyBytes before;
};

// One side's view: `out` seals what this side sends, `in` opens what comes.
struct DirectionKeys {
  uint8_t control_id = 0;  // the key ids on the wire
  uint8_t data_id = 0;
  KeyBytes control;       // tags of messages
  KeyBytes data;          // keyed checks of chunk data
  KeyBytes call;          // tags of the peer service's calls about this link
  uint64_t selector = 0;  // finds the link at the receiving side; public
};
struct LinkKeys {
  DirectionKeys out;
  DirectionKeys in;
  std::array<uint8_t, 16> link_name{};  // the same on both sides, for the peer service; public
  uint32_t renewal = 0;
  KeyBytes chain;  // goes into the keys that follow these, and into nothing else
};

// HKDF-SHA256 over all of `material`.
LinkKeys derive_keys(const KeyMaterial& material, bool initiator);

// HMAC-SHA256 cut to 16 with a key set once. Not thread-safe. About 0.6 us for a short message.
class Mac {
 public:
  explicit Mac(const KeyBytes& key);
  ~Mac();
  Mac(Mac&&) noexcept;
  Mac& operator=(Mac&&) noexcept;

  // The tag of the concatenated pieces.
  TagBytes tag(std::initializer_list<Bytes> pieces);

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

}  // namespace kvferry::link
