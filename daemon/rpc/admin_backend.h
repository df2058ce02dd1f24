// What the admin service asks of the daemon: snapshots as plain structs, and a few actions. The
// service (admin_service.h) turns them into messages; the node implements them.
//
// Every call is made on a gRPC thread and must not block: the backend queues the question and calls
// `done` exactly once, from any thread, possibly before the call returns. `deadline` is when nobody
// waits for the answer any more; a backend that cannot answer until then calls `done` with
// DEADLINE_EXCEEDED. Secrets never appear in these structs.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/reason.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"

namespace kvferry::rpc {

struct MemoryChoice {
  std::string device;            // "host", "gpu0"
  std::string kind;              // "shared_host", "pinned_host"
  std::string reason;            // why this kind
  uint64_t huge_page_bytes = 0;  // of host memory
};

struct GpuInfo {
  std::string device;  // "gpu0"
  std::string uuid;
  std::string name;
  bool up = true;
  std::string detail;  // why it is down
};

// Where on a machine with several NUMA nodes something was put.
struct NumaInfo {
  std::string part;     // "arena 0", "rail 1", "copy threads"
  std::string place;    // "node 1", "nodes 0,1 in turn", "left to the kernel"
  std::string reason;   // why there
  std::string problem;  // why it is not there after all; empty: it is
};

struct StatusInfo {
  std::string version;
  std::string commit;
  BootId boot;
  std::string node;
  Duration uptime{};
  std::string ucx_version;  // of the rails process; empty until it has told
  uint32_t protocol_min = 0;
  uint32_t protocol_max = 0;
  std::vector<MemoryChoice> arenas;
  std::vector<GpuInfo> gpus;
  std::vector<NumaInfo> numa;
  bool healthy = true;
  bool ready = true;
  bool draining = false;
  std::string reason;  // why not healthy or not ready
  uint32_t workers = 0;
  uint32_t transfers = 0;
  uint32_t links = 0;
  uint32_t rails_up = 0;
  uint32_t rails_total = 0;
  uint32_t rails_restarts = 0;
  std::string peer_address;  // what peers dial
  std::string http_address;  // host:port really bound
  uint64_t sent_bytes = 0;   // of KV, since the start
  uint64_t received_bytes = 0;
  uint64_t local_bytes = 0;  // within the node
  // Of this node's certificate, in seconds since 1970; 0 without mode mtls.
  int64_t certificate_expiry = 0;
};

struct PoolInfo {
  std::string name;
  std::string kind;
  uint64_t bytes = 0;
};

struct LayoutInfo {
  std::string instance;
  uint32_t rank = 0;
  uint64_t generation = 0;
  uint32_t groups = 0;
  uint32_t planes = 0;
};

struct WorkerInfo {
  uint64_t id = 0;
  std::string name;
  std::string tenant;
  std::string role;  // "rank", "controller"
  uint32_t uid = 0;
  int32_t pid = 0;
  Duration age{};
  uint32_t transfers = 0;
  std::vector<PoolInfo> pools;
  std::vector<LayoutInfo> layouts;
};

// One rank's part of a transfer.
struct TransferInfo {
  std::string handle;   // "s12" or "r7": unique on this daemon, taken by cancel
  std::string id_hash;  // the engine's short hash of the id; taken by cancel
  std::string id;       // the caller's id, any bytes; shown escaped
  std::string tenant;
  std::string instance;
  std::string worker;
  std::string role;  // "send", "receive"
  uint32_t rank = 0;
  std::string state;  // "OPEN", "DELIVERED", "COMPLETED", "FAILED", ...
  Reason reason = Reason::kNone;
  bool memory_in_use = false;
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;  // known so far
  uint32_t legs = 0;
  uint32_t legs_done = 0;
  Duration age{};
  std::string peer;  // node id, "local", or the first of several
};

struct LaneInfo {
  uint32_t lane = 0;
  uint32_t rail = 0;  // the own one
  bool up = false;
  uint64_t send_rate = 0;  // bytes a second; 0: not known
  uint64_t in_flight_bytes = 0;
  uint64_t arrived_bytes = 0;
};

struct PeerInfo {
  std::string node;
  std::string address;
  BootId boot;         // zero: no link
  std::string state;   // "linked", "dialling", "down"
  std::string detail;  // the last error
  std::string ucx_version;
  uint32_t lanes_up = 0;
  uint32_t lanes_total = 0;
  Duration last_heard{};  // ago; negative: never
  Duration round_trip{};  // of the last PING; zero: not measured
  uint32_t legs = 0;
  std::vector<uint32_t> mapped;  // arenas of the peer's that are mapped here
  std::vector<uint32_t> lent;    // own arenas that the peer has mapped
  std::vector<LaneInfo> lanes;   // of its link
};

struct RailInfo {
  uint32_t index = 0;
  uint32_t connection = 0;  // of the rails with its transport and device
  uint64_t send_rate = 0;   // bytes a second, of its fastest lane; 0: not known
  std::string transport;
  std::string device;
  std::string address;  // what UCX bound, for people
  bool up = false;
  uint64_t sent_bytes = 0;
  uint64_t received_bytes = 0;
  uint64_t errors = 0;
  uint64_t restarts = 0;                                      // of the rails process
  std::vector<std::pair<std::string, std::string>> settings;  // effective UCX_* values, and seccomp
};

struct ArenaInfo {
  uint32_t index = 0;
  std::string device;
  std::string kind;
  std::string reason;
  uint64_t huge_page_bytes = 0;  // when it was made; host memory only
  uint64_t total_bytes = 0;
  // States as in the metrics; add up to total_bytes.
  uint64_t free_bytes = 0;
  uint64_t granted_bytes = 0;
  uint64_t landing_bytes = 0;
  uint64_t landed_bytes = 0;
  uint64_t scattering_bytes = 0;
  uint64_t quarantined_bytes = 0;
  uint64_t staging_bytes = 0;
  uint64_t reserved_bytes = 0;
  uint32_t regions = 0;  // allocated
  uint32_t quarantined_regions = 0;
  uint32_t segments = 0;
  bool mapped = false;
};

// Quarantined regions of a mapped arena.
struct LentInfo {
  uint32_t arena = 0;
  std::string node;
  BootId boot;
  bool linked = false;
  uint32_t regions = 0;
  uint64_t bytes = 0;
};

struct ArenasInfo {
  std::vector<ArenaInfo> arenas;
  std::vector<LentInfo> lent;
};

struct ReleasedInfo {
  uint32_t regions = 0;
  uint64_t bytes = 0;
  uint32_t linked = 0;
};

struct CancelledTransfer {
  std::string handle;
  std::string state;
  bool memory_in_use = false;
};

struct HealthCheckInfo {
  std::string name;
  bool ok = true;
  std::string detail;
};

struct TraceStepInfo {
  std::string name;
  Duration first{};
  Duration last{};
  uint64_t count = 0;
};
struct TracePartInfo {
  std::string node;
  std::string handle;  // of this daemon's parts alone
  std::string id_hash;
  std::string role;  // "send", "receive"
  uint32_t rank = 0;
  std::string state;
  Reason reason = Reason::kNone;
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;
  uint64_t fragments = 0;
  uint64_t chunks = 0;
  std::vector<std::string> peers;
  std::vector<TraceStepInfo> steps;
  Duration clock_error{};
};
struct TraceGapInfo {
  std::string node;
  std::string detail;
};
// Times count from the first step here; those of peers may be negative.
struct TraceInfo {
  std::vector<TracePartInfo> parts;
  std::vector<TraceGapInfo> gaps;
  Duration age{};
};

struct ReloadedInfo {
  uint32_t peers = 0;
  std::vector<std::string> taken_keys;
  std::vector<std::string> restart_keys;
};

struct ConfigValueInfo {
  std::string key;     // "engine.lease", "socket[0].path"
  std::string value;   // as TOML; empty: not there before a restart
  std::string origin;  // "file PATH:LINE", "environment KVFERRY_X", "--set", "default", ...
  bool reloadable = false;
  std::string next;  // what waits for a restart, as TOML or "removed"; empty: nothing
};

template <typename T>
using Reply = std::function<void(Result<T>)>;

class AdminBackend {
 public:
  virtual ~AdminBackend() = default;

  virtual void status(Time deadline, Reply<StatusInfo> done) = 0;
  virtual void list_workers(Time deadline, Reply<std::vector<WorkerInfo>> done) = 0;
  virtual void list_transfers(Time deadline, Reply<std::vector<TransferInfo>> done) = 0;
  virtual void list_peers(Time deadline, Reply<std::vector<PeerInfo>> done) = 0;
  virtual void list_rails(Time deadline, Reply<std::vector<RailInfo>> done) = 0;
  virtual void list_arenas(Time deadline, Reply<ArenasInfo> done) = 0;
  // The node is given; with a boot id, only that life of it is meant.
  virtual void release_arenas(std::string node, std::optional<BootId> boot, Time deadline,
                              Reply<ReleasedInfo> done) = 0;
  // `selector` is a handle ("s12"), or an id hash, which may name several parts. NOT_FOUND
  // TRANSFER_UNKNOWN when nothing matches; ended transfers answer their state.
  virtual void cancel_transfer(std::string selector, Time deadline,
                               Reply<std::vector<CancelledTransfer>> done) = 0;
  // `selector` as above; of the whole transfer, here and at its peers. NOT_FOUND TRANSFER_UNKNOWN.
  virtual void trace(std::string selector, Time deadline, Reply<TraceInfo> done) = 0;
  virtual void health(Time deadline, Reply<std::vector<HealthCheckInfo>> done) = 0;
  // No new work from now on; `done` when all transfers have ended, which they have at the limit.
  // Without a limit the configured one counts.
  virtual void drain(std::optional<Duration> limit, Reply<bool> done) = 0;
  virtual void reload(Reply<ReloadedInfo> done) = 0;
  // What the daemon runs with.
  virtual void config(Reply<std::vector<ConfigValueInfo>> done) = 0;
};

}  // namespace kvferry::rpc
