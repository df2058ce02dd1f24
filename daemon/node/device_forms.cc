#include "daemon/node/device_forms.h"

#include "kernels/device_copy.h"

namespace kvferry::node {

Result<DeviceForms::PlanPtr> DeviceForms::make(const mapping::Plan& plan,
                                               const std::vector<uint64_t>& bases) {
  auto packed = kernels::PackedPlan::make(plan.form(), bases);
  if (!packed)
    return fail(Code::kResourceExhausted, "TOO_FRAGMENTED", "the plan is beyond what a GPU takes");
  return std::make_shared<gpu::DevicePlan>(
      std::make_shared<const kernels::PackedPlan>(std::move(*packed)));
}

DeviceForms::PlanPtr DeviceForms::find(const gpu::Device& device) const {
  MutexLock lock(mutex_);
  for (const auto& [of, plan] : plans_)
    if (of == &device) return plan;
  return nullptr;
}

DeviceForms::PlanPtr DeviceForms::put(const gpu::Device& device, PlanPtr plan) {
  MutexLock lock(mutex_);
  for (const auto& [of, known] : plans_)
    if (of == &device) return known;
  return plans_.emplace_back(&device, std::move(plan)).second;
}

}  // namespace kvferry::node
