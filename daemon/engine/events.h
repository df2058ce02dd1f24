// Everything that can happen to the engine. Plain data, so that a run can be recorded and replayed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/reason.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/engine/messages.h"
#include "daemon/engine/ports.h"
#include "daemon/mapping/layout.h"

namespace kvferry::engine {

using mapping::GroupBlocks;

// ---- calls of workers -------------------------------------------------------------------------

// Names a call for its answer (command Reply).
struct OpRef {
  WorkerId worker;
  uint64_t op_id = 0;  // the worker's number, unique among its calls in flight
};

// A transfer as a worker names it.
struct TransferKey {
  std::string instance;     // the sender's, "tenant/name"
  Incarnation incarnation;  // the sender's; resolved from the layout or ticket before the engine
  std::string id;           // 1 to 64 bytes
  Secret secret;
  bool operator==(const TransferKey&) const = default;
};

struct ReadyCondition {
  enum class Kind : uint8_t { kHostSynced, kTimeline, kCudaEvent } kind = Kind::kHostSynced;
  uint32_t word = 0;  // kTimeline: ready when the worker's word reaches value
  uint64_t value = 0;
  std::array<uint8_t, 64> event{};  // kCudaEvent: the event's IPC handle
  bool operator==(const ReadyCondition&) const = default;
};

// A word of the worker's that is set when the transfer is COMPLETED (receiver) or its source is
// released (sender).
struct DoneWord {
  uint32_t word = 0;
  uint64_t value = 0;
  bool operator==(const DoneWord&) const = default;
};

// OpenSend: announces a transfer before its blocks are known.
struct OpenSendOp {
  OpRef op;
  uint64_t client_handle = 0;  // the client's own number, shown in its status slot
  TransferKey key;
  std::shared_ptr<const LayoutHandle> layout;
  Duration lease{};
  Duration deadline{};  // from the first activity
  uint32_t max_receivers = 1;
};

// Send: one slice. Ranges are rounded, their holes taken out, checked against the layout already.
struct SendOp {
  OpRef op;
  uint64_t client_handle = 0;
  TransferKey key;
  std::shared_ptr<const LayoutHandle> layout;
  uint32_t send_index = 0;  // the caller's 0, 1, ...
  uint64_t num_tokens = 0;  // of the whole prompt
  std::vector<GroupRanges> offer;
  std::vector<GroupBlocks> blocks;
  std::optional<Range> layers;
  bool last = false;
  std::optional<std::string> aux;
  ReadyCondition ready;
  Duration lease{};
  Duration deadline{};
  uint32_t max_receivers = 1;
  std::optional<DoneWord> done;  // the transfer's: all its Sends that name one name the same
  // A packed copy of the slice is asked for, and takes so many bytes (0: it has no cell here).
  std::optional<uint64_t> packed_bytes;
};

// Hash j names the prompt up to the end of the group's block j.
struct PromptHashes {
  uint32_t group = 0;
  std::vector<std::string> hashes;
  bool operator==(const PromptHashes&) const = default;
};

struct ReceiveOp {
  OpRef op;
  uint64_t client_handle = 0;
  TransferKey key;  // instance and incarnation as the ticket names them
  std::string ticket;
  std::optional<uint32_t> sender_dp_group;  // absent: unknown
  std::shared_ptr<const LayoutHandle> layout;
  std::vector<GroupNeed> needs;
  std::vector<GroupBlocks> blocks;
  uint64_t num_tokens = 0;
  ReadyCondition ready;              // the destination's
  bool wait_for_arena = true;        // false: RESOURCE_EXHAUSTED when there is no room now
  Duration wait{};                   // until the first slice
  Duration deadline{};               // from the first slice
  std::vector<PromptHashes> hashes;  // blocks that the node has already are copied
  uint64_t reuse_pin = 0;            // of an earlier LookupReuse; 0: none
  std::optional<DoneWord> done;
};

// The transfers a worker names in the calls below are its own, by the handle it gave.
struct CancelOp {
  OpRef op;
  uint64_t client_handle = 0;
};
// The caller has seen the end: its slot is freed, the id stays dead.
struct CloseOp {
  OpRef op;
  uint64_t client_handle = 0;
};
// Slices with a token at or past `from_token` that are not wholly gathered are dropped.
struct RevokeOp {
  OpRef op;
  uint64_t client_handle = 0;
  uint64_t from_token = 0;
};
// What the receivers that have come need of this send. Answered at once.
struct ReceiverNeedsOp {
  OpRef op;
  uint64_t client_handle = 0;
};
struct ClaimOp {
  OpRef op;
  uint64_t client_handle = 0;
  TransferKey key;
  std::string ticket;
  std::shared_ptr<const LayoutHandle> layout;
  Duration ttl{};
};
struct DeclineOp {
  OpRef op;
  TransferKey key;
  std::string ticket;
  std::shared_ptr<const LayoutHandle> layout;
};

// Room in the arena for a Receive to come, the whole transfer's or at least what keeps it moving.
// Answered when it is promised; idempotent by the transfer.
struct ReserveOp {
  OpRef op;
  TransferKey key;
  std::shared_ptr<const LayoutHandle> layout;  // the receiver's
  uint64_t bytes = 0;                          // 0: the streaming minimum, one frame
  bool may_wait = true;  // false: RESOURCE_EXHAUSTED when it cannot be promised now
  Duration lease{};      // until its Receive
};

// Publishes blocks of a COMPLETED receive. Hash j belongs to entry j of the group's block list.
struct CommitReuseOp {
  struct Group {
    uint32_t group = 0;
    uint64_t tokens = 0;
    std::vector<std::string> hashes;
    bool operator==(const Group&) const = default;
  };
  OpRef op;
  uint64_t client_handle = 0;
  std::vector<Group> groups;
};
struct LookupReuseOp {
  OpRef op;
  std::shared_ptr<const LayoutHandle> layout;
  std::vector<PromptHashes> hashes;
  Duration pin{};  // how long what was found stays; 0: nothing is pinned
};
// Answered when nobody reads those blocks any more.
struct WithdrawReuseOp {
  OpRef op;
  std::shared_ptr<const LayoutHandle> layout;
  std::vector<GroupBlocks> groups;
};

// What all workers of a socket may have together: SOCKET_LIMIT.
struct SocketLimits {
  uint32_t transfers = UINT32_MAX;  // open ones
  uint32_t claims = UINT32_MAX;     // and declines that are remembered
  uint32_t reservations = UINT32_MAX;
};
struct WorkerAttached {
  WorkerId worker;
  std::string tenant;
  uint32_t slots = 0;  // of its status table
  uint32_t socket = 0;
  SocketLimits socket_limits{};
};
// Its lifeline closed or its process ended.
struct WorkerGone {
  WorkerId worker;
};
// The layout is taken back: its open transfers fail with `reason`; LayoutQuiet answers.
struct UnregisterLayout {
  std::shared_ptr<const LayoutHandle> layout;
  Reason reason = Reason::kUnregistered;
};

// ---- answers of the directory and the compilers -----------------------------------------------

struct ReceiverLeg {
  uint32_t sender_rank = 0;
  uint32_t sender_dp_group = 0;
  std::string node;             // the sender rank's node
  bool empty = false;           // no cell, by holdings
  bool carries_aux = false;     // this leg's last slice brings the aux to this rank
  uint64_t expected_bytes = 0;  // what all slices together must bring
  std::shared_ptr<const LegContext> context;
};
// Answer to Resolve: the legs of every sender dp group in question. Links to all their nodes are up
// (their LinkUp came before).
struct Resolved {
  ResolveId resolve;
  Reason reason = Reason::kNone;  // else the receive fails with it
  std::string message;
  Incarnation sender_incarnation;
  Digest16 cards;
  std::vector<ReceiverLeg> legs;
};

struct SenderLeg {
  uint32_t receiver_rank = 0;
  bool empty = false;
  bool carries_aux = false;
};
// Answer to ResolvePull: all legs of this sender rank to the receiver's dp group, by holdings.
struct PullResolved {
  ResolveId resolve;
  Reason reason = Reason::kNone;  // kStaleCards, kIncompatible, ...: the pull is answered END
  uint32_t receiver_dp_group = 0;
  std::vector<SenderLeg> legs;
  std::shared_ptr<const LegContext> context;  // of the leg that the pull names
  std::vector<GroupRanges> needs;             // what that leg takes of the sender's groups
  // What all slices together must bring that leg; absent: whatever they bring is enough.
  std::optional<uint64_t> expected_bytes = {};
};

struct Compiled {
  CompileId compile;
  Reason reason = Reason::kNone;  // else plan is empty
  std::string message;
  std::shared_ptr<const Plan> plan;
};

// Answer to CompileCopy.
struct CopyCompiled {
  CompileId compile;
  Reason reason = Reason::kNone;  // else there are no plans
  std::string message;
  std::shared_ptr<const Plan> source;
  std::shared_ptr<const Plan> destination;
};

// Answer to MakePacked, once no more is read: the copy as a layout, and the slice's blocks in it.
// Its memory lasts as long as somebody holds the layout, or a plan made from it.
struct Packed {
  CopyId copy;
  Reason reason = Reason::kNone;  // else there is no layout
  std::string message;
  std::shared_ptr<const LayoutHandle> layout;
  std::vector<GroupBlocks> blocks;
};

enum class CopyOutcome : uint8_t { kOk, kFailed, kCheckMismatch };
struct CopyEnded {
  CopyId copy;
  CopyOutcome outcome = CopyOutcome::kOk;
  Check check;  // gather: of the bytes gathered
};
struct ConditionMet {
  ConditionId condition;
};
// It can never be met, e.g. because its event cannot be opened.
struct ConditionFailed {
  ConditionId condition;
};

// ---- links and rails --------------------------------------------------------------------------

struct LinkUp {
  LinkId link;
  std::string node;        // the peer's identity
  BootId boot;             // the peer's
  bool initiator = false;  // this side dialled: it reopens lanes
  uint32_t lanes = 1;
  uint64_t chunk_bytes = 0;   // the smaller of both sides
  uint32_t max_credits = 64;  // LIVE credits of a pull, the smaller of both sides
  CheckKind check = CheckKind::kNone;
};
// The peer node has shaken hands with a new boot id, or its link was refused or closed outside.
struct LinkEnded {
  LinkId link;
  Reason reason = Reason::kPeerLost;
};
struct LaneConnected {  // the rails process has an endpoint for it
  LaneRef lane;
};
// The rails process reports an error of the lane, or a message for it could not be handed over.
struct LaneFailed {
  LaneRef lane;
};
// Both sides have agreed to try this lane again under a new epoch.
struct LaneReopened {
  LaneRef lane;
};
struct LaneReopenFailed {
  LaneRef lane;
};
// The peer says by gRPC that it has given up this lane (no other lane was up).
struct PeerLaneDown {
  LaneRef lane;
};
// A message whose tag was right.
struct MessageIn {
  LaneRef lane;
  uint64_t sequence = 0;
  ControlMessage message;
};
struct RefuseIn {
  LaneRef lane;
  MsgRefuse message;
};
struct OfferIn {
  LaneRef lane;
  MsgOffer offer;
  DescriptorId descriptor;       // kept by the rails process until accepted or dropped
  uint64_t announced_bytes = 0;  // the length that UCX announced
};
// A posted receive's request ended: nobody writes its region any more.
struct ReceiveEnded {
  LandingId landing;
  bool ok = false;
};
// An offer's send request ended: nobody reads its staging region any more. Says nothing of
// delivery.
struct OfferSendEnded {
  OfferId offer;
};
// This daemon has mapped arena number `arena` of the link's peer: gathers here can write all its
// segments. Never taken back while the link is up. Each mapping is told once for each link.
struct ArenaMapped {
  LinkId link;
  uint32_t arena = 0;  // the peer's number
};
// This daemon has handed out what it takes to map its arena number `arena` to the link's peer, who
// may say MAPPED of it from now on.
struct ArenaLent {
  LinkId link;
  uint32_t arena = 0;
};
// That life of a node's daemon has ended, seen on its process itself (same host): nothing of it
// writes any more, its copies have ended with it. Evidence for every region that was lent to it;
// also ends its link.
struct PeerProcessGone {
  BootId boot;
  std::string node;
};
// The peer has unmapped all arenas of that (ended) link: nothing of it writes any more. Evidence
// for every region that was lent over the link.
struct PeerUnmapped {
  LinkId link;
};
// An operator vouches for the same, of peers on other hosts: regions lent to this node, or to this
// life of it alone. What the peer of a link that is up may write is never released by this.
// Answered by QuarantineReleased.
struct ReleaseQuarantine {
  uint64_t call = 0;  // for the answer
  std::string node;   // empty: nobody
  std::optional<BootId> boot;
};
struct RailsUp {};
// The rails process is gone: every request it had has ended, all lanes are down.
struct RailsDied {};

// Stop admission; transfers under way go on until the drain limit, then fail with kShutdown.
struct Drain {
  Time limit;
};

using Event =
    std::variant<OpenSendOp, SendOp, ReceiveOp, CancelOp, CloseOp, RevokeOp, ReceiverNeedsOp,
                 ClaimOp, DeclineOp, ReserveOp, CommitReuseOp, LookupReuseOp, WithdrawReuseOp,
                 WorkerAttached, WorkerGone, UnregisterLayout, Resolved, PullResolved, Compiled,
                 CopyCompiled, Packed, CopyEnded, ConditionMet, ConditionFailed, LinkUp, LinkEnded,
                 LaneConnected, LaneFailed, LaneReopened, LaneReopenFailed, PeerLaneDown, MessageIn,
                 RefuseIn, OfferIn, ReceiveEnded, OfferSendEnded, ArenaMapped, ArenaLent,
                 PeerProcessGone, PeerUnmapped, ReleaseQuarantine, RailsUp, RailsDied, Drain>;

}  // namespace kvferry::engine
