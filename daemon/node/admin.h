// Answers the operators' questions: snapshots of the engine (taken on its thread), the registry,
// the links and the rails. Thread-safe; nothing blocks.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/gpu/device.h"
#include "daemon/node/arena_lender.h"
#include "daemon/node/engine_thread.h"
#include "daemon/node/link_manager.h"
#include "daemon/node/peer_links.h"
#include "daemon/node/registry.h"
#include "daemon/node/trace_rules.h"
#include "daemon/ops/config.h"
#include "daemon/ops/http.h"
#include "daemon/ops/watchdog.h"
#include "daemon/rpc/admin_backend.h"

namespace kvferry::node {

class Admin final : public rpc::AdminBackend, public TraceAnswers {
 public:
  struct Facts {
    std::string version;
    std::string commit;
    BootId boot;
    std::string peer_address;
    std::string http_address;
    std::vector<rpc::MemoryChoice> arenas;           // as EngineConfig::arenas
    std::vector<ops::GpuLabels> gpus;                // as the devices
    std::shared_ptr<const gpu::Devices> devices;     // null: no GPU is used
    std::vector<rpc::NumaInfo> numa;                 // of all but the rails, then of each rail
    std::vector<rpc::NumaInfo> rails_numa;           // with an empty place where it is not bound
    const ArenaLender* lender = nullptr;             // null: nothing is lent
    const ops::Gauge* certificate_expiry = nullptr;  // seconds since 1970; 0: without mode mtls
  };

  // What is not the engine's to answer. Any thread; neither waits.
  struct Orders {
    std::function<void(std::optional<Duration> limit, std::function<void()> done)> drain;
    std::function<void(rpc::Reply<rpc::ReloadedInfo> done)> reload;
    std::function<std::vector<rpc::ConfigValueInfo>()> config;
  };

  // All outlive it.
  Admin(Facts facts, const ops::Config& config, EngineThread& engine, LinkManager& links,
        Registry& registry, ops::Watchdog& watchdog, Orders orders);

  // Once the HTTP listener is bound, before it is asked.
  void set_http_address(std::string address) { facts_.http_address = std::move(address); }
  void set_draining() { draining_.store(true, std::memory_order_relaxed); }

  // Also for the HTTP probes: is every thread turning ...
  ops::HealthReport health_now() const;
  // ... and is new work taken.
  ops::HealthReport ready_now() const;

  void status(Time deadline, rpc::Reply<rpc::StatusInfo> done) override;
  void list_workers(Time deadline, rpc::Reply<std::vector<rpc::WorkerInfo>> done) override;
  void list_transfers(Time deadline, rpc::Reply<std::vector<rpc::TransferInfo>> done) override;
  void list_peers(Time deadline, rpc::Reply<std::vector<rpc::PeerInfo>> done) override;
  void list_rails(Time deadline, rpc::Reply<std::vector<rpc::RailInfo>> done) override;
  void list_arenas(Time deadline, rpc::Reply<rpc::ArenasInfo> done) override;
  void release_arenas(std::string node, std::optional<BootId> boot, Time deadline,
                      rpc::Reply<rpc::ReleasedInfo> done) override;
  void cancel_transfer(std::string selector, Time deadline,
                       rpc::Reply<std::vector<rpc::CancelledTransfer>> done) override;
  void drain(std::optional<Duration> limit, rpc::Reply<bool> done) override;
  void reload(rpc::Reply<rpc::ReloadedInfo> done) override;
  void trace(std::string selector, Time deadline, rpc::Reply<rpc::TraceInfo> done) override;
  void config(rpc::Reply<std::vector<rpc::ConfigValueInfo>> done) override;
  void health(Time deadline, rpc::Reply<std::vector<rpc::HealthCheckInfo>> done) override;

  // TraceAnswers. As TraceBudget allows; else RESOURCE_EXHAUSTED TRACE_BUSY.
  void answer_trace(const PeerRef& peer, const rpc::TraceQuery& query,
                    std::function<void(Result<rpc::TraceReply>)> done) override;

 private:
  std::vector<rpc::GpuInfo> gpus() const;
  // Runs `answer` on the engine thread with a snapshot.
  void with_snapshot(std::function<void(const engine::EngineSnapshot&)> answer);

  Facts facts_;
  const ops::Config& config_;
  EngineThread& engine_;
  LinkManager& links_;
  Registry& registry_;
  ops::Watchdog& watchdog_;
  const Orders orders_;
  const Time started_ = monotonic_now();
  std::atomic<bool> draining_{false};
  TraceBudget trace_budget_;
};

// The handle that tools show and take, such as s3x17: side, worker, the worker's own number.
std::string transfer_handle(const engine::TransferView& view);
std::string_view name_of_state(engine::TransferState state);

}  // namespace kvferry::node
