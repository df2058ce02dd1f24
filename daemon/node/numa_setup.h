// Where this daemon's host arenas, rails and copy threads go on a machine with several NUMA nodes.
// For its start; constant from then on.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "daemon/gpu/device.h"
#include "daemon/node/arenas.h"
#include "daemon/numa/placement.h"
#include "daemon/ops/config.h"
#include "daemon/rails/rails_client.h"
#include "daemon/rpc/admin_backend.h"

namespace kvferry::node {

class NumaPlan {
 public:
  // As [numa] wants it; logs what was decided. `devices` may be null, `sysfs` is for tests. That
  // nothing can be found out is no error: then nothing is bound, with a warning.
  static NumaPlan make(const ops::Config& config, const std::vector<rails::RailSpec>& rails,
                       const gpu::Devices* devices, const std::string& sysfs = "/sys");

  // For Arenas::create; null where nothing is bound. Refers to this object.
  BindMemory memory_binding() const;
  // Of copy::Options and of the rail with that number; empty: any.
  std::vector<CpuSet> copy_cpus() const;
  CpuSet rail_cpus(std::size_t rail) const;

  // What operators see. `copy_errno` is CopyPool::binding_errno(); what fails is logged, too.
  std::vector<rpc::NumaInfo> describe(const Arenas& arenas, int copy_errno) const;
  // Of a rail, without how it went; empty `place` where it is not bound.
  rpc::NumaInfo describe_rail(std::size_t rail) const;

 private:
  bool binds() const { return topology_ && !placement_.arena.empty(); }

  std::optional<numa::Topology> topology_;
  numa::Placement placement_;
  std::vector<rails::RailSpec> rails_;
  std::string problem_;  // why there is no topology, though it was asked for
};

}  // namespace kvferry::node
