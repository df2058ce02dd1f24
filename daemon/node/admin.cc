#include "daemon/node/admin.h"

#include <algorithm>
#include <iterator>
#include <memory>

#include "daemon/base/cpu_set.h"
#include "daemon/base/mutex.h"
#include "daemon/ops/log.h"

namespace kvferry::node {
namespace {

// "tenant/name" in two.
std::pair<std::string, std::string> split_instance(const std::string& full) {
  const std::size_t slash = full.find('/');
  if (slash == std::string::npos) return {"", full};
  return {full.substr(0, slash), full.substr(slash + 1)};
}

}  // namespace

std::string_view name_of_state(engine::TransferState state) {
  using engine::TransferState;
  switch (state) {
    case TransferState::kOpen:
      return "OPEN";
    case TransferState::kActive:
      return "ACTIVE";
    case TransferState::kDelivered:
      return "DELIVERED";
    case TransferState::kCompleted:
      return "COMPLETED";
    case TransferState::kFailed:
      return "FAILED";
    case TransferState::kCancelled:
      return "CANCELLED";
  }
  return "UNKNOWN";
}

std::string transfer_handle(const engine::TransferView& view) {
  return (view.role == engine::Role::kSender ? "s" : "r") + std::to_string(view.worker.value) +
         "x" + std::to_string(view.client_handle);
}

Admin::Admin(Facts facts, const ops::Config& config, EngineThread& engine, LinkManager& links,
             Registry& registry, ops::Watchdog& watchdog, Orders orders)
    : facts_(std::move(facts)),
      config_(config),
      engine_(engine),
      links_(links),
      registry_(registry),
      watchdog_(watchdog),
      orders_(std::move(orders)) {}

void Admin::drain(std::optional<Duration> limit, rpc::Reply<bool> done) {
  orders_.drain(limit, [done = std::move(done)] { done(true); });
}

void Admin::reload(rpc::Reply<rpc::ReloadedInfo> done) {
  orders_.reload(std::move(done));
}

void Admin::config(rpc::Reply<std::vector<rpc::ConfigValueInfo>> done) {
  done(orders_.config());
}

void Admin::with_snapshot(std::function<void(const engine::EngineSnapshot&)> answer) {
  engine_.ask([answer = std::move(answer)](const engine::Engine& engine, Time now) {
    answer(engine.snapshot(now));
  });
}

std::vector<rpc::GpuInfo> Admin::gpus() const {
  std::vector<rpc::GpuInfo> rows;
  if (facts_.devices == nullptr) return rows;
  for (std::size_t i = 0; i < facts_.gpus.size(); ++i) {
    const gpu::Device& device = *facts_.devices->all().at(i);
    rpc::GpuInfo& row = rows.emplace_back();
    row.device = facts_.gpus[i].device;
    row.uuid = facts_.gpus[i].uuid;
    row.name = facts_.gpus[i].name;
    row.up = !device.down();
    if (!row.up) row.detail = device.down_error().message;
  }
  return rows;
}

ops::HealthReport Admin::health_now() const {
  ops::HealthReport report;
  const std::vector<ops::StaleTicker> stale = watchdog_.stale(monotonic_now());
  ops::HealthCheck threads{"threads", stale.empty(), {}};
  for (const ops::StaleTicker& ticker : stale) {
    if (!threads.detail.empty()) threads.detail += ", ";
    threads.detail += ticker.name + " has not turned for " + ops::format_duration(ticker.silent);
  }
  report.checks.push_back(std::move(threads));
  if (facts_.devices == nullptr) return report;
  // One GPU that has failed is told of but leaves the others their work; without any the daemon is
  // better started again, which is what brings a GPU back.
  ops::HealthCheck check{"gpus", false, {}};
  for (const rpc::GpuInfo& gpu : gpus()) {
    check.ok = check.ok || gpu.up;
    if (gpu.up) continue;
    if (!check.detail.empty()) check.detail += ", ";
    check.detail += gpu.device + " is down: " + gpu.detail;
  }
  report.checks.push_back(std::move(check));
  return report;
}

ops::HealthReport Admin::ready_now() const {
  ops::HealthReport report = health_now();
  const EngineThread::RailsView rails = engine_.rails_view();
  report.checks.push_back(
      {"rails", rails.ready,
       rails.ready ? "" : "the rails process is not ready: " + rails.last_exit});
  const bool draining = draining_.load(std::memory_order_relaxed);
  report.checks.push_back({"admission", !draining, draining ? "draining" : ""});
  return report;
}

void Admin::status(Time, rpc::Reply<rpc::StatusInfo> done) {
  engine_.ask([this, done = std::move(done)](const engine::Engine& engine, Time now) {
    const engine::EngineSnapshot snapshot = engine.snapshot(now);
    const engine::EngineStats& stats = engine.stats();
    rpc::StatusInfo info;
    info.sent_bytes = stats.bytes_sent;
    info.received_bytes = stats.bytes_received;
    info.local_bytes = stats.bytes_local + stats.reuse_bytes;
    info.version = facts_.version;
    info.commit = facts_.commit;
    info.boot = facts_.boot;
    info.node = config_.node.id;
    info.uptime = monotonic_now() - started_;
    const EngineThread::RailsView rails = engine_.rails_view();
    if (rails.info.ucx_major > 0) {
      info.ucx_version = std::to_string(rails.info.ucx_major) + "." +
                         std::to_string(rails.info.ucx_minor) + "." +
                         std::to_string(rails.info.ucx_release);
    }
    info.protocol_min = rpc::kPeerProtocolMin;
    info.protocol_max = rpc::kPeerProtocolMax;
    info.arenas = facts_.arenas;
    info.gpus = gpus();
    info.numa = facts_.numa;
    for (std::size_t i = 0; i < facts_.rails_numa.size(); ++i) {
      if (facts_.rails_numa[i].place.empty()) continue;
      rpc::NumaInfo& row = info.numa.emplace_back(facts_.rails_numa[i]);
      if (!rails.ready)
        row.problem = "the rails process is not ready";
      else if (rails.info.rails.at(i).binding_errno != 0)
        row.problem = binding_error(rails.info.rails[i].binding_errno);
    }
    const ops::HealthReport healthy = health_now();
    const ops::HealthReport ready = ready_now();
    info.healthy = healthy.ok();
    info.ready = ready.ok();
    info.reason = ready.reason();
    info.draining = snapshot.draining || draining_.load(std::memory_order_relaxed);
    info.workers = snapshot.workers;
    info.transfers = static_cast<uint32_t>(snapshot.transfers.size());
    info.links = static_cast<uint32_t>(snapshot.links.size());
    info.rails_total = static_cast<uint32_t>(rails.stats.size());
    info.rails_up = rails.ready ? info.rails_total : 0;
    info.rails_restarts = static_cast<uint32_t>(rails.restarts);
    info.peer_address = facts_.peer_address;
    info.http_address = facts_.http_address;
    if (facts_.certificate_expiry != nullptr)
      info.certificate_expiry = facts_.certificate_expiry->value();
    done(std::move(info));
  });
}

void Admin::list_workers(Time, rpc::Reply<std::vector<rpc::WorkerInfo>> done) {
  with_snapshot([this, done = std::move(done)](const engine::EngineSnapshot& snapshot) {
    std::vector<rpc::WorkerInfo> workers = registry_.workers();
    for (rpc::WorkerInfo& worker : workers) {
      worker.transfers = static_cast<uint32_t>(
          std::count_if(snapshot.transfers.begin(), snapshot.transfers.end(),
                        [&](const auto& view) { return view.worker.value == worker.id; }));
    }
    done(std::move(workers));
  });
}

void Admin::list_transfers(Time, rpc::Reply<std::vector<rpc::TransferInfo>> done) {
  with_snapshot([this, done = std::move(done)](const engine::EngineSnapshot& snapshot) {
    std::vector<rpc::TransferInfo> rows;
    for (const engine::TransferView& view : snapshot.transfers) {
      rpc::TransferInfo& row = rows.emplace_back();
      row.handle = transfer_handle(view);
      row.id_hash = view.hash;
      row.id = view.id;
      std::tie(row.tenant, row.instance) = split_instance(view.instance);
      row.worker = registry_.worker_name(view.worker);
      row.role = view.role == engine::Role::kSender ? "send" : "receive";
      row.rank = view.rank;
      row.state = name_of_state(view.state);
      row.reason = view.reason;
      row.memory_in_use = view.memory_in_use;
      row.bytes_done = view.bytes_done;
      row.bytes_total = view.bytes_total;
      row.legs = view.legs;
      row.legs_done = view.legs_ended;
      row.age = view.age;
      if (!view.nodes.empty()) row.peer = view.nodes.front().empty() ? "local" : view.nodes.front();
    }
    done(std::move(rows));
  });
}

void Admin::list_peers(Time, rpc::Reply<std::vector<rpc::PeerInfo>> done) {
  with_snapshot([this, done = std::move(done)](const engine::EngineSnapshot& snapshot) {
    std::vector<rpc::PeerInfo> rows;
    for (const LinkInfo& link : links_.links()) {
      rpc::PeerInfo& row = rows.emplace_back();
      row.node = link.node;
      row.address = link.address;
      row.boot = link.boot;
      row.state = link.linked ? "linked" : link.dialling ? "dialling" : "down";
      row.detail = link.last_error;
      row.ucx_version = link.ucx_version;
      row.lanes_total = link.lanes;
      row.last_heard = Duration(-1);
      for (const engine::LinkView& view : snapshot.links) {
        if (!link.linked || view.link != link.link) continue;
        row.lanes_total = static_cast<uint32_t>(view.lanes.size());
        row.lanes_up = static_cast<uint32_t>(std::count_if(
            view.lanes.begin(), view.lanes.end(), [](const auto& lane) { return lane.up; }));
        row.last_heard = view.silent_for;
        const std::size_t rails = engine_.rails_view().stats.size();
        for (const engine::LaneView& lane : view.lanes) {
          const uint32_t rail = rails == 0 ? 0 : rail_of(lane.lane, rails);
          row.lanes.push_back(
              {lane.lane, rail, lane.up, lane.rate, lane.in_flight, lane.arrived_bytes});
        }
        row.legs = view.legs_in + view.legs_out;
        row.mapped = view.mapped;
        row.lent = view.lent_to;
      }
    }
    done(std::move(rows));
  });
}

void Admin::list_rails(Time, rpc::Reply<std::vector<rpc::RailInfo>> done) {
  const EngineThread::RailsView view = engine_.rails_view();
  std::vector<rpc::RailInfo> rows;
  for (uint32_t i = 0; i < view.stats.size(); ++i) {
    rpc::RailInfo& row = rows.emplace_back();
    row.index = i;
    if (i < view.info.rails.size()) {
      row.transport = view.info.rails[i].transport;
      row.device = view.info.rails[i].device;
      row.connection = static_cast<uint32_t>(
          std::count_if(rows.begin(), std::prev(rows.end()), [&](const rpc::RailInfo& other) {
            return other.transport == row.transport && other.device == row.device;
          }));
      if (view.info.rails[i].tcp_port != 0)
        row.address = "port " + std::to_string(view.info.rails[i].tcp_port);
    }
    row.up = view.ready;
    row.sent_bytes = view.stats[i].bytes_sent;
    row.received_bytes = view.stats[i].bytes_received;
    if (i < view.send_rates.size()) row.send_rate = view.send_rates[i];
    row.errors = view.stats[i].refused + view.stats[i].dropped;
    row.restarts = view.restarts;
    row.settings = view.settings;
  }
  done(std::move(rows));
}

void Admin::list_arenas(Time, rpc::Reply<rpc::ArenasInfo> done) {
  with_snapshot([this, done = std::move(done)](const engine::EngineSnapshot& snapshot) {
    rpc::ArenasInfo info;
    for (const engine::ArenaView& view : snapshot.arenas) {
      const rpc::MemoryChoice& choice = facts_.arenas.at(info.arenas.size());
      rpc::ArenaInfo& row = info.arenas.emplace_back();
      row.index = static_cast<uint32_t>(info.arenas.size() - 1);
      row.device = choice.device;
      row.kind = choice.kind;
      row.reason = choice.reason;
      row.huge_page_bytes = choice.huge_page_bytes;
      row.mapped = view.mapped;
      row.total_bytes = view.total_bytes;
      row.free_bytes = view.free_bytes;
      row.granted_bytes = view.granted_bytes;
      row.landing_bytes = view.landing_bytes;
      row.landed_bytes = view.landed_bytes;
      row.scattering_bytes = view.scattering_bytes;
      row.quarantined_bytes = view.quarantined_bytes;
      row.staging_bytes = view.staging_bytes;
      row.reserved_bytes = view.reserved_bytes;
      row.regions = view.regions;
      row.quarantined_regions = view.quarantined_regions;
      row.segments = view.segments;
    }
    for (const engine::LentView& lent : snapshot.lent)
      info.lent.push_back(
          {lent.arena, lent.node, lent.boot, lent.linked, lent.regions, lent.bytes});
    done(std::move(info));
  });
}

void Admin::release_arenas(std::string node, std::optional<BootId> boot, Time,
                           rpc::Reply<rpc::ReleasedInfo> done) {
  if (facts_.lender != nullptr && facts_.lender->watches(node, boot)) {
    done(fail(Code::kFailedPrecondition, "PROCESS_WATCHED",
              "a process of that peer runs on this machine: it is released when that ends"));
    return;
  }
  ops::log_warning(
      "an operator releases what was lent",
      {ops::field("node", node), ops::field("boot", boot ? to_hex(boot->bytes) : std::string())});
  engine_.release_quarantine(
      std::move(node), boot, [done = std::move(done)](const engine::QuarantineReleased& released) {
        done(rpc::ReleasedInfo{released.regions, released.bytes, released.linked});
      });
}

void Admin::cancel_transfer(std::string selector, Time,
                            rpc::Reply<std::vector<rpc::CancelledTransfer>> done) {
  with_snapshot([this, selector = std::move(selector),
                 done = std::move(done)](const engine::EngineSnapshot& snapshot) {
    struct Gathering {
      Mutex mutex;
      std::vector<rpc::CancelledTransfer> rows;
      std::size_t left = 0;
      rpc::Reply<std::vector<rpc::CancelledTransfer>> done;
    };
    auto gathering = std::make_shared<Gathering>();
    gathering->done = done;
    std::vector<engine::TransferView> chosen;
    for (const engine::TransferView& view : snapshot.transfers)
      if (transfer_handle(view) == selector || view.hash == selector) chosen.push_back(view);
    if (chosen.empty()) {
      done(fail(Code::kNotFound, "TRANSFER_UNKNOWN", "no open transfer is called " + selector));
      return;
    }
    gathering->left = chosen.size();
    for (const engine::TransferView& view : chosen) {
      engine::CancelOp op;
      op.op.worker = view.worker;
      op.client_handle = view.client_handle;
      engine_.call(view.worker, op,
                   [gathering, handle = transfer_handle(view)](const engine::Reply& reply) {
                     std::vector<rpc::CancelledTransfer> rows;
                     {
                       MutexLock lock(gathering->mutex);
                       gathering->rows.push_back({handle,
                                                  reply.error.code == Code::kOk
                                                      ? std::string(name_of_state(reply.state))
                                                      : reply.error.reason,
                                                  reply.memory_in_use});
                       if (--gathering->left > 0) return;
                       rows = std::move(gathering->rows);
                     }
                     gathering->done(std::move(rows));
                   });
    }
  });
}

void Admin::health(Time, rpc::Reply<std::vector<rpc::HealthCheckInfo>> done) {
  std::vector<rpc::HealthCheckInfo> rows;
  for (const ops::HealthCheck& check : ready_now().checks)
    rows.push_back({check.name, check.ok, check.detail});
  done(std::move(rows));
}

}  // namespace kvferry::node
