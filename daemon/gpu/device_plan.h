// A copy plan as kernels on one device read it: its arrays and the addresses of its pools in one
// piece of device memory. Brought there by the queue of that device before the plan's first job,
// given back after the last one; plans that nobody uses at the moment make room for others and come
// again when they are needed.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/copy_plan.h"

namespace kvferry::gpu {

class Device;
class PlanStore;

class DevicePlan {
 public:
  // `form` lives as long as `owner`. bases[i] is the address of pool i as the device sees it.
  DevicePlan(std::shared_ptr<const void> owner, const kernels::CopyPlan& form,
             std::vector<uint64_t> bases);
  ~DevicePlan();
  DevicePlan(const DevicePlan&) = delete;
  DevicePlan& operator=(const DevicePlan&) = delete;

  const kernels::CopyPlan& form() const { return form_; }
  const std::vector<uint64_t>& bases() const { return bases_; }

 private:
  friend class PlanStore;
  struct Place;

  const std::shared_ptr<const void> owner_;
  const kernels::CopyPlan& form_;
  const std::vector<uint64_t> bases_;
  // Touched by the queue's thread only; what it points to may outlive both.
  std::shared_ptr<Place> place_;
};

}  // namespace kvferry::gpu
