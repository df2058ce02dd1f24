// The machine's GPUs as the configuration wants them: used, or not and why. For the daemon's start.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/gpu/device.h"
#include "daemon/gpu/device_pool.h"
#include "daemon/gpu/queues.h"
#include "daemon/node/arenas.h"
#include "daemon/ops/config.h"
#include "daemon/ops/metrics.h"
#include "daemon/ops/watchdog.h"
#include "daemon/rpc/worker_backend.h"

namespace kvferry::node {

// Where the queues' threads count. The metrics are made later than the queues.
struct GpuCounting {
  std::atomic<ops::Metrics*> metrics{nullptr};
};

struct Gpu {
  std::shared_ptr<const gpu::Devices> devices;  // null: none is used
  std::unique_ptr<gpu::Imports> imports;        // there if devices are, as are the next two
  std::unique_ptr<GpuCounting> counting;
  std::unique_ptr<gpu::Queues> queues;
  std::string why_not;  // why none is used
  uint32_t unused = 0;  // that are there and cannot be used

  // Devices in the order of their numbers; empty without GPUs.
  std::vector<ops::GpuLabels> labels() const;
  // Whether events of other processes can be watched.
  bool watches_events() const;
};

// Opens the machine's GPUs, if the configuration lets us: before the arena is made, whose place may
// depend on theirs. UNAVAILABLE or FAILED_PRECONDITION where there is none, or none that may be
// used.
Result<std::shared_ptr<const gpu::Devices>> find_gpus(const ops::Config& config);

// Opens queues of the devices that find_gpus() gave and shows them the arena in host memory, which
// outlives them, as does the watchdog. What was found is logged once. Errors: FAILED_PRECONDITION
// CONFIGURATION_GPU where gpu.enabled is "on" and there is none that can be used,
// CONFIGURATION_ARENA_KIND where arena.kind wants one, and CONFIGURATION_POOL_KIND where
// pools.kinds names one that no device here can serve.
Result<Gpu> open_gpu(const ops::Config& config, Result<std::shared_ptr<const gpu::Devices>> devices,
                     Arenas& arenas, ops::Watchdog& watchdog);

// The kinds that workers may register: those of the configuration; "auto" is all, with several
// tenants all descriptors. Whether a device serves them is another question.
std::vector<rpc::PoolKind> pool_kinds(const ops::Config& config);

}  // namespace kvferry::node
