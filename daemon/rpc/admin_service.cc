#include "daemon/rpc/admin_service.h"

#include <grp.h>
#include <grpcpp/grpcpp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "daemon/rpc/unix_socket.h"
#include "kvferry/v1/admin.grpc.pb.h"
#include "kvferry/v1/worker.pb.h"

namespace kvferry::rpc {
namespace {

namespace pb = ::kvferry::v1;

constexpr uint32_t kDefaultTransferLimit = 1000;
constexpr std::size_t kMaxSelectorBytes = 64;
constexpr int kMaxRequestBytes = 64 * 1024;
constexpr std::chrono::seconds kLongestDrain = std::chrono::hours(24);
constexpr Duration kLongestCall = std::chrono::seconds(30);

grpc::Status to_grpc(const Error& error) {
  pb::ErrorDetail detail;
  detail.set_code(static_cast<int32_t>(error.code));
  detail.set_reason(error.reason);
  detail.set_field(error.field);
  detail.set_message(error.message);
  std::string text = error.reason;
  if (!error.field.empty()) text.append(" ").append(error.field);
  text.append(": ").append(error.message);
  return {static_cast<grpc::StatusCode>(error.code), text, detail.SerializeAsString()};
}

void fill(const Duration& from, google::protobuf::Duration* to) {
  const auto ns = from.count();
  to->set_seconds(ns / 1'000'000'000);
  to->set_nanos(static_cast<int32_t>(ns % 1'000'000'000));
}

void fill(const StatusInfo& from, pb::StatusResponse& to) {
  to.set_version(from.version);
  to.set_commit(from.commit);
  to.set_boot_id(to_hex(from.boot.bytes));
  to.set_node_id(from.node);
  fill(from.uptime, to.mutable_uptime());
  to.set_ucx_version(from.ucx_version);
  to.set_protocol_min(from.protocol_min);
  to.set_protocol_max(from.protocol_max);
  for (const MemoryChoice& choice : from.arenas) {
    auto& out = *to.add_arenas();
    out.set_device(choice.device);
    out.set_kind(choice.kind);
    out.set_reason(choice.reason);
  }
  for (const GpuInfo& gpu : from.gpus) {
    auto& out = *to.add_gpus();
    out.set_device(gpu.device);
    out.set_uuid(gpu.uuid);
    out.set_name(gpu.name);
    out.set_up(gpu.up);
    out.set_detail(gpu.detail);
  }
  for (const NumaInfo& numa : from.numa) {
    auto& out = *to.add_numa();
    out.set_part(numa.part);
    out.set_place(numa.place);
    out.set_reason(numa.reason);
    out.set_problem(numa.problem);
  }
  to.set_healthy(from.healthy);
  to.set_ready(from.ready);
  to.set_draining(from.draining);
  to.set_reason(from.reason);
  to.set_workers(from.workers);
  to.set_transfers(from.transfers);
  to.set_links(from.links);
  to.set_rails_up(from.rails_up);
  to.set_rails_total(from.rails_total);
  to.set_rails_restarts(from.rails_restarts);
  to.set_peer_address(from.peer_address);
  to.set_http_address(from.http_address);
  to.set_sent_bytes(from.sent_bytes);
  to.set_received_bytes(from.received_bytes);
  to.set_local_bytes(from.local_bytes);
  if (from.certificate_expiry != 0)
    to.mutable_certificate_expiry()->set_seconds(from.certificate_expiry);
}

void fill(const WorkerInfo& from, pb::Worker& to) {
  to.set_id(from.id);
  to.set_name(from.name);
  to.set_tenant(from.tenant);
  to.set_role(from.role);
  to.set_uid(from.uid);
  to.set_pid(from.pid);
  fill(from.age, to.mutable_age());
  to.set_transfers(from.transfers);
  for (const PoolInfo& pool : from.pools) {
    auto& out = *to.add_pools();
    out.set_name(pool.name);
    out.set_kind(pool.kind);
    out.set_bytes(pool.bytes);
  }
  for (const LayoutInfo& layout : from.layouts) {
    auto& out = *to.add_layouts();
    out.set_instance(layout.instance);
    out.set_rank(layout.rank);
    out.set_generation(layout.generation);
    out.set_groups(layout.groups);
    out.set_planes(layout.planes);
  }
}

void fill(const TransferInfo& from, pb::TransferPart& to) {
  to.set_handle(from.handle);
  to.set_id_hash(from.id_hash);
  to.set_id(escape_bytes(from.id));
  to.set_tenant(from.tenant);
  to.set_instance(from.instance);
  to.set_worker(from.worker);
  to.set_role(from.role);
  to.set_rank(from.rank);
  to.set_state(from.state);
  if (from.reason != Reason::kNone) to.set_reason(std::string(name_of(from.reason)));
  to.set_memory_in_use(from.memory_in_use);
  to.set_bytes_done(from.bytes_done);
  to.set_bytes_total(from.bytes_total);
  to.set_legs(from.legs);
  to.set_legs_done(from.legs_done);
  fill(from.age, to.mutable_age());
  to.set_peer(from.peer);
}

void fill(const PeerInfo& from, pb::Peer& to) {
  to.set_node_id(from.node);
  to.set_address(from.address);
  if (!from.boot.is_zero()) to.set_boot_id(to_hex(from.boot.bytes));
  to.set_state(from.state);
  to.set_detail(from.detail);
  to.set_ucx_version(from.ucx_version);
  to.set_lanes_up(from.lanes_up);
  to.set_lanes_total(from.lanes_total);
  if (from.last_heard.count() >= 0) fill(from.last_heard, to.mutable_last_heard());
  if (from.round_trip.count() > 0) fill(from.round_trip, to.mutable_round_trip());
  to.set_legs(from.legs);
  for (const uint32_t arena : from.mapped) to.add_mapped_arenas(arena);
  for (const uint32_t arena : from.lent) to.add_lent_arenas(arena);
  for (const LaneInfo& lane : from.lanes) {
    pb::PeerLane& out = *to.add_lanes();
    out.set_lane(lane.lane);
    out.set_rail(lane.rail);
    out.set_up(lane.up);
    out.set_send_rate(lane.send_rate);
    out.set_in_flight_bytes(lane.in_flight_bytes);
    out.set_arrived_bytes(lane.arrived_bytes);
  }
}

void fill(const RailInfo& from, pb::Rail& to) {
  to.set_index(from.index);
  to.set_transport(from.transport);
  to.set_device(from.device);
  to.set_address(from.address);
  to.set_up(from.up);
  to.set_sent_bytes(from.sent_bytes);
  to.set_received_bytes(from.received_bytes);
  to.set_errors(from.errors);
  to.set_restarts(from.restarts);
  to.set_connection(from.connection);
  to.set_send_rate(from.send_rate);
  for (const auto& [name, value] : from.settings) {
    auto& out = *to.add_settings();
    out.set_name(name);
    out.set_value(value);
  }
}

void fill(const ArenaInfo& from, pb::Arena& to) {
  to.set_index(from.index);
  to.set_device(from.device);
  to.set_kind(from.kind);
  to.set_reason(from.reason);
  to.set_huge_page_bytes(from.huge_page_bytes);
  to.set_total_bytes(from.total_bytes);
  to.set_free_bytes(from.free_bytes);
  to.set_granted_bytes(from.granted_bytes);
  to.set_landing_bytes(from.landing_bytes);
  to.set_landed_bytes(from.landed_bytes);
  to.set_scattering_bytes(from.scattering_bytes);
  to.set_quarantined_bytes(from.quarantined_bytes);
  to.set_staging_bytes(from.staging_bytes);
  to.set_reserved_bytes(from.reserved_bytes);
  to.set_regions(from.regions);
  to.set_quarantined_regions(from.quarantined_regions);
  to.set_segments(from.segments);
  to.set_mapped(from.mapped);
}

void fill(const LentInfo& from, pb::LentRegions& to) {
  to.set_arena(from.arena);
  to.set_node(from.node);
  to.set_boot(to_hex(from.boot.bytes));
  to.set_linked(from.linked);
  to.set_regions(from.regions);
  to.set_bytes(from.bytes);
}

void fill(const CancelledTransfer& from, pb::CancelledTransfer& to) {
  to.set_handle(from.handle);
  to.set_state(from.state);
  to.set_memory_in_use(from.memory_in_use);
}

// When the caller gives up, at most kLongestCall from now.
Time deadline_of(const grpc::CallbackServerContext& context) {
  const auto left = context.deadline() - std::chrono::system_clock::now();
  const Duration limit =
      std::clamp<Duration>(std::chrono::duration_cast<Duration>(left), Duration(0), kLongestCall);
  return monotonic_now() + limit;
}

void fill(const TracePartInfo& from, pb::TracePart& to) {
  to.set_node_id(escape_bytes(from.node));
  to.set_handle(from.handle);
  to.set_id_hash(from.id_hash);
  to.set_role(from.role);
  to.set_rank(from.rank);
  to.set_state(from.state);
  if (from.reason != Reason::kNone) to.set_reason(std::string(name_of(from.reason)));
  to.set_bytes_done(from.bytes_done);
  to.set_bytes_total(from.bytes_total);
  to.set_fragments(from.fragments);
  to.set_chunks(from.chunks);
  for (const std::string& peer : from.peers) to.add_peers(escape_bytes(peer));
  for (const TraceStepInfo& step : from.steps) {
    auto& out = *to.add_steps();
    out.set_name(step.name);
    fill(step.first, out.mutable_first());
    fill(step.last, out.mutable_last());
    out.set_count(step.count);
  }
  fill(from.clock_error, to.mutable_clock_error());
}

// A handle, or an id hash.
bool is_selector(const std::string& text) {
  return !text.empty() && text.size() <= kMaxSelectorBytes &&
         std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z'); });
}

Error bad_selector() {
  return {Code::kInvalidArgument, "BAD_SELECTOR", "must be a handle such as s1x12, or an id hash",
          "selector"};
}

class AdminService final : public pb::Admin::CallbackService {
 public:
  AdminService(AdminBackend& backend, ops::Metrics& metrics)
      : backend_(backend), metrics_(metrics) {}

  grpc::ServerUnaryReactor* Status(grpc::CallbackServerContext* context, const pb::StatusRequest*,
                                   pb::StatusResponse* response) override {
    auto* reactor = context->DefaultReactor();
    backend_.status(deadline_of(*context),
                    answer<StatusInfo>(reactor, [response](auto& info) { fill(info, *response); }));
    return reactor;
  }

  grpc::ServerUnaryReactor* ListWorkers(grpc::CallbackServerContext* context,
                                        const pb::ListWorkersRequest*,
                                        pb::ListWorkersResponse* response) override {
    auto* reactor = context->DefaultReactor();
    backend_.list_workers(deadline_of(*context),
                          answer<std::vector<WorkerInfo>>(reactor, [response](auto& list) {
                            for (const WorkerInfo& info : list)
                              fill(info, *response->add_workers());
                          }));
    return reactor;
  }

  grpc::ServerUnaryReactor* ListTransfers(grpc::CallbackServerContext* context,
                                          const pb::ListTransfersRequest* request,
                                          pb::ListTransfersResponse* response) override {
    auto* reactor = context->DefaultReactor();
    const std::size_t limit = request->limit() == 0 ? kDefaultTransferLimit : request->limit();
    backend_.list_transfers(
        deadline_of(*context),
        answer<std::vector<TransferInfo>>(reactor, [response, limit](auto& list) {
          response->set_total(static_cast<uint32_t>(list.size()));
          for (std::size_t i = 0; i < std::min(limit, list.size()); ++i)
            fill(list[i], *response->add_transfers());
        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* ListPeers(grpc::CallbackServerContext* context,
                                      const pb::ListPeersRequest*,
                                      pb::ListPeersResponse* response) override {
    auto* reactor = context->DefaultReactor();
    backend_.list_peers(deadline_of(*context),
                        answer<std::vector<PeerInfo>>(reactor, [response](auto& list) {
                          for (const PeerInfo& info : list) fill(info, *response->add_peers());
                        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* ListRails(grpc::CallbackServerContext* context,
                                      const pb::ListRailsRequest*,
                                      pb::ListRailsResponse* response) override {
    auto* reactor = context->DefaultReactor();
    backend_.list_rails(deadline_of(*context),
                        answer<std::vector<RailInfo>>(reactor, [response](auto& list) {
                          for (const RailInfo& info : list) fill(info, *response->add_rails());
                        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* ListArenas(grpc::CallbackServerContext* context,
                                       const pb::ListArenasRequest*,
                                       pb::ListArenasResponse* response) override {
    auto* reactor = context->DefaultReactor();
    backend_.list_arenas(deadline_of(*context),
                         answer<ArenasInfo>(reactor, [response](const ArenasInfo& info) {
                           for (const ArenaInfo& arena : info.arenas)
                             fill(arena, *response->add_arenas());
                           for (const LentInfo& lent : info.lent) fill(lent, *response->add_lent());
                         }));
    return reactor;
  }

  grpc::ServerUnaryReactor* ReleaseArenas(grpc::CallbackServerContext* context,
                                          const pb::ReleaseArenasRequest* request,
                                          pb::ReleaseArenasResponse* response) override {
    auto* reactor = context->DefaultReactor();
    std::optional<BootId> boot;
    if (!request->boot().empty()) {
      boot.emplace();
      if (!from_hex(request->boot(), boot->bytes)) {
        finish(reactor, Error{Code::kInvalidArgument, "BAD_BOOT",
                              "must be a boot id as \"arenas\" shows it", "boot"});
        return reactor;
      }
    }
    // A boot id alone may be said by several nodes, of which not all are gone.
    if (request->node().empty()) {
      finish(reactor, Error{Code::kInvalidArgument, "NOTHING_NAMED",
                            "name the node that the memory was lent to", "node"});
      return reactor;
    }
    backend_.release_arenas(request->node(), boot, deadline_of(*context),
                            answer<ReleasedInfo>(reactor, [response](const ReleasedInfo& info) {
                              response->set_regions(info.regions);
                              response->set_bytes(info.bytes);
                              response->set_linked(info.linked);
                            }));
    return reactor;
  }

  grpc::ServerUnaryReactor* CancelTransfer(grpc::CallbackServerContext* context,
                                           const pb::CancelTransferRequest* request,
                                           pb::CancelTransferResponse* response) override {
    auto* reactor = context->DefaultReactor();
    if (!is_selector(request->selector())) {
      finish(reactor, bad_selector());
      return reactor;
    }
    backend_.cancel_transfer(
        request->selector(), deadline_of(*context),
        answer<std::vector<CancelledTransfer>>(reactor, [response](auto& list) {
          for (const CancelledTransfer& info : list) fill(info, *response->add_transfers());
        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* Trace(grpc::CallbackServerContext* context,
                                  const pb::TraceRequest* request,
                                  pb::TraceResponse* response) override {
    auto* reactor = context->DefaultReactor();
    if (!is_selector(request->selector())) {
      finish(reactor, bad_selector());
      return reactor;
    }
    backend_.trace(request->selector(), deadline_of(*context),
                   answer<TraceInfo>(reactor, [response](const TraceInfo& info) {
                     for (const TracePartInfo& part : info.parts)
                       fill(part, *response->add_parts());
                     for (const TraceGapInfo& gap : info.gaps) {
                       auto& out = *response->add_gaps();
                       out.set_node_id(escape_bytes(gap.node));
                       out.set_detail(escape_bytes(gap.detail));
                     }
                     fill(info.age, response->mutable_age());
                   }));
    return reactor;
  }

  grpc::ServerUnaryReactor* Health(grpc::CallbackServerContext* context, const pb::HealthRequest*,
                                   pb::HealthResponse* response) override {
    auto* reactor = context->DefaultReactor();
    backend_.health(deadline_of(*context),
                    answer<std::vector<HealthCheckInfo>>(reactor, [response](auto& list) {
                      response->set_healthy(true);
                      for (const HealthCheckInfo& check : list) {
                        auto& out = *response->add_checks();
                        out.set_name(check.name);
                        out.set_ok(check.ok);
                        out.set_detail(check.detail);
                        if (!check.ok) response->set_healthy(false);
                      }
                    }));
    return reactor;
  }

  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context,
                                  const pb::DrainRequest* request, pb::DrainResponse*) override {
    auto* reactor = context->DefaultReactor();
    std::optional<Duration> limit;
    if (request->has_limit()) {
      const auto& given = request->limit();
      if (given.seconds() < 0 || given.seconds() > kLongestDrain.count() || given.nanos() < 0 ||
          given.nanos() > 999'999'999) {
        finish(reactor,
               Error{Code::kInvalidArgument, "BAD_LIMIT", "must be from 0 s to 24 h", "limit"});
        return reactor;
      }
      limit = std::chrono::seconds(given.seconds()) + std::chrono::nanoseconds(given.nanos());
    }
    backend_.drain(limit, answer<bool>(reactor, [](bool) {}));
    return reactor;
  }
  grpc::ServerUnaryReactor* Reload(grpc::CallbackServerContext* context, const pb::ReloadRequest*,
                                   pb::ReloadResponse* response) override {
    auto* reactor = context->DefaultReactor();
    backend_.reload(answer<ReloadedInfo>(reactor, [response](const ReloadedInfo& info) {
      response->set_peers(info.peers);
      for (const std::string& key : info.taken_keys) response->add_taken_keys(key);
      for (const std::string& key : info.restart_keys) response->add_restart_keys(key);
    }));
    return reactor;
  }
  grpc::ServerUnaryReactor* GetConfig(grpc::CallbackServerContext* context,
                                      const pb::GetConfigRequest*,
                                      pb::GetConfigResponse* response) override {
    auto* reactor = context->DefaultReactor();
    backend_.config(answer<std::vector<ConfigValueInfo>>(reactor, [response](auto& list) {
      for (ConfigValueInfo& info : list) {
        pb::ConfigValue& row = *response->add_values();
        row.set_key(std::move(info.key));
        row.set_value(std::move(info.value));
        row.set_origin(std::move(info.origin));
        row.set_reloadable(info.reloadable);
        row.set_next(std::move(info.next));
      }
    }));
    return reactor;
  }

 private:
  void finish(grpc::ServerUnaryReactor* reactor, const Error& error) {
    metrics_.rpc_ended(error.code);
    reactor->Finish(to_grpc(error));
  }

  // What the backend calls with its answer: `into` fills the response, which lives until Finish.
  // One that is dropped unanswered, as the engine stops, is answered with that.
  template <typename T, typename Into>
  Reply<T> answer(grpc::ServerUnaryReactor* reactor, Into into) {
    struct Pending {
      AdminService& service;
      grpc::ServerUnaryReactor* reactor;
      std::atomic<bool> answered{false};
      ~Pending() {
        if (!answered)
          service.finish(reactor, {Code::kUnavailable, "SHUTDOWN", "the daemon stops", {}});
      }
    };
    auto pending = std::make_shared<Pending>(*this, reactor);
    return [this, pending, reactor, into](Result<T> result) {
      if (pending->answered.exchange(true)) return;
      if (!result) {
        finish(reactor, result.error());
        return;
      }
      into(*result);
      metrics_.rpc_ended(Code::kOk);
      reactor->Finish(grpc::Status::OK);
    };
  }

  AdminBackend& backend_;
  ops::Metrics& metrics_;
};

tl::unexpected<Error> listen_failed(const std::string& path, const std::string& why) {
  return fail(Code::kUnavailable, "LISTEN_FAILED", "cannot serve on " + path + ": " + why);
}

Status set_owner(const AdminServerConfig& config) {
  if (!config.group.empty()) {
    const ::group* group = ::getgrnam(config.group.c_str());
    if (group == nullptr) return listen_failed(config.path, "no group " + config.group);
    if (::chown(config.path.c_str(), static_cast<uid_t>(-1), group->gr_gid) != 0)
      return listen_failed(config.path, std::string("chown: ") + std::strerror(errno));
  }
  if (::chmod(config.path.c_str(), config.mode) != 0)
    return listen_failed(config.path, std::string("chmod: ") + std::strerror(errno));
  return {};
}

}  // namespace

struct AdminServer::Impl {
  Impl(AdminBackend& backend, ops::Metrics& metrics) : service(backend, metrics) {}
  AdminService service;
  std::unique_ptr<grpc::Server> server;
};

AdminServer::AdminServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Result<std::unique_ptr<AdminServer>> AdminServer::start(const AdminServerConfig& config,
                                                        AdminBackend& backend,
                                                        ops::Metrics& metrics) {
  if (somebody_listens(config.path)) return listen_failed(config.path, "another daemon serves it");
  auto impl = std::make_unique<Impl>(backend, metrics);
  grpc::ServerBuilder builder;
  int bound = 0;
  builder.AddListeningPort("unix:" + config.path, grpc::InsecureServerCredentials(), &bound);
  builder.SetMaxReceiveMessageSize(kMaxRequestBytes);
  builder.RegisterService(&impl->service);
  // Nobody else may connect before the owner is set.
  const mode_t before = ::umask(0177);
  impl->server = builder.BuildAndStart();
  ::umask(before);
  if (impl->server == nullptr || bound == 0)
    return listen_failed(config.path, "cannot bind (does its directory exist?)");
  auto server = std::unique_ptr<AdminServer>(new AdminServer(std::move(impl)));
  KVFERRY_RETURN_IF_ERROR(set_owner(config));
  return server;
}

AdminServer::~AdminServer() {
  shutdown(monotonic_now() + std::chrono::seconds(1));
}

void AdminServer::shutdown(Time deadline) {
  if (impl_->server == nullptr) return;
  const Duration left = std::max(deadline - monotonic_now(), Duration(0));
  impl_->server->Shutdown(std::chrono::system_clock::now() +
                          std::chrono::duration_cast<std::chrono::system_clock::duration>(left));
  impl_->server.reset();
}

std::string escape_bytes(const std::string& bytes) {
  static constexpr std::string_view kHex = "0123456789abcdef";
  std::string out;
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f && c != '\\' && c != '"') {
      out += c;
    } else {
      out += "\\x";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    }
  }
  return out;
}

}  // namespace kvferry::rpc
