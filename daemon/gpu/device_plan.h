// A copy plan as the kernels on one device read it. Its image is brought into that device's memory
// by the device's queue before the plan's first job and given back after the last one; plans that
// nobody uses at the moment make room for others and come again when they are needed.
#pragma once

#include <memory>
#include <utility>

#include "kernels/device_copy.h"

namespace kvferry::gpu {

class DevicePlan {
 public:
  // Any thread, for one device.
  explicit DevicePlan(std::shared_ptr<const kernels::PackedPlan> packed)
      : packed_(std::move(packed)) {}
  ~DevicePlan();
  DevicePlan(const DevicePlan&) = delete;
  DevicePlan& operator=(const DevicePlan&) = delete;

  const kernels::PackedPlan& packed() const { return *packed_; }
  // For the same plan on another device that sees its pools at the same addresses.
  const std::shared_ptr<const kernels::PackedPlan>& shared_packed() const { return packed_; }
  struct Place;  // where it lies: plan_store.h

 private:
  friend class PlanStore;

  const std::shared_ptr<const kernels::PackedPlan> packed_;
  // Touched by the queue's thread, and at the end.
  std::shared_ptr<Place> place_;
};

}  // namespace kvferry::gpu
