#include "daemon/node/settings.h"

#include <algorithm>
#include <string>

namespace kvferry::node {
namespace {

// Of a fraction above 0; at least one.
uint32_t millionths(double fraction) {
  return std::max(static_cast<uint32_t>(fraction * 1e6), 1U);
}

}  // namespace

engine::CheckKind check_kind(ops::CheckKind kind) {
  switch (kind) {
    case ops::CheckKind::kNone:
      break;
    case ops::CheckKind::kXxh3:
      return engine::CheckKind::kXxh3;
    case ops::CheckKind::kGmac:
      return engine::CheckKind::kGmac;
  }
  return engine::CheckKind::kNone;
}

engine::EngineConfig engine_config(const ops::Config& config, const BootId& boot,
                                   const Arenas& arenas) {
  engine::EngineConfig out;
  out.boot = boot;
  out.node = config.node.id;
  for (const Arenas::Arena& arena : arenas.all()) {
    engine::ArenaConfig& to = out.arenas.emplace_back();
    to.segment_bytes = arena.segment_bytes;
    to.mapped = arena.mapped;
    to.on_device = arena.device != nullptr;
  }
  out.chunk_bytes = config.engine.chunk_bytes;
  out.leg_credits = config.engine.leg_credits;
  out.staged_ahead = config.engine.staged_ahead;
  out.max_packed_bytes = config.engine.packed_bytes;
  out.starvation_passes = config.engine.passed_over_limit;
  out.worker_share = millionths(config.shares.worker_share);
  out.peer_share = millionths(config.shares.peer_share);
  out.default_lease = config.engine.lease;
  out.default_wait = config.engine.wait_deadline;
  out.default_deadline = config.engine.transfer_deadline;
  out.max_deadline = config.engine.transfer_deadline_max;
  out.ready_timeout = config.engine.ready_timeout;
  out.ping_interval = config.engine.heartbeat_interval;
  out.silence_limit = config.engine.silence_limit;
  out.lane_retry_first = config.engine.lane_retry;
  out.lane_retry_most = config.engine.lane_retry_max;
  out.landing_timeout = config.engine.landing_timeout;
  out.landing_min_rate = config.engine.min_rate;
  uint64_t slots = 0;
  for (const ops::SocketConfig& socket : config.sockets)
    slots = std::max(slots, socket.worker_limits.max_transfers);
  out.max_transfers_per_worker = static_cast<uint32_t>(slots);
  return out;
}

void set_limits(rpc::OpLimits& limits, const ops::EngineConfig& engine) {
  limits.lease = engine.lease;
  limits.lease_max = engine.lease_max;
  limits.wait = engine.wait_deadline;
  limits.wait_max = engine.wait_deadline_max;
  limits.deadline = engine.transfer_deadline;
  limits.deadline_max = engine.transfer_deadline_max;
  limits.max_receivers = engine.max_receivers;
}

rpc::WorkerLimits worker_limits(const ops::SocketLimits& limits) {
  rpc::WorkerLimits out;
  out.transfers = static_cast<uint32_t>(limits.max_transfers);
  out.pools = static_cast<uint32_t>(limits.max_pools);
  out.pool_bytes = limits.max_pool_bytes;
  out.descriptors = static_cast<uint32_t>(limits.max_descriptors);
  out.calls = static_cast<uint32_t>(limits.max_calls);
  out.claims = static_cast<uint32_t>(limits.max_claims);
  out.reservations = static_cast<uint32_t>(limits.max_reservations);
  return out;
}

rails::RailsConfig rails_config(const ops::Config& config) {
  rails::RailsConfig out;
  out.executable = config.rails.binary;
  // All devices, then all of them again: lanes join rails by their place in the list, over and
  // over, so a device meets its like at a peer that has fewer connections to each.
  for (uint32_t connection = 0; connection < config.rails.connections; ++connection) {
    for (const std::string& transport : config.rails.transports) {
      if (transport == "shm") {
        out.rails.push_back({transport, ""});  // has no device
        continue;
      }
      for (const std::string& device : config.rails.devices)
        out.rails.push_back({transport, device});
    }
  }
  out.ucx.port_first = config.rails.port_range.first;
  out.ucx.port_last = config.rails.port_range.last;
  out.ucx.tcp_segment_bytes = config.rails.segment_bytes;
  out.ucx.overrides = config.ucx;
  out.cuda_driver = config.gpu.driver;
  out.spin = config.rails.spin;
  out.seccomp =
      config.rails.seccomp == ops::Seccomp::kOn ? rails::Seccomp::kOn : rails::Seccomp::kOff;
  out.backoff_first = config.rails.restart_backoff;
  out.backoff_limit = config.rails.restart_backoff_max;
  return out;
}

}  // namespace kvferry::node
