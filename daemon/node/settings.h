// What the parts are told of the configuration, which has been checked.
#pragma once

#include "daemon/base/ids.h"
#include "daemon/engine/config.h"
#include "daemon/node/arenas.h"
#include "daemon/ops/config.h"
#include "daemon/rails/rails_client.h"
#include "daemon/rpc/lifeline.h"
#include "daemon/rpc/worker_ops.h"

namespace kvferry::node {

engine::CheckKind check_kind(ops::CheckKind kind);
engine::EngineConfig engine_config(const ops::Config& config, const BootId& boot,
                                   const Arenas& arenas);
// Of `limits`, what the configuration says and a reload may change.
void set_limits(rpc::OpLimits& limits, const ops::EngineConfig& engine);
// Of one worker or of all of a socket.
rpc::WorkerLimits worker_limits(const ops::SocketLimits& limits);
rails::RailsConfig rails_config(const ops::Config& config);

}  // namespace kvferry::node
