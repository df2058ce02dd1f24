// A rank's layout as the daemon keeps it from RegisterLayout until nobody uses it any more.
// Immutable once shared; transfers, plans and copies hold references, so its pools stay mapped
// meanwhile.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/engine/ports.h"
#include "daemon/mapping/layout.h"
#include "daemon/mapping/plan.h"
#include "daemon/memory/pool.h"
#include "daemon/node/device_forms.h"

namespace kvferry::gpu {
class HostPins;
}

namespace kvferry::node {

using InstanceKey = Secret;  // that the ranks of an engine share

struct RegisteredLayout : engine::LayoutHandle {
  // LayoutHandle: worker, instance ("tenant/name"), incarnation, rank, dp_group, reuse_space,
  // reuse_groups.
  mapping::RankLayout layout;  // validated
  mapping::Holding holding;    // mapping::holding_of(layout)
  // As layout.pools; all on the host, or all on one device.
  std::vector<std::shared_ptr<memory::Pool>> pools;
  uint64_t generation = 0;  // this rank's count of registrations, from 1
  std::optional<InstanceKey> instance_key;

  // Worked out by the mapping at the first question about a pair of groups, then remembered. Any
  // thread.
  bool serves(uint32_t group, const LayoutHandle& other, uint32_t other_group) const override;
  // Whether some pool of both is of the same memory, wherever in it the blocks lie.
  bool shares_pages(const LayoutHandle& other) const override;

  // Where its pages are; null: on the host.
  const gpu::Device* device() const { return pools.empty() ? nullptr : pools.front()->device(); }

  // Host pools that a copy with a GPU has needed: registered from then on until the layout goes.
  std::shared_ptr<const gpu::HostPins> pins() const KVFERRY_EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    return pins_;
  }
  void keep_pins(std::shared_ptr<const gpu::HostPins> pins) const KVFERRY_EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    pins_ = std::move(pins);
  }

 private:
  // Numbers are never used twice, as addresses are.
  const uint64_t number_ = next_number();
  static uint64_t next_number();
  mutable Mutex mutex_;
  mutable std::map<std::tuple<uint32_t, uint64_t, uint32_t>, bool> serves_
      KVFERRY_GUARDED_BY(mutex_);
  mutable std::shared_ptr<const gpu::HostPins> pins_ KVFERRY_GUARDED_BY(mutex_);
};

// How a layout's groups take part in reuse; block_tokens 0: not at all.
std::vector<engine::ReuseGroup> reuse_groups_of(const mapping::RankLayout& layout);

// Who may find whose blocks: tenant, key, model and how its blocks are hashed.
struct ReuseDomain {
  std::string tenant;
  uint32_t uid = 0;  // of the worker's process; stands in for the key where there is none
  Secret reuse_key;
  Secret instance_key;  // stands in for the reuse key
  std::string fingerprint;
  std::string hash_scheme;
};
Digest16 reuse_space_of(const ReuseDomain& domain);

// One side's compiled slice with everything that it points into. What the executor hands to the
// copy threads.
struct CompiledPlan : engine::Plan {
  // Makes the form for the GPU where the layout's pages are, if they are on one. TOO_FRAGMENTED.
  Status make_device_forms();
  bool same_source(const engine::Plan& other) const override;

  std::shared_ptr<const RegisteredLayout> layout;
  std::shared_ptr<const mapping::Plan> plan;
  // Receiver, groups that clear their tail: cells to be cleared after the slice's scatter; null
  // where there are none.
  std::shared_ptr<const mapping::Plan> tail;
  // The two as GPUs take them.
  mutable DeviceForms forms;
  mutable DeviceForms tail_forms;
};

}  // namespace kvferry::node
