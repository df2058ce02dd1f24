// The engine's records: links and lanes, sends and their legs, receives and their legs, regions and
// staging. Plain data; who changes what stands in lanes.h, sender.h and receiver.h.
//
// Records point to each other by number, never by address: a number that is gone is simply not
// found.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "daemon/engine/commands.h"
#include "daemon/engine/config.h"
#include "daemon/engine/coverage.h"
#include "daemon/engine/events.h"
#include "daemon/engine/fair_queue.h"
#include "daemon/engine/lane_flow.h"
#include "daemon/engine/messages.h"
#include "daemon/engine/reuse_types.h"
#include "daemon/engine/shares.h"
#include "daemon/engine/timeline.h"

namespace kvferry::engine {

// Bytes of a chunk of a stream: the last one may be short.
inline uint64_t chunk_size(uint64_t chunk_bytes, uint64_t stream_bytes, uint64_t chunk) {
  return std::min(chunk_bytes, stream_bytes - chunk * chunk_bytes);
}

// ---- links ------------------------------------------------------------------------------------

enum class LaneState : uint8_t {
  kDown,
  kConnecting,  // ConnectLane has been asked for
  kHello,       // connected, our HELLO is out
  kUp,
};

struct Lane {
  LaneState state = LaneState::kDown;
  uint32_t epoch = 0;
  uint32_t asked = 0;                       // the newest epoch that was proposed to the peer
  uint64_t next_out = 0;                    // number of the next control message
  uint64_t next_in = 0;                     // ... and of the one that is due from the peer
  std::map<uint64_t, ControlMessage> held;  // behind a gap
  std::vector<MessageIn> early;  // of the epoch `asked`, before the answer to its proposal
  bool hello_seen = false;       // the peer's HELLO came before we were connected
  Time heard;
  Duration backoff{};
  LaneFlow flow;  // of this epoch
};

// A PULL whose Send has not come.
struct ParkedPull {
  std::shared_ptr<const MsgPull> pull;
  std::vector<CreditGrant> credits;
  uint64_t order = 0;  // of arrival
  Time expires;
};

// A receiver rank whose proven pull was turned away before it had a place: if it does not come
// again, its END says so.
struct TurnedAway {
  uint32_t sender_rank = 0;
  std::string instance;
  Incarnation incarnation;
  uint32_t rank = 0;
};

// What this side, as sender, knows of one pull of the peer.
struct PeerPull {
  enum class Kind : uint8_t { kParked, kLeg, kEnded } kind = Kind::kEnded;
  uint64_t leg = 0;                    // kLeg
  std::unique_ptr<ParkedPull> parked;  // kParked
  TransferName name;                   // kEnded: goes into every END
  Outcome outcome = Outcome::kFailed;  // kEnded: our END
  Reason reason = Reason::kNone;
  std::unique_ptr<TurnedAway> turned_away;  // kEnded, the peer's END has not come
  bool drain_asked = false;                 // kEnded, mapped: the peer's END has come
};

// kLoopedLink has one too, without lanes: it never ends, and what is said on it comes straight back
// (Lanes::loop).
struct Link {
  LinkId id;
  std::string node;
  uint64_t peer = 0;  // the node's number here
  BootId boot;
  bool initiator = false;
  uint64_t chunk_bytes = 0;
  uint32_t max_credits = 64;
  CheckKind check = CheckKind::kNone;
  std::vector<Lane> lanes;
  std::optional<uint32_t> control;  // the lane that our control messages travel on
  bool had_control = false;
  bool resync_due = false;
  bool dying = false;  // no control lane is chosen any more
  LaneChoice choice;
  uint32_t protocol_errors = 0;
  uint64_t held_bytes = 0;  // of all lanes
  Time heard;

  // As sender.
  std::map<uint64_t, PeerPull> pulls;   // the peer's, by number
  uint64_t oldest = 0;                  // pulls below that are not in `pulls` are history
  std::map<uint64_t, uint64_t> parked;  // order of arrival -> pull
  uint32_t legs_out = 0;
  uint32_t ended_out = 0;     // tombstones
  std::set<uint32_t> mapped;  // the peer's arenas that gathers here can write
  // As receiver: own pulls that are not closed.
  std::set<uint64_t> own_pulls;
  uint64_t oldest_told = 0;     // what the peer may forget, as last told by a message
  std::set<uint32_t> lendable;  // own arenas that the peer has been given
  std::set<uint32_t> lent;      // ... and has mapped

  bool looped() const { return id == kLoopedLink; }
};

// One rank's part of a transfer: several instances on one daemon may receive the same one.
struct RankKey {
  TransferName transfer;
  std::string instance;     // the rank's
  Incarnation incarnation;  // ... and its life
  uint32_t rank = 0;
  auto operator<=>(const RankKey&) const = default;
};
inline RankKey sender_key(const TransferName& transfer, uint32_t rank) {
  return {transfer, transfer.instance, transfer.incarnation, rank};
}
inline RankKey rank_key(const TransferName& transfer, const LayoutHandle& layout) {
  return {transfer, layout.instance, layout.incarnation, layout.rank};
}

// ---- what both sides' transfers share ---------------------------------------------------------

struct Transfer {
  uint64_t id = 0;
  WorkerId worker;
  uint64_t tenant = 0;
  uint32_t socket = 0;   // by which its worker came
  bool attached = true;  // its worker lives: the slot is shown
  uint32_t slot = 0;
  TransferKey key;
  TransferName name;
  std::string hash;                // short_hash() of the name that the sender knows it by
  std::vector<std::string> nodes;  // of its legs, each once; empty: this daemon
  Timeline timeline;
  std::shared_ptr<const LayoutHandle> layout;
  TransferRecord record;
  std::optional<DoneWord> done;
  Time created;
  Time first_move;  // when its first region was taken
  bool moved = false;
  uint64_t chunks = 0;
  uint64_t fragments = 0;
  Duration gather{};
  Duration wire{};
  Duration scatter{};

  bool terminal() const {
    return record.state != TransferState::kOpen && record.state != TransferState::kActive;
  }
};

// ---- sender -----------------------------------------------------------------------------------

enum class TxState : uint8_t {
  kIdle,
  kGathering,
  kStaged,
  kOffered,
  kWritten,  // mapped: it lies in the peer's region, and WRITTEN is told until the ack
  kAcked,
};

struct TxChunk {
  TxState state = TxState::kIdle;
  bool offered_once = false;
  bool offered_again = false;  // so that an ack may answer an earlier offer
  bool refused = false;        // the newest one was: the peer knows that the chunk waits
  uint64_t staging = 0;
};

// One slice on one leg.
struct TxSlice {
  enum class State : uint8_t { kCompiling, kCompiled, kAnnounced } state = State::kCompiling;
  CompileId compile;
  // Of a slice that is wholly acknowledged, or dropped, only numbers are kept: no plan, no chunks.
  std::shared_ptr<const Plan> plan;
  std::vector<TxChunk> chunks;
  uint64_t bytes = 0;  // from compilation on; so `count`
  uint64_t count = 0;  // of its chunks
  uint64_t gathered = 0;
  uint64_t acked = 0;
  uint64_t stream = 0;  // as long as it is compiled and counts, unless nothing of it is staged
  bool empty_acked = false;
  bool dropped = false;
  bool packed = false;          // brings a packed copy: its gathers do not read the pages
  uint32_t arena = 0;           // where its chunks are staged
  uint64_t dropped_before = 0;  // ordinals from here on were announced after its DROP

  bool all_acked() const { return count == 0 ? empty_acked : acked == count; }
  void forget() {
    plan.reset();  // and with it a packed copy
    chunks = std::vector<TxChunk>();
  }
};

// An offer that nobody waits for any more, though it may not have arrived: its chunk's slice was
// dropped, or an earlier offer of the chunk has been acknowledged. If its lane goes down, its
// credit is usable again; else it would stay LIVE at the receiver and never be used.
struct StrayOffer {
  uint32_t lane = 0;
  uint32_t epoch = 0;
  CreditGrant credit;
};

// A chunk of a slice that was dropped after its gather into the peer's region had ended: its
// WRITTEN is told until the ack, or the region would stay with a credit that nobody uses.
struct DroppedWrite {
  CreditId credit;
  Check check;
};

struct TxLeg {
  uint64_t id = 0;
  LinkId link;
  std::optional<uint32_t> mapped;  // the peer's arena that its gathers write
  uint64_t send = 0;
  bool resolved = false;  // its receiver's place is known
  bool in_time = true;    // its PULL came before the lease was over
  ResolveId resolve;
  std::shared_ptr<const MsgPull> pull;
  std::shared_ptr<const LegContext> context;
  uint32_t dp_group = 0;  // the receiver's
  bool carries_aux = false;
  std::optional<uint64_t> expected_bytes;  // what all slices together must bring
  Proof proof;                             // of what we say
  std::map<uint64_t, TxSlice> slices;      // by ordinal
  uint64_t created = 0;                    // ordinals below have an entry or were dropped
  uint64_t acked_below = 0;                // the highest ordinal with an ack, plus 1
  uint64_t announced = 0;                  // ordinals below are announced or dropped
  uint64_t ungathered = 0;  // entries that count and are neither packed nor wholly gathered
  uint64_t unacked = 0;     // ... and not wholly acked
  std::pair<uint64_t, uint64_t> cursor{};          // next chunk to gather: slice, chunk
  std::set<std::pair<uint64_t, uint64_t>> staged;  // gathered, waiting for credit or lane
  // All its chunks that hold staging lie in one arena: it goes on in another when they are acked.
  uint32_t arena = 0;
  uint32_t holding = 0;  // chunks from gather to ack
  uint32_t gathering = 0;
  uint32_t ahead = 0;   // of those: without a credit in hand
  uint32_t passes = 0;  // passed over while others were served
  uint64_t peer = 0;
  // Credits in hand. The receiver withdraws silently, its oldest first: so the newest are used
  // first, and those that came back from a lost offer, which it may have spent, last.
  std::deque<CreditGrant> credits;
  std::deque<CreditGrant> returned;
  std::optional<CreditGrant> spent;  // the newest that was refused
  bool asking = false;               // an offer that names it is out
  uint64_t newest_credit = 0;        // that was told
  std::vector<StrayOffer> stray_offers;
  std::map<std::pair<uint64_t, uint64_t>, DroppedWrite> dropped_writes;  // by slice, chunk
  bool queued = false;  // in one of the queues for staging, or for gathers into peers' regions
  bool queued_ahead = false;
  FairKey turn;

  Holder holder() const { return {turn.tenant, turn.worker, peer}; }
};

// The stream of a slice on a leg, or on several if their plans read the same bytes in the same
// order, and their links cut and check them alike: then they have one plan, and what is gathered
// for one of them serves the others for as long as it is there. Lives as long as its slice counts
// on one of them and is not wholly acknowledged there.
struct TxStream {
  uint64_t send = 0;
  uint64_t slice = 0;  // ordinal
  uint64_t chunk_bytes = 0;
  CheckKind check = CheckKind::kNone;
  std::shared_ptr<const Plan> plan;
  std::set<uint64_t> legs;
  std::map<uint64_t, uint64_t> regions;  // chunk -> region that holds it, or is being filled
};

// Where a gather puts a chunk of a stream. It is freed when no staging is left that uses it.
struct StagingRegion {
  uint64_t id = 0;
  memory::Region region;  // none of a chunk that is lent, the peer's of a mapped leg's
  bool ours = false;      // in an arena here
  Holder holder;          // ours: whose gather took it; each user's peer holds it beside
  uint64_t send = 0;
  uint64_t slice = 0;
  uint64_t chunk = 0;
  uint64_t stream = 0;       // ours; perhaps no more
  bool packed = false;       // gathered from a packed copy
  bool gathering = true;     // lent: that copy runs
  Check check;               // once gathered
  Time since;                // the gather began
  std::set<uint64_t> users;  // stagings
};

// A chunk of a leg on its way out. Lives on after its leg until nobody reads its region, which
// other legs' chunks may use too. A chunk that is lent to a receiver on this daemon has none: it is
// copied from page to page. That of a mapped leg is the peer's, and the record lives until the ack,
// or until the gather ends.
struct Staging {
  uint64_t id = 0;
  uint64_t region = 0;  // StagingRegion
  uint64_t leg = 0;
  uint64_t send = 0;
  LinkId link;
  uint64_t slice = 0;
  uint64_t chunk = 0;
  uint64_t bytes = 0;
  bool lent = false;
  bool mapped = false;
  PullId pull;                   // mapped
  uint64_t peer = 0;             // the receiver's node; holds the region, if it is here
  bool wanted = true;            // the chunk is not ACKED, dropped or of an ended leg
  uint32_t sends = 0;            // UCX sends that have not ended
  OfferId offer;                 // the newest
  bool offered = false;          // ... is out and neither refused nor lost
  bool newest_send_out = false;  // ... and its UCX send has not ended
  bool on_lane = false;          // its bytes count as being in flight there
  uint32_t lane = 0;
  uint64_t lane_chunk = 0;  // on_lane: its number in the lane's flow
  uint32_t epoch = 0;
  CreditGrant credit;
  bool asks = false;  // the newest offer names a spent credit, to be refused
  Time since;         // the newest offer, or what stands for it, went out
};

// The packed copy of a slice.
struct PackedCopy {
  enum class State : uint8_t {
    kNone,     // not asked for, or gone
    kAwaited,  // asked for: the slice's condition does not hold yet
    kMaking,
    kMade,
  } state = State::kNone;
  uint64_t bytes = 0;                    // taken of the limit
  uint32_t gathers = 0;                  // running ones read it
  CopyId copy;                           // kMaking
  std::shared_ptr<const SendOp> source;  // kMade: the Send as if it had been made from the copy
};

struct SendSlice {
  std::shared_ptr<const SendOp> op;
  bool ready = false;
  bool dropped = false;
  bool gone = false;  // rounds to nothing, not the last: never goes out
  uint64_t ordinal = 0;
  ConditionId condition;
  PackedCopy packed;
  std::vector<uint64_t> streams = {};  // of all legs
};

struct ReceiverKey {
  std::string instance;
  Incarnation incarnation;
  bool group_known = true;  // false: a DECLINE came first, only its rank is known
  uint32_t dp_group = 0;
  auto operator<=>(const ReceiverKey&) const = default;
};

enum class LegFate : uint8_t { kExpected, kOpen, kDelivered, kReleased, kFailed };

// One receiver's place at a send.
struct Place {
  struct Leg {
    LegFate fate = LegFate::kExpected;
    uint64_t leg = 0;
  };
  std::map<uint32_t, Leg> legs;    // by receiver rank, all that exist by holdings
  std::vector<GroupRanges> needs;  // of all legs that have come, by this rank's groups
  bool failed = false;
  Reason reason = Reason::kNone;
};

// A Revoke that waits for running gathers.
struct PendingRevoke {
  OpRef op;
  std::vector<uint32_t> sends;
  std::set<uint64_t> ordinals;
};

struct Send : Transfer {
  uint32_t max_receivers = 1;
  std::optional<std::pair<Duration, Duration>> opened;  // lease and deadline of its OpenSend
  Duration deadline{};
  Time lease_end;
  Time first_claim;
  bool claimed = false;
  bool lease_over = false;
  bool started = false;              // the transfer timer runs
  std::vector<SendSlice> sends;      // by send index
  std::vector<uint32_t> by_ordinal;  // ordinal -> send index
  std::optional<uint64_t> last;      // ordinal of the last slice
  // Slices that have ranges and are not dropped: where the last of them ends, ordinal.
  std::set<std::pair<uint64_t, uint64_t>> by_end;
  std::map<ReceiverKey, Place> places;
  std::set<uint64_t> legs;  // live ones
  std::set<std::pair<std::string, std::pair<Incarnation, uint32_t>>> declined;
  uint32_t gathers = 0;     // running ones, and packed copies being made ...
  uint32_t reads = 0;       // ... of which these read the pages
  uint32_t paged = 0;       // slices that count, offer something and are not packed
  uint32_t packed = 0;      // ... that are ...
  uint32_t unpacked = 0;    // ... and whose copy has not been made
  bool all_offered = true;  // no leg ended with a chunk that was never offered
  std::vector<PendingRevoke> revokes;
};

// ---- receiver ---------------------------------------------------------------------------------

enum class RxState : uint8_t { kNeeded, kLanding, kLanded, kScattering, kDone };

struct RxSlice {
  enum class State : uint8_t { kCompiling, kCounts, kDropped } state = State::kCompiling;
  CompileId compile;
  std::vector<GroupRanges> ranges;  // as its SLICE said; none once it is dropped
  std::optional<Range> layers;
  uint64_t digest = 0;
  // Of a slice that is wholly done only numbers are kept: no plan, no chunks.
  std::shared_ptr<const Plan> plan;
  uint64_t bytes = 0;
  std::vector<RxState> chunks;
  uint64_t count = 0;  // of its chunks, from compilation on
  uint64_t done = 0;
  uint64_t begun = 0;  // local: chunks below are copied or being copied

  bool all_done() const { return state == State::kCounts && done == count; }
  RxState chunk_state(uint64_t chunk) const { return all_done() ? RxState::kDone : chunks[chunk]; }
  void forget() {
    plan.reset();
    chunks = std::vector<RxState>();
  }
};

struct HeldOffer {
  MsgOffer offer;
  LaneRef lane;
  DescriptorId descriptor;
  uint64_t announced_bytes = 0;
};

enum class RxLegState : uint8_t {
  kUnsent,  // its first PULL goes out with the next flush
  kOpen,
  kReleased,  // another dp group has the transfer
  kEnded,     // our side is terminal; waits for the peer's END, or DRAINED
};

struct RxLeg {
  uint64_t pull = 0;
  LinkId link;
  uint64_t receive = 0;
  uint32_t sender_rank = 0;
  uint32_t dp_group = 0;  // the sender's
  uint32_t arena = 0;     // where it lands
  bool local = false;     // its sender is on this daemon
  bool mapped = false;    // its sender writes its regions, which are in a mapped arena
  bool reserved = false;  // its receive has a reservation, of whose promise it may take
  BootId boot;            // mapped: the sender's daemon, ...
  std::string node;       // ... which may write them beyond the link's life, ...
  LinkId lent_over;       // ... by what it has mapped for this one
  uint64_t lent = 0;      // mapped: QUARANTINED regions
  bool empty = false;
  bool carries_aux = false;
  bool any_dropped = false;  // a slice of it was
  uint64_t expected_bytes = 0;
  uint64_t credit_bytes = 0;  // size of its credits
  std::shared_ptr<const LegContext> context;
  RxLegState state = RxLegState::kUnsent;
  bool peer_ended = false;
  bool heard = false;                // a SLICE has come
  std::shared_ptr<MsgPull> message;  // its PULL without credits
  TransferName name;
  Outcome outcome = Outcome::kFailed;  // of our END
  Reason reason = Reason::kNone;
  SendRef send;          // bound by the first SLICE
  Proof expected_proof;  // of that send
  std::map<uint64_t, RxSlice> slices;
  Coverage coverage;
  std::optional<uint64_t> last;
  bool with_aux = false;           // `last` says so
  std::optional<std::string> aux;  // ... and brought it
  uint64_t compiling = 0;
  uint64_t known_bytes = 0;  // of slices that count
  uint64_t known_chunks = 0;
  uint64_t done_chunks = 0;
  uint64_t next_credit = 1;
  std::map<uint64_t, uint64_t> credits;  // LIVE: number -> region
  uint64_t regions_held = 0;             // QUARANTINED not counted
  std::map<uint64_t, HeldOffer> held;    // by order of arrival
  // By credit, all LIVE: of slices that are being compiled.
  std::map<uint64_t, MsgWritten> held_writes;
  // Chunks that wait, staged, for another credit than the one that was refused; also of slices that
  // are not compiled yet.
  std::set<std::pair<uint64_t, uint64_t>> refused;
  std::vector<CreditGrant> new_credits;  // for the next UPDATE
  std::vector<Ack> new_acks;
  uint32_t dropped_scatters = 0;  // running scatters of dropped slices
  uint32_t passes = 0;
  std::set<uint64_t> to_copy;  // local: slices with chunks that are not begun
  bool queued = false;
  bool queued_idle = false;
  bool queued_needy = false;  // too, with those who lack credits for refused chunks
  uint64_t peer = 0;
  FairKey turn;

  Holder holder() const { return {turn.tenant, turn.worker, peer}; }
};

enum class RegionState : uint8_t { kGranted, kLanding, kLanded, kScattering, kQuarantined };

// A landing region from grant to release. Its number is the landing's. A chunk of a local leg has
// one without a byte of the arena, SCATTERING all its life. One of a mapped leg goes from GRANTED
// to LANDED, and what the peer may still write is QUARANTINED until there is evidence that it does
// not.
struct RxRegion {
  uint64_t id = 0;
  memory::Region region;
  RegionState state = RegionState::kGranted;
  LinkId link;
  Holder holder;  // its worker until it is quarantined, its peer until it is free
  uint64_t leg = 0;
  uint64_t receive = 0;
  uint64_t credit = 0;
  uint64_t slice = 0;
  uint64_t chunk = 0;
  uint64_t bytes = 0;
  uint32_t lane = 0;
  uint32_t epoch = 0;
  Check check;
  Time since;
  bool of_dropped = false;  // SCATTERING, its slice has been dropped since
  bool clearing = false;    // SCATTERING: the bytes are written, the slice's tail is being cleared
  bool local = false;
  bool mapped = false;  // the sender's gather writes it: no receive is ever posted
  uint64_t loan = 0;    // local: what the sender lends, until the copy has ended
};

struct Receive : Transfer {
  std::shared_ptr<const ReceiveOp> asked;  // as the worker called
  std::shared_ptr<const ReceiveOp> op;     // without what the node's own blocks bring
  ResolveId resolve;
  uint32_t resolves = 0;
  Incarnation sender_incarnation;
  Duration deadline{};
  Time must_end;              // when our timers end it at the latest
  std::set<uint64_t> legs;    // pulls that are not ended
  std::set<uint32_t> groups;  // sender dp groups still in question
  bool decided = false;       // one group is left
  bool first_slice = false;
  ConditionId condition;
  bool signalled = false;     // the worker's condition holds
  bool ready = false;         // ... and nobody reads the blocks that are written
  std::set<uint64_t> landed;  // regions that wait for their scatter
  uint32_t scatters = 0;
  bool granted_any = false;
  uint64_t reservation = 0;  // 0: none

  // Reuse of the node's blocks.
  std::map<uint64_t, ReuseCopy> copies;  // that are not done
  uint32_t copying = 0;                  // chunks of them under way
  std::vector<BlockPlace> writes;        // places that are written until its end
  std::set<BlockPlace> read_by_others;   // ... of which these are still read
  std::shared_ptr<const CommitReuseOp> committed;

  bool writing() const { return scatters + copying > 0; }
};

}  // namespace kvferry::engine
