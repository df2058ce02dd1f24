// What the main process and the rails process say to each other: the fixed-size records of the
// rings, the set-up message, and how the memory they share is divided. Memory of arenas is always
// (segment, offset, bytes); messages travel in numbered slots. No pointer, descriptor or length is
// ever taken from shared memory without a check against this layout.
//
// Included by both processes; knows nothing of UCX.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "daemon/base/cpu_set.h"
#include "daemon/rails/ring.h"

namespace kvferry::rails {

inline constexpr uint32_t kMaxRails = 16;
inline constexpr uint32_t kMaxSegments = 64;
inline constexpr uint32_t kMaxSlotsOfKind = 1U << 16;
inline constexpr uint32_t kSmallSlotBytes = 4096;
// A control message of 64 KiB with its header and tag.
inline constexpr uint32_t kLargeSlotBytes = 68 * 1024;
inline constexpr uint32_t kNoSlot = UINT32_MAX;
// What an offer's header may have; it has to fit one small slot and one fragment of any transport.
inline constexpr uint32_t kMaxOfferHeaderBytes = 1024;

// UCX active message ids.
inline constexpr unsigned kControlMessageId = 1;
inline constexpr unsigned kOfferMessageId = 2;

enum class Command : uint16_t {
  kConnect = 1,  // lane, slot + slot_bytes: the peer's worker address; the answer frees the slot
  kClose = 2,    // lane
  kSendControl = 3,  // lane, slot + slot_bytes, token
  kSendOffer = 4,    // lane, slot + slot_bytes: the header, region, token
  kAccept = 5,       // descriptor, lane, region, token
  kDrop = 6,         // descriptor
  kReturnSlot = 7,   // slot: an inbound one that main has read
};

enum class Event : uint16_t {
  // slot + slot_bytes: our worker address; token: UCX release; offset: port; status: why the thread
  // is not bound to its processors, as errno, or 0
  kReady = 1,
  kConnected = 2,      // lane
  kConnectFailed = 3,  // lane, status
  kLaneError = 4,      // lane, status
  kClosed = 5,         // lane
  kControlIn = 6,      // slot + slot_bytes
  // slot + slot_bytes: the header, bytes, descriptor (0: nothing is held: it arrived eagerly, or
  // with status kStatusTooMany there are held_offers already)
  kOfferIn = 7,
  kSendEnded = 8,     // token, status (0: ended well); a slot of the command is free again
  kReceiveEnded = 9,  // token, status, bytes
};

// Statuses that are ours; UCX's own are -1 to -100.
inline constexpr int32_t kStatusOk = 0;
inline constexpr int32_t kStatusBadRecord = -1001;       // a region, slot or length out of bounds
inline constexpr int32_t kStatusUnknownLane = -1002;     // no such lane, or it is closing
inline constexpr int32_t kStatusUnknownOffer = -1003;    // no such descriptor
inline constexpr int32_t kStatusLengthMismatch = -1004;  // the region is not the offer's length
inline constexpr int32_t kStatusLaneExists = -1005;
inline constexpr int32_t kStatusTooMany = -1006;  // a limit of the set-up is reached

// One record of either direction; what a kind uses is said above, the rest is zero.
struct Record {
  uint16_t kind = 0;
  uint16_t reserved = 0;
  int32_t status = 0;
  uint32_t slot = kNoSlot;
  uint32_t slot_bytes = 0;
  uint64_t lane = 0;
  uint64_t token = 0;
  uint64_t descriptor = 0;
  uint64_t segment = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};
static_assert(sizeof(Record) == kRecordBytes && std::is_trivially_copyable_v<Record>);

// Fixed for one life of the rails process.
struct Limits {
  uint32_t ring_records = 4096;       // of each ring; a power of two
  uint32_t outbound_small = 1024;     // slots of kSmallSlotBytes, all rails together
  uint32_t outbound_large = 64;       // slots of kLargeSlotBytes
  uint32_t inbound_small = 1024;      // per rail
  uint32_t inbound_large = 32;        // per rail
  uint32_t lanes = 1024;              // per rail
  uint32_t held_offers = 4096;        // per rail; more are dropped, told and counted
  uint32_t operations = 8192;         // sends and receives under way, per rail
  uint64_t backlog_bytes = 8U << 20;  // per rail: messages that found no free slot
};

// Counters that a rail publishes; relaxed atomics in shared memory, read by main for metrics and by
// its watchdog. Main believes none of them.
struct RailCounters {
  std::atomic<uint64_t> ticks;  // rounds of the thread's loop
  std::atomic<uint64_t> sleeps;
  std::atomic<uint64_t> spins;
  std::atomic<uint64_t> messages_sent;
  std::atomic<uint64_t> messages_received;
  std::atomic<uint64_t> offers_sent;
  std::atomic<uint64_t> offers_received;
  std::atomic<uint64_t> bytes_sent;      // of offers whose send ended well
  std::atomic<uint64_t> bytes_received;  // of receives that ended well
  std::atomic<uint64_t> dropped;         // arrivals beyond a limit or of a form nobody sends
  std::atomic<uint64_t> refused;         // commands answered with one of our own statuses
  std::atomic<uint64_t> held_offers;     // a gauge
  std::atomic<uint64_t> operations;      // a gauge
};

// Where an arena segment's memory lies, and what gives the rails access to it.
enum class SegmentKind : uint32_t {
  kHost = 0,        // a memfd: its descriptor
  kDeviceVmm = 1,   // GPU memory of cuMemCreate: its descriptor
  kFabricVmm = 2,   // GPU memory of cuMemCreate: its fabric handle
  kCudaMalloc = 3,  // GPU memory of cuMemAlloc: its CUDA IPC handle
};
constexpr bool is_segment_kind(SegmentKind kind) {
  return kind <= SegmentKind::kCudaMalloc;
}
constexpr bool is_on_device(SegmentKind kind) {
  return kind != SegmentKind::kHost;
}
constexpr bool has_descriptor(SegmentKind kind) {
  return kind == SegmentKind::kHost || kind == SegmentKind::kDeviceVmm;
}
constexpr bool has_handle(SegmentKind kind) {
  return !has_descriptor(kind);
}

// Of a CUDA IPC or fabric handle, and of a device's UUID, as the driver gives them.
using SegmentHandle = std::array<uint8_t, 64>;
using DeviceUuid = std::array<uint8_t, 16>;

struct SetupRail {
  char transport[8] = {};  // "tcp" or "shm"
  char device[48] = {};    // empty: whichever UCX takes
  CpuSet cpus{};           // that the rail's thread is bound to; none: any
};

struct SetupSegment {
  SegmentKind kind = SegmentKind::kHost;
  uint32_t reserved = 0;
  uint64_t bytes = 0;
  DeviceUuid device_uuid{};  // zero for host memory
  SegmentHandle handle{};    // zero for kinds that have a descriptor
};

// The one message from main over the channel, with descriptors by SCM_RIGHTS in this order: shared
// memory, one doorbell per rail, then one for each segment whose kind has a descriptor, in the
// segments' order.
struct Setup {
  static constexpr uint32_t kMagic = 0x6b766672;
  static constexpr uint32_t kVersion = 4;
  uint32_t magic = kMagic;
  uint32_t version = kVersion;
  uint32_t rail_count = 0;
  uint32_t segment_count = 0;
  Limits limits;
  uint64_t spin_ns = 0;
  uint32_t port_first = 0;  // 0: any
  uint32_t port_last = 0;
  uint32_t confined = 1;  // 0: without a seccomp filter
  uint32_t reserved = 0;
  SetupRail rails[kMaxRails];
  SetupSegment segments[kMaxSegments];
  char cuda_driver[256] = {};  // the driver's library; empty: the default name
};
static_assert(std::is_trivially_copyable_v<Setup>);

// How the shared memory is divided: per rail its counters and two rings, then the slots. Both sides
// compute it from the set-up.
class SharedLayout {
 public:
  struct Slot {
    uint64_t offset = 0;
    uint32_t capacity = 0;
    bool inbound = false;
    uint32_t rail = 0;  // of an inbound slot
  };
  struct SlotRange {
    uint32_t first = 0;
    uint32_t count = 0;
  };

  // Nothing if a count is zero or beyond its maximum.
  static std::optional<SharedLayout> make(const Limits& limits, uint32_t rail_count);

  uint64_t total_bytes() const { return total_bytes_; }
  const Limits& limits() const { return limits_; }
  uint32_t rail_count() const { return rail_count_; }

  // `base` is where the shared memory is mapped; `rail` < rail_count().
  RingMemory command_ring(std::byte* base, uint32_t rail) const;
  RingMemory event_ring(std::byte* base, uint32_t rail) const;
  RailCounters* counters(std::byte* base, uint32_t rail) const;

  // Nothing for a number that no slot has.
  std::optional<Slot> slot(uint32_t number) const;
  SlotRange outbound_small() const { return {0, limits_.outbound_small}; }
  SlotRange outbound_large() const { return {limits_.outbound_small, limits_.outbound_large}; }
  SlotRange inbound_small(uint32_t rail) const;
  SlotRange inbound_large(uint32_t rail) const;

 private:
  SharedLayout() = default;
  uint64_t ring_bytes() const;
  uint64_t rail_bytes() const;

  Limits limits_;
  uint32_t rail_count_ = 0;
  uint64_t outbound_offset_ = 0;
  uint64_t inbound_offset_ = 0;
  uint64_t inbound_rail_bytes_ = 0;
  uint64_t total_bytes_ = 0;
};

}  // namespace kvferry::rails
