// Every number the daemon exports. Counters are relaxed atomics: any thread may add to them without
// a lock, an allocation or a string; a scrape reads them on an HTTP thread (text()). Labels are
// closed lists (enums, arena and rail indices fixed at start), so that neither workers nor peers
// can make series; every series exists from the start, at zero.
//
// The object outlives every thread that was handed it.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/reason.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"

namespace kvferry::ops {

// Only goes up.
class Counter {
 public:
  void add(uint64_t n = 1) { value_.fetch_add(n, std::memory_order_relaxed); }
  // For totals that somebody else counts (the rails process); the caller never goes back.
  void store(uint64_t total) { value_.store(total, std::memory_order_relaxed); }
  uint64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

// Goes up and down.
class Gauge {
 public:
  void set(int64_t value) { value_.store(value, std::memory_order_relaxed); }
  void set_bytes(uint64_t value) { set(static_cast<int64_t>(value)); }
  void add(int64_t n = 1) { value_.fetch_add(n, std::memory_order_relaxed); }
  void sub(int64_t n = 1) { value_.fetch_sub(n, std::memory_order_relaxed); }
  int64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> value_{0};
};

// Cumulative buckets are made at the scrape; an observation is one search of at most
// kMaxBuckets bounds and three relaxed additions.
class Histogram {
 public:
  static constexpr std::size_t kMaxBuckets = 20;
  // Bounds in the unit observed (nanoseconds or bytes), rising, at most kMaxBuckets of them;
  // `scale` turns that unit into the exported one (1e-9 for nanoseconds to seconds).
  Histogram(std::vector<uint64_t> bounds, double scale);
  void observe(uint64_t value);
  void observe(Duration duration) {
    observe(static_cast<uint64_t>(duration.count() < 0 ? 0 : duration.count()));
  }

  struct Snapshot {
    std::vector<double> bounds;        // scaled
    std::vector<uint64_t> cumulative;  // one more than bounds: the last is +Inf
    double sum = 0;                    // scaled
    uint64_t count = 0;
  };
  Snapshot snapshot() const;

 private:
  const std::vector<uint64_t> bounds_;
  const double scale_;
  std::array<std::atomic<uint64_t>, kMaxBuckets + 1> counts_{};
  std::atomic<uint64_t> sum_{0};
};

enum class TransferRole : uint8_t { kSend, kReceive };
inline constexpr std::size_t kTransferRoles = 2;

// kDone: DELIVERED for a sender, COMPLETED for a receiver.
enum class TransferOutcome : uint8_t { kDone, kFailed, kCancelled };
inline constexpr std::size_t kTransferOutcomes = 3;

// Of chunk data over rails, and of bytes that never left the node.
enum class ByteDirection : uint8_t { kSent, kReceived, kLocal };
inline constexpr std::size_t kByteDirections = 3;

// The life of chunks: on the sending side gathered or shared (another leg had the same one
// gathered), offered, refused (the peer wants it again),
// acked, requeued (its lane went down); on the receiving side accepted, dropped (offer without
// effect), landed, scattered, corrupt (the check was wrong).
enum class ChunkEvent : uint8_t {
  kGathered,
  kOffered,
  kRefused,
  kAcked,
  kRequeued,
  kAccepted,
  kDropped,
  kLanded,
  kScattered,
  kCorrupt,
  kWritten,  // gathered straight into a peer's mapped arena
  kMapped,   // came so
  kShared,
};
inline constexpr std::size_t kChunkEvents = 13;

// Why what was lent to a peer may be used again after its transfer's end.
enum class Evidence : uint8_t {
  kDrained,   // the peer has said so
  kProcess,   // its process has been seen to end
  kOperator,  // kvferryctl arenas release
};
inline constexpr std::size_t kEvidences = 3;

// Why an arena that a peer lends, or all of a link's, could not be mapped here.
enum class BorrowFailure : uint8_t {
  kAsk,      // the peer did not answer
  kSocket,   // its socket gave no descriptors
  kDevice,   // on a GPU that this process does not see, or that is down
  kImport,   // the kernel or the driver refused
  kChecked,  // on a GPU, and the link checks its chunks
};
inline constexpr std::size_t kBorrowFailures = 5;

enum class CreditEvent : uint8_t { kGranted, kSpent, kWithdrawn };
inline constexpr std::size_t kCreditEvents = 3;

enum class CopyKind : uint8_t { kGather, kScatter, kFused, kClear, kPack };
inline constexpr std::size_t kCopyKinds = 5;

// Partition an arena: the series of one arena add up to its size.
enum class RegionState : uint8_t {
  kFree,
  kGranted,
  kLanding,
  kLanded,
  kScattering,
  kQuarantined,
  kStaging,
};
inline constexpr std::size_t kRegionStates = 7;

// Wait: Receive to first SLICE (receiver), Send to first PULL (sender). Gather, wire (offer to ack,
// sender; accept to landed, receiver) and scatter are of one chunk.
enum class Stage : uint8_t { kWait, kGather, kWire, kScatter };
inline constexpr std::size_t kStages = 4;

// Why a message or offer of a peer had no effect.
enum class DropCause : uint8_t {
  kMalformed,    // does not parse
  kBadTag,       // its tag is wrong
  kUnknownLink,  // another link, boot id or key
  kOldEpoch,     // an older life of the lane
  kUnknownPull,  // a pull that was never made or is forgotten
  kDuplicate,    // told before
  kLate,         // for something that has ended
  kProtocol,     // contradicts what was told, or may not be said
  kProof,        // the proof of the transfer's secret is wrong
  kLimit,        // beyond a limit of the handshake
  kQueueFull,    // no room in a bounded queue
};
inline constexpr std::size_t kDropCauses = 11;

// A slower way that was taken since the fast one could not be had.
enum class Fallback : uint8_t {
  kGpuUnused,    // a GPU is there and no copy can use it: what is asked of it goes by the host
  kHostArena,    // a GPU without an arena of its own: its chunks pass through host memory
  kSmallPages,   // an arena in host memory that is not wholly in huge pages
  kNumaUnbound,  // memory, a thread or a rail that is not on its NUMA node
  kPeerArena,    // an arena that a peer lends and that is not, or no more, written: rails instead
  kMappedArena,  // a leg that could not land in the mapped arena beside its layout's: rails instead
};
inline constexpr std::size_t kFallbacks = 6;

// Of a configuration that was read again.
enum class ReloadResult : uint8_t { kOk, kRefused };
inline constexpr std::size_t kReloadResults = 2;

enum class LaneState : uint8_t { kUp, kDown };
inline constexpr std::size_t kLaneStates = 2;

// What is fixed at start: one set of series for each entry.
struct ArenaLabels {
  std::string device;  // "host", "gpu0"
  std::string kind;    // "shared_host", "pinned_host"
  bool mapped = false;
};
struct RailLabels {
  std::string transport;  // "tcp"
  std::string device;     // "eth0"
};
struct GpuLabels {
  std::string device;  // "gpu0"
  std::string uuid;
  std::string name;
};
struct BuildLabels {
  std::string version;
  std::string commit;
  std::string ucx;  // the rails process's release; empty until known
};

struct ArenaMetrics {
  std::array<Gauge, kRegionStates> bytes;
  Gauge reserved;  // promised, used or not: beside the states
  Gauge& of(RegionState state) { return bytes[static_cast<std::size_t>(state)]; }
};

struct RailMetrics {
  Gauge up;
  Counter sent_bytes;
  Counter received_bytes;
  Counter errors;
  Counter downs;
  Gauge send_rate;  // bytes a second
};

// What one GPU does; the queue counts, the engine's thread stores its totals.
enum class GpuCopyKind : uint8_t { kGather, kScatter, kTransfer, kClear };
inline constexpr std::size_t kGpuCopyKinds = 4;

struct GpuMetrics {
  Gauge up;
  std::array<Counter, kGpuCopyKinds> copies;
  std::array<Counter, kGpuCopyKinds> bytes;
  Counter failed;
  Counter refused;
  Counter plan_bytes;  // brought to the device
  Gauge outstanding;
  std::unique_ptr<Histogram> launch_to_done;
};

class Metrics {
 public:
  Metrics(BuildLabels build, std::vector<ArenaLabels> arenas, std::vector<RailLabels> rails,
          std::vector<GpuLabels> gpus = {});
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // --- any thread, wait-free ---
  void transfer_opened(TransferRole role);
  // `reason` counts unless the outcome is kDone. `duration` from opened to the end, `bytes` moved.
  void transfer_ended(TransferRole role, TransferOutcome outcome, Reason reason, Duration duration,
                      uint64_t bytes);
  // For add() as things happen, or store() of a total that the engine keeps: one of the two.
  Counter& of(ByteDirection direction) { return moved_[static_cast<std::size_t>(direction)]; }
  Counter& of(ChunkEvent event) { return chunks_[static_cast<std::size_t>(event)]; }
  Counter& of(CreditEvent event) { return credits_[static_cast<std::size_t>(event)]; }
  Counter& of(Evidence evidence) { return evidences_[static_cast<std::size_t>(evidence)]; }
  Counter& of(BorrowFailure failure) { return borrow_failures_[static_cast<std::size_t>(failure)]; }
  Counter& of(Fallback what) { return fallbacks_[static_cast<std::size_t>(what)]; }
  // Of memory on this side that slices were compiled to.
  Counter& fragments(TransferRole role) { return fragments_[static_cast<std::size_t>(role)]; }
  Counter& of(ReloadResult result) { return reloads_[static_cast<std::size_t>(result)]; }
  Counter& of(DropCause cause) { return dropped_[static_cast<std::size_t>(cause)]; }
  Gauge& of(LaneState state) { return lanes_[static_cast<std::size_t>(state)]; }
  void copy_ended(CopyKind kind, uint64_t bytes, bool failed);
  void stage(Stage stage, Duration duration);
  void rpc_ended(Code code);

  ArenaMetrics& arena(std::size_t index) { return *arenas_.at(index); }
  RailMetrics& rail(std::size_t index) { return *rails_.at(index); }
  GpuMetrics& gpu(std::size_t index) { return *gpus_.at(index); }
  std::size_t gpu_count() const { return gpus_.size(); }
  std::size_t arena_count() const { return arenas_.size(); }
  std::size_t rail_count() const { return rails_.size(); }

  // Plain ones, to be set or added to directly.
  Gauge credits_live;  // granted and not yet spent
  Gauge workers;       // attached now
  Counter workers_attached;
  Counter workers_lost;  // died or closed without detaching
  Gauge pool_bytes;
  Gauge pools;
  Gauge layouts;
  Gauge links;
  Counter lane_downs;
  Counter links_lost;
  Counter quarantines;    // regions that ever entered quarantine
  Gauge borrowed_arenas;  // of peers, mapped here
  Gauge borrowed_bytes;
  Gauge lent_connections;  // of peers that have what this daemon lends
  Counter lent_refused;    // connections to the socket of arenas that were turned away

  // Packed copies, made or being made.
  Gauge packed_bytes;
  Gauge packed_copies;
  Counter packed_made;
  Counter packed_refused;  // Sends, for want of room

  // The node's reuse index. Bytes: ByteDirection::kLocal.
  Gauge reuse_entries;
  Gauge reuse_pins;
  Counter reuse_commits;
  Counter reuse_blocks;  // that receives had from the node
  Counter reuse_lookups;
  Counter reuse_lookup_hits;  // groups
  Counter reuse_withdrawn;    // entries
  Counter reuse_evicted;      // entries
  Counter handshakes_failed;
  Counter links_renewed;
  // This node's certificate, in seconds since 1970; 0 without one.
  Gauge certificate_start;
  Gauge certificate_expiry;
  // Of the root of peer.ca_file that ends last; likewise.
  Gauge ca_start;
  Gauge ca_expiry;
  Counter messages_sent;
  Counter messages_received;
  Counter control_resyncs;
  Gauge rails_process_up;
  Counter rails_process_restarts;
  // Of the rails process, which is read at each scrape; 0: none runs.
  void set_rails_pid(int pid) { rails_pid_.store(pid, std::memory_order_relaxed); }
  Gauge copies_outstanding;  // of the copy threads: taken and not yet ended
  Counter copy_busy_ns;      // of all copy threads together
  Counter engine_events;
  Gauge engine_queue;  // events waiting now
  Counter leases_expired;
  Gauge healthy;  // 1 while the watchdog is content
  Gauge ready;    // 1 while new work is taken
  Gauge draining;
  Gauge last_reload_ok;  // 1 while what was last read counts
  Gauge last_read_at;    // of the configuration that counts; seconds since the epoch
  Gauge keys_waiting;    // keys of the configuration that wait for a restart

  // The rails process tells its UCX release after start; any thread.
  void set_ucx_version(std::string_view version);

  // The whole page in the Prometheus text format. Takes no lock that a counting thread takes; reads
  // /proc/self.
  std::string text() const;

  uint64_t transfers_open(TransferRole role) const;

 private:
  class Collector;  // turns the numbers into prometheus-cpp's families

  BuildLabels build_;
  std::vector<ArenaLabels> arena_labels_;
  std::vector<RailLabels> rail_labels_;
  std::vector<std::unique_ptr<ArenaMetrics>> arenas_;
  std::vector<std::unique_ptr<RailMetrics>> rails_;
  std::vector<GpuLabels> gpu_labels_;
  std::vector<std::unique_ptr<GpuMetrics>> gpus_;

  std::array<Counter, kTransferRoles> opened_;
  std::array<std::array<Counter, kTransferOutcomes>, kTransferRoles> ended_;
  std::array<std::array<Counter, kReasonCount>, kTransferRoles> reasons_;
  std::array<std::unique_ptr<Histogram>, kTransferRoles> durations_;
  std::array<std::unique_ptr<Histogram>, kTransferRoles> sizes_;
  std::array<Counter, kByteDirections> moved_;
  std::array<Counter, kChunkEvents> chunks_;
  std::array<Counter, kCreditEvents> credits_;
  std::array<Counter, kEvidences> evidences_;
  std::array<Counter, kBorrowFailures> borrow_failures_;
  std::array<Counter, kCopyKinds> copies_;
  std::array<Counter, kCopyKinds> copy_bytes_;
  std::array<Counter, kCopyKinds> copy_errors_;
  std::array<std::unique_ptr<Histogram>, kStages> stages_;
  std::array<Counter, kReloadResults> reloads_;
  std::array<Counter, kDropCauses> dropped_;
  std::array<Counter, kFallbacks> fallbacks_;
  std::array<Counter, kTransferRoles> fragments_;
  std::atomic<int> rails_pid_{0};
  std::array<Gauge, kLaneStates> lanes_;
  std::array<Counter, 17> rpcs_;  // by Code, gRPC's UNAUTHENTICATED included
  mutable Mutex ucx_mutex_;
  // Changes only when the rails process starts.
  std::string ucx_ KVFERRY_GUARDED_BY(ucx_mutex_);
};

}  // namespace kvferry::ops
