// What is handed to and comes back from kvferry::client::Client. Plain data.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvferry/layout.h"
#include "kvferry/result.h"

namespace kvferry::client {

using std::chrono::milliseconds;
using Bytes16 = std::array<uint8_t, 16>;

enum class WorkerRole : uint8_t {
  kRank,        // has pools and layouts
  kController,  // a scheduler: joins, tickets, look-ups, claims, declines
};

struct AttachOptions {
  std::string socket = "/run/kvferry/kvferry.sock";  // the lifeline
  // The daemon's user, as this user namespace maps it. Without it the process that listens must be
  // the socket file's owner's, unless either is of a user that is not mapped here.
  std::optional<uint32_t> daemon_uid;
  std::string name;  // of this worker, unique in its tenant: [A-Za-z0-9][A-Za-z0-9._:+-]{0,62}
  WorkerRole role = WorkerRole::kRank;
  // After the daemon's end: attach again and register everything again, with back-off.
  bool reconnect = true;
  milliseconds attach_timeout{5000};
  milliseconds call_timeout{30000};  // of the calls that block
  // Operations that may wait to be sent; beyond either, RESOURCE_EXHAUSTED QUEUE_FULL.
  std::size_t queue_operations = 16384;
  std::size_t queue_bytes = std::size_t{64} << 20;
};

// A pool in memory that the client allocated. Lives as long as the client.
struct PoolMemory {
  std::byte* data = nullptr;
  uint64_t bytes = 0;
  int fd = -1;  // borrowed
};

// A pool in memory of a GPU that the client allocated. Lives as long as the client.
struct DevicePoolMemory {
  uint64_t address = 0;  // a device pointer
  uint64_t bytes = 0;
  int device = 0;
};

struct DevicePoolOptions {
  // 16 bytes of the pool, from this offset on, that nobody ever reads or writes: of an engine's
  // null block, say. Where the daemon wants a proof that the memory is the caller's, it is made
  // there, and so can be made again while the pool is in use. See Client::export_pool.
  std::optional<uint64_t> scratch_offset;
};

// What both sides of a hand-off agree on. Drawn by a scheduler or router, never by the daemon.
struct TransferKey {
  std::string instance;                // the sender's; receivers may leave it to the ticket
  std::optional<Bytes16> incarnation;  // absent: that of the layout (sender) or ticket (receiver)
  std::string id;                      // 1 to 64 bytes
  Bytes16 secret{};                    // never logged
};

// The caller's own registration.
struct LayoutRef {
  std::string instance;
  uint32_t rank = 0;
  bool operator==(const LayoutRef&) const = default;
};

// A transfer as this client names it; 0 is none. The same transfer has the same handle in all calls
// of its side.
using TransferHandle = uint64_t;

// When the pages may be read (sender) or written (receiver).
struct ReadyCondition {
  enum class Kind : uint8_t { kHostSynced, kTimeline, kCudaIpcEvent } kind = Kind::kHostSynced;
  uint32_t word = 0;  // kTimeline: ready when the word reaches `value`
  uint64_t value = 0;
  std::string event_handle;  // kCudaIpcEvent: 64 bytes

  static ReadyCondition timeline(uint32_t word, uint64_t value) {
    return {Kind::kTimeline, word, value, {}};
  }
  // `handle`: Client::export_event's, or cuIpcGetEventHandle's 64 bytes. The event must have been
  // recorded before the operation is called.
  static ReadyCondition cuda_event(std::string handle) {
    return {Kind::kCudaIpcEvent, 0, 0, std::move(handle)};
  }
};

// A word that the daemon sets when pages may be touched again, for waits on a GPU.
struct DoneWord {
  uint32_t word = 0;
  uint64_t value = 0;
};

struct TokenRange {
  uint64_t begin = 0;
  uint64_t end = 0;
};

// Block ids of one group. The ids are copied before the call returns.
struct GroupBlocks {
  uint32_t group = 0;        // index into the layout's groups
  uint64_t first_block = 0;  // the entry that ids[0] is
  std::span<const int32_t> ids;
  std::optional<TokenRange> tokens;  // send: where it differs from the slice's
  uint64_t cached_tokens = 0;        // receive: what this rank has already
};

// Hashes of a group's blocks: hash j names the prompt up to the end of block j. 1 to 32 bytes each.
struct PromptHashes {
  uint32_t group = 0;
  std::vector<std::string> hashes;
};

struct OpenSendRequest {
  TransferKey key;
  LayoutRef layout;
  milliseconds lease{0};     // 0: the daemon's default
  milliseconds deadline{0};  // 0: the daemon's default
  uint32_t max_receivers = 1;
};

struct SendRequest {
  TransferKey key;
  LayoutRef layout;
  uint32_t index = 0;       // the caller's count of slices: 0, 1, ...
  uint64_t num_tokens = 0;  // of the whole prompt
  TokenRange tokens;        // of this slice
  std::span<const GroupBlocks> groups;
  std::optional<std::pair<uint32_t, uint32_t>> layers;  // half-open; absent: all
  bool last = true;
  std::optional<std::string_view> aux;  // at most 64 KiB, on the last slice
  ReadyCondition ready;
  // kSourceReleased comes once the daemon has a copy, before anybody pulls. PACKED_MEMORY_FULL: no
  // room for it; the same send without it may follow.
  bool packed_copy = false;
  milliseconds lease{0};
  milliseconds deadline{0};
  uint32_t max_receivers = 1;
  std::optional<DoneWord> done;
};

struct ReceiveRequest {
  TransferKey key;
  LayoutRef layout;
  std::string ticket;
  std::optional<uint32_t> sender_dp_group;
  uint64_t num_tokens = 0;
  std::span<const GroupBlocks> groups;
  ReadyCondition ready;
  bool wait_for_arena = true;  // false: fail at once when the arena is full
  milliseconds wait{0};        // until the first slice
  milliseconds deadline{0};    // from the first slice
  std::optional<DoneWord> done;
  // Blocks that workers of this node have committed under these hashes are copied, and only the
  // rest is asked of the sender.
  std::span<const PromptHashes> prompt_hashes;
  uint64_t reuse_pin = 0;  // of lookup_reuse; it ends here
};

struct ClaimRequest {
  TransferKey key;
  LayoutRef layout;  // a controller's has none, and lasts its ttl from when it was said last
  std::string ticket;
  milliseconds ttl{0};
};

// Arena capacity for a receive to come, of the same key, layout and ticket.
struct ReserveRequest {
  TransferKey key;
  LayoutRef layout;
  std::string ticket;
  uint64_t bytes = 0;          // rounded up to whole chunks; 0: the streaming minimum
  bool wait_for_arena = true;  // false: kResourceExhausted if it cannot be promised now
  milliseconds lease{0};       // until the receive comes; 0: the daemon's default
};

// What a receiver needs of an open send's rank, by the sender's own groups. Ranges are rounded
// outward to whole blocks; a group that is not named is not needed.
struct GroupNeeds {
  uint32_t group = 0;
  std::vector<TokenRange> ranges;
};
struct ReceiverNeeds {
  std::string instance;
  Bytes16 incarnation{};
  uint32_t dp_group = 0;
  bool ready = false;  // all its ranks have come: nothing will be added
  std::vector<GroupNeeds> groups;
};

// Blocks of a completed receive, as found by others from now on.
struct GroupCommit {
  uint32_t group = 0;
  uint64_t tokens = 0;              // of the group's list that are valid
  std::vector<std::string> hashes;  // hash j belongs to entry j of the list
};

struct ReuseMatch {
  uint32_t group = 0;
  uint64_t tokens = 0;  // of the prompt's beginning
};
struct ReuseLookup {
  std::vector<ReuseMatch> groups;
  uint64_t pin = 0;  // for one receive; 0: nothing was pinned
};

struct LayoutRegistration {
  std::string instance;
  Layout layout;
  std::optional<Bytes16> incarnation;   // absent only if all ranks are on this node
  std::optional<Bytes16> instance_key;  // absent only if all ranks are of one uid on this node
  std::optional<Bytes16> reuse_key;
  std::string reuse_hash_scheme;
};

struct RegisteredLayout {
  std::string card;  // for join_instance()
  uint64_t generation = 0;
  Bytes16 incarnation{};
  bool complete = false;  // all ranks are on this node: no join is needed
  bool existing = false;
};

struct JoinedInstance {
  Bytes16 incarnation{};
  bool complete = false;
  std::vector<uint32_t> missing_ranks;
  bool existing = false;  // the same cards were joined before
};

struct Resolution {
  bool reachable = false;
  bool compatible = false;
  Error problem;  // meaningful if either is false
  std::string transport;
  std::string instance;
  Bytes16 incarnation{};
  uint32_t rank_count = 0;
};

enum class TransferState : uint8_t {
  kNone = 0,       // nothing is known yet
  kOpen = 1,       // accepted
  kActive = 2,     // the counterpart is known
  kDelivered = 3,  // sender: every byte was scattered
  kCompleted = 4,  // receiver: pages and aux may be read
  kFailed = 5,
  kCancelled = 6,
};
KVFERRY_API std::string_view name_of(TransferState state);
inline bool is_terminal(TransferState state) {
  return state >= TransferState::kDelivered;
}

enum class Side : uint8_t { kSender = 1, kReceiver = 2 };
enum class Delivery : uint8_t { kNone = 0, kNo = 1, kUnknown = 2, kDelivered = 3 };

enum class EventKind : uint8_t {
  kReceiverReady = 1,  // sender: a receiver has come
  kSliceReceived,      // receiver: `slices` of them have been scattered
  kCompleted,          // receiver: read pages and aux
  kSourceReleased,     // sender: free or overwrite the source pages
  kDestReleased,       // receiver: read, free or give away the destination pages
  kDelivered,          // sender: the end, well
  kFailed,             // either side: the end; memory still follows the RELEASED events
  kCancelled,          // the same
  // An operation was refused, or (no transfer) a decline or attaching again: `error` says why.
  // Nothing was started by it.
  kRejected,
  kDraining,         // the daemon takes no new transfers (no transfer)
  kDaemonRestarted,  // the daemon has ended (no transfer); open ones have failed
  kReattached,       // attached to a daemon again and registered (no transfer)
};
KVFERRY_API std::string_view name_of(EventKind kind);

struct Event {
  EventKind kind = EventKind::kReceiverReady;
  TransferHandle transfer = 0;
  Side side = Side::kSender;
  TransferState state = TransferState::kNone;
  std::string_view reason;  // static text, such as "EXPIRED"; "NONE" if all is well
  uint64_t slices = 0;
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;  // 0 while unknown
  Delivery delivery = Delivery::kNone;
  std::optional<Error> error;  // kRejected; kReattached: a registration that failed
};

struct TransferStatus {
  TransferState state = TransferState::kNone;
  Side side = Side::kSender;
  std::string_view reason;
  std::string_view released_reason;
  bool released = false;
  bool aux_ready = false;
  bool memory_in_use = false;
  Delivery delivery = Delivery::kNone;
  uint64_t slices = 0;
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;
};

struct CancelResult {
  TransferState state = TransferState::kNone;
  bool memory_in_use = false;
  std::string reason;
};

struct ClientStats {
  uint64_t operations_sent = 0;
  uint64_t operations_accepted = 0;
  uint64_t operations_rejected = 0;
  uint64_t operations_queued = 0;  // waiting to be sent or answered now
  uint64_t events = 0;
  uint64_t ring_overflows = 0;  // times the whole table had to be looked at
  uint64_t reconnects = 0;
  uint64_t open_transfers = 0;
};

}  // namespace kvferry::client
