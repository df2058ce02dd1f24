// Every key of the configuration file, once: where it goes, what it may be, what it means. The
// reader, the environment, --set and the default file all follow this table.
#include <array>

#include "daemon/ops/config_values.h"

namespace kvferry::ops {
namespace {

const std::vector<Choice<PeerMode>> kPeerModes{{"plain", PeerMode::kPlain},
                                               {"mtls", PeerMode::kMtls}};

Section log_section(LogConfig& log) {
  return {"log",
          "What is told on stderr.",
          {{"level", "trace, debug, info, warning or error.",
            choice_binding<LogLevel>(log.level, {{"trace", LogLevel::kTrace},
                                                 {"debug", LogLevel::kDebug},
                                                 {"info", LogLevel::kInfo},
                                                 {"warning", LogLevel::kWarning},
                                                 {"error", LogLevel::kError}})},
           {"format", "text for people, json for programs.",
            choice_binding<LogFormat>(log.format,
                                      {{"text", LogFormat::kText}, {"json", LogFormat::kJson}})}}};
}

Section admin_section(AdminConfig& admin) {
  return {"admin",
          "The operator's socket, for kvferryctl.",
          {{"socket", "", text_binding(admin.socket)},
           {"group", "A group whose members may use it too. Empty: the daemon's own user only.",
            text_binding(admin.group)}}};
}

Section http_section(HttpConfig& http) {
  return {
      "http",
      "Plain HTTP: /metrics for Prometheus, /healthz and /readyz for probes. Says nothing secret,\n"
      "asks for no password: keep it off networks that strangers reach.",
      {{"address", "A numeric address.", text_binding(http.address)},
       {"port", "0 takes any free port and tells it in the log.",
        count_binding<uint16_t>(http.port, 0, 65535)}}};
}

Section peer_section(PeerListenConfig& peer) {
  return {
      "peer",
      "Where other daemons knock.",
      {{"listen", "host:port; port 0 takes any free one.", text_binding(peer.listen)},
       {"advertise",
        "host:port that peers dial. Empty: the address listened on, which then must not be a\n"
        "wildcard.",
        text_binding(peer.advertise)},
       {"mode",
        "How peers that dial this node must come. plain: no encryption; on loopback freely,\n"
        "elsewhere only with a cluster secret. mtls: both sides show a certificate.",
        choice_binding<PeerMode>(peer.mode, kPeerModes)},
       {"cluster_secret_file",
        "For mode plain: a file with 16 bytes to 4 KiB that all nodes share, readable by the "
        "daemon's\n"
        "user only; link keys derive from it. \"head -c 32 /dev/urandom | base64\" makes a "
        "good one.",
        text_binding(peer.cluster_secret_file)},
       {"certificate_file",
        "For mode mtls, PEM: this node's certificate, and behind it those that lead to a root. "
        "Its\n"
        "one URI name (spiffe://...), else its one DNS name, is this node's id. The three "
        "files are\n"
        "looked at every second, and new ones are in force for connections from then on.",
        text_binding(peer.certificate_file)},
       {"key_file", "Its key, without a password, readable by the daemon's user only.",
        text_binding(peer.key_file)},
       {"ca_file", "The certificates of the authorities that vouch for peers.",
        text_binding(peer.ca_file)},
       {"renew_interval",
        "How old the keys of a link may become before its two daemons shake hands again, with\n"
        "which each proves once more who it is. The smaller one of the two counts. A link whose\n"
        "handshakes fail for a quarter longer, and for ten seconds at least, is ended.",
        duration_binding(peer.renew_interval, seconds(1), hours(24))}}};
}

Section arena_section(ArenaConfig& arena) {
  return {
      "arena",
      "Bounce memory: all that peers can ever write into.",
      {{"bytes", "All of it is taken at start and nothing is added later.",
        size_binding(arena.bytes, 1 * kMiB, 1024 * kGiB)},
       {"segment_bytes",
        "The arena is registered with the network in pieces of this size. A power of two that\n"
        "divides the arena.",
        size_binding(arena.segment_bytes, 64 * kKiB, 1024 * kGiB)},
       {"kind",
        "Through which memory the pages of GPUs go. shared_host: no GPU is used. pinned_host: "
        "GPUs\n"
        "copy to and from host memory. fabric_vmm, device_vmm, cuda_malloc: each GPU has an arena\n"
        "in its own memory, which the UCX of the rails must be able to use. A kind that this\n"
        "machine lacks is an error. auto takes the first of these three that works where a rail\n"
        "reads a GPU's memory by itself; tcp and shm do not, so with them it is pinned_host where\n"
        "there is a GPU, else shared_host. What was chosen, and why, is logged and shown.",
        choice_binding<ArenaKind>(arena.kind, {{"auto", ArenaKind::kAuto},
                                               {"shared_host", ArenaKind::kSharedHost},
                                               {"pinned_host", ArenaKind::kPinnedHost},
                                               {"fabric_vmm", ArenaKind::kFabricVmm},
                                               {"device_vmm", ArenaKind::kDeviceVmm},
                                               {"cuda_malloc", ArenaKind::kCudaMalloc}})},
       {"device_bytes",
        "Of an arena in a GPU's memory, on each GPU, all of it taken at start. 0: none.",
        size_binding(arena.device_bytes, 0, 1024 * kGiB)},
       {"device_segment_bytes", "As segment_bytes.",
        size_binding(arena.device_segment_bytes, 64 * kKiB, 1024 * kGiB)},
       {"device_share",
        "The part of what is free on the GPU at start that device_bytes may be. More is an error,\n"
        "with kind auto a reason to go without.",
        fraction_binding(arena.device_share)}}};
}

Section mapped_section(MappedConfig& mapped) {
  return {
      "mapped",
      "Landing memory beside the arena for peers that can reach it by load and store: daemons of\n"
      "this machine, and through fabric handles those of the same NVLink domain. They gather\n"
      "straight into it, which saves the way over a rail. It is lent to all of [peers] alike, and\n"
      "whoever has it can read and write what the others bring; pages stay out of reach.",
      {{"host_bytes",
        "For pages of the host, and of GPUs without memory of their own below. 0: none.",
        size_binding(mapped.host_bytes, 0, 1024 * kGiB)},
       {"device_bytes", "On each GPU, for its pages. 0: none.",
        size_binding(mapped.device_bytes, 0, 1024 * kGiB)},
       {"segment_bytes",
        "What is lent is lent in pieces of this size. A power of two that divides both.",
        size_binding(mapped.segment_bytes, 64 * kKiB, 1024 * kGiB)},
       {"device_kind",
        "fabric_vmm, which other machines can reach, device_vmm, cuda_malloc, or auto: the first\n"
        "of these that works. arena.device_share holds here, too.",
        choice_binding<ArenaKind>(mapped.device_kind, {{"auto", ArenaKind::kAuto},
                                                       {"fabric_vmm", ArenaKind::kFabricVmm},
                                                       {"device_vmm", ArenaKind::kDeviceVmm},
                                                       {"cuda_malloc", ArenaKind::kCudaMalloc}})},
       {"socket", "Where daemons of this machine and this user get the descriptors.",
        text_binding(mapped.socket)},
       {"borrow", "Whether this daemon writes into what its peers lend.",
        flag_binding(mapped.borrow)}}};
}

Section gpu_section(GpuConfig& gpu) {
  return {
      "gpu",
      "Workers' memory on GPUs.",
      {{"enabled", "auto: if there is one. on: a machine without is an error. off.",
        choice_binding<GpuUse>(
            gpu.enabled, {{"auto", GpuUse::kAuto}, {"on", GpuUse::kOn}, {"off", GpuUse::kOff}})},
       {"driver", "The CUDA driver's library, by name or path.", text_binding(gpu.driver)},
       {"streams", "Copies that a device may carry out side by side.",
        count_binding<uint32_t>(gpu.streams, 1, 32)}}};
}

Section rails_section(RailsConfig& rails) {
  return {
      "rails",
      "The network side: a process of its own, one UCX worker for each rail.",
      {{"devices", "Network interfaces by name.", texts_binding(rails.devices)},
       {"transports", "tcp, or shm between daemons of one machine.",
        texts_binding(rails.transports)},
       {"connections",
        "How many rails tcp has on each device, each with connections, a UCX worker and a thread\n"
        "of its own. 1 is right unless the network is faster than one connection.",
        count_binding<uint32_t>(rails.connections, 1, 8)},
       {"port_range",
        "\"first-last\": the TCP ports that UCX may listen on. Anybody who reaches one owns the\n"
        "rails process, so firewall them; a must for devices other than lo.",
        port_range_binding(rails.port_range)},
       {"spin", "How long a rail polls before it sleeps until something arrives.",
        duration_binding(rails.spin, Duration(0), seconds(1))},
       {"segment_bytes", "UCX's TCP segment. Larger ones cost memory and gain speed.",
        size_binding(rails.segment_bytes, 8 * kKiB, 16 * kMiB)},
       {"binary", "The kvferry-rails program. Empty: the one beside kvferryd.",
        text_binding(rails.binary)},
       {"seccomp",
        "on: once it is ready the rails process has only the system calls that rails need, and\n"
        "dies of any other; a kernel without seccomp is an error. off.",
        choice_binding<Seccomp>(rails.seccomp, {{"on", Seccomp::kOn}, {"off", Seccomp::kOff}})},
       {"restart_backoff",
        "The wait before a dead rails process is started again, doubled each\n"
        "time up to the maximum.",
        duration_binding(rails.restart_backoff, milliseconds(1), minutes(1))},
       {"restart_backoff_max", "",
        duration_binding(rails.restart_backoff_max, milliseconds(1), minutes(10))}}};
}

std::vector<Key> engine_timer_keys(EngineConfig& engine) {
  const auto limit = [](Duration& target) {
    return duration_binding(target, milliseconds(1), hours(24));
  };
  return {
      {"lease",
       "How long a sender's pages are held for a receiver that has not come: the value for\n"
       "calls that name none, and the longest that may be asked for.",
       limit(engine.lease)},
      {"lease_max", "", limit(engine.lease_max)},
      {"wait_deadline", "From Receive until the first slice is announced; default and longest.",
       limit(engine.wait_deadline)},
      {"wait_deadline_max", "", limit(engine.wait_deadline_max)},
      {"transfer_deadline",
       "From a transfer's first activity to its end; default and longest. The longest lease and\n"
       "the longest wait_deadline must not be longer than the longest of these.",
       limit(engine.transfer_deadline)},
      {"transfer_deadline_max", "", limit(engine.transfer_deadline_max)},
      {"heartbeat_interval",
       "A sign of life on every lane this often; silence for the limit takes\n"
       "the lane down, silence on all lanes the link.",
       duration_binding(engine.heartbeat_interval, milliseconds(10), minutes(1))},
      {"silence_limit", "", duration_binding(engine.silence_limit, milliseconds(50), minutes(10))},
      {"lane_retry",
       "The wait before a lane that went down is tried again, doubled each time up to\n"
       "the maximum.",
       limit(engine.lane_retry)},
      {"lane_retry_max", "", limit(engine.lane_retry_max)},
      {"ready_timeout", "How long data that has landed waits until its destination is ready.",
       limit(engine.ready_timeout)},
      {"landing_timeout",
       "A chunk that is slower than this, and slower than min_rate, takes its lane down.",
       limit(engine.landing_timeout)},
      {"min_rate", "Bytes a second.", size_binding(engine.min_rate, 1, 1024 * kGiB)},
  };
}

Section engine_section(EngineConfig& engine) {
  Section section{
      "engine",
      "Transfers: pieces, credits and timers. Every wait ends by one of these limits.",
      {{"chunk_bytes",
        "The largest piece on the wire, a multiple of 4KiB; two daemons use the\n"
        "smaller of theirs.",
        size_binding(engine.chunk_bytes, 4 * kKiB, 256 * kMiB)},
       {"leg_credits", "Pieces in flight between one sender rank and one receiver rank.",
        count_binding<uint32_t>(engine.leg_credits, 1, 64)},
       {"staged_ahead", "Pieces gathered before the receiver has granted room for them.",
        count_binding<uint32_t>(engine.staged_ahead, 0, 1024)},
       {"max_receivers", "The most receivers that one transfer may be sent to.",
        count_binding<uint32_t>(engine.max_receivers, 1, 4096)},
       {"packed_bytes",
        "Memory for packed copies, beside the arena and taken only while they last; beyond it a\n"
        "Send that asks for one is refused. 0: none.",
        size_binding(engine.packed_bytes, 0, 1024 * kGiB)},
       {"passed_over_limit",
        "A transfer that waits for room is overtaken by at most so many grants.",
        count_binding<uint32_t>(engine.passed_over_limit, 1, 1'000'000)}}};
  for (Key& key : engine_timer_keys(engine)) section.keys.push_back(std::move(key));
  return section;
}

Section checks_section(ChecksConfig& checks) {
  const std::vector<Choice<CheckKind>> kinds{
      {"none", CheckKind::kNone}, {"xxh3", CheckKind::kXxh3}, {"gmac", CheckKind::kGmac}};
  return {"checks",
          "A check of every piece, made and compared by the daemons' own processes.",
          {{"kind",
            "none; xxh3: a checksum, against faults of memory and network; gmac: a keyed one, also "
            "against who can change bytes on the way, which is worth as much as the secrecy of "
            "the link's keys: mode mtls, or a cluster secret.",
            choice_binding<CheckKind>(checks.kind, kinds)},
           {"min_check", "A peer that offers less is refused.",
            choice_binding<CheckKind>(checks.min_check, kinds)}}};
}

bool is_upper_key(std::string_view key) {
  if (key.empty() || key.size() > 64) return false;
  for (const char c : key)
    if (!((c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_')) return false;
  return true;
}

}  // namespace

std::vector<Section> config_schema(Config& config) {
  std::vector<Section> out;
  out.push_back({"node",
                 "This machine.",
                 {{"id",
                   "The name that peers know this node by. Empty: with mtls the certificate's "
                   "identity, which is\n"
                   "the only one then; else the host name.",
                   text_binding(config.node.id)}}});
  out.push_back(log_section(config.log));
  out.push_back(admin_section(config.admin));
  out.push_back(http_section(config.http));
  out.push_back(peer_section(config.peer));
  out.push_back(arena_section(config.arena));
  out.push_back(mapped_section(config.mapped));
  out.push_back(rails_section(config.rails));
  out.push_back(engine_section(config.engine));
  out.push_back({"copy",
                 "Gather and scatter in host memory.",
                 {{"threads", "0: one a core, at most 8.",
                   count_binding<uint32_t>(config.copy.threads, 0, 256)}}});
  out.push_back(gpu_section(config.gpu));
  out.push_back(
      {"numa",
       "Machines with several NUMA nodes.",
       {{"bind",
         "auto: the arena is taken from the node that the rails' devices are on, else the GPUs',\n"
         "page by page in turn where that is more than one or none is known; each rail's thread\n"
         "stays on the processors of its device's node, copy threads on those of the arena's\n"
         "nodes. off: all of it is left to the kernel.",
         choice_binding<NumaBind>(config.numa.bind,
                                  {{"auto", NumaBind::kAuto}, {"off", NumaBind::kOff}})}}});
  out.push_back(checks_section(config.checks));
  out.push_back({"drain",
                 "Stopping.",
                 {{"limit", "How long running transfers may go on after SIGTERM.",
                   duration_binding(config.drain.limit, Duration(0), hours(24))}}});
  out.push_back({"shares",
                 "The part of an arena's room for landing, and of that for staging, that one of "
                 "them may hold\n"
                 "while another waits: a worker, or all workers of a tenant; and what comes from "
                 "or goes to one\n"
                 "peer. Rounded up to whole chunks. What waits goes ahead of who has more and "
                 "takes what that\n"
                 "one has not begun to use; 1 turns a share off.",
                 {{"worker_share", "", fraction_binding(config.shares.worker_share)},
                  {"peer_share", "", fraction_binding(config.shares.peer_share)}}});
  out.push_back({"pools",
                 "What memory workers may share with the daemon.",
                 {{"kinds",
                   "\"auto\": all that this machine can. Else a list of host_shm, cuda_vmm_fd, "
                   "cuda_ipc and\n"
                   "cuda_fabric, each of which it then must be able to. Handles of the last two "
                   "are values that\n"
                   "anybody may repeat who has read one: they are refused where there are several "
                   "tenants.",
                   texts_binding(config.pools.kinds)}}});
  out.push_back({"watchdog",
                 "Noticing threads that stopped.",
                 {{"limit", "A thread silent for so long makes the daemon unhealthy.",
                   duration_binding(config.watchdog.limit, milliseconds(100), hours(1))}}});
  return out;
}

Section socket_schema(SocketConfig& socket) {
  constexpr uint64_t kOne = 1, kMost = 1U << 20;
  const auto pool_bytes = [](SocketLimits& limits) {
    return size_binding(limits.max_pool_bytes, 1 * kMiB, 1024 * 1024 * kGiB);
  };
  return {
      "socket",
      "Where workers attach; may stand several times. The socket, not the worker, decides the "
      "tenant:\n"
      "names, limits and reuse are kept apart between tenants.",
      {{"path", "The lifeline.", text_binding(socket.path)},
       {"grpc_path", "The calls. Empty: path with \".grpc\" behind it.",
        text_binding(socket.grpc_path)},
       {"mode", "Of both socket files.", mode_binding(socket.mode)},
       {"uids", "User ids that may attach. Empty: whoever the file's mode lets in.",
        uids_binding(socket.uids)},
       {"tenant", "", text_binding(socket.tenant)},
       {"limits.max_workers",
        "What all workers of this socket may hold together, each with what others leave it. "
        "Beyond:\n"
        "SOCKET_LIMIT.",
        count_binding(socket.max_workers, kOne, kMost >> 4)},
       {"limits.max_transfers", "", count_binding(socket.limits.max_transfers, kOne, kMost)},
       {"limits.max_pools", "", count_binding(socket.limits.max_pools, kOne, kMost)},
       {"limits.max_pool_bytes", "", pool_bytes(socket.limits)},
       {"limits.max_descriptors", "", count_binding(socket.limits.max_descriptors, kOne, kMost)},
       {"limits.max_calls", "Without an answer yet.",
        count_binding(socket.limits.max_calls, kOne, kMost)},
       {"limits.max_claims", "Claims, and declines for as long as they are remembered.",
        count_binding(socket.limits.max_claims, kOne, kMost)},
       {"limits.max_reservations", "Of room in the arena: waiting, granted, and in use.",
        count_binding(socket.limits.max_reservations, kOne, kMost)},
       {"worker_limits.max_transfers",
        "What each of them may hold. Its status table has a place for each transfer.",
        count_binding(socket.worker_limits.max_transfers, kOne, kMost)},
       {"worker_limits.max_pools", "", count_binding(socket.worker_limits.max_pools, kOne, kMost)},
       {"worker_limits.max_pool_bytes", "", pool_bytes(socket.worker_limits)},
       {"worker_limits.max_descriptors", "",
        count_binding(socket.worker_limits.max_descriptors, kOne, kMost)},
       {"worker_limits.max_calls", "",
        count_binding(socket.worker_limits.max_calls, kOne, kMost)}}};
}

Section peer_schema(PeerConfig& peer) {
  return {
      "peers",
      "A node that may be dialled and may dial this one; may stand several times. Without any,\n"
      "the daemon talks to nobody.",
      {{"identity",
        "The node's id. For mode mtls what its certificate says: its one URI name, else its one "
        "DNS\n"
        "name in small letters.",
        text_binding(peer.identity)},
       {"addresses",
        "Where it may be: addresses, networks or host names, each with or without a port.",
        addresses_binding(peer.addresses)},
       {"tenants", "The tenants that it may speak for.", texts_binding(peer.tenants)},
       {"mode",
        "How it is dialled, and how it must come, which is this node's [peer] mode or never. "
        "plain\n"
        "or mtls; nothing else is tried.",
        choice_binding<PeerMode>(peer.mode, kPeerModes)}}};
}

std::string refuse_ucx(std::string_view key, std::string_view value) {
  // What the daemon's safety rests on is proven at start by effect and cannot be set here.
  static constexpr std::array<std::string_view, 15> kOurs{
      "PROTO_ENABLE", "TLS",         "NET_DEVICES", "SHM_DEVICES",    "ACC_DEVICES",
      "SELF_DEVICES", "DEBUG_SIGNO", "VFS_ENABLE",  "TCP_PUT_ENABLE", "TCP_PORT_RANGE",
      "RNDV_SCHEME",  "RNDV_THRESH", "MODULE_DIR",  "MODULES",        "WARN_UNUSED_ENV_VARS"};
  static constexpr std::array<std::string_view, 5> kOurPrefixes{"LOG_FILE", "PROFILE_", "STATS_",
                                                                "TCP_CM_", "GDB_"};
  if (!is_upper_key(key)) return "is not a UCX setting: capital letters, digits and underscores";
  if (key.substr(0, 4) == "UCX_") return "stands here without the UCX_ in front";
  if (value.size() > 256) return "is longer than 256 bytes";
  for (const char c : value)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) return "holds a control character";
  if (key == "TCP_TX_SEG_SIZE" || key == "TCP_RX_SEG_SIZE") return "is set by rails.segment_bytes";
  bool ours = key.find("ERR") != std::string_view::npos;  // error handling, in all its forms
  for (const std::string_view name : kOurs) ours = ours || key == name;
  for (const std::string_view prefix : kOurPrefixes)
    ours = ours || key.substr(0, prefix.size()) == prefix;
  return ours ? "is set by the daemon and cannot be overridden" : "";
}

}  // namespace kvferry::ops
