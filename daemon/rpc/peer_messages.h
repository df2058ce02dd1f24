// What two daemons say to each other by gRPC, as plain structs, and their bytes. Messages that are
// signed or hashed are carried verbatim as the bytes that their maker wrote, so nothing depends on
// how somebody else would write them again. Pure functions; any thread; any input is safe to
// decode.
//
// No protobuf type appears here: this is what the node uses.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/reason.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/mapping/layout.h"

namespace kvferry::rpc {

inline constexpr uint32_t kPeerProtocolMin = 1;
inline constexpr uint32_t kPeerProtocolMax = 1;
inline constexpr uint32_t kMaxPeerRails = 16;
inline constexpr std::size_t kMaxRailAddressBytes = 16 * 1024;
inline constexpr std::size_t kMaxCardBytes = 64 * 1024;
inline constexpr std::size_t kMaxNodeBytes = 255;
inline constexpr std::size_t kMaxAddressBytes = 255;
inline constexpr std::size_t kMaxLentArenas = 64;
inline constexpr std::size_t kMaxLentSegments = 64;  // of an arena

using Random32 = std::array<uint8_t, 32>;
using LinkName = std::array<uint8_t, 16>;
using Tag16 = std::array<uint8_t, 16>;

struct PeerRail {
  std::string transport;         // "tcp", "shm"
  std::string device;            // "lo", "eth0"; may be empty
  std::vector<uint8_t> address;  // UCX worker address
  bool operator==(const PeerRail&) const = default;
};

// One side's part of a handshake.
struct PeerHello {
  uint32_t protocol_min = kPeerProtocolMin;
  uint32_t protocol_max = kPeerProtocolMax;
  std::vector<std::string> features;  // names; unknown ones are ignored
  std::string node;                   // identity
  BootId boot;
  std::string address;      // host:port where this side takes handshakes; a hint
  std::string ucx_version;  // "1.13.1"
  Random32 random{};
  Random32 challenge{};  // request: what Challenge gave; reply: zero
  uint64_t chunk_bytes = 0;
  uint32_t max_credits = 0;
  std::vector<uint32_t> checks;  // kinds (engine::CheckKind) this side can do
  uint32_t check = 0;            // the one it wants
  uint32_t min_check = 0;        // the weakest it takes
  std::vector<PeerRail> rails;
  uint64_t renew_ms = 0;  // how old a link's keys may become; 0: as the other side wants
  LinkName renews{};      // request: the link that it renews; zero: none, and always in the reply
  bool operator==(const PeerHello&) const = default;
};

struct SignedHello {
  std::string bytes;  // encode_hello()
  Tag16 tag{};        // proves the cluster secret
};

// Calls about a link that is up. Each is tagged under that link's keys.
enum class LinkMethod : uint8_t {
  kGetCards = 1,
  kReopenLane = 2,
  kLaneDown = 3,
  kCloseLink = 4,
  kJoinForward = 5,
  kGetArenas = 6,
  kGetTrace = 7,
};
std::string_view name_of(LinkMethod method);

struct LinkCall {
  LinkName link{};
  uint64_t number = 0;  // one's own for each call
  std::string body;
  Tag16 tag{};
};
struct LinkReply {
  std::string body;
  Tag16 tag{};
};

// What a rank's registration says of it to peers.
struct RankCard {
  std::string node;      // who made it
  std::string address;   // where that daemon takes handshakes; a hint
  std::string instance;  // "tenant/name"
  Incarnation incarnation;
  uint64_t generation = 0;
  mapping::Holding holding;  // rank, rank count, dp group and fingerprint too
};
struct SignedCard {
  std::string card;  // encode_card()
  std::string tag;   // 16 bytes under the instance key; empty where the instance has none
  bool operator==(const SignedCard&) const = default;
};

struct CardQuery {
  std::string instance;
  Incarnation incarnation;  // zero: the one in force (tickets by name)
  uint32_t first_rank = 0;  // answers come in pages of at most 1 MiB
  bool own_only = false;    // only cards that the asked daemon itself made
};
struct CardPage {
  Incarnation incarnation;
  uint32_t rank_count = 0;
  Digest16 set;                   // digest of all cards of the instance; zero with own_only
  std::vector<SignedCard> cards;  // ranks first_rank ... in order (own_only: ascending)
  bool more = false;
  uint32_t next_rank = 0;  // first_rank of the next page
};

struct ReopenLaneRequest {
  uint32_t lane = 0;
  uint32_t epoch = 0;
  std::string ucx_version;
  PeerRail rail;
};
struct ReopenLaneReply {
  PeerRail rail;
};
struct LaneDownNotice {
  uint32_t lane = 0;
  uint32_t epoch = 0;
};
struct CloseLinkNotice {
  Reason reason = Reason::kPeerLost;
};

struct NodeAddress {
  std::string node;
  std::string address;
  auto operator<=>(const NodeAddress&) const = default;
};
// "These nodes hold the ranks of your instance: collect their cards."
struct JoinForward {
  std::string instance;
  Incarnation incarnation;
  std::vector<NodeAddress> nodes;
};

// One life of a machine's kernel: processes that name the same one may share memory. Zero: unknown,
// which is nobody's.
using HostId = FixedBytes<struct HostTag, 16>;

// What a lender shows at its socket: that it is the peer of that link and no other daemon whose
// socket the peer has named. Both sides of a link derive it from the link's keys.
using WelcomeProof = FixedBytes<struct WelcomeProofTag, 16>;

// "What could I map of yours?"
struct ArenasQuery {
  HostId host;              // the asker's
  WelcomeProof proof = {};  // the asked side's; not sent, but filled in by who opens the message
};

// How a peer gets at a lent arena.
enum class LentKind : uint8_t {
  kHostMemfd = 1,   // a descriptor for each segment, over the socket
  kFabricVmm = 2,   // a fabric handle for each
  kDeviceVmm = 3,   // a descriptor for each
  kCudaMalloc = 4,  // a CUDA IPC handle for each
};
constexpr std::string_view name_of(LentKind kind) {
  switch (kind) {
    case LentKind::kHostMemfd:
      return "host_memfd";
    case LentKind::kFabricVmm:
      return "fabric_vmm";
    case LentKind::kDeviceVmm:
      return "device_vmm";
    case LentKind::kCudaMalloc:
      return "cuda_malloc";
  }
  return "unknown";
}
constexpr bool has_descriptors(LentKind kind) {
  return kind == LentKind::kHostMemfd || kind == LentKind::kDeviceVmm;
}
// Only fabric handles mean something on another host.
constexpr bool needs_same_host(LentKind kind) {
  return kind != LentKind::kFabricVmm;
}

struct OfferedArena {
  struct Segment {
    uint32_t number = 0;  // consecutive in an arena
    uint64_t bytes = 0;
    std::array<uint8_t, 64> handle{};  // of the kinds without descriptors; a secret
    bool operator==(const Segment&) const = default;
  };
  uint32_t number = 0;  // the lender's
  LentKind kind = LentKind::kHostMemfd;
  std::array<uint8_t, 16> device_uuid{};  // zero: host memory
  std::vector<Segment> segments;
  bool operator==(const OfferedArena&) const = default;
};
// The answer, arenas by ascending number. Token and handles are sealed while they travel: see
// node/handshake.h.
struct ArenasOffer {
  HostId host;              // the lender's
  std::string socket_path;  // where the asker gets descriptors; empty: nowhere
  Token token;              // names the link there; a secret; zero without a path
  std::vector<OfferedArena> arenas;
  WelcomeProof proof = {};  // who has the socket shows it; not sent, as above
  bool operator==(const ArenasOffer&) const = default;
};

inline constexpr std::size_t kMaxTraceParts = 256;
inline constexpr std::size_t kMaxTraceSteps = 64;  // of a part

// "What do you know of that transfer of ours?"
struct TraceQuery {
  std::string hash;  // eight hexadecimal digits
};
// When a step was taken, as time before the answer.
struct TraceReplyStep {
  std::string name;
  Duration first_ago{};
  Duration last_ago{};
  uint64_t count = 0;
  bool operator==(const TraceReplyStep&) const = default;
};
struct TraceReplyPart {
  std::string role;  // "send" or "receive"
  uint32_t rank = 0;
  std::string state;  // "ACTIVE"
  Reason reason = Reason::kNone;
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;
  uint64_t fragments = 0;
  uint64_t chunks = 0;
  std::vector<TraceReplyStep> steps;
  bool operator==(const TraceReplyPart&) const = default;
};
struct TraceReply {
  std::vector<TraceReplyPart> parts;
};

std::string encode_hello(const PeerHello& hello);
Result<PeerHello> decode_hello(std::string_view bytes);
// RESOURCE_EXHAUSTED CARD_TOO_LARGE beyond kMaxCardBytes.
Result<std::string> encode_card(const RankCard& card);
// Shape and limits only: validate_holding is the caller's.
Result<RankCard> decode_card(std::string_view bytes);
// A signed card as the workers carry it.
std::string encode_signed_card(const SignedCard& card);
Result<SignedCard> decode_signed_card(std::string_view bytes);

std::string encode(const CardQuery& query);
std::string encode(const CardPage& page);
std::string encode(const ReopenLaneRequest& request);
std::string encode(const ReopenLaneReply& reply);
std::string encode(const LaneDownNotice& notice);
std::string encode(const CloseLinkNotice& notice);
std::string encode(const JoinForward& forward);
std::string encode(const ArenasQuery& query);
std::string encode(const ArenasOffer& offer);
std::string encode(const TraceQuery& query);
std::string encode(const TraceReply& reply);
Result<CardQuery> decode_card_query(std::string_view bytes);
Result<CardPage> decode_card_page(std::string_view bytes);
Result<ReopenLaneRequest> decode_reopen_request(std::string_view bytes);
Result<ReopenLaneReply> decode_reopen_reply(std::string_view bytes);
Result<LaneDownNotice> decode_lane_down(std::string_view bytes);
Result<CloseLinkNotice> decode_close_link(std::string_view bytes);
Result<JoinForward> decode_join_forward(std::string_view bytes);
Result<ArenasQuery> decode_arenas_query(std::string_view bytes);
// Arenas of kinds that this release does not know are left out.
Result<ArenasOffer> decode_arenas_offer(std::string_view bytes);
Result<TraceQuery> decode_trace_query(std::string_view bytes);
// Names and states are words of lower or upper case letters and underscores.
Result<TraceReply> decode_trace_reply(std::string_view bytes);

}  // namespace kvferry::rpc
