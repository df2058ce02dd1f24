// Everything that the engine asks of the world. An executor (daemon/node) or the simulator carries
// them out in order and answers with events; nothing here is answered before handle() returns.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/reason.h"
#include "daemon/base/result.h"
#include "daemon/engine/events.h"
#include "daemon/engine/messages.h"
#include "daemon/engine/ports.h"
#include "daemon/memory/region.h"

namespace kvferry::engine {

enum class Role : uint8_t { kSender = 0, kReceiver = 1 };

// Worker-visible state of a transfer.
enum class TransferState : uint8_t {
  kOpen = 1,       // accepted, nothing has moved
  kActive = 2,     // the counterpart is known
  kDelivered = 3,  // sender: every byte was scattered (or another receiver has it)
  kCompleted = 4,  // receiver: pages and aux may be read
  kFailed = 5,
  kCancelled = 6,
};
enum class Delivery : uint8_t { kNo = 0, kUnknown = 1, kDelivered = 2 };

// One status slot as the worker sees it. RELEASED flags never go back.
struct TransferRecord {
  uint64_t client_handle = 0;
  Role role = Role::kSender;
  TransferState state = TransferState::kOpen;
  Reason reason = Reason::kNone;
  Reason released_reason = Reason::kNone;
  Delivery delivery = Delivery::kNo;
  bool released = false;        // SOURCE_RELEASED or DEST_RELEASED
  bool receiver_ready = false;  // sender: all legs of a receiver have come
  bool memory_in_use = false;   // a copy may still read (sender) or write (receiver) the pages
  uint64_t slices = 0;          // receiver: slices wholly scattered; sender: wholly gathered
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;                // 0 while unknown
  std::shared_ptr<const std::string> aux;  // receiver, from completion on
};

// The answer to a call. `error.code` kOk: accepted, or `existing` if the same call was made before.
struct Reply {
  OpRef op;
  Error error{Code::kOk, {}, {}, {}};
  bool existing = false;
  uint32_t slot = 0;
  TransferState state = TransferState::kOpen;  // Cancel
  bool memory_in_use = false;                  // Cancel
  std::vector<uint32_t> dropped_sends;         // Revoke: send indices
  struct Receiver {
    std::string instance;  // "tenant/name"
    Incarnation incarnation;
    uint32_t dp_group = 0;
    bool ready = false;  // all its legs have come: the needs are whole
    std::vector<GroupRanges> needs;
  };
  std::vector<Receiver> receivers = {};  // ReceiverNeeds
  struct Match {
    uint32_t group = 0;
    uint64_t tokens = 0;
  };
  std::vector<Match> matches = {};  // LookupReuse
  uint64_t pin = 0;                 // LookupReuse; 0: nothing was pinned
  uint32_t withdrawn = 0;           // WithdrawReuse: entries
  uint64_t reserved_bytes = 0;      // Reserve
  Duration lease{};                 // Reserve
};
struct Publish {
  WorkerId worker;
  uint32_t slot = 0;
  TransferRecord record;
};
// One store into the worker's word, at most once a transfer.
struct SetDoneWord {
  WorkerId worker;
  uint32_t word = 0;
  uint64_t value = 0;
};
struct FreeSlot {
  WorkerId worker;
  uint32_t slot = 0;
};
// No copy reads or writes this layout's pages any more and none of its transfers is open.
struct LayoutQuiet {
  std::shared_ptr<const LayoutHandle> layout;
};

struct Resolve {
  ResolveId resolve;
  std::shared_ptr<const ReceiveOp> receive;
  // Only to tell that nobody comes. The receiver's layout may be gone by now: where its legs cannot
  // be found, the answer is every rank of the sender.
  bool declines = false;
};
struct ResolvePull {
  ResolveId resolve;
  LinkId link;
  std::shared_ptr<const MsgPull> pull;
  std::shared_ptr<const LayoutHandle> layout;  // the sender rank's
};
// Nobody waits for this answer any more (it may still come).
struct CancelResolve {
  ResolveId resolve;
};
// Compile one slice of one leg on this side. Sender: needs from the PULL, offer and blocks from the
// Send. Receiver: needs and blocks from the Receive, offer from the SLICE.
struct Compile {
  CompileId compile;
  Role side = Role::kSender;
  std::shared_ptr<const LegContext> context;
  std::shared_ptr<const SendOp> send;        // sender only
  std::shared_ptr<const ReceiveOp> receive;  // receiver only
  std::shared_ptr<const MsgPull> pull;       // sender only: the receiver's needs
  std::vector<GroupRanges> offer;
  std::optional<Range> layers;
};

// Copies the cells of a slice from its pages to memory of their own, of `send->packed_bytes` bytes.
// Answered by Packed.
struct MakePacked {
  CopyId copy;
  std::shared_ptr<const SendOp> send;
};

// An arena of a link's peer that this daemon has mapped (event ArenaMapped).
struct PeerArena {
  LinkId link;
  uint32_t arena = 0;  // the peer's number
  bool operator==(const PeerArena&) const = default;
};
// stream[offset, offset + bytes) of the plan from pages into the region, computing `check_kind`,
// under the link's key and the number of the copy where it is a keyed one.
struct Gather {
  CopyId copy;
  std::shared_ptr<const Plan> plan;
  uint64_t offset = 0;
  uint64_t bytes = 0;
  memory::Region region;
  LinkId link;
  CheckKind check_kind = CheckKind::kNone;
  // The region is the peer's: in this arena, segment and offset as the peer said. The executor
  // fails the copy, with nothing written, unless the region lies in what it has mapped. No such
  // Gather begins after its link's end, but one that runs goes on, and its CopyEnded must not come
  // before its last write: that is what the peer is told.
  std::optional<PeerArena> mapped;
};
// ... and back, after the bytes in the region have been compared with `check`.
struct Scatter {
  CopyId copy;
  std::shared_ptr<const Plan> plan;
  uint64_t offset = 0;
  uint64_t bytes = 0;
  memory::Region region;
  LinkId link;  // whose peer made the check
  Check check;
};
// Writes zeros to the plan's tail: the cells at or past the prompt's end of the blocks that its
// stream has written, all of it. Answered by CopyEnded.
struct ClearTail {
  CopyId copy;
  std::shared_ptr<const Plan> plan;
};

// Compile a copy between two layouts of this daemon: the cells that `needs` names of the
// destination's groups, all of which the source must hold. Answered by CopyCompiled.
struct CompileCopy {
  CompileId compile;
  std::shared_ptr<const LayoutHandle> source;
  std::vector<GroupBlocks> source_blocks;
  std::shared_ptr<const LayoutHandle> destination;
  std::vector<GroupBlocks> destination_blocks;
  std::vector<GroupNeed> needs;
};
// stream[offset, offset + bytes) straight from the source's pages to the destination's, without the
// arena. Both plans are of one stream. Answered by CopyEnded.
struct LocalCopy {
  CopyId copy;
  std::shared_ptr<const Plan> source;
  std::shared_ptr<const Plan> destination;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

struct WatchCondition {
  ConditionId condition;
  WorkerId worker;
  ReadyCondition ready;
  std::shared_ptr<const LayoutHandle> layout;  // whose pages it is about
};
struct UnwatchCondition {
  ConditionId condition;
};

struct ConnectLane {  // make an endpoint to the peer's rail of this lane
  LaneRef lane;
};
struct ReopenLane {  // initiator only: agree on this new epoch with the peer
  LaneRef lane;
};
struct CloseLane {  // give the lane up: its requests end soon
  LaneRef lane;
};
struct TellLaneDown {  // by gRPC, as no lane is up
  LaneRef lane;
};
struct CloseLink {
  LinkId link;
  Reason reason = Reason::kPeerLost;
};
struct SendMessage {
  LaneRef lane;
  uint64_t sequence = 0;
  ControlMessage message;
};
struct SendRefuse {
  LaneRef lane;
  MsgRefuse message;
};
struct SendOffer {
  LaneRef lane;
  MsgOffer offer;
  memory::Region region;  // the first offer.bytes of it
};
struct AcceptOffer {
  LaneRef lane;
  DescriptorId descriptor;
  LandingId landing;
  memory::Region region;
  uint64_t bytes = 0;
};
struct DropOffer {
  LaneRef lane;
  DescriptorId descriptor;
};

// Answer to ReleaseQuarantine.
struct QuarantineReleased {
  uint64_t call = 0;
  uint32_t regions = 0;  // that are free now ...
  uint64_t bytes = 0;    // ... and their bytes
  uint32_t linked = 0;   // regions that were left: their peer's link is up
};

// For metrics and logs: one transfer's end on this side.
struct TransferEnded {
  Role role = Role::kSender;
  TransferState state = TransferState::kFailed;
  Reason reason = Reason::kNone;
  uint64_t bytes = 0;
  uint64_t chunks = 0;
  Duration total{};   // from the call
  Duration wait{};    // until the first byte could move
  Duration gather{};  // sums over chunks
  Duration wire{};    // sender: offer to ack; receiver: accept to landed
  Duration scatter{};
  std::string label;  // short hash of the transfer, role and rank; never the secret
};
// All transfers have ended after Drain.
struct Drained {};

using Command =
    std::variant<Reply, Publish, SetDoneWord, FreeSlot, LayoutQuiet, Resolve, ResolvePull,
                 CancelResolve, Compile, CompileCopy, MakePacked, Gather, Scatter, ClearTail,
                 LocalCopy, WatchCondition, UnwatchCondition, ConnectLane, ReopenLane, CloseLane,
                 TellLaneDown, CloseLink, SendMessage, SendRefuse, SendOffer, AcceptOffer,
                 DropOffer, QuarantineReleased, TransferEnded, Drained>;
using Commands = std::vector<Command>;

}  // namespace kvferry::engine
