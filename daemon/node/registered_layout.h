// A rank's layout as the daemon keeps it from RegisterLayout until nobody uses it any more.
// Immutable once shared; transfers, plans and copies hold references, so its pools stay mapped
// meanwhile.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "daemon/engine/ports.h"
#include "daemon/mapping/layout.h"
#include "daemon/mapping/plan.h"
#include "daemon/memory/host_pool.h"

namespace kvferry::node {

using InstanceKey = std::array<uint8_t, 16>;  // never logged, never sent

struct RegisteredLayout : engine::LayoutHandle {
  // LayoutHandle: worker, instance ("tenant/name"), incarnation, rank, dp_group.
  mapping::RankLayout layout;                            // validated
  mapping::Holding holding;                              // mapping::holding_of(layout)
  std::vector<std::shared_ptr<memory::HostPool>> pools;  // as layout.pools
  uint64_t generation = 0;  // this rank's count of registrations, from 1
  std::optional<InstanceKey> instance_key;
};

// One side's compiled slice with everything that it points into. What the executor hands to the
// copy threads.
struct CompiledPlan : engine::Plan {
  std::shared_ptr<const RegisteredLayout> layout;
  std::shared_ptr<const mapping::Plan> plan;
  // Receiver, groups that clear their tail: cells to be cleared after the slice's scatter; null or
  // empty where there are none.
  std::shared_ptr<const mapping::Plan> tail;
};

}  // namespace kvferry::node
