// Sealing and opening: what stands around a message's body on a rail.
//
//   offset bytes
//        0     2  magic "KV"
//        2     1  version of the envelope and of all bodies
//        3     1  key id
//        4     1  message type
//        5     3  zero
//        8     8  link selector
//       16     4  lane
//       20     4  epoch
//       24     8  sequence; of OFFER and REFUSE: the offer id
//       32     4  bytes of the body
//       36     n  body
//     36+n    16  tag: HMAC-SHA256(control key of the direction, label, bytes 0 to 36+n), cut
//
// An OFFER's data follows on the rail and is outside the tag; its length and check are in the body.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <unordered_map>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/engine/messages.h"
#include "daemon/link/chunk_check.h"
#include "daemon/link/codec.h"
#include "daemon/link/keys.h"

namespace kvferry::link {

inline constexpr uint8_t kWireVersion = 1;
inline constexpr std::size_t kHeaderBytes = 36;
inline constexpr std::size_t kOverheadBytes = kHeaderBytes + kTagBytes;
inline constexpr std::size_t kMaxSealedBytes = kMaxBodyBytes + kOverheadBytes;
// OFFER and REFUSE are far smaller than the control messages: what a rail has to carry at most.
inline constexpr std::size_t kMaxSealedOfferBytes = 256;
// A chunk may wait in the arena for long after its check was made, but no longer than a transfer
// lasts: for how long data keys are kept when others have taken over, and for how many renewals at
// most, which is what a chunk's number can tell apart.
inline constexpr Duration kDataKeyLife = std::chrono::hours(25);
inline constexpr uint32_t kDataKeysKept = 1024;

struct Opened {
  engine::LaneRef lane;
  uint64_t sequence = 0;  // of a control message; of OFFER and REFUSE the offer id
  Message message;
  // Set with the first message under those keys, by the selector of what comes: the peer has them
  // and uses them.
  std::optional<uint64_t> first_under;
};

// All links of this daemon with their keys. Owned and used by one thread, the engine's. The output
// buffer of seal() is the caller's, cleared and refilled, so that it is allocated once.
class LinkTable {
 public:
  LinkTable();
  ~LinkTable();
  LinkTable(const LinkTable&) = delete;
  LinkTable& operator=(const LinkTable&) = delete;

  // `link` must not be in the table.
  void add(LinkId link, const LinkKeys& keys);
  // What comes under the renewed keys is opened from now on. This side seals under them at once
  // (`seal_now`: of the side that dialled, which knows that the peer has them) or with the first
  // message that comes under them. Nothing if the link is unknown.
  void renew(LinkId link, const LinkKeys& keys, bool seal_now, Time now);
  void remove(LinkId link);  // nothing if unknown
  bool contains(LinkId link) const;
  std::size_t size() const { return links_.size(); }

  // NOT_FOUND UNKNOWN_LINK; INVALID_ARGUMENT from encode_body.
  Status seal(const engine::LaneRef& lane, uint64_t sequence, const engine::ControlMessage& message,
              std::vector<uint8_t>& out);
  Status seal(const engine::LaneRef& lane, const engine::MsgOffer& offer,
              std::vector<uint8_t>& out);
  Status seal(const engine::LaneRef& lane, const engine::MsgRefuse& refuse,
              std::vector<uint8_t>& out);

  // Any bytes. INVALID_ARGUMENT BAD_ENVELOPE (shape), NOT_FOUND UNKNOWN_LINK (selector),
  // PERMISSION_DENIED BAD_TAG (before the body is looked at), INVALID_ARGUMENT BAD_MESSAGE (a body
  // that its sender tagged and nobody can read: the peer breaks the protocol; `opened_lane()` tells
  // whose it was).
  Result<Opened> open(Bytes sealed, Time now);

  // The number of a chunk's key, from that of its gather, which no other gather has: it says which
  // renewal's data key is meant. Zero if the link is unknown.
  uint64_t chunk_number(LinkId link, uint64_t gather) const;
  // For the GMAC of one chunk that this side sends (`sent`) or gets: HMAC-SHA256(data key of the
  // direction, label, number), cut. Nothing if the link is unknown, or has no such data key.
  std::optional<ChunkKey> chunk_key(LinkId link, bool sent, uint64_t number);

  // The lane that the last open() with BAD_MESSAGE came by.
  const std::optional<engine::LaneRef>& opened_lane() const { return opened_lane_; }

 private:
  struct Keys;
  struct DataKeys;
  struct Entry;
  void take_over(Entry& entry, std::unique_ptr<Keys> keys, Time now);
  void forget(std::unique_ptr<Keys>& keys);
  template <typename M>
  Status seal_any(const engine::LaneRef& lane, uint64_t number, MessageType type, const M& message,
                  std::vector<uint8_t>& out);

  std::unordered_map<LinkId, std::unique_ptr<Entry>, IdHash> links_;
  std::unordered_map<uint64_t, Entry*> by_selector_;
  std::optional<engine::LaneRef> opened_lane_;
};

}  // namespace kvferry::link
