#include "daemon/node/registry.h"

#include <algorithm>
#include <set>
#include <string_view>

#include "daemon/base/crypto.h"
#include "daemon/mapping/validate.h"
#include "daemon/node/tickets.h"
#include "daemon/ops/log.h"

namespace kvferry::node {
namespace {

constexpr std::size_t kMaxLayouts = 64;  // of a worker
constexpr std::size_t kMaxGenerations = 1 << 20;
// Beyond what the sockets' limits of calls let in.
constexpr std::size_t kMaxPoolTasks = 1 << 20;

std::string full_name(const rpc::Session& session, const std::string& instance) {
  return session.facts().tenant + "/" + instance;
}

tl::unexpected<Error> unknown_layout() {
  return fail(Code::kNotFound, "LAYOUT_UNKNOWN",
              "this worker has registered no such instance and rank", "layout");
}

}  // namespace

tl::unexpected<Error> worker_gone() {
  return fail(Code::kUnavailable, "WORKER_GONE", "the worker's lifeline has closed");
}

tl::unexpected<Error> registered_otherwise(std::string field) {
  return fail(Code::kAlreadyExists, "REGISTERED_OTHERWISE", "registered before with another value",
              std::move(field));
}

Registry::Registry(EngineThread& engine, Directory& directory, ops::Metrics& metrics,
                   RegistryConfig config)
    : engine_(engine),
      directory_(directory),
      metrics_(metrics),
      config_(std::move(config)),
      pool_tasks_("kvf-pools", 1, kMaxPoolTasks) {}

void Registry::stop() {
  pool_tasks_.stop();
}

// ---- attachments -------------------------------------------------------------------------------

void Registry::on_attached(const std::shared_ptr<rpc::Session>& session) {
  {
    MutexLock lock(mutex_);
    Worker& worker = workers_[session->id()];
    worker.session = session;
    worker.since = monotonic_now();
    export_gauges();
  }
  metrics_.workers_attached.add();
  engine_.attach(session);
  ops::log_info(
      "worker attached",
      {ops::field("worker", session->facts().name), ops::field("tenant", session->facts().tenant),
       ops::field("uid", session->facts().uid), ops::field("pid", session->facts().pid)});
}

void Registry::on_gone(const std::shared_ptr<rpc::Session>& session, rpc::GoneReason reason) {
  Worker worker;
  {
    MutexLock lock(mutex_);
    const auto it = workers_.find(session->id());
    if (it == workers_.end()) return;
    worker = std::move(it->second);
    workers_.erase(it);
    export_gauges();
  }
  metrics_.workers_lost.add();
  // The directory first: no new transfer finds the layouts. Pools go with their last user.
  for (const auto& [key, layout] : worker.layouts) directory_.remove_local(layout.registered);
  engine_.detach(session->id());
  ops::log_info("worker gone", {ops::field("worker", session->facts().name),
                                ops::field("why", rpc::name_of(reason))});
}

// Words are polled while somebody waits on them; the ring only shortens the engine's sleep.
void Registry::on_doorbell(const std::shared_ptr<rpc::Session>&) {
  engine_.ask([](const engine::Engine&, Time) {});
}

void Registry::on_refused(std::size_t, const Error& error) {
  // Anybody whom a socket's mode lets in can bring these about as often as he likes.
  if (!refusals_.allow(monotonic_now())) return;
  ops::log_warning("attachment refused",
                   {ops::field("error", error), ops::field("suppressed", refusals_.suppressed())});
}

void Registry::export_gauges() {
  int64_t bytes = 0;
  int64_t pools = 0;
  int64_t layouts = 0;
  for (const auto& [id, worker] : workers_) {
    bytes += static_cast<int64_t>(worker.pool_bytes);
    pools += static_cast<int64_t>(worker.pools.size());
    layouts += static_cast<int64_t>(worker.layouts.size());
  }
  metrics_.workers.set(static_cast<int64_t>(workers_.size()));
  metrics_.pool_bytes.set(bytes);
  metrics_.pools.set(pools);
  metrics_.layouts.set(layouts);
}

std::shared_ptr<rpc::Session> Registry::find_session(std::string_view token) {
  rpc::Lifeline* const lifeline = lifeline_.load(std::memory_order_acquire);
  return lifeline == nullptr ? nullptr : lifeline->find(bytes_of(token));
}

std::string Registry::worker_name(WorkerId id) const {
  MutexLock lock(mutex_);
  const auto it = workers_.find(id);
  return it == workers_.end() ? std::string() : it->second.session->facts().name;
}

std::vector<rpc::WorkerInfo> Registry::workers() const {
  const Time now = monotonic_now();
  MutexLock lock(mutex_);
  std::vector<rpc::WorkerInfo> out;
  for (const auto& [id, worker] : workers_) {
    const rpc::Session::Facts& facts = worker.session->facts();
    rpc::WorkerInfo info;
    info.id = id.value;
    info.name = facts.name;
    info.tenant = facts.tenant;
    info.role = facts.role == lifeline::Role::kController ? "controller" : "rank";
    info.uid = facts.uid;
    info.pid = facts.pid;
    info.age = now - worker.since;
    for (const auto& [name, pool] : worker.pools)
      info.pools.push_back(
          {name, std::string(rpc::name_of(pool.request.kind)), pool.request.bytes});
    for (const auto& [key, layout] : worker.layouts) {
      rpc::LayoutInfo& row = info.layouts.emplace_back();
      row.instance = key.first;
      row.rank = key.second;
      row.generation = layout.registered->generation;
      row.groups = static_cast<uint32_t>(layout.registered->layout.groups.size());
      for (const auto& group : layout.registered->layout.groups)
        row.planes += static_cast<uint32_t>(group.planes.size());
    }
    out.push_back(std::move(info));
  }
  return out;
}

// ---- layouts -----------------------------------------------------------------------------------

Incarnation Registry::drawn_incarnation(const std::string& instance) {
  Incarnation& incarnation = drawn_[instance];
  bool in_use = false;
  for (const auto& [id, worker] : workers_)
    for (const auto& [key, layout] : worker.layouts) in_use |= key.first == instance;
  // A new life once the last rank of the old one is gone.
  if (!in_use || incarnation.is_zero()) random_bytes(incarnation.bytes);
  return incarnation;
}

namespace {

ReuseDomain reuse_domain(const rpc::Session& session, const rpc::LayoutRequest& request) {
  return {session.facts().tenant, session.facts().uid,        request.reuse_key,
          request.instance_key,   request.layout.fingerprint, request.hash_scheme};
}

}  // namespace

Status Registry::check_usable(const Pool& pool, const RegisteredLayout& layout,
                              const std::string& field) {
  if (pool.challenge)
    return fail(Code::kFailedPrecondition, "POOL_NOT_PROVEN",
                "its challenge has not been answered by ProvePools", field + ".name");
  if (pool.memory->failed())
    return fail(Code::kFailedPrecondition, "POOL_FAILED", "its memory could not be reached before",
                field + ".name");
  if (!layout.pools.empty() && layout.pools.front()->device() != pool.memory->device())
    return invalid(field + ".name", "POOLS_OF_SEVERAL_DEVICES",
                   "all pools of a layout are on one device, or all on the host");
  return {};
}

Result<std::shared_ptr<RegisteredLayout>> Registry::build_layout(
    Worker& worker, const rpc::LayoutRequest& request) {
  const auto prefixed = [](Error error) {
    error.field = error.field.empty() ? "layout" : "layout." + error.field;
    return tl::unexpected<Error>(std::move(error));
  };
  auto registered = std::make_shared<RegisteredLayout>();
  for (std::size_t i = 0; i < request.layout.pools.size(); ++i) {
    const mapping::PoolSpan& span = request.layout.pools[i];
    const std::string field = "layout.pools[" + std::to_string(i) + "]";
    const auto pool = worker.pools.find(span.name);
    if (pool == worker.pools.end())
      return invalid(field + ".name", "POOL_UNKNOWN", "not registered by this worker");
    if (span.bytes > pool->second.request.bytes) {
      return invalid(field + ".bytes", "POOL_TOO_SMALL",
                     std::to_string(pool->second.request.bytes) + " bytes are registered");
    }
    KVFERRY_RETURN_IF_ERROR(check_usable(pool->second, *registered, field));
    registered->pools.push_back(pool->second.memory);
  }
  if (Status valid = mapping::validate_layout(request.layout); !valid)
    return prefixed(valid.error());
  registered->worker = worker.session->id();
  registered->instance = full_name(*worker.session, request.instance);
  registered->rank = request.layout.topology.rank;
  registered->dp_group = request.layout.topology.dp_group;
  registered->layout = request.layout;
  if (config_.arenas != nullptr) {
    registered->arena = config_.arenas->of(registered->device());
    registered->mapped_arena = config_.arenas->mapped_of(registered->device());
  }
  registered->holding = mapping::holding_of(request.layout);
  if (!request.instance_key.is_zero()) registered->instance_key = request.instance_key;
  if (!request.hash_scheme.empty()) {
    registered->reuse_space = reuse_space_of(reuse_domain(*worker.session, request));
    registered->reuse_groups = reuse_groups_of(request.layout);
  }
  return registered;
}

Result<rpc::LayoutRegistration> Registry::register_layout(
    const std::shared_ptr<rpc::Session>& session, rpc::LayoutRequest request) {
  if (draining_.load(std::memory_order_relaxed))
    return fail(Code::kUnavailable, "DRAINING", "the daemon takes no new registrations");
  if (!rpc::valid_name(request.instance))
    return invalid("instance", "NAME_INVALID", "[A-Za-z0-9][A-Za-z0-9._:+-]{0,62}");
  MutexLock lock(mutex_);
  const auto it = workers_.find(session->id());
  if (it == workers_.end()) return worker_gone();
  Worker& worker = it->second;
  const std::string instance = full_name(*session, request.instance);
  const LayoutKey key{instance, request.layout.topology.rank};

  if (const auto old = worker.layouts.find(key); old != worker.layouts.end()) {
    rpc::LayoutRegistration answer = old->second.answer;
    answer.existing = true;
    if (!request.incarnation.is_zero() && request.incarnation != answer.incarnation)
      return registered_otherwise("incarnation");
    if (request.instance_key != old->second.request.instance_key)
      return registered_otherwise("instance_key");
    if (request.reuse_key != old->second.request.reuse_key)
      return registered_otherwise("reuse_key");
    if (request.hash_scheme != old->second.request.hash_scheme)
      return registered_otherwise("reuse_hash_scheme");
    if (request.layout != old->second.request.layout) return registered_otherwise("layout");
    return answer;
  }
  for (const auto& [id, other] : workers_) {
    if (other.layouts.contains(key)) {
      return fail(Code::kAlreadyExists, "RANK_IN_USE",
                  "rank " + std::to_string(key.second) + " is registered by another live worker",
                  "layout.topology.rank");
    }
  }
  if (worker.layouts.size() >= kMaxLayouts)
    return fail(Code::kResourceExhausted, "TOO_MANY_LAYOUTS", "64 a worker");
  if (generations_.size() >= kMaxGenerations && !generations_.contains(key))
    return fail(Code::kResourceExhausted, "TOO_MANY_RANKS", "ranks ever registered here");

  auto built = build_layout(worker, request);
  if (!built) return tl::unexpected(built.error());
  std::shared_ptr<RegisteredLayout> registered = std::move(*built);
  registered->incarnation =
      request.incarnation.is_zero() ? drawn_incarnation(instance) : request.incarnation;
  registered->generation = generations_[key] + 1;
  auto added = directory_.add_local(registered);
  if (!added) return tl::unexpected(added.error());
  generations_[key] = registered->generation;

  Layout& layout = worker.layouts[key];
  layout.registered = registered;
  layout.answer.card = added->card;
  layout.answer.complete = added->complete;
  layout.answer.generation = registered->generation;
  layout.answer.incarnation = registered->incarnation;
  layout.request = std::move(request);
  export_gauges();
  return layout.answer;
}

void Registry::release_layouts(std::vector<std::shared_ptr<const RegisteredLayout>> layouts,
                               std::function<void()> quiet) {
  if (layouts.empty()) {
    quiet();
    return;
  }
  auto left = std::make_shared<std::atomic<std::size_t>>(layouts.size());
  for (const auto& layout : layouts) {
    directory_.remove_local(layout);
    engine_.unregister(layout, Reason::kUnregistered, [left, quiet] {
      if (left->fetch_sub(1) == 1) quiet();
    });
  }
}

void Registry::unregister_layout(rpc::Session& session, std::string instance, uint32_t rank,
                                 rpc::Done<bool> done) {
  std::shared_ptr<const RegisteredLayout> layout;
  {
    MutexLock lock(mutex_);
    const auto it = workers_.find(session.id());
    if (it != workers_.end()) {
      const auto found = it->second.layouts.find({full_name(session, instance), rank});
      if (found != it->second.layouts.end()) {
        layout = found->second.registered;
        it->second.layouts.erase(found);
        export_gauges();
      }
    }
  }
  if (!layout) {
    done(false);
    return;
  }
  release_layouts({layout}, [done] { done(true); });
}

Result<rpc::LayoutView> Registry::find_layout(const rpc::Session& session,
                                              const std::string& instance, uint32_t rank) {
  MutexLock lock(mutex_);
  const auto it = workers_.find(session.id());
  if (it == workers_.end()) return worker_gone();
  const auto found = it->second.layouts.find({full_name(session, instance), rank});
  if (found == it->second.layouts.end()) return unknown_layout();
  return rpc::LayoutView{found->second.registered, &found->second.registered->layout};
}

Result<rpc::LayoutView> Registry::find_reuse_layout(const rpc::Session& session,
                                                    const std::string& instance, uint32_t rank,
                                                    const Secret& key) {
  MutexLock lock(mutex_);
  for (const auto& [id, worker] : workers_) {
    const auto found = worker.layouts.find({full_name(session, instance), rank});
    if (found == worker.layouts.end()) continue;
    const std::shared_ptr<const RegisteredLayout>& registered = found->second.registered;
    rpc::LayoutView view{registered, &registered->layout};
    if (registered->reuse_space.is_zero()) return view;
    rpc::LayoutRequest asked;
    asked.layout.fingerprint = registered->layout.fingerprint;
    asked.hash_scheme = found->second.request.hash_scheme;
    asked.reuse_key = key;
    const Digest16 space = reuse_space_of(reuse_domain(session, asked));
    if (space == registered->reuse_space) return view;
    // Another domain: asked in the same way, and nothing is found, as on a miss.
    struct Foreign : engine::LayoutHandle {
      std::shared_ptr<const RegisteredLayout> keeps;
    };
    auto foreign = std::make_shared<Foreign>();
    static_cast<engine::LayoutHandle&>(*foreign) = *registered;
    foreign->reuse_space = space;
    foreign->keeps = registered;
    view.handle = std::move(foreign);
    return view;
  }
  return unknown_layout();
}

// ---- instances ---------------------------------------------------------------------------------

void Registry::join_instance(rpc::Session& session, std::string instance,
                             std::vector<std::string> cards, Secret instance_key, Time deadline,
                             rpc::Done<rpc::JoinOutcome> done) {
  std::optional<InstanceKey> key;
  if (!instance_key.is_zero()) key = instance_key;
  directory_.join(full_name(session, instance), cards, key, deadline,
                  [done = std::move(done)](Result<JoinOutcome> outcome) {
                    if (!outcome) {
                      done(tl::unexpected(outcome.error()));
                      return;
                    }
                    done(rpc::JoinOutcome{outcome->existing, outcome->incarnation,
                                          outcome->complete, std::move(outcome->missing_ranks)});
                  });
}

Result<rpc::TicketOutcome> Registry::get_ticket(rpc::Session& session,
                                                const std::string& instance) {
  Result<std::string> text = directory_.ticket(full_name(session, instance));
  if (!text) return tl::unexpected(text.error());
  Result<Ticket> ticket = node::parse_ticket(*text);
  if (!ticket) return tl::unexpected(ticket.error());
  return rpc::TicketOutcome{std::move(*text), incarnation_of(*ticket)};
}

void Registry::resolve(rpc::Session& /*session*/, const std::string& ticket,
                       std::shared_ptr<const engine::LayoutHandle> layout, Time deadline,
                       rpc::Done<rpc::ResolveOutcome> done) {
  directory_.probe(
      ticket, std::dynamic_pointer_cast<const RegisteredLayout>(std::move(layout)), deadline,
      [done = std::move(done), rails = config_.transports](Result<ProbeOutcome> probed) {
        if (!probed) {
          done(tl::unexpected(probed.error()));
          return;
        }
        rpc::ResolveOutcome outcome;
        outcome.reachable = probed->reachable;
        outcome.compatible = probed->compatible;
        outcome.problem = std::move(probed->problem);
        if (probed->reachable) outcome.transport = probed->local ? "local" : rails;
        outcome.instance = probed->instance.substr(probed->instance.find('/') + 1);
        outcome.incarnation = probed->incarnation;
        outcome.rank_count = probed->rank_count;
        done(std::move(outcome));
      });
}

Result<rpc::TicketFacts> Registry::parse_ticket(const rpc::Session& session,
                                                const std::string& text) {
  Result<Ticket> ticket = node::parse_ticket(text);
  if (!ticket) return tl::unexpected(ticket.error());
  rpc::TicketFacts facts{instance_of(*ticket), incarnation_of(*ticket)};
  if (!facts.instance.starts_with(session.facts().tenant + "/")) {
    return fail(Code::kPermissionDenied, "OTHER_TENANT",
                "the ticket names an instance of another tenant", "ticket");
  }
  return facts;
}

void Registry::call(WorkerId worker, engine::Event op,
                    std::function<void(const engine::Reply&)> reply) {
  engine_.call(worker, std::move(op), std::move(reply));
}

}  // namespace kvferry::node
