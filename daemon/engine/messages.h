// The messages between two daemons as plain data. The codec (daemon/link) turns them into tagged
// bytes and back; the simulator carries them as they are. What each one means stands with the
// tables in daemon/engine/README.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/reason.h"
#include "daemon/base/units.h"
#include "daemon/mapping/layout.h"

namespace kvferry::engine {

using mapping::GroupNeed;
using mapping::GroupRanges;

// A transfer as it is named on the wire: the secret itself never travels.
struct TransferName {
  std::string instance;     // the sender's, "tenant/name"
  Incarnation incarnation;  // the sender's
  std::string id;           // 1 to 64 bytes
  SecretTagBytes secret_tag;
  auto operator<=>(const TransferName&) const = default;
};

enum class CheckKind : uint8_t { kNone = 0, kXxh3 = 1, kGmac = 2 };

// Integrity check of one chunk's data.
struct Check {
  CheckKind kind = CheckKind::kNone;
  std::array<uint8_t, 16> value{};
  uint64_t number = 0;  // kGmac: which of the sender's keys it is made under
  bool operator==(const Check&) const = default;
};

// Numbers of arenas and segments that may travel are below these.
inline constexpr uint32_t kMaxArenas = 256;
inline constexpr uint32_t kMaxSegments = 65536;

// Where a region of a mapped arena lies, as its receiver numbers the segments of all its arenas.
struct RegionPlace {
  uint32_t segment = 0;
  uint64_t offset = 0;
  bool operator==(const RegionPlace&) const = default;
};

struct CreditGrant {
  CreditId credit;
  uint64_t bytes = 0;  // of the region behind it
  std::optional<RegionPlace> place =
      {};  // of a mapped pull's region, which the sender writes itself
  bool operator==(const CreditGrant&) const = default;
};

// A scattered chunk (or a finished empty slice, chunk 0).
struct Ack {
  uint64_t slice = 0;
  uint64_t chunk = 0;
  bool operator==(const Ack&) const = default;
};

// First on every lane, in both directions; a lane is used once the peer's HELLO has been seen with
// `answer` set or our answer to it has been sent.
struct MsgHello {
  bool answer = false;
  bool operator==(const MsgHello&) const = default;
};
struct MsgPing {
  bool operator==(const MsgPing&) const = default;
};
// The sender has given up that lane (which is not the one this message travels on).
struct MsgLaneDown {
  uint32_t lane = 0;
  uint32_t epoch = 0;
  bool operator==(const MsgLaneDown&) const = default;
};
struct MsgPull {
  PullId pull;
  TransferName transfer;
  Proof proof;
  uint32_t sender_rank = 0;
  uint32_t receiver_rank = 0;
  std::string receiver_instance;  // "tenant/name"
  Incarnation receiver_incarnation;
  Digest16 cards;                    // digest of both card sets
  std::vector<GroupNeed> needs;      // per receiver group
  uint64_t remaining_ms = 0;         // of the receiver's deadline
  std::vector<CreditGrant> credits;  // the first ones; none of a mapped pull
  uint64_t oldest = 0;               // the lowest pull of this link that is not closed
  // A mapped pull, all its life: the sender gathers straight into this arena of the receiver's,
  // which it has said to have mapped.
  std::optional<uint32_t> mapped = {};
  bool operator==(const MsgPull&) const = default;
};
struct MsgUpdate {
  PullId pull;
  std::vector<CreditGrant> credits;
  std::vector<Ack> acks;
  uint64_t oldest = 0;
  bool operator==(const MsgUpdate&) const = default;
};
struct MsgSlice {
  PullId pull;
  SendRef send;
  Proof proof;
  uint64_t ordinal = 0;
  bool last = false;
  std::vector<GroupRanges> ranges;  // per sender group, what this slice offers
  std::optional<Range> layers;      // absent: all layers
  uint64_t bytes = 0;               // of the slice's stream on this leg
  uint64_t digest = 0;              // of the stream's text
  bool with_aux = false;            // last: its Send had aux, whichever leg carries it
  std::optional<std::string> aux;   // on the last slice of the leg that carries it
  bool operator==(const MsgSlice&) const = default;
};
// Header of a chunk's data; travels with it on a rail.
struct MsgOffer {
  PullId pull;
  SendRef send;
  uint64_t slice = 0;
  uint64_t chunk = 0;
  CreditId credit;
  OfferId offer;
  uint64_t bytes = 0;
  Check check;
  bool operator==(const MsgOffer&) const = default;
};
// Travels on the lane that the offer came by, outside the control sequence.
struct MsgRefuse {
  PullId pull;
  OfferId offer;
  bool operator==(const MsgRefuse&) const = default;
};
enum class Outcome : uint8_t {
  kCompleted = 0,
  kReleased = 1,
  kDelivered = 2,
  kFailed = 3,
  kCancelled = 4
};
struct MsgEnd {
  PullId pull;
  TransferName transfer;
  Outcome outcome = Outcome::kFailed;
  Reason reason = Reason::kNone;
  std::optional<Proof> proof;  // from R to an S that has no leg yet
  bool mapped = false;         // from R, of a mapped pull: S answers DRAINED too
  bool operator==(const MsgEnd&) const = default;
};
struct MsgClaim {
  TransferName transfer;
  Proof proof;
  std::string receiver_instance;
  Incarnation receiver_incarnation;
  uint32_t sender_rank = 0;
  uint32_t receiver_rank = 0;
  uint64_t ttl_ms = 0;
  bool operator==(const MsgClaim&) const = default;
};
struct MsgDecline {
  TransferName transfer;
  Proof proof;
  std::string receiver_instance;
  Incarnation receiver_incarnation;
  uint32_t sender_rank = 0;
  uint32_t receiver_rank = 0;
  bool operator==(const MsgDecline&) const = default;
};
// The slice never counts again, whether or not its SLICE came.
struct MsgDrop {
  PullId pull;
  uint64_t slice = 0;
  bool operator==(const MsgDrop&) const = default;
};

// From S: it has mapped this arena of R's, and gathers there what new pulls ask for. For the link's
// life.
struct MsgMapped {
  uint32_t arena = 0;  // R's number
  bool operator==(const MsgMapped&) const = default;
};
// From S: the chunk's gather into the mapped region of this credit has ended, well.
struct MsgWritten {
  PullId pull;
  uint64_t slice = 0;
  uint64_t chunk = 0;
  CreditId credit;
  Check check;
  bool operator==(const MsgWritten&) const = default;
};
// From S, about a pull that R has ended: nothing of it writes to R's regions any more.
struct MsgDrained {
  PullId pull;
  bool operator==(const MsgDrained&) const = default;
};

// Everything that takes a number in its lane's sequence.
using ControlMessage =
    std::variant<MsgHello, MsgPing, MsgLaneDown, MsgPull, MsgUpdate, MsgSlice, MsgEnd, MsgClaim,
                 MsgDecline, MsgDrop, MsgMapped, MsgWritten, MsgDrained>;

// Where a message travels. `sequence` counts from 0 in each lane, epoch and direction; REFUSE and
// OFFER have none.
struct LaneRef {
  LinkId link;
  uint32_t lane = 0;
  uint32_t epoch = 0;
  auto operator<=>(const LaneRef&) const = default;
};

}  // namespace kvferry::engine
