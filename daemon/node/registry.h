// The workers of this node: their sessions, pools and layouts. Stands between the worker service,
// which asks, and the directory and engine, which are told. Thread-safe; nothing blocks. Pools are
// mapped, proven and dropped by a thread of the registry's own (registry_pools.cc).
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/gpu/device_pool.h"
#include "daemon/memory/pool.h"
#include "daemon/node/arenas.h"
#include "daemon/node/directory.h"
#include "daemon/node/engine_thread.h"
#include "daemon/node/registered_layout.h"
#include "daemon/node/task_pool.h"
#include "daemon/ops/log.h"
#include "daemon/ops/metrics.h"
#include "daemon/rpc/admin_backend.h"
#include "daemon/rpc/lifeline.h"
#include "daemon/rpc/worker_backend.h"

namespace kvferry::node {

struct RegistryConfig {
  std::string transports;                                     // what the rails offer, as "shm,tcp"
  std::vector<rpc::PoolKind> kinds{rpc::PoolKind::kHostShm};  // that workers may register
  gpu::Imports* imports = nullptr;                            // null: no GPU
  std::string no_gpu = "the daemon has none";                 // why
  const Arenas* arenas = nullptr;                             // null: only the host's
  // Until when a worker has to answer a pool's challenge.
  Duration proof_limit = std::chrono::seconds(10);
};

tl::unexpected<Error> worker_gone();
tl::unexpected<Error> registered_otherwise(std::string field);

class Registry final : public rpc::WorkerBackend, public rpc::LifelineEvents {
 public:
  // All must outlive the object, `config.imports` too.
  Registry(EngineThread& engine, Directory& directory, ops::Metrics& metrics,
           RegistryConfig config);
  // Ends its thread; calls about pools that still wait for it are never answered, so the workers'
  // servers go before. Idempotent.
  void stop();

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
  Status check_pool_kind(rpc::PoolKind kind) const override;
  void register_pools(const std::shared_ptr<rpc::Session>& session,
                      std::vector<rpc::PoolRequest> pools,
                      rpc::Done<rpc::PoolsOutcome> done) override;
  void prove_pools(const std::shared_ptr<rpc::Session>& session, std::vector<std::string> names,
                   rpc::Done<bool> done) override;
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
  struct Challenge {
    rpc::PoolChallenge asked;
    Time until;
  };
  struct Pool {
    std::shared_ptr<memory::Pool> memory;
    rpc::PoolRequest request;
    gpu::Claim claim;                    // value kinds
    std::optional<Challenge> challenge;  // until it is proven
    std::size_t descriptors = 0;         // of the worker's that it keeps open
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

  struct PoolUse {
    std::size_t pools = 0;
    uint64_t bytes = 0;
  };
  PoolUse pools_of_socket(std::size_t socket) const KVFERRY_REQUIRES(mutex_);
  // What the worker has registered already: an outcome, an error, or neither where all are new.
  Result<std::optional<rpc::PoolsOutcome>> known_pools(
      const Worker& worker, const std::vector<rpc::PoolRequest>& pools) const
      KVFERRY_REQUIRES(mutex_);
  // These run on the pools' thread, one at a time.
  Result<rpc::PoolsOutcome> import_pools(rpc::Session& session,
                                         const std::vector<rpc::PoolRequest>& pools)
      KVFERRY_EXCLUDES(mutex_);
  Result<Pool> import_pool(rpc::Session& session, const rpc::PoolRequest& request,
                           uint64_t max_bytes, const std::string& field);
  Result<bool> check_proofs(rpc::Session& session, const std::vector<std::string>& names)
      KVFERRY_EXCLUDES(mutex_);
  Status check_proof(rpc::Session& session, const std::string& name,
                     const std::shared_ptr<memory::Pool>& memory, const Challenge& challenge,
                     const std::string& field) KVFERRY_EXCLUDES(mutex_);
  void drop_unproven() KVFERRY_EXCLUDES(mutex_);
  void watch_challenges(Time next);

  static Status check_usable(const Pool& pool, const RegisteredLayout& layout,
                             const std::string& field);
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
  const RegistryConfig config_;
  std::atomic<rpc::Lifeline*> lifeline_{nullptr};
  std::atomic<bool> draining_{false};
  ops::LogLimiter refusals_{8, std::chrono::minutes(1)};  // the lifelines' thread
  mutable Mutex mutex_;
  std::map<WorkerId, Worker> workers_ KVFERRY_GUARDED_BY(mutex_);
  std::map<LayoutKey, uint64_t> generations_ KVFERRY_GUARDED_BY(mutex_);
  std::map<std::string, Incarnation> drawn_ KVFERRY_GUARDED_BY(mutex_);
  bool watching_ = false;  // the pools' thread: drop_unproven() will run
  TaskPool pool_tasks_;    // the last member: its tasks use the others
};

}  // namespace kvferry::node
