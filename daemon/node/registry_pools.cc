// Workers' pools: imported, proven, given back. All imports and proofs run on one thread, one after
// the other: they call the kernel and the GPU's driver, which may take its time, and a call that is
// repeated while the first one runs finds its outcome.
#include <algorithm>
#include <set>
#include <string_view>

#include "daemon/base/check.h"
#include "daemon/base/crypto.h"
#include "daemon/memory/host_pool.h"
#include "daemon/node/registry.h"
#include "daemon/ops/log.h"

namespace kvferry::node {
namespace {

constexpr Duration kReadLimit = std::chrono::seconds(1);

std::string pool_field(std::size_t index) {
  return "pools[" + std::to_string(index) + "]";
}

gpu::ImportKind import_kind(rpc::PoolKind kind) {
  switch (kind) {
    case rpc::PoolKind::kCudaIpc:
      return gpu::ImportKind::kCudaIpc;
    case rpc::PoolKind::kCudaFabric:
      return gpu::ImportKind::kCudaFabric;
    case rpc::PoolKind::kCudaVmmFd:
    case rpc::PoolKind::kHostShm:
      break;
  }
  return gpu::ImportKind::kCudaVmmFd;
}

lifeline::PoolKind descriptor_kind(rpc::PoolKind kind) {
  return kind == rpc::PoolKind::kHostShm ? lifeline::PoolKind::kHostShm
                                         : lifeline::PoolKind::kCudaVmmFd;
}

tl::unexpected<Error> busy() {
  return fail(Code::kResourceExhausted, "TOO_MANY_CALLS",
              "too many registrations wait to be carried out");
}

// Errors name `field`, or its size.
Result<std::shared_ptr<memory::HostPool>> import_host(rpc::PoolDescriptors& sent,
                                                      const rpc::PoolRequest& request,
                                                      uint64_t max_bytes,
                                                      const std::string& field) {
  rpc::PoolDescriptors::Part& part = sent.parts.front();
  // What was said of the descriptor over the lifeline must be what is said of the pool now.
  if (part.bytes != request.bytes)
    return invalid(field + ".bytes", "POOL_SIZE_DIFFERS",
                   std::to_string(part.bytes) + " bytes were told over the lifeline");
  memory::HostPoolLimits limits;
  limits.max_bytes = max_bytes;
  auto memory = memory::HostPool::import(std::move(part.fd), request.bytes, limits, field);
  if (memory) return memory;
  Error error = std::move(memory).error();
  if (error.reason == "POOL_SIZE_INVALID" || error.reason == "POOL_TOO_SMALL" ||
      error.reason == "POOL_LIMIT")
    error.field += ".bytes";
  return tl::unexpected<Error>(std::move(error));
}

Result<gpu::Imported> import_device(gpu::Imports& imports, const rpc::Session& session,
                                    rpc::PoolDescriptors& sent, const rpc::PoolRequest& request,
                                    const std::string& field) {
  gpu::ImportRequest asked;
  asked.device_uuid = request.device_uuid;
  asked.offset_bytes = request.offset_bytes;
  asked.bytes = request.bytes;
  asked.owner = session.id();
  asked.field = field;
  switch (request.kind) {
    case rpc::PoolKind::kCudaIpc:
      return imports.import_ipc(asked, request.handle);
    case rpc::PoolKind::kCudaFabric:
      return imports.import_fabric(asked, request.handle);
    case rpc::PoolKind::kCudaVmmFd:
    case rpc::PoolKind::kHostShm:
      break;
  }
  std::vector<gpu::VmmPart> parts;
  for (rpc::PoolDescriptors::Part& part : sent.parts)
    parts.push_back({std::move(part.fd), part.bytes});
  return imports.import_fds(asked, std::move(parts));
}

rpc::PoolChallenge draw_challenge(const rpc::PoolRequest& request) {
  rpc::PoolChallenge challenge;
  challenge.pool = request.name;
  uint64_t drawn = 0;
  random_bytes({reinterpret_cast<uint8_t*>(&drawn), sizeof drawn});
  // No plane of a layout uses the memory yet, but pages of a worker that registers anew may be in
  // use: then it says where they are not. What proves is the nonce, not its place. The service has
  // seen to the size.
  challenge.offset_bytes =
      request.proof_offset_bytes.value_or(drawn % (request.bytes - challenge.nonce.size() + 1));
  random_bytes(challenge.nonce);
  return challenge;
}

}  // namespace

Status Registry::check_pool_kind(rpc::PoolKind kind) const {
  if (kind != rpc::PoolKind::kHostShm) {
    const std::string name(rpc::name_of(kind));
    if (config_.imports == nullptr)
      return fail(Code::kUnimplemented, "FEATURE_NOT_SERVED",
                  "GPU pools (" + name + ") are not served by this daemon: " + config_.no_gpu);
    if (!config_.imports->serves(import_kind(kind)))
      return fail(Code::kUnimplemented, "FEATURE_NOT_SERVED",
                  "no GPU of this machine shares memory as " + name);
  }
  if (std::find(config_.kinds.begin(), config_.kinds.end(), kind) == config_.kinds.end())
    return fail(Code::kPermissionDenied, "POOL_KIND_NOT_ALLOWED",
                std::string(rpc::name_of(kind)) +
                    " is not among the pools.kinds of the daemon's configuration");
  return {};
}

// ---- registering -------------------------------------------------------------------------------

void Registry::register_pools(const std::shared_ptr<rpc::Session>& session,
                              std::vector<rpc::PoolRequest> pools,
                              rpc::Done<rpc::PoolsOutcome> done) {
  const bool taken = pool_tasks_.post(
      [this, session, pools = std::move(pools), done] { done(import_pools(*session, pools)); });
  if (!taken) done(busy());
}

Registry::PoolUse Registry::pools_of_socket(std::size_t socket) const {
  PoolUse use;
  for (const auto& [id, worker] : workers_) {
    if (worker.session->facts().socket != socket) continue;
    use.pools += worker.pools.size();
    use.bytes += worker.pool_bytes;
  }
  return use;
}

Result<std::optional<rpc::PoolsOutcome>> Registry::known_pools(
    const Worker& worker, const std::vector<rpc::PoolRequest>& pools) const {
  std::size_t known = 0;
  rpc::PoolsOutcome outcome;
  outcome.existing = true;
  for (std::size_t i = 0; i < pools.size(); ++i) {
    const auto old = worker.pools.find(pools[i].name);
    if (old == worker.pools.end()) continue;
    const rpc::PoolRequest& before = old->second.request;
    const std::string field = pool_field(i);
    if (before.kind != pools[i].kind) return registered_otherwise(field + ".kind");
    if (before.bytes != pools[i].bytes) return registered_otherwise(field + ".bytes");
    if (before.offset_bytes != pools[i].offset_bytes)
      return registered_otherwise(field + ".offset_bytes");
    if (before.handle != pools[i].handle) return registered_otherwise(field + ".handle");
    if (before.device_uuid != pools[i].device_uuid)
      return registered_otherwise(field + ".device_uuid");
    if (before.proof_offset_bytes != pools[i].proof_offset_bytes)
      return registered_otherwise(field + ".proof_offset_bytes");
    if (old->second.challenge) outcome.challenges.push_back(old->second.challenge->asked);
    ++known;
  }
  if (known == 0) return std::nullopt;
  if (known < pools.size()) return registered_otherwise("pools");
  return outcome;
}

Result<rpc::PoolsOutcome> Registry::import_pools(rpc::Session& session,
                                                 const std::vector<rpc::PoolRequest>& pools) {
  // What is left for new ones; only this thread makes it less.
  uint64_t left = 0;
  uint64_t left_of_socket = 0;
  {
    MutexLock lock(mutex_);
    const auto it = workers_.find(session.id());
    if (it == workers_.end()) return worker_gone();
    auto known = known_pools(it->second, pools);
    KVFERRY_RETURN_IF_ERROR(known);
    if (*known) return std::move(**known);
    const rpc::WorkerLimits& own = session.facts().worker_limits;
    const rpc::WorkerLimits& socket = session.facts().limits;
    const PoolUse used = pools_of_socket(session.facts().socket);
    if (it->second.pools.size() + pools.size() > own.pools)
      return fail(
          Code::kResourceExhausted, "TOO_MANY_POOLS",
          "a worker may have " + std::to_string(own.pools) + " pools (worker_limits.max_pools)",
          "pools");
    if (used.pools + pools.size() > socket.pools)
      return rpc::socket_limit("pools", socket.pools, "max_pools", "pools");
    left = own.pool_bytes - std::min(it->second.pool_bytes, own.pool_bytes);
    left_of_socket = socket.pool_bytes - std::min(used.bytes, socket.pool_bytes);
  }
  // All or none: what was imported before an error goes with `fresh`. The claimed descriptors are
  // used up by the attempt.
  std::vector<Pool> fresh;
  const auto give_back = [&] {
    for (const Pool& pool : fresh) session.release_descriptors(pool.descriptors);
  };
  rpc::PoolsOutcome outcome;
  for (std::size_t i = 0; i < pools.size(); ++i) {
    Result<Pool> pool =
        import_pool(session, pools[i], std::min(left, left_of_socket), pool_field(i));
    if (!pool) {
      give_back();
      Error error = std::move(pool).error();
      if (error.reason != "POOL_LIMIT") return tl::unexpected(std::move(error));
      if (left_of_socket < left && pools[i].bytes <= left)
        return rpc::socket_limit("bytes of pools", session.facts().limits.pool_bytes,
                                 "max_pool_bytes", std::move(error.field));
      error.message += " more (worker_limits.max_pool_bytes)";
      return tl::unexpected(std::move(error));
    }
    left -= pools[i].bytes;
    left_of_socket -= pools[i].bytes;
    if (pool->challenge) outcome.challenges.push_back(pool->challenge->asked);
    fresh.push_back(std::move(*pool));
  }
  {
    MutexLock lock(mutex_);
    const auto it = workers_.find(session.id());
    if (it == workers_.end()) return worker_gone();
    for (Pool& pool : fresh) {
      it->second.pool_bytes += pool.request.bytes;
      const std::string name = pool.request.name;
      it->second.pools.emplace(name, std::move(pool));
    }
    export_gauges();
  }
  if (!outcome.challenges.empty() && !watching_)
    watch_challenges(monotonic_now() + config_.proof_limit);
  return outcome;
}

Result<Registry::Pool> Registry::import_pool(rpc::Session& session, const rpc::PoolRequest& request,
                                             uint64_t max_bytes, const std::string& field) {
  // Descriptors of a controller were refused on the lifeline already.
  if (session.facts().role != lifeline::Role::kRank && rpc::is_value(request.kind))
    return fail(Code::kPermissionDenied, "ROLE_WITHOUT_POOLS", "a controller has no pools", field);
  Pool pool;
  pool.request = request;
  rpc::PoolDescriptors sent;
  if (!rpc::is_value(request.kind)) {
    auto taken = session.take_pool(request.name);
    if (!taken) {
      Error error = std::move(taken).error();
      error.field = field + ".name";
      return tl::unexpected<Error>(std::move(error));
    }
    sent = std::move(*taken);
  }
  const auto refuse = [&](Error error) -> tl::unexpected<Error> {
    session.release_descriptors(sent.parts.size());
    return tl::unexpected<Error>(std::move(error));
  };
  if (!sent.parts.empty() && sent.kind != descriptor_kind(request.kind))
    return refuse({Code::kInvalidArgument, "POOL_KIND_DIFFERS",
                   "another kind was sent over the lifeline", field + ".kind"});
  if (request.kind == rpc::PoolKind::kHostShm) {
    auto memory = import_host(sent, request, max_bytes, field);
    if (!memory) return refuse(std::move(memory).error());
    pool.memory = std::move(*memory);
    pool.descriptors = 1;
    return pool;
  }
  if (request.bytes > max_bytes)
    return refuse({Code::kResourceExhausted, "POOL_LIMIT",
                   std::to_string(request.bytes) + " bytes, of which the worker may register " +
                       std::to_string(max_bytes),
                   field + ".bytes"});
  const std::size_t descriptors = sent.parts.size();
  auto imported = import_device(*config_.imports, session, sent, request, field);
  // Mapped or not, the descriptors are closed by now.
  session.release_descriptors(descriptors);
  KVFERRY_RETURN_IF_ERROR(imported);
  pool.memory = std::move(imported->pool);
  pool.claim = std::move(imported->claim);
  if (rpc::is_value(request.kind))
    pool.challenge = Challenge{draw_challenge(request), monotonic_now() + config_.proof_limit};
  return pool;
}

// ---- proofs ------------------------------------------------------------------------------------

void Registry::prove_pools(const std::shared_ptr<rpc::Session>& session,
                           std::vector<std::string> names, rpc::Done<bool> done) {
  const bool taken = pool_tasks_.post(
      [this, session, names = std::move(names), done] { done(check_proofs(*session, names)); });
  if (!taken) done(busy());
}

Result<bool> Registry::check_proofs(rpc::Session& session, const std::vector<std::string>& names) {
  struct Open {
    std::size_t index;
    std::shared_ptr<memory::Pool> memory;
    Challenge challenge;
  };
  std::vector<Open> open;
  {
    MutexLock lock(mutex_);
    const auto it = workers_.find(session.id());
    if (it == workers_.end()) return worker_gone();
    for (std::size_t i = 0; i < names.size(); ++i) {
      const auto pool = it->second.pools.find(names[i]);
      if (pool == it->second.pools.end())
        return fail(Code::kNotFound, "POOL_UNKNOWN",
                    "not registered by this worker, or not proven in time", pool_field(i));
      if (pool->second.challenge) open.push_back({i, pool->second.memory, *pool->second.challenge});
    }
  }
  // One that is wrong says nothing against the others; the first error is told.
  Status first;
  for (const Open& one : open) {
    Status proven =
        check_proof(session, names[one.index], one.memory, one.challenge, pool_field(one.index));
    if (!proven && first) first = std::move(proven);
  }
  KVFERRY_RETURN_IF_ERROR(first);
  return true;
}

Status Registry::check_proof(rpc::Session& session, const std::string& name,
                             const std::shared_ptr<memory::Pool>& memory,
                             const Challenge& challenge, const std::string& field) {
  const auto* pool = dynamic_cast<const gpu::DevicePool*>(memory.get());
  KVFERRY_CHECK(pool != nullptr, "only pools on a device are challenged");
  std::array<uint8_t, sizeof(rpc::PoolChallenge::nonce)> found{};
  Status read = config_.imports->read(*pool, challenge.asked.offset_bytes,
                                      std::as_writable_bytes(std::span(found)), kReadLimit);
  if (!read) {
    Error error = std::move(read).error();
    error.field = field;
    return tl::unexpected<Error>(std::move(error));
  }
  const bool right = equal_constant_time(found, challenge.asked.nonce);
  Pool dropped;  // goes after the lock
  {
    MutexLock lock(mutex_);
    const auto it = workers_.find(session.id());
    if (it == workers_.end()) return worker_gone();
    const auto entry = it->second.pools.find(name);
    // Given back meanwhile, and perhaps registered anew.
    if (entry == it->second.pools.end() || entry->second.memory != memory)
      return fail(Code::kNotFound, "POOL_UNKNOWN", "given back meanwhile", field);
    if (right) {
      entry->second.challenge.reset();
      return {};
    }
    dropped = std::move(entry->second);
    it->second.pool_bytes -= dropped.request.bytes;
    it->second.pools.erase(entry);
    export_gauges();
  }
  ops::log_warning("pool not proven",
                   {ops::field("worker", session.facts().name), ops::field("pool", name)});
  return fail(Code::kPermissionDenied, "POOL_PROOF_WRONG",
              "the memory does not hold what was asked for; the pool has been dropped", field);
}

void Registry::watch_challenges(Time next) {
  // Refused only when it stops, or under a flood of calls: then the next challenge sees to it.
  watching_ = pool_tasks_.post_at(next, [this] { drop_unproven(); });
}

void Registry::drop_unproven() {
  watching_ = false;
  const Time now = monotonic_now();
  Time next = Time::never();
  std::vector<std::pair<std::string, Pool>> dropped;  // go after the lock
  {
    MutexLock lock(mutex_);
    for (auto& [id, worker] : workers_) {
      for (auto it = worker.pools.begin(); it != worker.pools.end();) {
        const auto pool = it++;
        if (!pool->second.challenge) continue;
        if (pool->second.challenge->until > now) {
          next = std::min(next, pool->second.challenge->until);
          continue;
        }
        worker.pool_bytes -= pool->second.request.bytes;
        dropped.emplace_back(worker.session->facts().name, std::move(pool->second));
        worker.pools.erase(pool);
      }
    }
    export_gauges();
  }
  for (const auto& [worker, pool] : dropped)
    ops::log_warning("pool not proven in time",
                     {ops::field("worker", worker), ops::field("pool", pool.request.name)});
  if (next != Time::never()) watch_challenges(next);
}

// ---- giving back -------------------------------------------------------------------------------

void Registry::unregister_pools(rpc::Session& session, std::vector<std::string> names,
                                rpc::Done<bool> done) {
  const std::set<std::string_view> named(names.begin(), names.end());
  std::vector<std::shared_ptr<const RegisteredLayout>> users;
  std::vector<Pool> given_back;  // go after the lock
  // A session that ended meanwhile has no pools any more.
  {
    MutexLock lock(mutex_);
    Worker none;
    const auto it = workers_.find(session.id());
    Worker& worker = it == workers_.end() ? none : it->second;
    for (auto layout = worker.layouts.begin(); layout != worker.layouts.end();) {
      const auto& used = layout->second.registered->layout.pools;
      const bool uses = std::any_of(used.begin(), used.end(), [&](const mapping::PoolSpan& span) {
        return named.contains(span.name);
      });
      if (uses) users.push_back(layout->second.registered);
      layout = uses ? worker.layouts.erase(layout) : std::next(layout);
    }
    for (const std::string& name : names) {
      const auto pool = worker.pools.find(name);
      if (pool == worker.pools.end()) continue;
      worker.pool_bytes -= pool->second.request.bytes;
      given_back.push_back(std::move(pool->second));
      worker.pools.erase(pool);
    }
    export_gauges();
  }
  for (const Pool& pool : given_back) session.release_descriptors(pool.descriptors);
  const bool existed = !given_back.empty();
  release_layouts(std::move(users), [done, existed] { done(existed); });
}

}  // namespace kvferry::node
