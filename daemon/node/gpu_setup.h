// The machine's GPUs as the configuration wants them: used, or not and why. For the daemon's start.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/gpu/device.h"
#include "daemon/gpu/device_pool.h"
#include "daemon/ops/config.h"
#include "daemon/rpc/worker_backend.h"

namespace kvferry::node {

struct Gpu {
  std::shared_ptr<const gpu::Devices> devices;  // null: none is used
  std::unique_ptr<gpu::Imports> imports;        // there if devices are
  std::string why_not;                          // why none is used
};

// What was found is logged once. Errors: FAILED_PRECONDITION CONFIGURATION_GPU where gpu.enabled is
// "on" and there is none, and CONFIGURATION_POOL_KIND where pools.kinds names one that no device
// here can serve.
Result<Gpu> open_gpu(const ops::Config& config);

// The kinds that workers may register: those of the configuration; "auto" is all, with several
// tenants all descriptors. Whether a device serves them is another question.
std::vector<rpc::PoolKind> pool_kinds(const ops::Config& config);

}  // namespace kvferry::node
