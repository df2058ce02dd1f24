// What one key alone cannot tell: keys that do not go together, and what this machine lacks.
#include <grp.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <filesystem>
#include <set>

#include "daemon/base/secret.h"
#include "daemon/ops/config_values.h"
#include "daemon/ops/peer_files.h"

namespace kvferry::ops {
namespace {

constexpr uint32_t kNobodyUid = 65534;
constexpr std::size_t kMaxRails = 16;  // of the rails process, and in a handshake
constexpr std::size_t kMaxSocketPath = sizeof(sockaddr_un{}.sun_path) - 1;

class Checker {
 public:
  Checker(LoadedConfig& loaded, const std::string& file)
      : loaded_(loaded), config_(loaded.config), places_(loaded.places), file_(file) {}

  void run() {
    check_node();
    check_sockets();
    check_admin_and_http();
    check_peer_listener();
    check_peers();
    check_arena();
    check_mapped();
    check_rails();
    check_engine();
    check_rest();
  }

 private:
  std::string place_of(const std::string& key) const {
    // Of a key that was not given: where its list entry begins, else the file.
    for (const std::string& name : {key, key.substr(0, key.find("]") + 1)})
      if (const auto found = places_.find(name);
          found != places_.end() && found->second.kind != Place::Kind::kDerived)
        return found->second.text;
    return file_.empty() ? "default" : file_;
  }
  void derived(const std::string& key, std::string from) {
    places_[key] = {Place::Kind::kDerived, std::move(from)};
  }
  void problem(const std::string& key, std::string message) {
    loaded_.problems.push_back({place_of(key), key, std::move(message)});
  }
  void warning(const std::string& key, std::string message) {
    loaded_.warnings.push_back({place_of(key), key, std::move(message)});
  }

  static bool is_word(std::string_view text, std::string_view also, std::size_t max_bytes) {
    if (text.empty() || text.size() > max_bytes) return false;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const char c = text[i];
      const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
      if (!plain && (i == 0 || also.find(c) == std::string_view::npos)) return false;
    }
    return true;
  }
  static bool is_name(std::string_view text) { return is_word(text, "._:+-", 63); }
  static bool is_node_id(std::string_view text) { return is_word(text, "._:+-/", 253); }

  void check_node() {
    const std::string identity = check_peer_files();
    if (config_.node.id.empty() && !identity.empty()) {
      config_.node.id = identity;
      derived("node.id", "peer.certificate_file");
    }
    if (!identity.empty() && config_.node.id != identity)
      problem("node.id", "is " + toml_quote(config_.node.id) + ", but peer.certificate_file is " +
                             toml_quote(identity) + "'s: leave it empty");
    if (config_.node.id.empty()) {
      std::array<char, 256> name{};
      if (::gethostname(name.data(), name.size() - 1) == 0) config_.node.id = name.data();
      derived("node.id", "host name");
    }
    if (!is_node_id(config_.node.id))
      problem("node.id", "must be a name of letters, digits and ._:+-/ (it is " +
                             toml_quote(config_.node.id) + ")");
  }

  void check_socket_path(const std::string& key, const std::string& path) {
    if (path.empty() || path.front() != '/')
      problem(key, "must be an absolute path");
    else if (path.size() > kMaxSocketPath)
      problem(key, "is longer than " + std::to_string(kMaxSocketPath) + " bytes");
    else if (!socket_paths_.insert(path).second)
      problem(key, toml_quote(path) + " is used twice");
  }

  void check_sockets() {
    if (config_.sockets.empty()) problem("socket", "at least one [[socket]] is needed");
    for (std::size_t i = 0; i < config_.sockets.size(); ++i) {
      SocketConfig& socket = config_.sockets[i];
      const std::string at = "socket[" + std::to_string(i) + "].";
      if (socket.grpc_path.empty()) {
        socket.grpc_path = derived_grpc_path(socket.path);
        derived(at + "grpc_path", at + "path");
      }
      check_socket_path(at + "path", socket.path);
      check_socket_path(at + "grpc_path", socket.grpc_path);
      if (!is_name(socket.tenant))
        problem(at + "tenant", "must be at most 63 letters, digits and ._:+-");
      if (std::find(socket.uids.begin(), socket.uids.end(), kNobodyUid) != socket.uids.end())
        problem(at + "uids", "65534 is whoever the kernel cannot name and never matches");
      if ((socket.mode & 06U) != 0 && socket.uids.empty())
        warning(at + "mode", "lets every local process attach");
    }
  }

  void check_admin_and_http() {
    check_socket_path("admin.socket", config_.admin.socket);
    if (!config_.admin.group.empty() && ::getgrnam(config_.admin.group.c_str()) == nullptr)
      problem("admin.group", "there is no group " + toml_quote(config_.admin.group));
    if (!is_numeric_address(config_.http.address))
      problem("http.address", "must be a numeric address");
    else if (!is_loopback(config_.http.address))
      warning("http.address", "shows metrics to everybody who reaches it");
  }

  // Who this node is by its certificate; empty without one.
  std::string check_peer_files() {
    const PeerListenConfig& peer = config_.peer;
    if (!wants_mtls(config_)) {
      if (!peer.certificate_file.empty() || !peer.key_file.empty() || !peer.ca_file.empty())
        warning("peer.certificate_file",
                "the files of mode mtls are not used: neither peer.mode nor the mode of one of "
                "[[peers]] is mtls");
      return {};
    }
    std::vector<Error> problems;
    const PeerFiles files = read_peer_files(peer, problems);
    for (const Error& error : problems) problem(error.field, error.message);
    if (!problems.empty()) return files.node.identity;
    if (const std::string doubt = doubt_of(files); !doubt.empty())
      warning("peer.ca_file", "does not vouch for peer.certificate_file (" + doubt +
                                  "): peers with the same file refuse this node");
    return files.node.identity;
  }

  void check_peer_listener() {
    const PeerListenConfig& peer = config_.peer;
    if (!peer.cluster_secret_file.empty()) {
      auto secret = read_secret_file(peer.cluster_secret_file);
      if (!secret) problem("peer.cluster_secret_file", secret.error().message);
      if (secret) wipe(*secret);
    }

    const auto listen = parse_host_port(peer.listen);
    if (!listen) {
      problem("peer.listen", listen.error().message);
      return;
    }
    if (!is_numeric_address(listen->host) && listen->host != "localhost")
      problem("peer.listen", "must be a numeric address with a port");
    if (peer.mode == PeerMode::kPlain && !is_loopback(listen->host) &&
        peer.cluster_secret_file.empty())
      problem("peer.listen", "mode plain off loopback needs peer.cluster_secret_file");
    check_advertise(*listen);
  }

  void check_advertise(const HostPort& listen) {
    const auto is_wildcard = [](std::string_view host) {
      return same_address(host, "0.0.0.0") || same_address(host, "::");
    };
    const std::string& text = config_.peer.advertise;
    if (text.empty()) {
      if (is_wildcard(listen.host))
        problem("peer.advertise", "must be given when peer.listen is a wildcard");
      return;
    }
    const auto advertise = parse_host_port(text);
    if (!advertise)
      problem("peer.advertise", advertise.error().message);
    else if (is_wildcard(advertise->host))
      problem("peer.advertise", "must not be a wildcard");
  }

  void check_peers() {
    std::set<std::string> identities;
    for (std::size_t i = 0; i < config_.peers.size(); ++i) {
      const PeerConfig& peer = config_.peers[i];
      const std::string at = "peers[" + std::to_string(i) + "].";
      if (!is_node_id(peer.identity))
        problem(at + "identity", "must be a node's id: letters, digits and ._:+-/");
      else if (!identities.insert(peer.identity).second)
        problem(at + "identity", toml_quote(peer.identity) + " stands twice");
      // A bad list has been told already.
      if (peer.addresses.empty() && places_.count(at + "addresses") == 0)
        problem(at + "addresses", "must name at least one address, network or host");
      if (peer.tenants.empty()) problem(at + "tenants", "must name at least one tenant");
      for (const std::string& tenant : peer.tenants)
        if (!is_name(tenant))
          problem(at + "tenants", toml_quote(tenant) + " is not a tenant's name");
      if (peer.mode != config_.peer.mode)
        warning(at + "mode",
                "is not peer.mode, so the peer can be dialled but cannot dial this node");
      if (needs_cluster_secret(peer) && config_.peer.cluster_secret_file.empty())
        problem(at + "addresses", "mode plain off loopback needs peer.cluster_secret_file");
    }
  }

  void check_arena() {
    const ArenaConfig& arena = config_.arena;
    check_arena_sizes("arena.", arena.bytes, arena.segment_bytes);
    check_holds_pieces("arena.", arena.bytes, arena.segment_bytes);
    check_arena_sizes("arena.device_", arena.device_bytes, arena.device_segment_bytes);
    // With kind auto a reason to go without one.
    if (!arena.on_device()) return;
    if (arena.device_bytes != 0)
      check_holds_pieces("arena.device_", arena.device_bytes, arena.device_segment_bytes);
    if (arena.device_bytes == 0) problem("arena.kind", "needs arena.device_bytes, which is 0");
    if (config_.gpu.enabled == GpuUse::kOff)
      problem("arena.kind", "needs a GPU, and gpu.enabled is \"off\"");
    if (config_.checks.kind != CheckKind::kNone)
      problem("arena.kind",
              "checks.kind is computed by the processor, which cannot read a GPU's "
              "memory: use pinned_host");
  }

  void check_mapped() {
    const MappedConfig& mapped = config_.mapped;
    const uint64_t segment = mapped.segment_bytes;
    if (mapped.host_bytes == 0 && mapped.device_bytes == 0) return;
    if (!std::has_single_bit(segment)) problem("mapped.segment_bytes", "must be a power of two");
    for (const auto& [key, bytes] : {std::pair("mapped.host_bytes", mapped.host_bytes),
                                     std::pair("mapped.device_bytes", mapped.device_bytes)})
      if (bytes % segment != 0)
        problem(key, "must be a multiple of mapped.segment_bytes (" + format_size(segment) + ")");
    if (std::bit_ceil(config_.engine.chunk_bytes) > segment)
      problem("engine.chunk_bytes",
              "does not fit into mapped.segment_bytes (" + format_size(segment) + ")");
    check_socket_path("mapped.socket", mapped.socket);
    if (mapped.device_bytes == 0) return;
    if (config_.gpu.enabled == GpuUse::kOff || config_.arena.kind == ArenaKind::kSharedHost)
      problem("mapped.device_bytes", "needs GPUs, which are not used");
    if (config_.checks.kind != CheckKind::kNone)
      problem("mapped.device_bytes",
              "checks.kind is computed by the processor, which cannot read a "
              "GPU's memory");
  }

  void check_arena_sizes(const std::string& at, uint64_t bytes, uint64_t segment) {
    if (!std::has_single_bit(segment))
      problem(at + "segment_bytes", "must be a power of two");
    else if (bytes % segment != 0)
      problem(at + "bytes",
              "must be a multiple of " + at + "segment_bytes (" + format_size(segment) + ")");
  }

  void check_holds_pieces(const std::string& at, uint64_t bytes, uint64_t segment) {
    const uint64_t region = std::bit_ceil(config_.engine.chunk_bytes);
    if (region > segment)
      problem("engine.chunk_bytes",
              "does not fit into " + at + "segment_bytes (" + format_size(segment) + ")");
    const uint64_t least = least_arena_bytes(config_);
    if (bytes < least)
      problem(at + "bytes", "must hold engine.staged_ahead + 2 pieces: " + format_size(least));
  }

  void check_rails() {
    RailsConfig& rails = config_.rails;
    if (rails.devices.empty()) problem("rails.devices", "must name at least one device");
    if (rails.transports.empty()) problem("rails.transports", "must name at least one transport");
    for (const std::string& device : rails.devices)
      if (!is_word(device, "._:-@", 63))
        problem("rails.devices", toml_quote(device) + " is no device");
    check_no_repeats("rails.devices", rails.devices);
    check_no_repeats("rails.transports", rails.transports);
    bool tcp = false;
    for (const std::string& transport : rails.transports) {
      tcp = tcp || transport == "tcp";
      if (transport != "tcp" && transport != "shm")
        problem("rails.transports",
                toml_quote(transport) + " is not served by this release (served: tcp, shm)");
    }
    const bool off_loopback = std::any_of(rails.devices.begin(), rails.devices.end(),
                                          [](const std::string& device) { return device != "lo"; });
    if (tcp && off_loopback && rails.port_range.any())
      problem("rails.port_range", "must be given for devices other than lo");
    const std::size_t ports =
        rails.port_range.any()
            ? 65535U
            : static_cast<std::size_t>(rails.port_range.last) + 1U - rails.port_range.first;
    const std::size_t tcp_rails = tcp ? rails.devices.size() * rails.connections : 0;
    // One more for the self-test's peer. UCX draws ports at random and gives up after some tries:
    // of 40 starts 14 failed with 2 ports, none with 20.
    if (tcp && ports <= tcp_rails)
      problem("rails.port_range",
              "must have more ports than there are tcp rails, which is rails.connections for each "
              "device: " +
                  std::to_string(tcp_rails));
    else if (tcp && ports < tcp_rails + 19)
      warning("rails.port_range",
              "is narrow: UCX draws ports at random and may find none; 20 more than there are tcp "
              "rails are enough");
    check_rail_count(tcp_rails);
    if (rails.restart_backoff > rails.restart_backoff_max)
      problem("rails.restart_backoff", "is longer than rails.restart_backoff_max");
    check_rails_binary();
    if (rails.seccomp == Seccomp::kOff)
      warning("rails.seccomp",
              "is off: whoever reaches a UCX port has all that the daemon's user may do");
  }

  // Rails by one device are asked for by rails.connections.
  void check_no_repeats(const char* key, std::vector<std::string> words) {
    std::sort(words.begin(), words.end());
    for (auto at = words.begin(); (at = std::adjacent_find(at, words.end())) != words.end();
         at = std::upper_bound(at, words.end(), *at))
      problem(key, "names " + toml_quote(*at) + " more than once");
  }

  void check_rail_count(std::size_t tcp_rails) {
    const RailsConfig& rails = config_.rails;
    const bool only_tcp =
        std::all_of(rails.transports.begin(), rails.transports.end(),
                    [](const std::string& transport) { return transport == "tcp"; });
    // Lanes join rails by their place in the list, over and over: beside others than tcp several
    // connections would join a rail to one of another transport, where the peer has fewer.
    if (rails.connections > 1 && !only_tcp)
      problem("rails.connections", "must be 1 unless rails.transports is tcp alone");
    const std::size_t count = tcp_rails + (only_tcp ? 0 : 1);
    if (count > kMaxRails)
      problem(rails.connections > 1 ? "rails.connections" : "rails.devices",
              "makes " + std::to_string(count) + " rails; " + std::to_string(kMaxRails) +
                  " are possible");
  }

  void check_rails_binary() {
    std::string& binary = config_.rails.binary;
    std::error_code error;
    if (!binary.empty()) {
      if (::access(binary.c_str(), X_OK) != 0)
        problem("rails.binary", toml_quote(binary) + " cannot be executed");
      return;
    }
    const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
    if (error) return;
    const std::filesystem::path here = self.parent_path();
    for (const auto& candidate :
         {here / "kvferry-rails", here.parent_path() / "libexec/kvferry/kvferry-rails",
          here.parent_path() / "lib/kvferry/kvferry-rails"}) {
      if (::access(candidate.c_str(), X_OK) != 0) continue;
      binary = candidate.string();
      derived("rails.binary", "beside kvferryd");
      return;
    }
  }

  void check_engine() {
    const EngineConfig& engine = config_.engine;
    if (engine.chunk_bytes % (4 * kKiB) != 0)
      problem("engine.chunk_bytes", "must be a multiple of 4KiB");
    const auto ordered = [&](const char* key, Duration value, const char* max_key, Duration max) {
      if (value > max) problem(key, std::string("is longer than ") + max_key);
    };
    ordered("engine.lease", engine.lease, "engine.lease_max", engine.lease_max);
    ordered("engine.wait_deadline", engine.wait_deadline, "engine.wait_deadline_max",
            engine.wait_deadline_max);
    // The engine keeps its books of leases and waits, too, for this long at most.
    ordered("engine.lease_max", engine.lease_max, "engine.transfer_deadline_max",
            engine.transfer_deadline_max);
    ordered("engine.wait_deadline_max", engine.wait_deadline_max, "engine.transfer_deadline_max",
            engine.transfer_deadline_max);
    ordered("engine.transfer_deadline", engine.transfer_deadline, "engine.transfer_deadline_max",
            engine.transfer_deadline_max);
    ordered("engine.lane_retry", engine.lane_retry, "engine.lane_retry_max", engine.lane_retry_max);
    if (engine.silence_limit < 2 * engine.heartbeat_interval)
      problem("engine.silence_limit", "must be at least twice engine.heartbeat_interval");
  }

  void check_rest() {
    if (config_.checks.kind < config_.checks.min_check)
      problem("checks.kind", "is less than checks.min_check asks of peers");
    if (config_.checks.kind == CheckKind::kGmac && config_.peer.cluster_secret_file.empty() &&
        !wants_mtls(config_))
      warning("checks.kind",
              "gmac guards against faults only: without mode mtls or peer.cluster_secret_file the "
              "links' keys are no secret");
    check_gpu();
  }

  void check_gpu() {
    if (config_.arena.kind == ArenaKind::kPinnedHost && config_.gpu.enabled == GpuUse::kOff)
      problem("arena.kind", "pinned_host needs a GPU, and gpu.enabled is \"off\"");
    if (config_.arena.kind == ArenaKind::kSharedHost && config_.gpu.enabled == GpuUse::kOn)
      problem("arena.kind", "GPUs copy to and from pinned_host memory only");
    if (config_.gpu.driver.empty()) problem("gpu.driver", "must name a library");
    const PoolsConfig& pools = config_.pools;
    if (pools.kinds.empty()) problem("pools.kinds", "must name at least one kind");
    if (pools.automatic()) return;
    for (const std::string& kind : pools.kinds) {
      const bool value = kind == "cuda_ipc" || kind == "cuda_fabric";
      if (kind == "auto")
        problem("pools.kinds", "\"auto\" stands alone");
      else if (kind != "host_shm" && kind != "cuda_vmm_fd" && !value)
        problem("pools.kinds", toml_quote(kind) +
                                   " is none of: auto, host_shm, cuda_vmm_fd, cuda_ipc, "
                                   "cuda_fabric");
      else if (kind != "host_shm" && config_.gpu.enabled == GpuUse::kOff)
        problem("pools.kinds", toml_quote(kind) + " needs a GPU, and gpu.enabled is \"off\"");
      else if (value && several_tenants(config_))
        problem("pools.kinds", toml_quote(kind) + " is for a single tenant");
    }
  }

  LoadedConfig& loaded_;
  Config& config_;
  Places& places_;
  const std::string& file_;
  std::set<std::string> socket_paths_;
};

}  // namespace

bool needs_cluster_secret(const PeerConfig& peer) {
  const bool local =
      std::all_of(peer.addresses.begin(), peer.addresses.end(), [](const AddressRule& rule) {
        return is_loopback(rule.host) && (!rule.numeric || rule.prefix_bits >= 8);
      });
  return peer.mode == PeerMode::kPlain && !local;
}

uint64_t least_arena_bytes(const Config& config) {
  return (config.engine.staged_ahead + uint64_t{2}) * std::bit_ceil(config.engine.chunk_bytes);
}

bool several_tenants(const Config& config) {
  return std::any_of(config.sockets.begin(), config.sockets.end(), [&](const SocketConfig& socket) {
    return socket.tenant != config.sockets.front().tenant;
  });
}

void check_config(LoadedConfig& loaded, const std::string& file) {
  Checker(loaded, file).run();
}

}  // namespace kvferry::ops
