// What the worker service asks of the daemon. The service turns messages into these calls and
// checks what can be checked without state; the node implements them. Called on gRPC threads:
// nothing here blocks, callbacks come once, from any thread, possibly before the call returns.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/reason.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/engine/commands.h"
#include "daemon/engine/events.h"
#include "daemon/mapping/layout.h"
#include "daemon/rpc/lifeline.h"

namespace kvferry::rpc {

template <typename T>
using Done = std::function<void(Result<T>)>;

// The numbers are those of v1::PoolKind.
enum class PoolKind : uint8_t { kHostShm = 1, kCudaVmmFd = 2, kCudaIpc = 3, kCudaFabric = 4 };
std::string_view name_of(PoolKind kind);  // "host_shm", "cuda_vmm_fd", ...
// Its handle is a value, not a descriptor: whoever has read it can repeat it.
constexpr bool is_value(PoolKind kind) {
  return kind == PoolKind::kCudaIpc || kind == PoolKind::kCudaFabric;
}

struct PoolRequest {
  std::string name;
  PoolKind kind = PoolKind::kHostShm;
  uint64_t bytes = 0;
  uint64_t offset_bytes = 0;
  std::array<uint8_t, 64> handle{};  // of value kinds
  std::vector<uint8_t> device_uuid;  // 16 bytes; host pools: empty
  // Value kinds: where the worker wants its challenge.
  std::optional<uint64_t> proof_offset_bytes;
  bool operator==(const PoolRequest&) const = default;
};

// What the worker writes into the pool, to show that the memory is its own.
struct PoolChallenge {
  std::string pool;
  uint64_t offset_bytes = 0;
  std::array<uint8_t, 16> nonce{};
};
struct PoolsOutcome {
  bool existing = false;  // the same pools were registered before
  std::vector<PoolChallenge> challenges;
};

struct LayoutRequest {
  std::string instance;  // the engine's name, without tenant
  mapping::RankLayout layout;
  Incarnation incarnation;  // zero: drawn by the daemon
  Secret instance_key;      // zero: none
  Secret reuse_key;         // zero: the instance key
  std::string hash_scheme;  // empty: no reuse
};
struct LayoutRegistration {
  bool existing = false;
  std::string card;  // serialized, opaque to workers
  uint64_t generation = 0;
  Incarnation incarnation;
  bool complete = false;
};

struct JoinOutcome {
  bool existing = false;
  Incarnation incarnation;
  bool complete = false;
  std::vector<uint32_t> missing_ranks;
};

struct TicketOutcome {
  std::string ticket;
  Incarnation incarnation;
};

// What a ticket says of its instance, before anybody is asked.
struct TicketFacts {
  std::string instance;     // "tenant/name"
  Incarnation incarnation;  // zero: the ticket is of the form by name
};

// What is behind a ticket.
struct ResolveOutcome {
  bool reachable = false;   // a link to every node of it is up
  bool compatible = false;  // meaningful if a layout was given
  std::optional<Error> problem;
  std::string transport;  // "local", or what the rails offer, as "shm,tcp"
  std::string instance;   // without the tenant
  Incarnation incarnation;
  uint32_t rank_count = 0;
};

// A registered layout as operations use it; `layout` lives as long as `handle`.
struct LayoutView {
  std::shared_ptr<const engine::LayoutHandle> handle;
  const mapping::RankLayout* layout = nullptr;
};

class WorkerBackend {
 public:
  virtual ~WorkerBackend() = default;

  // The live session of this token; null if there is none.
  virtual std::shared_ptr<Session> find_session(std::string_view token) = 0;

  // Whether this daemon takes pools of a kind. The error has no field. UNIMPLEMENTED
  // FEATURE_NOT_SERVED, PERMISSION_DENIED POOL_KIND_NOT_ALLOWED.
  virtual Status check_pool_kind(PoolKind kind) const = 0;
  // All or nothing.
  virtual void register_pools(const std::shared_ptr<Session>& session,
                              std::vector<PoolRequest> pools, Done<PoolsOutcome> done) = 0;
  // The challenges of these pools have been answered in memory. True: all are proven now.
  virtual void prove_pools(const std::shared_ptr<Session>& session, std::vector<std::string> names,
                           Done<bool> done) = 0;
  virtual Result<LayoutRegistration> register_layout(const std::shared_ptr<Session>& session,
                                                     LayoutRequest request) = 0;
  // `done` says whether there was something; called when nothing touches its memory any more.
  virtual void unregister_layout(Session& session, std::string instance, uint32_t rank,
                                 Done<bool> done) = 0;
  virtual void unregister_pools(Session& session, std::vector<std::string> names,
                                Done<bool> done) = 0;
  virtual void join_instance(Session& session, std::string instance, std::vector<std::string> cards,
                             Secret instance_key, Time deadline, Done<JoinOutcome> done) = 0;
  virtual Result<TicketOutcome> get_ticket(Session& session, const std::string& instance) = 0;

  // NOT_FOUND LAYOUT_UNKNOWN unless this worker has registered it.
  virtual Result<LayoutView> find_layout(const Session& session, const std::string& instance,
                                         uint32_t rank) = 0;
  // The same for a layout of any worker of the session's tenant, to look up what the reuse domain
  // of `key` (zero: of the session's user) holds for it.
  virtual Result<LayoutView> find_reuse_layout(const Session& session, const std::string& instance,
                                               uint32_t rank, const Secret& key) = 0;
  // INVALID_ARGUMENT TICKET_INVALID; PERMISSION_DENIED for another tenant's instance.
  virtual Result<TicketFacts> parse_ticket(const Session& session, const std::string& ticket) = 0;

  // Asks for the instance behind a ticket that parse_ticket has accepted, once; `layout` may be
  // null: whether it is reachable. Answered at the deadline at the latest.
  virtual void resolve(Session& session, const std::string& ticket,
                       std::shared_ptr<const engine::LayoutHandle> layout, Time deadline,
                       Done<ResolveOutcome> done) = 0;

  // Hands an operation to the engine; `reply` comes once, on the engine's thread.
  virtual void call(WorkerId worker, engine::Event op,
                    std::function<void(const engine::Reply&)> reply) = 0;
};

}  // namespace kvferry::rpc
