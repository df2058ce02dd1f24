// The workers of this node: their sessions, pools and layouts. Stands between the worker service,
// which asks, and the directory and engine, which are told. Thread-safe; nothing blocks except
// mapping a pool's memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/memory/host_pool.h"
#include "daemon/node/directory.h"
#include "daemon/node/engine_thread.h"
#include "daemon/node/registered_layout.h"
#include "daemon/ops/metrics.h"
#include "daemon/rpc/admin_backend.h"
#include "daemon/rpc/lifeline.h"
#include "daemon/rpc/worker_backend.h"

namespace kvferry::node {

class Registry final : public rpc::WorkerBackend, public rpc::LifelineEvents {
 public:
  // `transports`: what the rails offer, as "shm,tcp".
  Registry(EngineThread& engine, Directory& directory, ops::Metrics& metrics,
           std::string transports);

  // For sessions by token; set once, before the worker service serves.
  void set_lifeline(rpc::Lifeline* lifeline) {
    lifeline_.store(lifeline, std::memory_order_release);
  }
  // New attachments' registrations are refused from now on.
  void drain() { draining_.store(true, std::memory_order_relaxed); }
  std::vector<rpc::WorkerInfo> workers() const KVFERRY_EXCLUDES(mutex_);
  // Facts of a worker for tools; empty if it is gone.
  std::string worker_name(WorkerId worker) const KVFERRY_EXCLUDES(mutex_);

  // rpc::LifelineEvents
  void on_attached(const std::shared_ptr<rpc::Session>& session) override;
  void on_gone(const std::shared_ptr<rpc::Session>& session, rpc::GoneReason reason) override;
  void on_doorbell(const std::shared_ptr<rpc::Session>& session) override;
  void on_refused(std::size_t socket, const Error& error) override;

  // rpc::WorkerBackend
  std::shared_ptr<rpc::Session> find_session(std::string_view token) override;
  Result<bool> register_pools(rpc::Session& session, std::vector<rpc::PoolRequest> pools) override;
  Result<rpc::LayoutRegistration> register_layout(const std::shared_ptr<rpc::Session>& session,
                                                  rpc::LayoutRequest request) override;
  void unregister_layout(rpc::Session& session, std::string instance, uint32_t rank,
                         rpc::Done<bool> done) override;
  void unregister_pools(rpc::Session& session, std::vector<std::string> names,
                        rpc::Done<bool> done) override;
  void join_instance(rpc::Session& session, std::string instance, std::vector<std::string> cards,
                     Secret instance_key, Time deadline, rpc::Done<rpc::JoinOutcome> done) override;
  Result<rpc::TicketOutcome> get_ticket(rpc::Session& session,
                                        const std::string& instance) override;
  Result<rpc::LayoutView> find_layout(const rpc::Session& session, const std::string& instance,
                                      uint32_t rank) override;
  Result<rpc::LayoutView> find_reuse_layout(const rpc::Session& session,
                                            const std::string& instance, uint32_t rank,
                                            const Secret& key) override;
  void resolve(rpc::Session& session, const std::string& ticket,
               std::shared_ptr<const engine::LayoutHandle> layout, Time deadline,
               rpc::Done<rpc::ResolveOutcome> done) override;
  Result<rpc::TicketFacts> parse_ticket(const rpc::Session& session,
                                        const std::string& ticket) override;
  void call(WorkerId worker, engine::Event op,
            std::function<void(const engine::Reply&)> reply) override;

 private:
  using LayoutKey = std::pair<std::string, uint32_t>;  // "tenant/name", rank
  struct Pool {
    std::shared_ptr<memory::HostPool> memory;
    rpc::PoolRequest request;
  };
  struct Layout {
    std::shared_ptr<const RegisteredLayout> registered;
    rpc::LayoutRequest request;  // as it came, to compare a second call with
    rpc::LayoutRegistration answer;
  };
  struct Worker {
    std::shared_ptr<rpc::Session> session;
    Time since;
    std::map<std::string, Pool> pools;
    std::map<LayoutKey, Layout> layouts;
    uint64_t pool_bytes = 0;
  };

  Result<std::shared_ptr<RegisteredLayout>> build_layout(Worker& worker,
                                                         const rpc::LayoutRequest& request)
      KVFERRY_REQUIRES(mutex_);
  // The incarnation of an instance whose ranks leave it to the daemon.
  Incarnation drawn_incarnation(const std::string& instance) KVFERRY_REQUIRES(mutex_);
  void release_layouts(std::vector<std::shared_ptr<const RegisteredLayout>> layouts,
                       std::function<void()> quiet);
  void export_gauges() KVFERRY_REQUIRES(mutex_);

  EngineThread& engine_;
  Directory& directory_;
  ops::Metrics& metrics_;
  const std::string transports_;
  std::atomic<rpc::Lifeline*> lifeline_{nullptr};
  std::atomic<bool> draining_{false};
  mutable Mutex mutex_;
  std::map<WorkerId, Worker> workers_ KVFERRY_GUARDED_BY(mutex_);
  std::map<LayoutKey, uint64_t> generations_ KVFERRY_GUARDED_BY(mutex_);
  std::map<std::string, Incarnation> drawn_ KVFERRY_GUARDED_BY(mutex_);
};

}  // namespace kvferry::node
