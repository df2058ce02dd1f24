// A compiled plan as GPUs take it: one form for each device that copies by it. Thread-safe.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "daemon/gpu/device_plan.h"
#include "daemon/mapping/plan.h"

namespace kvferry::gpu {
class Device;
}

namespace kvferry::node {

class DeviceForms {
 public:
  using PlanPtr = std::shared_ptr<gpu::DevicePlan>;

  // bases[i]: the address of pool i as that device sees it. RESOURCE_EXHAUSTED TOO_FRAGMENTED for
  // what no device could hold. Takes time in proportion to the plan.
  static Result<PlanPtr> make(const mapping::Plan& plan, const std::vector<uint64_t>& bases);

  // Null if there is none yet.
  PlanPtr find(const gpu::Device& device) const KVFERRY_EXCLUDES(mutex_);
  // The one to be used: another thread may have been faster.
  PlanPtr put(const gpu::Device& device, PlanPtr plan) KVFERRY_EXCLUDES(mutex_);

 private:
  mutable Mutex mutex_;
  std::vector<std::pair<const gpu::Device*, PlanPtr>> plans_ KVFERRY_GUARDED_BY(mutex_);
};

}  // namespace kvferry::node
