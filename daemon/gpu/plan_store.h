// The device memory in which plans lie: a few large allocations, each with pinned host memory of
// the same size beside it from which the plans are brought over. Allocating and freeing device
// memory stalls a device, so that is done for many plans at once.
//
// Owned and called by the queue's thread with the device's context current; only places may be
// given back from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/gpu/device.h"
#include "daemon/gpu/device_plan.h"
#include "daemon/gpu/event_pool.h"
#include "kernels/device_copy.h"

namespace kvferry::gpu {

class PlanSlab;

// Where a plan lies. Held by its DevicePlan and by each job of it that is on the device.
struct DevicePlan::Place {
  std::shared_ptr<PlanSlab> slab;
  uint64_t offset = 0;  // in the slab
  uint64_t bytes = 0;
  kernels::PlanView view{};
  uint64_t last_use = 0;  // the store's clock
  // Behind the upload, in its stream; absent once the upload is known to have ended.
  Event uploaded;
  cuda::CUstream stream = nullptr;

  Place() = default;
  ~Place();
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;
};

class PlanStore {
 public:
  struct Stats {
    uint64_t uploads = 0;
    uint64_t upload_bytes = 0;
    uint64_t evictions = 0;
  };

  PlanStore(std::shared_ptr<const Device> device, EventPool& events, uint64_t max_bytes);
  // Frees the memory; nothing on the device reads it any more.
  ~PlanStore();
  PlanStore(const PlanStore&) = delete;
  PlanStore& operator=(const PlanStore&) = delete;

  // Takes the first slab, so that a device without room for plans is found out at start.
  Status open();

  // What use() leaves behind.
  struct Use {
    std::shared_ptr<DevicePlan::Place> place;
    // Something has been put into the stream, perhaps though the rest has failed: `place` must be
    // kept until the stream has come that far.
    bool touched = false;
    Status status;
  };
  // What is put into `stream` from now on may read the plan. Errors of Device::check, and
  //   RESOURCE_EXHAUSTED PLAN_ROOM      all room is in use: again when a job has ended
  //   RESOURCE_EXHAUSTED PLAN_TOO_LARGE it would not fit an empty store
  Use use(DevicePlan& plan, const std::shared_ptr<DevicePlan>& shared, cuda::CUstream stream);
  const Stats& stats() const { return stats_; }

 private:
  using PlacePtr = std::shared_ptr<DevicePlan::Place>;
  PlacePtr find_room(uint64_t bytes);
  Result<PlacePtr> make_room(uint64_t bytes);
  Status add_slab(uint64_t bytes);
  // Drops the places of plans that no job uses, the longest unused first, until `bytes` fit.
  PlacePtr evict_for(uint64_t bytes);
  void forget_dead();
  Status await_upload(DevicePlan::Place& place, Use& use, cuda::CUstream stream);
  Status bring(const DevicePlan& plan, DevicePlan::Place& place, cuda::CUstream stream);

  const std::shared_ptr<const Device> device_;
  EventPool& events_;
  const uint64_t max_bytes_;
  uint64_t slab_bytes_ = 0;
  uint64_t clock_ = 0;
  std::vector<std::shared_ptr<PlanSlab>> slabs_;
  std::vector<std::weak_ptr<DevicePlan>> placed_;
  std::size_t forget_at_ = 64;
  Stats stats_;
};

}  // namespace kvferry::gpu
