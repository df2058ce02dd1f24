// The daemon's configuration: one typed struct, filled from five sources. A later one wins:
// built-in default, file, conf.d/*.toml beside it in order of name, environment
// (KVFERRY_SECTION_KEY), command line (--set section.key=value). [[socket]] and [[peers]] add up
// over the files; one with the path (identity) of an earlier file's takes that one's place as a
// whole, and an empty list
// (`peers = []`) forgets those of earlier files. Pure functions apart from reading the named files;
// any thread. Nothing here is changed after loading, so a `const Config&` may be shared between
// threads freely; what may change while the daemon runs is RunningConfig's (reload.h).
//
// Sizes are bytes, durations kvferry::Duration; both carry a unit in the file ("256MiB", "30s").
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/ops/address_rule.h"

namespace kvferry::ops {

using std::chrono::hours;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

inline constexpr uint64_t kKiB = 1024;
inline constexpr uint64_t kMiB = 1024 * kKiB;
inline constexpr uint64_t kGiB = 1024 * kMiB;

enum class LogLevel : uint8_t { kTrace, kDebug, kInfo, kWarning, kError };
enum class LogFormat : uint8_t { kText, kJson };
enum class PeerMode : uint8_t { kPlain, kMtls };
// The last two are not served by this build and refused at load.
// Of the arena that GPUs' pages go through. The last three lie in the GPU's own memory.
enum class ArenaKind : uint8_t {
  kAuto,
  kSharedHost,
  kPinnedHost,
  kFabricVmm,
  kDeviceVmm,
  kCudaMalloc
};
enum class CheckKind : uint8_t { kNone, kXxh3, kGmac };

struct NodeConfig {
  std::string id;  // never empty after load_config: the host name where none is given
  bool operator==(const NodeConfig&) const = default;
};

struct LogConfig {
  LogLevel level = LogLevel::kInfo;
  LogFormat format = LogFormat::kText;
  bool operator==(const LogConfig&) const = default;
};

// What may be held at a time, by one worker or by all of a socket together.
struct SocketLimits {
  uint64_t max_transfers = 0;  // open ones
  uint64_t max_pools = 0;
  uint64_t max_pool_bytes = 0;
  uint64_t max_descriptors = 0;  // of memory, sent or registered
  uint64_t max_calls = 0;        // that have no answer yet
  // Of all of a socket together only; what one worker may have is fixed.
  uint64_t max_claims = 0;  // and declines that are remembered
  uint64_t max_reservations = 0;
  bool operator==(const SocketLimits&) const = default;
};

// Where workers attach. The socket decides the tenant, never what a worker says.
struct SocketConfig {
  std::string path = "/run/kvferry/kvferry.sock";  // the lifeline
  std::string grpc_path;  // never empty after load_config: derived_grpc_path(path) if not given
  uint32_t mode = 0660;
  std::vector<uint32_t> uids;  // who may attach; empty: whoever the file mode lets in
  std::string tenant = "default";
  uint64_t max_workers = 1024;  // attached
  // All workers together.
  SocketLimits limits{16384, 16384, 8 * 1024 * kGiB, 16384, 32768, 32768, 16384};
  SocketLimits worker_limits{4096, 4096, 1024 * kGiB, 4096, 8192, 0, 0};  // each of them
  bool operator==(const SocketConfig&) const = default;
};

struct AdminConfig {
  std::string socket = "/run/kvferry/admin.sock";
  std::string group;  // may use the socket; empty: only the daemon's own user (mode 0600)
  uint32_t mode() const { return group.empty() ? 0600U : 0660U; }
  bool operator==(const AdminConfig&) const = default;
};

struct HttpConfig {
  std::string address = "127.0.0.1";
  uint16_t port = 9464;  // 0: any free one, told in the log
  bool operator==(const HttpConfig&) const = default;
};

// The listener for other daemons' handshakes.
struct PeerListenConfig {
  std::string listen = "127.0.0.1:0";  // host:port, [v6]:port
  std::string advertise;               // what peers dial; empty: the listener's own address
  PeerMode mode = PeerMode::kPlain;
  std::string cluster_secret_file;  // plain mode off loopback needs one
  std::string certificate_file;     // mtls
  std::string key_file;
  std::string ca_file;
  Duration renew_interval = hours(1);  // how old the keys of a link may become
  bool operator==(const PeerListenConfig&) const = default;
};

// One node that may be dialled and may dial us.
struct PeerConfig {
  std::string identity;                         // the node id it must prove (plain: state)
  std::vector<AddressRule> addresses;           // where it may be; never empty after load_config
  std::vector<std::string> tenants{"default"};  // the ones it may speak for
  PeerMode mode = PeerMode::kPlain;
  bool operator==(const PeerConfig&) const = default;
};

struct ArenaConfig {
  uint64_t bytes = 256 * kMiB;
  uint64_t segment_bytes = 64 * kMiB;  // power of two; divides `bytes`
  ArenaKind kind = ArenaKind::kAuto;
  // On each GPU; 0: none.
  uint64_t device_bytes = 256 * kMiB;
  uint64_t device_segment_bytes = 64 * kMiB;  // power of two; divides `device_bytes`
  double device_share = 0.1;                  // of what is free on the GPU at start, at most
  // Whether `kind` is one of a GPU's own memory.
  bool on_device() const { return kind >= ArenaKind::kFabricVmm; }
  bool operator==(const ArenaConfig&) const = default;
};

// Landing memory that peers which can reach it write by themselves.
struct MappedConfig {
  uint64_t host_bytes = 0;                   // 0: none
  uint64_t device_bytes = 0;                 // on each GPU; 0: none
  uint64_t segment_bytes = 64 * kMiB;        // power of two; divides both
  ArenaKind device_kind = ArenaKind::kAuto;  // or one that is on the device
  std::string socket = "/run/kvferry/arenas.sock";
  bool borrow = true;  // write into peers' mapped arenas
  bool operator==(const MappedConfig&) const = default;
};

struct PortRange {
  uint16_t first = 0;  // 0: any port
  uint16_t last = 0;
  bool any() const { return first == 0; }
  bool operator==(const PortRange&) const = default;
};

enum class Seccomp : uint8_t { kOff, kOn };

struct RailsConfig {
  std::vector<std::string> devices{"lo"};
  std::vector<std::string> transports{"tcp"};  // "tcp", "shm"
  uint32_t connections = 1;                    // tcp rails of each device
  PortRange port_range;
  Duration spin = microseconds(50);     // polling before a rail sleeps on its event descriptor
  uint64_t segment_bytes = 512 * kKiB;  // UCX's TCP segment
  std::string binary;  // never empty after load_config unless kvferry-rails is not found beside us
  Seccomp seccomp = Seccomp::kOn;  // the rails process makes only the system calls it needs
  Duration restart_backoff = milliseconds(100);
  Duration restart_backoff_max = seconds(5);
  bool operator==(const RailsConfig&) const = default;
};

struct EngineConfig {
  uint64_t chunk_bytes = 1 * kMiB;  // multiple of 4096; the peers' smaller one counts
  uint32_t leg_credits = 8;
  uint32_t staged_ahead = 2;         // chunks gathered before a credit is there (E)
  uint32_t max_receivers = 64;       // the most that one transfer may ask for
  uint64_t packed_bytes = 1 * kGiB;  // all packed copies together
  uint32_t passed_over_limit = 64;   // grants that may overtake a waiting transfer
  Duration lease = seconds(30);
  Duration lease_max = minutes(10);
  Duration wait_deadline = seconds(30);
  Duration wait_deadline_max = minutes(10);
  Duration transfer_deadline = seconds(30);
  Duration transfer_deadline_max = minutes(10);
  Duration heartbeat_interval = seconds(1);
  Duration silence_limit = seconds(3);
  Duration lane_retry = milliseconds(100);  // doubled each time up to the maximum
  Duration lane_retry_max = seconds(2);
  Duration ready_timeout = seconds(10);
  Duration landing_timeout = seconds(10);
  uint64_t min_rate = 8 * kMiB;  // bytes a second; a landing may take bytes / min_rate if longer
  bool operator==(const EngineConfig&) const = default;
};

struct CopyConfig {
  uint32_t threads = 0;  // 0: one a core, at most 8
  bool operator==(const CopyConfig&) const = default;
};

struct ChecksConfig {
  CheckKind kind = CheckKind::kNone;
  CheckKind min_check = CheckKind::kNone;  // a peer that offers less is refused
  bool operator==(const ChecksConfig&) const = default;
};

struct DrainConfig {
  Duration limit = seconds(30);
  bool operator==(const DrainConfig&) const = default;
};

// Parts of the landing and staging regions, in (0, 1], while somebody else waits.
struct SharesConfig {
  double worker_share = 0.5;
  double peer_share = 0.5;
  bool operator==(const SharesConfig&) const = default;
};

// kAuto: used if there is one; kOn: its absence is an error.
enum class GpuUse : uint8_t { kAuto, kOn, kOff };

struct GpuConfig {
  GpuUse enabled = GpuUse::kAuto;
  std::string driver = "libcuda.so.1";
  uint32_t streams = 4;  // of each device
  bool operator==(const GpuConfig&) const = default;
};

// kAuto: arenas and threads are bound to NUMA nodes where there are several.
enum class NumaBind : uint8_t { kAuto, kOff };

struct NumaConfig {
  NumaBind bind = NumaBind::kAuto;
  bool operator==(const NumaConfig&) const = default;
};

struct PoolsConfig {
  // "auto" alone: all that this machine and the number of tenants allow. Others must be there.
  std::vector<std::string> kinds{"auto"};
  bool automatic() const { return kinds.size() == 1 && kinds.front() == "auto"; }
  bool operator==(const PoolsConfig&) const = default;
};

struct WatchdogConfig {
  Duration limit = seconds(10);  // a thread that has not ticked for so long is unhealthy
  bool operator==(const WatchdogConfig&) const = default;
};

struct Config {
  NodeConfig node;
  LogConfig log;
  std::vector<SocketConfig> sockets{SocketConfig{}};
  AdminConfig admin;
  HttpConfig http;
  PeerListenConfig peer;
  std::vector<PeerConfig> peers;  // empty: nobody
  ArenaConfig arena;
  MappedConfig mapped;
  RailsConfig rails;
  std::map<std::string, std::string> ucx;  // without the UCX_ prefix; forbidden keys never get here
  EngineConfig engine;
  CopyConfig copy;
  GpuConfig gpu;
  NumaConfig numa;
  ChecksConfig checks;
  DrainConfig drain;
  SharesConfig shares;
  PoolsConfig pools;
  WatchdogConfig watchdog;
  bool operator==(const Config&) const = default;
};

// One thing that is wrong: "/etc/kvferry/kvferry.toml:12: engine.lease: not a duration".
struct ConfigProblem {
  std::string where;  // file:line, "environment KVFERRY_X" or "--set"
  std::string key;
  std::string message;
  std::string to_string() const;
};

struct ConfigSources {
  std::string file;               // empty: none, all defaults
  std::vector<std::string> sets;  // "section.key=value", in order of the command line
  std::vector<std::pair<std::string, std::string>> environment;  // only KVFERRY_* is looked at
};

// Where a value comes from.
struct Place {
  // kDerived: worked out from the machine or other keys, because none was given.
  enum class Kind : uint8_t { kFile, kEnvironment, kCommandLine, kDerived };
  Kind kind = Kind::kFile;
  std::string text;  // "/etc/kvferry/kvferry.toml:7", "environment KVFERRY_X", "--set", "host name"
  std::string origin() const { return kind == Kind::kFile ? "file " + text : text; }
  bool operator==(const Place&) const = default;
};
// By key as problems name it: "engine.lease", "socket[1].path", "ucx.TCP_TX_SEG_COUNT"; "peers[0]"
// is where that entry begins. What is at its default is not in it.
using Places = std::map<std::string, Place>;

struct LoadedConfig {
  Config config;  // meaningful only without problems
  Places places;
  std::vector<ConfigProblem> problems;
  std::vector<ConfigProblem> warnings;  // allowed but unsafe choices
  bool ok() const { return problems.empty(); }
};

// Whether the sockets are of more than one tenant.
bool several_tenants(const Config& config);
// The least that any arena must hold so that landing and staging never wait for each other for
// ever.
uint64_t least_arena_bytes(const Config& config);

// Reads and checks everything, collecting all problems, in order of the files. Blocks on the local
// files that the configuration names (secrets are checked to be there and private). A folder conf.d
// beside the file is part of it; there every *.toml must be a regular file that root, the daemon's
// user or the file's owner has, and that not everybody may write.
LoadedConfig load_config(const ConfigSources& sources);

// The commented default file; load_config of it gives the defaults.
std::string default_config_text();

// One key with what it is and where that comes from.
struct EffectiveValue {
  std::string section;  // "engine", "socket", "ucx"
  std::string entry;    // "[1]" of the second [[socket]] or [[peers]]; else empty
  std::string key;      // "lease", "limits.max_transfers"
  std::string value;    // as TOML
  std::string origin;   // "default", else Place::origin()
  std::string path() const { return section + entry + "." + key; }  // "socket[1].path"
};
// Every key of `config`, in the order of the default file. None holds a secret: files are named.
std::vector<EffectiveValue> effective_values(Config config, const Places& places);
// The same as a file, each value with its origin as a comment; load_config of it gives the same.
std::string effective_config_text(const std::vector<EffectiveValue>& values);

// The process's environment as ConfigSources wants it.
std::vector<std::pair<std::string, std::string>> current_environment();

// "/run/kvferry/kvferry.sock" -> "/run/kvferry/kvferry.sock.grpc"
std::string derived_grpc_path(std::string_view lifeline_path);

// The trimmed content of a cluster secret: 16 bytes to 4 KiB, of a file that only its owner may
// read. FAILED_PRECONDITION SECRET_FILE otherwise; the message never holds the content.
Result<std::string> read_secret_file(const std::string& path);

// "256MiB", "1.5GiB", "4096"; units B, KiB, MiB, GiB, TiB, KB, MB, GB, TB.
Result<uint64_t> parse_size(std::string_view text);
std::string format_size(uint64_t bytes);  // in the largest binary unit that divides it
// "250ms", "30s", "5m", "1h"; units ns, us, ms, s, m, h; a bare number but 0 is refused.
Result<Duration> parse_duration(std::string_view text);
std::string format_duration(Duration duration);

}  // namespace kvferry::ops
