#include "daemon/ops/metrics.h"

#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "daemon/ops/process_stats.h"

namespace kvferry::ops {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

constexpr double kNanosecond = 1e-9;

// 50 us to 30 s.
std::vector<uint64_t> duration_bounds() {
  std::vector<uint64_t> out;
  for (const uint64_t us : {50ULL, 100ULL, 250ULL, 500ULL, 1'000ULL, 2'500ULL, 5'000ULL, 10'000ULL,
                            25'000ULL, 50'000ULL, 100'000ULL, 250'000ULL, 500'000ULL, 1'000'000ULL,
                            2'500'000ULL, 5'000'000ULL, 10'000'000ULL, 30'000'000ULL})
    out.push_back(us * 1000);
  return out;
}

// 5 us to 1 s.
std::vector<uint64_t> launch_bounds() {
  std::vector<uint64_t> out;
  for (const uint64_t us : {5ULL, 10ULL, 20ULL, 50ULL, 100ULL, 200ULL, 500ULL, 1'000ULL, 2'000ULL,
                            5'000ULL, 10'000ULL, 50'000ULL, 200'000ULL, 1'000'000ULL})
    out.push_back(us * 1000);
  return out;
}

// 64 KiB to 64 GiB in powers of four.
std::vector<uint64_t> size_bounds() {
  std::vector<uint64_t> out;
  for (uint64_t bytes = 64 * 1024; bytes <= 64ULL << 30; bytes *= 4) out.push_back(bytes);
  return out;
}

template <std::size_t N>
using Words = std::array<const char*, N>;

constexpr Words<kTransferRoles> kRoleWords{"send", "receive"};
constexpr Words<kTransferOutcomes> kOutcomeWords{"done", "failed", "cancelled"};
constexpr Words<kByteDirections> kDirectionWords{"sent", "received", "local"};
constexpr Words<kChunkEvents> kChunkWords{"gathered", "offered", "refused", "acked",     "requeued",
                                          "accepted", "dropped", "landed",  "scattered", "corrupt",
                                          "written",  "mapped",  "shared"};
constexpr Words<kBorrowFailures> kBorrowFailureWords{"ask", "socket", "device", "import",
                                                     "checked"};
constexpr Words<kReloadResults> kReloadWords{"ok", "refused"};
constexpr Words<kEvidences> kEvidenceWords{"drained", "process", "operator"};
constexpr Words<kCreditEvents> kCreditWords{"granted", "spent", "withdrawn"};
constexpr Words<kCopyKinds> kCopyWords{"gather", "scatter", "fused", "clear", "pack"};
constexpr Words<kRegionStates> kRegionWords{"free",       "granted",     "landing", "landed",
                                            "scattering", "quarantined", "staging"};
constexpr Words<kStages> kStageWords{"wait", "gather", "wire", "scatter"};
constexpr Words<kDropCauses> kDropWords{"malformed",    "bad_tag",   "unknown_link", "old_epoch",
                                        "unknown_pull", "duplicate", "late",         "protocol",
                                        "proof",        "limit",     "queue_full"};
constexpr Words<kFallbacks> kFallbackWords{"gpu_unused",   "host_arena", "small_pages",
                                           "numa_unbound", "peer_arena", "mapped_arena"};
constexpr Words<kGpuCopyKinds> kGpuCopyWords{"gather", "scatter", "transfer", "clear"};
constexpr Words<kLaneStates> kLaneWords{"up", "down"};

using Labels = std::vector<ClientMetric::Label>;

double as_double(uint64_t value) {
  return static_cast<double>(value);
}

// One family under construction.
class Family {
 public:
  Family(const char* name, const char* help, MetricType type) {
    family_.name = name;
    family_.help = help;
    family_.type = type;
  }
  Family& add(Labels labels, double value) {
    ClientMetric metric;
    metric.label = std::move(labels);
    if (family_.type == MetricType::Counter)
      metric.counter.value = value;
    else
      metric.gauge.value = value;
    family_.metric.push_back(std::move(metric));
    return *this;
  }
  Family& add(Labels labels, const Histogram& histogram) {
    const Histogram::Snapshot snapshot = histogram.snapshot();
    ClientMetric metric;
    metric.label = std::move(labels);
    metric.histogram.sample_count = snapshot.count;
    metric.histogram.sample_sum = snapshot.sum;
    for (std::size_t i = 0; i < snapshot.cumulative.size(); ++i)
      metric.histogram.bucket.push_back(
          {snapshot.cumulative[i], i < snapshot.bounds.size()
                                       ? snapshot.bounds[i]
                                       : std::numeric_limits<double>::infinity()});
    family_.metric.push_back(std::move(metric));
    return *this;
  }
  template <std::size_t N>
  Family& add_each(const char* label, const Words<N>& words,
                   const std::array<Counter, N>& counters) {
    for (std::size_t i = 0; i < N; ++i) add({{label, words[i]}}, as_double(counters[i].value()));
    return *this;
  }
  MetricFamily done() { return std::move(family_); }

 private:
  MetricFamily family_;
};

}  // namespace

Histogram::Histogram(std::vector<uint64_t> bounds, double scale)
    : bounds_(std::move(bounds)), scale_(scale) {}

void Histogram::observe(uint64_t value) {
  const auto bucket = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  counts_.at(static_cast<std::size_t>(bucket)).fetch_add(1, std::memory_order_relaxed);
  sum_.fetch_add(value, std::memory_order_relaxed);
}

Histogram::Snapshot Histogram::snapshot() const {
  Snapshot out;
  for (const uint64_t bound : bounds_) out.bounds.push_back(as_double(bound) * scale_);
  for (std::size_t i = 0; i <= bounds_.size(); ++i) {
    out.count += counts_.at(i).load(std::memory_order_relaxed);
    out.cumulative.push_back(out.count);
  }
  out.sum = as_double(sum_.load(std::memory_order_relaxed)) * scale_;
  return out;
}

// Turns the numbers into families at each scrape.
class Metrics::Collector {
 public:
  explicit Collector(const Metrics& metrics) : m_(metrics) {}

  std::vector<MetricFamily> collect() {
    add_transfers();
    add_data_path();
    add_arenas();
    add_gpus();
    add_rails_and_links();
    add_workers_and_calls();
    add_daemon();
    add_process();
    return std::move(out_);
  }

 private:
  void counter(const char* name, const char* help, uint64_t value) {
    out_.push_back(Family(name, help, MetricType::Counter).add({}, as_double(value)).done());
  }
  void gauge(const char* name, const char* help, double value) {
    out_.push_back(Family(name, help, MetricType::Gauge).add({}, value).done());
  }
  void gauge(const char* name, const char* help, const Gauge& value) {
    gauge(name, help, static_cast<double>(value.value()));
  }
  template <std::size_t N>
  void counters(const char* name, const char* help, const char* label, const Words<N>& words,
                const std::array<Counter, N>& values) {
    out_.push_back(Family(name, help, MetricType::Counter).add_each(label, words, values).done());
  }

  void add_transfers() {
    counters("kvferry_transfers_started_total", "Transfers that a worker asked for.", "role",
             kRoleWords, m_.opened_);
    Family ended("kvferry_transfers_ended_total", "Transfers that came to their end.",
                 MetricType::Counter);
    Family reasons("kvferry_transfers_unfinished_total",
                   "Transfers that failed or were cancelled, by reason.", MetricType::Counter);
    Family open("kvferry_transfers_open", "Transfers that run or wait now.", MetricType::Gauge);
    Family durations("kvferry_transfer_duration_seconds", "From a transfer's call to its end.",
                     MetricType::Histogram);
    Family sizes("kvferry_transfer_size_bytes", "Bytes moved by a transfer that was done.",
                 MetricType::Histogram);
    for (std::size_t role = 0; role < kTransferRoles; ++role) {
      const ClientMetric::Label label{"role", kRoleWords[role]};
      for (std::size_t i = 0; i < kTransferOutcomes; ++i)
        ended.add({label, {"outcome", kOutcomeWords[i]}}, as_double(m_.ended_[role][i].value()));
      for (std::size_t i = 1; i < kReasonCount; ++i)
        reasons.add({label, {"reason", std::string(name_of(static_cast<Reason>(i)))}},
                    as_double(m_.reasons_[role][i].value()));
      open.add({label}, as_double(m_.transfers_open(static_cast<TransferRole>(role))));
      durations.add({label}, *m_.durations_[role]);
      sizes.add({label}, *m_.sizes_[role]);
    }
    for (Family* family : {&ended, &reasons, &open, &durations, &sizes})
      out_.push_back(family->done());
  }

  void add_data_path() {
    counters("kvferry_transfer_bytes_total",
             "KV bytes delivered to peers, received from peers, and moved within the node.",
             "direction", kDirectionWords, m_.moved_);
    counters("kvferry_chunks_total", "What happened to chunks.", "event", kChunkWords, m_.chunks_);
    counters(
        "kvferry_fragments_total",
        "Contiguous pieces of workers' memory that slices were compiled to, before they became "
        "chunks; of large slices estimated.",
        "role", kRoleWords, m_.fragments_);
    counters("kvferry_fallbacks_total",
             "Slower ways that were taken since the fast one could not be had.", "way",
             kFallbackWords, m_.fallbacks_);
    counters("kvferry_credits_total", "What happened to credits.", "event", kCreditWords,
             m_.credits_);
    gauge("kvferry_credits_live", "Credits granted and not yet spent.", m_.credits_live);
    counters("kvferry_copies_total", "Gathers, scatters and copies within the node.", "kind",
             kCopyWords, m_.copies_);
    counters("kvferry_copy_bytes_total", "Bytes copied.", "kind", kCopyWords, m_.copy_bytes_);
    counters("kvferry_copy_errors_total", "Copies that failed.", "kind", kCopyWords,
             m_.copy_errors_);
    gauge("kvferry_copies_outstanding", "Copies that the copy threads have taken and not ended.",
          m_.copies_outstanding);
    out_.push_back(Family("kvferry_copy_busy_seconds_total",
                          "What the copy threads have spent copying, all together.",
                          MetricType::Counter)
                       .add({}, as_double(m_.copy_busy_ns.value()) * kNanosecond)
                       .done());
    Family stages("kvferry_stage_duration_seconds",
                  "Where time goes: wait is of a transfer, gather, wire and scatter of a chunk.",
                  MetricType::Histogram);
    for (std::size_t i = 0; i < kStages; ++i)
      stages.add({{"stage", kStageWords[i]}}, *m_.stages_[i]);
    out_.push_back(stages.done());
  }

  void add_arenas() {
    Family bytes("kvferry_arena_bytes", "Arena memory; the states add up to the arena's size.",
                 MetricType::Gauge);
    Family reserved("kvferry_arena_reserved_bytes",
                    "Promised to reservations, whether used or not.", MetricType::Gauge);
    Family info("kvferry_arena_info", "The kind of memory that was chosen.", MetricType::Gauge);
    for (std::size_t i = 0; i < m_.arenas_.size(); ++i) {
      const ArenaLabels& labels = m_.arena_labels_[i];
      const ClientMetric::Label arena{"arena", std::to_string(i)};
      for (std::size_t state = 0; state < kRegionStates; ++state)
        bytes.add({arena, {"device", labels.device}, {"state", kRegionWords[state]}},
                  static_cast<double>(m_.arenas_[i]->bytes[state].value()));
      reserved.add({arena, {"device", labels.device}},
                   static_cast<double>(m_.arenas_[i]->reserved.value()));
      info.add({arena,
                {"device", labels.device},
                {"kind", labels.kind},
                {"mapped", labels.mapped ? "true" : "false"}},
               1);
    }
    out_.push_back(bytes.done());
    out_.push_back(reserved.done());
    out_.push_back(info.done());
    counter("kvferry_quarantines_total", "Regions put into quarantine.", m_.quarantines.value());
    counters("kvferry_lent_regions_freed_total",
             "Quarantined regions of mapped arenas that may be used again, by the evidence.",
             "evidence", kEvidenceWords, m_.evidences_);
    gauge("kvferry_borrowed_arenas", "Mapped arenas of peers that this daemon writes by itself.",
          m_.borrowed_arenas);
    gauge("kvferry_borrowed_bytes", "Their size.", m_.borrowed_bytes);
    counters("kvferry_borrow_failures_total",
             "Arenas that a peer lends and that could not be mapped: chunks go by the rails.",
             "reason", kBorrowFailureWords, m_.borrow_failures_);
    gauge("kvferry_lent_connections", "Peers of this machine that have what this daemon lends.",
          m_.lent_connections);
    counter("kvferry_lent_refused_total", "Connections to mapped.socket that were turned away.",
            m_.lent_refused.value());
    add_packed();
    add_reuse();
  }

  void add_gpus() {
    Family info("kvferry_gpu_info", "The GPUs that copies may use.", MetricType::Gauge);
    Family up("kvferry_gpu_up", "1 until the GPU fails.", MetricType::Gauge);
    Family copies("kvferry_gpu_copies_total", "Copies by a GPU that ended.", MetricType::Counter);
    Family bytes("kvferry_gpu_copy_bytes_total", "Bytes copied by a GPU.", MetricType::Counter);
    Family failed("kvferry_gpu_copy_errors_total", "Copies by a GPU that failed.",
                  MetricType::Counter);
    Family refused("kvferry_gpu_copies_refused_total", "Copies that a GPU did not take.",
                   MetricType::Counter);
    Family plans("kvferry_gpu_plan_bytes_total", "Plans brought to a GPU.", MetricType::Counter);
    Family waiting("kvferry_gpu_copies_outstanding", "Copies taken and not yet ended.",
                   MetricType::Gauge);
    Family times("kvferry_gpu_launch_to_done_seconds", "From a copy's launch to its seen end.",
                 MetricType::Histogram);
    for (std::size_t i = 0; i < m_.gpus_.size(); ++i) {
      const GpuMetrics& gpu = *m_.gpus_[i];
      const GpuLabels& labels = m_.gpu_labels_[i];
      const ClientMetric::Label device{"device", labels.device};
      info.add({device, {"uuid", labels.uuid}, {"name", labels.name}}, 1);
      up.add({device}, static_cast<double>(gpu.up.value()));
      for (std::size_t kind = 0; kind < kGpuCopyKinds; ++kind) {
        copies.add({device, {"kind", kGpuCopyWords[kind]}}, as_double(gpu.copies[kind].value()));
        bytes.add({device, {"kind", kGpuCopyWords[kind]}}, as_double(gpu.bytes[kind].value()));
      }
      failed.add({device}, as_double(gpu.failed.value()));
      refused.add({device}, as_double(gpu.refused.value()));
      plans.add({device}, as_double(gpu.plan_bytes.value()));
      waiting.add({device}, static_cast<double>(gpu.outstanding.value()));
      times.add({device}, *gpu.launch_to_done);
    }
    for (Family* family :
         {&info, &up, &copies, &bytes, &failed, &refused, &plans, &waiting, &times})
      if (!m_.gpus_.empty()) out_.push_back(family->done());
  }

  void add_packed() {
    gauge("kvferry_packed_bytes", "Memory that packed copies take.", m_.packed_bytes);
    gauge("kvferry_packed_copies", "Packed copies, made or being made.", m_.packed_copies);
    counter("kvferry_packed_made_total", "Packed copies that were made.", m_.packed_made.value());
    counter("kvferry_packed_refused_total", "Sends refused because their copy found no room.",
            m_.packed_refused.value());
  }

  void add_reuse() {
    gauge("kvferry_reuse_entries", "Blocks that can be found by their hash.", m_.reuse_entries);
    gauge("kvferry_reuse_pins", "Look-ups that hold what they found.", m_.reuse_pins);
    counter("kvferry_reuse_commits_total", "Receives whose blocks were published.",
            m_.reuse_commits.value());
    counter("kvferry_reuse_blocks_total", "Blocks that receives had from this node.",
            m_.reuse_blocks.value());
    counter("kvferry_reuse_lookups_total", "Look-ups without a transfer.",
            m_.reuse_lookups.value());
    counter("kvferry_reuse_lookup_hits_total", "Groups of which a look-up found something.",
            m_.reuse_lookup_hits.value());
    counter("kvferry_reuse_withdrawn_total", "Blocks withdrawn by their workers.",
            m_.reuse_withdrawn.value());
    counter("kvferry_reuse_evicted_total", "Blocks forgotten because the index was full.",
            m_.reuse_evicted.value());
  }

  void add_rails_and_links() {
    Family up("kvferry_rail_up", "1 while the rail works.", MetricType::Gauge);
    Family bytes("kvferry_rail_bytes_total", "Chunk bytes through the rail.", MetricType::Counter);
    Family errors("kvferry_rail_errors_total", "Errors that UCX told.", MetricType::Counter);
    Family downs("kvferry_rail_downs_total", "Times that the rail went down.", MetricType::Counter);
    Family rate(
        "kvferry_rail_send_rate_bytes_per_second",
        "How fast the rail lately brought chunks to the peer that it reaches fastest, acknowledged "
        "by it; 0: not known.",
        MetricType::Gauge);
    for (std::size_t i = 0; i < m_.rails_.size(); ++i) {
      const RailMetrics& rail = *m_.rails_[i];
      const Labels base{{"rail", std::to_string(i)},
                        {"transport", m_.rail_labels_[i].transport},
                        {"device", m_.rail_labels_[i].device}};
      const auto with_direction = [&](const char* direction) {
        Labels labels = base;
        labels.push_back({"direction", direction});
        return labels;
      };
      up.add(base, static_cast<double>(rail.up.value()));
      bytes.add(with_direction("sent"), as_double(rail.sent_bytes.value()));
      bytes.add(with_direction("received"), as_double(rail.received_bytes.value()));
      errors.add(base, as_double(rail.errors.value()));
      downs.add(base, as_double(rail.downs.value()));
      rate.add(base, static_cast<double>(rail.send_rate.value()));
    }
    for (Family* family : {&up, &bytes, &errors, &downs, &rate}) out_.push_back(family->done());
    gauge("kvferry_rails_process_up", "1 while the rails process runs.", m_.rails_process_up);
    counter("kvferry_rails_process_restarts_total", "Times that it had to be started again.",
            m_.rails_process_restarts.value());
    const int pid = m_.rails_pid_.load(std::memory_order_relaxed);
    const ProcessStats stats = pid > 0 ? read_process_stats(pid) : ProcessStats{};
    out_.push_back(Family("kvferry_rails_process_cpu_seconds_total",
                          "User and system time of the rails process; from 0 at each restart.",
                          MetricType::Counter)
                       .add({}, stats.cpu_seconds)
                       .done());
    gauge("kvferry_rails_process_resident_memory_bytes",
          "Resident memory of the rails process, the arenas that it shares included.",
          as_double(stats.resident_bytes));
    gauge("kvferry_rails_process_threads", "Threads of the rails process.",
          as_double(stats.threads));

    gauge("kvferry_links", "Peer daemons with a completed handshake.", m_.links);
    counter("kvferry_links_lost_total", "Links given up.", m_.links_lost.value());
    Family lanes("kvferry_lanes", "Lanes of all links.", MetricType::Gauge);
    for (std::size_t i = 0; i < kLaneStates; ++i)
      lanes.add({{"state", kLaneWords[i]}}, static_cast<double>(m_.lanes_[i].value()));
    out_.push_back(lanes.done());
    counter("kvferry_lane_downs_total", "Times that a lane went down.", m_.lane_downs.value());
    counter("kvferry_handshakes_failed_total", "Handshakes that made no link, dialled or answered.",
            m_.handshakes_failed.value());
    counter("kvferry_links_renewed_total",
            "Handshakes of links that were up, by which their keys were renewed.",
            m_.links_renewed.value());
    gauge("kvferry_certificate_start_timestamp_seconds",
          "From when on this node's certificate is valid; 0 without mode mtls.",
          m_.certificate_start);
    gauge("kvferry_certificate_expiry_timestamp_seconds",
          "Until when this node's certificate is valid; 0 without mode mtls.",
          m_.certificate_expiry);
    gauge(
        "kvferry_ca_start_timestamp_seconds",
        "From when on the authority of peer.ca_file that ends last is valid; 0 without mode mtls.",
        m_.ca_start);
    gauge("kvferry_ca_expiry_timestamp_seconds",
          "Until when the authority of peer.ca_file that ends last is valid; 0 without mode mtls.",
          m_.ca_expiry);
    Family messages("kvferry_messages_total", "Control messages between daemons.",
                    MetricType::Counter);
    messages.add({{"direction", "sent"}}, as_double(m_.messages_sent.value()));
    messages.add({{"direction", "received"}}, as_double(m_.messages_received.value()));
    out_.push_back(messages.done());
    counters("kvferry_messages_dropped_total", "Messages and offers of peers without effect.",
             "cause", kDropWords, m_.dropped_);
    counter("kvferry_resyncs_total", "Times that lost messages were repeated.",
            m_.control_resyncs.value());
  }

  void add_workers_and_calls() {
    gauge("kvferry_workers", "Workers attached now.", m_.workers);
    counter("kvferry_workers_attached_total", "Workers that ever attached.",
            m_.workers_attached.value());
    counter("kvferry_workers_lost_total", "Workers that died attached.", m_.workers_lost.value());
    gauge("kvferry_pools", "Pools imported now.", m_.pools);
    gauge("kvferry_pool_bytes", "Worker memory imported now.", m_.pool_bytes);
    gauge("kvferry_layouts", "Layouts registered now.", m_.layouts);
    counter("kvferry_leases_expired_total", "Sends that nobody came for.",
            m_.leases_expired.value());
    Family rpcs("kvferry_rpcs_total", "Calls answered to workers, peers and operators.",
                MetricType::Counter);
    for (std::size_t i = 0; i < m_.rpcs_.size(); ++i) {
      const std::string_view name = name_of(static_cast<Code>(i));
      const bool in_use = i == static_cast<std::size_t>(Code::kInternal) || name != "INTERNAL";
      if (in_use) rpcs.add({{"code", std::string(name)}}, as_double(m_.rpcs_[i].value()));
    }
    out_.push_back(rpcs.done());
  }

  void add_daemon() {
    counter("kvferry_engine_events_total", "Events that the engine took.",
            m_.engine_events.value());
    gauge("kvferry_engine_queue", "Events waiting for the engine.", m_.engine_queue);
    gauge("kvferry_healthy", "1 while every thread turns.", m_.healthy);
    gauge("kvferry_ready", "1 while new work is taken.", m_.ready);
    gauge("kvferry_draining", "1 from the request to stop on.", m_.draining);
    counters("kvferry_config_reloads_total", "Times that the configuration was read again.",
             "result", kReloadWords, m_.reloads_);
    gauge("kvferry_config_last_reload_successful",
          "0 while a configuration that was read again is refused and the one before it counts.",
          m_.last_reload_ok);
    gauge("kvferry_config_last_reload_success_timestamp_seconds",
          "When the configuration that counts was read, at start or since.", m_.last_read_at);
    gauge("kvferry_config_keys_waiting",
          "Keys of the configuration that have changed and wait for a restart.", m_.keys_waiting);
    std::string ucx;
    {
      const MutexLock lock(m_.ucx_mutex_);
      ucx = m_.ucx_;
    }
    out_.push_back(
        Family("kvferry_build_info", "What runs here.", MetricType::Gauge)
            .add({{"version", m_.build_.version}, {"commit", m_.build_.commit}, {"ucx", ucx}}, 1)
            .done());
  }

  void add_process() {
    const ProcessStats stats = read_process_stats();
    out_.push_back(Family("process_cpu_seconds_total", "User and system time.", MetricType::Counter)
                       .add({}, stats.cpu_seconds)
                       .done());
    gauge("process_start_time_seconds", "Since the epoch.", stats.start_time_seconds);
    gauge("process_resident_memory_bytes", "Resident memory.", as_double(stats.resident_bytes));
    gauge("process_virtual_memory_bytes", "Virtual memory.", as_double(stats.virtual_bytes));
    gauge("process_open_fds", "Open file descriptors.", as_double(stats.open_fds));
    gauge("process_max_fds", "Their limit.", as_double(stats.max_fds));
    gauge("process_threads", "Threads.", as_double(stats.threads));
  }

  const Metrics& m_;
  std::vector<MetricFamily> out_;
};

Metrics::Metrics(BuildLabels build, std::vector<ArenaLabels> arenas, std::vector<RailLabels> rails,
                 std::vector<GpuLabels> gpus)
    : build_(std::move(build)),
      arena_labels_(std::move(arenas)),
      rail_labels_(std::move(rails)),
      gpu_labels_(std::move(gpus)),
      ucx_(build_.ucx) {
  for (std::size_t i = 0; i < arena_labels_.size(); ++i)
    arenas_.push_back(std::make_unique<ArenaMetrics>());
  for (std::size_t i = 0; i < rail_labels_.size(); ++i)
    rails_.push_back(std::make_unique<RailMetrics>());
  for (std::size_t i = 0; i < gpu_labels_.size(); ++i) {
    gpus_.push_back(std::make_unique<GpuMetrics>());
    gpus_.back()->launch_to_done = std::make_unique<Histogram>(launch_bounds(), kNanosecond);
  }
  for (auto& histogram : durations_)
    histogram = std::make_unique<Histogram>(duration_bounds(), kNanosecond);
  for (auto& histogram : stages_)
    histogram = std::make_unique<Histogram>(duration_bounds(), kNanosecond);
  for (auto& histogram : sizes_) histogram = std::make_unique<Histogram>(size_bounds(), 1.0);
}

Metrics::~Metrics() = default;

void Metrics::transfer_opened(TransferRole role) {
  opened_.at(static_cast<std::size_t>(role)).add();
}

void Metrics::transfer_ended(TransferRole role, TransferOutcome outcome, Reason reason,
                             Duration duration, uint64_t bytes) {
  const auto r = static_cast<std::size_t>(role);
  durations_.at(r)->observe(duration);
  if (outcome == TransferOutcome::kDone) {
    sizes_.at(r)->observe(bytes);
  } else {
    // A failure always has a reason; one without is a fault of ours and shown as such.
    const auto number = static_cast<std::size_t>(reason);
    const bool known = number != 0 && number < kReasonCount;
    reasons_.at(r).at(known ? number : static_cast<std::size_t>(Reason::kInternal)).add();
  }
  ended_.at(r).at(static_cast<std::size_t>(outcome)).add();
}

void Metrics::copy_ended(CopyKind kind, uint64_t bytes, bool failed) {
  const auto k = static_cast<std::size_t>(kind);
  copies_.at(k).add();
  if (failed) {
    copy_errors_.at(k).add();
    return;
  }
  copy_bytes_.at(k).add(bytes);
}

void Metrics::stage(Stage stage, Duration duration) {
  stages_.at(static_cast<std::size_t>(stage))->observe(duration);
}

void Metrics::rpc_ended(Code code) {
  rpcs_.at(static_cast<std::size_t>(code)).add();
}

void Metrics::set_ucx_version(std::string_view version) {
  const MutexLock lock(ucx_mutex_);
  ucx_ = version;
}

uint64_t Metrics::transfers_open(TransferRole role) const {
  const auto r = static_cast<std::size_t>(role);
  // Ended first: read the other way round, a transfer that opens and ends in between would show
  // as less than none.
  uint64_t ended = 0;
  for (const Counter& counter : ended_.at(r)) ended += counter.value();
  const uint64_t opened = opened_.at(r).value();
  return opened > ended ? opened - ended : 0;
}

std::string Metrics::text() const {
  return prometheus::TextSerializer().Serialize(Collector(*this).collect());
}

}  // namespace kvferry::ops
