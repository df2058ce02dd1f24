#include "daemon/node/daemon.h"

#include <sys/prctl.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <ctime>
#include <span>
#include <utility>

#include "daemon/base/crypto.h"
#include "daemon/base/huge_pages.h"
#include "daemon/base/mutex.h"
#include "daemon/copy/copy_pool.h"
#include "daemon/node/admin.h"
#include "daemon/node/arena_borrower.h"
#include "daemon/node/arena_lender.h"
#include "daemon/node/arena_setup.h"
#include "daemon/node/arenas.h"
#include "daemon/node/directory.h"
#include "daemon/node/engine_thread.h"
#include "daemon/node/gpu_setup.h"
#include "daemon/node/link_manager.h"
#include "daemon/node/numa_setup.h"
#include "daemon/node/peer_certificates.h"
#include "daemon/node/registry.h"
#include "daemon/node/settings.h"
#include "daemon/node/task_pool.h"
#include "daemon/ops/http.h"
#include "daemon/ops/log.h"
#include "daemon/ops/metrics.h"
#include "daemon/ops/reload.h"
#include "daemon/ops/version.h"
#include "daemon/ops/watchdog.h"
#include "daemon/rpc/admin_service.h"
#include "daemon/rpc/grpc_log.h"
#include "daemon/rpc/lifeline.h"
#include "daemon/rpc/peer_client.h"
#include "daemon/rpc/peer_service.h"
#include "daemon/rpc/worker_service.h"

namespace kvferry::node {
namespace {

// The peers' listener is bound before the link manager exists, as its port goes into tickets.
class LatePeerBackend final : public rpc::PeerBackend {
 public:
  void set(rpc::PeerBackend* backend) { backend_.store(backend, std::memory_order_release); }
  void challenge(const rpc::Caller& from,
                 std::function<void(Result<rpc::Random32>)> done) override {
    if (auto* backend = get())
      backend->challenge(from, std::move(done));
    else
      done(starting());
  }
  void handshake(const rpc::Caller& from, rpc::SignedHello hello,
                 std::function<void(Result<rpc::SignedHello>)> done) override {
    if (auto* backend = get())
      backend->handshake(from, std::move(hello), std::move(done));
    else
      done(starting());
  }
  void call(const rpc::Caller& from, rpc::LinkMethod method, rpc::LinkCall call,
            std::function<void(Result<rpc::LinkReply>)> done) override {
    if (auto* backend = get())
      backend->call(from, method, std::move(call), std::move(done));
    else
      done(starting());
  }

 private:
  rpc::PeerBackend* get() const { return backend_.load(std::memory_order_acquire); }
  static tl::unexpected<Error> starting() {
    return fail(Code::kUnavailable, "STARTING", "the daemon starts");
  }
  std::atomic<rpc::PeerBackend*> backend_{nullptr};
};

constexpr Duration kLookInterval = std::chrono::seconds(1);

// Strangers can repeat most of these lines without end.
void log_grpc_line(std::string_view line) {
  static Mutex mutex;
  static ops::LogLimiter limiter(8, std::chrono::minutes(1));
  MutexLock lock(mutex);
  if (limiter.allow(monotonic_now()))
    ops::log_warning("grpc",
                     {ops::field("line", line), ops::field("suppressed", limiter.suppressed())});
}

// "/run/kvferry/kvferry.sock": makes /run/kvferry if that is all that is missing.
Status make_parent(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos || slash == 0) return {};
  const std::string parent = path.substr(0, slash);
  if (::mkdir(parent.c_str(), 0755) != 0 && errno != EEXIST)
    return fail_errno("SOCKET_DIRECTORY", "mkdir(" + parent + ")", errno);
  return {};
}

// For one log line or error; a gRPC status holds little more.
std::string joined(const std::vector<std::string>& words, std::string_view between) {
  constexpr std::size_t kMaxBytes = 3000;
  std::string out;
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (out.size() + words[i].size() > kMaxBytes) {
      out.append(between).append("and ").append(std::to_string(words.size() - i)).append(" more");
      break;
    }
    out.append(out.empty() ? "" : between).append(words[i]);
  }
  return out;
}

// Keys and tokens lie in this process's memory: no core file of it, and no look from outside by its
// own user. Nor by a rails process that may open files, as shared memory and the CUDA driver ask
// for: /proc/PID/mem would be one.
void hide_memory() {
#if !defined(__SANITIZE_ADDRESS__)  // its search for leaks looks into the process
  ::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
#endif
}

// The daemon sets no filter of senders itself.
void tell_of_open_ports(const rails::RailsConfig& config) {
  const bool open = std::any_of(
      config.rails.begin(), config.rails.end(),
      [](const rails::RailSpec& rail) { return rail.transport == "tcp" && rail.device != "lo"; });
  if (!open) return;
  ops::log_info("UCX's ports take whoever reaches them: let the peers' nodes alone do so",
                {ops::field("ports", std::to_string(config.ucx.port_first) + "-" +
                                         std::to_string(config.ucx.port_last)),
                 ops::field("how", "deploy/nftables or a NetworkPolicy")});
}

// host of "host:port" or "[v6]:port", with its brackets.
std::string host_part(const std::string& address) {
  return address.substr(0, address.rfind(':'));
}

}  // namespace

// Members are destroyed from the last to the first: who is used stands above who uses it.
struct Daemon::Impl {
  ops::Config config;  // as at start
  std::unique_ptr<ops::RunningConfig> running;
  rpc::OpLimits limits;  // as at start
  BootId boot;
  std::unique_ptr<NumaPlan> numa;
  std::unique_ptr<Arenas> arenas;
  std::unique_ptr<ops::Metrics> metrics;
  ops::Watchdog watchdog;
  Gpu gpu;
  std::unique_ptr<copy::CopyPool> copies;
  std::unique_ptr<TaskPool> look_ups;
  std::unique_ptr<TaskPool> files;  // one thread: reloads and looks at certificates, in turn
  std::unique_ptr<TaskPool> compiles;
  std::unique_ptr<TaskPool> packer;
  std::unique_ptr<rpc::PeerDialer> dialer;
  LatePeerBackend late_peers;
  Mutex certificates_mutex;
  std::unique_ptr<PeerCertificates> certificates
      KVFERRY_GUARDED_BY(certificates_mutex);  // null: nothing is of mode mtls
  std::unique_ptr<ArenaLender> lender;         // null: nothing is lent
  std::unique_ptr<ArenaBorrower> borrower;     // null: nothing is borrowed
  std::unique_ptr<LinkManager> links;
  std::unique_ptr<Directory> directory;
  std::unique_ptr<EngineThread> engine;
  std::unique_ptr<Registry> registry;
  std::unique_ptr<Admin> admin;
  std::unique_ptr<rpc::PeerServer> peer_server;
  std::unique_ptr<rpc::Lifeline> lifeline;
  std::unique_ptr<rpc::WorkerServer> worker_server;
  std::unique_ptr<rpc::AdminServer> admin_server;
  std::unique_ptr<ops::HttpServer> http;

  Mutex mutex;
  CondVar drained_changed;
  bool drained KVFERRY_GUARDED_BY(mutex) = false;
  std::vector<std::function<void()>> when_drained KVFERRY_GUARDED_BY(mutex);
  bool ended KVFERRY_GUARDED_BY(mutex) = false;  // nobody tells of the drain any more
  ops::ConfigSources sources;
  std::atomic<bool> served{false};
  bool stopped = false;
  Time next_look{};  // at the certificates and the age of links
  std::atomic<bool> looking{false};

  Status make_arenas();
  void count_fallbacks();
  Status make_core();
  Status make_engine(std::unique_ptr<rails::RailsClient> rails, const std::string& advertise,
                     std::shared_ptr<const rpc::PeerTls> tls);
  Status share_arenas(const EventSink& sink);
  void export_sharing();
  Status make_listeners();
  void look_at_certificates();
  void export_certificates() KVFERRY_REQUIRES(certificates_mutex);
  Admin::Orders orders();
  void begin_drain(Duration limit, std::function<void()> done);
  // On the thread of `files`.
  Result<rpc::ReloadedInfo> reload();
  Result<rpc::ReloadedInfo> read_again();
  std::vector<rpc::ConfigValueInfo> config_values() const;
};

// Bounce memory, as the machine and the rails allow.
Status Daemon::Impl::make_arenas() {
  auto devices = find_gpus(config);
  numa = std::make_unique<NumaPlan>(
      NumaPlan::make(config, rails_config(config).rails, devices ? devices->get() : nullptr));
  auto made = Arenas::create(std::vector<uint64_t>(config.arena.bytes / config.arena.segment_bytes,
                                                   config.arena.segment_bytes),
                             numa->memory_binding());
  KVFERRY_RETURN_IF_ERROR(made);
  arenas = std::move(*made);
  auto opened = open_gpu(config, std::move(devices), *arenas, watchdog);
  KVFERRY_RETURN_IF_ERROR(opened);
  gpu = std::move(*opened);
  const auto ask_rails = [this] {
    return rails::query_capabilities(config.rails.binary, config.gpu.driver,
                                     std::chrono::seconds(15));
  };
  KVFERRY_RETURN_IF_ERROR(add_device_arenas(config, gpu, ask_rails, *arenas));
  KVFERRY_RETURN_IF_ERROR(add_mapped_arenas(config, gpu, *arenas));
  for (const Arenas::Arena& arena : arenas->all()) {
    uint64_t bytes = 0;
    for (const uint64_t segment : arena.segment_bytes) bytes += segment;
    ops::log_info(
        "arena",
        {ops::field("device", arena.choice.device), ops::field("kind", arena.choice.kind),
         ops::field("mapped", arena.mapped), ops::field("why", arena.choice.reason),
         ops::field("bytes", bytes), ops::field("in_huge_pages", arena.choice.huge_page_bytes)});
  }
  return {};
}

// What make_arenas() could not have as it would be fastest.
void Daemon::Impl::count_fallbacks() {
  using ops::Fallback;
  metrics->of(Fallback::kGpuUnused).add(gpu.unused);
  for (const Arenas::Arena& arena : arenas->all()) {
    uint64_t bytes = 0;
    for (const uint64_t segment : arena.segment_bytes) bytes += segment;
    // Smaller ones have no use for them.
    const bool host = arena.choice.device == "host" && bytes >= kHugePageBytes;
    if (host && arena.choice.huge_page_bytes < round_down(bytes, kHugePageBytes))
      metrics->of(Fallback::kSmallPages).add();
  }
  if (config.arena.kind != ops::ArenaKind::kAuto) return;
  for (const ops::GpuLabels& label : gpu.labels()) {
    const auto own = [&](const Arenas::Arena& arena) {
      return !arena.mapped && arena.choice.device == label.device;
    };
    if (std::none_of(arenas->all().begin(), arenas->all().end(), own))
      metrics->of(Fallback::kHostArena).add();
  }
}

// Memory, threads and the rails; the peers' listener for its port.
Status Daemon::Impl::make_core() {
  hide_memory();
  random_bytes(boot.bytes);
  KVFERRY_RETURN_IF_ERROR(make_arenas());

  rails::RailsConfig rails_settings = rails_config(config);
  for (std::size_t i = 0; i < rails_settings.rails.size(); ++i)
    rails_settings.rails[i].cpus = numa->rail_cpus(i);
  std::vector<ops::RailLabels> rail_labels;
  for (const rails::RailSpec& rail : rails_settings.rails)
    rail_labels.push_back({rail.transport, rail.device});
  std::vector<ops::ArenaLabels> arena_labels;
  for (const Arenas::Arena& arena : arenas->all())
    arena_labels.push_back({arena.choice.device, arena.choice.kind, arena.mapped});
  metrics = std::make_unique<ops::Metrics>(
      ops::BuildLabels{std::string(ops::version()), std::string(ops::commit()), ""},
      std::move(arena_labels), rail_labels, gpu.labels());
  count_fallbacks();
  metrics->last_reload_ok.set(1);
  metrics->last_read_at.set(::time(nullptr));
  if (gpu.counting) gpu.counting->metrics.store(metrics.get(), std::memory_order_release);

  tell_of_open_ports(rails_settings);
  auto segments = arenas->for_rails();
  KVFERRY_RETURN_IF_ERROR(segments);
  auto rails = rails::RailsClient::make(rails_settings, *segments);
  KVFERRY_RETURN_IF_ERROR(rails);

  copy::Options copy_options;
  copy_options.threads = config.copy.threads;
  copy_options.cpus = numa->copy_cpus();
  copies = std::make_unique<copy::CopyPool>(copy_options);
  look_ups = std::make_unique<TaskPool>("kvf-lookup", 2, 1 << 16);
  files = std::make_unique<TaskPool>("kvf-files", 1, 64);
  compiles = std::make_unique<TaskPool>("kvf-compile", 1, 1 << 17);
  packer = std::make_unique<TaskPool>("kvf-pack", 1, 1 << 16);
  std::shared_ptr<const rpc::PeerTls> tls;
  if (ops::wants_mtls(config)) {
    auto opened = PeerCertificates::open(config.peer);
    KVFERRY_RETURN_IF_ERROR(opened);
    tls = (*opened)->tls();
    MutexLock lock(certificates_mutex);
    certificates = std::move(*opened);
    export_certificates();
  }
  dialer = rpc::grpc_peer_dialer(tls);

  rpc::PeerServerConfig peer_config;
  peer_config.listen = config.peer.listen;
  if (config.peer.mode == ops::PeerMode::kMtls) peer_config.tls = tls;
  peer_config.on_answer = [this](Code code) { metrics->rpc_ended(code); };
  auto listener = rpc::PeerServer::start(std::move(peer_config), late_peers);
  KVFERRY_RETURN_IF_ERROR(listener);
  peer_server = std::move(*listener);
  const std::string advertise =
      !config.peer.advertise.empty()
          ? config.peer.advertise
          : host_part(config.peer.listen) + ":" + std::to_string(peer_server->port());
  return make_engine(std::move(*rails), advertise, std::move(tls));
}

Status Daemon::Impl::make_engine(std::unique_ptr<rails::RailsClient> rails,
                                 const std::string& advertise,
                                 std::shared_ptr<const rpc::PeerTls> tls) {
  const auto sink = [this](engine::Event event) { engine->post(std::move(event)); };
  LinkManagerConfig link_config;
  link_config.node = config.node.id;
  link_config.boot = boot;
  link_config.advertise = advertise;
  link_config.peers = config.peers;
  link_config.tls = std::move(tls);
  if (!config.peer.cluster_secret_file.empty()) {
    auto secret = ops::read_secret_file(config.peer.cluster_secret_file);
    KVFERRY_RETURN_IF_ERROR(secret);
    link_config.cluster_secret.assign(secret->begin(), secret->end());
    wipe(*secret);
  }
  link_config.chunk_bytes = config.engine.chunk_bytes;
  link_config.check = check_kind(config.checks.kind);
  link_config.min_check = check_kind(config.checks.min_check);
  // The processor makes them, and cannot read a GPU's memory.
  link_config.can_check = arenas->rails_use_host_only();
  link_config.renew_interval = config.peer.renew_interval;
  links = std::make_unique<LinkManager>(std::move(link_config), *dialer, *look_ups, sink);
  links->set_renewed_keys_sink([this](LinkId link, const link::LinkKeys& keys, bool seal_now) {
    engine->renew_keys(link, keys, seal_now);
  });

  KVFERRY_RETURN_IF_ERROR(share_arenas(sink));

  DirectoryConfig directory_config;
  directory_config.node = config.node.id;
  directory_config.advertise = advertise;
  directory = std::make_unique<Directory>(directory_config, *links, *look_ups, *compiles, sink);
  links->set_questions(directory.get());

  EngineThread::Parts parts;
  parts.engine = engine_config(config, boot, *arenas);
  parts.arenas = &arenas->segments();
  parts.rails = std::move(rails);
  parts.copies = copies.get();
  parts.queues = gpu.queues.get();
  parts.packer = packer.get();
  parts.directory = directory.get();
  parts.links = links.get();
  if (borrower) {
    parts.peer_arena = [this](const engine::PeerArena& arena) {
      return borrower->segments(arena.link, arena.arena);
    };
    parts.distrust = [this](const engine::PeerArena& arena) {
      borrower->distrust(arena.link, arena.arena);
    };
  }
  parts.metrics = metrics.get();
  parts.ticker = &watchdog.add("engine", config.watchdog.limit, monotonic_now());
  parts.on_drained = [this] {
    std::vector<std::function<void()>> waiting;
    {
      MutexLock lock(mutex);
      drained = true;
      waiting.swap(when_drained);
      drained_changed.notify_all();
    }
    for (const auto& done : waiting) done();
  };
  if (auto lines = rails::make_rails_environment(rails_config(config).ucx)) {
    for (const std::string& line : *lines) {
      const std::size_t equals = line.find('=');
      if (line.starts_with("UCX_"))
        parts.rails_settings.emplace_back(line.substr(0, equals), line.substr(equals + 1));
    }
  }
  parts.rails_settings.emplace_back("seccomp",
                                    config.rails.seccomp == ops::Seccomp::kOn ? "on" : "off");
  // The sockets' own limits of calls come first.
  for (const ops::SocketConfig& socket : config.sockets)
    parts.inbox_limit =
        std::max(parts.inbox_limit, static_cast<std::size_t>(socket.worker_limits.max_calls));
  engine = std::make_unique<EngineThread>(std::move(parts));
  RegistryConfig registry_config;
  for (const std::string& transport : config.rails.transports)
    registry_config.transports += (registry_config.transports.empty() ? "" : ",") + transport;
  registry_config.kinds = pool_kinds(config);
  registry_config.imports = gpu.imports.get();
  registry_config.arenas = arenas.get();
  registry_config.no_gpu = gpu.why_not;
  registry = std::make_unique<Registry>(*engine, *directory, *metrics, std::move(registry_config));
  Admin::Facts facts;
  facts.version = ops::version();
  facts.commit = ops::commit();
  facts.boot = boot;
  facts.peer_address = advertise;
  facts.certificate_expiry = &metrics->certificate_expiry;
  for (const Arenas::Arena& arena : arenas->all()) facts.arenas.push_back(arena.choice);
  facts.gpus = gpu.labels();
  facts.devices = gpu.devices;
  facts.numa = numa->describe(*arenas, copies->binding_errno());
  for (const rpc::NumaInfo& row : facts.numa)
    if (!row.problem.empty()) metrics->of(ops::Fallback::kNumaUnbound).add();
  for (std::size_t i = 0; i < rails_config(config).rails.size(); ++i)
    facts.rails_numa.push_back(numa->describe_rail(i));
  facts.lender = lender.get();
  admin = std::make_unique<Admin>(facts, config, *engine, *links, *registry, watchdog, orders());
  links->set_trace_answers(admin.get());
  late_peers.set(links.get());
  return engine->start();
}

void Daemon::Impl::look_at_certificates() {
  MutexLock lock(certificates_mutex);
  if (certificates == nullptr) return;
  if (certificates->look()) links->check_certificates();
  export_certificates();
}

void Daemon::Impl::export_certificates() {
  metrics->certificate_start.set(certificates->not_before());
  metrics->certificate_expiry.set(certificates->not_after());
  metrics->ca_start.set(certificates->last_root().not_before);
  metrics->ca_expiry.set(certificates->last_root().not_after);
}

// Mapped arenas: ours for peers, and theirs for us.
Status Daemon::Impl::share_arenas(const EventSink& sink) {
  auto lent = arenas->lent();
  KVFERRY_RETURN_IF_ERROR(lent);
  if (!lent->empty()) {
    ArenaLenderConfig lender_config;
    lender_config.host = this_host();
    lender_config.socket_path = config.mapped.socket;
    KVFERRY_RETURN_IF_ERROR(make_parent(config.mapped.socket));
    auto started = ArenaLender::start(std::move(lender_config), std::move(*lent), sink);
    KVFERRY_RETURN_IF_ERROR(started);
    lender = std::move(*started);
    links->set_arena_offers(lender.get());
    links->add_watch(*lender);
  }
  if (config.mapped.borrow) {
    ArenaBorrowerConfig borrower_config;
    borrower_config.host = this_host();
    borrower_config.devices = gpu.devices;
    borrower = std::make_unique<ArenaBorrower>(std::move(borrower_config), *links, sink);
    links->add_watch(*borrower);
  }
  return {};
}

void Daemon::Impl::export_sharing() {
  metrics->handshakes_failed.store(links->handshakes_failed());
  metrics->links_renewed.store(links->links_renewed());
  if (lender) {
    const ArenaLender::Stats stats = lender->stats();
    metrics->lent_connections.set(stats.connections);
    metrics->lent_refused.store(stats.refused);
  }
  if (!borrower) return;
  const ArenaBorrower::Stats stats = borrower->stats();
  metrics->borrowed_arenas.set(stats.arenas);
  metrics->borrowed_bytes.set_bytes(stats.bytes);
  metrics->of(ops::Fallback::kPeerArena)
      .store(stats.failed_ask + stats.failed_socket + stats.failed_device + stats.failed_import +
             stats.skipped_check + stats.failed_gather);
  using ops::BorrowFailure;
  metrics->of(BorrowFailure::kAsk).store(stats.failed_ask);
  metrics->of(BorrowFailure::kSocket).store(stats.failed_socket);
  metrics->of(BorrowFailure::kDevice).store(stats.failed_device);
  metrics->of(BorrowFailure::kImport).store(stats.failed_import);
  metrics->of(BorrowFailure::kChecked).store(stats.skipped_check);
}

Status Daemon::Impl::make_listeners() {
  rpc::LifelineConfig lifeline_config;
  lifeline_config.boot = boot;
  rpc::WorkerServerConfig worker_config;
  for (const ops::SocketConfig& socket : config.sockets) {
    KVFERRY_RETURN_IF_ERROR(make_parent(socket.path));
    rpc::LifelineSocket& line = lifeline_config.sockets.emplace_back();
    line.path = socket.path;
    line.mode = socket.mode;
    line.uids = socket.uids;
    line.tenant = socket.tenant;
    line.grpc_path = socket.grpc_path;
    line.max_workers = static_cast<uint32_t>(socket.max_workers);
    line.worker_limits = worker_limits(socket.worker_limits);
    line.limits = worker_limits(socket.limits);
    worker_config.sockets.push_back(
        {socket.grpc_path, socket.mode, lifeline_config.sockets.size() - 1});
  }
  set_limits(worker_config.limits, config.engine);
  worker_config.limits.timeline_words = lifeline_config.page.timeline_words;
  worker_config.limits.done_words = lifeline_config.page.done_words;
  worker_config.limits.cuda_events = gpu.watches_events();
  limits = worker_config.limits;
  worker_config.on_answer = [this](Code code) { metrics->rpc_ended(code); };

  // The gRPC socket first: a worker that has attached may call at once.
  auto server = rpc::WorkerServer::start(worker_config, *registry);
  KVFERRY_RETURN_IF_ERROR(server);
  worker_server = std::move(*server);
  auto line = rpc::Lifeline::start(lifeline_config, *registry);
  KVFERRY_RETURN_IF_ERROR(line);
  lifeline = std::move(*line);
  registry->set_lifeline(lifeline.get());

  KVFERRY_RETURN_IF_ERROR(make_parent(config.admin.socket));
  auto admin_listener = rpc::AdminServer::start(
      {config.admin.socket, config.admin.mode(), config.admin.group}, *admin, *metrics);
  KVFERRY_RETURN_IF_ERROR(admin_listener);
  admin_server = std::move(*admin_listener);

  ops::HttpHandlers handlers;
  handlers.metrics = [this] {
    engine->export_now(std::chrono::milliseconds(200));
    export_sharing();
    metrics->healthy.set(admin->health_now().ok() ? 1 : 0);
    metrics->ready.set(admin->ready_now().ok() ? 1 : 0);
    return metrics->text();
  };
  handlers.healthy = [this] { return admin->health_now(); };
  handlers.ready = [this] { return admin->ready_now(); };
  auto web = ops::HttpServer::start(config.http.address, config.http.port, std::move(handlers));
  KVFERRY_RETURN_IF_ERROR(web);
  http = std::move(*web);
  const std::string http_address = config.http.address + ":" + std::to_string(http->port());
  admin->set_http_address(http_address);
  ops::log_info(
      "listening",
      {ops::field("workers", config.sockets.front().path), ops::field("admin", config.admin.socket),
       ops::field("http", http_address), ops::field("peers", peer_server->port())});
  return {};
}

Daemon::Daemon(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Daemon::~Daemon() {
  stop();
}

Result<std::unique_ptr<Daemon>> Daemon::start(const ops::LoadedConfig& loaded,
                                              const ops::ConfigSources& sources) {
  rpc::take_grpc_log(log_grpc_line);
  auto impl = std::make_unique<Impl>();
  impl->config = loaded.config;
  impl->running = std::make_unique<ops::RunningConfig>(loaded);
  impl->sources = sources;
  std::unique_ptr<Daemon> daemon(new Daemon(std::move(impl)));
  KVFERRY_RETURN_IF_ERROR(daemon->impl_->make_core());
  KVFERRY_RETURN_IF_ERROR(daemon->impl_->make_listeners());
  ops::log_info("started",
                {ops::field("version", ops::version()), ops::field("commit", ops::commit()),
                 ops::field("node", loaded.config.node.id), ops::field("boot", daemon->impl_->boot),
                 ops::field("arena_bytes", daemon->impl_->arenas->total_bytes())});
  return daemon;
}

Daemon::Phase Daemon::phase() const {
  const EngineThread::RailsView rails = impl_->engine->rails_view();
  if (rails.ready) impl_->served.store(true);
  if (impl_->served.load()) return Phase::kServing;
  return rails.last_status == 78 ? Phase::kRefused : Phase::kStarting;
}

std::string Daemon::refusal() const {
  return impl_->engine->rails_view().last_exit;
}

bool Daemon::healthy() const {
  return impl_->admin->health_now().ok();
}

std::string Daemon::status_line() const {
  const ops::HealthReport ready = impl_->admin->ready_now();
  return ready.ok() ? "serving" : ready.reason();
}

void Daemon::turn() {
  Impl& d = *impl_;
  const Time now = monotonic_now();
  if (now < d.next_look) return;
  d.next_look = now + kLookInterval;
  d.links->renew_links(now);
  if (!ops::wants_mtls(d.config) || d.looking.exchange(true)) return;
  // Not on this thread: a file system that hangs would make the daemon look dead.
  if (!d.files->post([&d] {
        d.look_at_certificates();
        d.looking.store(false);
      }))
    d.looking.store(false);
}

Admin::Orders Daemon::Impl::orders() {
  Admin::Orders out;
  out.drain = [this](std::optional<Duration> asked, std::function<void()> done) {
    const Duration limit = asked ? *asked : running->config().drain.limit;
    ops::log_info("draining, as an operator wants", {ops::field("limit", limit)});
    begin_drain(limit, std::move(done));
  };
  out.config = [this] { return config_values(); };
  out.reload = [this](rpc::Reply<rpc::ReloadedInfo> done) {
    if (!files->post([this, done] { done(reload()); }))
      done(fail(Code::kResourceExhausted, "TOO_MANY_TASKS", "too many reloads wait"));
  };
  return out;
}

void Daemon::Impl::begin_drain(Duration limit, std::function<void()> done) {
  admin->set_draining();
  registry->drain();
  if (worker_server) worker_server->set_serving(false);
  bool over = false;
  {
    MutexLock lock(mutex);
    if (ended) return;  // which answers the call
    over = drained;
    if (!over) when_drained.push_back(std::move(done));
  }
  if (over)
    done();
  else
    engine->post(engine::Drain{monotonic_now() + limit});
}

Result<rpc::ReloadedInfo> Daemon::Impl::reload() {
  Result<rpc::ReloadedInfo> info = read_again();
  metrics->of(info ? ops::ReloadResult::kOk : ops::ReloadResult::kRefused).add();
  metrics->last_reload_ok.set(info ? 1 : 0);
  if (!info) return info;
  metrics->last_read_at.set(::time(nullptr));
  metrics->keys_waiting.set(static_cast<int64_t>(info->restart_keys.size()));
  return info;
}

// All or nothing: what follows the checks cannot fail.
Result<rpc::ReloadedInfo> Daemon::Impl::read_again() {
  const ops::LoadedConfig loaded = ops::load_config(sources);
  std::vector<std::string> wrong;
  for (const ops::ConfigProblem& problem : loaded.problems) {
    wrong.push_back(problem.to_string());
    ops::log_error("not reloaded", {ops::field("error", wrong.back())});
  }
  if (!loaded.ok()) return fail(Code::kInvalidArgument, "BAD_CONFIGURATION", joined(wrong, "; "));
  if (ops::wants_mtls(loaded.config) && !ops::wants_mtls(config)) {
    const Error error{Code::kFailedPrecondition,
                      "MODE_NEEDS_RESTART",
                      "mode mtls counts from the next start on",
                      {}};
    ops::log_error("not reloaded", {ops::field("error", error)});
    return tl::unexpected<Error>(error);
  }
  for (const ops::ConfigProblem& warning : loaded.warnings)
    ops::log_warning("configuration", {ops::field("warning", warning.to_string())});

  ops::RunningConfig::Change change = running->take(loaded);
  const ops::Config now = running->config();
  ops::log_level(now.log.level);
  ops::log_format(now.log.format);
  rpc::OpLimits calls = limits;
  set_limits(calls, now.engine);
  worker_server->set_limits(calls);
  look_at_certificates();
  links->set_peers(now.peers);

  if (!change.waiting.empty())
    ops::log_warning("changed, but counts from the next start on",
                     {ops::field("keys", joined(change.waiting, ", "))});
  ops::log_info("reloaded", {ops::field("peers", now.peers.size()),
                             ops::field("taken", joined(change.taken, ", "))});
  rpc::ReloadedInfo info;
  info.peers = static_cast<uint32_t>(now.peers.size());
  info.taken_keys = std::move(change.taken);
  info.restart_keys = std::move(change.waiting);
  return info;
}

std::vector<rpc::ConfigValueInfo> Daemon::Impl::config_values() const {
  std::vector<rpc::ConfigValueInfo> out;
  for (ops::RunningValue& value : running->values()) {
    rpc::ConfigValueInfo& row = out.emplace_back();
    row.key = value.path();
    row.value = std::move(value.value);
    row.origin = std::move(value.origin);
    row.reloadable = value.reloadable;
    row.next = std::move(value.next);
  }
  return out;
}

void Daemon::reload() {
  if (!impl_->files->post([d = impl_.get()] { (void)d->reload(); }))
    ops::log_error("not reloaded", {ops::field("error", "too many reloads wait")});
}

Duration Daemon::drain_limit() const {
  return impl_->running->config().drain.limit;
}

void Daemon::drain() {
  const Duration wait = drain_limit();
  const Time limit = monotonic_now() + wait;
  impl_->begin_drain(wait, [] {});
  // The engine fails what is left at the limit; a second more, in case it does not turn at all.
  const Time patience = limit + std::chrono::seconds(1);
  MutexLock lock(impl_->mutex);
  while (!impl_->drained && impl_->drained_changed.wait_until(impl_->mutex, patience)) {
  }
}

void Daemon::stop() {
  Impl& d = *impl_;
  if (std::exchange(d.stopped, true)) return;
  const Time soon = monotonic_now() + std::chrono::seconds(1);
  if (d.http) d.http->stop_async();
  if (d.links) d.links->stop();
  // Calls that wait for the engine are answered when it stops, so it goes before the servers.
  if (d.engine) d.engine->stop();
  {
    MutexLock lock(d.mutex);
    d.ended = true;
    d.when_drained.clear();  // answers those calls
  }
  if (d.gpu.queues)
    if (const Status closed = d.gpu.queues->close(soon); !closed)
      ops::log_warning("gpu copies dropped", {ops::field("error", closed.error())});
  if (d.copies) (void)d.copies->close(soon);
  if (d.borrower) d.borrower->stop();
  if (d.lender) d.lender->stop();
  if (d.lifeline) d.lifeline->stop();
  if (d.dialer) d.dialer->stop(soon);
  if (d.worker_server) d.worker_server->shutdown(soon);
  if (d.admin_server) d.admin_server->shutdown(soon);
  if (d.peer_server) d.peer_server->shutdown(soon);
  if (d.look_ups) d.look_ups->stop();
  if (d.files) d.files->stop();
  if (d.compiles) d.compiles->stop();
  if (d.packer) d.packer->stop();
  if (d.registry) d.registry->stop();
  if (d.http) d.http->join();
}

}  // namespace kvferry::node
