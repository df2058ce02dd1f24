#include "daemon/gpu/plan_store.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "daemon/base/mutex.h"
#include "daemon/base/units.h"
#include "daemon/gpu/closing.h"
#include "daemon/gpu/pinned_memory.h"

namespace kvferry::gpu {
namespace {

constexpr uint64_t kSlabBytes = 8 << 20;
constexpr uint64_t kSlabGranule = 2 << 20;
constexpr uint64_t kPlaceGranule = 256;
static_assert(kPlaceGranule % kernels::PackedPlan::kAlignment == 0);

}  // namespace

// Device memory and, byte for byte, the pinned memory it is filled from.
class PlanSlab {
 public:
  static Result<std::shared_ptr<PlanSlab>> make(const std::shared_ptr<const Device>& device,
                                                uint64_t bytes) {
    auto slab = std::shared_ptr<PlanSlab>(new PlanSlab(device, bytes));
    void* const host = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (host == MAP_FAILED) return fail_errno("PLAN_MEMORY", "mmap", errno);
    slab->host_ = static_cast<std::byte*>(host);
    // A fork must not leave the device with pages that are no longer ours.
    (void)::madvise(host, bytes, MADV_DONTFORK);
    auto pinned = PinnedMemory::pin({device}, host, bytes);
    KVFERRY_RETURN_IF_ERROR(pinned);
    slab->pinned_ = std::move(*pinned);
    KVFERRY_RETURN_IF_ERROR(
        device->check(device->api().cuMemAlloc(&slab->address_, bytes), "cuMemAlloc"));
    return slab;
  }
  ~PlanSlab() { close(); }
  PlanSlab(const PlanSlab&) = delete;
  PlanSlab& operator=(const PlanSlab&) = delete;

  // Frees the memory; places that are still held may come back later.
  void close() {
    if (address_ != 0) {
      const Closing current(*device_);
      if (current.ok())
        (void)device_->check(device_->api().cuMemFree(std::exchange(address_, 0)), "cuMemFree");
    }
    pinned_.reset();
    if (host_ != nullptr) ::munmap(std::exchange(host_, nullptr), bytes_);
  }

  uint64_t bytes() const { return bytes_; }
  std::byte* host(uint64_t offset) const { return host_ + offset; }
  cuda::CUdeviceptr address(uint64_t offset) const { return address_ + offset; }

  // First fit: plans come and go in about the order of their making.
  bool take(uint64_t bytes, uint64_t& offset) {
    MutexLock lock(mutex_);
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second < bytes) continue;
      offset = it->first;
      const uint64_t left = it->second - bytes;
      free_.erase(it);
      if (left > 0) free_.emplace(offset + bytes, left);
      return true;
    }
    return false;
  }
  void give_back(uint64_t offset, uint64_t bytes) {
    MutexLock lock(mutex_);
    auto next = free_.upper_bound(offset);
    if (next != free_.end() && next->first == offset + bytes) {
      bytes += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        before->second += bytes;
        return;
      }
    }
    free_.emplace(offset, bytes);
  }

 private:
  PlanSlab(std::shared_ptr<const Device> device, uint64_t bytes)
      : device_(std::move(device)), bytes_(bytes), free_{{0, bytes}} {}

  const std::shared_ptr<const Device> device_;
  const uint64_t bytes_;
  std::byte* host_ = nullptr;
  std::shared_ptr<const PinnedMemory> pinned_;
  cuda::CUdeviceptr address_ = 0;
  Mutex mutex_;
  std::map<uint64_t, uint64_t> free_ KVFERRY_GUARDED_BY(mutex_);  // offset -> bytes
};

DevicePlan::Place::~Place() {
  if (slab != nullptr) slab->give_back(offset, bytes);
}

DevicePlan::~DevicePlan() = default;

PlanStore::PlanStore(std::shared_ptr<const Device> device, EventPool& events, uint64_t max_bytes)
    : device_(std::move(device)), events_(events), max_bytes_(std::max(max_bytes, kSlabBytes)) {}

PlanStore::~PlanStore() {
  // Plans that live on are nowhere from now on.
  for (const auto& weak : placed_)
    if (const auto plan = weak.lock()) plan->place_.reset();
  for (const auto& slab : slabs_) slab->close();
}

Status PlanStore::open() {
  return add_slab(kSlabBytes);
}

Status PlanStore::add_slab(uint64_t bytes) {
  const uint64_t wanted = std::max(round_up(bytes, kSlabGranule), kSlabBytes);
  if (wanted > max_bytes_ - std::min(slab_bytes_, max_bytes_))
    return fail(Code::kResourceExhausted, "PLAN_ROOM", "the limit of memory for plans is reached");
  auto slab = PlanSlab::make(device_, wanted);
  KVFERRY_RETURN_IF_ERROR(slab);
  slabs_.push_back(std::move(*slab));
  slab_bytes_ += wanted;
  return {};
}

PlanStore::PlacePtr PlanStore::find_room(uint64_t bytes) {
  for (const auto& slab : slabs_) {
    uint64_t offset = 0;
    if (!slab->take(bytes, offset)) continue;
    auto place = std::make_shared<DevicePlan::Place>();
    place->slab = slab;
    place->offset = offset;
    place->bytes = bytes;
    return place;
  }
  return nullptr;
}

void PlanStore::forget_dead() {
  std::erase_if(placed_, [](const std::weak_ptr<DevicePlan>& plan) { return plan.expired(); });
  forget_at_ = std::max<std::size_t>(64, 2 * placed_.size());
}

PlanStore::PlacePtr PlanStore::evict_for(uint64_t bytes) {
  // A place that only its plan holds is of no job on the device.
  std::vector<std::shared_ptr<DevicePlan>> idle;
  for (const auto& weak : placed_) {
    auto plan = weak.lock();
    if (plan != nullptr && plan->place_ != nullptr && plan->place_.use_count() == 1)
      idle.push_back(std::move(plan));
  }
  std::sort(idle.begin(), idle.end(),
            [](const auto& a, const auto& b) { return a->place_->last_use < b->place_->last_use; });
  for (const auto& plan : idle) {
    plan->place_.reset();
    ++stats_.evictions;
    if (PlacePtr place = find_room(bytes)) return place;
  }
  return nullptr;
}

Result<PlanStore::PlacePtr> PlanStore::make_room(uint64_t bytes) {
  if (PlacePtr place = find_room(bytes)) return place;
  const Status more = add_slab(bytes);
  if (more) {
    if (PlacePtr place = find_room(bytes)) return place;
  } else if (more.error().code != Code::kResourceExhausted && more.error().reason != "PIN_FAILED") {
    return tl::unexpected<Error>(more.error());
  }
  if (PlacePtr place = evict_for(bytes)) return place;
  const bool in_use = std::any_of(placed_.begin(), placed_.end(), [](const auto& weak) {
    const auto plan = weak.lock();
    return plan != nullptr && plan->place_ != nullptr;
  });
  if (in_use)
    return fail(Code::kResourceExhausted, "PLAN_ROOM", "other plans take all room for plans");
  return fail(Code::kResourceExhausted, "PLAN_TOO_LARGE",
              "no room for a plan of " + std::to_string(bytes) + " bytes" +
                  (more ? std::string() : ": " + more.error().to_string()));
}

// The plan is there or on its way: another stream than the one that brings it has to wait for it.
Status PlanStore::await_upload(DevicePlan::Place& place, Use& use, cuda::CUstream stream) {
  if (!place.uploaded || place.stream == stream) return {};
  const cuda::Api& api = device_->api();
  const cuda::CUresult come = api.cuEventQuery(place.uploaded.get());
  if (come == cuda::CUDA_SUCCESS) {
    place.uploaded.reset();
    return {};
  }
  if (come != cuda::CUDA_ERROR_NOT_READY) return device_->check(come, "cuEventQuery");
  use.touched = true;
  return device_->check(api.cuStreamWaitEvent(stream, place.uploaded.get(), 0),
                        "cuStreamWaitEvent");
}

PlanStore::Use PlanStore::use(DevicePlan& plan, const std::shared_ptr<DevicePlan>& shared,
                              cuda::CUstream stream) {
  Use use;
  if (plan.place_ != nullptr) {
    use.place = plan.place_;
    use.place->last_use = ++clock_;
    use.status = await_upload(*use.place, use, stream);
    return use;
  }
  const uint64_t bytes =
      round_up(std::max<uint64_t>(plan.packed().image().size(), 1), kPlaceGranule);
  Result<PlacePtr> room = make_room(bytes);
  if (!room) {
    use.status = tl::unexpected<Error>(std::move(room).error());
    return use;
  }
  use.place = std::move(*room);
  use.place->last_use = ++clock_;
  use.touched = true;
  use.status = bring(plan, *use.place, stream);
  if (!use.status) return use;  // the next job of the plan tries again elsewhere
  plan.place_ = use.place;
  if (placed_.size() >= forget_at_) forget_dead();
  placed_.push_back(shared);
  return use;
}

Status PlanStore::bring(const DevicePlan& plan, DevicePlan::Place& place, cuda::CUstream stream) {
  const std::span<const std::byte> image = plan.packed().image();
  std::byte* const host = place.slab->host(place.offset);
  const cuda::CUdeviceptr address = place.slab->address(place.offset);
  std::memcpy(host, image.data(), image.size());
  place.view = plan.packed().view_at(address);
  const cuda::Api& api = device_->api();
  KVFERRY_RETURN_IF_ERROR(device_->check(api.cuMemcpyHtoDAsync(address, host, image.size(), stream),
                                         "cuMemcpyHtoDAsync"));
  auto event = events_.take();
  KVFERRY_RETURN_IF_ERROR(event);
  KVFERRY_RETURN_IF_ERROR(device_->check(api.cuEventRecord(event->get(), stream), "cuEventRecord"));
  place.uploaded = std::move(*event);
  place.stream = stream;
  ++stats_.uploads;
  stats_.upload_bytes += image.size();
  return {};
}

}  // namespace kvferry::gpu
